package responders_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/param"
	"stoop/responders"
	"stoop/responders/conformance"
)

// flaky is a [conformance.Server] behind connections that may go dead without
// either end being told.
type flaky struct {
	*conformance.Server
	t    testing.TB
	http *httptest.Server
	hook func(http.ResponseWriter, *http.Request) bool // false: it has answered
	qps  float32
	mu   sync.Mutex
	open []*deadable
}

type deadable struct {
	net.Conn
	mu   sync.Mutex
	dead bool
}

func (c *deadable) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

type deadables struct {
	net.Listener
	f *flaky
}

func (l deadables) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	d := &deadable{Conn: c}
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	l.f.open = append(l.f.open, d)
	return d, nil
}

func newFlaky(t testing.TB) *flaky {
	f := flakyFor(t, conformance.NewServer(t))
	_, err := f.Admin().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "stoop"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// flakyFor is another way to a server.
func flakyFor(t testing.TB, s *conformance.Server) *flaky {
	f := &flaky{Server: s, t: t, qps: 0.001} // the limit is used up by others
	f.http = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		hook := f.hook
		f.mu.Unlock()
		if hook == nil || hook(w, r) {
			f.ServeHTTP(w, r)
		}
	}))
	f.http.Listener = deadables{f.http.Listener, f}
	f.http.EnableHTTP2 = true
	f.http.StartTLS()
	t.Cleanup(func() {
		f.http.CloseClientConnections()
		f.http.Close()
	})
	return f
}

// kill has every connection that there is go dead.
func (f *flaky) kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.open {
		c.mu.Lock()
		c.dead = true
		c.mu.Unlock()
	}
}

func (f *flaky) setHook(hook func(http.ResponseWriter, *http.Request) bool) {
	f.mu.Lock()
	f.hook = hook
	f.mu.Unlock()
}

func (f *flaky) kube() *responders.Kube {
	f.t.Helper()
	c := f.Config()
	c.Host, c.Insecure = f.http.URL, true
	c.QPS, c.Burst = f.qps, 1
	return kubeOf(f.t, c)
}

func kubeOf(t testing.TB, c *rest.Config) *responders.Kube {
	t.Helper()
	k, err := responders.NewKube(c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// annotate sets the annotation, or takes it away where why is nil.
func (f *flaky) annotate(why *string) {
	f.t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]*string{"stoop.dev/pause": why}}})
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.Admin().CoreV1().Namespaces().Patch(f.t.Context(), "stoop", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		f.t.Fatal(err)
	}
}

// counter is a responder that counts, and whose steps can be taken back.
type counter struct {
	mu     sync.Mutex
	acts   []string // steps
	undone []string
}

func (c *counter) Act(_ context.Context, r *responders.Request) (responders.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acts = append(c.acts, r.Step.ID)
	return responders.Result{Undo: json.RawMessage(`{}`)}, nil
}

func (c *counter) Undo(_ context.Context, u *responders.UndoRequest) (responders.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.undone = append(c.undone, u.ID)
	return responders.Result{}, nil
}

func (c *counter) done(step string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.acts {
		if s == step {
			n++
		}
	}
	return n
}

// desk is a host whose responder "count" counts.
type desk struct {
	*counter
	t      testing.TB
	broker *broker.Broker
	host   *responders.Host
	stop   func()
	n      int
}

func newDesk(t testing.TB, b *broker.Broker, change func(*responders.Config)) *desk {
	t.Helper()
	d := &desk{counter: &counter{}, t: t, broker: b}
	c := responders.Config{
		Broker: b, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Entries: []responders.Entry{{
			Name: "count", Kind: responders.Harm, Params: param.Describe(struct{}{}), Deadline: 5 * time.Second,
			New: func(responders.Env) responders.Responder { return d.counter },
		}},
		Guards: responders.Guards{Mode: broker.Enforce, Node: testNode, MaxAge: 10 * time.Minute, Approval: time.Hour},
	}
	change(&c)
	var err error
	if d.host, err = responders.NewHost(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := d.host.SetRules(t.Context(), map[string]broker.Mode{"r": broker.Enforce}); err != nil {
		t.Fatal(err)
	}
	d.stop = runs(t, d.host.Run)
	return d
}

// runs has f at work until the function that it returns is called, or the test ends.
func runs(t testing.TB, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := f(ctx); err != nil {
			t.Errorf("it ended with %v", err)
		}
	}()
	stop = func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
			t.Error("it does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

// step is a new alert's, which is changed before.
func (d *desk) step(change ...func(alert map[string]any)) *broker.Step {
	d.t.Helper()
	d.n++
	now := time.Now().UTC()
	a := map[string]any{
		"hostname": testNode, "priority": "Critical", "rule": "R", "source": "syscall", "time": now.Format(time.RFC3339Nano), "n": d.n,
		"output_fields": map[string]any{"container.id": fmt.Sprintf("%012x", d.n)},
	}
	for _, f := range change {
		f(a)
	}
	raw, err := json.Marshal(a)
	if err != nil {
		d.t.Fatal(err)
	}
	read, err := alert.Parse(raw)
	if err != nil {
		d.t.Fatal(err)
	}
	return &broker.Step{
		ID: broker.StepID(read.ID, "r", 0, ""), AlertID: read.ID, Alert: raw, Received: now, Origin: broker.OriginFIFO,
		Rule: "r", Mode: broker.Enforce, Target: read.Target(), Action: broker.Action{Responder: "count"},
	}
}

// publish publishes a step and waits for its outcome.
func (d *desk) publish(s *broker.Step) broker.Outcome {
	d.t.Helper()
	if _, err := d.broker.PublishStep(d.t.Context(), s); err != nil {
		d.t.Fatal(err)
	}
	return d.outcome(s)
}

func (d *desk) outcome(s *broker.Step) broker.Outcome {
	d.t.Helper()
	var found broker.Outcome
	until(d.t, "there is an outcome", func() bool {
		err := d.broker.Outcomes(d.t.Context(), time.Time{}, func(o broker.Outcome) error {
			if o.ID == s.ID && o.Status != broker.Retrying {
				found = o
			}
			return nil
		})
		if err != nil {
			d.t.Fatal(err)
		}
		return found.ID != ""
	})
	return found
}

func (d *desk) want(s *broker.Step, status broker.Status, says ...string) {
	d.t.Helper()
	o := d.publish(s)
	if o.Status != status || (status == broker.Done) != (d.done(s.ID) == 1) {
		d.t.Errorf("the step came to %s (%s) and was done %d times, want %s", o.Status, o.Reason, d.done(s.ID), status)
	}
	for _, word := range says {
		if !strings.Contains(o.Reason, word) {
			d.t.Errorf("the reason lacks %q: %s", word, o.Reason)
		}
	}
}

// watching is the cluster's pause, watched through f.
func watching(t testing.TB, f *flaky, reg prometheus.Registerer) (*responders.ClusterPause, func()) {
	t.Helper()
	p, err := responders.NewClusterPause(responders.ClusterPauseConfig{
		Kube: f.kube(), Namespace: "stoop", Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Registerer: reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, runs(t, func(ctx context.Context) error { p.Run(ctx); return nil })
}

func (d *desk) clusterPaused(want bool) {
	d.t.Helper()
	until(d.t, fmt.Sprintf("there is a host that sees the cluster paused: %t", want), func() bool { return d.host.PausedCluster().Paused == want })
}

// The annotation stops what harms, and no undo; what came meanwhile is not done
// afterwards.
func TestClusterPause(t *testing.T) {
	f := newFlaky(t)
	reg := prometheus.NewRegistry()
	p, _ := watching(t, f, reg)
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
	before := d.step()
	d.want(before, broker.Done)

	why := "ann:\nbad \x1b[31mrule"
	f.annotate(&why)
	d.clusterPaused(true)
	d.want(d.step(), broker.Suppressed, "every node of the cluster", "stoop.dev/pause", "namespace stoop", `"ann: bad  [31mrule"`)
	if _, err := d.host.Undo(t.Context(), before.ID, "ann"); err != nil || len(d.undone) != 1 {
		t.Errorf("undo while paused: %v", err)
	}
	waits := d.step()
	waits.Approve = new(true)
	if _, err := d.host.Approve(t.Context(), waits.ID, "bob"); err == nil || !strings.Contains(err.Error(), "kubectl annotate namespace stoop stoop.dev/pause-") {
		t.Errorf("approve while paused: %v", err)
	}

	// Nothing that is said on the node lifts it.
	if _, err := d.host.SetPause(t.Context(), false, "bob"); err != nil {
		t.Fatal(err)
	}
	d.want(d.step(), broker.Suppressed, "every node")

	other := "bob: still"
	f.annotate(&other)
	until(t, "there is the other reason", func() bool { return d.host.PausedCluster().Actor == other })
	d.want(d.step(), broker.Suppressed, other)

	during := d.step()
	f.annotate(nil)
	d.clusterPaused(false)
	d.want(during, broker.Suppressed, "came while every node")
	d.want(d.step(), broker.Done)

	// And the node's own pause is none of its affair.
	if _, err := d.host.SetPause(t.Context(), true, "bob"); err != nil {
		t.Fatal(err)
	}
	d.want(d.step(), broker.Suppressed, "paused by bob")
	if got := d.host.PausedCluster(); got.Paused || got.Problem != "" {
		t.Errorf("the cluster is %+v", got)
	}
	if got := watched(t, reg); got != 1 {
		t.Errorf("the metric is %v", got)
	}
}

// watched is the metric that says whether the annotation can be read.
func watched(t testing.TB, reg *prometheus.Registry) float64 {
	t.Helper()
	all, err := reg.Gather()
	if err != nil || len(all) != 1 || all[0].GetName() != "stoop_cluster_pause_watched" {
		t.Fatalf("the metrics are %v, %v", all, err)
	}
	return all[0].GetMetric()[0].GetGauge().GetValue()
}

// An annotation without a value pauses too.
func TestClusterPauseWithoutAReason(t *testing.T) {
	f := newFlaky(t)
	p, _ := watching(t, f, nil)
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
	f.annotate(new(""))
	d.clusterPaused(true)
	d.want(d.step(), broker.Suppressed, "every node")
}

// What this process has seen holds on the next store as well, from the beginning.
func TestClusterPauseOnAnotherStore(t *testing.T) {
	f := newFlaky(t)
	f.annotate(new("ann"))
	p, _ := watching(t, f, nil)
	until(t, "there is a first look", p.Known)
	h, err := responders.NewHost(t.Context(), responders.Config{Broker: brokertest.New(t), Cluster: p})
	if err != nil {
		t.Fatal(err)
	}
	if !h.PausedCluster().Paused {
		t.Error("it is not paused")
	}
	runs(t, h.Run)
	var at responders.Pause
	until(t, "there is the pause in the store", func() bool {
		ok, err := h.Broker.State().Get(t.Context(), "pause-cluster", &at)
		return ok && err == nil && at.Paused
	})
}

// A stoop that starts while the API server is away goes by what it saw last.
func TestClusterPauseOverARestart(t *testing.T) {
	f := newFlaky(t)
	b := brokertest.New(t)
	p, stop := watching(t, f, nil)
	d := newDesk(t, b, func(c *responders.Config) { c.Cluster = p })
	f.annotate(new("ann: bad rule"))
	d.clusterPaused(true)
	until(t, "there is the pause in the store", func() bool {
		var at responders.Pause
		ok, err := b.State().Get(t.Context(), "pause-cluster", &at)
		return ok && err == nil && at.Paused
	})
	stop()
	d.stop()

	f.setHook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return false
	})
	p, _ = watching(t, f, nil)
	d = newDesk(t, b, func(c *responders.Config) { c.Cluster = p })
	early := d.step()
	d.want(early, broker.Suppressed, "every node", "ann: bad rule")
	until(t, "there is the fault", func() bool { return d.host.PausedCluster().Problem != "" })

	f.annotate(nil)
	f.setHook(nil)
	d.clusterPaused(false)
	d.want(d.step(), broker.Done)
	if d.done(early.ID) > 0 {
		t.Error("what came while paused was done")
	}
}

// The cluster may have been paused while stoop was away: the first harmful step
// waits until that is known, but not for long.
func TestTheFirstStepWaitsForTheCluster(t *testing.T) {
	f := newFlaky(t)
	f.annotate(new("ann"))
	go_ := make(chan struct{})
	f.setHook(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-go_:
		case <-r.Context().Done():
		}
		return true
	})
	p, _ := watching(t, f, nil)
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
	s := d.step()
	if _, err := d.broker.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	until(t, "there is a step that was given", func() bool { return d.broker.Waiting("count") > 0 })
	close(go_)
	if o := d.outcome(s); o.Status != broker.Suppressed || d.done(s.ID) > 0 {
		t.Errorf("the step came to %s (%s)", o.Status, o.Reason)
	}
}

func TestTheFirstStepDoesNotWaitForAnAPIServerThatIsAway(t *testing.T) {
	f := newFlaky(t)
	f.setHook(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return false })
	p, _ := watching(t, f, nil)
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
	began := time.Now()
	d.want(d.step(), broker.Done)
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("it waited for %s", took)
	}
}

// Without the permission stoop works, and says what is missing.
func TestClusterPauseForbidden(t *testing.T) {
	for what, spoil := range map[string]func(*flaky){
		"forbidden": func(f *flaky) { f.Forbid(t, "list", "", "namespaces") },
		"not there": func(f *flaky) {
			if err := f.Admin().CoreV1().Namespaces().Delete(t.Context(), "stoop", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			f := newFlaky(t)
			spoil(f)
			reg := prometheus.NewRegistry()
			began := time.Now()
			p, _ := watching(t, f, reg)
			d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
			d.want(d.step(), broker.Done)
			if took := time.Since(began); took >= 2*time.Second {
				t.Errorf("the first step waited: it took %s", took)
			}
			want := map[string]string{"forbidden": "may not list namespaces", "not there": "there is no namespace stoop"}[what]
			if got := d.host.PausedCluster().Problem; !strings.Contains(got, want) {
				t.Errorf("the problem is %q, want %q", got, want)
			}
			if got := watched(t, reg); got != 0 {
				t.Errorf("the metric is %v", got)
			}
		})
	}
}

// A read that is never answered is given up.
func TestClusterPauseOverAReadThatHangs(t *testing.T) {
	f := newFlaky(t)
	f.annotate(new("ann"))
	var reads atomic.Int32
	f.setHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if reads.Add(1) > 1 {
			return true
		}
		<-r.Context().Done()
		return false
	})
	p, err := responders.NewClusterPause(responders.ClusterPauseConfig{Kube: f.kube(), Namespace: "stoop"})
	if err != nil {
		t.Fatal(err)
	}
	p.SetResync(time.Second, time.Second, 100*time.Millisecond)
	runs(t, func(ctx context.Context) error { p.Run(ctx); return nil })
	until(t, "there is a first look", p.Known)
}

// A connection that is dead, and does not say so, hides the annotation no longer
// than one watch lasts; a namespace that is gone changes nothing.
func TestClusterPauseOverADeadConnection(t *testing.T) {
	f := newFlaky(t)
	p, err := responders.NewClusterPause(responders.ClusterPauseConfig{Kube: f.kube(), Namespace: "stoop"})
	if err != nil {
		t.Fatal(err)
	}
	p.SetResync(time.Second, 200*time.Millisecond, time.Second)
	runs(t, func(ctx context.Context) error { p.Run(ctx); return nil })
	d := newDesk(t, brokertest.New(t), func(c *responders.Config) { c.Cluster = p })
	until(t, "there is a first look", p.Known)
	f.kill()
	f.annotate(new("ann"))
	began := time.Now()
	d.clusterPaused(true)
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("it was seen after %s", took)
	}
	if err := f.Admin().CoreV1().Namespaces().Delete(t.Context(), "stoop", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	until(t, "there is a namespace that is gone", func() bool { return p.Problem() != "" })
	d.want(d.step(), broker.Suppressed, "every node")
}
