package responders

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/selection"

	"stoop/param"
)

func quarantinePod() Entry {
	return Entry{
		Name: "quarantine-pod",
		Doc:  "Isolates the pod that raised the alert and takes it out of its Services and its controller: a replacement serves, the suspect stays to be looked into.",
		Notes: `First the pod is isolated, exactly as isolate-pod does it, with the same parameters
and the same traps. Only once that stands are labels taken off the pod: those that the
Services which select it, and its controller, select it by. The controller lets the pod
go then (it takes its owner reference off) and makes another. Labels of stoop's own
stay, whatever a Service selects.

Policies select pods by labels too. The outcome names the NetworkPolicies that selected
the pod before and no longer do, under found.policiesLost; those of Cilium's or Calico's
own kinds are not looked at. With direction: egress or ingress the other direction is
then open to whatever those held back: leave it at both.

What happens by the kind of the controller:

- ReplicaSet (of a Deployment or of a kind of somebody else's) and DaemonSet: as above. A
  DaemonSet's next pod can't start beside the suspect where they share a host port.
- StatefulSet: the pod is isolated only. Its replacement would need its name and its
  volumes, so there can be none while it is there.
- Job: isolated only. The Job would begin its work anew beside the suspect.
- Any other: isolated only; stoop does not know what that controller would do.
- None: taken out of its Services.

A quarantined pod belongs to nobody: it takes its resources until somebody deletes it,
also when its Deployment is deleted, and kubectl drain asks for --force. So after the
second pod of one owner within 30 minutes the next is isolated only. A HorizontalPodAutoscaler
and a PodDisruptionBudget no longer count it.

Undo puts the labels back that are still as the step left them, and then lifts the
isolation. The pod serves again. Its controller may take it back, has one pod too many
then, and deletes one, perhaps this one; it surely does after a rollout, since the
ReplicaSet of an older revision wants no pods at all. Look into it before you undo.`,
		Params:   param.Describe(isolatePodDefaults()),
		RBAC:     rulesOf(quarantinePodGrants()),
		Grants:   quarantinePodGrants(),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 20 * time.Second,
		Instead:  "isolate-pod",
		New: func(env Env) Responder {
			return &podQuarantiner{
				kube: env.Kube, isolator: isolatePod().New(env).(isolator),
				labels: &metadataSetter{kube: env.Kube, field: labelsField, on: PodObject},
			}
		},
	}
}

// quarantinePodGrants are those of the isolation, and of what comes after it.
func quarantinePodGrants() []Grant {
	return append(isolatePodGrants(), always(
		rbacv1.PolicyRule{APIGroups: []string{"apps"}, Resources: []string{"replicasets", "daemonsets"}, Verbs: []string{"get"}},
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list"}})...)
}

// isolator is what isolate-pod is made of.
type isolator interface {
	Responder
	Checker
	Undoer
}

type podQuarantiner struct {
	kube     *Kube
	isolator isolator
	labels   *metadataSetter
}

// Check refuses pods that can't be isolated.
func (q *podQuarantiner) Check(ctx context.Context, r *Request) error {
	return q.isolator.Check(ctx, r)
}

// quarantine is the undo record: of the isolation, if it is this step's, and of
// the labels that were taken off.
type quarantine struct {
	Isolation json.RawMessage `json:"isolation,omitempty"`
	Labels    metadataSet     `json:"labels"`
}

func (q *podQuarantiner) Act(ctx context.Context, r *Request) (Result, error) {
	params := isolatePodDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("quarantine pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	// What an earlier try of this step did nothing tells any more.
	var before quarantine
	if json.Unmarshal(r.Intended, &before) != nil || before.Labels.UID != r.Pod.UID {
		before = quarantine{}
	}
	result, err := q.isolator.Act(ctx, r)
	if err != nil {
		return Result{}, err
	}
	of := metadataOf{Namespace: r.Pod.Namespace, Pod: r.Pod.Name, UID: r.Pod.UID}
	rec := quarantine{Isolation: result.Undo, Labels: metadataSet{metadataOf: of, Changes: map[string]metadataChange{}}}
	ttl := time.Duration(params.TTL)
	switch {
	case rec.Isolation == nil:
		rec.Isolation = before.Isolation
	case before.Isolation == nil:
		before.Isolation, before.Labels.metadataOf = rec.Isolation, of
		undo, err := json.Marshal(before)
		if err != nil {
			return fail(err)
		}
		// It stands from here on, also where the labels never come off.
		r.Intend(undo, ttl)
	}
	fail = func(err error) (Result, error) {
		err = fmt.Errorf("quarantine pod %s/%s: it is isolated, but keeps its labels: %w", r.Pod.Namespace, r.Pod.Name, err)
		if as[*refusal](err) { // a step that is refused has done nothing
			err = errors.New(err.Error())
		}
		return q.withUndo(Result{Found: result.Found, TTL: ttl}, rec, err)
	}
	pod, err := sameNow(ctx, q.kube, r.Pod)
	if err != nil {
		return fail(err)
	}
	for name, c := range before.Labels.Changes {
		if valueOf(pod.Labels, name) == nil && c.To == nil && c.From != nil {
			rec.Labels.Changes[name] = c
		}
	}
	if pod.Labels[labelIsolated] != string(pod.UID) {
		return fail(Retry(errors.New("the isolation was lifted in the same moment"), 0))
	}
	selectors, only, err := q.selectorsOf(ctx, pod)
	if err != nil {
		return fail(err)
	}
	set, left := map[string]*string{}, maps.Clone(pod.Labels)
	var from, stuck []string
	for _, s := range selectors {
		from = append(from, s.what)
		for _, name := range s.names(pod.Labels) {
			set[name], rec.Labels.Changes[name] = nil, metadataChange{From: valueOf(pod.Labels, name)}
			delete(left, name)
		}
	}
	for _, s := range selectors {
		if s.Matches(labels.Set(left)) {
			stuck = append(stuck, s.what)
		}
	}
	if len(set) == 0 && len(rec.Labels.Changes) == 0 {
		result.Reason += "; " + cmp.Or(only, "no Service and no controller selects the pod, so it keeps its labels")
		return q.withUndo(result, rec, nil)
	}
	if len(set) > 0 {
		undo, err := json.Marshal(rec)
		if err != nil {
			return fail(err)
		}
		// Afterwards the pod does not tell what was there before.
		r.Intend(undo, ttl)
		lost, lostErr := q.policiesLost(ctx, pod, left)
		if err := q.labels.patch(ctx, rec.Labels.metadataOf, pod.ResourceVersion, set); err != nil {
			return fail(fmt.Errorf("take labels off: %w", err))
		}
		q.tellLost(lost, lostErr, &result)
	}
	result.Nothing, result.TTL = false, ttl
	result.Found["labels"] = briefly(slices.Collect(maps.Keys(rec.Labels.Changes)))
	result.Reason += "; labels taken off: " + result.Found["labels"]
	if len(from) > 0 {
		result.Found["selectedBy"] = briefly(from)
		result.Reason += ", by which these selected it: " + result.Found["selectedBy"]
	}
	if len(stuck) > 0 {
		result.Reason += "; but these select it even so: " + briefly(stuck)
	}
	return q.withUndo(result, rec, nil)
}

// withUndo gives the result the record of what this step did, also where the rest of
// it failed.
func (q *podQuarantiner) withUndo(result Result, rec quarantine, failed error) (Result, error) {
	if rec.Isolation == nil && len(rec.Labels.Changes) == 0 {
		return result, failed // both were so already
	}
	undo, err := json.Marshal(rec)
	if err != nil {
		return Result{}, errors.Join(failed, err)
	}
	result.Undo = undo
	return result, failed
}

// podSelector is what selects the pod, and who by it.
type podSelector struct {
	labels.Selector
	what string
}

// names are the labels of a pod that it is selected by, and that may be taken off.
// stoop's own are not a Service's to ask for: the isolation hangs on them.
func (s podSelector) names(have map[string]string) []string {
	requirements, _ := s.Requirements()
	var names []string
	for _, r := range requirements {
		switch _, ok := have[r.Key()]; {
		case !ok, strings.HasPrefix(r.Key(), ownPrefix):
		case r.Operator() == selection.NotIn: // it would be selected without the label too
		case !slices.Contains(names, r.Key()):
			names = append(names, r.Key())
		}
	}
	return names
}

// selectorsOf are the selectors that the pod is to be taken out of. only is a
// sentence for people where the pod stays with its controller.
func (q *podQuarantiner) selectorsOf(ctx context.Context, pod *corev1.Pod) (found []podSelector, only string, err error) {
	if ref := metav1.GetControllerOf(pod); ref != nil {
		gv, _ := schema.ParseGroupVersion(ref.APIVersion)
		what := controllerName(ref)
		switch kind := gv.Group + "/" + ref.Kind; kind {
		case "apps/ReplicaSet", "apps/DaemonSet":
			w, err := controlling(ctx, q.kube, pod.Namespace, ref)
			if isGone(err) {
				break // the garbage collector has not come by yet
			}
			if err != nil {
				return nil, "", err
			}
			selector, err := selectorOf(w.Unstructured)
			if err != nil {
				return nil, "", Refuse("the selector of %s can't be read: %v", w, err)
			}
			if selector.Matches(labels.Set(pod.Labels)) {
				found = append(found, podSelector{selector, what})
			}
		case "apps/StatefulSet":
			return nil, fmt.Sprintf("%s can't replace the pod as long as it has its name, so it is isolated only", what), nil
		case "batch/Job":
			return nil, fmt.Sprintf("%s would begin its work anew beside the pod, so it is isolated only", what), nil
		default:
			return nil, fmt.Sprintf("what %s would do without the pod is not known, so it is isolated only", what), nil
		}
	}
	err = q.kube.eachObject(ctx, corev1.SchemeGroupVersion.WithResource("services"), pod.Namespace, func(s *unstructured.Unstructured) {
		set, _, _ := unstructured.NestedStringMap(s.Object, "spec", "selector")
		if len(set) == 0 {
			return // a Service without one selects nothing
		}
		if selector := labels.SelectorFromSet(set); selector.Matches(labels.Set(pod.Labels)) {
			found = append(found, podSelector{selector, "Service " + s.GetName()})
		}
	})
	if err != nil {
		return nil, "", fmt.Errorf("list the services: %w", err)
	}
	return found, "", nil
}

// selectorOf is the spec.selector of a controller.
func selectorOf(o *unstructured.Unstructured) (labels.Selector, error) {
	raw, _, err := unstructured.NestedMap(o.Object, "spec", "selector")
	if err != nil {
		return nil, err
	}
	var selector metav1.LabelSelector
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &selector); err != nil {
		return nil, err
	}
	return metav1.LabelSelectorAsSelector(&selector)
}

// policiesLost are the policies that select the pod and will no longer, with what
// is left of its labels.
func (q *podQuarantiner) policiesLost(ctx context.Context, pod *corev1.Pod, left map[string]string) ([]string, error) {
	var lost []string
	err := q.kube.eachPolicy(ctx, pod.Namespace, func(p *networkingv1.NetworkPolicy) {
		if selectsLabels(p, pod.Labels) && !selectsLabels(p, left) {
			lost = append(lost, p.Name)
		}
	})
	return lost, err
}

func selectsLabels(p *networkingv1.NetworkPolicy, set map[string]string) bool {
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	return err == nil && selector.Matches(labels.Set(set))
}

// tellLost names them. That it can't is no failure.
func (q *podQuarantiner) tellLost(lost []string, err error, result *Result) {
	if err != nil {
		_, _, _, reason := classify(err)
		result.Reason += "; whether policies selected the pod that no longer do is not known: " + reason
		return
	}
	if len(lost) == 0 {
		return
	}
	result.Found["policiesLost"] = briefly(lost)
	result.Reason += "; these policies no longer select the pod: " + result.Found["policiesLost"]
}

// Undo puts the labels back while the pod is still isolated, and then lets it back.
func (q *podQuarantiner) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec quarantine
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Labels.UID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	result := Result{Nothing: true}
	var said []string
	if len(rec.Labels.Changes) > 0 {
		labels, err := json.Marshal(rec.Labels)
		if err != nil {
			return Result{}, err
		}
		res, err := q.labels.Undo(ctx, &UndoRequest{ID: u.ID, Target: u.Target, Record: labels, Actor: u.Actor})
		switch {
		case errors.Is(err, ErrGone):
			said = append(said, "the pod is gone") // its policy may not be
		case err != nil:
			return Result{}, err
		default:
			said = append(said, res.Reason)
			if !res.Nothing {
				result.Nothing = false
				said = append(said, "its controller may take it back and then delete one pod too many, perhaps this one")
			}
		}
	}
	if rec.Isolation != nil {
		res, err := q.isolator.Undo(ctx, &UndoRequest{ID: u.ID, Target: u.Target, Record: rec.Isolation, Actor: u.Actor})
		if err != nil {
			return Result{}, err
		}
		said = append(said, res.Reason)
		result.Nothing = result.Nothing && res.Nothing
	}
	result.Reason = strings.Join(said, "; ")
	return result, nil
}
