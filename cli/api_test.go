package cli

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// Those who read the history, however slowly, are so many and no more: the next
// is told at once, others are answered meanwhile, and each reading has an end.
func TestManyReadersOfTheHistory(t *testing.T) {
	b := brokertest.New(t)
	desks := (&api{broker: b}).desks()
	begun, release, others := make(chan time.Duration, 100), make(chan struct{}), 0
	for i := range desks {
		for subject := range desks[i].answers {
			if subject == apiHistory {
				desks[i].answers[subject] = func(ctx context.Context, _ *nats.Msg, _ string) (any, error) {
					end, _ := ctx.Deadline() // none is long ago
					begun <- time.Until(end)
					<-release
					return nil, errors.New("that was all")
				}
				continue
			}
			others++
			desks[i].answers[subject] = func(_ context.Context, _ *nats.Msg, actor string) (any, error) { return actor, nil }
		}
	}
	stop, err := serveDesks(t.Context(), b, desks, func(*nats.Msg) string { return "somebody" })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	letGo := sync.OnceFunc(func() { close(release) })
	defer letGo()
	nc, err := b.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	slow := nats.NewInbox()
	ends, err := nc.SubscribeSync(slow)
	if err != nil {
		t.Fatal(err)
	}
	for range historyMost {
		if err := nc.PublishRequest(apiHistory, slow, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range historyMost {
		select {
		case left := <-begun:
			if left <= 0 || left > historyTimeout {
				t.Errorf("a reading may take %s", left)
			}
		case <-time.After(patience):
			t.Fatal("the history is not read")
		}
	}
	ask := func(subject string) *nats.Msg {
		t.Helper()
		inbox := nats.NewInbox()
		sub, err := nc.SubscribeSync(inbox)
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.PublishRequest(subject, inbox, nil); err != nil {
			t.Fatal(err)
		}
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatalf("%s: %v", subject, err)
		}
		return m
	}
	if m := ask(apiHistory); !strings.Contains(m.Header.Get(broker.HeaderError), "ask again") {
		t.Errorf("one reader more is told %q %q", m.Header, m.Data)
	}
	if len(begun) != 0 {
		t.Error("one reader more was let in")
	}
	for _, d := range desks {
		for subject := range d.answers {
			var actor string
			if subject == apiHistory || subject == apiVerify { // the verifying reads it too
				continue
			}
			if m := ask(subject); json.Unmarshal(m.Data, &actor) != nil || actor != "somebody" {
				t.Errorf("%s, while the history is being read: %q %q", subject, m.Header, m.Data)
			}
		}
	}
	letGo()
	for range historyMost {
		m, err := ends.NextMsg(patience)
		if err != nil || m.Header.Get(broker.HeaderError) != "that was all" {
			t.Fatalf("a reading that was let in: %v, %v", m, err)
		}
	}
	if others < 5 {
		t.Errorf("only %d other requests", others)
	}
}
