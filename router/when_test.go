package router_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
	"stoop/router"
	"stoop/rules"
)

var start0 = time.Now().Truncate(time.Second)

// tally counts alerts for one rule.
type tally struct {
	t      testing.TB
	counts *router.Counts
	rule   *rules.Rule
	reg    *prometheus.Registry
	n      int
}

func newTally(t testing.TB, when string, trust router.Trust) *tally {
	t.Helper()
	d := param.Describe(struct{}{})
	src := "rules: [{name: r, match: {priority: debug}, when: " + when + ", actions: [harm]}]"
	set, err := rules.Parse("test.yaml", []byte(src), rules.Catalog{"harm": d, "tell": d})
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	return &tally{t: t, counts: router.NewCounts(trust, nil, reg), rule: set.Rules[0], reg: reg}
}

// event is an alert in a line of a test.
type event struct {
	at     float64 // seconds since the start
	rule   string  // "" is R
	fields string  // of output_fields, as JSON without the braces
	id     string  // "" is a new one
	late   float64 // seconds until it arrives
}

func (y *tally) add(e event) router.Agreement {
	y.t.Helper()
	y.n++
	rule := e.rule
	if rule == "" {
		rule = "R"
	}
	at := start0.Add(time.Duration(e.at * float64(time.Second)))
	line := fmt.Sprintf(`{"rule":%q,"priority":"Notice","output":"%d","time":%q,"output_fields":{%s}}`, rule, y.n, at.Format(time.RFC3339Nano), e.fields)
	a, err := alert.Parse([]byte(line))
	if err != nil {
		y.t.Fatal(err)
	}
	if e.id != "" {
		a.ID = alert.IDOf([]byte(e.id))
	}
	now := at.Add(time.Duration(e.late * float64(time.Second)))
	got := y.counts.Add(router.Arrived{Alert: a, Target: a.Target(), Received: now, Now: now}, []*rules.Rule{y.rule})
	return got[0]
}

func (y *tally) metric(name string) float64 {
	y.t.Helper()
	all, err := y.reg.Gather()
	if err != nil {
		y.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	y.t.Fatalf("no metric %s", name)
	return 0
}

func pod(name string) string { return `"k8s.ns.name":"shop","k8s.pod.name":"` + name + `"` }

func uid(name, uid string) string { return pod(name) + `,"k8s.pod.uid":"` + uid + `"` }

// What the alerts of a line come to: "!" that enough of them agree, else how many
// do, or what is said.
func TestWindow(t *testing.T) {
	const (
		three = "{count: 3, within: 60s, by: pod}"
		both  = "{rules: [A, \"B*\"], within: 60s, by: pod}"
	)
	a, b := pod("a"), pod("b")
	ids := `"container.id":"0123456789ab"`
	for _, tt := range []struct {
		name, when string
		events     []event
		want       string
	}{
		{"three in time", three, []event{{at: 0, fields: a}, {at: 30, fields: a}, {at: 60, fields: a}}, "1 2 !"},
		{"three not in time", three, []event{{at: 0, fields: a}, {at: 30, fields: a}, {at: 60.001, fields: a}, {at: 89, fields: a}}, "1 2 2 !"},
		{"two pods", three, []event{{fields: a}, {fields: b}, {fields: a}, {fields: b}, {fields: a}, {fields: b}}, "1 1 2 2 ! !"},
		{"it begins anew", three, []event{{fields: a}, {fields: a}, {fields: a}, {fields: a}, {fields: a}, {fields: a}}, "1 2 ! 1 2 !"},
		{"one alert counts once", three, []event{{fields: a, id: "x"}, {fields: a, id: "x"}, {fields: a, id: "y"}, {fields: a, id: "x"}, {fields: a, id: "z"}}, "1 before 2 before !"},
		{"what is used up does not count again", three, []event{{fields: a, id: "x"}, {fields: a, id: "y"}, {fields: a, id: "z"}, {fields: a, id: "x"}, {fields: a, id: "y"}}, "1 2 ! before before"},
		{"the one that completed fires again", three, []event{{fields: a, id: "x"}, {fields: a, id: "y"}, {fields: a, id: "z"}, {fields: a, id: "z"}}, "1 2 ! !"},
		{"out of order", three, []event{{at: 50, fields: a}, {at: 55, fields: a}, {at: 20, fields: a, late: 40}}, "1 2 !"},
		{"out of order and out of time", three, []event{{at: 50, fields: a}, {at: 70, fields: a}, {at: 5, fields: a, late: 80}}, "1 2 2"},
		{"between two that are too far apart", three, []event{{at: 0, fields: a}, {at: 80, fields: a}, {at: 40, fields: a, late: 40}, {at: 41, fields: a, late: 60}}, "1 1 2 !"},
		{"a backlog is no burst", three, []event{{at: 0, fields: a, late: 500}, {at: 100, fields: a, late: 400}, {at: 200, fields: a, late: 300}}, "1 1 1"},
		{"a backlog of a burst is one", three, []event{{at: 0, fields: a, late: 500}, {at: 1, fields: a, late: 500}, {at: 2, fields: a, late: 500}}, "1 2 !"},
		{"too old", three, []event{{at: 0, fields: a, late: 601}, {at: 0, fields: a, late: 600}}, "old 1"},
		{"from the future", three, []event{{at: 0, fields: a, late: -31}, {at: 0, fields: a, late: -30}}, "future 1"},
		{"no pod", three, []event{{fields: ids}, {fields: `"container.id":"host"`}, {fields: `"k8s.pod.name":"a"`}, {fields: `"k8s.ns.name":"shop","k8s.pod.name":"<NA>"`}}, "pod pod pod pod"},
		{"another pod of the name", three, []event{{fields: uid("a", "1-1")}, {fields: uid("a", "2-2")}, {fields: uid("a", "1-1")}, {fields: uid("a", "2-2")}, {fields: uid("a", "2-2")}, {fields: uid("a", "1-1")}}, "1 1 2 2 ! !"},
		{"some don't name the UID", three, []event{{fields: uid("a", "1-1")}, {fields: a}, {fields: uid("a", "1-1")}}, "1 2 !"},
		{"those without a UID are of the latest", three, []event{{at: 1, fields: uid("a", "1-1")}, {at: 2, fields: uid("a", "2-2")}, {at: 3, fields: a}, {at: 4, fields: a}}, "1 1 2 !"},
		{"an audit event's pod", three, []event{{fields: a}, {fields: `"ka.user.name":"u","ka.target.resource":"pods","ka.target.name":"a","ka.target.namespace":"shop"`}, {fields: a}}, "1 2 !"},

		{"both rules", both, []event{{rule: "A", fields: a}, {rule: "Bee", fields: a}}, "1 !"},
		{"in any order", both, []event{{rule: "Bee", fields: a}, {rule: "A", fields: a}}, "1 !"},
		{"many of one", both, []event{{rule: "A", fields: a}, {rule: "A", fields: a}, {rule: "A", fields: a}, {rule: "B", fields: b}, {rule: "B", fields: a}}, "1 1 1 1 !"},
		{"both rules, not in time", both, []event{{at: 0, rule: "A", fields: a}, {at: 61, rule: "B", fields: a}, {at: 62, rule: "A", fields: a}}, "1 1 !"},
		{"none of the rules", both, []event{{rule: "A", fields: a}, {rule: "C", fields: a}, {rule: "ABe", fields: a}}, "1 none none"},
		{"both rules, again", both, []event{{rule: "A", fields: a}, {rule: "B", fields: a}, {rule: "B", fields: a}, {rule: "A", fields: a}}, "1 ! 1 !"},
		{"one alert is not two", "{rules: [\"A*\", \"*A\"], within: 60s, by: pod}", []event{{rule: "A", fields: a}, {rule: "A", fields: a}}, "1 !"},
		{
			"as many rules as can be",
			"{rules: [\"A*\", \"*B\", AB], within: 60s, by: pod}",
			[]event{{rule: "AB", fields: a}, {rule: "AB", fields: a}, {rule: "AC", fields: a}},
			"1 2 !",
		},
		{"an early one far away is no matter", both, []event{{at: 0, rule: "A", fields: a}, {at: 100, rule: "A", fields: a}, {at: 130, rule: "B", fields: a}}, "1 1 !"},
		{"many of one, and a late one of the other", both, append(slices.Repeat([]event{{at: 10, rule: "A", fields: a}}, 40), event{at: 200, rule: "A", fields: a}, event{at: 20, rule: "B", fields: a, late: 180}), strings.Repeat("1 ", 41) + "!"},

		{"by container", "{count: 2, within: 60s, by: container}", []event{{fields: ids}, {fields: `"container.id":"0123456789ac"`}, {fields: a}, {fields: ids}}, "1 1 container !"},
		{
			"two containers that begin alike",
			"{count: 2, within: 60s, by: container}",
			[]event{
				{fields: ids + `,"container.full_id":"0123456789ab0000000000000000000000000000000000000000000000000001"`},
				{fields: ids + `,"container.full_id":"0123456789ab0000000000000000000000000000000000000000000000000002"`},
				{fields: ids},
			},
			"1 1 !",
		},
		{"by node", "{count: 3, within: 60s, by: node}", []event{{fields: a}, {fields: ids}, {}}, "1 2 !"},
		{"by namespace", "{count: 3, within: 60s, by: namespace}", []event{{fields: a}, {fields: b}, {fields: ids}, {fields: `"ka.user.name":"u","ka.target.resource":"secrets","ka.target.namespace":"shop"`}}, "1 2 namespace !"},
		{"by a user of the API server", "{count: 2, within: 60s, by: user}", []event{{fields: `"ka.user.name":"eve"`}, {fields: `"ka.user.name":"bob"`}, {fields: `"ka.user.name":"eve"`}}, "1 1 !"},
		{
			"by a user of the host, who became root",
			"{count: 2, within: 60s, by: user}",
			[]event{{fields: `"container.id":"host","user.uid":1000,"user.loginuid":1000`}, {fields: `"container.id":"host","user.uid":0,"user.loginuid":1000`}},
			"1 !",
		},
		{
			"a daemon of the host",
			"{count: 2, within: 60s, by: user}",
			[]event{{fields: `"container.id":"host","user.uid":33,"user.loginuid":-1`}, {fields: `"container.id":"host","user.uid":33,"user.loginuid":4294967295`}},
			"1 !",
		},
		{"a number in a container is nobody", "{count: 2, within: 60s, by: user}", []event{{fields: ids + `,"user.uid":1000,"user.loginuid":1000`}}, "user"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			y := newTally(t, tt.when, router.Trust{})
			want := strings.Fields(tt.want)
			if len(want) != len(tt.events) {
				t.Fatalf("%d events, %d of them are said", len(tt.events), len(want))
			}
			for i, e := range tt.events {
				got := y.add(e)
				ok := got.Reached
				switch w := want[i]; {
				case w == "!":
				case len(w) < 3:
					ok = !got.Reached && strings.HasPrefix(got.Why, w+" of ")
				default:
					ok = !got.Reached && strings.Contains(got.Why, w)
				}
				if !ok {
					t.Fatalf("alert %d: reached %t (%s), want %s", i, got.Reached, got.Why, want[i])
				}
			}
		})
	}
}

func TestWhatIsSaidOfThoseThatWait(t *testing.T) {
	y := newTally(t, "{count: 3, within: 90s, by: user}", router.Trust{})
	got := y.add(event{fields: `"ka.user.name":"e\u001bve"`})
	if got.Why != `1 of 3 within 1m30s by user "e\x1bve"` {
		t.Error(got.Why)
	}
}

// The ids are of the alerts that agree, the last one's at the end, and only of so
// many.
func TestWhoAgreed(t *testing.T) {
	y := newTally(t, "{count: 3, within: 60s, by: pod}", router.Trust{})
	y.add(event{at: 0, fields: pod("a"), id: "too early"})
	y.add(event{at: 30, fields: pod("a"), id: "one"})
	y.add(event{at: 80, fields: pod("a"), id: "three"})
	got := y.add(event{at: 70, fields: pod("a"), id: "two", late: 10})
	var want []string
	for _, id := range []string{"one", "three", "two"} {
		want = append(want, alert.IDOf([]byte(id)))
	}
	if !slices.Equal(got.Agreed, want) {
		t.Errorf("agreed %v, want %v", got.Agreed, want)
	}
	y = newTally(t, "{count: 100, within: 60s, by: pod}", router.Trust{})
	for range 99 {
		got = y.add(event{fields: pod("a")})
	}
	last := y.add(event{fields: pod("a"), id: "last"})
	if got.Reached || !last.Reached || len(last.Agreed) != broker.AgreedMost || last.Agreed[broker.AgreedMost-1] != alert.IDOf([]byte("last")) {
		t.Errorf("%+v, then %+v", got, last)
	}
}

// Nothing that can't start something harmful counts towards it; towards telling
// people it does.
func TestDistrust(t *testing.T) {
	trust := router.Trust{
		Harms:    func(responder string) bool { return responder == "harm" },
		Distrust: func(*alert.Alert, alert.Target, broker.Origin, time.Time) string { return "it is a forgery" },
	}
	y := newTally(t, "{count: 2, within: 60s, by: pod}", trust)
	for range 3 {
		if got := y.add(event{fields: pod("a")}); got.Reached || got.Why != "it does not count: it is a forgery" {
			t.Errorf("%+v", got)
		}
	}
	y.rule.Actions[0].Responder = "tell"
	y.add(event{fields: pod("a")})
	if got := y.add(event{fields: pod("a")}); !got.Reached {
		t.Errorf("what harms nobody: %+v", got)
	}
}

// reference remembers everything and looks through all of it.
type reference struct {
	within float64
	needed int
	both   bool
	seen   map[string][]event
}

func (r *reference) add(target string, e event) bool {
	all := append(slices.DeleteFunc(r.seen[target], func(o event) bool { return o.at < e.at-60 }), e)
	for _, from := range all {
		n, rules := 0, map[string]bool{}
		for _, o := range all {
			if o.at >= from.at && o.at <= from.at+r.within {
				n++
				rules[o.rule] = true
			}
		}
		if r.both && len(rules) == r.needed || !r.both && n >= r.needed {
			delete(r.seen, target)
			return true
		}
	}
	r.seen[target] = all
	return false
}

// Whatever comes, in whatever order within some seconds, the counts are those of
// something that remembers all.
func TestWindowAgainstReference(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		needed := 2 + r.IntN(4)
		when, both := fmt.Sprintf("{count: %d, within: 10s, by: pod}", needed), seed%2 == 1
		if both {
			when = "{rules: [" + strings.Join([]string{"A", "B", "C", "D", "E"}[:needed], ", ") + "], within: 10s, by: pod}"
		}
		ref := &reference{within: 10, needed: needed, both: both, seen: map[string][]event{}}
		y := newTally(t, when, router.Trust{})
		fired, at := 0, 0.0
		for i := range 1500 {
			at += r.ExpFloat64() * 2
			jitter := 0.0
			if r.IntN(3) == 0 {
				jitter = r.Float64() * 8
			}
			target := []string{"a", "b", "c"}[r.IntN(3)]
			e := event{at: max(0, at-jitter), rule: string(rune('A' + r.IntN(needed))), fields: pod(target)}
			e.at = float64(int(e.at*1000)) / 1000
			e.late = at - e.at
			got, want := y.add(e).Reached, ref.add(target, e)
			if got != want {
				t.Fatalf("seed %d, %s: alert %d on %s reached %t, want %t", seed, when, i, target, got, want)
			}
			if got {
				fired++
			}
		}
		if fired < 3 {
			t.Errorf("seed %d, %s: it fired only %d times", seed, when, fired)
		}
	}
}

// Whoever makes very many pods pushes out what was counted of his own, not of
// others'.
func TestManyTargets(t *testing.T) {
	y := newTally(t, "{count: 3, within: 60s, by: pod}", router.Trust{})
	victim := `"k8s.ns.name":"shop","k8s.pod.name":"web"`
	own := `"k8s.ns.name":"evil","k8s.pod.name":"real"`
	y.add(event{fields: victim})
	y.add(event{fields: own})
	y.add(event{fields: own})
	for i := range 20_000 {
		y.add(event{at: 1, fields: fmt.Sprintf(`"k8s.ns.name":"evil","k8s.pod.name":"p%d"`, i)})
	}
	if n := y.metric("stoop_when_targets"); n < 800 || n > 1024 {
		t.Errorf("%v targets", n)
	}
	if n := y.metric("stoop_when_dropped_total"); n < 18_000 || n > 20_000 {
		t.Errorf("%v were dropped", n)
	}
	if got := y.add(event{at: 2, fields: own}); !got.Reached {
		t.Errorf("the one that was the nearest is forgotten: %s", got.Why)
	}
	y.add(event{at: 2, fields: victim})
	if got := y.add(event{at: 2, fields: victim}); !got.Reached {
		t.Errorf("what another namespace had waiting is forgotten: %s", got.Why)
	}
}

// Names in audit events are chosen by whoever makes the request: he pays for them.
func TestManyNamesInRequests(t *testing.T) {
	y := newTally(t, "{count: 2, within: 60s, by: namespace}", router.Trust{})
	y.add(event{fields: pod("web")})
	for i := range 5000 {
		y.add(event{at: 1, fields: fmt.Sprintf(`"ka.user.name":"system:serviceaccount:evil:a%d","ka.target.resource":"secrets","ka.target.namespace":"n%d"`, i%100, i)})
	}
	if got := y.add(event{at: 2, fields: pod("web")}); !got.Reached {
		t.Errorf("what others had waiting is forgotten: %s", got.Why)
	}
}

// What can't agree with anything any more makes room first, and is no loss.
func TestOldTargetsMakeRoom(t *testing.T) {
	y := newTally(t, "{count: 2, within: 10s, by: pod}", router.Trust{})
	for i := range 1024 {
		y.add(event{at: 0, fields: pod(fmt.Sprint("old", i))})
	}
	for i := range 1024 {
		y.add(event{at: 100, fields: pod(fmt.Sprint("new", i))})
	}
	for i := range 1024 {
		if got := y.add(event{at: 101, fields: pod(fmt.Sprint("new", i))}); !got.Reached {
			t.Fatalf("new%d was forgotten: %s", i, got.Why)
		}
	}
	if n := y.metric("stoop_when_dropped_total"); n != 0 {
		t.Errorf("%v were dropped", n)
	}
	if n := y.metric("stoop_when_reached_total"); n != 1024 {
		t.Errorf("it was reached %v times", n)
	}
}

func BenchmarkCount(b *testing.B) {
	for _, bench := range []struct {
		name, when string
		pods       int
	}{
		{"one pod", "{count: 3, within: 60s, by: pod}", 1},
		{"100 pods", "{count: 100, within: 60s, by: pod}", 100},
		{"too many pods", "{count: 3, within: 60s, by: pod}", 100_000},
		{"two rules", "{rules: [A, R], within: 60s, by: pod}", 1},
	} {
		b.Run(bench.name, func(b *testing.B) {
			y := newTally(b, bench.when, router.Trust{})
			alerts := make([]router.Arrived, min(b.N, 100_000))
			for i := range alerts {
				line := fmt.Sprintf(`{"rule":"R","priority":"Notice","output":"%d","time":%q,"output_fields":{%s}}`, i, start0.Format(time.RFC3339Nano), pod(fmt.Sprint("p", i%bench.pods)))
				a, err := alert.Parse([]byte(line))
				if err != nil {
					b.Fatal(err)
				}
				alerts[i] = router.Arrived{Alert: a, Target: a.Target(), Received: start0, Now: start0}
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				y.counts.Add(alerts[i%len(alerts)], []*rules.Rule{y.rule})
			}
		})
	}
}
