package responders

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A process is killed between an act and the record of how it is taken back. What
// the responder said beforehand is known to the next run, and is enough to take
// the step back even if that run never comes.
func TestTheUndoOfAnActThatACrashCutOff(t *testing.T) {
	dir := t.TempDir()
	blocked, release := make(chan struct{}), make(chan struct{})
	first := &stub{do: func(_ int, r *Request) (Result, error) {
		r.Intend(jsonRaw(`{"was":"so"}`), time.Hour)
		close(blocked) // it acts
		<-release
		return Result{}, errors.New("the process is gone")
	}}
	b := newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entry("one", Harm, first)).start()
	step := b.step("one")
	b.publish(step)
	<-blocked
	images := []string{t.TempDir(), t.TempDir()} // what the disk held at that moment
	for _, image := range images {
		copyStore(t, dir, image)
	}
	close(release)
	b.outcomes(1)
	if _, err := b.host.Undo(t.Context(), step.ID, "somebody"); !errors.Is(err, ErrNoUndo) {
		t.Errorf("the first try failed, so nothing was done; undo says %v", err)
	}
	b.stop()

	second := &stub{do: func(_ int, r *Request) (Result, error) {
		return Result{Undo: r.Intended, TTL: time.Hour}, nil
	}}
	again := newBench(t, brokertest.Open(t, broker.Config{Dir: images[0]}), entry("one", Harm, second)).start()
	if got := again.outcomes(1); got[0].Status != broker.Done || !got[0].Undo {
		t.Errorf("outcome %+v", got[0])
	}
	if got := string(second.seen[0].Intended); got != `{"was":"so"}` {
		t.Errorf("the second run is told %q", got)
	}

	// The second run ends before it acts.
	third := &stub{}
	third.undo = func(u *UndoRequest) (Result, error) {
		if string(u.Record) != `{"was":"so"}` {
			t.Errorf("record %s", u.Record)
		}
		return Result{}, nil
	}
	given := newBench(t, brokertest.Open(t, broker.Config{Dir: images[1]}), entry("one", Harm, third))
	given.config.Guards.MaxAge = time.Nanosecond
	given.start()
	if got := given.outcomes(1); got[0].Status != broker.Expired || !got[0].Undo || !strings.Contains(got[0].Reason, "stoop undo") {
		t.Errorf("outcome %+v", got[0])
	}
	if o, err := given.host.Undo(t.Context(), step.ID, "somebody"); err != nil || o.Status != broker.Undone {
		t.Errorf("undo: %+v, %v", o, err)
	}
}

// A ttl that can't be carried out is tried for ever, but told once as long as the
// reason is the same.
func TestATTLThatCantBeCarriedOutIsToldOnce(t *testing.T) {
	s := &stub{do: func(int, *Request) (Result, error) {
		return Result{Undo: jsonRaw(`{}`), TTL: time.Millisecond}, nil
	}}
	tries, reason := make(chan string), "you may not"
	s.undo = func(*UndoRequest) (Result, error) {
		why := <-tries
		if why == "" {
			return Result{}, nil
		}
		return Result{}, Refuse("%s", why)
	}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	step := b.step("one")
	b.publish(step)
	due := func(after int) { // the next try comes at once
		t.Helper()
		u := b.host.undos
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			u.mu.Lock()
			r := u.byID[step.ID]
			over := r.attempts == after
			if over {
				r.Due = time.Now()
			}
			u.mu.Unlock()
			if over {
				select {
				case u.wake <- struct{}{}:
				default: // it has been woken already
				}
				return
			}
		}
		t.Fatalf("try %d does not end", after)
	}
	for i, why := range []string{reason, reason, reason, "you may not still", "you may not still", ""} {
		if i > 0 {
			due(i)
		}
		select {
		case tries <- why:
		case <-time.After(20 * time.Second):
			t.Fatalf("try %d does not come", i+1)
		}
	}
	got := b.outcomes(4)
	var said []string
	for _, o := range got {
		said = append(said, fmt.Sprint(o.Status, " ", o.Reason))
	}
	want := []string{"done ", "failed take back: you may not", "failed take back: you may not still", "undone "}
	if strings.Join(said, "|") != strings.Join(want, "|") {
		t.Errorf("outcomes %q, want %q", said, want)
	}
}

// The tries come ever less often, up to five minutes apart, and each hour people
// are told again.
func TestHowOftenATTLIsTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &undos{byID: map[string]*undo{"a": {}}}
		began, told, tries := time.Now(), 0, 0
		for time.Since(began) < 3*time.Hour {
			_, news := u.failed("a", os.ErrPermission, time.Now())
			if news {
				told++
			}
			tries++
			wait := time.Until(u.byID["a"].Due)
			if wait <= 0 || wait > undoMost+undoMost/5 {
				t.Fatalf("try %d is followed by the next after %s", tries, wait)
			}
			if tries > 10 && wait < undoMost-undoMost/5 {
				t.Errorf("try %d is followed by the next after only %s", tries, wait)
			}
			time.Sleep(wait)
		}
		if told != 3 || tries < 30 || tries > 60 {
			t.Errorf("told %d times of %d tries in 3 hours", told, tries)
		}
	})
}
