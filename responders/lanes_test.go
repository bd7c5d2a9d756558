package responders

import (
	"fmt"
	"testing"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A destination that hangs for long has everything waiting that may wait. What
// goes to another one is neither given up for it nor held up by it.
func TestADeadDestinationWithAFullQueueHoldsUpNoOther(t *testing.T) {
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
	full := false
	for range 20_000 {
		st := b.step("tell")
		st.Params = jsonRaw(`"dead"`)
		if _, err := b.broker.PublishStep(t.Context(), st); err != nil {
			full = true
			break
		}
	}
	if !full {
		t.Fatal("there is no bound")
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
