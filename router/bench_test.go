package router_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/param"
	"stoop/router"
	"stoop/rules"
)

// BenchmarkRoute is how many stored alerts a second are routed, with their steps
// stored: of a flood of alerts that all match.
func BenchmarkRoute(b *testing.B) {
	const alerts = 15_000
	for _, bench := range []struct {
		name, rule string
		pods       int
	}{
		{"none matches", "match: {priority: critical}", 1},
		{"each makes a step", "match: {priority: notice}", 1},
		{"count 3", "match: {priority: notice}, when: {count: 3, within: 60s, by: pod}", 1},
		{"count 3 of 200 pods", "match: {priority: notice}, when: {count: 3, within: 60s, by: pod}", 200},
		{"count 100 of 100 pods", "match: {priority: notice}, when: {count: 100, within: 60s, by: pod}", 100},
		{"never enough, 15000 pods", "match: {priority: notice}, when: {count: 3, within: 60s, by: pod}", 15_000},
	} {
		b.Run(bench.name, func(b *testing.B) {
			set, err := rules.Parse("test.yaml", []byte("rules: [{name: r, "+bench.rule+", actions: [one]}]"), rules.Catalog{"one": param.Describe(struct{}{})})
			if err != nil {
				b.Fatal(err)
			}
			var took time.Duration
			for range b.N {
				store := brokertest.Open(b, broker.Config{Dir: b.TempDir()})
				var batch []broker.Arrival
				for i := range alerts {
					a, err := alert.Parse(fmt.Appendf(nil, `{"rule":"R","priority":"Notice","output":"%d","time":%q,"output_fields":{%s}}`, i, time.Now().Format(time.RFC3339Nano), pod(fmt.Sprint("p", i%bench.pods))))
					if err != nil {
						b.Fatal(err)
					}
					batch = append(batch, broker.Arrival{Alert: a, Received: time.Now(), Origin: broker.OriginFIFO})
				}
				if _, err := store.Store(b.Context(), batch); err != nil {
					b.Fatal(err)
				}
				r := router.New(slog.New(slog.DiscardHandler), prometheus.NewRegistry(), router.Trust{})
				r.SetRules(set)
				ctx, cancel := context.WithCancel(b.Context())
				var running sync.WaitGroup
				begin := time.Now()
				running.Go(func() {
					if err := r.Run(ctx, store); err != nil {
						b.Error(err)
					}
				})
				for store.Unrouted() > 0 {
					time.Sleep(time.Millisecond)
				}
				took += time.Since(begin)
				cancel()
				running.Wait()
				store.Close()
			}
			b.ReportMetric(float64(alerts*b.N)/took.Seconds(), "alerts/s")
		})
	}
}
