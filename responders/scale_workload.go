package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/param"
)

func scaleWorkload() Entry {
	return Entry{
		Name: "scale-workload",
		Doc:  "Scales the workload that the pod belongs to down, to no pod at all unless told otherwise.",
		Notes: `The workload is found from the pod up by controller references, each proved by its
UID and looked for in the pod's namespace only: pod, ReplicaSet, Deployment, and what
controls that. The topmost that has a scale subresource is scaled, a kind of somebody
else's (a Rollout, a Prometheus) too. Pods of a DaemonSet or a Job, and those that
nothing controls, are refused. Whoever may create pods in a namespace can name any
workload of it as their controller.

All the workload's pods are answerable for one: with replicas: 0 it serves nobody
until undo, and the evidence in its pods is gone with them. Above 0 it is the
controller that chooses which pods go, not stoop: the suspect may well be one that
stays. It is for a workload whose image or configuration is the hole; for one pod
there are isolate-pod and quarantine-pod.

A workload is never scaled up: with fewer replicas than asked for there is nothing to
do. What else sets the number may undo the step: an operator (the outcome names what
controls the workload and was not scaled), a deployment tool, or a
HorizontalPodAutoscaler, which is named in the outcome. That one leaves a workload
at 0 alone, unless its own minReplicas is 0, but not one at another number. KEDA
scales up from 0 by itself.

The cooldown counts by the workload, and so does the owner's limit: after the second
time within 30 minutes, because somebody scaled it up again, the next pod that raises
the alert is isolated instead. Undo sets the number that was there before, if the
number still is what the step made of it, and says so if it is not.

For kinds besides Deployment, StatefulSet and ReplicaSet stoop needs permissions of
its own: get on the resource, get and update on its scale. The parameter resources
has stoop rbac write them.`,
		Params: param.Describe(scaleWorkloadParams{}),
		RBAC:   scaleWorkloadRBAC(),
		Grants: append(always(scaleWorkloadRBAC()...),
			Grant{Rule: rbacv1.PolicyRule{APIGroups: []string{"{tail}"}, Resources: []string{"{head}"}, Verbs: []string{"get"}}, Each: "resources"},
			Grant{Rule: rbacv1.PolicyRule{APIGroups: []string{"{tail}"}, Resources: []string{"{head}/scale"}, Verbs: []string{"get", "update"}}, Each: "resources"}),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 15 * time.Second,
		Instead:  "isolate-pod",
		New: func(env Env) Responder {
			s := &workloadScaler{workloadActor{kube: env.Kube}}
			s.find = s.topmost
			return s
		},
	}
}

type scaleWorkloadParams struct {
	Replicas  int            `param:"replicas" min:"0" max:"10000" doc:"How many pods are left. A workload that has fewer is left alone."`
	Resources []string       `param:"resources" doc:"Further resources with a scale that may be scaled here, as NAME.GROUP: rollouts.argoproj.io. It only tells stoop rbac which permissions to write."`
	TTL       param.Duration `param:"ttl" doc:"After how long the number is set back by itself; 0 is never."`
}

// Validate refuses what is no resource.
func (p scaleWorkloadParams) Validate() error {
	for _, r := range p.Resources {
		name, group, ok := strings.Cut(r, ".")
		if !ok || len(validation.IsDNS1123Label(name)) > 0 || len(validation.IsDNS1123Subdomain(group)) > 0 {
			return fmt.Errorf("resources: %s is no resource: write NAME.GROUP, such as rollouts.argoproj.io", param.Cut(r))
		}
	}
	return nil
}

func scaleWorkloadRBAC() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
		{APIGroups: []string{"apps"}, Resources: []string{"deployments", "replicasets", "statefulsets"}, Verbs: []string{"get"}},
		{
			APIGroups: []string{"apps"}, Resources: []string{"deployments/scale", "replicasets/scale", "statefulsets/scale"},
			Verbs: []string{"get", "update"},
		},
		{APIGroups: []string{"autoscaling"}, Resources: []string{"horizontalpodautoscalers"}, Verbs: []string{"list"}},
	}
}

type workloadScaler struct{ workloadActor }

// topmost is the topmost workload over the pod that has a scale.
func (s *workloadScaler) topmost(ctx context.Context, pod *corev1.Pod) (w *workload, above string, err error) {
	chain, above, err := climb(ctx, s.kube, pod, func(*workload) bool { return false })
	if err != nil {
		return nil, "", err
	}
	for n, w := range slices.Backward(chain) {
		if w.Scale {
			if above == "" && n+1 < len(chain) {
				above = controllerName(metav1.GetControllerOf(w))
			}
			return w, above, nil
		}
	}
	return nil, "", Refuse("pod %s/%s belongs to %s, which has no number of replicas", pod.Namespace, pod.Name, controllerName(metav1.GetControllerOf(pod)))
}

// scaling is the undo record.
type scaling struct {
	schema.GroupVersionResource
	Kind      string    `json:"kind"`
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
	From      int64     `json:"from"`
	To        int64     `json:"to"`
}

func (r scaling) String() string { return fmt.Sprintf("%s %s/%s", r.Kind, r.Namespace, r.Name) }

func (s *workloadScaler) Act(ctx context.Context, r *Request) (Result, error) {
	var params scaleWorkloadParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("scale the workload of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	pod, w, above, err := s.of(ctx, r)
	if err != nil {
		return fail(err)
	}
	rec := scaling{
		GroupVersionResource: w.GroupVersionResource, Kind: w.Served.Kind,
		Namespace: pod.Namespace, Name: w.GetName(), UID: w.GetUID(), To: int64(params.Replicas),
	}
	scale, err := s.scaleOf(ctx, rec)
	if err != nil {
		return fail(err)
	}
	rec.From = replicasOf(scale)
	var before scaling
	byThis := json.Unmarshal(r.Intended, &before) == nil && before.UID == rec.UID && before.To == rec.To && rec.From == rec.To
	switch {
	case byThis:
		rec = before // done by an earlier try of this very step
	case rec.From <= rec.To:
		return Result{Nothing: true, Reason: fmt.Sprintf("%s has %d replicas already", rec, rec.From), Found: map[string]string{"workload": rec.String()}}, nil
	}
	undo, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	ttl := time.Duration(params.TTL)
	if !byThis {
		// Afterwards the workload does not tell how many there were.
		r.Intend(undo, ttl)
		if err := s.set(ctx, rec, scale, rec.To); err != nil {
			return fail(err)
		}
	}
	result := Result{
		Reason: fmt.Sprintf("%s scaled from %d to %d replicas", rec, rec.From, rec.To),
		Found:  map[string]string{"workload": rec.String(), "replicas": fmt.Sprint(rec.From)},
		Undo:   undo, TTL: ttl,
	}
	if above != "" {
		result.Reason += fmt.Sprintf("; %s controls it and may set the number back", above)
		result.Found["controller"] = above
	}
	s.tellAutoscalers(ctx, rec, &result)
	return result, nil
}

// scaleOf is the scale of the very workload that is meant.
func (s *workloadScaler) scaleOf(ctx context.Context, rec scaling) (*unstructured.Unstructured, error) {
	scale, err := s.kube.Dynamic().Resource(rec.GroupVersionResource).Namespace(rec.Namespace).Get(ctx, rec.Name, metav1.GetOptions{}, "scale")
	if err != nil {
		return nil, fmt.Errorf("get the scale of %s: %w", rec, err)
	}
	if scale.GetUID() != rec.UID {
		return nil, fmt.Errorf("%s was replaced by another of that name: %w", rec, ErrGone)
	}
	return scale, nil
}

// replicasOf leaves out nothing that a scale says: it does not write a 0.
func replicasOf(scale *unstructured.Unstructured) int64 {
	n, _, _ := unstructured.NestedInt64(scale.Object, "spec", "replicas")
	return n
}

// set holds only for the scale as it was read: UID and resource version go with
// it, and a change in between is a conflict, and tried again.
func (s *workloadScaler) set(ctx context.Context, rec scaling, scale *unstructured.Unstructured, replicas int64) error {
	scale = scale.DeepCopy()
	if err := unstructured.SetNestedField(scale.Object, replicas, "spec", "replicas"); err != nil {
		return fmt.Errorf("the scale of %s can't be read: %w", rec, err)
	}
	_, err := s.kube.Dynamic().Resource(rec.GroupVersionResource).Namespace(rec.Namespace).Update(ctx, scale, metav1.UpdateOptions{}, "scale")
	if err != nil {
		return fmt.Errorf("set the scale of %s to %d: %w", rec, replicas, err)
	}
	return nil
}

// tellAutoscalers names the autoscalers that target the workload. That it can't is
// no failure: the workload is scaled.
func (s *workloadScaler) tellAutoscalers(ctx context.Context, rec scaling, result *Result) {
	autoscalers := schema.GroupVersionResource{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}
	var names []string
	fromZero := false
	err := s.kube.eachObject(ctx, autoscalers, rec.Namespace, func(o *unstructured.Unstructured) {
		target := func(key string) string {
			v, _, _ := unstructured.NestedString(o.Object, "spec", "scaleTargetRef", key)
			return v
		}
		gv, err := schema.ParseGroupVersion(target("apiVersion"))
		if err != nil || gv.Group != rec.Group || target("kind") != rec.Kind || target("name") != rec.Name {
			return
		}
		names = append(names, o.GetName())
		least, found, _ := unstructured.NestedInt64(o.Object, "spec", "minReplicas")
		fromZero = fromZero || found && least == 0
	})
	if err != nil {
		_, _, _, reason := classify(err)
		result.Reason += "; whether a HorizontalPodAutoscaler targets it is not known: " + reason
		return
	}
	if len(names) == 0 {
		return
	}
	result.Found["autoscalers"] = briefly(names)
	result.Reason += fmt.Sprintf("; HorizontalPodAutoscaler %s targets it", result.Found["autoscalers"])
	if rec.To == 0 && !fromZero {
		result.Reason += " and leaves it alone as long as it has 0"
	} else {
		result.Reason += " and will set another number"
	}
}

// Undo sets the number that was there before, if it still is what Act made of it.
func (s *workloadScaler) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec scaling
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Resource == "" || rec.Name == "" || rec.UID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	// A controller that is at work writes the object often, and a person who
	// undoes asks once.
	const tries = 5
	for try := 1; ; try++ {
		res, err := s.undo(ctx, rec)
		if err == nil || !apierrors.IsConflict(err) || isGone(err) || try == tries {
			return res, err
		}
	}
}

func (s *workloadScaler) undo(ctx context.Context, rec scaling) (Result, error) {
	scale, err := s.scaleOf(ctx, rec)
	if err != nil {
		return Result{}, fmt.Errorf("set back %s: %w", rec, err)
	}
	switch now := replicasOf(scale); now {
	case rec.To:
	case rec.From:
		return Result{Nothing: true, Reason: fmt.Sprintf("%s has %d replicas already", rec, now)}, nil
	default:
		return Result{Nothing: true, Reason: fmt.Sprintf("%s has %d replicas by now, not the %d of this step: somebody else set that, and it is left", rec, now, rec.To)}, nil
	}
	if err := s.set(ctx, rec, scale, rec.From); err != nil {
		return Result{}, fmt.Errorf("set back %s: %w", rec, err)
	}
	return Result{Reason: fmt.Sprintf("%s scaled back from %d to %d replicas", rec, rec.To, rec.From)}, nil
}
