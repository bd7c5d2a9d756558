package responders

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

// Kube is the API server, as far as responders need it.
//
// It is made of client-go's generic client and the API groups that are used:
// the clientset links every group there is, which costs 10 MB of program file
// and 9 MB of memory on each node.
type Kube struct {
	core, networking rest.Interface
	params           runtime.ParameterCodec
	dynamic          dynamic.Interface
	config           *rest.Config
	served           served
	nodeTurn         nodeTurn
	turns            workloadTurns
}

// NewKube reaches the API server as configured. All its requests share one
// limit (QPS and Burst) and one pool of connections. Its own deadline is that
// of the context of each request.
func NewKube(c *rest.Config) (*Kube, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("client for the API server: %w", err)
		}
	}
	c = rest.CopyConfig(c)
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	if c.ContentType == "" { // smaller and faster; the API server speaks both
		c.ContentType = runtime.ContentTypeProtobuf
		c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	}
	c.WarningHandlerWithContext = rest.NoWarnings{}
	if c.QPS > 0 {
		c.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(c.QPS, max(c.Burst, 1))
	}
	http, err := rest.HTTPClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("client for the API server: %w", err)
	}
	k := &Kube{params: runtime.NewParameterCodec(scheme), config: c}
	if k.dynamic, err = dynamic.NewForConfigAndClient(c, http); err != nil {
		return nil, fmt.Errorf("client for the API server: %w", err)
	}
	for _, g := range []struct {
		gv     schema.GroupVersion
		path   string
		client *rest.Interface
	}{
		{corev1.SchemeGroupVersion, "/api", &k.core},
		{networkingv1.SchemeGroupVersion, "/apis", &k.networking},
	} {
		gc := rest.CopyConfig(c)
		gc.GroupVersion, gc.APIPath = &g.gv, g.path
		client, err := rest.RESTClientForConfigAndClient(gc, http)
		if err != nil {
			return nil, fmt.Errorf("client for the API server, %s: %w", g.gv, err)
		}
		*g.client = client
	}
	return k, nil
}

// Dynamic reaches objects of any kind, in JSON; [Kube.Resource] and [Kube.OfKind]
// say how a kind is served. It is for what is not done often: the typed clients
// below are faster.
func (k *Kube) Dynamic() dynamic.Interface { return k.dynamic }

// Nodes are the cluster's.
func (k *Kube) Nodes() *gentype.ClientWithList[*corev1.Node, *corev1.NodeList] {
	return gentype.NewClientWithList("nodes", k.core, k.params, "",
		func() *corev1.Node { return &corev1.Node{} }, func() *corev1.NodeList { return &corev1.NodeList{} })
}

// Pods are those of a namespace; "" is all of them.
func (k *Kube) Pods(namespace string) *gentype.ClientWithList[*corev1.Pod, *corev1.PodList] {
	return gentype.NewClientWithList("pods", k.core, k.params, namespace,
		func() *corev1.Pod { return &corev1.Pod{} }, func() *corev1.PodList { return &corev1.PodList{} })
}

// Claims are the PersistentVolumeClaims of a namespace.
func (k *Kube) Claims(namespace string) *gentype.Client[*corev1.PersistentVolumeClaim] {
	return gentype.NewClient("persistentvolumeclaims", k.core, k.params, namespace,
		func() *corev1.PersistentVolumeClaim { return &corev1.PersistentVolumeClaim{} })
}

// NetworkPolicies are those of a namespace.
func (k *Kube) NetworkPolicies(namespace string) *gentype.ClientWithList[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList] {
	return gentype.NewClientWithList("networkpolicies", k.networking, k.params, namespace,
		func() *networkingv1.NetworkPolicy { return &networkingv1.NetworkPolicy{} },
		func() *networkingv1.NetworkPolicyList { return &networkingv1.NetworkPolicyList{} })
}

// listPage is how many objects are asked for at once of what whoever may make them
// decides how many there are, and how large: all of them may be more than there is
// memory for.
const listPage = 50

// eachPolicy calls f with every NetworkPolicy of a namespace, a page at a time.
func (k *Kube) eachPolicy(ctx context.Context, namespace string, f func(*networkingv1.NetworkPolicy)) error {
	for options := (metav1.ListOptions{Limit: listPage}); ; {
		list, err := k.NetworkPolicies(namespace).List(ctx, options)
		if err != nil {
			return err
		}
		for i := range list.Items {
			f(&list.Items[i])
		}
		if options.Continue = list.Continue; options.Continue == "" {
			return nil
		}
	}
}

// eachObject calls f with every object of a kind in a namespace, a page at a time.
func (k *Kube) eachObject(ctx context.Context, r schema.GroupVersionResource, namespace string, f func(*unstructured.Unstructured)) error {
	for options := (metav1.ListOptions{Limit: listPage}); ; {
		list, err := k.Dynamic().Resource(r).Namespace(namespace).List(ctx, options)
		if err != nil {
			return err
		}
		for i := range list.Items {
			f(&list.Items[i])
		}
		if options.Continue = list.GetContinue(); options.Continue == "" {
			return nil
		}
	}
}
