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

// What waits for a busy destination is done once, as soon as there is room, and asks
// nobody meanwhile.
func TestWhatWaitsForADestinationHasItsTurn(t *testing.T) {
	busy := make(chan struct{})
	s := &stub{do: func(n int, _ *Request) (Result, error) {
		if n <= laneConcurrency {
			<-busy
		}
		return Result{}, nil
	}}
	e := entry("tell", Notification, s)
	e.Lane = func(jsonRaw) string { return "one" }
	b := newBench(t, brokertest.New(t), e).start()
	const all = laneConcurrency + 100
	for range all {
		b.publish(b.step("tell"))
	}
	b.until("all but those under way are parked", func() bool { return b.parked("tell") == 100 })
	room := time.Now()
	close(busy)
	b.outcomes(all)
	if d := time.Since(room); d > 5*time.Second {
		t.Errorf("they were done %s after there was room", d)
	}
	if n := s.calls(); n != all {
		t.Errorf("%d steps were done, want %d", n, all)
	}
}

// Too many are not kept in memory, and are done all the same.
func TestNoMoreWaitInMemoryThanMay(t *testing.T) {
	l := &lanes{of: map[string]*destination{}}
	parked := 0
	for range laneConcurrency + parkedMost + 10 {
		switch entered, full := l.enter("dead", &broker.Delivery{}); {
		case !entered && !full:
			parked++
		}
	}
	if parked != parkedMost {
		t.Errorf("%d are parked, want %d", parked, parkedMost)
	}
	if entered, _ := l.enter("fine", &broker.Delivery{}); !entered {
		t.Error("another destination has no room")
	}
	if l.leave("dead") == nil {
		t.Error("who waits gets no place that was given back")
	}
	if entered, full := l.enter("dead", &broker.Delivery{}); entered || full {
		t.Errorf("a newcomer entered (%v) or was refused (%v) where one has left", entered, full)
	}
}

// A stoop that is stopped gives back what waits: the next one need not wait until
// the store has noticed.
func TestWhatWaitsIsGivenBackAtTheEnd(t *testing.T) {
	hang := make(chan struct{})
	s := &stub{do: func(int, *Request) (Result, error) { <-hang; return Result{}, nil }}
	e := entry("tell", Notification, s)
	e.Lane = func(jsonRaw) string { return "one" }
	broker := brokertest.New(t)
	b := newBench(t, broker, e).start()
	for range laneConcurrency + 10 {
		b.publish(b.step("tell"))
	}
	b.until("ten are parked", func() bool { return b.parked("tell") == 10 })
	time.AfterFunc(100*time.Millisecond, func() { close(hang) })
	b.stop()
	if n := s.calls(); n != laneConcurrency {
		t.Errorf("%d steps were begun, %d of them after the end", n, n-laneConcurrency)
	}
	again := &stub{}
	e = entry("tell", Notification, again)
	e.Lane = func(jsonRaw) string { return "one" }
	began := time.Now()
	b2 := newBench(t, broker, e).start()
	b2.until("they are done", func() bool { return again.calls() >= 10 })
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("they were done after %s", d)
	}
}

func (b *bench) parked(responder string) int {
	l := &b.host.responders[responder].lanes
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.parked
}

func (b *bench) until(what string, is func() bool) {
	b.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if is() {
			return
		}
	}
	b.t.Fatalf("not within 20 s: %s", what)
}
