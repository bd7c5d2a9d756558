package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"stoop/alert"
	"stoop/broker"
	"stoop/failpoint"
)

// Config is what a host is made of.
type Config struct {
	Broker  *broker.Broker
	Entries []Entry
	Env     Env
	Pods    *Pods // nil without a cluster
	Guards  Guards
	Log     *slog.Logger
	// Tell is called when people should know of something that no outcome
	// says on its own, a breaker that opened: title is a constant, detail a
	// sentence.
	Tell func(title, detail string)
	// Metrics, Ended, Fleet and Cluster are shared by all hosts of a process. Without
	// a Fleet there is no budget of the whole cluster, without Cluster no pause of it.
	Metrics *Metrics
	Ended   *Ended
	Fleet   *Fleet
	Cluster *ClusterPause
}

// Ended remembers the steps that this process has ended lately. A store whose
// disk was full could not note that they were acknowledged, and gives them
// again when it is back.
type Ended struct {
	mu    sync.Mutex
	has   map[string]struct{}
	order []string
}

// endedMax is how many are remembered.
const endedMax = 20_000

func (e *Ended) add(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.has == nil {
		e.has = map[string]struct{}{}
	}
	if _, ok := e.has[id]; ok {
		return
	}
	if len(e.order) >= endedMax {
		delete(e.has, e.order[0])
		e.order = e.order[1:]
	}
	e.has[id] = struct{}{}
	e.order = append(e.order, id)
}

func (e *Ended) contains(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.has[id]
	return ok
}

// Host runs the responders: it is what stands between the stream ACTIONS and
// an act.
type Host struct {
	Config
	responders map[string]*running
	ledger     *ledger // of what was done
	rehearsal  *ledger // of what would have been done, in audit mode
	undos      *undos
	approvals  *approvals
	pause      atomic.Pointer[Pause]
	enforced   atomic.Pointer[enforced]
	settled    atomic.Pointer[settled] // nil: no rules were ever in force
	underway   sync.Map                // the ids of the steps being handled
	resumed    chan struct{}           // a token when a pause is over
	lost       lost                    // outcomes that the store refused

	seeing       sync.Mutex // while clusterPause becomes what the annotation says
	clusterPause atomic.Pointer[Pause]
}

// running is a responder at work.
type running struct {
	Entry
	act Responder
	// missing is what this machine does not grant of what it needs.
	missing []string
	lanes   lanes
}

const (
	// concurrency is how many steps of a responder are under way at once.
	concurrency = 32
	// Tries of a step begin after retryFirst, and grow to retryMost apart.
	retryFirst = 250 * time.Millisecond
	retryMost  = 15 * time.Second
	// notifyFor is how long telling people is tried. What harms is tried
	// until the alert is older than guard.maxAge.
	notifyFor = 30 * time.Minute
	// localFor is how long an act of this node's own is tried. A fault of the
	// kernel's that passes does so soon; one that a suspect makes does not, and must
	// not hold up the chain until all of it is too old.
	localFor = time.Minute
	// busyAgain is when a step asks again whose object is busy.
	busyAgain = 50 * time.Millisecond
	busyMost  = 2 * time.Second
	// grace is how long a step under way may go on when stoop is stopped.
	grace = 5 * time.Second
	// settle is how long a request that a killed process had sent may still
	// be under way at the API server: only after it, a look tells.
	settle = time.Second
)

// NewHost builds the responders and reads what STATE knows.
func NewHost(ctx context.Context, c Config) (*Host, error) {
	h := &Host{
		Config: c, responders: map[string]*running{}, resumed: make(chan struct{}, 1),
		ledger: newLedger(c.Broker.State(), &c.Guards), rehearsal: newLedger(nil, &c.Guards),
	}
	if h.Log == nil {
		h.Log = slog.New(slog.DiscardHandler)
	}
	if h.Tell == nil {
		h.Tell = func(string, string) {}
	}
	if h.Ended == nil {
		h.Ended = &Ended{}
	}
	if h.Metrics == nil {
		h.Metrics = NewMetrics(prometheus.NewRegistry())
	}
	if h.Env.Log == nil {
		h.Env.Log = h.Log
	}
	if h.Env.ProtectedPod == nil {
		h.Env.ProtectedPod = h.Guards.ProtectedPod
	}
	if h.Env.ProtectedNamespace == nil {
		h.Env.ProtectedNamespace = func(ns string) bool { return matchAny(h.Guards.Namespaces, ns) }
	}
	if h.Env.Caller == nil {
		h.Env.Caller = c.Broker
	}
	for _, e := range c.Entries {
		if err := c.Broker.OpenSteps(ctx, e.Name); err != nil {
			return nil, err
		}
		r := &running{Entry: e, lanes: lanes{of: map[string]*destination{}}, missing: missing(e, c.Env.Local)}
		if !e.cluster() || h.Env.Kube != nil {
			r.act = e.New(h.Env)
		}
		h.responders[e.Name] = r
	}
	if err := h.ledger.load(ctx); err != nil {
		return nil, err
	}
	if err := h.loadPause(ctx); err != nil {
		return nil, err
	}
	if err := h.loadEnforced(ctx); err != nil {
		return nil, err
	}
	if err := h.loadSettled(ctx); err != nil {
		return nil, err
	}
	var err error
	if h.undos, err = loadUndos(ctx, c.Broker.State()); err != nil {
		return nil, err
	}
	h.approvals, err = loadApprovals(ctx, c.Broker.State())
	return h, err
}

// Run answers steps until ctx is done, and returns when the last one that was
// under way is over.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for name := range h.responders {
		all.Go(func() {
			if err := h.Broker.ConsumeSteps(ctx, name, concurrency, h.handle); err != nil {
				cancel(fmt.Errorf("responder %s: %w", name, err))
			}
		})
	}
	all.Go(func() { h.keepLoop(ctx) })
	all.Go(func() { h.expireLoop(ctx) })
	all.Go(func() { h.approvalLoop(ctx) })
	all.Go(func() { h.followCluster(ctx) })
	all.Go(func() { h.Broker.TrimLoop(ctx) })
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// handle is a step's way through the host: who is meant, what the guards say,
// the act, what came of it, the next step. Only then is it acknowledged.
func (h *Host) handle(ctx context.Context, d *broker.Delivery) {
	s := d.Step
	r := h.responders[s.Responder]
	if h.Ended.contains(s.ID) {
		h.acknowledge(d)
		return
	}
	if _, twice := h.underway.LoadOrStore(s.ID, struct{}{}); twice {
		// It was given again although it is being done: that one will end it.
		h.retry(d, retryFirst)
		return
	}
	if !h.ready(ctx, d, r) {
		h.underway.Delete(s.ID)
		return
	}
	h.inLane(ctx, d, r)
}

// ready does what a step's lane need not be waited for. It reports whether there is
// still something to do.
func (h *Host) ready(ctx context.Context, d *broker.Delivery, r *running) bool {
	s := d.Step
	if s.Approved != nil {
		// It waits no more, also where stoop was killed before it could say so.
		if err := h.approvals.end(ctx, s.ID); err != nil {
			h.Log.Error("that a step was approved could not be stored", "step", s.ID, "error", err)
		}
	}
	if rec := h.ledger.get(s.ID); rec != nil && rec.Status != "" {
		// An earlier process did it and was killed before it could say so.
		h.finish(ctx, d, r, rec.Status, Result{Reason: rec.Reason, Found: rec.Found}, rec.Undo)
		return false
	}
	if ahead(r, s) {
		// Telling people takes as long as their service likes. What comes after
		// it in the chain does not wait for that.
		if err := h.next(ctx, s, "", Result{}); err != nil {
			h.Log.Error("the next step of a chain could not be stored", "step", s.ID, "rule", s.Rule, "error", err)
			h.retry(d, backoff(d.Attempt))
			return false
		}
	}
	return true
}

// inLane answers a step when its destination has room for it, and then those that
// wait for that room.
func (h *Host) inLane(ctx context.Context, d *broker.Delivery, r *running) {
	if r.Lane == nil {
		h.answer(ctx, d, r)
		return
	}
	lane := r.Lane(d.Step.Params)
	if entered, full := r.lanes.enter(lane, d); full {
		h.retry(d, fullAgain())
		h.underway.Delete(d.Step.ID)
		return
	} else if !entered {
		return
	}
	for d != nil && ctx.Err() == nil {
		h.answer(ctx, d, r)
		d = r.lanes.leave(lane)
	}
}

// answer is the way of a step whose turn it is.
func (h *Host) answer(ctx context.Context, d *broker.Delivery, r *running) {
	s := d.Step
	defer h.underway.Delete(s.ID)
	req := &Request{Step: s}
	defer req.close()
	status, reason, again := h.prepare(ctx, d, r, req)
	switch {
	case again > 0:
		h.retry(d, again)
	case status == broker.AwaitingApproval:
		// Its chain waits with it: see [Host.decide].
		h.acknowledge(d)
	case status != "":
		if h.ledger.end(s.ID, status, Result{Reason: reason}, time.Now()) {
			// It was begun, and its place is free again.
			if err := h.ledger.save(context.WithoutCancel(ctx), s.ID); err != nil {
				h.Log.Error("the end of a step could not be stored", "step", s.ID, "error", err)
			}
		}
		reason, undo := h.left(s.ID, reason)
		if !undo {
			h.refund(s.ID)
		}
		h.finish(ctx, d, r, status, Result{Reason: reason}, undo)
	default:
		h.act(ctx, d, r, req)
	}
}

// ahead reports whether the step after s is published before s is done: s tells
// people, and the chain does not hang on whether that works.
func ahead(r *running, s *broker.Step) bool {
	return r.Kind == Notification && s.OnFailure != broker.Stop && !r.asks(s)
}

// prepare asks everything that is asked before an act, and fills in the request
// for the responder. It returns what became of the step instead, and why, or
// after how long to ask again.
func (h *Host) prepare(ctx context.Context, d *broker.Delivery, r *running, req *Request) (status broker.Status, reason string, again time.Duration) {
	s := d.Step
	a, err := alert.Parse(s.Alert)
	if err != nil {
		return broker.Failed, fmt.Sprintf("the step's alert can't be read: %v", err), 0
	}
	a.ID = s.AlertID
	now := time.Now()
	if status, reason, again := h.standby(a, s, now); status != "" || again > 0 {
		return status, reason, again
	}
	begun := h.ledger.get(s.ID) != nil
	if r.Kind != Harm {
		if now.Sub(s.Since()) > notifyFor {
			return broker.Expired, fmt.Sprintf("given up after %s", notifyFor), 0
		}
	} else if guard, why := h.Guards.trust(a, s, now); guard != "" {
		if begun && guard == "age" {
			return broker.Expired, "given up: " + why, 0
		}
		h.Metrics.suppressed.WithLabelValues(guard).Inc()
		return broker.Suppressed, why, 0
	}
	mode, why := h.mode(s)
	req.Alert, req.Target, req.Resumed = a, s.Target, begun
	if status, reason, again := h.target(ctx, r, req, mode); status != "" || again > 0 {
		if p := h.Guards.protected(s.Target, nil); p != "" && r.Kind == Harm && again == 0 {
			return h.suppress("protected", p)
		}
		return status, reason, again
	}
	if r.Kind != Harm {
		if mode == broker.Audit {
			return broker.Audited, why, 0
		}
		return h.approval(ctx, r, req)
	}
	pending := h.Cluster.pending() // asked first: what comes now is seen below
	if p := h.paused(s); p != "" {
		return h.suppress("pause", p)
	}
	if pending && mode == broker.Enforce {
		return "", "", busyAgain
	}
	if p := h.Guards.protected(req.Target, req.Pod); p != "" {
		if class := h.Guards.sparedByClass(req.Target, req.Pod); class != "" && mode == broker.Enforce {
			h.tellSpared(s.Rule, req.Pod, class)
		}
		return h.suppress("protected", p)
	}
	if p := unclear(req); p != "" {
		return h.suppress("protected", p)
	}
	if c, ok := r.act.(Checker); ok {
		checkCtx, cancel := h.deadline(ctx, r.Deadline)
		err := c.Check(checkCtx, req)
		cancel()
		if err != nil {
			status, retry, after, reason := classify(err)
			if retry && !(r.local() && now.Sub(s.Since()) > localFor) {
				return "", "", h.retrying(d, r, reason, after)
			}
			return status, reason, 0
		}
	}
	if mode == broker.Enforce {
		if status, reason, again := h.approval(ctx, r, req); status != "" || again > 0 {
			return status, reason, again
		}
	}
	l := h.ledger
	if mode == broker.Audit {
		l = h.rehearsal
	}
	v := l.begin(s.ID, act{
		Rule: s.Rule, Responder: s.Responder, Object: object(r, req), Namespace: req.Target.Namespace,
		Owner: owner(r, req), Urgent: a.Priority.Urgent(), Local: r.local(), Began: now,
		Approved: s.Approved != nil,
	}, &h.Guards, r.Instead != "", now)
	switch {
	case v.busy:
		return "", "", min(busyAgain*time.Duration(d.Attempt), busyMost)
	case v.opened != "":
		if mode == broker.Enforce {
			if err := l.saveBreaker(ctx, v.opened); err != nil {
				h.Log.Error("an open breaker could not be stored: a restart would forget it", "breaker", v.opened, "error", err)
			}
			h.Metrics.breakers.Inc()
			h.Tell("breaker opened", v.reason)
		}
		return h.suppress(v.guard, v.reason)
	case v.guard == "owner" && mode == broker.Enforce:
		return h.instead(ctx, s, r, replacement{
			guard: "owner", about: owner(r, req), title: "delete, recreate, alert, delete", reason: v.reason,
		})
	case v.guard != "":
		return h.suppress(v.guard, v.reason)
	case mode == broker.Audit:
		return h.foresee(ctx, r, req, why)
	}
	return h.charge(ctx, d, r, a.Priority.Urgent(), begun)
}

// target finds what the step acts on and fills it in, or says why there is
// nothing to act on.
func (h *Host) target(ctx context.Context, r *running, req *Request, mode broker.Mode) (status broker.Status, reason string, again time.Duration) {
	s := req.Step
	object := r.objectOf(s.Params)
	var missing string
	var err error
	switch {
	case object == NoObject:
		return "", "", 0
	case h.Guards.Audit != nil && (object == PodObject || object == NodeObject):
		return broker.Refused, "this stoop answers audit events (kubernetes.auditEvents: elected), which name neither a pod of a node nor a node", 0
	case !r.cluster():
		missing, err = h.locate(ctx, r, req)
	case lacking(object, s.Target) != nil:
		err = lacking(object, s.Target)
	case object == ResourceObject && r.act != nil:
		return "", "", 0
	case (h.Pods == nil || r.act == nil) && mode == broker.Audit:
		return broker.Audited, "no cluster: " + object.String() + " could not be looked up", 0
	case h.Pods == nil || r.act == nil:
		return broker.Failed, "no cluster: give --kubeconfig, or run in a pod with a service account", 0
	case object == NodeObject:
		return "", "", 0
	default:
		req.Pod, req.Target, err = h.Pods.Resolve(ctx, s.Target)
	}
	s.Target = req.Target // what is known of it, also where it can't be acted on
	if err != nil {
		if ctx.Err() != nil {
			return "", "", retryFirst
		}
		status, retry, after, reason := classify(err)
		if retry {
			return "", "", max(after, retryFirst)
		}
		return status, reason, 0
	}
	switch {
	case missing != "" && mode == broker.Audit:
		return broker.Audited, "it could not be done here: " + missing, 0
	case missing != "":
		return broker.Failed, "it can't be done here: " + missing, 0
	}
	return "", "", 0
}

func (h *Host) suppress(guard, reason string) (broker.Status, string, time.Duration) {
	h.Metrics.suppressed.WithLabelValues(guard).Inc()
	return broker.Suppressed, reason, 0
}

// tellSpared tells people of a pod that only its priority class protects: it may
// be the CNI's, or a tenant's who wants to be left alone.
func (h *Host) tellSpared(rule string, pod *corev1.Pod, class string) {
	if !h.ledger.tellOnce("class\x00"+rule+"\x00"+pod.Namespace+"\x00"+class, time.Now()) {
		return
	}
	h.Tell("spared by its priority class", fmt.Sprintf("rule %s: pod %s/%s is left alone since its priority class %s is protected. "+
		"Whoever may create pods there may be free to name that class: see guard.protect.priorityClasses", rule, pod.Namespace, pod.Name, class))
}

// foresee says of a step in audit mode what would come of it, as far as only its
// responder can tell.
func (h *Host) foresee(ctx context.Context, r *running, req *Request, why string) (status broker.Status, reason string, again time.Duration) {
	s, err := req.Step, error(nil)
	if f, ok := r.act.(Foreseer); ok {
		foreseeing, cancel := h.deadline(ctx, r.Deadline)
		err = f.Foresee(foreseeing, req)
		cancel()
	}
	status, reason = broker.Audited, why
	var gentler *spareError
	switch {
	case errors.As(err, &gentler) && r.Instead != "":
		h.rehearsal.instead(s.ID, r.Instead)
		status, reason, _ = h.suppress("workload", err.Error()+"; "+r.Instead+" would be done instead")
	case as[*refusal](err):
		status, reason = broker.Refused, err.Error()
	case err != nil:
		reason += "; whether it would be done is not known: " + reasonOf(err)
	}
	ended := status
	if status == broker.Audited {
		ended = broker.Done
	}
	h.rehearsal.end(s.ID, ended, Result{}, time.Now())
	return status, reason, 0
}

// replacement is why a gentler responder takes a step's place.
type replacement struct {
	guard  string
	about  string // people are told once in a while of each
	title  string // what they are told
	reason string
}

// instead puts the gentler responder in the step's place and tells people.
func (h *Host) instead(ctx context.Context, s *broker.Step, r *running, p replacement) (broker.Status, string, time.Duration) {
	n := *s
	n.ID = broker.StepID(s.AlertID, s.Rule, s.Position, r.Instead)
	n.Action = broker.Action{Responder: r.Instead}
	n.Remaining = nil // the chain goes on from the step itself
	n.InPlaceOf = s.Responder + ": " + p.reason
	if _, err := h.Broker.PublishStep(ctx, &n); err != nil {
		h.Log.Error("the step in another's place could not be stored", "step", s.ID, "responder", r.Instead, "error", err)
		return "", "", retryFirst
	}
	reason := p.reason + "; " + r.Instead + " is done instead"
	if h.ledger.tellOnce(s.Rule+"\x00"+p.about, time.Now()) {
		h.Tell(p.title, fmt.Sprintf("rule %s: %s", s.Rule, reason))
	}
	return h.suppress(p.guard, reason)
}

// spare has the gentler responder do what this one would not.
func (h *Host) spare(ctx context.Context, r *running, req *Request, why *spareError, reason string) (broker.Status, string, time.Duration) {
	if r.Instead == "" {
		return broker.Refused, reason, 0
	}
	about := why.kind + "\x00" + req.Target.Namespace + "\x00" + owner(r, req)
	status, reason, again := h.instead(ctx, req.Step, r, replacement{guard: "workload", about: about, title: "spared for its workload", reason: reason})
	if again == 0 {
		h.ledger.instead(req.Step.ID, r.Instead)
	}
	return status, reason, again
}

// unanswered tells people of an alert that nothing was done about in the end: what
// was to be done was held back, and what was to be done instead was not.
func (h *Host) unanswered(o broker.Outcome, s *broker.Step) {
	switch o.Status {
	case broker.Failed, broker.Refused, broker.Expired:
		if !h.ledger.tellOnce("nothing\x00"+s.Rule+"\x00"+o.Target.Namespace, time.Now()) {
			return
		}
		h.Tell("nothing was done", fmt.Sprintf("rule %s: %s of %s ended as %s: %s", s.Rule, s.Responder, describe(o.Target), o.Status, o.Reason))
	}
}

// act lets the responder act, between the two records that make sure that a
// crash neither loses the act nor does it twice.
func (h *Host) act(ctx context.Context, d *broker.Delivery, r *running, req *Request) {
	s := d.Step
	harm := r.Kind == Harm
	if harm {
		failpoint.Hit("host.before-intent")
		if !req.Resumed {
			if err := h.ledger.save(ctx, s.ID); err != nil {
				// A full disk must not disarm stoop: the act goes on, known
				// only to this process.
				h.Log.Error("the intent of a step could not be stored", "step", s.ID, "error", err)
			}
		} else if rec := h.ledger.get(s.ID); r.local() {
			// The kernel has done by now what it was asked for.
		} else if rec != nil && time.Since(rec.Began) < settle {
			h.retry(d, settle-time.Since(rec.Began))
			return
		}
		failpoint.Hit("host.after-intent")
	}
	req.Intended = h.undos.record(s.ID)
	req.paused = func() string { return h.paused(s) }
	req.intend = func(undo json.RawMessage, ttl time.Duration) {
		if err := h.undos.add(context.WithoutCancel(ctx), s, &r.Entry, Result{Undo: undo, TTL: ttl}, true); err != nil {
			h.Log.Error("the undo of a step could not be stored", "step", s.ID, "error", err)
		}
	}
	actCtx, cancel := h.deadline(ctx, r.Deadline)
	if h.Guards.Audit != nil && auditEvent(req.Alert, s.Target) {
		term, _ := h.Guards.Audit.Turn()
		if term == nil {
			cancel()
			h.retry(d, standbyAgain)
			return
		}
		defer context.AfterFunc(term, cancel)()
	}
	s.Took.Requested = broker.MicrosSince(s.Received)
	res, err := r.act.Act(actCtx, req)
	cancel()
	s.Took.Done = broker.MicrosSince(s.Received)
	failpoint.Hit("host.after-act")
	if ctx.Err() != nil && err != nil && errors.Is(err, context.Canceled) {
		return // stoop is being stopped: the step is given again at the next start
	}
	status, retry, after, reason := classify(err)
	if retry && harm && r.local() {
		rec := h.ledger.get(s.ID)
		retry = rec != nil && time.Since(rec.Began) < localFor
	}
	var gentler *spareError
	if errors.As(err, &gentler) {
		// What came of the step has to be known also when stoop is being stopped.
		var again time.Duration
		if status, reason, again = h.spare(context.WithoutCancel(ctx), r, req, gentler, reason); again > 0 {
			h.retry(d, again)
			return
		}
	}
	if retry {
		if r.Kind == Evidence && s.OnFailure != broker.Stop {
			// Evidence that can't be had now is tried for, but never stops
			// what comes after it.
			if err := h.next(context.WithoutCancel(ctx), s, broker.Retrying, Result{Reason: reason}); err != nil {
				h.Log.Error("the next step of a chain could not be stored", "step", s.ID, "rule", s.Rule, "error", err)
			}
		}
		h.retry(d, h.retrying(d, r, reason, after))
		return
	}
	if err == nil {
		reason = res.Reason
		if res.Nothing {
			status = broker.Nothing
		}
	}
	// What was done is recorded also when stoop is being stopped.
	ctx = context.WithoutCancel(ctx)
	undo := res.Undo != nil && (status == broker.Done || status == broker.Failed)
	if undo {
		if err := h.undos.add(ctx, s, &r.Entry, res, false); err != nil {
			h.Log.Error("the undo of a step could not be stored", "step", s.ID, "error", err)
		}
	} else if status == broker.Nothing || !req.Resumed {
		// Otherwise an earlier try may have done it before this one failed.
		if err := h.undos.forget(ctx, s.ID); err != nil {
			h.Log.Error("the undo of a step that was not done could not be forgotten", "step", s.ID, "error", err)
		}
	}
	if !undo {
		reason, undo = h.left(s.ID, reason)
	}
	res.Reason = reason
	if harm {
		h.ledger.end(s.ID, status, res, time.Now())
		if err := h.ledger.save(ctx, s.ID); err != nil {
			h.Log.Error("the result of a step could not be stored", "step", s.ID, "error", err)
		}
		if !undo {
			h.refund(s.ID)
		}
		failpoint.Hit("host.after-result")
	}
	h.finish(ctx, d, r, status, res, undo)
}

// retrying says of a step that a try failed and another will be made, and after how
// long; after is what the other side asked for.
func (h *Host) retrying(d *broker.Delivery, r *running, reason string, after time.Duration) time.Duration {
	h.Metrics.retries.WithLabelValues(r.Name).Inc()
	o := d.Step.Outcome(broker.Retrying, reason)
	o.Attempt = d.Attempt
	h.record(o)
	if after == 0 {
		after = backoff(d.Attempt)
	}
	return after
}

// left says of a step that ends without having been done whether an earlier run of
// it, or try, may have done it before it was cut off: it is not to be forgotten.
func (h *Host) left(id, reason string) (string, bool) {
	if h.undos.record(id) == nil {
		return reason, false
	}
	return reason + "; an earlier run of the step was cut off in the middle and may have done it: stoop undo takes that back", true
}

// deadline bounds an act. When stoop is stopped, one under way has grace to
// end.
func (h *Host) deadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	act, cancel := context.WithTimeout(context.WithoutCancel(ctx), d)
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(grace, cancel)
		context.AfterFunc(act, func() { t.Stop() })
	})
	return act, func() { stop(); cancel() }
}

// finish publishes the next step, records the outcome, and acknowledges.
func (h *Host) finish(ctx context.Context, d *broker.Delivery, r *running, status broker.Status, res Result, undo bool) {
	s := d.Step
	if ahead(r, s) {
		// It is under way already.
	} else if err := h.next(ctx, s, status, res); err != nil {
		h.Log.Error("the next step of a chain could not be stored", "step", s.ID, "rule", s.Rule, "error", err)
		h.retry(d, backoff(d.Attempt))
		return
	}
	failpoint.Hit("host.after-next")
	o := s.Outcome(status, res.Reason)
	o.Found, o.Undo = res.Found, undo
	if s.InPlaceOf != "" {
		if o.Reason != "" {
			o.Reason += "; "
		}
		o.Reason += "in place of " + s.InPlaceOf
		h.unanswered(o, s)
	}
	if s.Approved != nil {
		o.Actor = s.Approved.Actor
	}
	h.record(o)
	failpoint.Hit("host.before-ack")
	h.Ended.add(s.ID)
	h.acknowledge(d)
}

func (h *Host) acknowledge(d *broker.Delivery) {
	if err := d.Ack(); err != nil {
		h.Log.Warn("a step could not be acknowledged, and will come again", "step", d.Step.ID, "error", err)
	}
}

// next publishes the step after s, if its chain goes on. It may do so twice for
// one step: the second time the store knows it.
func (h *Host) next(ctx context.Context, s *broker.Step, status broker.Status, res Result) error {
	stopped := ""
	if s.OnFailure == broker.Stop {
		switch status {
		case broker.Failed, broker.Refused, broker.Expired, broker.Suppressed, broker.Denied:
			stopped = fmt.Sprintf("%s before it ended as %s, and its onFailure is stop", s.Responder, status)
		}
	}
	var found []broker.Finding
	if status != "" {
		found = []broker.Finding{{Responder: s.Responder, Status: status, Reason: res.Reason, Found: res.Found}}
	}
	for n := s.Next(found...); n != nil; n = n.Next() {
		if stopped != "" {
			h.record(n.Outcome(broker.Suppressed, stopped))
			continue
		}
		_, err := h.Broker.PublishStep(ctx, n)
		if !errors.Is(err, broker.ErrQueueFull) && !errors.Is(err, broker.ErrTooLarge) {
			return err
		}
		h.record(n.Outcome(broker.Failed, err.Error())) // the one after it may be for a responder that has room
	}
	return nil
}

// record stores an outcome, counts it and logs it.
func (h *Host) record(o broker.Outcome) {
	o.Node, o.Cluster = h.Env.Node, h.Env.Cluster
	if err := h.Broker.PublishOutcome(o); err != nil {
		h.lost.add(o)
		h.Log.Error("an outcome could not be stored", "step", o.ID, "responder", o.Responder, "status", o.Status, "reason", o.Reason, "error", err)
	}
	h.Metrics.outcomes.WithLabelValues(o.Responder, string(o.Status)).Inc()
	if o.Took.Done > 0 && o.Status == broker.Done {
		h.Metrics.took.WithLabelValues(o.Responder).Observe(float64(o.Took.Done) / 1e6)
	}
	level := slog.LevelInfo
	switch o.Status {
	case broker.Failed, broker.Expired, broker.Retrying:
		level = slog.LevelWarn
	case broker.Suppressed, broker.Nothing:
		level = slog.LevelDebug
	}
	about := []any{"status", o.Status, "responder", o.Responder, "rule", o.Rule}
	switch t := o.Target; {
	case t.Pod != "":
		about = append(about, "namespace", t.Namespace, "pod", t.Pod)
	case t.Container != "":
		about = append(about, "container", t.Container)
	case t.Resource != nil:
		about = append(about, "namespace", t.Resource.Namespace, "resource", t.Resource.Resource+"/"+t.Resource.Name)
	case t.Host:
		about = append(about, "host", true)
	}
	about = append(about, "reason", o.Reason, "step", o.ID, "took", (time.Duration(o.Took.Done) * time.Microsecond).String())
	h.Log.Log(context.Background(), level, "step", about...)
}

func (h *Host) retry(d *broker.Delivery, after time.Duration) {
	if err := d.Retry(after); err != nil {
		h.Log.Warn("a step could not be given back, and will come again", "step", d.Step.ID, "error", err)
	}
}

// backoff is how long to wait after a try: twice as long each time, by a
// random fifth more or less, so that many don't come at once.
func backoff(attempt int) time.Duration {
	d := retryMost
	if attempt < 8 {
		d = min(retryFirst<<(attempt-1), retryMost)
	}
	return d - d/5 + rand.N(2*d/5)
}

// mode is the strictest of program and rule, and why it is audit.
func (h *Host) mode(s *broker.Step) (broker.Mode, string) {
	switch {
	case h.Guards.Mode != broker.Enforce:
		return broker.Audit, "the program is in audit mode"
	case s.Mode != broker.Enforce:
		return broker.Audit, "the rule is in audit mode"
	}
	e := h.enforced.Load()
	if _, ok := e.Rules[s.Rule]; !ok {
		return broker.Audit, "the rule is in audit mode by now, or gone"
	}
	if s.Received.Before(e.since(s.Rule)) {
		return broker.Audit, "the alert came before enforce was switched on"
	}
	if why := h.settling(s.Rule, s.Received); why != "" {
		return broker.Audit, why
	}
	return broker.Enforce, ""
}

// Metrics are what the host counts.
type Metrics struct {
	outcomes, suppressed, retries *prometheus.CounterVec
	breakers                      prometheus.Counter
	took                          *prometheus.HistogramVec
}

// NewMetrics registers the host's metrics. Their labels are responders,
// statuses and guards, never anything out of an alert.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		outcomes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stoop_outcomes_total", Help: "Outcomes of steps, by responder and status."}, []string{"responder", "status"}),
		suppressed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stoop_suppressed_total", Help: "Harmful steps that a guard held back, by guard."}, []string{"guard"}),
		retries:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stoop_retries_total", Help: "Tries that failed and are made again, by responder."}, []string{"responder"}),
		breakers:   prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_breakers_opened_total", Help: "How often a limit was reached and its breaker opened."}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "stoop_step_seconds", Help: "From an alert's arrival to a step done, by responder.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
		}, []string{"responder"}),
	}
	r.MustRegister(m.outcomes, m.suppressed, m.retries, m.breakers, m.took)
	return m
}
