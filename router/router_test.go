package router_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
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

// bench is a router at work, whose steps go to a consumer of the test's.
type bench struct {
	t      *testing.T
	broker *broker.Broker
	router *router.Router
	steps  chan *broker.Step
}

func start(t *testing.T, src string) *bench {
	t.Helper()
	b := &bench{t: t, broker: brokertest.New(t), steps: make(chan *broker.Step, 100)}
	b.router = router.New(slog.New(slog.NewTextHandler(t.Output(), nil)), prometheus.NewRegistry(), router.Trust{})
	b.rules(src)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	run := func(f func(context.Context) error) {
		running.Go(func() {
			if err := f(ctx); err != nil {
				t.Errorf("stopped with: %v", err)
			}
		})
	}
	run(func(ctx context.Context) error { return b.router.Run(ctx, b.broker) })
	for _, name := range []string{"one", "two"} {
		if err := b.broker.OpenSteps(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		run(func(ctx context.Context) error {
			return b.broker.ConsumeSteps(ctx, name, 1, func(_ context.Context, d *broker.Delivery) {
				b.steps <- d.Step
				if err := d.Ack(); err != nil {
					t.Error(err)
				}
			})
		})
	}
	return b
}

func (b *bench) rules(src string) {
	b.t.Helper()
	d := param.Describe(struct{}{})
	set, err := rules.Parse("test.yaml", []byte(src), rules.Catalog{"one": d, "two": d})
	if err != nil {
		b.t.Fatal(err)
	}
	b.router.SetRules(set)
}

func (b *bench) store(line string, origin broker.Origin) *alert.Alert {
	b.t.Helper()
	a, err := alert.Parse([]byte(line))
	if err != nil {
		b.t.Fatal(err)
	}
	received := time.Now().Add(-time.Second)
	if n, err := b.broker.Store(b.t.Context(), []broker.Arrival{{Alert: a, Received: received, Origin: origin}}); n != 1 {
		b.t.Fatal(err)
	}
	return a
}

func (b *bench) step() *broker.Step {
	b.t.Helper()
	select {
	case s := <-b.steps:
		return s
	case <-time.After(10 * time.Second):
		b.t.Fatal("no step within 10 s")
		return nil
	}
}

const twoRules = `
mode: enforce
rules:
  - name: chain
    match: {priority: critical}
    actions: [one, {two: null, onFailure: stop}]
  - name: other
    mode: audit
    match: {rule: "Shell*"}
    actions: [two]
`

func TestARoutingSlip(t *testing.T) {
	b := start(t, twoRules)
	a := b.store(`{"priority":"Critical","rule":"Shell in a pod","time":"2026-01-02T03:04:05Z","output_fields":{"k8s.pod.name":"web","evt.time":1795000000000000001}}`, broker.OriginHTTP)
	got := map[string]*broker.Step{}
	for range 2 {
		s := b.step()
		got[s.Rule] = s
	}
	chain, other := got["chain"], got["other"]
	if chain == nil || other == nil {
		t.Fatalf("steps of %v", got)
	}
	if chain.Responder != "one" || chain.Mode != broker.Enforce || len(chain.Remaining) != 1 || chain.Remaining[0].Responder != "two" || chain.Remaining[0].OnFailure != broker.Stop {
		t.Errorf("the chain begins with %+v", chain)
	}
	if other.Responder != "two" || other.Mode != broker.Audit || len(other.Remaining) != 0 {
		t.Errorf("the other rule's step is %+v", other)
	}
	if chain.AlertID != a.ID || chain.Target.Pod != "web" || chain.Origin != broker.OriginHTTP || chain.Rules != b.router.Rules().Hash {
		t.Errorf("the step is about %+v", chain)
	}
	if string(chain.Alert) != string(a.Raw) {
		t.Errorf("the alert became %s", chain.Alert)
	}
	if chain.ID == other.ID || chain.Took.Matched < chain.Took.Stored || chain.Took.Matched < 900_000 {
		t.Errorf("ids %s and %s, times %+v", chain.ID, other.ID, chain.Took)
	}
}

func TestPlainTextKeepsItsIDAndItsMark(t *testing.T) {
	b := start(t, "rules: [{name: r, match: {priority: critical}, actions: [one]}]")
	a := b.store("12:00:00.000000001: Critical a forged line", broker.OriginFIFO)
	s := b.step()
	again, err := alert.Parse(s.Alert)
	if err != nil {
		t.Fatal(err)
	}
	if s.AlertID != a.ID || !again.Text || again.Source != "" {
		t.Errorf("step for %s, text %t, source %q; want %s", s.AlertID, again.Text, again.Source, a.ID)
	}
}

func TestRulesAreSwapped(t *testing.T) {
	b := start(t, "rules: [{name: a, match: {priority: debug}, actions: [one]}]")
	b.store(`{"priority":"Debug","rule":"R"}`, broker.OriginFIFO)
	if s := b.step(); s.Rule != "a" {
		t.Errorf("rule %s", s.Rule)
	}
	b.rules("rules: [{name: b, match: {priority: debug}, actions: [two]}]")
	b.store(`{"priority":"Debug","rule":"S"}`, broker.OriginFIFO)
	if s := b.step(); s.Rule != "b" || s.Responder != "two" {
		t.Errorf("rule %s, responder %s", s.Rule, s.Responder)
	}
}

// While somebody watches, each alert is told with what follows or why nothing
// does; otherwise nothing is published.
func TestVerdicts(t *testing.T) {
	b := start(t, twoRules)
	sub, err := b.broker.Conn().SubscribeSync(router.SubjectTail)
	if err != nil {
		t.Fatal(err)
	}
	b.store(`{"priority":"Debug","rule":"unwatched"}`, broker.OriginFIFO)
	for end := time.Now().Add(10 * time.Second); b.router.Routed() < 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not routed within 10 s")
		}
	}
	b.router.Watch(time.Minute)
	for rule, want := range map[string]string{"Shell in a pod": `"matched":[{"rule":"other","mode":"audit","steps":["two"]}]`, "Nothing": `"why":"no rule matched`} {
		b.store(fmt.Sprintf(`{"priority":"Notice","rule":%q}`, rule), broker.OriginFIFO)
		m, err := sub.NextMsg(10 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		var v router.Verdict
		if err := json.Unmarshal(m.Data, &v); err != nil {
			t.Fatal(err)
		}
		if v.Rule != rule || !strings.Contains(string(m.Data), want) {
			t.Errorf("verdict %s, want %s", m.Data, want)
		}
	}
}

// A rule with a when makes a step of the alert that completes what it waits for, and
// until then says how far that is.
func TestARuleWaits(t *testing.T) {
	b := start(t, `
rules:
  - name: waits
    match: {rule: "Shell*"}
    when: {count: 3, within: 60s, by: pod}
    actions: [one, two]
  - name: does-not
    match: {rule: Shell in a pod}
    actions: [two]
`)
	sub, err := b.broker.Conn().SubscribeSync(router.SubjectTail)
	if err != nil {
		t.Fatal(err)
	}
	b.router.Watch(time.Minute)
	var ids []string
	for i, rule := range []string{"Shell in a pod", "Shell on the host", "Shells"} {
		priority := []string{"Critical", "Notice", "Critical"}[i] // of both lanes
		a := b.store(fmt.Sprintf(`{"priority":%q,"rule":%q,"time":%q,"output_fields":{"k8s.ns.name":"shop","k8s.pod.name":"web"}}`,
			priority, rule, time.Now().Format(time.RFC3339Nano)), broker.OriginFIFO)
		ids = append(ids, a.ID)
		m, err := sub.NextMsg(10 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{
			`"matched":[{"rule":"does-not","mode":"audit","steps":["two"]}],"waits":[{"rule":"waits","why":"1 of 3 within 1m on pod shop/web"}]}`,
			`"waits":[{"rule":"waits","why":"2 of 3 within 1m on pod shop/web"}]}`,
			`"matched":[{"rule":"waits","mode":"audit","steps":["one","two"]}]}`,
		}[i]
		if !strings.HasSuffix(string(m.Data), want) {
			t.Errorf("verdict %s, want %s", m.Data, want)
		}
	}
	steps := map[string]*broker.Step{} // of two responders, so in any order
	for range 2 {
		s := b.step()
		steps[s.Rule] = s
	}
	if s := steps["does-not"]; s == nil || len(s.Agreed) != 0 {
		t.Errorf("the step of the rule that waits for nothing: %+v", s)
	}
	s := steps["waits"]
	if s == nil || s.Responder != "one" || s.AlertID != ids[2] || !slices.Equal(s.Agreed, ids) {
		t.Fatalf("the step of the rule that waits is %+v, want that %v agreed", s, ids)
	}
	if n := s.Next(); !slices.Equal(n.Agreed, ids) || !slices.Equal(n.Outcome(broker.Done, "").Agreed, ids) {
		t.Error("the next step of the chain, or its outcome, does not say who agreed")
	}
}

// What was counted of alerts is stored before they are done with, also where nothing
// follows from them yet.
func TestWhatWasCountedIsStored(t *testing.T) {
	b := start(t, "rules: [{name: r, match: {priority: debug}, when: {count: 3, within: 60s, by: pod}, actions: [one]}]")
	for i := range 2 {
		b.store(fmt.Sprintf(`{"priority":"Debug","rule":"R","output":"%d","time":%q,"output_fields":{"k8s.ns.name":"shop","k8s.pod.name":"web"}}`, i, time.Now().Format(time.RFC3339Nano)), broker.OriginFIFO)
	}
	var at uint64
	for end := time.Now().Add(10 * time.Second); at < 2; time.Sleep(time.Millisecond) {
		if _, err := b.broker.State().Get(t.Context(), "router.ALERTS", &at); err != nil || time.Now().After(end) {
			t.Fatalf("position %d: %v", at, err)
		}
	}
	n := 0
	err := b.broker.State().Each(t.Context(), "when.>", func(_ string, value []byte, _ time.Time) error {
		n += strings.Count(string(value), `"at":`)
		return nil
	})
	if err != nil || n != 2 {
		t.Errorf("%d alerts are stored as counted, %v", n, err)
	}
}
