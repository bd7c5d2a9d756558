package responders_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"

	"stoop/broker"
	"stoop/responders/conformance"
)

// callCases are those of what asks functions of the user's. A function that is
// asked again after a crash is told so, and does nothing.
func callCases() []conformance.Case {
	asked := func(t testing.TB, n *atomic.Int64, body []byte) {
		var q struct {
			ID, Rule string
			Alert    struct{ Rule string }
			Resumed  bool
		}
		if err := json.Unmarshal(body, &q); err != nil || q.ID == "" || q.Rule != "conformance" || q.Alert.Rule != "Conformance" {
			t.Errorf("what was asked is %s (%v)", body, err)
		}
		if !q.Resumed {
			n.Add(1)
		}
	}
	return []conformance.Case{
		{
			Responder: "call",
			Params: func(testing.TB) (string, func() int) {
				return `{"subject":"functions.conformance"}`, func() int { return 0 }
			},
			Serve: func(t testing.TB, b *broker.Broker) func() int {
				var n atomic.Int64
				nc, err := b.Connect("function")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(nc.Close)
				if _, err := nc.Subscribe("functions.conformance", func(m *nats.Msg) {
					asked(t, &n, m.Data)
					_ = m.Respond([]byte(`{"reason":"as asked","found":{"user":"mallory"}}`))
				}); err != nil {
					t.Fatal(err)
				}
				if err := nc.Flush(); err != nil {
					t.Fatal(err)
				}
				return func() int { return int(n.Load()) }
			},
		},
		{
			Responder: "webhook-call",
			Params: func(t testing.TB) (string, func() int) {
				var n atomic.Int64
				address, _ := notified(t, func(_ *http.Request, body []byte) { asked(t, &n, body) })
				return fmt.Sprintf(`{"url":%q}`, address), func() int { return int(n.Load()) }
			},
		},
	}
}
