package responders

import (
	"errors"
	"strings"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// An act that takes long is told of a pause in the middle of it, and is not gone on
// with afterwards.
func TestALongActIsToldOfAPause(t *testing.T) {
	begun := make(chan struct{})
	s := &stub{do: func(n int, r *Request) (Result, error) {
		if n > 1 {
			return Result{}, nil
		}
		close(begun)
		for end := time.Now().Add(10 * time.Second); r.Paused() == ""; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				return Result{}, errors.New("not told within 10 s")
			}
		}
		return Result{}, Retry(errors.New("ended in the middle"), 0)
	}}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	b.publish(b.step("one"))
	<-begun
	if _, err := b.host.SetPause(t.Context(), true, "somebody"); err != nil {
		t.Fatal(err)
	}
	if got := b.outcomes(1); got[0].Status != broker.Suppressed || !strings.Contains(got[0].Reason, "paused by somebody") || s.calls() != 1 {
		t.Errorf("the step came to %+v after %d tries", got[0], s.calls())
	}
}
