package kube

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"stoop/e2e/harness"
)

// Helm is the helm program, built from its module as the chart's tests have it. Go
// keeps what it built; the first time takes minutes.
func Helm(ctx context.Context) (string, error) {
	root, err := goTool(ctx, "", "list", "-m", "-f", "{{.Dir}}", "stoop/e2e")
	if err != nil {
		return "", fmt.Errorf("this must run inside the module stoop/e2e: %w", err)
	}
	return goTool(ctx, filepath.Join(root, "..", "charts"), "tool", "-n", "helm")
}

// AdminKubeconfig writes a kubeconfig of the administrator's and returns its path.
func (c *Cluster) AdminKubeconfig(t harness.T) string {
	t.Helper()
	return c.kubeconfig(t, "admin.kubeconfig", c.tokens[adminUser])
}

// CA is the file with the authority of the API server's certificate.
func (c *Cluster) CA() string { return c.caFile() }

// Kubeconfig writes a kubeconfig and returns its path.
func (c *Cluster) Kubeconfig(t harness.T, config *rest.Config) string {
	t.Helper()
	return c.kubeconfig(t, Name("a")+".kubeconfig", config.BearerToken)
}

func (c *Cluster) kubeconfig(t harness.T, name, token string) string {
	t.Helper()
	path := c.path(name)
	if err := c.writeKubeconfig(path, token); err != nil {
		t.Fatalf("%v", err)
	}
	return path
}

// Validate has the API server look at an object as if it were applied: all its
// checks are made, nothing is kept.
func (c *Cluster) Validate(ctx context.Context, o *unstructured.Unstructured) error {
	body, err := o.MarshalJSON()
	if err != nil {
		return fmt.Errorf("validate %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	err = c.Client.CoreV1().RESTClient().Patch(types.ApplyPatchType).AbsPath(where(o)...).
		Param("fieldValidation", "Strict").Param("fieldManager", "e2e").Param("force", "true").Param("dryRun", "All").
		Body(body).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("validate %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	return nil
}

// There reports whether there is an object of that kind and name, and reads it.
func (c *Cluster) There(ctx context.Context, o *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	body, err := c.Client.CoreV1().RESTClient().Get().AbsPath(where(o)...).Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("get %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	var got unstructured.Unstructured
	return &got, got.UnmarshalJSON(body)
}

// Make makes an object, as kubectl create does.
func (c *Cluster) Make(t harness.T, o *unstructured.Unstructured) {
	t.Helper()
	if err := c.make(t.Context(), o); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("%v", err)
	}
}

func where(o *unstructured.Unstructured) []string {
	kind := strings.ToLower(o.GetKind())
	resource := kind + "s"
	if before, ok := strings.CutSuffix(kind, "y"); ok {
		resource = before + "ies"
	}
	path := []string{"/apis", o.GetAPIVersion()}
	if o.GetAPIVersion() == "v1" {
		path[0] = "/api"
	}
	if ns := o.GetNamespace(); ns != "" {
		path = append(path, "namespaces", ns)
	}
	return append(path, resource, o.GetName())
}
