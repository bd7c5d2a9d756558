package kube

import (
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// The harness itself: what the tests take for granted of it.
func TestCluster(t *testing.T) {
	c := Start(t)
	t.Logf("ready after %s", c.Ready.Round(time.Millisecond))
	ns, node := c.Namespace(t, Name("ns")), c.Node(t)
	account := c.Account(t, []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "delete"}}})

	t.Run("the kubelet ends a deleted pod, and the audit log has the request once", func(t *testing.T) {
		pod := c.Pod(t, ns, "one", node, nil)
		grace := int64(1)
		err := account.Client.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, metav1.DeleteOptions{
			GracePeriodSeconds: &grace, Preconditions: &metav1.Preconditions{UID: &pod.UID},
		})
		if err != nil {
			t.Fatal(err)
		}
		c.WaitGone(t, pod, 5*time.Second)
		got := c.Requests(t, account.User)
		if len(got) != 1 || got[0].Verb != "delete" || got[0].UID != string(pod.UID) || got[0].Code != 200 {
			t.Errorf("the audit log has %+v, want one delete of %s", got, pod.UID)
		}
	})

	t.Run("a wrong UID is refused", func(t *testing.T) {
		pod := c.Pod(t, ns, "two", node, nil)
		err := account.Client.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, deleteNow(NoUID))
		if !apierrors.IsConflict(err) {
			t.Errorf("got %v, want a conflict", err)
		}
		if !c.Alive(t, pod) {
			t.Error("the pod is gone")
		}
	})

	t.Run("an account may do no more than its rules", func(t *testing.T) {
		if _, err := account.Client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("list: got %v, want forbidden", err)
		}
	})

	t.Run("the API server comes back with everything as it was", func(t *testing.T) {
		pod := c.Pod(t, ns, "three", node, nil)
		if err := c.StopAPIServer(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Client.CoreV1().Pods(ns).Get(t.Context(), pod.Name, metav1.GetOptions{}); err == nil {
			t.Fatal("the API server still answers")
		}
		if err := c.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !c.Alive(t, pod) {
			t.Error("the pod is gone")
		}
		if len(c.Requests(t, account.User)) == 0 {
			t.Error("the audit log was begun anew")
		}
	})
}

// What a bare DELETE costs here, until a watch sees the pod gone: what stoop's
// times are to be compared with.
func BenchmarkDelete(b *testing.B) {
	c := StartWithoutAudit(b)
	ns, node := c.Namespace(b, Name("ns")), c.Node(b)
	for _, grace := range []int64{0, 1} {
		b.Run(fmt.Sprintf("grace=%d", grace), func(b *testing.B) {
			w, err := c.Client.CoreV1().Pods(ns).Watch(b.Context(), metav1.ListOptions{})
			if err != nil {
				b.Fatal(err)
			}
			defer w.Stop()
			var took []time.Duration
			for b.Loop() {
				b.StopTimer()
				pod := c.Pod(b, ns, Name("pod"), node, nil)
				b.StartTimer()
				began := time.Now()
				if err := c.Client.CoreV1().Pods(ns).Delete(b.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace, Preconditions: &metav1.Preconditions{UID: &pod.UID}}); err != nil {
					b.Fatal(err)
				}
				for event := range w.ResultChan() {
					if p, ok := event.Object.(*corev1.Pod); ok && event.Type == watch.Deleted && p.UID == pod.UID {
						break
					}
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}
