package responders_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/param"
	"stoop/responders"
	"stoop/responders/conformance"
)

// fleetNode is one node's part in a budget, with a switch that takes the API server
// away from it.
type fleetNode struct {
	*responders.Fleet
	stop     func()
	away     atomic.Bool
	requests atomic.Int64
	mu       sync.Mutex
	told     []string
}

func (f *fleetNode) RoundTrip(next http.RoundTripper, r *http.Request) (*http.Response, error) {
	f.requests.Add(1)
	if f.away.Load() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("no route to host")}
	}
	return next.RoundTrip(r)
}

type tripper func(*http.Request) (*http.Response, error)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// newFleetNode is one that runs, unless edit says otherwise.
func newFleetNode(t testing.TB, config *rest.Config, node string, limit responders.Rate, edit func(*responders.Fleet)) *fleetNode {
	t.Helper()
	f := &fleetNode{}
	c := rest.CopyConfig(config)
	c.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return tripper(func(r *http.Request) (*http.Response, error) { return f.RoundTrip(next, r) })
	})
	kube, err := responders.NewKube(c)
	if err != nil {
		t.Fatal(err)
	}
	f.Fleet, err = responders.NewFleet(responders.FleetConfig{
		Kube: kube, Namespace: "stoop", Node: node, Limit: limit,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Tell: func(title, detail string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.told = append(f.told, title+": "+detail)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(f.Fleet)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Run(ctx)
	}()
	f.stop = func() { cancel(); <-done }
	t.Cleanup(f.stop)
	return f
}

func (f *fleetNode) take(t testing.TB, step string, urgent bool) error {
	t.Helper()
	return f.Take(t.Context(), step, "", urgent)
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// stored is the budget as it stands in the cluster.
func stored(t testing.TB, s *conformance.Server) string {
	t.Helper()
	m, err := s.Admin().CoreV1().ConfigMaps("stoop").Get(t.Context(), "stoop-budget", metav1.GetOptions{})
	if err != nil {
		return err.Error()
	}
	return m.Data["budget"]
}

var hour = responders.Rate{N: 20, Per: time.Hour}

// An alert finds credit also while the API server is away, but no more than the
// node holds.
func TestFleetHoldsCredit(t *testing.T) {
	s := conformance.NewServer(t)
	f := newFleetNode(t, s.Config(), "n1", hour, nil)
	eventually(t, "credit is held", func() bool { return f.Left() == 2 })
	f.away.Store(true)
	for _, step := range []string{"a", "b", "a"} { // a second try of a costs nothing
		if err := f.take(t, step, true); err != nil {
			t.Errorf("step %s: %v", step, err)
		}
	}
	if err := f.take(t, "c", true); err == nil || responders.HeldBack(err) {
		t.Errorf("a third step: %v, want an error that passes", err)
	}
	f.away.Store(false)
	eventually(t, "what was used is reported, and there is credit again", func() bool {
		return f.Left() == 2 && strings.Contains(stored(t, s), `"step":"a"`) && strings.Contains(stored(t, s), `"step":"b"`)
	})
	if err := f.take(t, "c", true); err != nil {
		t.Error(err)
	}
	f.stop()
	if b := stored(t, s); strings.Contains(b, "held") || strings.Count(b, `"step"`) != 3 {
		t.Errorf("it has stopped, and the budget is %s", b)
	}
	if err := f.take(t, "d", true); err == nil {
		t.Error("one that has stopped gives credit")
	}
}

func TestFleetCreditOfAlertsBelowCritical(t *testing.T) {
	f := newFleetNode(t, conformance.NewServer(t).Config(), "n1", hour, nil)
	eventually(t, "credit is held", func() bool { return f.Left() == 2 })
	f.away.Store(true)
	if err := f.take(t, "a", false); err != nil {
		t.Error(err)
	}
	if err := f.take(t, "b", false); err == nil {
		t.Error("an alert below Critical used the credit that is kept for Critical ones")
	}
	if err := f.take(t, "c", true); err != nil {
		t.Error(err)
	}
}

// What is held and not renewed is not used: others may count on it by then.
func TestFleetCreditGoesStale(t *testing.T) {
	f := newFleetNode(t, conformance.NewServer(t).Config(), "n1", hour, func(f *responders.Fleet) { f.SetUseFor(400 * time.Millisecond) })
	eventually(t, "credit is held", func() bool { return f.Left() == 2 })
	time.Sleep(600 * time.Millisecond) // longer than it holds unless renewed
	f.away.Store(true)
	if err := f.take(t, "a", true); err != nil {
		t.Errorf("credit that was renewed all the time: %v", err)
	}
	time.Sleep(600 * time.Millisecond)
	if err := f.take(t, "b", true); err == nil {
		t.Error("credit is used that others may count on")
	}
}

func TestFleetIsExhausted(t *testing.T) {
	s := conformance.NewServer(t)
	f := newFleetNode(t, s.Config(), "n1", responders.Rate{N: 8, Per: time.Hour}, nil)
	for _, step := range []string{"a", "b"} {
		if err := f.take(t, step, true); err != nil {
			t.Fatal(err)
		}
	}
	err := f.take(t, "c", true)
	if !responders.HeldBack(err) || !strings.Contains(err.Error(), "quarter") || !strings.Contains(err.Error(), "guard.limits.cluster") {
		t.Fatalf("a third step of a node whose share is two: %v", err)
	}
	before := f.requests.Load()
	for range 100 {
		if err := f.take(t, "c", true); !responders.HeldBack(err) {
			t.Fatal(err)
		}
	}
	if n := f.requests.Load() - before; n > 20 {
		t.Errorf("a hundred steps that are refused cost %d requests", n)
	}
	f.mu.Lock()
	if len(f.told) != 1 {
		t.Errorf("people were told %q", f.told)
	}
	f.mu.Unlock()
	// What ended without having done anything goes back, also what is reported.
	eventually(t, "a is reported", func() bool { return strings.Contains(stored(t, s), `"step":"a"`) })
	f.Give("a")
	eventually(t, "there is credit again", func() bool { return f.take(t, "d", true) == nil })
	// A person's decision is counted, and asks nobody.
	f.Count("e", "", true)
	eventually(t, "it is counted", func() bool { return strings.Contains(stored(t, s), `"step":"e"`) })
}

func TestFleetForbidden(t *testing.T) {
	for _, verb := range []string{"get", "create"} {
		t.Run(verb, func(t *testing.T) {
			s := conformance.NewServer(t)
			s.Forbid(t, verb, "", "configmaps")
			f := newFleetNode(t, s.Config(), "n1", hour, nil)
			err := f.take(t, "a", true)
			if !responders.HeldBack(err) {
				t.Fatalf("error %v", err)
			}
			for _, word := range []string{verb, "configmaps", "namespace stoop", "guard.limits.cluster: 0"} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("the reason does not name %q: %v", word, err)
				}
			}
		})
	}
}

func TestFleetCannotReadTheBudget(t *testing.T) {
	for _, data := range []string{"{", `{"held":{"x":null}}`, `{"held":{"x":{"n":-100}}}`, `{"waiting":{"x":null}}`} {
		s := conformance.NewServer(t)
		if _, err := s.Admin().CoreV1().ConfigMaps("stoop").Create(t.Context(), &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: "stoop-budget"}, Data: map[string]string{"budget": data},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		f := newFleetNode(t, s.Config(), "n1", hour, nil)
		if err := f.take(t, "a", true); !responders.HeldBack(err) || !strings.Contains(err.Error(), "delete it") {
			t.Errorf("%s: %v", data, err)
		}
		if stored(t, s) != data {
			t.Errorf("%s: it was overwritten: %s", data, stored(t, s))
		}
	}
}

func TestFleetLimits(t *testing.T) {
	kube, err := responders.NewKube(conformance.NewServer(t).Config())
	if err != nil {
		t.Fatal(err)
	}
	for _, limit := range []responders.Rate{{}, {N: 2001, Per: time.Hour}, {N: 1, Per: time.Millisecond}} {
		if _, err := responders.NewFleet(responders.FleetConfig{Kube: kube, Namespace: "stoop", Node: "n", Limit: limit}); err == nil {
			t.Errorf("%+v: no error", limit)
		}
	}
}

// nodeStub acts on the node as a test tells it.
type nodeStub struct {
	calls atomic.Int64
	do    func(n int64) (responders.Result, error)
}

func (s *nodeStub) Act(context.Context, *responders.Request) (responders.Result, error) {
	return s.do(s.calls.Add(1))
}

// hosted is a host with a part in a budget.
type hosted struct {
	*fleetNode
	host   *responders.Host
	broker *broker.Broker
	stub   *nodeStub
	stop   func()
	n      int
}

func newHosted(t testing.TB, s *conformance.Server, dir string, limit responders.Rate, mode broker.Mode, do func(n int64) (responders.Result, error)) *hosted {
	t.Helper()
	return newHostedOn(t, testNode, s, dir, limit, mode, do)
}

func newHostedOn(t testing.TB, node string, s *conformance.Server, dir string, limit responders.Rate, mode broker.Mode, do func(n int64) (responders.Result, error)) *hosted {
	t.Helper()
	kube, err := responders.NewKube(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	h := &hosted{fleetNode: newFleetNode(t, s.Config(), node, limit, nil), stub: &nodeStub{do: do}}
	h.broker = brokertest.Open(t, broker.Config{Dir: dir})
	h.host, err = responders.NewHost(t.Context(), responders.Config{
		Broker: h.broker, Pods: responders.NewPods(kube, node, slog.New(slog.DiscardHandler)), Fleet: h.fleetNode.Fleet,
		Entries: []responders.Entry{{
			Name: "stub", Kind: responders.Harm, Object: responders.NodeObject, Params: param.Describe(struct{}{}), Deadline: 5 * time.Second,
			New: func(responders.Env) responders.Responder { return h.stub },
		}},
		Env:    responders.Env{Kube: kube, Node: node},
		Guards: responders.Guards{Mode: mode, Node: node, MaxAge: 10 * time.Minute},
		Log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.host.SetRules(t.Context(), map[string]broker.Mode{"r": broker.Enforce}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.host.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		h.fleetNode.stop()
		h.broker.Close()
	})
	t.Cleanup(h.stop)
	return h
}

func (h *hosted) publish(t testing.TB, approved bool) *broker.Step {
	t.Helper()
	return h.publishOf(t, "", approved)
}

// publishOf is an alert of a pod that nobody has seen before, in a namespace.
func (h *hosted) publishOf(t testing.TB, namespace string, approved bool) *broker.Step {
	t.Helper()
	h.n++
	now := time.Now().UTC()
	raw := fmt.Appendf(nil, `{"hostname":%q,"priority":"Critical","rule":"R","n":%d,"time":%q,"output_fields":{"container.id":"%012x","k8s.ns.name":%q}}`, h.Node, h.n, now.Format(time.RFC3339Nano), h.n, namespace)
	a, err := alert.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	s := &broker.Step{
		ID: broker.StepID(a.ID, "r", 0, ""), AlertID: a.ID, Alert: raw, Received: now, Origin: broker.OriginFIFO,
		Rule: "r", Mode: broker.Enforce, Target: a.Target(), Action: broker.Action{Responder: "stub"},
	}
	if approved {
		s.Approved = &broker.Approval{Actor: "me", Time: now}
	}
	if _, err := h.broker.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return s
}

// ended is how a step ended.
func (h *hosted) ended(t testing.TB, s *broker.Step) (out broker.Outcome) {
	t.Helper()
	eventually(t, "the step has ended", func() bool {
		err := h.broker.Outcomes(t.Context(), time.Time{}, func(o broker.Outcome) error {
			if o.ID == s.ID && o.Status != broker.Retrying {
				out = o
			}
			return nil
		})
		return err == nil && out.ID != ""
	})
	return out
}

func TestHostAsksTheFleet(t *testing.T) {
	done := func(int64) (responders.Result, error) { return responders.Result{}, nil }
	spent := func(t *testing.T, s *conformance.Server) int {
		t.Helper()
		var b struct{ Spent []struct{ Step string } }
		if data := stored(t, s); json.Unmarshal([]byte(data), &b) != nil {
			return 0
		}
		return len(b.Spent)
	}
	one := responders.Rate{N: 1, Per: time.Hour}
	t.Run("exhausted", func(t *testing.T) {
		s := conformance.NewServer(t)
		h := newHosted(t, s, t.TempDir(), one, broker.Enforce, done)
		if o := h.ended(t, h.publish(t, false)); o.Status != broker.Done {
			t.Fatalf("%s: %s", o.Status, o.Reason)
		}
		if o := h.ended(t, h.publish(t, false)); o.Status != broker.Suppressed || !strings.Contains(o.Reason, "guard.limits.cluster") || h.stub.calls.Load() != 1 {
			t.Errorf("%s: %s; %d acts", o.Status, o.Reason, h.stub.calls.Load())
		}
		if o := h.ended(t, h.publish(t, true)); o.Status != broker.Done {
			t.Errorf("one that a person approved: %s: %s", o.Status, o.Reason)
		}
		eventually(t, "both count", func() bool { return spent(t, s) == 2 })
	})
	t.Run("nothing was done", func(t *testing.T) {
		h := newHosted(t, conformance.NewServer(t), t.TempDir(), one, broker.Enforce, func(n int64) (responders.Result, error) {
			switch n {
			case 1:
				return responders.Result{Nothing: true}, nil
			case 2:
				return responders.Result{}, responders.Refuse("no")
			}
			return responders.Result{}, nil
		})
		for _, want := range []broker.Status{broker.Nothing, broker.Refused, broker.Done} {
			var o broker.Outcome
			eventually(t, "the credit is back", func() bool {
				o = h.ended(t, h.publish(t, false))
				return o.Status != broker.Suppressed
			})
			if o.Status != want {
				t.Fatalf("%s (%s), want %s", o.Status, o.Reason, want)
			}
		}
	})
	t.Run("audit", func(t *testing.T) {
		s := conformance.NewServer(t)
		h := newHosted(t, s, t.TempDir(), one, broker.Audit, done)
		for range 3 {
			if o := h.ended(t, h.publish(t, false)); o.Status != broker.Audited {
				t.Errorf("%s: %s", o.Status, o.Reason)
			}
		}
		if n := spent(t, s); n != 0 {
			t.Errorf("%d spent", n)
		}
	})
	t.Run("the API server is away", func(t *testing.T) {
		h := newHosted(t, conformance.NewServer(t), t.TempDir(), one, broker.Enforce, done)
		h.away.Store(true)
		s := h.publish(t, false)
		eventually(t, "it was asked in vain", func() bool { return h.requests.Load() > 2 })
		if h.stub.calls.Load() != 0 {
			t.Error("it was done without credit")
		}
		h.away.Store(false)
		if o := h.ended(t, s); o.Status != broker.Done {
			t.Errorf("%s: %s", o.Status, o.Reason)
		}
	})
	t.Run("a further try, and a restart", func(t *testing.T) {
		s, dir := conformance.NewServer(t), t.TempDir()
		again := errors.New("away")
		h := newHosted(t, s, dir, one, broker.Enforce, func(int64) (responders.Result, error) {
			return responders.Result{}, responders.Retry(again, 100*time.Millisecond)
		})
		step := h.publish(t, false)
		eventually(t, "it was tried three times", func() bool { return h.stub.calls.Load() >= 3 })
		h.stop()
		next := newHosted(t, s, dir, one, broker.Enforce, done)
		if o := next.ended(t, step); o.Status != broker.Done {
			t.Errorf("%s: %s", o.Status, o.Reason)
		}
		if n := spent(t, s); n != 1 {
			t.Errorf("%d spent: %s", n, stored(t, s))
		}
	})
}

// Whoever may make pods in one namespace has them raise Critical alerts on several
// nodes, and makes new ones: what stoop may do for everybody else is not used up by
// it, on none of the nodes.
func TestFleetOneNamespaceDisarmsNobody(t *testing.T) {
	s := conformance.NewServer(t)
	nodes := make([]*hosted, 4)
	for i := range nodes {
		nodes[i] = newHostedOn(t, fmt.Sprint("node-", i), s, t.TempDir(), responders.Rate{N: 20, Per: time.Hour}, broker.Enforce,
			func(int64) (responders.Result, error) { return responders.Result{}, nil })
	}
	var got []int
	all := 0
	for _, h := range nodes {
		n := 0
		for range 6 {
			switch o := h.ended(t, h.publishOf(t, "mallory", false)); {
			case o.Status == broker.Done:
				n++
			case o.Status != broker.Suppressed || !strings.Contains(o.Reason, "namespace mallory") || !strings.Contains(o.Reason, "guard.limits.cluster"):
				t.Errorf("%s: %s", o.Status, o.Reason)
			}
		}
		got = append(got, n)
		all += n
		// What others did by credit that they held is known a moment later.
		for _, other := range nodes {
			eventually(t, "every node knows of it", func() bool { other.Look(); return other.Seen() == all })
		}
	}
	// Of twenty a node has five, a namespace three of them, and ten in all.
	if want := []int{3, 3, 3, 1}; !slices.Equal(got, want) {
		t.Errorf("the namespace got %d by node, want %d", got, want)
	}
	for i, h := range nodes {
		if o := h.ended(t, h.publishOf(t, "victim", false)); o.Status != broker.Done {
			t.Errorf("another namespace on node %d: %s: %s", i, o.Status, o.Reason)
		}
		if o := h.ended(t, h.publishOf(t, "mallory", true)); i == 0 && o.Status != broker.Done {
			t.Errorf("one that a person approved: %s: %s", o.Status, o.Reason)
		}
	}
}

// Credit that a node holds is not for a namespace that has had its share, as far as
// the node knows, and stays for others.
func TestFleetHeldCreditKnowsTheShare(t *testing.T) {
	s := conformance.NewServer(t)
	var spent []string
	for i := range 10 {
		spent = append(spent, fmt.Sprintf(`{"step":"s%d","node":"m%d","at":%q,"ns":"mallory"}`, i, i, time.Now().UTC().Format(time.RFC3339)))
	}
	if _, err := s.Admin().CoreV1().ConfigMaps("stoop").Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "stoop-budget"}, Data: map[string]string{"budget": `{"spent":[` + strings.Join(spent, ",") + `]}`},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	f := newFleetNode(t, s.Config(), "n1", hour, nil)
	eventually(t, "credit is held", func() bool { return f.Left() == 2 })
	if err := f.Take(t.Context(), "a", "mallory", true); !responders.HeldBack(err) || !strings.Contains(err.Error(), "namespace mallory") {
		t.Errorf("a namespace that has had its half: %v", err)
	}
	// The refusal is for that namespace alone.
	f.away.Store(true)
	if err := f.Take(t.Context(), "b", "victim", true); err != nil {
		t.Errorf("another namespace: %v", err)
	}
	if err := f.take(t, "c", true); err != nil {
		t.Errorf("an act in no namespace: %v", err)
	}
	f.away.Store(false)
	if err := f.Take(t.Context(), "d", "victim", true); err != nil {
		t.Errorf("another namespace, with no credit held: %v", err)
	}
	eventually(t, "the namespace of what was used is known", func() bool { return strings.Count(stored(t, s), `"ns":"victim"`) == 2 })
}

// Fifty nodes, each with its own demand, on one budget; in e2e on the real API
// server.
func TestFiftyFleets(t *testing.T) {
	t.Parallel() // it waits more than it works
	s := conformance.NewServer(t)
	conformance.Fleets(t, conformance.FleetCase{
		Config: func(int) *rest.Config { return s.Config() }, Namespace: "stoop", Nodes: 50,
		Limit: responders.Rate{N: 60, Per: 4 * time.Second}, For: 16 * time.Second,
	})
}
