package responders

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/param"
)

func evictPod() Entry {
	own := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
		{APIGroups: []string{""}, Resources: []string{"pods/eviction"}, Verbs: []string{"create"}},
	}
	return Entry{
		Name: "evict-pod",
		Doc:  "Evicts the pod that raised the alert, as far as its PodDisruptionBudget allows that.",
		Notes: `Like delete-pod, but asked of the eviction API: a PodDisruptionBudget that allows no
disruption now holds it back. It is asked again, with growing delays of up to 15 s
(or what the API server asks for), until the alert is older than guard.maxAge, and
the outcomes name the budget. The chain waits meanwhile: put what must not wait
(isolate-pod, freeze-container) before it. A pod that two budgets select can't be
evicted at all, says the API server; that is refused at once.

A budget protects availability, and so the attacker in a workload that has no
replica to spare, or whose other pods were made to fail. Where stopping the suspect
matters more, use delete-pod.

The request carries the pod's UID: another pod that has taken its name is never
evicted. The API server counts the budget before it compares the UID, though: for
as long as a budget allows nothing, only a look at the pod tells that it was
replaced, and that look is taken at every further try.

Grace period, the owner's limit (after the second pod of one owner the next is
isolated instead), what goes with the pod, and which pods are isolated instead of
evicted (the last healthy one, of a StatefulSet, with a ReadWriteOnce volume, without a
controller) are as with [delete-pod](#delete-pod): a workload without a budget would
lose its last pod here too. It can't be undone.`,
		Params:   param.Describe(deletePodDefaults()),
		RBAC:     rulesOf(sparingGrants(own...)),
		Grants:   sparingGrants(own...),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		Instead:  "isolate-pod",
		New:      func(env Env) Responder { return &podEvicter{podTaker{env.Kube, env.Node}} },
	}
}

type podEvicter struct{ podTaker }

func (e *podEvicter) Act(ctx context.Context, r *Request) (Result, error) {
	params := deletePodDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	pod, grace := r.Pod, int64(time.Duration(params.GracePeriod)/time.Second)
	if r.Resumed {
		now, err := sameNow(ctx, e.kube, pod)
		if err != nil {
			return Result{}, fmt.Errorf("evict pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		pod = now
	}
	if g := pod.DeletionGracePeriodSeconds; pod.DeletionTimestamp != nil && g != nil && *g <= grace {
		return Result{Nothing: true, Reason: fmt.Sprintf("the pod is being deleted already, with a grace period of %d s", *g)}, nil
	}
	done, err := e.take(ctx, r, pod, params.sparing, true)
	defer done()
	if err != nil {
		return Result{}, fmt.Errorf("evict pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if err := evict(ctx, e.kube, pod, &grace); err != nil {
		return Result{}, err
	}
	return Result{Reason: fmt.Sprintf("evicted with a grace period of %d s", grace)}, nil
}

// evict asks the eviction API once to delete the pod with this UID, and no other
// of its name; a nil grace is the pod's own. The API server's errors are wrapped
// as they are: a budget that allows no disruption now is a 429 with the cause
// DisruptionBudget, and which budget it is stands in the error's text. A pod that
// can't be evicted whatever the number of tries is refused.
func evict(ctx context.Context, kube *Kube, pod *corev1.Pod, grace *int64) error {
	if pod.UID == "" {
		return fmt.Errorf("evict pod %s/%s: the pod has no UID", pod.Namespace, pod.Name)
	}
	// Get, not Error: a pod with two budgets is answered with 201 and a status
	// that says failure in its body, which Error takes for a success. Retries are
	// the host's: the client would spend this try's deadline on them.
	_, err := kube.core.Post().MaxRetries(0).
		Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("eviction").
		Body(&policyv1.Eviction{
			ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name},
			DeleteOptions: &metav1.DeleteOptions{
				GracePeriodSeconds: grace,
				Preconditions:      metav1.NewUIDPreconditions(string(pod.UID)),
			},
		}).Do(ctx).Get()
	if err == nil {
		return nil
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) && strings.Contains(status.Status().Message, "more than one PodDisruptionBudget") {
		return Refuse("evict pod %s/%s: %s", pod.Namespace, pod.Name, status.Status().Message)
	}
	if cause, ok := apierrors.StatusCause(err, policyv1.DisruptionBudgetCause); ok {
		return fmt.Errorf("evict pod %s/%s: %w %s", pod.Namespace, pod.Name, err, cause.Message)
	}
	return fmt.Errorf("evict pod %s/%s: %w", pod.Namespace, pod.Name, err)
}
