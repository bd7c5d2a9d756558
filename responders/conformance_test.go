package responders_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/responders"
	"stoop/responders/conformance"
)

func world(t testing.TB) conformance.World { return conformance.NewServer(t) }

// podNow is a pod as the API server has it; nil if it has another of the name
// or none.
func podNow(t testing.TB, w conformance.World, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	now, err := w.Admin().CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && now.UID != pod.UID {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// notified is a place that counts what is posted to it, and its address.
func notified(t testing.TB, each func(r *http.Request, body []byte)) (string, func() int) {
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("read what was posted: %v", err)
		}
		each(r, body)
		n.Add(1)
	}))
	t.Cleanup(s.Close)
	return s.URL, func() int { return int(n.Load()) }
}

// conformanceCases has one case for every responder; a test holds it to the
// registry.
func conformanceCases() []conformance.Case {
	return []conformance.Case{
		{
			Responder: "delete-pod",
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
		{
			Responder: "isolate-pod",
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := podNow(t, w, pod)
				if now.Labels["stoop.dev/isolated"] != string(pod.UID) {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
				p, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).Get(t.Context(), "stoop-isolate-"+string(pod.UID), metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
				if err != nil || p.Spec.PodSelector.MatchLabels["stoop.dev/isolated"] != string(pod.UID) || selector.Empty() {
					t.Errorf("the policy selects %v (%v)", p.Spec.PodSelector, err)
				}
				if len(p.Spec.PolicyTypes) != 2 || p.Spec.Ingress != nil || p.Spec.Egress != nil {
					t.Errorf("the policy lets something through: %+v", p.Spec)
				}
				if o := p.OwnerReferences; len(o) != 1 || o[0].UID != pod.UID || o[0].Kind != "Pod" || o[0].APIVersion != "v1" || o[0].BlockOwnerDeletion != nil {
					t.Errorf("the policy's owners are %+v", o)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); len(now.Labels) != 1 || now.Labels["app"] != "web" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
				list, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).List(t.Context(), metav1.ListOptions{})
				if err != nil || len(list.Items) != 0 {
					t.Errorf("policies are left: %v, error %v", list.Items, err)
				}
			},
		},
		{
			Responder: "label-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"labels":{"quarantine":"yes","app":""}}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); len(now.Labels) != 1 || now.Labels["quarantine"] != "yes" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); len(now.Labels) != 1 || now.Labels["app"] != "web" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
			},
		},
		{
			Responder: "slack",
			Params: func(t testing.TB) (string, func() int) {
				address, count := notified(t, func(_ *http.Request, body []byte) {
					var m struct{ Text string }
					if err := json.Unmarshal(body, &m); err != nil || strings.Contains(m.Text, "<!") || strings.Contains(m.Text, "https://") {
						t.Errorf("what was posted is %s (%v)", body, err)
					}
				})
				f := filepath.Join(t.TempDir(), "url")
				if err := os.WriteFile(f, []byte(address+"/services/T0/B0/secret\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				return fmt.Sprintf(`{"url":{"file":%q},"channel":"#security"}`, f), count
			},
		},
		{
			Responder: "webhook",
			Params: func(t testing.TB) (string, func() int) {
				address, count := notified(t, func(r *http.Request, body []byte) {
					var m struct{ ID, Rule string }
					if err := json.Unmarshal(body, &m); err != nil || m.ID == "" || m.ID != r.Header.Get("Idempotency-Key") || m.Rule != "conformance" {
						t.Errorf("what was posted is %s (%v)", body, err)
					}
				})
				return fmt.Sprintf(`{"url":%q}`, address), count
			},
		},
		{
			Responder: "file",
			Params: func(t testing.TB) (string, func() int) {
				path := filepath.Join(t.TempDir(), "alerts.jsonl")
				return fmt.Sprintf(`{"path":%q}`, path), func() int {
					b, err := os.ReadFile(path)
					if err != nil && !os.IsNotExist(err) {
						t.Error(err)
					}
					return strings.Count(string(b), "\n")
				}
			},
		},
	}
}

func TestConformance(t *testing.T) {
	for _, c := range conformanceCases() {
		c.World = world
		t.Run(c.Responder, func(t *testing.T) { conformance.Run(t, c) })
	}
}

func TestEveryResponderIsHeldToTheSuite(t *testing.T) {
	cases := conformanceCases()
	for _, e := range responders.All() {
		if !slices.ContainsFunc(cases, func(c conformance.Case) bool { return c.Responder == e.Name }) {
			t.Errorf("responder %s has no case in the conformance suite", e.Name)
		}
	}
}
