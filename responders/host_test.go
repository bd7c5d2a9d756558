package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/param"
)

// stub is a responder that does what a test tells it.
type stub struct {
	mu   sync.Mutex
	seen []*Request
	do   func(n int, r *Request) (Result, error) // n counts from 1
	undo func(u *UndoRequest) (Result, error)
}

func (s *stub) Act(_ context.Context, r *Request) (Result, error) {
	s.mu.Lock()
	s.seen = append(s.seen, r)
	n := len(s.seen)
	s.mu.Unlock()
	if s.do == nil {
		return Result{}, nil
	}
	return s.do(n, r)
}

func (s *stub) Undo(_ context.Context, u *UndoRequest) (Result, error) { return s.undo(u) }

func (s *stub) calls() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

func entry(name string, kind Kind, r Responder) Entry {
	return Entry{Name: name, Kind: kind, Params: param.Describe(struct{}{}), Deadline: 5 * time.Second, New: func(Env) Responder { return r }}
}

// bench is a host at work on a broker.
type bench struct {
	t      *testing.T
	broker *broker.Broker
	config Config
	host   *Host
	stop   func()
	mu     sync.Mutex
	told   []string
	n      int
}

func newBench(t *testing.T, b *broker.Broker, entries ...Entry) *bench {
	t.Helper()
	be := &bench{t: t, broker: b}
	g := *testGuards()
	g.Node = "n1"
	be.config = Config{
		Broker: b, Entries: entries, Guards: g, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Tell: func(title, detail string) {
			be.mu.Lock()
			defer be.mu.Unlock()
			be.told = append(be.told, title)
		},
	}
	return be
}

func (b *bench) start() *bench {
	b.t.Helper()
	h, err := NewHost(b.t.Context(), b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	b.host = h
	if err := h.SetRules(b.t.Context(), map[string]broker.Mode{"r": broker.Enforce}); err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	var once sync.Once
	b.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					b.t.Errorf("the host stopped with: %v", err)
				}
			case <-time.After(15 * time.Second):
				b.t.Error("the host does not stop")
			}
		})
	}
	b.t.Cleanup(b.stop)
	return b
}

// step is a new alert's, for the responders in order.
func (b *bench) step(responders ...string) *broker.Step {
	b.t.Helper()
	b.n++
	now := time.Now().UTC()
	raw := fmt.Appendf(nil, `{"hostname":"n1","priority":"Critical","rule":"R","n":%d,"time":%q,"output_fields":{"container.id":"%012x"}}`, b.n, now.Format(time.RFC3339Nano), b.n)
	a, err := alert.Parse(raw)
	if err != nil {
		b.t.Fatal(err)
	}
	s := &broker.Step{
		ID: broker.StepID(a.ID, "r", 0, ""), AlertID: a.ID, Alert: raw, Received: now, Origin: broker.OriginFIFO,
		Rule: "r", Mode: broker.Enforce, Target: a.Target(), Action: broker.Action{Responder: responders[0]},
	}
	for _, r := range responders[1:] {
		s.Remaining = append(s.Remaining, broker.Action{Responder: r})
	}
	return s
}

func (b *bench) publish(s *broker.Step) {
	b.t.Helper()
	if _, err := b.broker.PublishStep(b.t.Context(), s); err != nil {
		b.t.Fatal(err)
	}
}

// outcomes waits until n steps have ended and returns how, by step, "responder
// status" in the order of their ends.
func (b *bench) outcomes(n int) []broker.Outcome {
	b.t.Helper()
	var got []broker.Outcome
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		got = got[:0]
		if err := b.broker.Outcomes(b.t.Context(), time.Time{}, func(o broker.Outcome) error {
			if o.Status != broker.Retrying {
				got = append(got, o)
			}
			return nil
		}); err != nil {
			b.t.Fatal(err)
		}
		if len(got) >= n {
			return got
		}
	}
	b.t.Fatalf("%d outcomes within 20 s, want %d: %+v", len(got), n, got)
	return nil
}

func TestAChainGoesOn(t *testing.T) {
	first := &stub{do: func(int, *Request) (Result, error) {
		return Result{Reason: "found it", Found: map[string]string{"policy": "p"}}, nil
	}}
	second := &stub{do: func(int, *Request) (Result, error) { return Result{}, errors.New("broken") }}
	third := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, first), entry("two", Evidence, second), entry("three", Harm, third)).start()
	b.publish(b.step("one", "two", "three"))
	got := map[string]broker.Outcome{} // a step's outcome may come after that of the next one
	for _, o := range b.outcomes(3) {
		got[o.Responder] = o
	}
	for responder, want := range map[string]broker.Status{"one": broker.Done, "two": broker.Failed, "three": broker.Done} {
		if got[responder].Status != want {
			t.Errorf("%s: %s, want %s", responder, got[responder].Status, want)
		}
	}
	found := third.seen[0].Step.Found
	if len(found) != 2 || found[0].Found["policy"] != "p" || found[1].Reason != "broken" || found[1].Status != broker.Failed {
		t.Errorf("the third step was told %+v", found)
	}
	if took := got["one"].Took; took.Done < took.Requested || took.Requested == 0 {
		t.Errorf("times %+v", took)
	}
}

func TestAChainStops(t *testing.T) {
	first := &stub{do: func(int, *Request) (Result, error) { return Result{}, Refuse("not this one") }}
	second := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, first), entry("two", Harm, second)).start()
	s := b.step("one", "two", "two")
	s.OnFailure = broker.Stop
	b.publish(s)
	got := b.outcomes(3)
	if got[len(got)-1].Status != broker.Refused && got[0].Status != broker.Refused {
		t.Errorf("outcomes %+v", got)
	}
	if second.calls() != 0 {
		t.Error("the step after a refused one was done, although onFailure is stop")
	}
}

func TestAFaultThatPassesIsTriedAgain(t *testing.T) {
	s := &stub{do: func(n int, r *Request) (Result, error) {
		if n < 3 {
			return Result{}, Retry(errors.New("away"), 0)
		}
		if !r.Resumed {
			return Result{}, errors.New("a further try is not told that it is one")
		}
		return Result{}, nil
	}}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	b.publish(b.step("one"))
	if got := b.outcomes(1); got[0].Status != broker.Done || s.calls() != 3 {
		t.Errorf("%s after %d tries: %s", got[0].Status, s.calls(), got[0].Reason)
	}
}

// A process is killed after it acted, before it could say so: the next one knows
// that it was about to.
func TestACrashInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	blocked := make(chan struct{})
	release := make(chan struct{})
	first := &stub{do: func(int, *Request) (Result, error) {
		close(blocked)
		<-release
		return Result{}, errors.New("the process is gone")
	}}
	store := brokertest.Open(t, broker.Config{Dir: dir})
	b := newBench(t, store, entry("one", Harm, first)).start()
	step := b.step("one")
	b.publish(step)
	<-blocked
	image := t.TempDir() // what the disk held at that moment
	copyStore(t, dir, image)
	close(release)
	b.stop()

	second := &stub{}
	again := newBench(t, brokertest.Open(t, broker.Config{Dir: image}), entry("one", Harm, second)).start()
	got := again.outcomes(1)
	if got[0].ID != step.ID || got[0].Status != broker.Done {
		t.Errorf("outcome %+v", got[0])
	}
	if second.calls() != 1 || !second.seen[0].Resumed {
		t.Errorf("%d calls, resumed %t", second.calls(), second.calls() > 0 && second.seen[0].Resumed)
	}
}

// What was done is not done again when the same step comes once more, also after
// a restart.
func TestADoneStepIsNotDoneAgain(t *testing.T) {
	dir := t.TempDir()
	store := brokertest.Open(t, broker.Config{Dir: dir})
	b := newBench(t, store, entry("one", Harm, &stub{})).start()
	step := b.step("one")
	b.publish(step)
	b.outcomes(1)
	b.stop()
	store.Close()

	store = brokertest.Open(t, broker.Config{Dir: dir})
	again := &stub{}
	b = newBench(t, store, entry("one", Harm, again)).start()
	rec := b.host.ledger.get(step.ID)
	if rec == nil || rec.Status != broker.Done {
		t.Fatalf("the record after a restart: %+v", rec)
	}
	for _, guard := range []string{"cooldown"} {
		s := b.step("one")
		s.Target.Container = "000000000001" // the same object by another alert
		b.publish(s)
		got := b.outcomes(2)
		if o := got[len(got)-1]; o.Status != broker.Suppressed {
			t.Errorf("%s after a restart: %+v", guard, o)
		}
	}
	if again.calls() != 0 {
		t.Error("it was done again")
	}
}

func TestAHangingDestinationHoldsUpNoOther(t *testing.T) {
	hang := make(chan struct{})
	s := &stub{do: func(_ int, r *Request) (Result, error) {
		if string(r.Step.Params) == `"hang"` {
			<-hang
		}
		return Result{}, nil
	}}
	e := entry("tell", Notification, s)
	e.Lane = func(p jsonRaw) string { return string(p) }
	b := newBench(t, brokertest.New(t), e).start()
	defer close(hang)
	for range 50 {
		st := b.step("tell")
		st.Params = jsonRaw(`"hang"`)
		b.publish(st)
	}
	fine := b.step("tell")
	fine.Params = jsonRaw(`"fine"`)
	began := time.Now()
	b.publish(fine)
	if got := b.outcomes(1); got[0].ID != fine.ID {
		t.Errorf("outcome %+v", got[0])
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it waited %s behind a hanging destination", took)
	}
}

// Telling people may take for ever: the pod is deleted all the same.
func TestAKillDoesNotWaitForPeopleToBeTold(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	tell := &stub{do: func(int, *Request) (Result, error) { <-hang; return Result{}, nil }}
	kill := &stub{}
	b := newBench(t, brokertest.New(t), entry("tell", Notification, tell), entry("kill", Harm, kill)).start()
	b.config.Guards.Cooldown = 0
	b.publish(b.step("tell", "kill"))
	if got := b.outcomes(1); got[0].Responder != "kill" || got[0].Status != broker.Done {
		t.Errorf("outcome %+v", got[0])
	}
}

// Evidence that can't be had now is tried for again, and what comes after it goes
// on.
func TestAKillDoesNotWaitForEvidenceThatCantBeHad(t *testing.T) {
	keep := &stub{do: func(n int, _ *Request) (Result, error) {
		if n < 3 {
			return Result{}, Retry(errors.New("away"), time.Second)
		}
		return Result{}, nil
	}}
	kill := &stub{}
	b := newBench(t, brokertest.New(t), entry("keep", Evidence, keep), entry("kill", Harm, kill)).start()
	b.publish(b.step("keep", "kill"))
	got := b.outcomes(2)
	if got[0].Responder != "kill" || got[1].Responder != "keep" || got[1].Status != broker.Done {
		t.Errorf("outcomes %+v", got)
	}
	if kill.calls() != 1 {
		t.Errorf("the kill was done %d times", kill.calls())
	}
}

// What was done while stoop was being stopped is recorded as done.
func TestAnActThatOutlivesTheStopIsRecorded(t *testing.T) {
	dir := t.TempDir()
	store := brokertest.Open(t, broker.Config{Dir: dir})
	acting, end := make(chan struct{}), make(chan struct{})
	s := &stub{do: func(int, *Request) (Result, error) {
		close(acting)
		<-end
		return Result{Undo: jsonRaw(`{}`)}, nil
	}}
	after := &stub{}
	b := newBench(t, store, entry("one", Harm, s), entry("two", Harm, after)).start()
	step := b.step("one", "two")
	b.publish(step)
	<-acting
	stopped := make(chan struct{})
	go func() { b.stop(); close(stopped) }()
	time.Sleep(100 * time.Millisecond) // the stop is under way
	close(end)
	<-stopped
	store.Close()

	again := newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entry("one", Harm, s), entry("two", Harm, after)).start()
	for _, o := range again.outcomes(2) {
		if o.Status != broker.Done {
			t.Errorf("%s: %s (%s)", o.Responder, o.Status, o.Reason)
		}
	}
	if s.calls() != 1 || after.calls() != 1 {
		t.Errorf("acted %d and %d times", s.calls(), after.calls())
	}
	if len(again.host.undos.byID) != 1 {
		t.Error("its undo is lost")
	}
}

// A step that was begun and then ends as something else gives its place back.
func TestAStepThatIsGivenUpFreesItsObject(t *testing.T) {
	s := &stub{do: func(n int, _ *Request) (Result, error) {
		if n == 1 {
			return Result{}, Retry(errors.New("away"), 300*time.Millisecond)
		}
		return Result{}, nil
	}}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	first := b.step("one")
	b.publish(first)
	for end := time.Now().Add(10 * time.Second); s.calls() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not tried within 10 s")
		}
	}
	if _, err := b.host.SetPause(t.Context(), true, "somebody"); err != nil {
		t.Fatal(err)
	}
	if got := b.outcomes(1); got[0].Status != broker.Suppressed {
		t.Fatalf("the first: %+v", got[0])
	}
	if _, err := b.host.SetPause(t.Context(), false, "somebody"); err != nil {
		t.Fatal(err)
	}
	second := b.step("one")
	second.Target = first.Target
	b.publish(second)
	if got := b.outcomes(2); got[1].ID != second.ID || got[1].Status != broker.Done {
		t.Errorf("the second: %+v", got[1])
	}
}

// A rule that was switched to audit, or is gone, does not act on what it matched
// before.
func TestARuleSwitchedToAuditActsNoMore(t *testing.T) {
	s := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	for i, modes := range []map[string]broker.Mode{{"r": broker.Audit}, {}} {
		if err := b.host.SetRules(t.Context(), modes); err != nil {
			t.Fatal(err)
		}
		b.publish(b.step("one"))
		if got := b.outcomes(i + 1); got[i].Status != broker.Audited {
			t.Errorf("modes %v: %+v", modes, got[i])
		}
	}
	if s.calls() != 0 {
		t.Error("it acted")
	}
}

func TestPause(t *testing.T) {
	dir := t.TempDir()
	store := brokertest.Open(t, broker.Config{Dir: dir})
	s, n := &stub{}, &stub{}
	b := newBench(t, store, entry("one", Harm, s), entry("tell", Notification, n)).start()
	if _, err := b.host.SetPause(t.Context(), true, "somebody"); err != nil {
		t.Fatal(err)
	}
	early := b.step("one", "tell")
	b.publish(early)
	for _, o := range b.outcomes(2) {
		if want := map[string]broker.Status{"one": broker.Suppressed, "tell": broker.Done}[o.Responder]; o.Status != want {
			t.Errorf("while paused: %s %s, want %s", o.Responder, o.Status, want)
		}
	}
	waiting := b.step("one") // arrives while paused, comes to its turn after
	b.stop()
	store.Close()

	store = brokertest.Open(t, broker.Config{Dir: dir})
	b2 := newBench(t, store, entry("one", Harm, s), entry("tell", Notification, n)).start()
	if !b2.host.Paused().Paused {
		t.Error("the pause did not outlive a restart")
	}
	if _, err := b2.host.SetPause(t.Context(), false, "somebody"); err != nil {
		t.Fatal(err)
	}
	b2.publish(waiting)
	b2.n = 100
	b2.publish(b2.step("one"))
	status := map[broker.Status]int{}
	for _, o := range b2.outcomes(4) {
		status[o.Status]++
	}
	if status[broker.Suppressed] != 2 || status[broker.Done] != 2 || s.calls() != 1 {
		t.Errorf("after resume: %v, acted %d times", status, s.calls())
	}
}

func TestModes(t *testing.T) {
	for name, c := range map[string]struct {
		program, rule broker.Mode
		received      time.Duration // before now
		want          broker.Status
	}{
		"both enforce":           {broker.Enforce, broker.Enforce, 0, broker.Done},
		"the program audits":     {broker.Audit, broker.Enforce, 0, broker.Audited},
		"the rule audits":        {broker.Enforce, broker.Audit, 0, broker.Audited},
		"no mode at all":         {"", broker.Enforce, 0, broker.Audited},
		"stored before enforce":  {broker.Enforce, broker.Enforce, time.Minute, broker.Audited},
		"audit does not tell":    {broker.Audit, broker.Audit, 0, broker.Audited},
		"a rule without a mode ": {broker.Enforce, "", 0, broker.Audited},
	} {
		t.Run(name, func(t *testing.T) {
			s, n := &stub{}, &stub{}
			b := newBench(t, brokertest.New(t), entry("one", Harm, s), entry("tell", Notification, n))
			b.config.Guards.Mode = c.program
			b.start()
			st := b.step("one", "tell")
			st.Mode, st.Received = c.rule, st.Received.Add(-c.received)
			b.publish(st)
			got := b.outcomes(2)
			if got[0].Status != c.want || got[1].Status != c.want {
				t.Errorf("%s and %s, want %s", got[0].Status, got[1].Status, c.want)
			}
			if acted := s.calls() + n.calls(); (acted == 2) != (c.want == broker.Done) || acted == 1 {
				t.Errorf("acted %d times", acted)
			}
		})
	}
}

func TestABreakerTellsPeopleAndEvidenceGoesOn(t *testing.T) {
	s, keep := &stub{}, &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, s), entry("keep", Evidence, keep))
	b.config.Guards.Local.Rule = Rate{2, time.Minute}
	b.start()
	for range 5 {
		b.publish(b.step("one", "keep"))
	}
	b.outcomes(10)
	if s.calls() != 2 || keep.calls() != 5 {
		t.Errorf("%d harmful steps and %d of evidence, want 2 and 5", s.calls(), keep.calls())
	}
	b.stop()
	if len(b.told) != 1 || b.told[0] != "breaker opened" {
		t.Errorf("people were told %q", b.told)
	}
}

// A step that failed in part is taken back for that part.
func TestUndoOfAStepThatFailedInPart(t *testing.T) {
	s := &stub{do: func(int, *Request) (Result, error) {
		return Result{Undo: jsonRaw(`{"was":"so"}`)}, errors.New("the rest can't be done")
	}}
	s.undo = func(*UndoRequest) (Result, error) { return Result{}, nil }
	b := newBench(t, brokertest.New(t), entry("one", Harm, s)).start()
	step := b.step("one")
	b.publish(step)
	if got := b.outcomes(1); got[0].Status != broker.Failed || !got[0].Undo || got[0].Reason != "the rest can't be done" {
		t.Errorf("the outcome is %+v", got[0])
	}
	if o, err := b.host.Undo(t.Context(), step.ID, "somebody"); err != nil || o.Status != broker.Undone {
		t.Errorf("undo: %+v, %v", o, err)
	}
}

func TestUndoAndTTL(t *testing.T) {
	dir := t.TempDir()
	store := brokertest.Open(t, broker.Config{Dir: dir})
	ttl := time.Duration(0)
	s := &stub{do: func(int, *Request) (Result, error) {
		return Result{Undo: jsonRaw(`{"was":"so"}`), TTL: ttl}, nil
	}}
	undone := make(chan *UndoRequest, 10)
	s.undo = func(u *UndoRequest) (Result, error) { undone <- u; return Result{}, nil }
	b := newBench(t, store, entry("one", Harm, s)).start()
	step := b.step("one")
	b.publish(step)
	if got := b.outcomes(1); !got[0].Undo {
		t.Errorf("outcome %+v says nothing of undo", got[0])
	}
	for i, want := range []broker.Status{broker.Undone, broker.Nothing} {
		o, err := b.host.Undo(t.Context(), step.ID, "somebody")
		if err != nil || o.Status != want || o.Actor != "somebody" {
			t.Errorf("undo %d: %+v, %v", i, o, err)
		}
	}
	if u := <-undone; string(u.Record) != `{"was":"so"}` || len(undone) != 0 {
		t.Errorf("undone with %s, and %d times more", u.Record, len(undone))
	}
	if _, err := b.host.Undo(t.Context(), "nonsense", "somebody"); !errors.Is(err, ErrNoUndo) {
		t.Errorf("undo of nonsense: %v", err)
	}

	// A ttl that falls due while nobody runs.
	ttl = 2 * time.Second
	b.publish(b.step("one"))
	b.outcomes(3)
	b.stop()
	store.Close()
	select {
	case <-undone:
		t.Fatal("taken back before its ttl was over")
	case <-time.After(ttl):
	}
	newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entry("one", Harm, s)).start()
	select {
	case u := <-undone:
		if u.Actor != "ttl" {
			t.Errorf("by %s", u.Actor)
		}
	case <-time.After(20 * time.Second):
		t.Error("a ttl that was over at the start was not carried out")
	}
}

type jsonRaw = json.RawMessage

// copyStore copies the data folder of a running broker, as a power cut would
// leave it.
func copyStore(t *testing.T, from, to string) {
	t.Helper()
	var err error
	for range 5 { // files come and go while it runs
		if err = os.CopyFS(to, os.DirFS(from)); err == nil {
			return
		}
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal(err)
}

// A step that can't be stored for its size ends as failed: nothing makes it smaller.
func TestAStepThatIsTooLargeEnds(t *testing.T) {
	one := &stub{do: func(int, *Request) (Result, error) {
		return Result{Found: map[string]string{"much": strings.Repeat("x", 5<<20)}}, nil
	}}
	two := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Evidence, one), entry("two", Evidence, two)).start()
	s := b.step("one", "two")
	b.publish(s)
	// The first one's own outcome is too large as well, and only logged.
	if o := b.outcomes(1)[0]; o.Responder != "two" || o.Status != broker.Failed || !strings.Contains(o.Reason, "too large") {
		t.Errorf("outcome %.300v", o)
	}
	for end := time.Now().Add(10 * time.Second); b.broker.Waiting("one")+b.broker.Waiting("two") > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d and %d steps wait for ever", b.broker.Waiting("one"), b.broker.Waiting("two"))
		}
	}
	if one.calls() != 1 || two.calls() != 0 {
		t.Errorf("done %d and %d times", one.calls(), two.calls())
	}
}
