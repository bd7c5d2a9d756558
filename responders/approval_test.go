package responders

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
)

// asking is a step that waits for approval.
func (b *bench) asking(responders ...string) *broker.Step {
	s := b.step(responders...)
	s.Approve = new(true)
	return s
}

// waits waits until a step does.
func (b *bench) waits(id string) Approval {
	b.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		for _, a := range b.host.Approvals() {
			if a.ID == id {
				return a
			}
		}
	}
	b.t.Fatalf("step %s does not wait for approval", id)
	return Approval{}
}

// ends are the outcomes but for those that say that a step waits.
func (b *bench) ends(n int) map[string]broker.Outcome {
	b.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; {
		got := map[string]broker.Outcome{}
		for _, o := range b.outcomes(n) {
			if o.Status != broker.AwaitingApproval {
				got[o.ID] = o
			}
		}
		if len(got) >= n {
			return got
		}
		if time.Now().After(end) {
			b.t.Fatalf("waited in vain for %d ends: %+v", n, got)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// A step waits with its chain, over a restart, and is done when somebody says so.
func TestAStepThatWaitsIsDoneWhenApproved(t *testing.T) {
	dir := t.TempDir()
	one, two := &stub{do: func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{}`)}, nil }}, &stub{}
	entries := []Entry{entry("one", Harm, one), entry("two", Evidence, two)}
	b := newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entries...).start()
	s := b.asking("one", "two")
	s.Params = jsonRaw(`{"hard":true}`)
	b.publish(s)
	a := b.waits(s.ID)
	if a.Rule != "r" || a.Responder != "one" || string(a.Params) != `{"hard":true}` || string(a.Alert) != string(s.Alert) ||
		a.Target.Container != s.Target.Container || a.Expires.Sub(a.Asked) != time.Hour {
		t.Errorf("what is shown to who decides: %+v", a)
	}
	if o := b.outcomes(1)[0]; o.Status != broker.AwaitingApproval || o.ID != s.ID || !strings.Contains(o.Reason, "stoop approve "+s.ID) {
		t.Errorf("outcome %+v", o)
	}
	b.stop()

	b.start()
	b.waits(s.ID)
	if one.calls() != 0 || two.calls() != 0 {
		t.Fatal("it was done before anybody said so")
	}
	if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); err != nil {
		t.Fatal(err)
	}
	got := b.ends(2)
	if o := got[s.ID]; o.Status != broker.Done || o.Actor != "somebody" || !o.Undo {
		t.Errorf("outcome %+v", o)
	}
	if next := got[s.Next().ID]; next.Status != broker.Done || next.Actor != "" {
		t.Errorf("the next step's outcome %+v", next)
	}
	if one.calls() != 1 || two.calls() != 1 {
		t.Errorf("done %d and %d times", one.calls(), two.calls())
	}
	if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); !errors.Is(err, ErrNoApproval) {
		t.Errorf("approved once more: %v", err)
	}
	if _, err := b.host.Deny(t.Context(), s.ID, "somebody"); !errors.Is(err, ErrNoApproval) {
		t.Errorf("denied when it was approved: %v", err)
	}
	b.stop()
	if told := strings.Join(b.told, " "); strings.Count(told, "waits for approval") != 1 {
		t.Errorf("people were told %q", told)
	}
}

// Denied, or left alone for too long, a step is not done, and its chain goes on as
// its onFailure says.
func TestAStepThatIsNotApproved(t *testing.T) {
	for name, c := range map[string]struct {
		wait      time.Duration
		onFailure broker.OnFailure
		status    broker.Status
		next      broker.Status
	}{
		"denied":              {time.Hour, broker.Continue, broker.Denied, broker.Done},
		"denied, and stops":   {time.Hour, broker.Stop, broker.Denied, broker.Suppressed},
		"too late":            {50 * time.Millisecond, broker.Continue, broker.Expired, broker.Done},
		"too late, and stops": {50 * time.Millisecond, broker.Stop, broker.Expired, broker.Suppressed},
	} {
		t.Run(name, func(t *testing.T) {
			one, two := &stub{}, &stub{}
			b := newBench(t, brokertest.New(t), entry("one", Harm, one), entry("two", Evidence, two))
			b.config.Guards.Approval = c.wait
			b.start()
			s := b.asking("one", "two")
			s.OnFailure = c.onFailure
			b.publish(s)
			actor := ""
			if c.status == broker.Denied {
				actor = "somebody"
				b.waits(s.ID)
				if _, err := b.host.Deny(t.Context(), s.ID, actor); err != nil {
					t.Fatal(err)
				}
			}
			got := b.ends(2)
			if o := got[s.ID]; o.Status != c.status || o.Actor != actor {
				t.Errorf("outcome %+v", o)
			}
			if o := got[s.Next().ID]; o.Status != c.next {
				t.Errorf("the next step's outcome %+v", o)
			}
			if one.calls() != 0 {
				t.Error("it was done")
			}
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
				_, err := b.host.Approve(t.Context(), s.ID, "somebody")
				if errors.Is(err, ErrNoApproval) {
					break
				}
				// Its outcome is told a moment before it is forgotten.
				if err == nil || time.Now().After(end) {
					t.Fatalf("approved afterwards: %v", err)
				}
			}
		})
	}
}

// What was stored while stoop was down and is too old by then is not done either.
func TestAnApprovalExpiresWhileStoopIsDown(t *testing.T) {
	one := &stub{}
	b := newBench(t, brokertest.Open(t, broker.Config{Dir: t.TempDir()}), entry("one", Harm, one))
	b.start()
	s := b.asking("one")
	b.publish(s)
	b.waits(s.ID)
	b.host.approvals.mu.Lock()
	rec := *b.host.approvals.byID[s.ID]
	b.host.approvals.mu.Unlock()
	b.stop()
	rec.Expires = time.Now().Add(-time.Second)
	if err := b.broker.State().Put(t.Context(), "approval."+s.ID, rec, 0); err != nil {
		t.Fatal(err)
	}
	b.start()
	if o := b.ends(1)[s.ID]; o.Status != broker.Expired || one.calls() != 0 {
		t.Errorf("outcome %+v, done %d times", o, one.calls())
	}
}

// One person decides about one thing: a storm of alerts about it asks once.
func TestASecondStepAboutTheSameIsNotAskedFor(t *testing.T) {
	one := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, one)).start()
	first := b.asking("one")
	b.publish(first)
	b.waits(first.ID)
	second := b.asking("one")
	second.Target.Container = first.Target.Container
	b.publish(second)
	if o := b.ends(1)[second.ID]; o.Status != broker.Suppressed || !strings.Contains(o.Reason, first.ID) {
		t.Errorf("outcome %+v", o)
	}
	other := b.asking("one")
	b.publish(other)
	b.waits(other.ID)
	if _, err := b.host.Approve(t.Context(), first.ID, "somebody"); err != nil {
		t.Fatal(err)
	}
	b.ends(2)
	again := b.asking("one") // in the cooldown
	again.Target.Container = first.Target.Container
	b.publish(again)
	if o := b.ends(3)[again.ID]; o.Status != broker.Suppressed || !strings.Contains(o.Reason, "cooldown") {
		t.Errorf("outcome %+v", o)
	}
}

// Nobody decides about thousands.
func TestSoManyWaitAndNoMore(t *testing.T) {
	b := newBench(t, brokertest.New(t), entry("one", Harm, &stub{}))
	b.config.Tell = func(string, string) {}
	b.start()
	for range approvalsMax {
		b.publish(b.asking("one"))
	}
	for end := time.Now().Add(20 * time.Second); len(b.host.Approvals()) < approvalsMax; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("only %d wait", len(b.host.Approvals()))
		}
	}
	one := b.asking("one")
	b.publish(one)
	if o := b.ends(1)[one.ID]; o.Status != broker.Suppressed {
		t.Errorf("outcome %+v", o)
	}
}

// Disposable pods, or alerts of little weight, can't keep people from being asked about
// what matters.
func TestNobodyTakesAllThePlacesOfThoseThatWait(t *testing.T) {
	waiting := func(n int, namespace string, urgent bool) *approvals {
		a := &approvals{byID: map[string]*approval{}, busy: map[string]bool{}}
		for i := range n {
			s := &broker.Step{ID: fmt.Sprint(i)}
			s.Target.Namespace = namespace
			a.byID[s.ID] = &approval{Step: s, About: s.ID, Urgent: urgent}
		}
		return a
	}
	for name, c := range map[string]struct {
		a         *approvals
		namespace string
		urgent    bool
		refused   string
	}{
		"half are of the namespace":            {waiting(approvalsMax/2, "x", true), "x", true, "namespace x"},
		"half are of another":                  {waiting(approvalsMax/2, "x", true), "y", true, ""},
		"of no namespace":                      {waiting(approvalsMax/2, "", true), "", true, ""},
		"three quarters are below Critical":    {waiting(approvalsMax*3/4, "", false), "y", false, "below Critical"},
		"and this one is Critical":             {waiting(approvalsMax*3/4, "", false), "y", true, ""},
		"all, and nobody has a reserve beyond": {waiting(approvalsMax, "", true), "y", true, "500 steps wait"},
	} {
		s := &broker.Step{ID: "new"}
		s.Target.Namespace = c.namespace
		got := c.a.add(&approval{Step: s, About: "new", Urgent: c.urgent})
		if (got == "") != (c.refused == "") || !strings.Contains(got, c.refused) {
			t.Errorf("%s: %q", name, got)
		}
	}
	s := &broker.Step{ID: "new"}
	s.Target.Resource = &alert.Resource{Resource: "secrets", Namespace: "x"}
	if got := waiting(approvalsMax/2, "x", true).add(&approval{Step: s, About: "new", Urgent: true}); got == "" {
		t.Error("an object of the namespace is asked about")
	}
}

// Who decides is shown what is acted on, which is not always what raised the alert.
func TestAnApprovalNamesTheNode(t *testing.T) {
	e := entry("one", Harm, &stub{})
	e.Object = NodeObject
	b := newBench(t, brokertest.New(t), e)
	b.config.Env.Node, b.config.Env.Kube, b.config.Pods = "n1", &Kube{}, &Pods{} // so that there is a cluster
	told := make(chan string, 1)
	b.config.Tell = func(_, detail string) { told <- detail }
	b.start()
	s := b.asking("one")
	s.Target.Namespace, s.Target.Pod = "shop", "web-0"
	b.publish(s)
	if a := b.waits(s.ID); a.Object != "node n1" {
		t.Errorf("%+v", a)
	}
	if got := <-told; !strings.Contains(got, "wants one of node n1 (after an alert of pod shop/web-0)") {
		t.Errorf("people were told %q", got)
	}
}

// What only counts does not hold back what a person has decided, nor does the
// alert's age. It is counted all the same.
func TestWhatHoldsBackAnApprovedStep(t *testing.T) {
	one := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, one))
	b.config.Guards.Local = Limits{Rule: Rate{2, time.Hour}}
	b.config.Guards.MaxAge = time.Second
	b.start()
	s := b.asking("one")
	b.publish(s)
	b.waits(s.ID)
	for range 2 {
		b.publish(b.step("one"))
	}
	b.ends(2)
	full := b.step("one")
	b.publish(full)
	if o := b.ends(3)[full.ID]; o.Status != broker.Suppressed {
		t.Fatalf("the limit does not hold: %+v", o)
	}
	time.Sleep(time.Until(s.Received.Add(b.config.Guards.MaxAge + 100*time.Millisecond))) // until the alert is too old
	if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); err != nil {
		t.Fatal(err)
	}
	if o := b.ends(4)[s.ID]; o.Status != broker.Done {
		t.Errorf("outcome %+v", o)
	}
	b.host.ledger.mu.Lock()
	n := b.host.ledger.count((&act{Rule: "r", Local: true}).ruleKey(), time.Now(), time.Hour)
	b.host.ledger.mu.Unlock()
	if n != 3 {
		t.Errorf("%d steps are counted, want 3", n)
	}
}

// A pause and a protected namespace hold back what a person has approved as well,
// and so does the rule's end.
func TestWhatAnApprovalCannotDo(t *testing.T) {
	one := &stub{}
	b := newBench(t, brokertest.New(t), entry("one", Harm, one)).start()
	s, late := b.asking("one"), b.asking("one")
	b.publish(s)
	b.publish(late)
	b.waits(s.ID)
	b.waits(late.ID)
	if _, err := b.host.SetPause(t.Context(), true, "a colleague"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); err == nil || !strings.Contains(err.Error(), "a colleague") {
		t.Errorf("approved in a pause: %v", err)
	}
	if _, err := b.host.SetPause(t.Context(), false, "a colleague"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); err != nil {
		t.Fatal(err)
	}
	if o := b.ends(1)[s.ID]; o.Status != broker.Done {
		t.Errorf("approved after the pause: %+v", o)
	}
	if err := b.host.SetRules(t.Context(), map[string]broker.Mode{"r": broker.Audit}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.host.Approve(t.Context(), late.ID, "somebody"); err != nil {
		t.Fatal(err)
	}
	if o := b.ends(2)[late.ID]; o.Status != broker.Audited || one.calls() != 1 {
		t.Errorf("approved when the rule is in audit mode: %+v", o)
	}

	b = newBench(t, brokertest.New(t), entry("one", Harm, one))
	b.config.Guards.Namespaces = []string{"vital"}
	b.start()
	s = b.asking("one")
	s.Target.Namespace = "vital"
	b.publish(s)
	if o := b.ends(1)[s.ID]; o.Status != broker.Suppressed {
		t.Errorf("nobody is asked about what is protected: %+v", o)
	}
}

// Nobody is asked about what would not be done.
func TestNobodyIsAskedInAuditMode(t *testing.T) {
	for _, kind := range []Kind{Harm, Evidence, Notification} {
		one := &stub{}
		b := newBench(t, brokertest.New(t), entry("one", kind, one))
		b.config.Guards.Mode = broker.Audit
		b.start()
		s := b.asking("one")
		b.publish(s)
		if o := b.ends(1)[s.ID]; o.Status != broker.Audited || len(b.host.Approvals()) != 0 {
			t.Errorf("%s: outcome %+v", kind, o)
		}
	}
}

// Whatever the kind of a step, it and those after it wait.
func TestStepsOfAnyKindWait(t *testing.T) {
	for _, kind := range []Kind{Harm, Evidence, Notification} {
		one, two := &stub{}, &stub{}
		b := newBench(t, brokertest.New(t), entry("one", kind, one), entry("two", Evidence, two)).start()
		s := b.asking("one", "two")
		b.publish(s)
		b.waits(s.ID)
		if one.calls()+two.calls() != 0 {
			t.Errorf("%s: it did not wait", kind)
		}
		if _, err := b.host.Approve(t.Context(), s.ID, "somebody"); err != nil {
			t.Fatal(err)
		}
		if got := b.ends(2); got[s.ID].Status != broker.Done || one.calls() != 1 || two.calls() != 1 {
			t.Errorf("%s: outcomes %+v", kind, got)
		}
	}
}

// Some responders ask where the rule says nothing, and only there.
func TestWhoAsksByDefault(t *testing.T) {
	one := &stub{}
	e := entry("one", Harm, one)
	e.Approve = func(params jsonRaw) bool { return string(params) == `"much"` }
	b := newBench(t, brokertest.New(t), e).start()
	much, little, told := b.step("one"), b.step("one"), b.step("one")
	much.Params, told.Params, told.Approve = jsonRaw(`"much"`), jsonRaw(`"much"`), new(false)
	for _, s := range []*broker.Step{much, little, told} {
		b.publish(s)
	}
	got := b.ends(2)
	if got[little.ID].Status != broker.Done || got[told.ID].Status != broker.Done {
		t.Errorf("outcomes %+v", got)
	}
	b.waits(much.ID)
}

// stoop is killed when the approved step is stored and the end of the wait is not.
func TestAnApprovalThatACrashCutOff(t *testing.T) {
	dir, image := t.TempDir(), t.TempDir()
	b := newBench(t, brokertest.Open(t, broker.Config{Dir: dir}), entry("one", Harm, &stub{})).start()
	s := b.asking("one")
	b.publish(s)
	b.waits(s.ID)
	b.outcomes(1)
	b.stop()
	approved := *s
	approved.Approved = &broker.Approval{Actor: "somebody", Time: time.Now().UTC()}
	if stored, err := b.broker.PublishStep(t.Context(), &approved); err != nil || !stored {
		t.Fatalf("stored %t, error %v", stored, err)
	}
	copyStore(t, dir, image)

	one := &stub{}
	again := newBench(t, brokertest.Open(t, broker.Config{Dir: image}), entry("one", Harm, one)).start()
	if o := again.ends(1)[s.ID]; o.Status != broker.Done || o.Actor != "somebody" {
		t.Errorf("outcome %+v", o)
	}
	if len(again.host.Approvals()) != 0 || one.calls() != 1 {
		t.Errorf("%d wait, done %d times", len(again.host.Approvals()), one.calls())
	}
}
