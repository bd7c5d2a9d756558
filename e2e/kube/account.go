package kube

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/e2e/harness"
)

// Account is a service account of the cluster.
type Account struct {
	User       string // as the audit log names it
	Kubeconfig string // the path of a file for --kubeconfig
	Config     *rest.Config
	Client     *kubernetes.Clientset
	name       string
	grants     []*rbacv1.ClusterRole
}

// AccountNamespace is where all accounts live.
const AccountNamespace = "stoop-system"

// Account makes a service account that may do what the rules say, in all
// namespaces, and nothing else.
func (c *Cluster) Account(t harness.T, rules []rbacv1.PolicyRule) *Account {
	t.Helper()
	a, err := c.account(t.Context(), t, rules)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return a
}

func (c *Cluster) account(ctx context.Context, t harness.T, rules []rbacv1.PolicyRule) (*Account, error) {
	name := Name("stoop")
	c.Namespace(t, AccountNamespace)
	meta := metav1.ObjectMeta{Name: name}
	if _, err := c.Client.CoreV1().ServiceAccounts(AccountNamespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{}); err != nil {
		return nil, fmt.Errorf("make the service account %s: %w", name, err)
	}
	seconds := int64(2 * time.Hour / time.Second)
	token, err := c.Client.CoreV1().ServiceAccounts(AccountNamespace).CreateToken(ctx, name,
		&authnv1.TokenRequest{Spec: authnv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("request a token for %s: %w", name, err)
	}
	a := &Account{
		name:       name,
		User:       "system:serviceaccount:" + AccountNamespace + ":" + name,
		Kubeconfig: filepath.Join(c.dir, name+".kubeconfig"),
	}
	if err := c.writeKubeconfig(a.Kubeconfig, token.Status.Token); err != nil {
		return nil, err
	}
	a.Config = &rest.Config{
		Host: c.URL(), BearerToken: token.Status.Token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.caFile()}, QPS: -1,
	}
	if a.Client, err = kubernetes.NewForConfig(a.Config); err != nil {
		return nil, fmt.Errorf("make a client: %w", err)
	}
	return a, c.grant(ctx, a, rules)
}

// Grant lets the account do what the rules say too.
func (c *Cluster) Grant(t harness.T, a *Account, rules []rbacv1.PolicyRule) {
	t.Helper()
	if err := c.grant(t.Context(), a, rules); err != nil {
		t.Fatalf("%v", err)
	}
}

func (c *Cluster) grant(ctx context.Context, a *Account, rules []rbacv1.PolicyRule) error {
	meta := metav1.ObjectMeta{Name: Name(a.name)}
	role, err := c.Client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make the cluster role %s: %w", meta.Name, err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: a.name, Namespace: AccountNamespace}},
	}
	if _, err := c.Client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("bind the cluster role %s: %w", meta.Name, err)
	}
	a.grants = append(a.grants, role)
	return c.waitAllowed(ctx, a.User, rules)
}

// Forbid takes one permission from the account, for the rest of its days.
func (c *Cluster) Forbid(t harness.T, a *Account, verb, group, resource string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for i, role := range a.grants {
		role := role.DeepCopy()
		role.Rules = without(role.Rules, verb, group, resource)
		role, err := c.Client.RbacV1().ClusterRoles().Update(ctx, role, metav1.UpdateOptions{})
		if err != nil {
			t.Fatalf("change the cluster role of %s: %v", a.User, err)
		}
		a.grants[i] = role
	}
	resource, sub, _ := strings.Cut(resource, "/")
	attributes := &authzv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Subresource: sub}
	if err := c.waitAccess(ctx, a.User, attributes, false); err != nil {
		t.Fatalf("%v", err)
	}
}

// without are the rules without one permission.
func without(rules []rbacv1.PolicyRule, verb, group, resource string) []rbacv1.PolicyRule {
	var out []rbacv1.PolicyRule
	for _, rule := range rules {
		for _, g := range rule.APIGroups {
			for _, r := range rule.Resources {
				verbs := slices.Clone(rule.Verbs)
				if g == group && r == resource {
					verbs = slices.DeleteFunc(verbs, func(v string) bool { return v == verb })
				}
				if len(verbs) > 0 {
					out = append(out, rbacv1.PolicyRule{APIGroups: []string{g}, Resources: []string{r}, Verbs: verbs, ResourceNames: rule.ResourceNames})
				}
			}
		}
	}
	return out
}

// waitAllowed waits until the API server's authorizer, which learns of roles
// by a watch, knows of every permission.
func (c *Cluster) waitAllowed(ctx context.Context, user string, rules []rbacv1.PolicyRule) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, rule := range rules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				resource, sub, _ := strings.Cut(resource, "/")
				for _, verb := range rule.Verbs {
					attributes := &authzv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Subresource: sub}
					if len(rule.ResourceNames) > 0 {
						attributes.Name = rule.ResourceNames[0]
					}
					if err := c.waitAccess(ctx, user, attributes, true); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

func (c *Cluster) waitAccess(ctx context.Context, user string, attributes *authzv1.ResourceAttributes, allowed bool) error {
	review := &authzv1.SubjectAccessReview{Spec: authzv1.SubjectAccessReviewSpec{
		User: user, Groups: []string{"system:serviceaccounts", "system:authenticated"}, ResourceAttributes: attributes,
	}}
	for {
		got, err := c.Client.AuthorizationV1().SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("ask whether %s may %s %s: %w", user, attributes.Verb, attributes.Resource, err)
		}
		if got.Status.Allowed == allowed {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s may %s %s: %t, want %t (%s)", user, attributes.Verb, attributes.Resource, got.Status.Allowed, allowed, got.Status.Reason)
		}
	}
}
