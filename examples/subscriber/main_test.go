package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	stoopalert "stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
)

// patience bounds every wait.
const patience = 20 * time.Second

// The subscriber hears over TLS, with a user and a password, what a broker
// stores.
func TestSubscriber(t *testing.T) {
	b, c := listener(t)
	lines, end := start(t, c)
	next := func(want string) {
		t.Helper()
		select {
		case l, ok := <-lines:
			if !ok || !strings.Contains(l, want) {
				t.Fatalf("the subscriber says %q, want something with %q", l, want)
			}
		case <-time.After(patience):
			t.Fatalf("the subscriber does not say %q within %s", want, patience)
		}
	}
	next("listening")

	raw := []byte(`{"hostname":"node-1","output":"o","priority":"Critical","rule":"A \"shell\"","source":"syscall","time":"2026-01-02T03:04:05Z"}`)
	a, err := stoopalert.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	received := time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC)
	store := func(arrival broker.Arrival) {
		t.Helper()
		if _, err := b.Store(t.Context(), []broker.Arrival{arrival}); err != nil {
			t.Fatal(err)
		}
	}
	store(broker.Arrival{Alert: a, Received: received, Origin: broker.OriginFIFO})
	next("alert " + a.ID + ` 2026-01-02T03:04:06Z Critical "A \"shell\"" on "node-1"`)

	store(broker.Arrival{Unparsed: []byte("\x1b[2J no alert"), Received: received, Origin: broker.OriginFIFO})
	next(`no alert: "\x1b[2J no alert"`)

	err = b.PublishOutcome(broker.Outcome{
		ID: "0123456789abcdef0123", Time: received, Responder: "delete-pod", Status: broker.Done, Reason: "because",
		Target: stoopalert.Target{Namespace: "shop", Pod: "web"},
	})
	if err != nil {
		t.Fatal(err)
	}
	next(`outcome 0123456789abcdef0123 delete-pod: done shop/web "because"`)

	if err := end(); err != nil {
		t.Errorf("told to stop, it ended with %v", err)
	}
}

// Whoever has the wrong password, or no reason to trust the server, is told.
func TestSubscriberRefused(t *testing.T) {
	_, c := listener(t)
	for name, wrong := range map[string]config{
		"password": {URL: c.URL, CA: c.CA, User: c.User, Password: "guess"},
		"user":     {URL: c.URL, CA: c.CA},
		"ca":       {URL: c.URL, User: c.User, Password: c.Password},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		err := follow(ctx, wrong, io.Discard)
		if err == nil || ctx.Err() != nil {
			t.Errorf("wrong %s: it ended with %v", name, err)
		}
		cancel()
	}
}

// listener is a broker that lets one user in, and how to reach it.
func listener(t *testing.T) (*broker.Broker, config) {
	cert, key := certificate(t)
	const user, password = "siem", "correct horse"
	b := brokertest.Open(t, broker.Config{Listen: &broker.Listen{
		Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: user, Password: password}},
	}})
	return b, config{"tls://" + b.Addr().String(), cert, user, password}
}

// start runs the subscriber and returns its lines, and how to end it.
func start(t *testing.T, c config) (<-chan string, func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := follow(ctx, c, w)
		w.CloseWithError(err)
		done <- err
	}()
	lines := make(chan string, 16)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}()
	end := func() error { cancel(); return <-done }
	t.Cleanup(func() { cancel(); r.Close() })
	return lines, end
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
	secret, err := x509.MarshalPKCS8PrivateKey(k)
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
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", secret)
}
