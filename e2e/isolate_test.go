package e2e

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

const isolateRule = `
mode: enforce
rules:
  - name: isolate-on-critical
    match: {rule: Test critical}
    actions: [isolate-pod]
  - name: isolate-for-a-while
    match: {rule: Test short}
    actions:
      - isolate-pod: {ttl: 2s, direction: egress}
  - name: label-on-critical
    match: {rule: Test label}
    actions:
      - label-pod: {labels: {quarantine: "yes"}}
`

// The name that isolate-pod documents for its policy.
func policyName(pod *corev1.Pod) string { return "stoop-isolate-" + string(pod.UID) }

// policy is the network policy of that name, or nil.
func (w *world) policy(t *testing.T, name string) *networkingv1.NetworkPolicy {
	t.Helper()
	p, err := w.Client.NetworkingV1().NetworkPolicies(w.ns).Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatalf("get the network policy %s: %v", name, err)
	}
	return p
}

func (w *world) createPolicy(t *testing.T, name string, selector map[string]string) *networkingv1.NetworkPolicy {
	t.Helper()
	p, err := w.Client.NetworkingV1().NetworkPolicies(w.ns).Create(t.Context(), &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: selector},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("make the network policy %s: %v", name, err)
	}
	return p
}

// selecting are the namespace's network policies that select the pod as it is
// now, by the rules of Kubernetes.
func (w *world) selecting(t *testing.T, pod *corev1.Pod) []string {
	t.Helper()
	now := w.Get(t, pod.Namespace, pod.Name)
	if now == nil {
		t.Fatalf("the pod %s is gone", pod.Name)
	}
	list, err := w.Client.NetworkingV1().NetworkPolicies(pod.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatalf("list the network policies: %v", err)
	}
	var names []string
	for _, p := range list.Items {
		selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil {
			t.Fatalf("the selector of %s: %v", p.Name, err)
		}
		if selector.Matches(labels.Set(now.Labels)) {
			names = append(names, p.Name)
		}
	}
	return names
}

// wantIsolated checks that the pod, and it alone, is selected by its policy,
// which lets nothing through.
func (w *world) wantIsolated(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	p := w.policy(t, policyName(pod))
	if p == nil {
		t.Fatalf("there is no network policy %s", policyName(pod))
	}
	if len(p.Spec.PolicyTypes) == 0 || len(p.Spec.Ingress) > 0 || len(p.Spec.Egress) > 0 {
		t.Errorf("the network policy cuts nothing off: %+v", p.Spec)
	}
	if len(p.OwnerReferences) != 1 || p.OwnerReferences[0].UID != pod.UID {
		t.Errorf("the network policy is not owned by the pod: %+v", p.OwnerReferences)
	}
	if got := w.selecting(t, pod); len(got) == 0 || !reflect.DeepEqual(got[len(got)-1:], []string{p.Name}) && !strings.Contains(strings.Join(got, " "), p.Name) {
		t.Errorf("the pod is selected by %v, want %s among them", got, p.Name)
	}
	now := w.Get(t, pod.Namespace, pod.Name)
	if now.UID != pod.UID || !reflect.DeepEqual(now.Spec, pod.Spec) {
		t.Errorf("the pod is another, or its spec was changed")
	}
}

// wantUntouched checks that the pod is as it was made.
func (w *world) wantUntouched(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now := w.Get(t, pod.Namespace, pod.Name)
	if now == nil || now.UID != pod.UID {
		t.Errorf("the pod %s is gone", pod.Name)
	} else if !reflect.DeepEqual(now.Labels, pod.Labels) || !reflect.DeepEqual(now.Annotations, pod.Annotations) {
		t.Errorf("the pod %s has labels %v and annotations %v, had %v and %v", pod.Name, now.Labels, now.Annotations, pod.Labels, pod.Annotations)
	}
}

func TestIsolate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, isolateRule)

	t.Run("one pod of three", func(t *testing.T) {
		pods := w.Deployment(t, w.ns, "shop", w.node, 3)
		similar := w.createPolicy(t, "stoop-isolate", map[string]string{"app": "something-else"})
		sibling := w.createPolicy(t, policyName(pods[0])+"-2", map[string]string{"app": "something-else"})
		o := s.WaitOutcome(s.Send(program.Critical("Test critical", pods[1])), "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		w.wantIsolated(t, pods[1])
		for _, i := range []int{0, 2} {
			w.wantUntouched(t, pods[i])
			if got := w.selecting(t, pods[i]); len(got) > 0 {
				t.Errorf("the pod %s is selected by %v", pods[i].Name, got)
			}
		}
		for _, p := range []*networkingv1.NetworkPolicy{similar, sibling} {
			if now := w.policy(t, p.Name); now == nil || now.ResourceVersion != p.ResourceVersion {
				t.Errorf("the foreign network policy %s was touched", p.Name)
			}
		}
	})

	t.Run("a second alert finds it done", func(t *testing.T) {
		pod := w.pod(t, "twice")
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "isolate-pod", soon), broker.Done)
		before := w.policy(t, policyName(pod))
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "isolate-pod", soon), broker.Nothing)
		if now := w.policy(t, policyName(pod)); now == nil || now.ResourceVersion != before.ResourceVersion {
			t.Error("the second alert changed the network policy")
		}
	})

	t.Run("refuses when a foreign policy has the very name", func(t *testing.T) {
		pod := w.pod(t, "squatted")
		foreign := w.createPolicy(t, policyName(pod), map[string]string{"app": "something-else"})
		o := s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "isolate-pod", soon)
		wantStatus(t, o, broker.Refused)
		if now := w.policy(t, foreign.Name); now == nil || now.ResourceVersion != foreign.ResourceVersion {
			t.Error("the foreign network policy was touched")
		}
		w.wantUntouched(t, pod)
	})

	t.Run("names another policy that still allows traffic", func(t *testing.T) {
		pod := w.Pod(t, w.ns, "open", w.node, func(p *corev1.Pod) { p.Labels = map[string]string{"app": "open"} })
		other := w.createPolicy(t, kube.Name("allow-all"), map[string]string{"app": "open"})
		o := s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		if !strings.Contains(o.Reason, other.Name) {
			t.Errorf("the outcome does not name %s: %s", other.Name, o.Reason)
		}
	})

	t.Run("refuses the host's network", func(t *testing.T) {
		pod := w.Pod(t, w.ns, "on-host", w.node, func(p *corev1.Pod) { p.Spec.HostNetwork = true })
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "isolate-pod", soon), broker.Refused)
		w.wantUntouched(t, pod)
		if w.policy(t, policyName(pod)) != nil {
			t.Error("there is a network policy for it")
		}
	})
}

func TestUndo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, isolateRule)

	// takenBack waits until nothing of the isolation is left.
	takenBack := func(t *testing.T, pod *corev1.Pod, within time.Duration) {
		t.Helper()
		harness.Eventually(t, within, 10*time.Millisecond, func() (bool, string) {
			return w.policy(t, policyName(pod)) == nil, "the end of the network policy of " + pod.Name
		})
		w.wantUntouched(t, pod)
	}

	t.Run("by command", func(t *testing.T) {
		pod := w.pod(t, "undone")
		id := s.Send(program.Critical("Test critical", pod))
		o := s.WaitOutcome(id, "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		w.wantIsolated(t, pod)
		s.Run("undo", o.ID)
		takenBack(t, pod, soon)
		if o := s.WaitStatus(id, "isolate-pod", broker.Undone, soon); o.Actor == "" {
			t.Error("the outcome does not say who undid it")
		}
	})

	t.Run("a label, leaving the pod's own", func(t *testing.T) {
		pod := w.pod(t, "labelled")
		id := s.Send(program.Critical("Test label", pod))
		o := s.WaitOutcome(id, "label-pod", soon)
		wantStatus(t, o, broker.Done)
		if now := w.Get(t, w.ns, pod.Name); now.Labels["quarantine"] != "yes" || now.Labels["app"] != pod.Labels["app"] {
			t.Errorf("the labels are %v", now.Labels)
		}
		s.Run("undo", o.ID)
		s.WaitStatus(id, "label-pod", broker.Undone, soon)
		w.wantUntouched(t, pod)
	})

	t.Run("after a restart", func(t *testing.T) {
		pod := w.pod(t, "undone-later")
		id := s.Send(program.Critical("Test critical", pod))
		o := s.WaitOutcome(id, "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		s.Stop()
		s.Start()
		w.wantIsolated(t, pod)
		s.Run("undo", o.ID)
		s.WaitStatus(id, "isolate-pod", broker.Undone, soon)
		takenBack(t, pod, soon)
	})

	t.Run("an unknown id is said", func(t *testing.T) {
		_, stderr, code := s.Command("undo", strings.Repeat("0", 32))
		if code != 1 || !strings.Contains(stderr, strings.Repeat("0", 32)) {
			t.Errorf("exit %d: %s; want exit 1 and the id", code, stderr)
		}
	})

	t.Run("what a tenant wrote into the pod is not believed", func(t *testing.T) {
		pod := w.pod(t, "tampered")
		id := s.Send(program.Critical("Test critical", pod))
		o := s.WaitOutcome(id, "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		// The tenant takes the label off and points at another policy.
		foreign := w.createPolicy(t, kube.Name("foreign"), map[string]string{"app": "something-else"})
		now := w.Get(t, w.ns, pod.Name)
		now.Labels = map[string]string{"app": "e2e"}
		now.Annotations = map[string]string{"stoop.dev/policy": foreign.Name}
		if _, err := w.Client.CoreV1().Pods(w.ns).Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.Run("undo", o.ID)
		s.WaitStatus(id, "isolate-pod", broker.Undone, soon)
		if w.policy(t, policyName(pod)) != nil {
			t.Error("stoop's own network policy is still there")
		}
		if w.policy(t, foreign.Name) == nil {
			t.Error("the foreign network policy is gone")
		}
	})

	t.Run("by ttl", func(t *testing.T) {
		pod := w.pod(t, "short")
		began := time.Now()
		id := s.Send(program.Critical("Test short", pod))
		wantStatus(t, s.WaitOutcome(id, "isolate-pod", soon), broker.Done)
		takenBack(t, pod, soon)
		if held := time.Since(began); held < 1900*time.Millisecond {
			t.Errorf("it was taken back after %s, before its ttl of 2s", held)
		}
		if o := s.WaitStatus(id, "isolate-pod", broker.Undone, soon); o.Actor != "ttl" {
			t.Errorf("the outcome names %q as who undid it, want ttl", o.Actor)
		}
	})

	t.Run("by a ttl that falls due while stoop is down", func(t *testing.T) {
		pod := w.pod(t, "short-down")
		id := s.Send(program.Critical("Test short", pod))
		o := s.WaitOutcome(id, "isolate-pod", soon)
		wantStatus(t, o, broker.Done)
		s.Kill()
		harness.Eventually(t, soon, 50*time.Millisecond, func() (bool, string) {
			return time.Since(o.Time) > 2500*time.Millisecond, "the ttl to run out"
		})
		w.wantIsolated(t, pod)
		s.Start()
		s.WaitStatus(id, "isolate-pod", broker.Undone, soon)
		takenBack(t, pod, soon)
	})

	t.Run("each of them asked for once", func(t *testing.T) {
		seen := map[string]int{}
		for _, r := range w.requests(t) {
			var meta struct{ Metadata json.RawMessage }
			if err := json.Unmarshal(r.Body, &meta); err != nil && len(r.Body) > 0 {
				t.Fatal(err)
			}
			if r.Code < 300 {
				seen[r.Verb+" "+r.Resource+" "+r.Name+" "+string(meta.Metadata)]++
			}
		}
		for what, n := range seen {
			if n > 1 {
				t.Errorf("%d times: %s", n, what)
			}
		}
	})
}
