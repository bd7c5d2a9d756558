package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/responders/conformance"
)

// captureCases are those of what keeps what the API server tells of a pod.
func captureCases(t *testing.T) []conformance.Case {
	kubelet := playKubelet(t)
	return []conformance.Case{
		{
			Responder: "capture-logs",
			Prepare: func(t testing.TB, w conformance.World, pod *corev1.Pod) map[string]any {
				joinNode(t, w, pod.Spec.NodeName, kubelet)
				return nil
			},
		},
		{
			Responder: "capture-manifest",
			Prepare: func(t testing.TB, w conformance.World, pod *corev1.Pod) map[string]any {
				now := conformance.PodNow(t, w, pod)
				// One that was made for the pod, as an operator does.
				owner, err := w.Admin().AppsV1().Deployments(pod.Namespace).Create(t.Context(), &appsv1.Deployment{
					ObjectMeta: metav1.ObjectMeta{Name: "owner"},
					Spec: appsv1.DeploymentSpec{
						Replicas: new(int32(0)), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"of": "owner"}},
						Template: corev1.PodTemplateSpec{
							ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"of": "owner"}},
							Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}}},
						},
					},
				}, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				now.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: owner.Name, UID: owner.UID}}
				if _, err := w.Admin().CoreV1().Pods(pod.Namespace).Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				return nil
			},
		},
		{
			Responder: "capture-events",
			Prepare: func(t testing.TB, w conformance.World, pod *corev1.Pod) map[string]any {
				_, err := w.Admin().CoreV1().Events(pod.Namespace).Create(t.Context(), &corev1.Event{
					ObjectMeta:     metav1.ObjectMeta{Name: "tested"},
					InvolvedObject: corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
					Reason:         "Tested", Message: "by a test", Type: corev1.EventTypeNormal,
				}, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				return nil
			},
		},
	}
}

// playKubelet answers for the logs of all containers, as the API server asks a
// kubelet; the real one is asked by the command in ./node.
func playKubelet(t *testing.T) netip.AddrPort {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
		if len(p) != 4 || p[0] != "containerLogs" {
			http.NotFound(w, r)
			return
		}
		q := r.URL.Query()
		fmt.Fprintf(w, "2026-01-02T03:04:05.000000006Z %s of pod %s, the last %s lines\n", p[3], p[2], q.Get("tailLines"))
	}))
	t.Cleanup(s.Close)
	return netip.MustParseAddrPort(s.Listener.Addr().String())
}

// joinNode makes the node whose kubelet is at an address.
func joinNode(t testing.TB, w conformance.World, name string, kubelet netip.AddrPort) {
	t.Helper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	nodes := w.Admin().CoreV1().Nodes()
	if _, err := nodes.Create(t.Context(), node, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	for {
		node, err := nodes.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: kubelet.Addr().String()}}
		node.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(kubelet.Port())
		_, err = nodes.UpdateStatus(t.Context(), node, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) {
			continue // another part of the suite does the same
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
}
