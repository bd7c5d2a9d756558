package responders_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// fakeKubelet is a kubelet's end: TLS with a certificate of its own, and what it
// answers.
type fakeKubelet struct {
	*inPod
	ca    string // the file
	asked []string
}

// newFakeKubelet has a certificate for the names, signed by the CA in the file.
func newFakeKubelet(t *testing.T, dns []string, ips []net.IP, answer http.HandlerFunc) *fakeKubelet {
	t.Helper()
	k := &fakeKubelet{inPod: newInPod(t, nil), ca: filepath.Join(t.TempDir(), "ca.crt")}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kubelet"}, NotAfter: time.Now().Add(time.Hour), DNSNames: dns, IPAddresses: ips,
	}
	sign := func(c, by *x509.Certificate) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, by, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	if err := os.WriteFile(k.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: sign(ca, ca)}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		k.asked = append(k.asked, r.Method+" "+r.URL.String()+" "+r.Header.Get("Authorization"))
		k.mu.Unlock()
		answer(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{sign(leaf, ca)}, PrivateKey: key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	_, err = k.server.Admin().CoreV1().Nodes().Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1"},
		Status: corev1.NodeStatus{
			Addresses:       []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "n1"}, {Type: corev1.NodeInternalIP, Address: "127.0.0.1"}},
			DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: int32(s.Listener.Addr().(*net.TCPAddr).Port)}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *fakeKubelet) checkpoint(id, params string) (responders.Result, error) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), 20*time.Second)
	defer cancel()
	return k.responder("checkpoint-container").Act(ctx, k.request("checkpoint-container", id, params, nil))
}

func (k *fakeKubelet) requests() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

const archive = "/var/lib/kubelet/checkpoints/checkpoint-web-0_shop-main-2026-01-01T00:00:00Z.tar"

func archived(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"items":[%q]}`, archive) }

// The kubelet's certificate is good for the node's name, or for its address.
func TestCheckpointContainer(t *testing.T) {
	for name, c := range map[string]struct {
		dns []string
		ips []net.IP
	}{"the node's name": {dns: []string{"n1"}}, "its address": {ips: []net.IP{net.IPv4(127, 0, 0, 1)}}} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKubelet(t, c.dns, c.ips, archived)
			params := fmt.Sprintf(`{"ca":%q,"timeout":"90s"}`, k.ca)
			res, err := k.checkpoint("s1", params)
			if err != nil || res.Found["checkpoint"] != archive || !strings.Contains(res.Reason, "on node n1") {
				t.Fatalf("%+v, %v", res, err)
			}
			want := "POST /checkpoint/shop/web-0/main?timeout=90 Bearer stoop"
			if got := k.requests(); len(got) != 1 || got[0] != want {
				t.Errorf("the kubelet was asked %q, want %q", got, want)
			}
			if got := k.kept("s1", "checkpoint.json"); !strings.Contains(got, archive) || !strings.Contains(got, podContainer) {
				t.Errorf("kept: %s", got)
			}
			if _, err := k.checkpoint("s1", params); err != nil || len(k.requests()) != 1 {
				t.Errorf("a second run: %v, asked %q", err, k.requests())
			}
		})
	}
}

// stoop's token is shown to nobody but the node's kubelet.
func TestCheckpointContainerTrust(t *testing.T) {
	other := newFakeKubelet(t, []string{"n1"}, nil, archived)
	for name, c := range map[string]struct {
		dns []string
		ips []net.IP
		ca  string
	}{
		"the certificate of another node":   {dns: []string{"n2"}, ips: []net.IP{net.IPv4(127, 0, 0, 2)}},
		"a certificate signed by another":   {dns: []string{"n1"}, ca: other.ca},
		"a certificate that nobody vouches": {dns: []string{"n1"}, ca: "-"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKubelet(t, c.dns, c.ips, archived)
			params := fmt.Sprintf(`{"ca":%q}`, k.ca)
			switch c.ca {
			case "":
			case "-":
				params = `{}`
			default:
				params = fmt.Sprintf(`{"ca":%q}`, c.ca)
			}
			_, err := k.checkpoint("s1", params)
			failsFor(t, err, "certificate is not to be trusted")
			if got := k.requests(); len(got) > 0 {
				t.Errorf("it was asked: %q", got)
			}
		})
	}
}

func TestCheckpointContainerFails(t *testing.T) {
	for name, c := range map[string]struct {
		code  int
		body  string
		say   string
		retry bool
	}{
		"no criu":       {500, "checkpointing of shop/web-0/main failed (rpc error: code = Unimplemented desc = method CheckpointContainer not implemented)", "runtime can't: checkpointing of shop/web-0/main failed (rpc error: code = Unimplemented", false},
		"no permission": {403, "Forbidden (user=system:serviceaccount:stoop:stoop, verb=create, resource=nodes, subresource(s)=[checkpoint])", "nodes/checkpoint", false},
		"no token":      {401, "Unauthorized", "authentication.webhook", false},
		"no feature":    {404, "404: Page Not Found", "ContainerCheckpoint", false},
		"no archive":    {200, `{"items":[]}`, "names no archive", false},
		"no JSON":       {200, strings.Repeat("x", 1<<20), "names no archive", false},
		"too many":      {429, "", "status 429", true},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKubelet(t, []string{"n1"}, nil, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(c.code)
				_, _ = io.WriteString(w, c.body)
			})
			_, err := k.checkpoint("s1", fmt.Sprintf(`{"ca":%q}`, k.ca))
			status, retry, _, reason := responders.Classify(err)
			if status != broker.Failed || retry != c.retry || !strings.Contains(reason, c.say) || len(reason) > 2000 {
				t.Errorf("%v: status %s, retry %t; want %q, retry %t", err, status, retry, c.say, c.retry)
			}
			if _, err := k.store.Case("s1"); err == nil {
				t.Error("there is a case of what was not done")
			}
		})
	}
}

// A container that is not the alert's is not checkpointed, and one that was restarted
// meanwhile is told of.
func TestCheckpointContainerOfAnother(t *testing.T) {
	var k *fakeKubelet
	k = newFakeKubelet(t, []string{"n1"}, nil, func(w http.ResponseWriter, r *http.Request) {
		k.setContainer(strings.Repeat("f", 64))
		archived(w, r)
	})
	params := fmt.Sprintf(`{"ca":%q}`, k.ca)
	_, err := k.checkpoint("s1", params)
	failsFor(t, err, "container main was restarted meanwhile")
	_, err = k.checkpoint("s2", params)
	if status, _, _, _ := responders.Classify(err); status != broker.Nothing || len(k.requests()) != 1 {
		t.Errorf("of the replacement: %v, asked %q", err, k.requests())
	}
}

func TestCheckpointContainerGrants(t *testing.T) {
	for _, e := range responders.All() {
		if e.Name != "checkpoint-container" {
			continue
		}
		for params, want := range map[string]string{"": "nodes/checkpoint", `{"via":"kubelet"}`: "nodes/checkpoint", `{"via":"apiserver"}`: "nodes/proxy"} {
			got := fmt.Sprint(e.PermissionsFor([]byte(params)))
			if !strings.Contains(got, want) || strings.Contains(got, "nodes/proxy") != (want == "nodes/proxy") {
				t.Errorf("with %s it is granted %s, want %s", params, got, want)
			}
		}
		if strings.Contains(fmt.Sprint(e.RBAC), "proxy") {
			t.Errorf("nodes/proxy is among the permissions: %v", e.RBAC)
		}
	}
}
