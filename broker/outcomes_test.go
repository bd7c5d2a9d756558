package broker_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

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
