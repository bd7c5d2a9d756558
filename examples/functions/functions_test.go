package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/responders"
)

// patience bounds every wait.
const patience = 20 * time.Second

// asked is what a function answers to a question about a user, as a step comes to
// it.
type asked func(t *testing.T, user any) (broker.Status, responders.Result)

// holds asks a function what each of the examples has to answer. list is its file.
func holds(t *testing.T, list string, ask asked) {
	t.Helper()
	for _, c := range []struct {
		user any
		want broker.Status
	}{
		{"mallory", broker.Done},
		{"mallory", broker.Nothing}, // the same question again
		{"eve_2", broker.Done},
		{nil, broker.Refused},
		{"", broker.Refused},
		{7, broker.Refused},
		{[]string{"mallory"}, broker.Refused},
		{"mallory\nroot", broker.Refused},
		{"$(touch pwned)", broker.Refused},
		{"'; touch pwned; '", broker.Refused},
		{"{{.Request}}", broker.Refused},
		{"-rf", broker.Refused},
		{"ma.*", broker.Refused},
		{strings.Repeat("m", 1000) + "é", broker.Refused},
	} {
		status, res := ask(t, c.user)
		if status != c.want {
			t.Errorf("user %q: %s (%s), want %s", c.user, status, res.Reason, c.want)
		}
		if found := res.Found["user"]; (c.want == broker.Done || c.want == broker.Nothing) && found != c.user {
			t.Errorf("user %q: found %v", c.user, res.Found)
		}
	}
	b, err := os.ReadFile(list)
	if err != nil || string(b) != "mallory\neve_2\n" {
		t.Errorf("the list is %q (%v)", b, err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(list), "pwned")); err == nil {
		t.Error("an alert's text was run as code")
	}
}

// question is a step with a user in its alert.
func request(t *testing.T, responder, params string, user any) *responders.Request {
	t.Helper()
	raw, err := json.Marshal(map[string]any{
		"priority": "Notice", "rule": "Terminal shell in container", "time": "2026-01-02T03:04:05Z", "output": "o",
		"output_fields": map[string]any{"user.name": user},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &responders.Request{Step: &broker.Step{
		ID: "0123456789abcdef0123", Alert: raw, Rule: "lock-out", Action: broker.Action{Responder: responder, Params: json.RawMessage(params)},
	}}
}

func act(t *testing.T, responder, params string, b *broker.Broker, user any) (broker.Status, responders.Result) {
	t.Helper()
	i := slices.IndexFunc(responders.All(), func(e responders.Entry) bool { return e.Name == responder })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	res, err := responders.All()[i].New(responders.Env{Node: "node-1", Caller: b}).Act(ctx, request(t, responder, params, user))
	switch {
	case err != nil && strings.HasPrefix(err.Error(), "the function refused: "):
		res.Reason = err.Error()
		return broker.Refused, res
	case err != nil:
		res.Reason = err.Error()
		return broker.Failed, res
	case res.Nothing:
		return broker.Nothing, res
	}
	return broker.Done, res
}

// called asks by the responder call.
func called(b *broker.Broker) asked {
	return func(t *testing.T, user any) (broker.Status, responders.Result) {
		return act(t, "call", `{"subject":"functions.block-user"}`, b, user)
	}
}

func TestGo(t *testing.T) {
	b, c := listener(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := serve(ctx, c, w)
		w.CloseWithError(err)
		ended <- err
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || line != "listening\n" {
		t.Fatalf("it says %q (%v)", line, err)
	}
	holds(t, c.List, called(b))
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("told to stop, it ended with %v", err)
	}
}

// Whoever is let answer on another subject only, is told.
func TestGoRefused(t *testing.T) {
	_, c := listener(t)
	c.Subject = "functions.other"
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := serve(ctx, c, io.Discard); err == nil || ctx.Err() != nil {
		t.Errorf("it ended with %v", err)
	}
}

func TestPython(t *testing.T) {
	python := program(t, "python3")
	t.Run("call", func(t *testing.T) {
		b, c := listener(t)
		start(t, nil, "listening", python, "block_user.py", "call",
			"--url", c.URL, "--ca", c.CA, "--user", c.User, "--password-file", secret(t, c.Password), "--list", c.List)
		holds(t, c.List, called(b))
	})
	t.Run("http", func(t *testing.T) {
		list, key := filepath.Join(t.TempDir(), "list"), secret(t, "the key")
		line := start(t, nil, "listening on ", python, "block_user.py", "http", "--listen", "127.0.0.1:0", "--key-file", key, "--list", list)
		url := strings.TrimPrefix(line, "listening on ")
		posted := func(key string) asked {
			return func(t *testing.T, user any) (broker.Status, responders.Result) {
				return act(t, "webhook-call", fmt.Sprintf(`{"url":%q,"signingKey":{"file":%q}}`, url, key), nil, user)
			}
		}
		holds(t, list, posted(key))
		if status, res := posted(secret(t, "another"))(t, "trent"); status != broker.Failed || !strings.Contains(res.Reason, "401") {
			t.Errorf("signed with another key: %s (%s)", status, res.Reason)
		}
		for _, header := range []string{"", "t=1,v1=00", "t=,v1=", "sha256=00", "t=99999999999999999999,v1=0", "t=²,v1=0"} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("{}"))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Stoop-Signature", header)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("with the signature %q: %s", header, resp.Status)
			}
		}
	})
}

func TestShell(t *testing.T) {
	program(t, "jq")
	script, err := filepath.Abs("block-user.sh")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("by itself", func(t *testing.T) {
		list := filepath.Join(t.TempDir(), "list")
		holds(t, list, func(t *testing.T, user any) (broker.Status, responders.Result) {
			body, err := json.Marshal(map[string]any{"alert": request(t, "call", "{}", user).Step.Alert})
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), script)
			cmd.Env = append(os.Environ(), "NATS_REQUEST_BODY="+string(body), "BLOCKED_USERS="+list)
			cmd.Dir = filepath.Dir(list)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v", err)
			}
			var a answer
			d := json.NewDecoder(bytes.NewReader(out))
			d.DisallowUnknownFields()
			if err := d.Decode(&a); err != nil {
				t.Errorf("user %q: the answer is %s (%v)", user, out, err)
			}
			return broker.Status(a.Status), responders.Result{Reason: a.Reason, Found: a.Found}
		})
	})
	t.Run("by nats", func(t *testing.T) {
		nats := program(t, "nats")
		b, c := listener(t)
		env := []string{
			"NATS_URL=" + c.URL, "NATS_CA=" + c.CA, "NATS_USER=" + c.User, "NATS_PASSWORD=" + c.Password, "BLOCKED_USERS=" + c.List,
			"XDG_CONFIG_HOME=" + t.TempDir(), "HOME=" + t.TempDir(),
		}
		start(t, env, "Listening on", nats, "reply", c.Subject, "--queue", "block-user", "--command", script)
		holds(t, c.List, called(b))
	})
}

// program is where a program is, or the test is skipped.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s, which is not on this machine: the example was not run", name)
	}
	return path
}

// start runs a program until the test ends, and returns the first line it writes
// that begins with, or holds, ready.
func start(t *testing.T, env []string, ready, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines, ended := make(chan string, 256), make(chan error, 1)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			select {
			case lines <- s.Text():
			default:
			}
		}
		close(lines)
		ended <- cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		if err := <-ended; err != nil && !as[*exec.ExitError](err) {
			t.Error(err)
		}
		if t.Failed() {
			for l := range lines {
				t.Log(l)
			}
		}
	})
	wait := time.After(patience)
	for {
		select {
		case l, ok := <-lines:
			if !ok {
				t.Fatalf("%s has ended before it said %q", name, ready)
			}
			if strings.Contains(l, ready) {
				return l
			}
			t.Log(l)
		case <-wait:
			t.Fatalf("%s does not say %q within %s", name, ready, patience)
		}
	}
}

func as[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

func secret(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(content+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// listener is a broker that lets one user answer calls, and how to reach it.
func listener(t *testing.T) (*broker.Broker, config) {
	t.Helper()
	cert, key := certificate(t)
	const user, password = "block-user", "correct horse"
	b := brokertest.Open(t, broker.Config{Listen: &broker.Listen{
		Addr: "127.0.0.1:0", Cert: cert, Key: key,
		Users: []broker.User{{Name: user, Password: password, Serve: []string{"functions.block-user"}}},
	}})
	return b, config{
		URL: "tls://" + b.Addr().String(), CA: cert, User: user, Password: password,
		Subject: "functions.block-user", List: filepath.Join(t.TempDir(), "list"),
	}
}

// certificate makes a certificate for 127.0.0.1, which is its own authority.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", private)
}
