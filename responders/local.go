package responders

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"stoop/alert"
	"stoop/broker"
	"stoop/node"
)

// errHost and errNoSuspect are refusals of steps that have nothing to act on.
var (
	errOnHost     = Refuse("the host raised the alert: there is no pod")
	errHost       = Refuse("the host itself raised the alert: there is no container")
	errNotHost    = Refuse("a container raised the alert: this responder is for the host's own")
	errNoSuspect  = Refuse("the alert names no container: let Falco's append_output add container.id (docs/falco.md)")
	errNoResource = Refuse("the alert names no object of the cluster: only Kubernetes audit events do (ka.target.resource, ka.target.name)")
	errNoProcess  = Refuse("the alert names no process: let Falco's append_output add proc.pid and proc.pid.ts (docs/falco.md)")
)

// lacking is why an alert with this target names no such object, or nil.
func lacking(o Object, t alert.Target) error {
	switch o {
	case PodObject:
		if t.Host {
			return errOnHost
		}
	case ResourceObject:
		if t.Resource == nil || t.Resource.Name == "" {
			return errNoResource
		}
	case HostObject:
		if !t.Host {
			return errNotHost
		}
	case ContainerObject:
		switch {
		case t.Host:
			return errHost
		case t.Container == "" && t.PID == 0:
			return errNoSuspect
		}
	case ProcessObject:
		if t.PID == 0 {
			return errNoProcess
		}
	case SuspectObject:
		if t.PID == 0 && t.Container == "" {
			return errNoSuspect
		}
	}
	return nil
}

// locate finds what a step of this node's own responders acts on, and proves it
// by what the kernel says. No API server is asked: what the watch knows of the
// pod is taken, so that the guards can be asked about it.
//
// The reason, where there is no error, is why the step can't be done here.
func (h *Host) locate(ctx context.Context, r *running, req *Request) (missing string, err error) {
	t := &req.Target
	if why := h.Guards.elsewhere(*t); why != "" {
		return "", Refuse("%s", why) // evidence asks no guard, but is of this machine all the same
	}
	if h.Guards.Own.Owns(req.Alert) {
		// Or evidence would be kept of what keeps evidence, without an end: it reads
		// what Falco raises alerts about.
		return "", Refuse("a program that stoop started raised this alert")
	}
	if err := lacking(r.Object, *t); err != nil {
		return "", err
	}
	if h.Env.Local == nil {
		return "stoop does not run on the node that the alert came from", nil
	}
	if len(r.missing) > 0 {
		return strings.Join(r.missing, "; "), nil
	}
	if r.Object == HostObject {
		return "", nil
	}
	if t.PID != 0 {
		container := t.Container
		if t.Host {
			container = "host"
		}
		p, err := h.Env.Local.Process(int(t.PID), t.PIDStart, container)
		switch {
		case err == nil:
			req.Process = p
			if t.Container == "" && !t.Host {
				t.Container = p.CgroupOf
			}
		case r.Object == ProcessObject, t.Container == "":
			return "", fmt.Errorf("process %d: %w", t.PID, err)
		}
	}
	if t.Container == "" {
		if r.Object == ContainerObject {
			return "", Refuse("process %d runs in no container", t.PID)
		}
		return "", nil
	}
	pid := 0
	if req.Process != nil {
		pid = req.Process.PID
	}
	c, err := h.Env.Local.Container(ctx, t.Container, pid)
	if err != nil {
		return "", fmt.Errorf("container %s: %w", t.Container, err)
	}
	req.Container = c
	t.Container = c.ID
	return "", h.podOf(ctx, req)
}

// podOf fills in whose container it is, so that the guards know. The cgroup says
// which pod; what that pod is called and where it lives says the watch, or, while
// that does not know, Falco, which has it from the container runtime.
func (h *Host) podOf(ctx context.Context, req *Request) error {
	t, c := &req.Target, req.Container
	if t.UID != "" && c.PodUID != "" && t.UID != c.PodUID {
		return fmt.Errorf("the alert is of the pod with uid %s, container %s is one of the pod with uid %s: %w", t.UID, c.ID, c.PodUID, errUnproved)
	}
	if h.Pods != nil {
		pod, owner := h.Pods.owner(ctx, c.ID, types.UID(c.PodUID))
		if pod != nil {
			if what := differs(alert.Target{Pod: t.Pod, Namespace: t.Namespace}, pod); what != "" {
				return fmt.Errorf("the alert names %s, but container %s is one of pod %s/%s: %w", what, c.ID, pod.Namespace, pod.Name, errUnproved)
			}
			*t = owner
			t.Node, t.PID, t.PIDStart, t.Resource = req.Step.Target.Node, req.Step.Target.PID, req.Step.Target.PIDStart, req.Step.Target.Resource
			req.Pod = pod
			return nil
		}
	}
	if c.PodUID != "" {
		t.UID = c.PodUID
	}
	return nil
}

// unclear is why a container must be left alone since nobody can say whose it
// is, or "".
func unclear(req *Request) string {
	if c := req.Container; c != nil && c.PodUID != "" && req.Target.Namespace == "" {
		return "nobody can say yet which namespace the container's pod is in, so it may be a protected one"
	}
	return ""
}

// owner is the pod that a container is of, as the watch knows it, also when it
// was deleted a while ago and its container runs on. It waits a little for a pod
// that is new; nil: not known.
func (p *Pods) owner(ctx context.Context, container string, uid types.UID) (*corev1.Pod, alert.Target) {
	t := alert.Target{Container: container}
	of := process{pod: uid, container: container}
	ctx, cancel := context.WithTimeout(ctx, p.wait)
	defer cancel()
	for {
		p.mu.Lock()
		changed := p.changed
		live, id, err := p.proved(t, of)
		var gone *gonePod
		if live == nil && err == nil {
			gone = p.findGone(t, of, false)
		}
		p.mu.Unlock()
		switch {
		case err != nil:
			return nil, t
		case live != nil:
			return live.Pod, filled(t, live, id)
		case gone != nil:
			return gone.Pod, filled(t, gone.nodePod, "")
		case uid == "":
			return nil, t // a plain container: no pod will appear
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, t
		}
	}
}

// close lets go of what the host held for the step.
func (r *Request) close() {
	if r != nil && r.Process != nil {
		_ = r.Process.Close()
	}
}

// object is what the cooldown counts by.
func object(r *running, req *Request) string {
	if p, ok := r.act.(Particular); ok {
		return p.Object(req)
	}
	switch {
	case r.Object == ProcessObject && req.Process != nil:
		return fmt.Sprintf("process/%d/%d", req.Process.PID, req.Process.Start)
	case req.Container != nil:
		return "container/" + req.Container.ID
	case r.Object == NodeObject:
		return "node"
	case r.objectOf(req.Step.Params) == ResourceObject:
		t := req.Target.Resource
		return "resource/" + t.Resource + "/" + t.Namespace + "/" + t.Name
	}
	return objectOf(req.Target)
}

// owner is what the owner's limit counts by: the pod's controller, or the workload
// where the step acts on that. A restart gives a Deployment another controller of
// its pods.
func owner(r *running, req *Request) string {
	if p, ok := r.act.(Particular); ok && r.Object == PodObject {
		return p.Object(req)
	}
	return ownerOf(req.Pod)
}

// missing says which of a responder's needs this machine does not grant.
func missing(e Entry, local *node.Node) []string {
	if local == nil || len(e.Needs) == 0 {
		return nil
	}
	return local.Missing(e.Needs...)
}

// keepEvery is how often it is looked whether what was done on the node still
// holds. What is gone by then is forgotten.
const keepEvery = time.Hour

// keepLoop looks at the start, after a pause, and every now and then.
func (h *Host) keepLoop(ctx context.Context) {
	h.Cluster.settle(ctx)
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for actor := "restart"; ; {
		h.keep(ctx, actor)
		select {
		case <-ctx.Done():
			return
		case <-h.resumed:
			actor = "resume"
		case <-tick.C:
			actor = "hourly look"
		}
	}
}

// keep makes sure that what was done on this node still holds, and says of what
// does not that it was lifted.
//
// In audit mode, or while paused, nothing is put in force again.
func (h *Host) keep(ctx context.Context, actor string) {
	if h.Guards.Mode != broker.Enforce || h.stopped() != "" {
		return
	}
	for id, r := range h.undos.kept() {
		run := h.responders[r.Responder]
		if run == nil || run.act == nil || !run.local() || h.Env.Local == nil || r.Intended {
			continue // a step that was cut off comes again by itself
		}
		k, ok := run.act.(Keeper)
		if !ok {
			continue
		}
		if ctx.Err() != nil {
			return
		}
		h.keepOne(ctx, k, run, id, r, actor)
	}
}

func (h *Host) keepOne(ctx context.Context, k Keeper, run *running, id string, r undo, actor string) {
	if !h.undos.take(id) {
		return // it is being taken back
	}
	defer h.undos.give(id)
	o := r.outcome(id, actor)
	actCtx, cancel := h.deadline(ctx, run.Deadline)
	defer cancel()
	res, err := k.Keep(actCtx, &UndoRequest{ID: id, Target: r.Target, Record: r.Record, Actor: actor})
	status, _, _, reason := classify(err)
	switch {
	case err == nil && res.Nothing:
		h.Log.Debug("what was done on the node still holds", "step", id, "responder", r.Responder)
		return
	case err == nil:
		o.Status, o.Reason, o.Found, o.Undo = broker.Done, "in force again: "+res.Reason, res.Found, true
	case status == broker.Nothing:
		o.Status, o.Reason = broker.Undone, "lifted, not by stoop: "+reason
		if err := h.undos.end(ctx, id); err != nil {
			h.Log.Error("that a step was lifted could not be stored", "step", id, "error", err)
		}
	case errors.Is(err, context.Canceled):
		return
	default:
		o.Status, o.Reason = broker.Failed, "make sure that it still holds: "+reason
	}
	h.record(o)
}
