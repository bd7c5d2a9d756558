package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"stoop/e2e/harness"
	"stoop/e2e/kube"
)

// finding is a line of stoop doctor -o json.
type finding struct{ Check, Status, Found, Do string }

// examined is what the real program finds, and its exit code.
func examined(t testing.TB, rc *rest.Config, rules string, args ...string) ([]finding, int) {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{"rules.yaml": rules, "kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: e2e, context: {cluster: e2e, user: user}}]
current-context: e2e
`, rc.Host, rc.CAFile, rc.BearerToken)}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), shared.bin, append([]string{
		"doctor", "-o", "json", "--rules", filepath.Join(dir, "rules.yaml"), "--kubeconfig", filepath.Join(dir, "kubeconfig"), "--data", dir,
	}, args...)...)
	cmd.Env = append(os.Environ(), "POD_NAMESPACE="+kube.AccountNamespace)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var all []finding
	for line := range bytes.Lines(out) {
		var f finding
		if err := json.Unmarshal(line, &f); err != nil {
			t.Fatalf("%v: %s\n%s", err, out, stderr.String())
		}
		all = append(all, f)
	}
	if len(all) == 0 {
		t.Fatalf("stoop doctor found nothing: %s", stderr.String())
	}
	return all, cmd.ProcessState.ExitCode()
}

func found(all []finding, check, status string, words ...string) bool {
	return slices.ContainsFunc(all, func(f finding) bool {
		return f.Check == check && f.Status == status && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(f.Found+" > "+f.Do, w) })
	})
}

// What the rules need and the account may not, the doctor tells one by one; with what
// stoop rbac prints nothing is missing.
func TestDoctorPermissions(t *testing.T) {
	c := shared.cluster
	shop, account, node := c.Namespace(t, kube.Name("shop")), c.ServiceAccount(t), c.Node(t)
	few := fmt.Sprintf(`
rules:
  - name: few
    match: {priority: critical, fields: {k8s.ns.name: [%s]}}
    actions: [label-pod: {labels: {a: b}}]
`, shop)
	many := few + fmt.Sprintf(`
  - name: many
    match: {priority: critical}
    actions: [evict-pod, cordon-node]
  - name: shop
    match: {priority: critical, fields: {k8s.ns.name: [%s]}}
    actions: [isolate-pod, delete-pod]
`, shop)
	c.Apply(t, account, printed(t, few, account))
	rc := c.OnNode(t, account, node)

	checks := []string{"api", "permissions", "network", "clock", "--node", node}
	all, code := examined(t, rc, few, checks...)
	if code != 0 || !found(all, "permissions", "ok", " permissions granted") || !found(all, "api", "ok", account, "on node "+node, "Kubernetes v1.") ||
		!found(all, "clock", "ok", "API server's") || !found(all, "network", "ok", "no rule isolates") {
		t.Errorf("exit code %d, found %+v", code, all)
	}

	all, code = examined(t, rc, many, checks...)
	grant := "--namespace " + kube.AccountNamespace + " --service-account " + account + " | kubectl apply -f -"
	for _, words := range [][]string{
		{"may not create pods/eviction in the cluster, for evict-pod", grant},
		{"nodes in the cluster, for cordon-node", grant},
		{"networkpolicies.networking.k8s.io in the cluster, for isolate-pod", grant},
		{"may not delete pods in namespace " + shop, "delete-pod", grant},
	} {
		if !found(all, "permissions", "missing", words...) {
			t.Errorf("nothing is missing with %q in %+v", words, all)
		}
	}
	// Other tests define what plugins define.
	network := found(all, "network", "unknown", "may not list DaemonSets", "try it") || found(all, "network", "ok", "as the cluster serves")
	if code != 1 || found(all, "permissions", "missing", "label-pod") || !network {
		t.Errorf("exit code %d, found %+v", code, all)
	}

	other := c.ServiceAccount(t)
	c.Apply(t, other, printed(t, many, other))
	rc = c.OnNode(t, other, node)
	harness.Eventually(t, soon, 100*time.Millisecond, func() (bool, string) {
		all, code = examined(t, rc, many, checks...)
		return code == 0, fmt.Sprintf("nothing to be missing: %+v", all)
	})
	if all, code = examined(t, rc, many, "api", "--node", "elsewhere"); code != 1 || !found(all, "api", "missing", node, "elsewhere") {
		t.Errorf("of another node: exit code %d, found %+v", code, all)
	}
}
