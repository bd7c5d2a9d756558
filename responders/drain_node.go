package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"stoop/param"
)

func drainNode() Entry {
	return Entry{
		Name: "drain-node",
		Doc:  "Cordons the node that the alert came from and evicts its pods.",
		Notes: `As kubectl drain does it. First the node is cordoned, then each pod is evicted over the
eviction API, by its UID. A pod that its PodDisruptionBudget keeps is asked for again
every 5 s until the step's deadline; then the step fails and names those that are
left, while the node stays cordoned and undo can uncordon it. Uncordoning the node ends
a drain under way, and so do stoop undo and stoop pause. The step ends when the
pods have ended, or at its deadline: of those that are still ending by then the reason
tells. A chain that has more to do waits for it.

Left alone are DaemonSets' pods, static pods' mirrors, pods that have finished, all
that the guards protect (guard.protect's namespaces and priority classes, kube-system by
default, and stoop's own), and so those remain on the node. A pod is a DaemonSet's, or
in a system-* priority class, by what its creator wrote in it: a suspect pod can
claim that. Deal with the suspect itself first: freeze-container, isolate-pod.

Nothing is touched, and the step is refused, when a pod has an emptyDir volume, whose
contents end with it, and deleteEmptyDirData does not allow that; or when a pod has no
controller that would make it anew, and force does not allow that. A drain destroys
evidence on the node: put the steps that keep some before it.

Undo uncordons the node where this step, or another one of stoop's, had cordoned it,
and no other step keeps it cordoned. The evicted pods don't come back: where they run
now they stay.

The step waits for a person's approval unless its rule says approve: false.

` + nodeActsNotes,
		Params: param.Describe(drainNodeDefaults()),
		RBAC: nodeActsRBAC(
			rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
			rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods/eviction"}, Verbs: []string{"create"}},
		),
		Kind:   Harm,
		Object: NodeObject,
		// Above the most that the parameter deadline may be.
		Deadline: drainMost + time.Minute,
		Approve:  func(json.RawMessage) bool { return true },
		New:      func(env Env) Responder { return &nodeDrainer{newNodeActs(env), env.ProtectedPod, evictAgain} },
	}
}

const (
	drainMost = time.Hour
	// A pod that could not be evicted is asked for again after evictAgain, and
	// the node is looked at every drainLook.
	evictAgain = 5 * time.Second
	drainLook  = time.Second
)

type drainNodeParams struct {
	Deadline           param.Duration `param:"deadline" min:"1s" max:"1h" doc:"How long the pods have to be evicted and to end."`
	DeleteEmptyDirData bool           `param:"deleteEmptyDirData" doc:"Whether pods with an emptyDir volume are evicted too: what it holds is lost."`
	Force              bool           `param:"force" doc:"Whether pods without a controller are evicted too: nothing makes them anew."`
	TTL                param.Duration `param:"ttl" doc:"After how long the node is uncordoned by itself; 0 is never."`
}

func drainNodeDefaults() drainNodeParams {
	return drainNodeParams{Deadline: param.Duration(5 * time.Minute)}
}

type nodeDrainer struct {
	acts      nodeActs
	protected func(*corev1.Pod) string
	again     time.Duration
}

// Foresee implements [Foreseer].
func (d *nodeDrainer) Foresee(ctx context.Context, _ *Request) error { return d.acts.room(ctx) }

// drain is a drain under way.
type drain struct {
	*nodeDrainer
	params  drainNodeParams
	evicted []string                // by name
	tries   map[types.UID]*evicting // of pods that could not be evicted yet
}

// evicting is the last try to evict a pod.
type evicting struct {
	err   error
	again time.Time // zero: never, it can't be
}

// nodePods are the pods of a node, by what a drain does about them.
type nodePods struct {
	evict   []*corev1.Pod
	ending  []string       // evicted, or deleted by somebody else
	blocked []string       // which the parameters don't allow, and why
	spared  map[string]int // left alone: how many, by why
}

func (d *nodeDrainer) Act(ctx context.Context, r *Request) (Result, error) {
	params := drainNodeDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if d.protected == nil {
		return Result{}, Refuse("it is not known what is protected")
	}
	node, err := d.acts.get(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("drain: %w", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("drain node %s: %w", node.Name, err)
	}
	rec := nodeRecord{Node: node.Name, UID: node.UID, Step: r.Step.ID}
	undo, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	ttl := time.Duration(params.TTL)
	run := &drain{nodeDrainer: d, params: params, tries: map[types.UID]*evicting{}}
	pods, err := run.pods(ctx)
	if err != nil {
		return fail(err)
	}
	_, noted := notes(node.Annotations)[rec.Step]
	switch {
	case noted && !node.Spec.Unschedulable:
		return fail(d.acts.lifted(ctx, rec, "uncordoned"))
	case noted:
		// An earlier try of this very step had begun, or had done it all.
		if len(pods.evict) == 0 && len(pods.blocked) == 0 {
			return run.done(pods, undo, ttl), nil
		}
	case len(pods.blocked) > 0:
		return Result{}, Refuse("drain node %s: nothing was done, since %s", node.Name, briefly(pods.blocked))
	case node.Spec.Unschedulable && len(pods.evict) == 0 && len(pods.ending) == 0:
		return Result{Nothing: true, Reason: fmt.Sprintf("node %s is cordoned already, and has no pods to evict%s", node.Name, pods.left())}, nil
	}
	cordoned := noted
	var res Result
	err = d.acts.hold(ctx, func(ctx context.Context) error {
		r.Intend(undo, ttl)
		if _, err := d.acts.cordon(ctx, rec, true); err != nil {
			return err
		}
		cordoned = true
		pods, err := run.evictAll(ctx, r, rec)
		if err == nil {
			res = run.done(pods, undo, ttl)
		}
		return err
	})
	if err == nil {
		return res, nil
	}
	err = fmt.Errorf("drain node %s: %w", node.Name, err)
	if cordoned {
		// So that the cordon can be taken back.
		return Result{Undo: undo, TTL: ttl, Found: run.found()}, err
	}
	return Result{}, err
}

// evictAll evicts until there is nothing more to evict, or to wait for, or the
// deadline is over. It returns the pods of the node as they were last.
func (d *drain) evictAll(ctx context.Context, r *Request, rec nodeRecord) (*nodePods, error) {
	within, cancel := context.WithTimeout(ctx, time.Duration(d.params.Deadline))
	defer cancel()
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	var pods *nodePods
	for over := false; !over; {
		if err := d.goOn(within, r, rec); err != nil {
			return nil, err
		}
		now, err := d.pods(within)
		if err == nil {
			pods = now
			d.evictThese(within, pods)
		} else if _, passes, _, _ := classify(err); !passes {
			return nil, err
		}
		if pods != nil && len(pods.ending) == 0 && !slices.ContainsFunc(pods.evict, d.mayGo) {
			break
		}
		select {
		case <-tick.C:
		case <-within.Done():
			over = true
		}
	}
	if within.Err() != nil && ctx.Err() == nil {
		// What was asked for last may have been done without an answer.
		if now, err := d.pods(ctx); err == nil {
			pods = now
		}
	}
	switch {
	case pods != nil && len(pods.evict) == 0 && len(pods.blocked) == 0:
		return pods, nil // what is still ending will
	case ctx.Err() != nil:
		return nil, ctx.Err() // stoop is being stopped, or has lost the Lease
	case pods == nil:
		return nil, Retry(fmt.Errorf("the pods of the node could not be listed within %s", d.params.Deadline), 0)
	}
	return nil, d.undone(pods)
}

// goOn says that a drain under way has to end: a person has paused stoop, or put
// the node back in service.
func (d *drain) goOn(ctx context.Context, r *Request, rec nodeRecord) error {
	if why := r.Paused(); why != "" {
		return Retry(fmt.Errorf("ended in the middle: %s", why), 0)
	}
	node, err := d.acts.get(ctx)
	if err != nil {
		return nil // the list of pods tells
	}
	if _, noted := notes(node.Annotations)[rec.Step]; !noted || !node.Spec.Unschedulable {
		return d.acts.lifted(ctx, rec, "uncordoned")
	}
	return nil
}

// mayGo reports whether a pod may yet be evicted.
func (d *drain) mayGo(pod *corev1.Pod) bool {
	t := d.tries[pod.UID]
	return t == nil || !t.again.IsZero()
}

// evictThese asks for each pod once, unless it is too early to ask again. What is
// evicted is ending.
func (d *drain) evictThese(ctx context.Context, pods *nodePods) {
	pods.evict = slices.DeleteFunc(pods.evict, func(pod *corev1.Pod) bool {
		if t := d.tries[pod.UID]; ctx.Err() != nil || t != nil && (t.again.IsZero() || time.Now().Before(t.again)) {
			return false
		}
		one, cancel := context.WithTimeout(ctx, d.acts.answer)
		err := evict(one, d.acts.kube, pod, nil)
		cancel()
		name := pod.Namespace + "/" + pod.Name
		switch _, passes, after, _ := classify(err); {
		case apierrors.IsTooManyRequests(err):
			d.tries[pod.UID] = &evicting{err, time.Now().Add(max(after, d.again))}
			return false
		case err == nil:
			d.evicted = append(d.evicted, name)
			pods.ending = append(pods.ending, name)
		case isGone(err):
		case passes:
			d.tries[pod.UID] = &evicting{err, time.Now().Add(max(after, drainLook))}
			return false
		default:
			d.tries[pod.UID] = &evicting{err: err}
			return false
		}
		return true
	})
}

// pods are those of the node, as they are now.
func (d *drain) pods(ctx context.Context) (*nodePods, error) {
	one, cancel := context.WithTimeout(ctx, d.acts.answer)
	defer cancel()
	list, err := d.acts.kube.Pods(metav1.NamespaceAll).List(one, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("spec.nodeName", d.acts.node).String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list the pods of the node: %w", err)
	}
	pods := &nodePods{spared: map[string]int{}}
	for i := range list.Items {
		pod := &list.Items[i]
		name := pod.Namespace + "/" + pod.Name
		owner := metav1.GetControllerOf(pod)
		switch {
		case isMirror(pod):
			pods.spared["static"]++
		case pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed:
			pods.spared["finished"]++
		case owner != nil && owner.Kind == "DaemonSet" && strings.HasPrefix(owner.APIVersion, "apps/"):
			pods.spared["of DaemonSets"]++
		case d.protected(pod) != "":
			pods.spared["protected"]++
		case pod.DeletionTimestamp != nil:
			pods.ending = append(pods.ending, name)
		case owner == nil && !d.params.Force:
			pods.blocked = append(pods.blocked, name+" has no controller that makes it anew (force: true evicts it)")
		case !d.params.DeleteEmptyDirData && slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.EmptyDir != nil }):
			pods.blocked = append(pods.blocked, name+" has an emptyDir volume (deleteEmptyDirData: true evicts it, and loses what that holds)")
		default:
			pods.evict = append(pods.evict, pod)
		}
	}
	return pods, nil
}

// undone is the error of a drain that left pods.
func (d *drain) undone(pods *nodePods) error {
	why := slices.Clone(pods.blocked)
	var forbidden error
	for _, pod := range pods.evict {
		t := d.tries[pod.UID]
		if t == nil {
			why = append(why, fmt.Sprintf("%s/%s came too late", pod.Namespace, pod.Name))
			continue
		}
		why = append(why, t.err.Error())
		if apierrors.IsForbidden(t.err) {
			forbidden = t.err
		}
	}
	if forbidden != nil && len(d.evicted) == 0 {
		return forbidden // which says what is missing
	}
	return fmt.Errorf("cordoned; pods evicted: %d; not evicted within %s: %d: %s", len(d.evicted), d.params.Deadline, len(why), briefly(why))
}

// done is the result of a drain that left none.
func (d *drain) done(pods *nodePods, undo json.RawMessage, ttl time.Duration) Result {
	reason := fmt.Sprintf("node %s cordoned; pods evicted: %d%s", d.acts.node, len(d.evicted), pods.left())
	if len(pods.ending) > 0 {
		reason += "; still ending: " + briefly(pods.ending)
	}
	return Result{Reason: reason, Found: d.found(), Undo: undo, TTL: ttl}
}

func (d *drain) found() map[string]string {
	found := map[string]string{"evicted": strconv.Itoa(len(d.evicted))}
	if len(d.evicted) > 0 {
		found["pods"] = briefly(d.evicted)
	}
	return found
}

// left says which pods are left alone.
func (p *nodePods) left() string {
	var kinds []string
	for _, why := range slices.Sorted(maps.Keys(p.spared)) {
		kinds = append(kinds, fmt.Sprintf("%d %s", p.spared[why], why))
	}
	if len(kinds) == 0 {
		return ""
	}
	return "; left alone: " + strings.Join(kinds, ", ")
}

func (d *nodeDrainer) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	res, err := d.acts.uncordon(ctx, u)
	if err == nil && !res.Nothing {
		res.Reason += "; the evicted pods don't come back"
	}
	return res, err
}
