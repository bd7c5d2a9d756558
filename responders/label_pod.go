package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/param"
)

func labelPod() Entry {
	return Entry{
		Name: "label-pod",
		Doc:  "Sets labels on the pod that raised the alert, or takes them off.",
		Notes: `Labels are more than notes. Taking off a label that a Service selects takes the pod
out of the Service; taking off one that a ReplicaSet selects (or pod-template-hash)
makes the ReplicaSet start another pod and leaves this one running on its own, to be
looked into. Both may be what you want; setting one may also draw traffic or a
policy to the pod.

Keys under stoop.dev/, kubernetes.io/ and k8s.io/ and under names below these are
refused, save app.kubernetes.io/. Undo puts back what was there before, where the
label still is what stoop made of it. Whoever may change pods in the namespace can
change the labels too: nothing that must hold should hang on them.`,
		Params: param.Describe(labelPodParams{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "patch"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		New:      func(env Env) Responder { return &podLabeller{env.Kube} },
	}
}

type labelPodParams struct {
	Labels map[string]string `param:"labels" required:"true" doc:"The labels by name; an empty value takes the label off."`
	TTL    param.Duration    `param:"ttl" doc:"After how long the labels are put back by themselves; 0 is never."`
}

// Validate refuses what the API server would, and what is others' to set.
func (p labelPodParams) Validate() error {
	if len(p.Labels) == 0 {
		return fmt.Errorf("labels: there is none")
	}
	for _, name := range slices.Sorted(maps.Keys(p.Labels)) {
		if msgs := validation.IsQualifiedName(name); len(msgs) > 0 {
			return fmt.Errorf("labels: %s is no name for a label: %s", param.Cut(name), msgs[0])
		}
		if msgs := validation.IsValidLabelValue(p.Labels[name]); len(msgs) > 0 {
			return fmt.Errorf("labels: %s is no value for the label %s: %s", param.Cut(p.Labels[name]), name, msgs[0])
		}
		if prefix, _, ok := strings.Cut(name, "/"); ok && reserved(prefix) {
			return fmt.Errorf("labels: names under %s/ are not for rules to set", prefix)
		}
	}
	return nil
}

func reserved(prefix string) bool {
	if prefix == "app.kubernetes.io" {
		return false
	}
	for _, d := range []string{strings.TrimSuffix(ownPrefix, "/"), "kubernetes.io", "k8s.io"} {
		if prefix == d || strings.HasSuffix(prefix, "."+d) {
			return true
		}
	}
	return false
}

type podLabeller struct{ kube *Kube }

// labelling is the undo record.
type labelling struct {
	Namespace string                 `json:"namespace"`
	Pod       string                 `json:"pod"`
	UID       types.UID              `json:"uid"`
	Changes   map[string]labelChange `json:"changes"`
}

// labelChange is what a label was and what it was made; nil is absent.
type labelChange struct {
	From *string `json:"from"`
	To   *string `json:"to"`
}

func (l *podLabeller) Act(ctx context.Context, r *Request) (Result, error) {
	var params labelPodParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("label pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	// Asked anew: what undo puts back has to be what really was there.
	pod, err := sameNow(ctx, l.kube, r.Pod)
	if err != nil {
		return fail(err)
	}
	rec := labelling{Namespace: pod.Namespace, Pod: pod.Name, UID: pod.UID, Changes: map[string]labelChange{}}
	before := intended(r, pod)
	set := map[string]*string{}
	for name, value := range params.Labels {
		from, to := labelOf(pod.Labels, name), (*string)(nil)
		if value != "" {
			to = &value
		}
		if c, ok := before.Changes[name]; ok && sameLabel(from, to) && sameLabel(c.To, to) {
			rec.Changes[name] = c // by an earlier try of this very step
		} else if !sameLabel(from, to) {
			set[name], rec.Changes[name] = to, labelChange{from, to}
		}
	}
	if len(rec.Changes) == 0 {
		return Result{Nothing: true, Reason: "the pod's labels are so already"}, nil
	}
	undo, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	ttl := time.Duration(params.TTL)
	if len(set) > 0 {
		// Afterwards the pod does not tell what was there before.
		r.Intend(undo, ttl)
		if err := l.patch(ctx, rec, pod.ResourceVersion, set); err != nil {
			return fail(err)
		}
	}
	return Result{Reason: "labels changed: " + names(rec.Changes), Undo: undo, TTL: ttl}, nil
}

// intended is what an earlier try of this step was about to change, if it was cut
// off and may have done so.
func intended(r *Request, pod *corev1.Pod) labelling {
	var rec labelling
	if json.Unmarshal(r.Intended, &rec) != nil || rec.UID != pod.UID {
		return labelling{}
	}
	return rec
}

// Undo puts back those labels that still are what Act made of them.
func (l *podLabeller) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec labelling
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Pod == "" || rec.UID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("put back labels of pod %s/%s: %w", rec.Namespace, rec.Pod, err)
	}
	pod, err := podNow(ctx, l.kube, rec.Namespace, rec.Pod, rec.UID)
	if err != nil {
		return fail(err)
	}
	if pod == nil {
		return Result{}, fmt.Errorf("pod %s/%s: %w", rec.Namespace, rec.Pod, ErrGone)
	}
	set, left := map[string]*string{}, map[string]*string{}
	for name, c := range rec.Changes {
		now := labelOf(pod.Labels, name)
		switch {
		case sameLabel(now, c.From):
		case sameLabel(now, c.To):
			set[name] = c.From
		default:
			left[name] = now
		}
	}
	var note string
	if len(left) > 0 {
		note = "; changed by others meanwhile and left: " + names(left)
	}
	if len(set) == 0 {
		return Result{Nothing: true, Reason: "there is nothing to put back" + note}, nil
	}
	if err := l.patch(ctx, rec, pod.ResourceVersion, set); err != nil {
		return fail(err)
	}
	return Result{Reason: "labels put back: " + names(set) + note}, nil
}

// patch holds only for the pod as it was read; a change in between is a
// conflict, and tried again.
func (l *podLabeller) patch(ctx context.Context, rec labelling, resourceVersion string, set map[string]*string) error {
	patch, err := labelPatch(rec.UID, resourceVersion, set)
	if err != nil {
		return err
	}
	_, err = l.kube.Pods(rec.Namespace).Patch(ctx, rec.Pod, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

func labelOf(labels map[string]string, name string) *string {
	if v, ok := labels[name]; ok {
		return &v
	}
	return nil
}

func sameLabel(a, b *string) bool {
	return a == nil && b == nil || a != nil && b != nil && *a == *b
}

func names[V any](set map[string]V) string {
	return strings.Join(slices.Sorted(maps.Keys(set)), ", ")
}
