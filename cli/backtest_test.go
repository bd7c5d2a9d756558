package cli

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

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

// fillKept stores n alerts, each in the streams for a while and in those for long.
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
		s := &broker.Stored{ID: a.ID, Data: a.Raw, Received: at, Origin: broker.OriginFIFO}
		for lost := b.MatchedLost(); ; lost = b.MatchedLost() {
			if b.KeepMatched(s, a); b.MatchedLost() == lost {
				break
			}
			time.Sleep(time.Millisecond)
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
	set, err := rules.Parse("bench.yaml", []byte(strings.ReplaceAll(string(benchRules()), "[delete-pod]", "[delete-pod, slack: {channel: '#x', url: {env: X}}]")), catalogOf(entries))
	if err != nil {
		set, err = rules.Parse("bench.yaml", benchRules(), catalogOf(entries))
	}
	if err != nil {
		b.Fatal(err)
	}
	c := defaults()
	p := &program{stderr: b.Output()}
	n := 0
	for b.Loop() {
		r := p.newReplay(set, nil, entries, c.guards("", responders.Self{}, nil))
		k := &keptAlerts{page: store.Kept}
		err := k.each(context.Background(), time.Time{}, func(kept *broker.Kept, _ bool, _ uint64) error {
			a, err := alert.Parse(kept.Data)
			if err != nil {
				return err
			}
			r.alert(a, kept.Origin, kept.Received)
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
		if n += r.out.Alerts; r.tests[0].matched == 0 {
			b.Fatal("none matched")
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "alerts/s")
}
