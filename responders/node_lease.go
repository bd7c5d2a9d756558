package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// What takes a node out of service does so to one node of the cluster at a time,
// and to no more of them than maxNodes. Each node has a stoop of its own, so that
// is agreed on in the cluster itself: by a Lease that only one of them holds at a
// time, and by a note on each node, which whoever holds the Lease counts.
const (
	nodeLeaseName = "stoop-node-acts"
	// notePrefix and a step's id name the annotation of a node that says what that
	// step does to it: [noteCordon], [noteDrain] or [noteTaint] and the taint.
	notePrefix = ownPrefix + "node-act."
	noteCordon = "cordon"
	noteDrain  = "drain" // of a node that somebody else had cordoned
	noteTaint  = "taint "

	// The holder renews the Lease after every leaseBeat, gives up its act when that
	// has not worked for two of them, and is dead when it was not heard of for three.
	leaseBeat = 5 * time.Second
	// leaseBusy is about when a step asks again whose Lease another node holds.
	leaseBusy = 5 * time.Second
	// nodeAnswer bounds one request: an act may have much longer.
	nodeAnswer = 10 * time.Second
	// nodesPage is how many nodes are asked for at once.
	nodesPage = 250
	// nodeTries is how often a change of the node is tried that others change at
	// the same time.
	nodeTries = 5
)

// maxNodes is how many of the nodes of a cluster stoop keeps out of service at
// once: 2 %, and one in a small cluster.
func maxNodes(all int) int { return max(1, all*2/100) }

// nodeActsNotes is what the responders that do so say of it.
const nodeActsNotes = `One node of the cluster at a time: while it acts, the node's stoop holds the Lease
stoop-node-acts in stoop's own namespace (default, where stoop runs in none), which
others wait for, trying again every 5 s until the alert is too old. A holder that
died is waited for 15 s. And at most 2 % of the cluster's nodes, but one at least: when
as many others already are cordoned, drained or tainted by stoop, the step is refused
and names them. One that a person put back in service does not count, one that a
person took out does not either. The Lease is made where it is missing; RBAC can
restrict only reading and changing it to its name.

In the cluster the node has the name that stoop was given: node: in stoop.yaml, --node
or NODE_NAME. RBAC can't say "this node only"; the request does.`

// nodeActsRBAC is what taking a node out of service needs.
func nodeActsRBAC(more ...rbacv1.PolicyRule) []rbacv1.PolicyRule {
	return slices.Concat([]rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "list", "patch"}},
	}, leaseRBAC(nodeLeaseName), more)
}

// nodeActs is how this stoop takes its node out of service.
type nodeActs struct {
	kube   *Kube
	node   string
	lease  lease
	beat   time.Duration
	answer time.Duration
	log    *slog.Logger
}

func newNodeActs(env Env) nodeActs {
	a := nodeActs{kube: env.Kube, node: env.Node, lease: lease{env.Kube, env.Self.Home(), nodeLeaseName, env.Node}, beat: leaseBeat, answer: nodeAnswer, log: env.Log}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	return a
}

// nodeTurn is what this process knows of whose turn it is.
type nodeTurn struct {
	taken sync.Mutex // by an act of this node's own

	mu      sync.Mutex
	version string // of the Lease, as it was when another node was last seen to hold it
	since   time.Time
}

// dead reports whether the Lease has not changed for so long, by this node's own
// clock, that its holder is dead. The times in it are those of the holder's clock.
func (t *nodeTurn) dead(version string, after time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.version != version {
		t.version, t.since = version, time.Now()
	}
	return time.Since(t.since) >= after
}

// errNodeLease says that the Lease was lost in the middle of an act.
var errNodeLease = errors.New("the lease " + nodeLeaseName + " was lost, so the act was ended")

// hold does an act while this node holds the Lease, if one more node may be taken
// out of service. The act has to end when its context does. A [Retry] says that it
// is another's turn, a refusal that there are enough already.
func (a *nodeActs) hold(ctx context.Context, act func(context.Context) error) error {
	turn := &a.kube.nodeTurn
	if !turn.taken.TryLock() {
		return Retry(errors.New("another step of this node's is taking it out of service"), leaseBusy)
	}
	defer turn.taken.Unlock()
	l, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	actCtx, cancel := context.WithCancelCause(ctx)
	renewed := make(chan *leaseHeld, 1)
	go func() { renewed <- a.renew(actCtx, cancel, l) }()
	if err = a.room(actCtx); err == nil {
		err = act(actCtx)
	}
	if err != nil && errors.Is(context.Cause(actCtx), errNodeLease) {
		err = Retry(errNodeLease, 0)
	}
	cancel(nil)
	a.release(ctx, <-renewed)
	return err
}

// room refuses when as many other nodes are out of service already as may be.
func (a *nodeActs) room(ctx context.Context) error {
	all, out, err := a.outOfService(ctx)
	if err != nil {
		return err
	}
	if most := maxNodes(all); len(out) >= most {
		return Refuse("stoop takes at most %d of the cluster's %d nodes out of service (2 %%, at least one), and these are already: %s; "+
			"undo the steps that did so, or wait for their ttl", most, all, briefly(out))
	}
	return nil
}

// outOfService counts the nodes and names those others that stoop has taken out
// of service.
func (a *nodeActs) outOfService(ctx context.Context) (all int, out []string, err error) {
	var noted []string
	for next := ""; ; {
		// Only what is noted on them, and all of it as it is now.
		one, cancel := context.WithTimeout(ctx, a.answer)
		body, err := a.kube.core.Get().Resource("nodes").
			SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1").
			VersionedParams(&metav1.ListOptions{Limit: nodesPage, Continue: next}, a.kube.params).
			Do(one).Raw()
		cancel()
		if err != nil {
			return 0, nil, fmt.Errorf("list the nodes: %w", err)
		}
		var page struct {
			Metadata struct {
				Continue string `json:"continue"`
			} `json:"metadata"`
			Items []struct {
				Metadata struct {
					Name        string            `json:"name"`
					Annotations map[string]string `json:"annotations"`
				} `json:"metadata"`
			} `json:"items"`
		}
		if err := json.Unmarshal(body, &page); err != nil {
			return 0, nil, fmt.Errorf("list the nodes: read the answer: %w", err)
		}
		all += len(page.Items)
		for _, n := range page.Items {
			if n.Metadata.Name != a.node && len(notes(n.Metadata.Annotations)) > 0 {
				noted = append(noted, n.Metadata.Name)
			}
		}
		if next = page.Metadata.Continue; next == "" {
			break
		}
	}
	// Somebody may have put one back in service by hand, and left the note.
	for _, name := range noted {
		node, err := a.ask(ctx, name)
		switch {
		case apierrors.IsNotFound(err):
		case err != nil:
			return 0, nil, err
		case slices.ContainsFunc(slices.Collect(maps.Values(notes(node.Annotations))), func(note string) bool { return inForce(node, note) }):
			out = append(out, name)
		}
	}
	return all, out, nil
}

// notes are what stoop's steps have noted on a node, by step.
func notes(annotations map[string]string) map[string]string {
	var out map[string]string
	for name, note := range annotations {
		if step, ok := strings.CutPrefix(name, notePrefix); ok {
			if out == nil {
				out = map[string]string{}
			}
			out[step] = note
		}
	}
	return out
}

// inForce reports whether what a note says still keeps pods off the node.
func inForce(node *corev1.Node, note string) bool {
	taint, ok := strings.CutPrefix(note, noteTaint)
	if !ok {
		return node.Spec.Unschedulable
	}
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool {
		return t.Effect != corev1.TaintEffectPreferNoSchedule && t.ToString() == taint
	})
}

// acquire takes the Lease when nobody holds it, or a dead one, or this node: a
// stoop that was killed in the middle need not wait for itself.
func (a *nodeActs) acquire(ctx context.Context) (*leaseHeld, error) {
	fail := func(err error) (*leaseHeld, error) {
		return nil, fmt.Errorf("take the lease %s: %w", a.lease, err)
	}
	answer, cancel := context.WithTimeout(ctx, a.answer)
	defer cancel()
	l, err := a.lease.read(answer)
	if err != nil {
		return fail(err)
	}
	holder := l.spec.HolderIdentity
	if holder != "" && holder != a.node {
		wait := min(max(time.Duration(l.spec.LeaseDurationSeconds)*time.Second, 3*a.beat), 12*a.beat)
		if !a.kube.nodeTurn.dead(l.object.GetResourceVersion(), wait) {
			// While it is that node's turn, there may be enough with it.
			if err := a.room(ctx); err != nil {
				return nil, err
			}
			return nil, Retry(fmt.Errorf("the stoop of node %s is taking its node out of service, and only one node's turn it is at a time", quote(holder)),
				leaseBusy-leaseBusy/5+rand.N(2*leaseBusy/5))
		}
		a.log.Warn("the holder of the lease has not been heard of: it is taken over", "lease", nodeLeaseName, "holder", holder)
	}
	a.lease.take(l, 3*a.beat)
	// A conflict is another node that was faster.
	if err := a.lease.write(answer, l); err != nil {
		return fail(err)
	}
	return l, nil
}

// renew keeps the Lease until ctx is done, and ends it itself when the Lease is
// lost. It returns the Lease as it is then; nil when it is not this node's any
// more.
func (a *nodeActs) renew(ctx context.Context, cancel context.CancelCauseFunc, l *leaseHeld) *leaseHeld {
	next := time.NewTimer(a.beat)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return l
		case <-next.C:
		}
		answer, done := context.WithDeadline(ctx, l.at.Add(2*a.beat))
		err := a.lease.write(answer, l)
		done()
		switch {
		case ctx.Err() != nil:
			return l
		case err == nil:
			next.Reset(a.beat)
		case apierrors.IsConflict(err), apierrors.IsNotFound(err), time.Since(l.at) >= 2*a.beat-a.beat/5:
			a.log.Warn("the lease could not be renewed", "lease", nodeLeaseName, "error", err)
			cancel(errNodeLease)
			return nil
		default:
			next.Reset(a.beat / 5)
		}
	}
}

// release lets the next node have its turn. Where that fails, the Lease runs out.
func (a *nodeActs) release(ctx context.Context, l *leaseHeld) {
	if l == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.answer)
	defer cancel()
	a.lease.give(l)
	if err := a.lease.write(ctx, l); err != nil {
		a.log.Warn("the lease could not be given back: it runs out by itself", "lease", nodeLeaseName, "after", 3*a.beat, "error", err)
	}
}

// noSuchNode is why nothing is done to a node that the cluster does not know.
func noSuchNode(name string) error {
	return Refuse("the cluster has no node %s: stoop's node: in stoop.yaml (or --node, or NODE_NAME from spec.nodeName) must be this node's name in the cluster", quote(name))
}

// get is this stoop's node, as it is now.
func (a *nodeActs) get(ctx context.Context) (*corev1.Node, error) {
	node, err := a.ask(ctx, a.node)
	if apierrors.IsNotFound(err) {
		return nil, noSuchNode(a.node)
	}
	return node, err
}

// ask asks once for a node.
func (a *nodeActs) ask(ctx context.Context, name string) (*corev1.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, a.answer)
	defer cancel()
	node, err := a.kube.Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get node %s: %w", name, err)
	}
	return node, nil
}

// lifted is why a step does not do again what somebody has taken back since it
// began. Its note is of no use any more.
func (a *nodeActs) lifted(ctx context.Context, rec nodeRecord, what string) error {
	_, err := a.change(ctx, rec.Node, rec.UID, func(node *corev1.Node) (*nodeChange, error) {
		if _, ok := notes(node.Annotations)[rec.Step]; !ok {
			return nil, nil
		}
		return &nodeChange{notes: map[string]*string{notePrefix + rec.Step: nil}}, nil
	})
	if err != nil {
		return err
	}
	return Refuse("somebody has %s node %s since this step began: it is left so", what, rec.Node)
}

// nodeChange is a merge patch: the annotations to set (nil: take off), and what
// else of the spec.
type nodeChange struct {
	notes map[string]*string
	spec  map[string]any
}

// change changes a node, if that still is the one with the UID, as want says of
// the node as it is: nil changes nothing. Others change nodes all the time; their
// changes are never overwritten, and want is asked anew. It returns the node as it
// is then.
func (a *nodeActs) change(ctx context.Context, name string, uid types.UID, want func(*corev1.Node) (*nodeChange, error)) (*corev1.Node, error) {
	for try := 1; ; try++ {
		node, err := a.ask(ctx, name)
		switch {
		case apierrors.IsNotFound(err), err == nil && node.UID != uid:
			return nil, fmt.Errorf("node %s: %w", name, ErrGone)
		case err != nil:
			return nil, err
		}
		c, err := want(node)
		if err != nil || c == nil {
			return node, err
		}
		body := map[string]any{"metadata": map[string]any{"uid": uid, "resourceVersion": node.ResourceVersion, "annotations": c.notes}}
		if c.spec != nil {
			body["spec"] = c.spec
		}
		patch, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		one, cancel := context.WithTimeout(ctx, a.answer)
		now, err := a.kube.Nodes().Patch(one, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: managedBy})
		cancel()
		switch {
		case err == nil:
			return now, nil
		case !apierrors.IsConflict(err) || try == nodeTries:
			return nil, fmt.Errorf("patch node %s: %w", name, err)
		}
	}
}

// nodeRecord is the undo record of a step that took a node out of service.
type nodeRecord struct {
	Node  string        `json:"node"`
	UID   types.UID     `json:"uid"`
	Step  string        `json:"step"`
	Taint *corev1.Taint `json:"taint,omitempty"` // nil: it was cordoned
}

func (a *nodeActs) record(u *UndoRequest) (nodeRecord, error) {
	var rec nodeRecord
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Node == "" || rec.UID == "" || rec.Step == "" {
		return rec, Refuse("the undo record of step %s can't be read", u.ID)
	}
	return rec, nil
}

// cordon cordons the node in the name of a step, while the Lease is held. It
// reports whether somebody else than stoop had done so; then it changes nothing, or
// only notes that the node is drained, so that undo does not uncordon it.
func (a *nodeActs) cordon(ctx context.Context, rec nodeRecord, drain bool) (others bool, err error) {
	_, err = a.change(ctx, rec.Node, rec.UID, func(node *corev1.Node) (*nodeChange, error) {
		all := notes(node.Annotations)
		note := noteCordon
		if others = node.Spec.Unschedulable && stepsWith(all, noteCordon) == ""; others {
			note = noteDrain
		}
		if others && !drain || node.Spec.Unschedulable && all[rec.Step] == note {
			return nil, nil
		}
		return &nodeChange{notes: map[string]*string{notePrefix + rec.Step: &note}, spec: map[string]any{"unschedulable": true}}, nil
	})
	return others, err
}

// uncordon takes back what cordon did in the name of a step.
func (a *nodeActs) uncordon(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := a.record(u)
	if err != nil {
		return Result{}, err
	}
	var res Result
	_, err = a.change(ctx, rec.Node, rec.UID, func(node *corev1.Node) (*nodeChange, error) {
		all := notes(node.Annotations)
		note, ok := all[rec.Step]
		delete(all, rec.Step)
		c := &nodeChange{notes: map[string]*string{notePrefix + rec.Step: nil}}
		switch by := stepsWith(all, noteCordon); {
		case !ok:
			res = Result{Nothing: true, Reason: "the node is not cordoned by this step any more"}
			return nil, nil
		case !node.Spec.Unschedulable:
			res = Result{Nothing: true, Reason: "somebody has uncordoned the node already"}
		case note != noteCordon:
			res = Result{Reason: "the node stays cordoned, as it was before this step, by somebody else than stoop"}
		case by != "":
			res = Result{Reason: "the node stays cordoned: so does step " + by}
		default:
			res = Result{Reason: "uncordoned"}
			c.spec = map[string]any{"unschedulable": nil}
		}
		return c, nil
	})
	if err != nil {
		return Result{}, fmt.Errorf("uncordon: %w", err)
	}
	return res, nil
}

// stepsWith are the steps that have noted this.
func stepsWith(all map[string]string, note string) string {
	var steps []string
	for step, n := range all {
		if n == note {
			steps = append(steps, step)
		}
	}
	return briefly(steps)
}

// briefly lists the first names of many.
func briefly(names []string) string {
	const most = 10
	names = slices.Sorted(slices.Values(names))
	if len(names) > most {
		names = append(names[:most], fmt.Sprintf("%d more", len(names)-most))
	}
	return strings.Join(names, ", ")
}
