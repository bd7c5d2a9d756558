package broker_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
)

// BenchmarkPublishOutcome is an outcome stored and acknowledged: one at a time, and
// from 32 at once, as many as a responder has steps under way.
func BenchmarkPublishOutcome(b *testing.B) {
	o := broker.Outcome{
		ID: "5c1f5e7e1c3d8f0a9b2e", Time: time.Now().UTC(), Alert: "0f343b0931126a20f133d67c2b018a3b", Rule: "delete-pod-on-critical",
		Responder: "delete-pod", Status: broker.Done, Reason: "it is gone", Node: "worker-1", Rules: "1b2c3d4e5f60",
		Target: alert.Target{Namespace: "shop", Pod: "web-1", UID: "0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f", Container: "5d3f0c6e8a21", Node: "worker-1"},
		Took:   broker.Took{Stored: 210, Matched: 380, Requested: 900, Done: 7400},
	}
	for _, at := range []int{1, 16} {
		b.Run(fmt.Sprintf("at=%d", map[int]int{1: 1, 16: 32}[at]), func(b *testing.B) {
			store := brokertest.Open(b, broker.Config{Dir: b.TempDir()})
			var failed atomic.Int64
			say := func() {
				if err := store.PublishOutcome(o); err != nil {
					failed.Add(1)
				}
			}
			b.ResetTimer()
			if at == 1 {
				for range b.N {
					say()
				}
			} else {
				b.SetParallelism(at)
				b.RunParallel(func(p *testing.PB) {
					for p.Next() {
						say()
					}
				})
			}
			if failed.Load() > 0 {
				b.Errorf("%d were refused", failed.Load())
			}
		})
	}
}
