package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// functions is a broker with two users that answer calls, and one that listens.
func functions(t *testing.T) (*broker.Broker, func(user string) *client) {
	cert, key := certificate(t)
	b := brokertest.Open(t, broker.Config{Mirror: []string{"FALCO"}, Listen: &broker.Listen{
		Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{
			{Name: "one", Password: "secret", Serve: []string{"functions.one", "more.>"}},
			{Name: "two", Password: "secret", Serve: []string{"functions.two"}},
			{Name: "siem", Password: "secret"},
		},
	}})
	return b, func(user string) *client {
		c := &client{t: t}
		nc, err := nats.Connect("tls://"+b.Addr().String(), nats.RootCAs(cert), nats.UserInfo(user, "secret"),
			nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
				if errors.Is(err, nats.ErrPermissionViolation) {
					c.denied.Add(1)
				}
			}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		c.Conn = nc
		return c
	}
}

// client counts what it was denied.
type client struct {
	*nats.Conn
	t      *testing.T
	denied atomic.Int64
}

func (c *client) serve(subject string, f nats.MsgHandler) {
	c.t.Helper()
	if _, err := c.Subscribe(subject, f); err != nil {
		c.t.Fatal(err)
	}
	c.flush()
}

func (c *client) flush() {
	c.t.Helper()
	if err := c.Flush(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) deniedInAll(n int64) {
	c.t.Helper()
	eventually(c.t, "it is denied", func() bool { return c.denied.Load() >= n })
	if got := c.denied.Load(); got != n {
		c.t.Errorf("denied %d times, want %d", got, n)
	}
}

func call(t *testing.T, b *broker.Broker, subject string, within time.Duration) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	answer, err := b.Call(ctx, subject, []byte("question"))
	return string(answer), err
}

func TestCall(t *testing.T) {
	b, connect := functions(t)
	began := time.Now()
	if _, err := call(t, b, "functions.one", 10*time.Second); !errors.Is(err, broker.ErrNobody) || time.Since(began) > 5*time.Second {
		t.Errorf("without a program that answers: %v after %s", err, time.Since(began))
	}
	one := connect("one")
	for _, subject := range []string{"functions.one", "more.of.it"} {
		one.serve(subject, func(m *nats.Msg) { _ = m.Respond([]byte("answer to " + string(m.Data))) })
		if answer, err := call(t, b, subject, 10*time.Second); err != nil || answer != "answer to question" {
			t.Errorf("%s: %q, %v", subject, answer, err)
		}
	}
	two := connect("two")
	two.serve("functions.two", func(m *nats.Msg) {
		_ = m.RespondMsg(&nats.Msg{Header: nats.Header{"Nats-Service-Error": {"no such user"}, "Nats-Service-Error-Code": {"404"}}})
	})
	_, err := call(t, b, "functions.two", 10*time.Second)
	if e := new(broker.ServiceError); !errors.As(err, &e) || e.Code != "404" || e.Message != "no such user" {
		t.Errorf("the error of a service: %v", err)
	}
}

// A program that answers calls tries all that it must not.
func TestAHostileFunction(t *testing.T) {
	b, connect := functions(t)
	one, two := connect("one"), connect("two")
	answers := make(chan *nats.Msg, 16)
	two.serve("functions.two", func(m *nats.Msg) { answers <- m })

	// It hears no calls of others, no alerts, and no outcomes.
	listening := []string{"functions.two", "functions.>", ">", "*.two", "falco.>", "stoop.outcomes.>", "stoop.tail", "FALCO", "_INBOX.>", "_CALL.>", "_STOOP.>", "$JS.>"}
	for _, s := range listening {
		if _, err := one.Subscribe(s, func(m *nats.Msg) { t.Errorf("it heard %s", m.Subject) }); err != nil {
			t.Fatal(err)
		}
	}
	one.flush()
	one.deniedInAll(int64(len(listening)))

	// It says nothing but answers.
	saying := []string{"falco.critical.forged", "FALCO", "stoop.actions.delete-pod.x", "stoop.outcomes.call", "stoop.api.pause", "$KV.STATE.pause", "$JS.API.INFO", "functions.one", "functions.two", "_INBOX.x", "_CALL.x"}
	for _, s := range saying {
		if err := one.Publish(s, []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	one.flush()
	one.deniedInAll(int64(len(listening) + len(saying)))

	// It does not answer what others were asked, even if it knew where.
	ended := make(chan error, 1)
	go func() {
		answer, err := call(t, b, "functions.two", 5*time.Second)
		if err == nil && answer != "mine" {
			err = errors.New("the answer is " + answer)
		}
		ended <- err
	}()
	asked := <-answers
	if err := one.Publish(asked.Reply, []byte("forged")); err != nil {
		t.Fatal(err)
	}
	one.flush()
	one.deniedInAll(int64(len(listening) + len(saying) + 1))
	// Twice is once too often.
	for range 3 {
		if err := two.Publish(asked.Reply, []byte("mine")); err != nil {
			t.Fatal(err)
		}
	}
	two.flush()
	two.deniedInAll(2)
	if err := <-ended; err != nil {
		t.Error(err)
	}

	// One that never answers costs the time that it was given, and the call after
	// it gets no answer of the one before.
	if _, err := call(t, b, "functions.two", 50*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without an answer: %v", err)
	}
	late := <-answers
	two.serve("functions.two", func(m *nats.Msg) {}) // a second one, which is silent as well
	go func() {
		answer, err := call(t, b, "functions.two", 300*time.Millisecond)
		if err == nil {
			err = errors.New("the answer is " + answer)
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
		ended <- err
	}()
	<-answers
	if err := late.Respond([]byte("late")); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the call after one that was answered late: %v", err)
	}
}

// A user that listens answers no calls, and hears none.
func TestAListenerAnswersNoCalls(t *testing.T) {
	b, connect := functions(t)
	siem, one := connect("siem"), connect("one")
	if _, err := siem.Subscribe("functions.one", func(*nats.Msg) { t.Error("it heard a call") }); err != nil {
		t.Fatal(err)
	}
	siem.flush()
	siem.deniedInAll(1)
	one.serve("functions.one", func(m *nats.Msg) {
		if err := siem.Publish(m.Reply, []byte("forged")); err != nil {
			t.Error(err)
		}
		_ = siem.Flush()
		_ = m.Respond([]byte("mine"))
	})
	if answer, err := call(t, b, "functions.one", 10*time.Second); err != nil || answer != "mine" {
		t.Errorf("%q, %v", answer, err)
	}
	siem.deniedInAll(2)
}

// A rule's call never gets to where it would be taken for something else.
func TestCallsReachNothingOfStoops(t *testing.T) {
	b, _ := functions(t)
	heard := make(chan string, 16)
	for _, s := range []string{"stoop.>", "falco.>", "$KV.>", "FALCO"} {
		if _, err := b.Conn().Subscribe(s, func(m *nats.Msg) { heard <- m.Subject }); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	for subject, want := range map[string]string{
		"falco.critical.forged": "are taken", "falco": "are taken", "stoop.actions.delete-pod.x": "are taken", "stoop.api.pause": "are taken",
		"$JS.API.INFO": "are taken", "$KV.STATE.pause": "are taken", "_INBOX.x": "are taken", "_CALL.x": "are taken",
		"FALCO": "broker.mirror", ">": "wildcard", "functions.*": "wildcard", "functions.>": "wildcard",
		"": "is no subject", "a b": "is no subject", "a..b": "is no subject", ".a": "is no subject", "a.": "is no subject",
		"a\r\nPUB stoop.api.pause 0": "is no subject", "a\x00b": "is no subject", "a\tb": "is no subject", strings.Repeat("a", 256): "is no subject",
	} {
		if _, err := call(t, b, subject, 5*time.Second); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", subject, err, want)
		}
	}
	if len(heard) > 0 {
		t.Errorf("something got to %s", <-heard)
	}
	if err := broker.CheckSubject("functions.block-user"); err != nil {
		t.Error(err)
	}
}

func TestServeOnSubjectsThatAreTaken(t *testing.T) {
	cert, key := certificate(t)
	for _, subject := range []string{"", ">", "*", "*.one", "falco.>", "stoop.>", "$KV.>", "_INBOX.>", "_CALL.>", "a b", "a queue", "FALCO"} {
		b, err := broker.Open(t.Context(), broker.Config{Mirror: []string{"FALCO"}, Listen: &broker.Listen{
			Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: "one", Password: "secret", Serve: []string{subject}}},
		}})
		if err == nil {
			b.Close()
			t.Errorf("may answer on %q", subject)
		} else if !strings.Contains(err.Error(), "broker.users: serve: ") {
			t.Errorf("%q: %v", subject, err)
		}
	}
}
