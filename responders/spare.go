package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"stoop/param"
)

// sparing is what a rule says of the pods that it may take from their workload.
type sparing struct {
	MaxUnavailable param.Portion `param:"maxUnavailable" doc:"How many of the workload's replicas may be unavailable once the pod is gone; a percentage is rounded down. The last healthy pod goes only with 100%. Left out, any pod may go but the last healthy one."`
	Force          bool          `param:"force" doc:"Take the pod whatever becomes of its workload: also the last healthy one, one of a StatefulSet, one with a ReadWriteOnce volume, one that nothing would make anew."`
}

// sparingNotes say so for people.
const sparingNotes = `What a workload can't do without is isolated (by isolate-pod, which can be undone)
instead of deleted; the outcome suppressed says why, and people are told. That is, unless
force: true,

- the last healthy pod of a workload, and any that would leave more of its replicas
  unavailable than maxUnavailable,
- pods of a StatefulSet: the next one has the same name and the same data,
- pods with a volume of the access mode ReadWriteOnce or ReadWriteOncePod, which the
  next one may not get while this one is not wholly gone,
- pods that no controller owns: nothing would make them anew.

The workload is the topmost above the pod that has a scale (Deployment, ReplicaSet, or
somebody else's kind), or its DaemonSet or Job. Its pods are counted at the act, as the
API server has them: healthy is a pod that is Ready, is not being deleted, and is not
isolated by stoop. A suspect that is not Ready itself counts like any other. 25% of 3
replicas is 0, and then none is deleted. Two steps of one node are counted one after the
other. Against those of other nodes the pod is marked before it is counted
(the annotation stoop.dev/leaving), unless enough healthy ones run on this very node: of
two that act in the same moment one at least sees the other's mark. Often both do, and
both isolate their pod; never do both take what one alone might. A mark counts for a minute; the nodes'
clocks have to agree by that much.

What can't be found out (a workload that stoop may not read, an API server that keeps
failing for a minute) is not deleted either. For workloads of kinds besides those of
Kubernetes give stoop get on the resource and on its scale. Whoever may change pods
in the namespace can make pods look healthy, or not. A step that a person has approved
is not held back: whoever is asked is told what would have held it back.

The count costs requests: a list of the workload's pods, and where the siblings are on
other nodes the mark and a second list. Measured beside an API server on the same
machine that is 2 ms, and 7 ms with the mark. With force: true there are none of them.`

// sparingGrants are the permissions of a responder that takes pods and needs these of
// its own to do so, with what finding out needs which ones to spare.
func sparingGrants(own ...rbacv1.PolicyRule) []Grant {
	grants := always(own...)
	for _, r := range []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"persistentvolumeclaims", "replicationcontrollers"}, Verbs: []string{"get"}},
		{APIGroups: []string{"apps"}, Resources: []string{"deployments", "replicasets", "daemonsets"}, Verbs: []string{"get"}},
		{APIGroups: []string{"batch"}, Resources: []string{"jobs"}, Verbs: []string{"get"}},
	} {
		grants = append(grants, Grant{Rule: r, When: When{"force": "false"}})
	}
	return grants
}

const (
	// annotationLeaving is on a pod that is about to be taken; it says when.
	annotationLeaving = ownPrefix + "leaving"
	leavingFor        = time.Minute
	// sparingFor is how long it is tried to find out whether a pod can go.
	sparingFor = time.Minute
)

// podTaker is what the responders have in common that take a pod from its workload.
type podTaker struct {
	kube *Kube
	node string
}

// Foresee finds out whether the pod could go, as it is now.
func (t *podTaker) Foresee(ctx context.Context, r *Request) error {
	params := deletePodDefaults()
	if err := r.Decode(&params); err != nil {
		return Refuse("%v", err)
	}
	done, err := t.take(ctx, r, r.Pod, params.sparing, false)
	done()
	return err
}

// take says by a [Spare] that the pod stays, or lets it go: then no other step of this
// process takes one of the same workload until done is called. done is never nil.
func (t *podTaker) take(ctx context.Context, r *Request, pod *corev1.Pod, p sparing, mark bool) (done func(), err error) {
	if p.Force || r.Step.Approved != nil || pod.DeletionTimestamp != nil {
		return func() {}, nil
	}
	c := &census{podTaker: t, pod: pod, ref: metav1.GetControllerOf(pod), max: p.MaxUnavailable}
	err = c.ask(ctx, mark)
	if err == nil {
		return c.done, nil
	}
	c.done()
	if as[*spareError](err) || isPodGone(err) {
		return func() {}, err
	}
	if _, retry, _, _ := classify(err); retry && time.Since(r.Step.Since()) < sparingFor {
		return func() {}, err
	}
	return func() {}, Spare("unknown", "whether its workload can do without it is not known: %s", reasonOf(err))
}

func reasonOf(err error) string {
	_, _, _, reason := classify(err)
	return reason
}

// podGone says that the pod itself went meanwhile, and not what is above it.
type podGone struct{ error }

func (e podGone) Unwrap() error { return e.error }

func isPodGone(err error) bool { return as[podGone](err) }

// census counts what is left of a workload without a pod.
type census struct {
	*podTaker
	pod   *corev1.Pod
	ref   *metav1.OwnerReference // of its controller
	max   param.Portion
	turns []func()

	top     *workload // nil until it is looked for
	members map[types.UID]bool
	asked   int
}

func (c *census) done() {
	for _, done := range slices.Backward(c.turns) {
		done()
	}
	c.turns = nil
}

// turn waits until no other step of this process counts the same.
func (c *census) turn(ctx context.Context, uid types.UID) error {
	done, err := c.kube.turns.take(ctx, uid)
	if err == nil {
		c.turns = append(c.turns, done)
	}
	return err
}

func (c *census) ask(ctx context.Context, mark bool) error {
	if err := c.replaceable(ctx); err != nil || c.max.IsAll() {
		return err
	}
	if err := c.turn(ctx, c.ref.UID); err != nil {
		return err
	}
	n, err := c.count(ctx)
	if err != nil || !mark || n.here >= n.need {
		return err
	}
	// A stoop of another node may be taking one that was counted: it sees the mark,
	// or was seen by the second count.
	if err := c.mark(ctx); err != nil {
		return err
	}
	_, err = c.count(ctx)
	return err
}

// replaceable spares the pods that no other can stand in for.
func (c *census) replaceable(ctx context.Context) error {
	const anyway = "force: true takes it even so"
	switch {
	case c.ref == nil:
		return Spare("no owner", "no controller owns it, so nothing would make it anew; %s", anyway)
	case c.ref.Kind == "StatefulSet":
		return Spare("StatefulSet", "it is a pod of %s, and the next one has the same name and data; %s", controllerName(c.ref), anyway)
	}
	for i := range c.pod.Spec.Volumes {
		v := &c.pod.Spec.Volumes[i]
		var modes []corev1.PersistentVolumeAccessMode
		switch {
		case v.PersistentVolumeClaim != nil:
			claim, err := c.kube.Claims(c.pod.Namespace).Get(ctx, v.PersistentVolumeClaim.ClaimName, metav1.GetOptions{})
			if err != nil {
				return fmt.Errorf("get persistentvolumeclaim %s: %w", v.PersistentVolumeClaim.ClaimName, err)
			}
			modes = claim.Spec.AccessModes
		case v.Ephemeral != nil && v.Ephemeral.VolumeClaimTemplate != nil:
			modes = v.Ephemeral.VolumeClaimTemplate.Spec.AccessModes
		}
		for _, once := range []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce, corev1.ReadWriteOncePod} {
			if slices.Contains(modes, once) && !slices.Contains(modes, corev1.ReadWriteMany) {
				return Spare("volume", "its volume %s is %s, and the next pod may not get it; %s", v.Name, once, anyway)
			}
		}
	}
	return nil
}

// healthyCount is how many healthy pods are left, up to as many as are needed.
type healthyCount struct {
	need, healthy int
	here          int // of them, on this node, where nobody else takes any
}

// count spares the pod unless enough others are healthy.
func (c *census) count(ctx context.Context) (n healthyCount, err error) {
	n.need = 1
	replicas := -1
	if c.max.IsSet() {
		if replicas, err = c.replicas(ctx); err != nil {
			return n, err
		}
		if n.need = c.needed(replicas); n.need == 0 {
			return n, nil
		}
	}
	// Those of the same controller come first: mostly they are enough, and one
	// request finds them.
	if err := c.add(ctx, hint(c.pod), &n); err != nil || n.healthy >= n.need {
		return n, err
	}
	if replicas < 0 {
		if err := c.climb(ctx); err != nil {
			return n, err
		}
		if replicas, err = c.replicas(ctx); err == nil && replicas == 0 {
			n.need = 0
			return n, nil
		}
	}
	selector, err := c.selector(ctx)
	if err != nil {
		return n, err
	}
	if uid := c.top.GetUID(); uid != c.ref.UID && len(c.turns) < 2 {
		if err := c.turn(ctx, uid); err != nil {
			return n, err
		}
	}
	n.healthy, n.here = 0, 0
	if err := c.add(ctx, selector, &n); err != nil || n.healthy >= n.need {
		return n, err
	}
	if !c.max.IsSet() {
		return n, Spare("last", "it is the last healthy pod of %s, which goes only with maxUnavailable: 100%% or force: true", c.top)
	}
	return n, Spare("maxUnavailable", "with %d of the %d replicas of %s healthy besides it, more would be unavailable than maxUnavailable: %s allows, which is %d%s",
		n.healthy, replicas, c.top, c.max, c.max.Of(replicas), map[bool]string{true: "; the last healthy one goes only with 100% or force: true"}[n.healthy == 0])
}

// needed is how many others have to be healthy.
func (c *census) needed(replicas int) int {
	if replicas == 0 {
		return 0
	}
	return max(replicas-c.max.Of(replicas), 1)
}

// add counts the healthy pods of the workload among those that a selector finds.
func (c *census) add(ctx context.Context, selector string, n *healthyCount) error {
	now := time.Now()
	options := metav1.ListOptions{LabelSelector: selector, Limit: listPage}
	for {
		list, err := c.kube.Pods(c.pod.Namespace).List(ctx, options)
		if err != nil {
			return fmt.Errorf("list the pods of %s: %w", controllerName(c.ref), err)
		}
		for i := range list.Items {
			p := &list.Items[i]
			ref := metav1.GetControllerOf(p)
			if p.UID == c.pod.UID {
				if ref == nil || ref.UID != c.ref.UID {
					return Spare("no owner", "%s has let it go, so nothing would make it anew; force: true takes it even so", controllerName(c.ref))
				}
				continue
			}
			if ref == nil || !healthy(p, now) {
				continue
			}
			if ok, err := c.member(ctx, ref); err != nil {
				return err
			} else if !ok {
				continue
			}
			n.healthy++
			if p.Spec.NodeName == c.node {
				n.here++
			}
		}
		if options.Continue = list.Continue; options.Continue == "" || n.healthy >= n.need {
			return nil
		}
	}
}

// member reports whether what controls a pod belongs to the workload.
func (c *census) member(ctx context.Context, ref *metav1.OwnerReference) (bool, error) {
	if ref.UID == c.ref.UID {
		return true, nil
	}
	if c.top == nil {
		return false, nil
	}
	if ok, known := c.members[ref.UID]; known {
		return ok, nil
	}
	// One level is enough: a Deployment has ReplicaSets. There are few of them at a
	// time; what is beyond that is not counted.
	const most = 8
	if c.asked == most {
		return false, nil
	}
	c.asked++
	w, err := controlling(ctx, c.kube, c.pod.Namespace, ref)
	ok := false
	switch {
	case err == nil:
		above := metav1.GetControllerOf(w)
		ok = above != nil && above.UID == c.top.GetUID()
	case ctx.Err() != nil:
		return false, err
	}
	c.members[ref.UID] = ok
	return ok, nil
}

// climb finds the workload.
func (c *census) climb(ctx context.Context) error {
	if c.top != nil {
		return nil
	}
	chain, _, err := climb(ctx, c.kube, c.pod, func(*workload) bool { return false })
	if err != nil {
		return err
	}
	if len(chain) == 0 {
		return fmt.Errorf("%s can't be looked at", controllerName(c.ref))
	}
	c.top = chain[0]
	for _, w := range slices.Backward(chain) {
		if w.Scale {
			c.top = w
			break
		}
	}
	c.members = map[types.UID]bool{}
	for _, w := range chain {
		c.members[w.GetUID()] = true
		if w == c.top {
			break
		}
	}
	return nil
}

// errReplicas says that a workload has no number of replicas.
var errReplicas = errors.New("it has no number of replicas")

// replicas are how many pods the workload is to have.
func (c *census) replicas(ctx context.Context) (int, error) {
	if err := c.climb(ctx); err != nil {
		return 0, err
	}
	path, absent := []string{"spec", "replicas"}, int64(1)
	o := c.top.Unstructured
	switch {
	case c.top.is("apps", "DaemonSet"):
		path, absent = []string{"status", "desiredNumberScheduled"}, 0
	case c.top.is("batch", "Job"):
		path = []string{"spec", "parallelism"}
	case c.top.Group == "apps", c.top.is("", "ReplicationController"):
	case c.top.Scale:
		scale, err := c.scale(ctx)
		if err != nil {
			return 0, err
		}
		o, absent = scale, 0
	default:
		return 0, fmt.Errorf("%s: %w", c.top, errReplicas)
	}
	n, found, err := unstructured.NestedInt64(o.Object, path...)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.top, err)
	}
	if !found {
		n = absent
	}
	return int(min(max(n, 0), 1<<30)), nil
}

func (c *census) scale(ctx context.Context) (*unstructured.Unstructured, error) {
	scale, err := c.top.client(c.kube).Get(ctx, c.top.GetName(), metav1.GetOptions{}, "scale")
	if err != nil {
		return nil, fmt.Errorf("get the scale of %s: %w", c.top, err)
	}
	return scale, nil
}

// selector finds all pods of the workload, and maybe others; "" all of the namespace.
func (c *census) selector(ctx context.Context) (string, error) {
	switch {
	case c.top.Group == "apps", c.top.is("batch", "Job"):
		m, _, err := unstructured.NestedMap(c.top.Object, "spec", "selector")
		if err != nil {
			return "", fmt.Errorf("the selector of %s: %w", c.top, err)
		}
		var s metav1.LabelSelector
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(m, &s); err != nil {
			return "", fmt.Errorf("the selector of %s: %w", c.top, err)
		}
		selector, err := metav1.LabelSelectorAsSelector(&s)
		if err != nil {
			return "", fmt.Errorf("the selector of %s: %w", c.top, err)
		}
		return selector.String(), nil
	case c.top.is("", "ReplicationController"), !c.top.Scale:
		return "", nil
	}
	scale, err := c.scale(ctx)
	if err != nil {
		return "", err
	}
	s, _, err := unstructured.NestedString(scale.Object, "status", "selector")
	return s, err
}

// mark has the other nodes count the pod as gone.
func (c *census) mark(ctx context.Context) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": c.pod.UID, "annotations": map[string]string{annotationLeaving: time.Now().UTC().Format(time.RFC3339)},
	}})
	if err != nil {
		return err
	}
	_, err = c.kube.Pods(c.pod.Namespace).Patch(ctx, c.pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	switch {
	case isGone(err):
		return podGone{fmt.Errorf("mark it as leaving: %w", err)}
	case err != nil:
		return fmt.Errorf("mark it as leaving: %w", err)
	}
	return nil
}

// healthy reports whether a pod does its work, and is to go on doing it.
func healthy(pod *corev1.Pod, now time.Time) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	for name, value := range pod.Labels {
		// Those of the isolations have the pod's own UID.
		if strings.HasPrefix(name, labelIsolated) && value == string(pod.UID) {
			return false
		}
	}
	if at, err := time.Parse(time.RFC3339, pod.Annotations[annotationLeaving]); err == nil && now.Sub(at).Abs() < leavingFor {
		return false
	}
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// hint is a selector that most probably finds the other pods of a pod's controller:
// of a ReplicaSet by the hash that it gives them, else by the pod's own labels.
func hint(pod *corev1.Pod) string {
	const hash = "pod-template-hash"
	if v := pod.Labels[hash]; v != "" {
		return labels.Set{hash: v}.String()
	}
	same := labels.Set{}
	for k, v := range pod.Labels {
		if !strings.HasPrefix(k, ownPrefix) && k != "controller-revision-hash" && k != "pod-template-generation" {
			same[k] = v
		}
	}
	return same.String()
}

// workloadTurns have the steps of this process count the pods of a workload one after
// the other: what one takes, the next one sees gone.
type workloadTurns struct {
	mu sync.Mutex
	of map[types.UID]*workloadTurn
}

type workloadTurn struct {
	free chan struct{} // a token when it is nobody's turn
	n    int           // who has it or waits for it
}

func (t *workloadTurns) take(ctx context.Context, uid types.UID) (done func(), err error) {
	t.mu.Lock()
	w := t.of[uid]
	if w == nil {
		if t.of == nil {
			t.of = map[types.UID]*workloadTurn{}
		}
		w = &workloadTurn{free: make(chan struct{}, 1)}
		w.free <- struct{}{}
		t.of[uid] = w
	}
	w.n++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if w.n--; w.n == 0 {
			delete(t.of, uid)
		}
	}
	select {
	case <-w.free:
		return func() { w.free <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for another step of the same workload: %w", ctx.Err())
	}
}
