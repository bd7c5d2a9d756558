package responders

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
)

// Permission is one verb on one resource, as an API server decides on it.
type Permission struct {
	Namespace string // "": in all of them, or of what is in none
	Group     string
	Resource  string // with its subresource: "pods/eviction"
	Name      string // of the object; "": any
	Verb      string
	By        []string // what needs it: responders, or stoop itself
}

// All are the permissions one by one, those of stoop's own namespace in the one that
// is named.
func (p *Permissions) All(own string) []Permission {
	var out []Permission
	add := func(namespace string, g grants) {
		for k, by := range g {
			names := []string{""}
			if k.names != "" {
				names = strings.Fields(k.names)
			}
			for _, name := range names {
				out = append(out, Permission{namespace, k.group, k.resource, name, k.verb, slices.Sorted(maps.Keys(by))})
			}
		}
	}
	add("", p.cluster.without())
	for ns, g := range p.namespaces {
		add(ns, g.without(p.cluster))
	}
	add(own, p.own.without(p.cluster))
	slices.SortFunc(out, func(a, b Permission) int {
		return cmp.Or(
			cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Resource, b.Resource),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Verb, b.Verb),
		)
	})
	return out
}

var (
	accessReviews = schema.GroupVersionResource{Group: "authorization.k8s.io", Version: "v1", Resource: "selfsubjectaccessreviews"}
	selfReviews   = schema.GroupVersionResource{Group: "authentication.k8s.io", Version: "v1", Resource: "selfsubjectreviews"}
)

// May asks the API server whether stoop may do something. It changes nothing: the
// review is answered, and not stored.
func (k *Kube) May(ctx context.Context, p Permission) (bool, error) {
	resource, sub, _ := strings.Cut(p.Resource, "/")
	var answer struct {
		Status struct {
			Allowed         bool
			EvaluationError string
		}
	}
	err := k.review(ctx, accessReviews, "SelfSubjectAccessReview", map[string]any{"resourceAttributes": map[string]any{
		"namespace": p.Namespace, "group": p.Group, "resource": resource, "subresource": sub, "name": p.Name, "verb": p.Verb,
	}}, &answer)
	switch {
	case err != nil:
		return false, err
	case !answer.Status.Allowed && answer.Status.EvaluationError != "":
		return false, errors.New(answer.Status.EvaluationError)
	}
	return answer.Status.Allowed, nil
}

// Identity is what the API server knows stoop by.
type Identity struct {
	User string
	Node string // that the token is bound to, or ""
}

// Account is the service account that it is; ok is false where it is none.
func (i Identity) Account() (a Account, ok bool) {
	f := strings.Split(i.User, ":")
	if len(f) != 4 || f[0] != "system" || f[1] != "serviceaccount" {
		return Account{}, false
	}
	return Account{Namespace: f[2], Name: f[3]}, true
}

// WhoAmI asks the API server, from Kubernetes 1.28 on.
func (k *Kube) WhoAmI(ctx context.Context) (Identity, error) {
	var answer struct {
		Status struct {
			UserInfo struct {
				Username string
				Extra    map[string][]string
			}
		}
	}
	if err := k.review(ctx, selfReviews, "SelfSubjectReview", nil, &answer); err != nil {
		return Identity{}, err
	}
	who := Identity{User: answer.Status.UserInfo.Username}
	if nodes := answer.Status.UserInfo.Extra["authentication.kubernetes.io/node-name"]; len(nodes) > 0 {
		who.Node = nodes[0]
	}
	return who, nil
}

// review asks for what an API server answers without keeping it.
func (k *Kube) review(ctx context.Context, r schema.GroupVersionResource, kind string, spec map[string]any, into any) error {
	o := map[string]any{"apiVersion": r.GroupVersion().String(), "kind": kind, "metadata": map[string]any{}}
	if spec != nil {
		o["spec"] = spec
	}
	got, err := k.dynamic.Resource(r).Create(ctx, &unstructured.Unstructured{Object: o}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	data, err := json.Marshal(got.Object)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// ServerVersion is the API server's.
func (k *Kube) ServerVersion(ctx context.Context) (string, error) {
	data, err := k.core.Get().AbsPath("/version").SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var v version.Info
	if err := json.Unmarshal(data, &v); err != nil {
		return "", fmt.Errorf("the version is unreadable: %w", err)
	}
	return v.GitVersion, nil
}

// Groups are the names of the API groups that the cluster serves.
func (k *Kube) Groups(ctx context.Context) ([]string, error) {
	var list metav1.APIGroupList
	if err := k.core.Get().AbsPath("/apis").Do(ctx).Into(&list); err != nil {
		return nil, err
	}
	var names []string
	for _, g := range list.Groups {
		names = append(names, g.Name)
	}
	return names, nil
}
