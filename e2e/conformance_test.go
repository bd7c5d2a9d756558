package e2e

import (
	"cmp"
	"net/http"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/e2e/kube"
	"stoop/responders"
	"stoop/responders/conformance"
)

// clusterWorld is the real API server as the conformance suite wants it: stoop has
// what stoop rbac prints for the case's step, and a token of its node.
type clusterWorld struct {
	*kube.Cluster
	account *printedAccount

	config *rest.Config
	token  atomic.Value // what stoop shows the API server
}

func (w *clusterWorld) Config() *rest.Config        { return w.config }
func (w *clusterWorld) Admin() kubernetes.Interface { return w.Client }

// On gives stoop the token that a pod of the node has.
func (w *clusterWorld) On(t testing.TB, node string) responders.Self {
	c := w.account.on(t, node)
	w.token.Store(c.BearerToken)
	w.config = rest.AnonymousClientConfig(c)
	w.config.QPS = c.QPS
	w.config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			r = r.Clone(r.Context())
			r.Header.Set("Authorization", "Bearer "+w.token.Load().(string))
			return next.RoundTrip(r)
		})
	})
	return responders.Self{Namespace: kube.AccountNamespace, User: "system:serviceaccount:" + kube.AccountNamespace + ":" + w.account.name}
}

// Forbid has stoop go on with an account that lacks one permission.
func (w *clusterWorld) Forbid(t testing.TB, verb, group, resource string) {
	lesser := w.Account(t, w.account.granted)
	w.Cluster.Forbid(t, lesser, verb, group, resource)
	w.token.Store(lesser.Config.BearerToken)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// The suite that every responder passes, against the real API server. Those
// that touch no cluster have nothing to gain from one.
func TestConformance(t *testing.T) {
	cases := map[string]conformance.Case{
		"delete-pod": {
			Params: func(testing.TB) (string, func() int) { return `{"force":true}`, nil }, // nothing owns the pod
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
		"isolate-pod": {
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := conformance.PodNow(t, w, pod)
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
				if now := conformance.PodNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
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
				if now := conformance.PodNow(t, w, pod); now == nil || now.Labels["quarantine"] != "yes" {
					t.Errorf("the pod is gone or has not the label: %+v", now)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Errorf("the pod is gone or its labels are not what they were: %+v", now)
				}
			},
		},
	}
	for _, c := range slices.Concat(
		conformance.Workloads(),
		nodeCases(),
		conformance.NodeActs("10s"),
		captureCases(t),
		conformance.Access(),
		denialCases(t),
	) {
		cases[cmp.Or(c.Name, c.Responder)] = c
	}
	every := "rules:\n"
	for _, entry := range responders.All() {
		switch entry.Object {
		case responders.PodObject, responders.NodeObject, responders.ResourceObject:
		default:
			continue
		}
		if withKubelet(entry.Name) {
			every += ruleOf(t, entry.Name, entry.Name, map[string]string{"exec-in-pod": `{"command":["id"]}`}[entry.Name])
			continue
		}
		found := false
		for name, c := range cases {
			if cmp.Or(c.Responder, name) != entry.Name {
				continue
			}
			found = true
			c.Responder = entry.Name
			c.Serial = entry.Object == responders.NodeObject // there is one Lease for all nodes
			var params string
			if c.Params != nil {
				params, _ = c.Params(t)
			}
			rule := ruleOf(t, name, entry.Name, params)
			every += rule
			var account *printedAccount
			c.World = func(testing.TB) conformance.World {
				return &clusterWorld{Cluster: shared.cluster, account: account}
			}
			c.Namespace = func(t testing.TB, _ conformance.World) string { return shared.cluster.Namespace(t, kube.Name("ns")) }
			t.Run(name, func(t *testing.T) {
				// An audit event has other stoops than a pod's alert.
				object := cmp.Or(c.Object, entry.Object)
				account = accountFor(t, "rules:\n"+rule, object == responders.ResourceObject)
				conformance.Run(t, c)
			})
		}
		if !found {
			t.Errorf("responder %s acts on the cluster and has no case here", entry.Name)
		}
	}
	t.Run("every responder in one file", func(t *testing.T) {
		accountFor(t, every, false)
		accountFor(t, every, true)
	})
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
