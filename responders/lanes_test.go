package responders

import (
	"fmt"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A destination that hangs for long has very much waiting (broker's own tests say
// that it may not use up the room of others). What goes to another one is not held
// up by that.
func TestADeadDestinationWithALongQueueHoldsUpNoOther(t *testing.T) {
	hang := make(chan struct{})
	s := &stub{do: func(_ int, r *Request) (Result, error) {
		if string(r.Step.Params) == `"dead"` {
			<-hang
		}
		return Result{}, nil
	}}
	e := entry("tell", Notification, s)
	e.Lane = func(p jsonRaw) string { return string(p) }
	b := newBench(t, brokertest.New(t), e).start()
	defer close(hang)
	for range 500 {
		st := b.step("tell")
		st.Params = jsonRaw(`"dead"`)
		b.publish(st)
	}
	for i := range 5 {
		fine := b.step("tell")
		fine.Params = jsonRaw(fmt.Sprintf(`"fine %d"`, i))
		b.publish(fine)
		got := b.outcomes(i + 1)
		if o := got[len(got)-1]; o.ID != fine.ID || o.Status != broker.Done {
			t.Errorf("outcome %+v", o)
		}
	}
}

// Of many that wait for a busy destination few ask again at a time, of few each
// asks soon.
func TestHowSoonABusyDestinationIsAskedAgain(t *testing.T) {
	for _, c := range []struct {
		attempt     int
		waiting     int64
		least, most time.Duration
	}{
		{1, 5, 40 * time.Millisecond, 60 * time.Millisecond},
		{1000, 5, 1600 * time.Millisecond, 2400 * time.Millisecond},
		{1, 8000, 12 * time.Second, 20 * time.Second},
	} {
		if got := busyFor(c.attempt, c.waiting); got < c.least || got > c.most {
			t.Errorf("attempt %d of %d: %s, want %s to %s", c.attempt, c.waiting, got, c.least, c.most)
		}
	}
}
