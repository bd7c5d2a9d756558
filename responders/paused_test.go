package responders

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

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

// What the annotation says holds for whoever asks from the moment that it is seen,
// and not only when it was followed, which the store may hold up.
func TestWhatIsSeenOfTheClusterHoldsAtOnce(t *testing.T) {
	p := &ClusterPause{ClusterPauseConfig: ClusterPauseConfig{Namespace: "stoop", Log: slog.New(slog.DiscardHandler)}, changed: make(chan struct{})}
	b := newBench(t, brokertest.New(t))
	b.config.Cluster = p
	h, err := NewHost(t.Context(), b.config) // nobody follows
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{}
	p.see(ns)
	if why := h.stopped(); why != "" {
		t.Errorf("paused: %s", why)
	}
	before := &broker.Step{Received: time.Now()}
	ns.Annotations = map[string]string{pauseAnnotation: "ann"}
	p.see(ns)
	if why := h.stopped(); !strings.Contains(why, "ann") {
		t.Errorf("not paused: %q", why)
	}
	ns.Annotations = nil
	p.see(ns)
	if why := h.paused(before); !strings.Contains(why, "while every node") {
		t.Errorf("what came before the end of the pause is not held back: %q", why)
	}
}
