package cli

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/pipe"
)

// arrivals are n alerts, of which no two calls return the same.
func arrivals(t *testing.T, from, n int) []pipe.Arrival {
	t.Helper()
	out := make([]pipe.Arrival, n)
	for i := range out {
		a, err := alert.Parse(fmt.Appendf(nil, `{"priority":"Warning","rule":"Shell in a pod","n":%d}`, from+i))
		if err != nil {
			t.Fatal(err)
		}
		out[i] = pipe.Arrival{Alert: a, Received: time.Now(), Origin: broker.OriginFIFO}
	}
	return out
}

// What a store said it had taken is among what it hands on when it is left.
func TestAStoreThatIsLeftTakesNothingMore(t *testing.T) {
	for round := range 10 {
		b := brokertest.New(t)
		sw := newStoreSwitch()
		sw.use(b)
		var taken atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for from := 0; ctx.Err() == nil; from += 200 {
				n, _ := sw.Store(ctx, arrivals(t, from, 200))
				taken.Add(int64(n))
			}
		}()
		for taken.Load() < 1000 {
			time.Sleep(time.Millisecond)
		}
		sw.use(nil)
		handed, err := b.UnroutedAlerts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		<-ended
		if n := taken.Load(); int64(len(handed)) < n {
			t.Fatalf("round %d: %d alerts are stored, and %d were handed on", round, n, len(handed))
		}
	}
}

// What waits for room in a store that is left goes to the next one at once.
func TestNobodyWaitsForRoomInAStoreThatIsLeft(t *testing.T) {
	b, next := brokertest.New(t), brokertest.New(t)
	sw := newStoreSwitch()
	sw.use(b)
	// No router is there: it fills up.
	full, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		for from := 0; ; from += 500 {
			if n, err := sw.Store(full, arrivals(t, from, 500)); err != nil || n < 500 {
				done <- err
				return
			}
		}
	}()
	for was := int64(-1); b.Unrouted() == 0 || b.Unrouted() > was; time.Sleep(200 * time.Millisecond) {
		was = b.Unrouted()
	}
	began := time.Now()
	sw.use(nil)
	sw.use(next)
	if err := <-done; err == nil {
		t.Error("a full store took more")
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("it was waited for room for %s", d)
	}
}
