package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/e2e/harness"
)

// Users of the cluster besides the service accounts. Both may do everything;
// they are two so that the audit log shows who did what.
const (
	adminUser   = "e2e-admin"
	kubeletUser = "e2e-kubelet"
)

const (
	readyWithin = 60 * time.Second
	stopWithin  = 2 * time.Second
)

// Cluster is a running API server with its etcd.
type Cluster struct {
	Client *kubernetes.Clientset // of the administrator, without a limit on its requests
	Ready  time.Duration         // how long the start took

	dir, bin        string
	etcdPort, port  int
	tokens          map[string]string // user → token
	etcd, apiserver *harness.Process
	kubelet         *kubelet // nil with real nodes
	audit, nodes    bool
}

// Start starts a cluster with an audit log. It ends with the test.
func Start(t harness.T) *Cluster {
	t.Helper()
	return start(t, true, false)
}

// StartWithoutAudit is [Start] without the audit log, for measurements.
func StartWithoutAudit(t harness.T) *Cluster {
	t.Helper()
	return start(t, false, false)
}

// StartForNodes is [StartWithoutAudit] for real nodes: nothing here ends a
// deleted pod in their stead.
func StartForNodes(t harness.T) *Cluster {
	t.Helper()
	return start(t, false, true)
}

func start(t harness.T, audit, nodes bool) *Cluster {
	t.Helper()
	bin, err := Binaries(t.Context(), t.Logf)
	if err != nil {
		t.Fatalf("%v", err)
	}
	began := time.Now()
	c := &Cluster{
		dir: t.TempDir(), bin: bin, audit: audit, nodes: nodes,
		tokens: map[string]string{adminUser: rand.Text(), kubeletUser: rand.Text()},
	}
	t.Cleanup(func() {
		if err := c.stop(); err != nil {
			t.Logf("%v", err)
		}
		if t.Failed() {
			t.Logf("the last lines of the API server's log:\n%s", tail(filepath.Join(c.dir, "apiserver.log"), 10))
		}
	})
	if err := c.writeFiles(); err != nil {
		t.Fatalf("%v", err)
	}
	if nodes {
		if err := c.writeKubeletClient(); err != nil {
			t.Fatalf("%v", err)
		}
	}
	if err := c.startEtcd(t); err != nil {
		t.Fatalf("%v", err)
	}
	c.port = harness.FreePort(t)
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatalf("%v", err)
	}
	if c.Client, err = kubernetes.NewForConfig(c.restConfig(adminUser)); err != nil {
		t.Fatalf("make the administrator's client: %v", err)
	}
	if !nodes {
		if c.kubelet, err = startKubelet(t.Context(), c.restConfig(kubeletUser)); err != nil {
			t.Fatalf("%v", err)
		}
	}
	c.Ready = time.Since(began)
	return c
}

func (c *Cluster) stop() error {
	var errs []error
	if c.kubelet != nil {
		c.kubelet.stop()
	}
	// The API server first: its shutdown hangs for minutes when etcd is gone.
	if c.apiserver != nil {
		errs = append(errs, c.StopAPIServer())
	}
	if c.etcd != nil {
		errs = append(errs, c.etcd.Stop(stopWithin))
	}
	return errors.Join(errs...)
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

// auditPolicy keeps every request that changes something, with its body: of a
// delete, only the body says which UID was meant.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Request
    verbs: [create, update, patch, delete, deletecollection]
    userGroups: ["system:serviceaccounts"]
  - level: Metadata
    verbs: [create, update, patch, delete, deletecollection]
    resources: [{group: "", resources: [pods]}]
  - level: None
`

func (c *Cluster) writeFiles() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the service accounts' key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(key) // the API server refuses PKCS #8
	if err != nil {
		return fmt.Errorf("encode the service accounts' key: %w", err)
	}
	var tokens strings.Builder
	for user, token := range c.tokens {
		fmt.Fprintf(&tokens, "%s,%s,%s,system:masters\n", token, user, user)
	}
	for name, content := range map[string]string{
		"sa.key":       string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
		"tokens.csv":   tokens.String(),
		"audit.yaml":   auditPolicy,
		"certs/.empty": "",
	} {
		path := c.path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("make the cluster's folder: %w", err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return fmt.Errorf("write the cluster's files: %w", err)
		}
	}
	return nil
}

func (c *Cluster) spawn(name, log string, args ...string) (*harness.Process, error) {
	f, err := os.OpenFile(c.path(log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", name, err)
	}
	defer f.Close()
	cmd := exec.Command(filepath.Join(c.bin, name), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.dir, f, f
	return harness.Spawn(cmd)
}

func (c *Cluster) startEtcd(t harness.T) error {
	client, peer := harness.FreePort(t), harness.FreePort(t)
	c.etcdPort = client
	clientURL, peerURL := "http://"+harness.Loopback(client), "http://"+harness.Loopback(peer)
	var err error
	c.etcd, err = c.spawn("etcd", "etcd.log",
		"--name=e2e", "--data-dir="+c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+clientURL, "--advertise-client-urls="+clientURL,
		"--listen-peer-urls="+peerURL, "--initial-advertise-peer-urls="+peerURL,
		"--initial-cluster=e2e="+peerURL)
	return err
}

// StartAPIServer starts the API server, for the first time or after
// [Cluster.StopAPIServer] with everything as it was, and waits until it is
// ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	args := []string{
		"--etcd-servers=http://" + harness.Loopback(c.etcdPort),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.port),
		"--endpoint-reconciler-type=none",
		"--service-cluster-ip-range=10.96.0.0/24",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + c.path("sa.key"), "--service-account-signing-key-file=" + c.path("sa.key"),
		"--authorization-mode=RBAC", "--token-auth-file=" + c.path("tokens.csv"),
		"--cert-dir=" + c.path("certs"),
		"--allow-privileged=true", // as clusters have it: the chart's Falco may be
	}
	if c.nodes {
		args = append(args, "--kubelet-preferred-address-types=InternalIP", // their names are nowhere to be asked for
			"--kubelet-client-certificate="+c.path("kubelet-client.crt"), "--kubelet-client-key="+c.path("kubelet-client.key"))
	}
	if c.audit {
		// Blocking, so that a request is in the log before its answer is out.
		args = append(args, "--audit-policy-file="+c.path("audit.yaml"),
			"--audit-log-path="+c.path("audit.log"), "--audit-log-mode=blocking")
	}
	var err error
	if c.apiserver, err = c.spawn("kube-apiserver", "apiserver.log", args...); err != nil {
		return err
	}
	return c.waitReady(ctx)
}

func (c *Cluster) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		if err := c.readyz(ctx); err == nil {
			return nil
		}
		select {
		case <-c.apiserver.Done():
			return fmt.Errorf("the API server ended before it was ready:\n%s", tail(c.path("apiserver.log"), 10))
		case <-c.etcd.Done():
			return fmt.Errorf("etcd ended:\n%s", tail(c.path("etcd.log"), 10))
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready after %s:\n%s", readyWithin, tail(c.path("apiserver.log"), 10))
		case <-time.After(25 * time.Millisecond):
		}
	}
}

func (c *Cluster) readyz(ctx context.Context) error {
	client, err := rest.HTTPClientFor(c.restConfig(adminUser)) // fails until the certificate is there
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL()+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", resp.Status)
	}
	return nil
}

// StopAPIServer takes the API server away; etcd keeps what it held.
func (c *Cluster) StopAPIServer() error {
	if err := c.apiserver.Stop(stopWithin); err != nil {
		return fmt.Errorf("stop the API server: %w", err)
	}
	return nil
}

// URL is the API server's.
func (c *Cluster) URL() string { return "https://" + harness.Loopback(c.port) }

func (c *Cluster) caFile() string { return c.path("certs/apiserver.crt") }

func (c *Cluster) restConfig(user string) *rest.Config {
	return &rest.Config{
		Host:            c.URL(),
		BearerToken:     c.tokens[user],
		TLSClientConfig: rest.TLSClientConfig{CAFile: c.caFile()},
		QPS:             -1,
	}
}

// NodeKubeconfig writes a kubeconfig for the kubelet of a real node and returns
// its path.
func (c *Cluster) NodeKubeconfig(t harness.T) string {
	t.Helper()
	path := c.path("node.kubeconfig")
	if err := c.writeKubeconfig(path, c.tokens[kubeletUser]); err != nil {
		t.Fatalf("%v", err)
	}
	return path
}

func (c *Cluster) writeKubeconfig(path, token string) error {
	kubeconfig := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: e2e, context: {cluster: e2e, user: user}}]
current-context: e2e
`, c.URL(), c.caFile(), token)
	if err := os.WriteFile(path, []byte(kubeconfig), 0o600); err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	return nil
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
