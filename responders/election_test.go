package responders_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/param"
	"stoop/responders"
)

const (
	testBeat  = 20 * time.Millisecond
	testTerm  = 400 * time.Millisecond
	testLasts = 800 * time.Millisecond
)

// electing is one that takes part through f.
func electing(t testing.TB, f *flaky, name string) (e *responders.Election, stop func()) {
	t.Helper()
	f.qps = -1
	e = responders.NewElection(responders.ElectionConfig{
		Kube: f.kube(), Namespace: "stoop", Name: name, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	e.SetPace(testBeat, testTerm, testLasts)
	return e, runs(t, func(ctx context.Context) error { e.Run(ctx); return nil })
}

func leads(e *responders.Election) bool {
	term, _ := e.Turn()
	return term != nil
}

func away(w http.ResponseWriter, _ *http.Request) bool {
	w.WriteHeader(http.StatusServiceUnavailable)
	return false
}

// One has the turn; when it ends in order the next has it at once, and when it is
// cut off, after its time, and never both.
func TestElection(t *testing.T) {
	one := newFlaky(t)
	two := flakyFor(t, one.Server)
	a, _ := electing(t, one, "a")
	until(t, "the first leads", func() bool { return leads(a) })
	b, stopB := electing(t, two, "b")
	until(t, "the second stands by", func() bool {
		_, why := b.Turn()
		return strings.Contains(why, `"a_`)
	})

	both := make(chan struct{})
	watching, stop := context.WithCancel(t.Context())
	go func() {
		defer close(both)
		for watching.Err() == nil {
			// The one that loses it is asked last: it may not lead after the other does.
			if leads(b) && leads(a) {
				t.Error("both lead")
				return
			}
		}
	}()
	term, _ := a.Turn()
	one.setHook(away)
	cut := time.Now()
	until(t, "the second leads", func() bool { return leads(b) })
	if took := time.Since(cut); took < testTerm {
		t.Errorf("it led after %s", took)
	}
	if term.Err() == nil || leads(a) {
		t.Error("the first one's turn goes on")
	}
	one.setHook(nil)
	stop()
	<-both
	until(t, "the first sees who leads", func() bool {
		_, why := a.Turn()
		return strings.Contains(why, `"b_`)
	})
	stopB()
	given := time.Now()
	until(t, "the first leads again", func() bool { return leads(a) })
	if took := time.Since(given); took > testLasts/2 {
		t.Errorf("what was given back was had after %s", took)
	}
}

// A turn is over when the Lease was not renewed for so long, also for a process that
// slept and has not noticed; and when the Lease is another's.
func TestATurnEnds(t *testing.T) {
	f := newFlaky(t)
	e, stop := electing(t, f, "a")
	until(t, "it leads", func() bool { return leads(e) })
	stop()
	if leads(e) {
		t.Error("it leads after its end")
	}

	e, _ = electing(t, f, "a")
	until(t, "it leads", func() bool { return leads(e) })
	f.setHook(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return false })
	e.Age(testTerm)
	if leads(e) {
		t.Error("it leads with a lease that was not renewed")
	}
	f.setHook(nil)
	until(t, "it leads again", func() bool { return leads(e) })

	c := f.Config()
	c.Host = f.http.URL
	c.Insecure, c.QPS = true, -1
	leases := dynamic.NewForConfigOrDie(c).Resource(schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}).Namespace("stoop")
	term, _ := e.Turn()
	for {
		l, err := leases.Get(t.Context(), "stoop-audit-events", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := unstructured.SetNestedField(l.Object, "eve", "spec", "holderIdentity"); err != nil {
			t.Fatal(err)
		}
		if _, err = leases.Update(t.Context(), l, metav1.UpdateOptions{}); err == nil {
			break
		}
	}
	select {
	case <-term.Done():
	case <-time.After(testTerm / 2):
		t.Error("its turn goes on with another's lease")
	}
}

// Two processes of one name are two: one that was started anew does not know what the
// one before it has under way.
func TestElectionOfOneName(t *testing.T) {
	f := newFlaky(t)
	a, _ := electing(t, f, "a")
	until(t, "it leads", func() bool { return leads(a) })
	b, _ := electing(t, f, "a")
	until(t, "the second has looked", func() bool { _, why := b.Turn(); return strings.Contains(why, "answers them") })
	if leads(b) {
		t.Error("both lead")
	}
}

func TestElectionForbidden(t *testing.T) {
	f := newFlaky(t)
	f.Forbid(t, "create", "", "leases")
	e, _ := electing(t, f, "a")
	until(t, "it says what is missing", func() bool {
		_, why := e.Turn()
		return strings.Contains(why, "may not create leases.coordination.k8s.io")
	})
}

// audited makes a step's alert an audit event, of another host.
func audited(a map[string]any) {
	a["source"], a["hostname"] = "k8s_audit", "falco-k8saudit-0"
	a["output_fields"] = map[string]any{"ka.target.resource": "secrets", "ka.target.name": "x"}
}

// What comes to a standby is done if it becomes its turn in time, and then once.
func TestAStandbyHoldsWhatItGets(t *testing.T) {
	one := newFlaky(t)
	two := flakyFor(t, one.Server)
	a, _ := electing(t, one, "a")
	until(t, "the first leads", func() bool { return leads(a) })
	b, _ := electing(t, two, "b")
	leader := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Guards.Audit = a })
	standby := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Guards.Audit = b })

	leader.want(leader.step(audited), broker.Done)
	held := standby.step(audited)
	if _, err := standby.broker.PublishStep(t.Context(), held); err != nil {
		t.Fatal(err)
	}
	old := standby.step(audited, func(a map[string]any) {
		a["time"] = time.Now().Add(-10*time.Minute + 300*time.Millisecond).UTC().Format(time.RFC3339Nano)
	})
	standby.want(old, broker.Suppressed, "another stoop had to answer", `"a_`, "guard.maxAge")
	if standby.done(held.ID) > 0 {
		t.Fatal("a standby acted")
	}
	one.setHook(away)
	if o := standby.outcome(held); o.Status != broker.Done || standby.done(held.ID) != 1 {
		t.Errorf("it came to %s (%s), done %d times", o.Status, o.Reason, standby.done(held.ID))
	}
	if late := leader.step(audited); true {
		if _, err := leader.broker.PublishStep(t.Context(), late); err != nil {
			t.Fatal(err)
		}
		standby.want(standby.step(audited), broker.Done)
		if leader.done(late.ID) > 0 {
			t.Error("one that lost its turn acted")
		}
	}
}

// An act ends with the turn that it began in.
func TestAnActEndsWithItsTurn(t *testing.T) {
	f := newFlaky(t)
	e, _ := electing(t, f, "a")
	until(t, "it leads", func() bool { return leads(e) })
	began, ended := make(chan struct{}), make(chan error, 1)
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) {
		c.Guards.Audit = e
		c.Entries = []responders.Entry{{
			Name: "count", Kind: responders.Harm, Params: param.Describe(struct{}{}), Deadline: time.Minute,
			New: func(responders.Env) responders.Responder {
				return act(func(ctx context.Context) error {
					close(began)
					<-ctx.Done()
					ended <- ctx.Err()
					return ctx.Err()
				})
			},
		}}
	})
	if _, err := d.broker.PublishStep(t.Context(), d.step(audited)); err != nil {
		t.Fatal(err)
	}
	<-began
	f.setHook(away)
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
}

type act func(context.Context) error

func (f act) Act(ctx context.Context, _ *responders.Request) (responders.Result, error) {
	return responders.Result{}, f(ctx)
}

// turns gives the turn as often as it is told to.
type turns struct{ left chan struct{} }

func (t turns) Turn() (context.Context, string) {
	select {
	case <-t.left:
		return context.Background(), ""
	default:
		return nil, "it is over"
	}
}

// It is asked again right before the act.
func TestTheTurnIsAskedForAtTheAct(t *testing.T) {
	turn := turns{make(chan struct{}, 2)}
	turn.left <- struct{}{}
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Guards.Audit = turn })
	s := d.step(audited)
	if _, err := d.broker.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	until(t, "the first turn is used up", func() bool { return len(turn.left) == 0 })
	time.Sleep(50 * time.Millisecond) // an act would be done by then; nothing tells that there is none
	if d.done(s.ID) > 0 {
		t.Fatal("it acted after its turn")
	}
	turn.left <- struct{}{}
	turn.left <- struct{}{}
	if o := d.outcome(s); o.Status != broker.Done || d.done(s.ID) != 1 {
		t.Errorf("it came to %s (%s)", o.Status, o.Reason)
	}
}

// Who approves is told when it is not this stoop's turn.
func TestApproveOnAStandby(t *testing.T) {
	turn := turns{make(chan struct{}, 1)}
	turn.left <- struct{}{}
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Guards.Audit = turn })
	s := d.step(audited)
	s.Approve = new(true)
	if o := d.publish(s); o.Status != broker.AwaitingApproval {
		t.Fatalf("it came to %s (%s)", o.Status, o.Reason)
	}
	until(t, "it waits", func() bool { return len(d.host.Approvals()) == 1 })
	if _, err := d.host.Approve(t.Context(), s.ID, "ann"); err == nil || !strings.Contains(err.Error(), "it is over") {
		t.Errorf("approve: %v", err)
	}
	turn.left <- struct{}{}
	if _, err := d.host.Approve(t.Context(), s.ID, "ann"); err != nil {
		t.Errorf("approve: %v", err)
	}
}

// A stoop of a node starts nothing for audit events, nor one of theirs for a node's.
func TestAuditEventsAreOfNoNode(t *testing.T) {
	node := newDesk(t, brokertest.New(t), func(*responders.Config) {})
	node.want(node.step(audited), broker.Suppressed, "kubernetes.auditEvents")
	node.want(node.step(), broker.Done)
	audit := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Guards.Audit = responders.Alone{} })
	audit.want(audit.step(audited), broker.Done)
	audit.want(audit.step(), broker.Suppressed, "answers audit events and nothing else")
}

// Evidence of a pod, and what is done to a node, it refuses.
func TestAuditEventsNameNoPodAndNoNode(t *testing.T) {
	for _, o := range []responders.Object{responders.PodObject, responders.NodeObject} {
		d := newDesk(t, brokertest.New(t), func(c *responders.Config) {
			c.Guards.Audit = responders.Alone{}
			c.Entries[0].Object, c.Entries[0].Kind = o, responders.Evidence
		})
		d.want(d.step(audited), broker.Refused, "name neither a pod")
		d.want(d.step(), broker.Refused, "name neither a pod")
	}
}
