package broker_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A responder that says much (a webhook that fails all the time) does not push out
// what the others did.
func TestANoisyResponderLeavesTheHistoryOfOthers(t *testing.T) {
	const size = 1 << 20
	b := brokertest.Open(t, broker.Config{Dir: t.TempDir(), OutcomesSize: size})
	say := func(responder string, n int) {
		t.Helper()
		o := broker.Outcome{ID: fmt.Sprint(n), Responder: responder, Status: broker.Failed, Reason: strings.Repeat("no ", 150)}
		if err := b.PublishOutcome(o); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 10 {
		say("delete-pod", n)
	}
	const many = 3000 // more than the stream holds by its size
	for n := range many {
		say("webhook", n)
	}
	kept := map[string]int{}
	last := ""
	if err := b.Outcomes(t.Context(), time.Time{}, func(o broker.Outcome) error {
		kept[o.Responder]++
		last = o.ID
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if kept["delete-pod"] != 10 || kept["webhook"] != size/2048 || last != fmt.Sprint(many-1) {
		t.Errorf("kept %v, the last of them %s", kept, last)
	}
}

// Who reads the history leaves nothing behind in the store, also where there was
// nothing to read: the store takes so many readers and no more.
func TestReadingTheHistoryLeavesNothingBehind(t *testing.T) {
	b := brokertest.New(t)
	js, err := jetstream.New(b.Conn())
	if err != nil {
		t.Fatal(err)
	}
	for outcomes := range 2 {
		if outcomes > 0 {
			if err := b.PublishOutcome(broker.Outcome{ID: "x", Responder: "file", Status: broker.Done}); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			if err := b.Outcomes(t.Context(), time.Time{}, func(broker.Outcome) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		s, err := js.Stream(t.Context(), broker.StreamOutcomes)
		if err != nil {
			t.Fatal(err)
		}
		if n := s.CachedInfo().State.Consumers; n != 0 {
			t.Errorf("with %d outcomes: %d readers are left", outcomes, n)
		}
	}
}
