package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/e2e/harness"
)

// ServiceAccount makes a service account that may do nothing.
func (c *Cluster) ServiceAccount(t harness.T) string {
	t.Helper()
	name := Name("stoop")
	c.Namespace(t, AccountNamespace)
	if _, err := c.Client.CoreV1().ServiceAccounts(AccountNamespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatalf("make the service account %s: %v", name, err)
	}
	return name
}

// Apply makes the objects that stoop rbac printed for a service account of
// [AccountNamespace], and waits until the API server's authorizer knows what they
// grant. It returns that.
func (c *Cluster) Apply(t harness.T, account string, printed []byte) []rbacv1.PolicyRule {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var granted []rbacv1.PolicyRule
	for docs := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(printed), 1<<20); ; {
		var o unstructured.Unstructured
		if err := docs.Decode(&o.Object); errors.Is(err, io.EOF) {
			return granted
		} else if err != nil {
			t.Fatalf("read what was printed: %v", err)
		}
		if err := c.make(ctx, &o); err != nil {
			t.Fatalf("%v", err)
		}
		if kind := o.GetKind(); kind != "Role" && kind != "ClusterRole" {
			continue
		}
		var role rbacv1.ClusterRole
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role); err != nil {
			t.Fatalf("read the role %s: %v", o.GetName(), err)
		}
		defer func() {
			if err := c.waitGranted(ctx, account, role.Namespace, role.Rules); err != nil {
				t.Fatalf("%v", err)
			}
		}()
		granted = append(granted, role.Rules...)
	}
}

// make posts an object to where objects of its kind are.
func (c *Cluster) make(ctx context.Context, o *unstructured.Unstructured) error {
	kind := strings.ToLower(o.GetKind())
	resource := map[bool]string{true: strings.TrimSuffix(kind, "y") + "ies", false: kind + "s"}[strings.HasSuffix(kind, "y")]
	path := "/apis/" + o.GetAPIVersion()
	if ns := o.GetNamespace(); ns != "" {
		path += "/namespaces/" + ns
	}
	body, err := o.MarshalJSON()
	if err != nil {
		return fmt.Errorf("make %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	// As kubectl asks: what the API server does not know is an error.
	err = c.Client.CoreV1().RESTClient().Post().AbsPath(path, resource).Param("fieldValidation", "Strict").
		SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("make %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	return nil
}

func (c *Cluster) waitGranted(ctx context.Context, account, namespace string, rules []rbacv1.PolicyRule) error {
	user := "system:serviceaccount:" + AccountNamespace + ":" + account
	for _, rule := range rules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				resource, sub, _ := strings.Cut(resource, "/")
				attributes := &authzv1.ResourceAttributes{Verb: rule.Verbs[0], Namespace: namespace, Group: group, Resource: resource, Subresource: sub}
				if len(rule.ResourceNames) > 0 {
					attributes.Name = rule.ResourceNames[0]
				}
				if err := c.waitAccess(ctx, user, attributes, true); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// OnNode is how the API server is reached with a token of the service account as
// the kubelet of a node has it: bound to a pod there, which a DaemonSet owns.
func (c *Cluster) OnNode(t harness.T, account, node string) *rest.Config {
	t.Helper()
	pod := c.Pod(t, AccountNamespace, Name(account), node, func(p *corev1.Pod) {
		p.Spec.ServiceAccountName = account
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "stoop", UID: NoUID, Controller: new(true)}}
	})
	return c.token(t, account, &authnv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID})
}

// Anywhere is the same with a token that is bound to nothing.
func (c *Cluster) Anywhere(t harness.T, account string) *rest.Config {
	t.Helper()
	return c.token(t, account, nil)
}

func (c *Cluster) token(t harness.T, account string, bound *authnv1.BoundObjectReference) *rest.Config {
	t.Helper()
	seconds := int64(2 * time.Hour / time.Second)
	token, err := c.Client.CoreV1().ServiceAccounts(AccountNamespace).CreateToken(t.Context(), account,
		&authnv1.TokenRequest{Spec: authnv1.TokenRequestSpec{ExpirationSeconds: &seconds, BoundObjectRef: bound}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("request a token for %s: %v", account, err)
	}
	return &rest.Config{Host: c.URL(), BearerToken: token.Status.Token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.caFile()}, QPS: -1}
}

// ClientOf is a client.
func ClientOf(t harness.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatalf("make a client: %v", err)
	}
	return client
}

// Allow gives a service account more, in the whole cluster.
func (c *Cluster) Allow(t harness.T, account string, rules []rbacv1.PolicyRule) {
	t.Helper()
	a := &Account{name: account, User: "system:serviceaccount:" + AccountNamespace + ":" + account}
	c.Grant(t, a, rules)
}
