package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"stoop/param"
)

// annotationRestarted is what kubectl rollout restart writes into a pod template.
const annotationRestarted = "kubectl.kubernetes.io/restartedAt"

func restartWorkload() Entry {
	return Entry{
		Name: "restart-workload",
		Doc:  "Restarts the Deployment, StatefulSet or DaemonSet that the pod belongs to, as kubectl rollout restart does.",
		Notes: `The workload is found from the pod up by controller references, each proved by its
UID and looked for in the pod's namespace only. Its pod template gets the annotation
kubectl.kubernetes.io/restartedAt, and the object itself stoop.dev/step, which names
the step; its controller then makes all its pods anew, a few at a time as its update
strategy says (a DaemonSet's on all nodes).

A restart is no containment: the suspect runs on until its turn comes, which may be
minutes, has its whole terminationGracePeriod then, and the next pod comes from the
same image with the same hole. It clears what lives in memory only, and has pods read
secrets that were rotated. What must stop now belongs into a step before it
(isolate-pod, freeze-container), as does evidence.

Each alert restarts a workload once, also over a crash, and an alert of a pod from
before the last restart does not restart it again: that pod is being replaced already.
The cooldown counts by the workload. After the second restart within 30 minutes by one
rule the next pod that raises the alert is isolated instead: restarting did not help.

Refused are workloads of other kinds, a paused Deployment, and where a restart would
not reach the pod: with the update strategy OnDelete, and below the partition of a
StatefulSet. An operator that owns the workload may take the annotation out again,
which restarts all pods once more. It can't be undone.`,
		Params: param.Describe(struct{}{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{"apps"}, Resources: []string{"replicasets"}, Verbs: []string{"get"}},
			{APIGroups: []string{"apps"}, Resources: []string{"deployments", "statefulsets", "daemonsets"}, Verbs: []string{"get", "patch"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		Instead:  "isolate-pod",
		New: func(env Env) Responder {
			s := &workloadRestarter{workloadActor{kube: env.Kube}}
			s.find = s.restartable
			return s
		},
	}
}

type workloadRestarter struct{ workloadActor }

// restartable is the workload over the pod that rolls out pods of a template.
func (s *workloadRestarter) restartable(ctx context.Context, pod *corev1.Pod) (w *workload, above string, err error) {
	rollsOut := func(w *workload) bool {
		return w.is("apps", "Deployment") || w.is("apps", "StatefulSet") || w.is("apps", "DaemonSet")
	}
	// Others are not read, and so take no permission.
	foreign := func(ref *metav1.OwnerReference) bool {
		return ref != nil && !strings.HasPrefix(ref.APIVersion, "apps/")
	}
	next := metav1.GetControllerOf(pod)
	if !foreign(next) {
		chain, _, err := climb(ctx, s.kube, pod, func(w *workload) bool { return rollsOut(w) || foreign(metav1.GetControllerOf(w)) })
		if err != nil {
			return nil, "", err
		}
		if len(chain) > 0 {
			w = chain[len(chain)-1]
			if up := metav1.GetControllerOf(w); up != nil {
				next, above = up, controllerName(up)
			}
		}
	}
	if w == nil || !rollsOut(w) {
		return nil, "", Refuse("pod %s/%s belongs to %s, which can't be restarted like a Deployment", pod.Namespace, pod.Name, controllerName(next))
	}
	return w, above, nil
}

func (s *workloadRestarter) Act(ctx context.Context, r *Request) (Result, error) {
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("restart the workload of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	pod, w, above, err := s.of(ctx, r)
	if err != nil {
		return fail(err)
	}
	if err := restartReaches(w, pod); err != nil {
		return Result{}, err
	}
	result := Result{Found: map[string]string{"workload": w.String()}}
	last, _, _ := unstructured.NestedString(w.Object, "spec", "template", "metadata", "annotations", annotationRestarted)
	switch {
	case !precedes(pod, last, time.Now()):
		now := time.Now().UTC().Format(time.RFC3339Nano)
		if err := s.patch(ctx, w, r.Step.ID, now); err != nil {
			return fail(err)
		}
		last = now
	case w.GetAnnotations()[annotationStep] != r.Step.ID:
		result.Nothing = true
		result.Reason = fmt.Sprintf("%s was restarted at %s, and this pod is from before: it is being replaced already", w, last)
		return result, nil
	}
	// Also where an earlier try did it, and only its answer was lost.
	result.Reason = fmt.Sprintf("%s restarted: its pods are made anew", w)
	result.Found["restartedAt"] = last
	if above != "" {
		result.Reason += fmt.Sprintf("; %s controls it and may take that back", above)
		result.Found["controller"] = above
	}
	return result, nil
}

// restartReaches refuses a workload whose restart would leave this pod as it is.
func restartReaches(w *workload, pod *corev1.Pod) error {
	if paused, _, _ := unstructured.NestedBool(w.Object, "spec", "paused"); paused {
		return Refuse("%s is paused: a restart would wait until somebody resumes it", w)
	}
	if strategy, _, _ := unstructured.NestedString(w.Object, "spec", "updateStrategy", "type"); strategy == "OnDelete" {
		return Refuse("%s has the update strategy OnDelete: a restart would replace no pod", w)
	}
	partition, _, _ := unstructured.NestedInt64(w.Object, "spec", "updateStrategy", "rollingUpdate", "partition")
	ordinal, _ := strings.CutPrefix(pod.Name, w.GetName()+"-")
	if n, err := strconv.ParseInt(ordinal, 10, 64); w.is("apps", "StatefulSet") && err == nil && n < partition {
		return Refuse("%s restarts only the pods from number %d on, its partition: a restart would not reach this one", w, partition)
	}
	return nil
}

// precedes reports whether a pod is from before the last restart of its workload.
// What the pod says of itself is not enough: who may annotate it could keep it from
// being restarted for ever, as could a time that is yet to come.
func precedes(pod *corev1.Pod, last string, now time.Time) bool {
	at, err := time.Parse(time.RFC3339, last)
	return err == nil && pod.Annotations[annotationRestarted] != last &&
		pod.CreationTimestamp.Time.Before(at) && at.Before(now.Add(time.Minute))
}

// patch holds only for the workload as it was read: with another UID the API server
// answers 422, with another resource version 409.
func (s *workloadRestarter) patch(ctx context.Context, w *workload, step, at string) error {
	annotate := func(name, value string) map[string]any {
		return map[string]any{"annotations": map[string]string{name: value}}
	}
	meta := annotate(annotationStep, step)
	meta["uid"], meta["resourceVersion"] = w.GetUID(), w.GetResourceVersion()
	patch, err := json.Marshal(map[string]any{
		"metadata": meta,
		"spec":     map[string]any{"template": map[string]any{"metadata": annotate(annotationRestarted, at)}},
	})
	if err != nil {
		return err
	}
	if _, err := w.client(s.kube).Patch(ctx, w.GetName(), types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("annotate the pod template of %s: %w", w, err)
	}
	return nil
}
