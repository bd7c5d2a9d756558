package e2e

import (
	"cmp"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/e2e/kube"
	"stoop/responders"
	"stoop/responders/conformance"
)

// clusterWorld is the real API server as the conformance suite wants it.
type clusterWorld struct {
	*kube.Cluster
	account *kube.Account
}

func (w clusterWorld) Config() *rest.Config        { return w.account.Config }
func (w clusterWorld) Admin() kubernetes.Interface { return w.Client }
func (w clusterWorld) Forbid(t testing.TB, verb, group, resource string) {
	w.Cluster.Forbid(t, w.account, verb, group, resource)
}

// The suite that every responder passes, against the real API server. Those
// that touch no cluster have nothing to gain from one.
func TestConformance(t *testing.T) {
	cases := map[string]conformance.Case{
		"delete-pod": {
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
		"isolate-pod": {
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := podNow(t, w, pod)
				if now == nil || reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Fatalf("the pod is gone or has no label more: %+v", now)
				}
				for _, p := range policies(t, w, pod.Namespace) {
					selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
					if err == nil && !selector.Empty() && selector.Matches(labelSet(now)) && !selector.Matches(labelSet(pod)) {
						return
					}
				}
				t.Error("no network policy selects the pod, and it alone")
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Errorf("the pod is gone or its labels are not what they were: %+v", now)
				}
				if got := policies(t, w, pod.Namespace); len(got) > 0 {
					t.Errorf("there are network policies: %v", got)
				}
			},
		},
		"label-pod": {
			Params: func(testing.TB) (string, func() int) { return `{"labels":{"quarantine":"yes"}}`, nil },
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now == nil || now.Labels["quarantine"] != "yes" {
					t.Errorf("the pod is gone or has not the label: %+v", now)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Errorf("the pod is gone or its labels are not what they were: %+v", now)
				}
			},
		},
	}
	for _, c := range slices.Concat(
		conformance.Workloads(),
		nodeCases(),
		nodeActCases(),
		captureCases(t),
		rbacCases(),
	) {
		cases[cmp.Or(c.Name, c.Responder)] = c
	}
	for _, entry := range responders.All() {
		switch entry.Object {
		case responders.PodObject, responders.NodeObject, responders.ResourceObject:
		default:
			continue
		}
		if withKubelet(entry.Name) {
			continue
		}
		found := false
		for name, c := range cases {
			if cmp.Or(c.Responder, name) != entry.Name {
				continue
			}
			found = true
			c.Responder = entry.Name
			c.World = func(t testing.TB) conformance.World {
				return clusterWorld{shared.cluster, shared.cluster.Account(t, append(allRBAC(), grants(t, entry, c)...))}
			}
			c.Namespace = func(t testing.TB, _ conformance.World) string { return shared.cluster.Namespace(t, kube.Name("ns")) }
			t.Run(name, func(t *testing.T) { conformance.Run(t, c) })
		}
		if !found {
			t.Errorf("responder %s acts on the cluster and has no case here", entry.Name)
		}
	}
}

// podNow is the very pod as it is now, or nil.
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

func policies(t testing.TB, w conformance.World, namespace string) []networkingv1.NetworkPolicy {
	t.Helper()
	list, err := w.Admin().NetworkingV1().NetworkPolicies(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func labelSet(pod *corev1.Pod) labels.Set { return pod.Labels }
