package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/responders"
	"stoop/rules"
)

func TestDays(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"30d": 720 * time.Hour, "12h": 12 * time.Hour, "1d": 24 * time.Hour, "90m": 90 * time.Minute,
		"": 0, "d": 0, "-1d": 0, "0d": 0, "1.5d": 0, "-1h": 0, "soon": 0, "99999999d": 0,
	} {
		d, err := days(text)
		if d != want || (err == nil) != (want > 0) {
			t.Errorf("%q is %s, %v", text, d, err)
		}
	}
}

func TestBarText(t *testing.T) {
	for _, c := range []struct {
		done int
		left uint64
		want string
	}{
		{50_000, 50_000, "[############............]  50 %, 50000 alerts, 25000 a second"},
		{100, 0, "100 alerts, 50 a second"},
		{1, 1_000_000, "[........................]   0 %, 1 alerts, 0 a second"},
	} {
		if got := barText(c.done, c.left, 2*time.Second); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	var none strings.Builder
	p := newProgress(&none)
	p.next = time.Time{}
	p.say(barLook, 10)
	if p.end(); none.Len() > 0 {
		t.Errorf("no terminal, and it says %q", none.String())
	}
}

// fillKept stores n alerts that matched a rule.
func fillKept(t testing.TB, b *broker.Broker, n int) {
	t.Helper()
	fields := `"output_fields":{"container.id":"0123456789ab","container.name":"web","fd.name":"/etc/shadow","k8s.ns.name":"ns-%d","k8s.pod.name":"web-%d","proc.cmdline":"sh -c something","proc.name":"sh","user.name":"root","evt.time":%d}`
	for i := range n {
		at := time.Now().Add(-time.Hour).Add(time.Duration(i) * time.Millisecond)
		line := fmt.Sprintf(`{"hostname":"node-1",`+fields+`,"output":"%s","priority":"Warning","rule":"Rule number %d","source":"syscall","time":%q}`,
			i%7, i%50, i, strings.Repeat("x", 600), i%50, at.UTC().Format(time.RFC3339Nano))
		a, err := alert.Parse([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		m := &nats.Msg{Subject: "stoop.matched." + strings.TrimPrefix(a.Subject(), "falco."), Data: a.Raw, Header: nats.Header{
			broker.HeaderID: {a.ID}, broker.HeaderReceived: {strconv.FormatInt(at.UnixNano(), 10)}, broker.HeaderOrigin: {string(broker.OriginFIFO)},
		}}
		if err := b.Conn().PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		p, err := b.Kept(t.Context(), broker.StreamMatched, 1, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Alerts)+int(p.Left) == n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d are stored", len(p.Alerts)+int(p.Left), n)
		}
	}
}

// BenchmarkBacktest tries 20 rules on alerts of 1 KiB, most of which match one, as they
// are read from the store.
func BenchmarkBacktest(b *testing.B) {
	const alerts = 50_000
	dir := b.TempDir()
	store := brokertest.Open(b, broker.Config{Dir: dir})
	fillKept(b, store, alerts)
	entries := responders.All()
	set, err := rules.Parse("bench.yaml", benchRules(), catalogOf(entries))
	if err != nil {
		b.Fatal(err)
	}
	c := defaults()
	p := &program{stderr: b.Output()}
	n := 0
	for b.Loop() {
		r := p.newReplay(set, nil, entries, c.guards("", responders.Self{}, nil))
		if err := r.kept(context.Background(), &keptAlerts{page: store.Kept}, time.Time{}); err != nil {
			b.Fatal(err)
		}
		if n += r.out.Alerts; r.tests[0].matched == 0 {
			b.Fatal("none matched")
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "alerts/s")
}

// A chain goes as the host would have it go, and a rule that waits for several alerts
// waits.
func TestBacktestOfChains(t *testing.T) {
	entries := responders.All()
	set, err := rules.Parse("rules.yaml", []byte(`
mode: enforce
rules:
  - name: stops
    match: {rule: Shell}
    actions:
      - delete-pod: {}
        onFailure: stop
      - file: {path: /nowhere/a}
  - name: goes-on
    match: {rule: Shell}
    actions:
      - delete-pod
      - file: {path: /nowhere/a}
  - name: asks
    match: {rule: Shell}
    actions:
      - drain-node
      - file: {path: /nowhere/a}
  - name: waits
    match: {rule: Shell}
    when: {count: 3, within: 60s, by: pod}
    actions:
      - file: {path: /nowhere/a}
`), catalogOf(entries))
	if err != nil {
		t.Fatal(err)
	}
	c := defaults()
	r := (&program{stderr: t.Output()}).newReplay(set, nil, entries, c.guards("", responders.Self{}, nil))
	at := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	for i, pod := range []string{"kube-system/dns", "shop/web", "shop/web", "shop/web"} {
		ns, name, _ := strings.Cut(pod, "/")
		now := at.Add(time.Duration(i) * time.Second)
		a, err := alert.Parse(fmt.Appendf(nil, `{"output":"%d","output_fields":{"container.id":"0123456789ab","k8s.ns.name":%q,"k8s.pod.name":%q},"priority":"Critical","rule":"Shell","source":"syscall","time":%q}`,
			i, ns, name, now.Format(time.RFC3339)))
		if err != nil {
			t.Fatal(err)
		}
		r.alert(a, broker.OriginFIFO, now)
	}
	got := map[string]string{}
	for _, s := range r.tests[0].result() {
		got[s.Rule+" "+s.Responder] = s.text() + fmt.Sprint(s.HeldBy)
	}
	for step, want := range map[string]string{
		"stops delete-pod":   "1, 3 heldmap[cooldown:2 protected:1]",
		"stops file":         "1, 3 heldmap[onFailure:3]",
		"goes-on delete-pod": "1, 3 heldmap[cooldown:2 protected:1]",
		"goes-on file":       "4map[]",
		"asks drain-node":    "3 asked, 1 heldmap[protected:1]",
		"asks file":          "1, 3 askedmap[]",
		"waits file":         "1map[]",
	} {
		if got[step] != want {
			t.Errorf("%s: %s, want %s", step, got[step], want)
		}
	}
	if r.tests[0].matched != 4 || r.tests[0].waiting != 3 {
		t.Errorf("%d matched, %d waited", r.tests[0].matched, r.tests[0].waiting)
	}
}
