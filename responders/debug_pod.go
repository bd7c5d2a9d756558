package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"stoop/alert"
	"stoop/param"
)

func debugPod() Entry {
	return Entry{
		Name: "debug-pod",
		Doc:  "Adds an ephemeral container of your image to the pod, beside the suspect container.",
		Notes: `The container sees the processes of the suspect container (targetContainerName) and
shares the pod's network, so that a person can look around with tools that the suspect's
image does not have: kubectl attach, or kubectl exec with the name that the outcome says,
stoop-debug- and the beginning of the step's id. Nothing of the alert gets into it.

Kubernetes has no way to take an ephemeral container out of a pod again: it stays, ended
or not, until the pod is deleted, and there is no undo. It can't be restarted. Give it a
command that ends (sleep 3600) rather than one that does not. Its image is pulled by the
node, with the pod's pull secrets, so the outcome says only that the API server took it.

It is inside what the attacker holds: he sees its processes as it sees his, reaches it over
the pod's network, and as the same user may change it. The namespace's Pod Security level
and admission apply. Behind isolate-pod or cut-network it has no network either; behind
freeze-container it runs, and sees the suspect's processes stand still.`,
		Params: param.Describe(debugPodParams{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"pods/ephemeralcontainers"}, Verbs: []string{"patch"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		New:      func(env Env) Responder { return &podDebugger{env.Kube} },
	}
}

type debugPodParams struct {
	Image   string   `param:"image" required:"true" doc:"The image, as in a pod; one with its digest can't be exchanged."`
	Command []string `param:"command" doc:"The program and its arguments, in place of the image's own."`
}

// Validate refuses what no pod may hold.
func (p debugPodParams) Validate() error {
	if p.Image == "" || strings.TrimSpace(p.Image) != p.Image {
		return errors.New("image: there is none, or it has space around it")
	}
	for _, arg := range p.Command {
		if strings.Contains(arg, "\x00") {
			return errors.New("command: an argument holds a NUL byte")
		}
	}
	return nil
}

type podDebugger struct{ kube *Kube }

// debugName is the container's: the same in each run of a step.
func debugName(step string) string { return "stoop-debug-" + alert.IDOf([]byte(step))[:10] }

// podsResource is how pods are served, by the dynamic client: it hands on what this
// version of stoop knows nothing of.
var podsResource = corev1.SchemeGroupVersion.WithResource("pods")

func (d *podDebugger) Act(ctx context.Context, r *Request) (Result, error) {
	var params debugPodParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("add a container to pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	pods := d.kube.Dynamic().Resource(podsResource).Namespace(r.Pod.Namespace)
	now, err := pods.Get(ctx, r.Pod.Name, metav1.GetOptions{})
	if err != nil {
		return fail(err)
	}
	if now.GetUID() != r.Pod.UID || now.GetDeletionTimestamp() != nil {
		return fail(ErrGone)
	}
	var pod corev1.Pod
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(now.Object, &pod); err != nil {
		return fail(err)
	}
	name := debugName(r.Step.ID)
	found := map[string]string{"container": name}
	for _, c := range pod.Spec.EphemeralContainers {
		if c.Name == name {
			return Result{Nothing: true, Reason: "the pod has container " + name + " already", Found: found}, nil
		}
	}
	suspect, _, err := suspectContainer(&pod, r.Target.Container)
	if err != nil {
		return fail(err)
	}
	all, _, err := unstructured.NestedSlice(now.Object, "spec", "ephemeralContainers")
	if err != nil {
		return fail(err)
	}
	container := map[string]any{"name": name, "image": params.Image}
	if slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == suspect }) {
		container["targetContainerName"] = suspect // the API server takes no other kind
	}
	if len(params.Command) > 0 {
		container["command"] = params.Command
	}
	if err := d.patch(ctx, &pod, append(all, container)); err != nil {
		return fail(err)
	}
	return Result{
		Reason: fmt.Sprintf("container %s of image %s added beside container %s; it can't be removed again, only with the pod", name, param.Cut(params.Image), suspect),
		Found:  found,
	}, nil
}

// patch holds only for the pod as it was read; a change in between is a conflict, and
// tried again.
func (d *podDebugger) patch(ctx context.Context, pod *corev1.Pod, all []any) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion},
		"spec":     map[string]any{"ephemeralContainers": all},
	})
	if err != nil {
		return err
	}
	_, err = d.kube.Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "ephemeralcontainers")
	return err
}
