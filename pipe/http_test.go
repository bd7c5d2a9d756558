package pipe

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stoop/broker"
)

// serve answers on a free port until the test ends, and returns its address.
func serve(t *testing.T, c HTTPConfig, in *Intake) string {
	t.Helper()
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
	}
	h, err := ListenHTTP(c)
	if err != nil {
		t.Fatal(err)
	}
	start(t, h, in)
	return h.Addr().String()
}

func post(t *testing.T, client *http.Client, url, body string, header ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

// sidekick is an alert as Falcosidekick sends it on.
const sidekick = `{"uuid":"8a1c7b1e-5b8e-4e0e-9c50-2f1f7a6d0001","output":"10:21:03.1: Critical x","priority":"Critical","rule":"from sidekick","time":"2025-10-09T08:53:20.123456789Z","source":"syscall","output_fields":{"container.id":"host"},"hostname":"node-a","tags":["a"],"custom":{"nested":[1,{"priority":"Debug"}]}}`

func TestHTTPBodies(t *testing.T) {
	a, b := strings.TrimSpace(line("a", "Notice")), strings.TrimSpace(line("b", "Notice"))
	tests := []struct {
		name, path, body string
		status           int
		says             string
		want             []string
	}{
		{"one, as Falco sends it", "/", a, 200, `"stored":1`, []string{"a"}},
		{"another path", "/falco", a, 200, `"stored":1`, []string{"a"}},
		{"lines", "/", a + "\n" + b + "\n", 200, `"stored":2`, []string{"a", "b"}},
		{"an array", "/", "[" + a + "," + b + "]", 200, `"stored":2`, []string{"a", "b"}},
		{"Falcosidekick", "/", sidekick, 200, `"stored":1`, []string{"from sidekick"}},
		{"empty", "/", " \n", 400, "the body is empty", nil},
		{"an empty array", "/", "[]", 400, "the body is empty", nil},
		{"text", "/", textLine, 400, "no alert", []string{"!"}},
		{"a string", "/", `"a"`, 400, "it is no JSON object", []string{"!"}},
		{"broken", "/", a[:100], 400, "alert 1: no alert", []string{"!"}},
		{"one of two is broken: none is taken", "/", a + "\n" + `{"rule":"x"}`, 400, `alert 2: no alert: the JSON object has no \"priority\"`, []string{"!"}},
		{"an array in an array", "/", "[[" + a + "]]", 400, "it is no JSON object", []string{"!"}},
		{"an array that does not end", "/", "[" + a, 400, "alert 2", []string{"!"}},
		{"something behind", "/", a + "]", 400, "alert 2", []string{"!"}},
		{"too large", "/", sized("a", "Notice", maxBody+1), 413, "send fewer alerts", nil},
		{"as large as allowed", "/", sized("a", "Notice", maxBody-1), 200, `"stored":1`, []string{"a"}},
		{"an unknown path", "/metrics", a, 404, "/falco", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			store := &shelf{}
			in, _ := intake(t, Options{Store: store})
			addr := serve(t, HTTPConfig{}, in)
			status, says := post(t, http.DefaultClient, "http://"+addr+test.path, test.body)
			if status != test.status || !strings.Contains(says, test.says) {
				t.Errorf("the answer is %d %s; want %d and %q", status, says, test.status, test.says)
			}
			if status == 200 { // then they are stored already
				equal(t, "alerts", store.rules(), test.want)
			}
			store.has(t, len(test.want))
			equal(t, "alerts", store.rules(), test.want)
			for _, a := range store.all() {
				if a.Origin != broker.OriginOpenHTTP {
					t.Errorf("its origin is %q", a.Origin)
				}
			}
		})
	}
}

func TestHTTPMethod(t *testing.T) {
	in, _ := intake(t, Options{Store: &shelf{}})
	resp, err := http.Get("http://" + serve(t, HTTPConfig{}, in) + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 || resp.Header.Get("Allow") != "POST" {
		t.Errorf("GET: %d, Allow %q", resp.StatusCode, resp.Header.Get("Allow"))
	}
}

func TestHTTPSlowStore(t *testing.T) {
	g := newGate()
	store := &shelf{before: g.pass}
	in, _ := intake(t, Options{Store: store})
	addr := serve(t, HTTPConfig{}, in)
	status, says := post(t, http.DefaultClient, "http://"+addr, line("a", "Notice"))
	if status != 503 || !strings.Contains(says, "not stored yet") {
		t.Errorf("%d %s", status, says)
	}
	close(g.open)
	store.has(t, 1)

	refused, _ := intake(t, Options{Store: &shelf{before: func(context.Context, []Arrival) (int, error) { return 0, ErrUnstorable }}})
	status, says = post(t, http.DefaultClient, "http://"+serve(t, HTTPConfig{}, refused), line("a", "Notice"))
	if status != 503 || !strings.Contains(says, "1 of 1 alerts could not be stored") {
		t.Errorf("%d %s", status, says)
	}
}

func TestHTTPToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "secret\n", os.O_CREATE)
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	addr := serve(t, HTTPConfig{TokenFile: file}, in)
	send := func(want int, header ...string) {
		t.Helper()
		if got, says := post(t, http.DefaultClient, "http://"+addr, line("a", "Notice"), header...); got != want {
			t.Errorf("%v: %d %s, want %d", header, got, says, want)
		}
	}
	send(401)
	send(401, "Authorization", "Bearer")
	send(401, "Authorization", "Bearer wrong")
	send(401, "Authorization", "secret")
	send(200, "Authorization", "Bearer secret")
	send(200, "Authorization", "bearer  secret")
	if got, says := post(t, http.DefaultClient, "http://falco:secret@"+addr, line("a", "Notice")); got != 200 {
		t.Errorf("as Falco sends it: %d %s", got, says)
	}
	for _, a := range store.all() {
		if a.Origin != broker.OriginHTTP {
			t.Errorf("its origin is %q", a.Origin)
		}
	}
	// A new token, by renaming as a Secret's volume does.
	write(t, file+".new", "another", os.O_CREATE)
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	send(401, "Authorization", "Bearer secret")
	send(200, "Authorization", "Bearer another")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	send(401, "Authorization", "Bearer another")
	if n := len(store.all()); n != 4 {
		t.Errorf("%d alerts are stored, want 4", n)
	}
}

func TestHTTPConfig(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	cert, key := ca.issue("server", dir)
	token, empty := filepath.Join(dir, "token"), filepath.Join(dir, "empty")
	write(t, token, "secret", os.O_CREATE)
	write(t, empty, "\n", os.O_CREATE)
	for _, test := range []struct {
		name string
		c    HTTPConfig
		want string // in the error; "": there is none
	}{
		{"open on this machine", HTTPConfig{Listen: "localhost:0"}, ""},
		{"open on IPv6", HTTPConfig{Listen: "[::1]:0"}, ""},
		{"open to all", HTTPConfig{Listen: "0.0.0.0:0"}, "everybody on the network could send alerts"},
		{"open to all, unnamed", HTTPConfig{Listen: ":0"}, "everybody on the network could send alerts"},
		{"open to all, with TLS alone", HTTPConfig{Listen: ":0", Cert: cert, Key: key}, "everybody on the network could send alerts"},
		{"a token in the clear", HTTPConfig{Listen: ":0", TokenFile: token}, "could be read on the network"},
		{"TLS and a token", HTTPConfig{Listen: ":0", TokenFile: token, Cert: cert, Key: key}, ""},
		{"mTLS", HTTPConfig{Listen: ":0", ClientCA: ca.file, Cert: cert, Key: key}, ""},
		{"a CA without TLS", HTTPConfig{Listen: "127.0.0.1:0", ClientCA: ca.file}, "client certificates need TLS"},
		{"a certificate without its key", HTTPConfig{Listen: "127.0.0.1:0", Cert: cert}, "needs its key"},
		{"the wrong key", HTTPConfig{Listen: "127.0.0.1:0", Cert: cert, Key: cert}, "server.crt"},
		{"no CA in the file", HTTPConfig{Listen: "127.0.0.1:0", ClientCA: token, Cert: cert, Key: key}, "holds no certificate"},
		{"no token file", HTTPConfig{Listen: "127.0.0.1:0", TokenFile: dir + "/nowhere"}, "nowhere: no such file"},
		{"an empty token file", HTTPConfig{Listen: "127.0.0.1:0", TokenFile: empty}, "is empty"},
		{"no port", HTTPConfig{Listen: "127.0.0.1"}, "such as 127.0.0.1:2801"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, err := ListenHTTP(test.c)
			if err == nil {
				h.Close()
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				if errors.Is(err, errors.ErrUnsupported) || err != nil && strings.Contains(err.Error(), "cannot assign requested address") {
					t.Skip("no IPv6 here")
				}
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestHTTPMutualTLS(t *testing.T) {
	dir := t.TempDir()
	ca, foreign := newAuthority(t, dir, "ca"), newAuthority(t, dir, "foreign")
	cert, key := ca.issue("server", dir)
	client := func(authority *authority) *http.Client {
		c := &tls.Config{RootCAs: x509.NewCertPool()}
		c.RootCAs.AddCert(ca.cert)
		if authority != nil {
			certFile, keyFile := authority.issue("client", t.TempDir())
			pair, err := tls.LoadX509KeyPair(certFile, keyFile)
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{pair}
		}
		transport := &http.Transport{TLSClientConfig: c}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport, Timeout: within}
	}
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	addr := serve(t, HTTPConfig{Cert: cert, Key: key, ClientCA: ca.file}, in)
	if status, says := post(t, client(ca), "https://"+addr, line("a", "Notice")); status != 200 {
		t.Errorf("with a certificate: %d %s", status, says)
	}
	if all := store.all(); len(all) != 1 || all[0].Origin != broker.OriginHTTP {
		t.Errorf("stored: %v", all)
	}
	for name, c := range map[string]*http.Client{"without a certificate": client(nil), "with a foreign one": client(foreign)} {
		if resp, err := c.Post("https://"+addr, "application/json", strings.NewReader(line("b", "Notice"))); err == nil {
			resp.Body.Close()
			t.Errorf("%s: %d", name, resp.StatusCode)
		}
	}

	// With a token as well, either will do.
	token := filepath.Join(dir, "token")
	write(t, token, "secret", os.O_CREATE)
	addr = serve(t, HTTPConfig{Cert: cert, Key: key, ClientCA: ca.file, TokenFile: token}, in)
	for _, test := range []struct {
		client *http.Client
		header []string
		want   int
	}{
		{client(ca), nil, 200},
		{client(nil), []string{"Authorization", "Bearer secret"}, 200},
		{client(nil), nil, 401},
	} {
		if status, says := post(t, test.client, "https://"+addr, line("c", "Notice"), test.header...); status != test.want {
			t.Errorf("%d %s, want %d", status, says, test.want)
		}
	}

	// The certificate is replaced while the server runs.
	ca.serial = 1000
	ca.issue("server", dir)
	conn, err := tls.Dial("tcp", addr, client(ca).Transport.(*http.Transport).TLSClientConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); n != 1001 {
		t.Errorf("the server shows the certificate %d", n)
	}
}

// Who opens a connection and says nothing holds up neither others nor the end.
func TestHTTPSilentClient(t *testing.T) {
	in, _ := intake(t, Options{Store: &shelf{}})
	h, err := ListenHTTP(HTTPConfig{Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	stop := start(t, h, in)
	for range 20 {
		conn, err := net.Dial("tcp", h.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
	}
	begun := time.Now()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

// authority issues certificates.
type authority struct {
	t      *testing.T
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	file   string
	serial int64
}

func newAuthority(t *testing.T, dir, name string) *authority {
	t.Helper()
	a := &authority{t: t, serial: 1}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(raw); err != nil {
		t.Fatal(err)
	}
	a.file = filepath.Join(dir, name+".crt")
	a.write(a.file, "CERTIFICATE", raw)
	return a
}

func (a *authority) issue(name, dir string) (cert, key string) {
	a.t.Helper()
	a.serial++
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, &own.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	a.write(cert, "CERTIFICATE", raw)
	a.write(key, "PRIVATE KEY", der)
	return cert, key
}

func (a *authority) write(path, kind string, der []byte) {
	a.t.Helper()
	text := string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	write(a.t, path+".new", text, os.O_CREATE)
	if err := os.Rename(path+".new", path); err != nil {
		a.t.Fatal(err)
	}
}
