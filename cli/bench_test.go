package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/pipe"
	"stoop/responders"
	"stoop/router"
	"stoop/rules"
)

// BenchmarkWay is the way of an alert of 1 KiB from the FIFO onto the disk and
// through 20 rules, one of them with where. It ends when all are routed.
func BenchmarkWay(b *testing.B) { benchmarkWay(b, benchRules()) }

// BenchmarkWayMatched is the same where every alert matches a rule, which waits for
// others: so it is kept, and nothing else follows.
func BenchmarkWayMatched(b *testing.B) {
	benchmarkWay(b, append(benchRules(), `  - name: all
    match: {priority: debug}
    when: {rules: [A rule of no consequence, Another], within: 1s, by: pod}
    actions: [delete-pod]
`...))
}

func benchmarkWay(b *testing.B, src []byte) {
	dir := b.TempDir()
	store := brokertest.Open(b, broker.Config{Dir: filepath.Join(dir, "data")})
	log := slog.New(slog.DiscardHandler)
	r := router.New(log, prometheus.NewRegistry(), router.Trust{})
	set, err := rules.Parse("bench.yaml", src, catalogOf(responders.All()))
	if err != nil {
		b.Fatal(err)
	}
	r.SetRules(set)
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		if err := r.Run(ctx, store); err != nil {
			b.Error(err)
		}
	})
	sw := newStoreSwitch()
	sw.use(store)
	// The writer is faster than any Falco: what does not fit into the intake is
	// shed, and counted here as dealt with.
	var shed atomic.Int64
	in := pipe.NewIntake(pipe.Options{Store: sw, OnShed: func(_ alert.Priority, n int) { shed.Add(int64(n)) }})
	path := filepath.Join(dir, "falco.pipe")
	fifo, err := pipe.OpenFIFO(path)
	if err != nil {
		b.Fatal(err)
	}
	running.Go(func() {
		if err := fifo.Run(ctx, in); err != nil {
			b.Error(err)
		}
	})
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	const before = `{"hostname":"node-1","output_fields":{"container.id":"0123456789ab","container.name":"web","fd.name":"/etc/shadow","k8s.ns.name":"shop-eu","k8s.pod.name":"web-1","proc.cmdline":"sh -c something","proc.name":"sh","user.name":"root","evt.time":`
	after := fmt.Sprintf(`},"output":"%s","priority":"Debug","rule":"A rule of no consequence","source":"syscall","tags":["container","shell"],"time":"2026-01-02T03:04:05.000000006Z"}`+"\n", strings.Repeat("x", 600))
	b.SetBytes(int64(len(before) + 19 + len(after)))
	b.ResetTimer()
	var chunk []byte
	for n := range b.N {
		chunk = append(chunk, before...)
		chunk = strconv.AppendInt(chunk, int64(1795000000000000000+n), 10)
		if chunk = append(chunk, after...); len(chunk) > 64<<10 || n == b.N-1 {
			if _, err := w.Write(chunk); err != nil {
				b.Fatal(err)
			}
			chunk = chunk[:0]
		}
	}
	for end := time.Now().Add(30 * time.Second); ; {
		if time.Now().After(end) {
			b.Fatalf("%d of %d alerts are routed, and no end in sight", r.Routed(), b.N)
		}
		if waiting, _, _ := in.Backlog(); waiting == 0 && store.Unrouted() == 0 && r.Routed()+uint64(shed.Load()) >= uint64(b.N) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	b.ReportMetric(float64(r.Routed())/b.Elapsed().Seconds(), "alerts/s")
	b.ReportMetric(float64(shed.Load()), "shed")
	if lost := store.MatchedLost(); lost > 0 {
		b.ReportMetric(float64(lost), "unkept")
	}
}

// benchRules are 20 rules, one of them with where, none of which matches.
func benchRules() []byte {
	var b strings.Builder
	b.WriteString("rules:\n")
	for i := range 19 {
		fmt.Fprintf(&b, "  - name: rule-%d\n    match: {rule: 'Rule number %d', priority: warning, fields: {k8s.ns.name: 'ns-*'}}\n    actions: [delete-pod]\n", i, i)
	}
	b.WriteString("  - name: where\n    match: {priority: debug}\n    where: fields[\"k8s.ns.name\"].startsWith(\"bank-\")\n    actions: [delete-pod]\n")
	return []byte(b.String())
}
