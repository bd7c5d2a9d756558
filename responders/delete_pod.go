package responders

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"stoop/param"
)

func deletePod() Entry {
	own := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "delete"}}
	return Entry{
		Name: "delete-pod",
		Doc:  "Deletes the pod that raised the alert.",
		Notes: `The request carries the pod's UID: another pod that has taken its name is never deleted.

Deleted is not stopped: with a grace period of 0 the pod vanishes from the API
server at once, while its processes were seen to run on for 2.5 to 3.9 s, and
nobody sees them any more. From 1 s on the pod goes only after its processes. So
leave it at 1 s; longer gives an attacker time.

A pod that a Deployment, StatefulSet, DaemonSet or Job owns is made anew from the
same image with the same hole. After the second such delete for one owner stoop
isolates the next pod instead. A delete takes the evidence in the pod with it: put
the steps that keep some before it. It can't be undone.

` + sparingNotes,
		Params:   param.Describe(deletePodDefaults()),
		RBAC:     rulesOf(sparingGrants(own)),
		Grants:   sparingGrants(own),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		Instead:  "isolate-pod",
		New:      func(env Env) Responder { return &podDeleter{podTaker{env.Kube, env.Node}} },
	}
}

// deletePodParams are those of evict-pod too.
type deletePodParams struct {
	GracePeriod param.Duration `param:"gracePeriod" min:"0s" max:"1h" doc:"How long the pod's processes have between SIGTERM and SIGKILL, in whole seconds. 0 only makes the pod's object vanish sooner, not its processes."`
	sparing
}

func deletePodDefaults() deletePodParams {
	return deletePodParams{GracePeriod: param.Duration(time.Second)}
}

// Validate refuses fractions, which the API server can't be told, and what is said
// twice.
func (p deletePodParams) Validate() error {
	if time.Duration(p.GracePeriod)%time.Second != 0 {
		return fmt.Errorf("gracePeriod: %s is not a whole number of seconds", p.GracePeriod)
	}
	if p.Force && p.MaxUnavailable.IsSet() {
		return errors.New("force and maxUnavailable exclude each other: force takes any pod, however many are unavailable")
	}
	return nil
}

type podDeleter struct{ podTaker }

func (d *podDeleter) Act(ctx context.Context, r *Request) (Result, error) {
	params := deletePodDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	pod, grace := r.Pod, int64(time.Duration(params.GracePeriod)/time.Second)
	if r.Resumed {
		now, err := sameNow(ctx, d.kube, pod)
		if err != nil {
			return Result{}, fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		pod = now
	}
	// A second DELETE could only shorten the time that is left.
	if g := pod.DeletionGracePeriodSeconds; pod.DeletionTimestamp != nil && g != nil && *g <= grace {
		return Result{Nothing: true, Reason: fmt.Sprintf("the pod is being deleted already, with a grace period of %d s", *g)}, nil
	}
	done, err := d.take(ctx, r, pod, params.sparing, true)
	defer done()
	if err != nil {
		return Result{}, fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	err = d.kube.Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &grace,
		Preconditions:      metav1.NewUIDPreconditions(string(pod.UID)),
	})
	if err != nil {
		return Result{}, fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return Result{Reason: fmt.Sprintf("deleted with a grace period of %d s", grace)}, nil
}

// sameNow asks the API server for a pod as it is now; [ErrGone] if it went or
// another one has its name.
func sameNow(ctx context.Context, kube *Kube, pod *corev1.Pod) (*corev1.Pod, error) {
	now, err := podNow(ctx, kube, pod.Namespace, pod.Name, pod.UID)
	if err == nil && now == nil {
		err = ErrGone
	}
	return now, err
}

// podNow is the same with nil for a pod that went.
func podNow(ctx context.Context, kube *Kube, namespace, name string, uid types.UID) (*corev1.Pod, error) {
	now, err := kube.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), err == nil && now.UID != uid:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("get pod %s/%s: %w", namespace, name, err)
	}
	return now, nil
}
