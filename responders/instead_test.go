package responders

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// careful is a stub that can tell beforehand.
type careful struct {
	*stub
	foresee error
}

func (c *careful) Foresee(context.Context, *Request) error { return c.foresee }

func gentleBench(t *testing.T, harsh Responder, gentle *stub) *bench {
	e := entry("harsh", Harm, harsh)
	e.Instead = "gentle"
	b := newBench(t, brokertest.New(t), e, entry("gentle", Harm, gentle))
	b.config.Guards.Cooldown = time.Minute
	return b
}

// What a responder spares is left to the gentler one: once, and people are told.
func TestWhatIsSparedIsLeftToTheGentlerOne(t *testing.T) {
	harsh := &stub{do: func(int, *Request) (Result, error) { return Result{}, Spare("last", "it is the last one") }}
	gentle := &stub{}
	b := gentleBench(t, harsh, gentle).start()
	s := b.step("harsh")
	b.publish(s)
	got := map[string]broker.Outcome{}
	for _, o := range b.outcomes(2) {
		got[o.Responder] = o
	}
	if o := got["harsh"]; o.Status != broker.Suppressed || o.Reason != "it is the last one; gentle is done instead" {
		t.Errorf("the harsh one: %s (%s)", o.Status, o.Reason)
	}
	if o := got["gentle"]; o.Status != broker.Done || !strings.Contains(o.Reason, "in place of harsh: it is the last one") {
		t.Errorf("the gentle one: %s (%s)", o.Status, o.Reason)
	}
	// It has its cooldown: a storm of alerts does not ask each time.
	again := b.step("harsh")
	again.Target = s.Target
	b.publish(again)
	for _, o := range b.outcomes(3) {
		if o.ID == again.ID && (o.Status != broker.Suppressed || !strings.Contains(o.Reason, "cooldown: this rule had gentle done here instead")) {
			t.Errorf("the second alert: %s (%s)", o.Status, o.Reason)
		}
	}
	if harsh.calls() != 1 || gentle.calls() != 1 {
		t.Errorf("asked %d times, done %d times", harsh.calls(), gentle.calls())
	}
	b.stop()
	if len(b.told) != 1 || b.told[0] != "spared for its workload" {
		t.Errorf("people were told %q", b.told)
	}
}

// What is spared takes nothing of the limits, so that the gentler one has its place.
func TestWhatIsSparedTakesNoPlace(t *testing.T) {
	harsh := &stub{do: func(int, *Request) (Result, error) { return Result{}, Spare("last", "it is the last one") }}
	gentle := &stub{}
	b := gentleBench(t, harsh, gentle)
	b.config.Guards.Local.Rule = Rate{2, time.Minute}
	b.start()
	for range 2 {
		b.publish(b.step("harsh"))
	}
	b.outcomes(4)
	if gentle.calls() != 2 {
		t.Errorf("done %d times", gentle.calls())
	}
}

// Where the gentler one can't do it either, nothing was done, and people hear so.
func TestWhereTheGentlerOneFails(t *testing.T) {
	harsh := &stub{do: func(int, *Request) (Result, error) { return Result{}, Spare("last", "it is the last one") }}
	gentle := &stub{do: func(int, *Request) (Result, error) { return Result{}, errors.New("missing permission") }}
	b := gentleBench(t, harsh, gentle).start()
	for n := range 2 {
		b.publish(b.step("harsh"))
		b.outcomes(2 * (n + 1))
	}
	b.stop()
	if len(b.told) != 2 || b.told[1] != "nothing was done" {
		t.Errorf("people were told %q", b.told)
	}
}

// In audit mode the responder is asked what it would do, and nothing else is.
func TestAuditTellsWhatWouldBeSpared(t *testing.T) {
	for _, c := range []struct {
		foresee error
		status  broker.Status
		reason  string
	}{
		{nil, broker.Audited, "audit mode"},
		{Spare("last", "it is the last one"), broker.Suppressed, "it is the last one; gentle would be done instead"},
		{errors.New("away"), broker.Audited, "is not known: away"},
		{Refuse("never"), broker.Refused, "never"},
	} {
		harsh := &careful{stub: &stub{}, foresee: c.foresee}
		b := gentleBench(t, harsh, &stub{})
		b.config.Guards.Mode = broker.Audit
		b.start()
		s := b.step("harsh")
		b.publish(s)
		o := b.outcomes(1)[0]
		// It rehearses the cooldown too.
		again := b.step("harsh")
		again.Target = s.Target
		b.publish(again)
		for _, o := range b.outcomes(2) {
			if o.ID == again.ID && strings.HasPrefix(o.Reason, "cooldown") != (c.status != broker.Refused) {
				t.Errorf("%v, again: %s (%s)", c.foresee, o.Status, o.Reason)
			}
		}
		if o.Status != c.status || !strings.Contains(o.Reason, c.reason) || harsh.calls() != 0 {
			t.Errorf("%v: %s (%s), acted %d times", c.foresee, o.Status, o.Reason, harsh.calls())
		}
		b.stop()
		if len(b.told) != 0 {
			t.Errorf("people were told %q", b.told)
		}
	}
}

// Who is asked to approve a step is told what would hold it back.
func TestWhoApprovesIsToldWhatWouldBeSpared(t *testing.T) {
	harsh := &careful{stub: &stub{}, foresee: Spare("last", "it is the last one")}
	b := gentleBench(t, harsh, &stub{}).start()
	s := b.step("harsh")
	s.Approve = new(true)
	b.publish(s)
	if o := b.outcomes(1)[0]; o.Status != broker.AwaitingApproval || o.Found["mind"] != "it is the last one" {
		t.Errorf("%s: %v", o.Status, o.Found)
	}
}
