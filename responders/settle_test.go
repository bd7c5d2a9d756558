package responders

import (
	"strings"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A rule that is new, or means something else than before, tells only what it would
// do until it is so old; over restarts, too.
func TestAChangedRuleSettles(t *testing.T) {
	dir := t.TempDir()
	store := brokertest.Open(t, broker.Config{Dir: dir})
	s := &stub{}
	b := newBench(t, store, entry("one", Harm, s))
	b.config.Guards.Settle = 10 * time.Minute
	b.start()
	n := 0
	wants := func(want broker.Status, received time.Time) {
		t.Helper()
		step := b.step("one")
		step.Received = received
		b.publish(step)
		n++
		o := b.outcomes(n)[n-1]
		settling := strings.Contains(o.Reason, "(guard.settle)")
		if o.Status != want || settling != (want == broker.Audited) {
			t.Errorf("%s (%s), want %s", o.Status, o.Reason, want)
		}
	}
	rules := func(hash string) {
		t.Helper()
		if err := b.host.SettleRules(t.Context(), map[string]string{"r": hash}); err != nil {
			t.Fatal(err)
		}
	}
	rules("first")
	wants(broker.Done, time.Now()) // the first of all
	rules("changed")
	wants(broker.Audited, time.Now())
	wants(broker.Audited, time.Now().Add(9*time.Minute))
	wants(broker.Done, time.Now().Add(10*time.Minute+time.Second))
	rules("first")
	wants(broker.Done, time.Now()) // it is what it was
	rules("changed")
	wants(broker.Audited, time.Now()) // it never had settled

	b.stop()
	store.Close()
	next := newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entry("one", Harm, s))
	next.config.Guards.Settle, next.n = b.config.Guards.Settle, b.n
	b = next.start()
	rules("changed")
	wants(broker.Audited, time.Now())
	rules("first")
	wants(broker.Done, time.Now())
	b.host.Guards.Settle = 0
	rules("other")
	wants(broker.Done, time.Now())
}

func TestWhatIsRememberedOfRulesThatAreGone(t *testing.T) {
	now := time.Now()
	old := &settled{Rules: map[string]known{
		"in force": {}, "first": {}, "settled": {Since: now.Add(-time.Hour)}, "young": {Since: now.Add(-time.Minute)},
		"yesterday": {Gone: now.Add(-23 * time.Hour)}, "before": {Gone: now.Add(-25 * time.Hour)},
	}}
	s := &settled{Rules: map[string]known{"in force": {}}}
	s.remember(old, now, 10*time.Minute)
	for hash, want := range map[string]bool{"in force": true, "first": true, "settled": true, "young": false, "yesterday": true, "before": false} {
		if _, ok := s.Rules[hash]; ok != want {
			t.Errorf("%s is remembered: %t", hash, ok)
		}
	}
	for i := range 3 * goneMost {
		old.Rules[string(rune(i+1000))] = known{}
	}
	s = &settled{Rules: map[string]known{}}
	if s.remember(old, now, 0); len(s.Rules) != goneMost {
		t.Errorf("%d are remembered", len(s.Rules))
	}
}
