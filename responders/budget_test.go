package responders

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// played is a fleet with a clock of its own, on a budget that is stored as an API
// server would.
type played struct {
	t      testing.TB
	terms  terms
	now    time.Time
	stored string
	nodes  []*playedNode
	grants []playedGrant
}

type playedGrant struct {
	at    time.Time
	node  int
	other bool
	space string
}

// playedNode is one process after the other on a node.
type playedNode struct {
	*Fleet
	fresh time.Time
	steps int
	space string // of its next steps
}

func play(t testing.TB, limit Rate, nodes int) *played {
	p := &played{t: t, terms: termsOf(limit), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	p.nodes = make([]*playedNode, nodes)
	for i := range p.nodes {
		p.nodes[i] = &playedNode{}
		p.start(i)
	}
	return p
}

// start is a new process, which knows nothing of the one before it.
func (p *played) start(i int) {
	n := p.nodes[i]
	n.Fleet = &Fleet{
		FleetConfig: FleetConfig{Node: fmt.Sprint("n", i), Tell: func(string, string) {}, Log: slog.New(slog.DiscardHandler), Limit: p.terms.limit},
		terms:       p.terms, id: fmt.Sprintf("p%d.%d", i, n.steps), metrics: newFleetMetrics(nil),
		wake: make(chan struct{}, 1),
	}
	n.fresh = time.Time{}
}

// update is one of node i, with a step that waits if it asks; the write arrives
// or not, and so does its answer.
func (p *played) update(i int, asks, urgent, arrives, answered bool) (granted bool) {
	n := p.nodes[i]
	b := &budget{}
	if p.stored != "" {
		if err := json.Unmarshal([]byte(p.stored), b); err != nil {
			p.t.Fatal(err)
		}
	}
	if err := b.check(); err != nil {
		p.t.Fatal(err)
	}
	a := &asked{used: slices.Clone(n.used), returned: slices.Clone(n.returned)}
	for j := range n.used {
		n.used[j].sent = true
	}
	if asks {
		n.steps++
		a.waiting = []*asking{{step: fmt.Sprintf("%s/%d", n.id, n.steps), space: n.space, urgent: urgent, answer: make(chan error, 1)}}
	}
	b.settle(&p.terms, p.now)
	refused, changed := n.apply(b, a, p.now)
	if changed {
		if own := b.Held[n.id]; own != nil {
			own.Renewed = p.now
		}
		data, err := json.Marshal(b)
		if err != nil {
			p.t.Fatal(err)
		}
		if !arrives {
			return false
		}
		p.stored = string(data)
		if !answered {
			return false
		}
		n.fresh = p.now
	}
	n.commit(b, a, refused, p.now, changed)
	if !asks || refused[0].reason != "" {
		return false
	}
	// It is used at the latest possible moment.
	p.grants = append(p.grants, playedGrant{p.now.Add(p.terms.askFor), i, !urgent, n.space})
	return true
}

// use is a step that finds credit, or not.
func (p *played) use(i int, urgent bool) bool {
	n := p.nodes[i]
	n.server.at, n.server.local = p.now, time.Now()
	if p.now.Sub(n.fresh) >= p.terms.useFor || n.left(urgent) == 0 || n.crowded(n.space, urgent) {
		return false
	}
	n.steps++
	n.used = append(n.used, use{spending: spending{Step: fmt.Sprintf("%s/%d", n.id, n.steps), Node: n.Node, At: p.now, Other: !urgent, Space: n.space}})
	p.grants = append(p.grants, playedGrant{p.now, i, !urgent, n.space})
	return true
}

// wantLimit fails where a window had more than the limit.
func (p *played) wantLimit() {
	p.t.Helper()
	slices.SortFunc(p.grants, func(x, y playedGrant) int { return x.at.Compare(y.at) })
	first, others, limit := 0, 0, p.terms.limit
	for i, g := range p.grants {
		if g.other {
			others++
		}
		for ; g.at.Sub(p.grants[first].at) >= limit.Per; first++ {
			if p.grants[first].other {
				others--
			}
		}
		if n := i + 1 - first; n > limit.N {
			p.t.Fatalf("%d steps in the window that ends at %s, want at most %d", n, g.at, limit.N)
		}
		if others > other(limit.N) {
			p.t.Fatalf("%d steps of alerts below Critical in the window that ends at %s, want at most %d", others, g.at, other(limit.N))
		}
	}
}

// Whatever is lost, and whoever is killed, no window has more than the limit.
func TestBudgetHolds(t *testing.T) {
	for seed := range uint64(10) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := play(t, Rate{[]int{1, 2, 5, 20, 60}[seed%5], time.Duration(1+seed%3) * time.Minute}, 25)
		stuck := make([]bool, len(p.nodes)) // its API server is away
		for range 20_000 {
			p.now = p.now.Add(time.Duration(r.IntN(100)) * time.Millisecond)
			i := r.IntN(len(p.nodes))
			p.nodes[i].space = []string{"", "a", "a", "b", "c"}[r.IntN(5)]
			switch k := r.IntN(1000); {
			case k < 5:
				p.start(i)
			case k < 15:
				stuck[i] = !stuck[i]
			case k < 400:
				p.use(i, r.IntN(2) == 0)
			case k < 420 && len(p.nodes[i].used) > 0:
				p.nodes[i].returned = append(p.nodes[i].returned, p.nodes[i].used[0].Step)
				// What is given back was not used.
				g := p.nodes[i].used[0]
				p.grants = slices.DeleteFunc(p.grants, func(x playedGrant) bool { return x.node == i && x.at.Equal(g.At) })
			default:
				p.update(i, k%2 == 0, r.IntN(2) == 0, !stuck[i] && r.IntN(20) > 0, r.IntN(20) > 0)
			}
		}
		p.wantLimit()
		if len(p.grants) < 5 {
			t.Errorf("seed %d: only %d steps in all: it shows nothing", seed, len(p.grants))
		}
	}
}

// Twenty nodes want all they can get for one namespace, and hardly anything for
// another: in no window has the one more than half, but for what nodes held and had
// not seen others use.
func TestBudgetNamespaceShare(t *testing.T) {
	limit := Rate{40, time.Minute}
	p := play(t, limit, 20)
	r := rand.New(rand.NewPCG(1, 3))
	victim := 0
	for range 20_000 {
		p.now = p.now.Add(time.Duration(r.IntN(100)) * time.Millisecond)
		i := r.IntN(len(p.nodes))
		p.nodes[i].space = "mallory"
		rare := r.IntN(500) == 0
		if rare {
			p.nodes[i].space = "victim"
		}
		switch got := p.use(i, true) || p.update(i, true, true, true, true); {
		case rare && !got:
			t.Fatalf("at %s an act in another namespace was held back: %s", p.now, p.stored)
		case rare:
			victim++
		}
	}
	p.wantLimit()
	mallory := slices.DeleteFunc(slices.Clone(p.grants), func(g playedGrant) bool { return g.space != "mallory" })
	most, first := 0, 0
	for i, g := range mallory {
		for ; g.at.Sub(mallory[first].at) >= limit.Per; first++ {
		}
		most = max(most, i+1-first)
	}
	t.Logf("one namespace had %d in all and at most %d in a window, the other %d", len(mallory), most, victim)
	if most > half(limit.N)+limit.N/4 || most < half(limit.N) {
		t.Errorf("one namespace had %d in a window, want %d, and what is held ahead at most", most, half(limit.N))
	}
}

// Most nodes always want more, some only now and then: nobody starves.
func TestBudgetStarvesNobody(t *testing.T) {
	for _, n := range []int{4, 20, 60} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			p := play(t, Rate{n, time.Minute}, 30)
			r := rand.New(rand.NewPCG(1, 2))
			got := make([]int, len(p.nodes))
			for range 40 * 60 * 10 {
				p.now = p.now.Add(100 * time.Millisecond)
				i := r.IntN(len(p.nodes))
				if rare := i >= 20; rare && r.IntN(20) > 0 { // about once a minute
					continue
				}
				if p.use(i, true) || p.update(i, true, true, true, true) {
					got[i]++
				}
			}
			p.wantLimit()
			for i, k := range got {
				if k == 0 {
					t.Errorf("node %d got nothing: %v", i, got)
				}
			}
			if rare, greedy := slices.Min(got[20:]), slices.Max(got[:20]); rare*8 < greedy {
				t.Errorf("a node that asks now and then got %d, one that always does %d: %v", rare, greedy, got)
			}
			all := 0
			for _, k := range got {
				all += k
			}
			if all < n*40/2 { // 40 windows
				t.Errorf("%d steps in all, of %d", all, n*40)
			}
		})
	}
}

func TestBudgetShares(t *testing.T) {
	t.Run("a node gets a quarter", func(t *testing.T) {
		p := play(t, Rate{20, time.Minute}, 1)
		n, others := 0, 0
		for range 30 {
			p.now = p.now.Add(time.Millisecond)
			if p.use(0, false) || p.update(0, true, false, true, true) {
				others++
			}
		}
		for range 30 {
			p.now = p.now.Add(time.Millisecond)
			if p.use(0, true) || p.update(0, true, true, true, true) {
				n++
			}
		}
		if others != 4 || n != 1 {
			t.Errorf("%d steps of alerts below Critical, then %d of Critical ones; want 4 and 1", others, n)
		}
	})
	t.Run("a quarter is left for Critical", func(t *testing.T) {
		p := play(t, Rate{20, time.Minute}, 40)
		count := func(urgent bool) (n int) {
			for range 3 {
				for i := range p.nodes {
					p.now = p.now.Add(time.Millisecond)
					if p.use(i, urgent) || p.update(i, true, urgent, true, true) {
						n++
					}
				}
			}
			return n
		}
		if others := count(false); others > 15 || others < 8 {
			t.Errorf("%d steps of alerts below Critical, want at most 15, and half at least", others)
		}
		if n := count(true); n < 5 {
			t.Errorf("then %d steps of Critical ones, want at least 5", n)
		}
	})
	t.Run("a namespace gets half", func(t *testing.T) {
		for _, urgent := range []bool{true, false} {
			p := play(t, Rate{20, time.Minute}, 12)
			got := map[string]int{}
			for _, space := range []string{"mallory", "victim"} {
				for range 3 {
					for i, n := range p.nodes {
						p.now, n.space = p.now.Add(time.Millisecond), space
						p.update(i, false, false, true, true) // every node knows what there is to know
						if p.use(i, urgent) || p.update(i, true, urgent, true, true) {
							got[space]++
						}
						p.update(i, false, false, true, true)
					}
				}
			}
			want := map[string]int{"mallory": 10, "victim": 5}
			if !urgent {
				want = map[string]int{"mallory": 8, "victim": 2}
			}
			if got["mallory"] != want["mallory"] || got["victim"] < want["victim"] {
				t.Errorf("urgent %t: %v, want %v at least of the second", urgent, got, want)
			}
		}
	})
	t.Run("what was written without namespaces", func(t *testing.T) {
		p := play(t, Rate{2, time.Minute}, 2)
		p.stored = `{"spent":[{"step":"x","node":"x","at":"2030-01-01T00:00:00Z"}]}`
		p.nodes[0].space = "a"
		if !p.update(0, true, true, true, true) {
			t.Error("it counts for the namespace")
		}
		if p.nodes[1].space = "b"; p.update(1, true, true, true, true) {
			t.Error("it does not count for the cluster")
		}
	})
	t.Run("a quarter is held ahead at the most", func(t *testing.T) {
		p := play(t, Rate{20, time.Minute}, 40)
		for i := range p.nodes {
			p.update(i, false, false, true, true)
		}
		b := &budget{}
		if err := json.Unmarshal([]byte(p.stored), b); err != nil || b.held() != 5 {
			t.Errorf("%d are held, error %v: %s", b.held(), err, p.stored)
		}
	})
	t.Run("one that is killed again and again holds no more", func(t *testing.T) {
		p := play(t, Rate{100, time.Minute}, 1)
		for range 10 {
			p.update(0, false, false, true, true)
			p.nodes[0].steps++
			p.start(0)
		}
		b := &budget{}
		if err := json.Unmarshal([]byte(p.stored), b); err != nil || b.held() != 2 {
			t.Errorf("%d are held, error %v: %s", b.held(), err, p.stored)
		}
	})
	t.Run("held too long", func(t *testing.T) {
		p := play(t, Rate{20, time.Minute}, 2)
		p.update(0, false, false, true, true)
		p.use(0, true)
		p.now = p.now.Add(p.terms.heldFor)
		p.update(1, false, false, true, true)
		if strings.Contains(p.stored, `"node":"n0","n"`) || strings.Count(p.stored, `"by":"p0.0"`) != 2 {
			t.Errorf("what n0 held is not taken for spent: %s", p.stored)
		}
		p.update(0, false, false, true, true)
		if !strings.Contains(p.stored, `"node":"n0","n":1`) && !strings.Contains(p.stored, `"node":"n0","n":2`) || strings.Contains(p.stored, `"by"`) {
			t.Errorf("n0 is back and has not its own: %s", p.stored)
		}
	})
	t.Run("a report whose answer is lost counts once", func(t *testing.T) {
		p := play(t, Rate{20, time.Minute}, 1)
		p.update(0, false, false, true, true)
		p.use(0, true)
		p.update(0, false, false, true, false)
		p.update(0, false, false, true, true)
		b := &budget{}
		if err := json.Unmarshal([]byte(p.stored), b); err != nil || len(b.Spent) != 1 || b.held() != 2 {
			t.Errorf("want one spent and two held, error %v: %s", err, p.stored)
		}
	})
	t.Run("times that can't be", func(t *testing.T) {
		p := play(t, Rate{1, time.Minute}, 1)
		p.stored = `{"spent":[{"node":"x","at":"2999-01-01T00:00:00Z"}]}`
		if p.update(0, true, true, true, true) {
			t.Error("what is spent does not count")
		}
		p.now = p.now.Add(2 * time.Minute) // it was not written: nothing was asked
		p.stored = strings.Replace(p.stored, "2999", "2030", 1)
		p.now = p.now.Add(time.Minute)
		if !p.update(0, true, true, true, true) {
			t.Error("what was spent counts for ever")
		}
	})
}

func TestServerTime(t *testing.T) {
	for _, ahead := range []time.Duration{-3 * time.Hour, -time.Minute, 0, 500 * time.Millisecond, time.Minute, 24 * time.Hour} {
		var s serverTime
		local := time.Now()
		s.note(local.Add(ahead).UTC().Format(http.TimeFormat), local)
		if d := s.now().Sub(time.Now().Add(ahead)).Abs(); d > 1100*time.Millisecond {
			t.Errorf("the API server's clock is %s ahead: its time is taken for %s off", ahead, d)
		}
		s.note("yesterday", local)
		if d := s.now().Sub(time.Now().Add(ahead)).Abs(); d > 1100*time.Millisecond {
			t.Errorf("after an answer without a date it is %s off", d)
		}
	}
}
