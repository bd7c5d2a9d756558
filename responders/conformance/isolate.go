package conformance

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// denial is a responder that isolates by a policy that denies.
type denial struct {
	responder, label string
	path             string // of the policies; NS is the pod's namespace
	params           string
	spec             string // what is to be stored; NS and UID are the pod's
	owned            bool
}

var denials = []denial{
	{
		responder: "cilium-isolate", label: "stoop.dev/isolated-cilium", owned: true,
		path: "/apis/cilium.io/v2/namespaces/NS/ciliumnetworkpolicies",
		spec: `{"endpointSelector":{"matchLabels":{"stoop.dev/isolated-cilium":"UID"}},
			"ingressDeny":[{"fromEntities":["all"]}],"egressDeny":[{"toEntities":["all"]}]}`,
	},
	{
		responder: "calico-isolate", label: "stoop.dev/isolated-calico",
		path:   "/apis/projectcalico.org/v3/globalnetworkpolicies",
		params: `{"allowCIDRs":["10.1.0.0/16"],"allowDNS":true}`,
		spec: `{"tier":"default","order":0,"selector":"stoop.dev/isolated-calico == 'UID' && projectcalico.org/namespace == 'NS'","types":["Ingress","Egress"],
			"ingress":[{"action":"Allow","source":{"nets":["10.1.0.0/16"]}},{"action":"Deny"}],
			"egress":[
				{"action":"Allow","protocol":"UDP","destination":{"namespaceSelector":"projectcalico.org/name == 'kube-system'","selector":"k8s-app == 'kube-dns'","ports":[53]}},
				{"action":"Allow","protocol":"TCP","destination":{"namespaceSelector":"projectcalico.org/name == 'kube-system'","selector":"k8s-app == 'kube-dns'","ports":[53]}},
				{"action":"Allow","destination":{"nets":["10.1.0.0/16"]}},{"action":"Deny"}]}`,
	},
	{
		responder: "cluster-isolate", label: "stoop.dev/isolated-cluster",
		path:   "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
		params: `{"allowCIDRs":["10.1.0.0/16"],"allowDNS":true}`,
		spec: `{"tier":"Admin","priority":0,
			"subject":{"pods":{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"NS"}},"podSelector":{"matchLabels":{"stoop.dev/isolated-cluster":"UID"}}}},
			"ingress":[{"name":"stoop","action":"Deny","from":[{"namespaces":{}}]}],
			"egress":[
				{"name":"stoop-dns","action":"Pass","to":[{"pods":{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"kube-system"}},"podSelector":{"matchLabels":{"k8s-app":"kube-dns"}}}}],
					"protocols":[{"udp":{"destinationPort":{"number":53}}},{"tcp":{"destinationPort":{"number":53}}}]},
				{"name":"stoop-allow","action":"Pass","to":[{"networks":["10.1.0.0/16"]}]},
				{"name":"stoop","action":"Deny","to":[{"namespaces":{}},{"networks":["0.0.0.0/0","::/0"]}]}]}`,
	},
}

// Denials are the cases of the responders that isolate by a policy that denies. The
// world has to serve their kinds.
func Denials() []Case {
	var out []Case
	for _, d := range denials {
		c := Case{
			Responder: d.responder,
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				now, err := w.Admin().CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
				if err != nil || now.Labels[d.label] != string(pod.UID) {
					t.Errorf("the pod's labels are %v, error %v", now.Labels, err)
				}
				o := d.policy(t, w, pod)
				if o == nil {
					t.Fatal("there is no policy")
				}
				var want any
				if err := json.Unmarshal([]byte(strings.NewReplacer("NS", pod.Namespace, "UID", string(pod.UID)).Replace(d.spec)), &want); err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(o["spec"], want) {
					t.Errorf("the policy is\n%v, want\n%v", o["spec"], want)
				}
				owners, _ := meta(o)["ownerReferences"].([]any)
				if d.owned != (len(owners) == 1) {
					t.Errorf("the policy's owners are %v", owners)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				now, err := w.Admin().CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
				if err != nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Errorf("the pod's labels are %v, error %v", now.Labels, err)
				}
				if o := d.policy(t, w, pod); o != nil {
					t.Errorf("the policy is left: %v", o)
				}
			},
		}
		if d.params != "" {
			c.Params = func(testing.TB) (string, func() int) { return d.params, nil }
		}
		out = append(out, c)
	}
	return out
}

// policy is the one for a pod, or nil.
func (d denial) policy(t testing.TB, w World, pod *corev1.Pod) object {
	t.Helper()
	raw, err := w.Admin().CoreV1().RESTClient().Get().
		AbsPath(strings.ReplaceAll(d.path, "NS", pod.Namespace) + "/stoop-isolate-" + string(pod.UID)).Do(t.Context()).Raw()
	if apierrors.IsNotFound(err) {
		return nil
	}
	var o object
	if err == nil {
		err = json.Unmarshal(raw, &o)
	}
	if err != nil {
		t.Fatal(err)
	}
	return o
}
