package responders_test

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// budget makes a PodDisruptionBudget over the pods labelled app=web that allows so
// many disruptions.
func (a *actor) budget(name string, allowed int32) {
	a.t.Helper()
	budgets := a.admin.PolicyV1().PodDisruptionBudgets("shop")
	b, err := budgets.Create(a.t.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	b.Status = policyv1.PodDisruptionBudgetStatus{DisruptionsAllowed: allowed, DesiredHealthy: 1, CurrentHealthy: 1 + allowed}
	if _, err := budgets.UpdateStatus(a.t.Context(), b, metav1.UpdateOptions{}); err != nil {
		a.t.Fatal(err)
	}
}

// now is the pod as it is; nil when it went.
func (a *actor) now() *corev1.Pod {
	a.t.Helper()
	now, err := a.admin.CoreV1().Pods("shop").Get(a.t.Context(), a.pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && now.UID != a.pod.UID {
		return nil
	}
	if err != nil {
		a.t.Fatal(err)
	}
	return now
}

func TestEvictPod(t *testing.T) {
	t.Run("grace", func(t *testing.T) {
		a := newActor(t, "evict-pod", nil)
		a.act("s1", "force: true")
		if now := a.now(); now == nil || now.DeletionGracePeriodSeconds == nil || *now.DeletionGracePeriodSeconds != 1 {
			t.Errorf("the default grace period: %+v", now)
		}
		a.pod = a.now()
		if res := a.act("s2", "{gracePeriod: 10s, force: true}"); !res.Nothing {
			t.Errorf("a longer one: %+v", res)
		}
	})
	t.Run("a budget that allows one", func(t *testing.T) {
		a := newActor(t, "evict-pod", nil)
		a.budget("one", 1)
		a.act("s1", "force: true")
		if now := a.now(); now.DeletionTimestamp == nil {
			t.Error("the pod is not being deleted")
		}
	})
	t.Run("a budget that allows none", func(t *testing.T) {
		a := newActor(t, "evict-pod", nil)
		a.budget("tight", 0)
		_, err := a.Act(t.Context(), a.request("s1", "force: true"))
		status, retry, _, reason := responders.Classify(err)
		if status != broker.Failed || !retry || !strings.Contains(reason, "budget tight needs 1 healthy pods and has 1") {
			t.Errorf("status %s, retry %t: %s", status, retry, reason)
		}
		if !apierrors.HasStatusCause(err, policyv1.DisruptionBudgetCause) || !apierrors.IsTooManyRequests(err) {
			t.Errorf("error %v", err)
		}
		if now := a.now(); now.DeletionTimestamp != nil {
			t.Error("the pod is being deleted")
		}
	})
	t.Run("two budgets", func(t *testing.T) {
		a := newActor(t, "evict-pod", nil)
		a.budget("one", 1)
		a.budget("two", 1)
		_, err := a.Act(t.Context(), a.request("s1", "force: true"))
		if status, retry, _, reason := responders.Classify(err); status != broker.Refused || retry || !strings.Contains(reason, "more than one") {
			t.Errorf("status %s, retry %t: %s", status, retry, reason)
		}
		if now := a.now(); now.DeletionTimestamp != nil {
			t.Error("the pod is being deleted")
		}
	})
	t.Run("another pod of its name", func(t *testing.T) {
		for _, resumed := range []bool{false, true} {
			a := newActor(t, "evict-pod", nil)
			if resumed {
				a.budget("tight", 0) // the API server would speak of this first
			}
			pods := a.admin.CoreV1().Pods("shop")
			if err := pods.Delete(t.Context(), a.pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			if _, err := pods.Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: a.pod.Name, Labels: a.pod.Labels}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			r := a.request("s1", "force: true")
			r.Resumed = resumed
			_, err := a.Act(t.Context(), r)
			if status, _, _, reason := responders.Classify(err); status != broker.Nothing {
				t.Errorf("resumed %t: status %s: %s", resumed, status, reason)
			}
			if resumed && !errors.Is(err, responders.ErrGone) {
				t.Errorf("error %v", err)
			}
			if now, err := pods.Get(t.Context(), a.pod.Name, metav1.GetOptions{}); err != nil || now.DeletionTimestamp != nil {
				t.Errorf("resumed %t: the other pod: %+v, %v", resumed, now, err)
			}
		}
	})
}
