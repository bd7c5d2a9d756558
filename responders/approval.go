package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"stoop/alert"
	"stoop/broker"
)

// Approval is a step that waits until a person decides about it, as it is shown
// to that person.
type Approval struct {
	ID        string           `json:"id"`
	Asked     time.Time        `json:"asked"`
	Expires   time.Time        `json:"expires"`
	Rule      string           `json:"rule"`
	Responder string           `json:"responder"`
	Params    json.RawMessage  `json:"params,omitempty"`
	Target    alert.Target     `json:"target,omitzero"`
	Object    string           `json:"object,omitempty"`  // what the step acts on, where that is not the target
	Changes   string           `json:"changes,omitempty"` // what it would change, as things were when it was asked for
	Alert     json.RawMessage  `json:"alert,omitempty"`   // as Falco wrote it
	Found     []broker.Finding `json:"found,omitempty"`   // by the steps before
}

// approval is what STATE holds of such a step, under approval.<step id>.
type approval struct {
	Step    *broker.Step `json:"step"`
	About   string       `json:"about"` // rule, responder and object
	Object  string       `json:"object,omitempty"`
	Changes string       `json:"changes,omitempty"`
	Urgent  bool         `json:"urgent,omitempty"`
	Asked   time.Time    `json:"asked"`
	Expires time.Time    `json:"expires"`
}

const (
	// approvalsMax bounds how many steps wait at once: nobody decides about more.
	approvalsMax = 500
	// approvalAgain is when it is tried again to end what expired, if the store
	// refuses.
	approvalAgain = 5 * time.Second
	// changesMost bounds, in characters, what is told of what a step would change.
	changesMost = 4000
)

// approvals are all of them.
type approvals struct {
	state *broker.State
	mu    sync.Mutex
	byID  map[string]*approval
	busy  map[string]bool // being decided about
	wake  chan struct{}   // a token when one was added, or given back
}

func loadApprovals(ctx context.Context, state *broker.State) (*approvals, error) {
	a := &approvals{state: state, byID: map[string]*approval{}, busy: map[string]bool{}, wake: make(chan struct{}, 1)}
	err := state.Each(ctx, "approval.*", func(key string, value []byte, _ time.Time) error {
		r := &approval{}
		if err := json.Unmarshal(value, r); err != nil || r.Step == nil {
			return fmt.Errorf("read state %s: %w", key, err)
		}
		a.byID[key[len("approval."):]] = r
		return nil
	})
	return a, err
}

func (a *approvals) dump(into map[string][]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, r := range a.byID {
		put(into, "approval."+id, r)
	}
}

// add puts a step aside, and nobody decides about it until it is given back. It
// returns why not, if another one waits about the same, or too many do.
func (a *approvals) add(r *approval) (refused string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byID[r.Step.ID] == nil {
		for id, other := range a.byID {
			if other.About == r.About {
				refused = fmt.Sprintf("step %s of the same rule waits for approval to do the same to the same", id)
			}
		}
		if refused == "" {
			refused = a.full(r)
		}
	}
	if refused == "" {
		a.byID[r.Step.ID], a.busy[r.Step.ID] = r, true
	}
	return refused
}

// full is why no more steps like this one may wait, or "". As with the limits, a
// namespace gets at most half of the places, and alerts below Critical at most three
// quarters: what one of them uses up is never all. The caller holds the lock.
func (a *approvals) full(r *approval) string {
	namespace, others := 0, 0
	for _, o := range a.byID {
		if o.namespace() == r.namespace() {
			namespace++
		}
		if !o.Urgent {
			others++
		}
	}
	who, n := "", len(a.byID)
	switch {
	case n >= approvalsMax:
	case r.namespace() != "" && namespace >= approvalsMax/2:
		who, n = " in namespace "+r.namespace(), namespace
	case !r.Urgent && others >= approvalsMax-approvalsMax/4:
		who, n = " after alerts below Critical", others
	default:
		return ""
	}
	return fmt.Sprintf("%d steps%s wait for approval already: nobody is asked about more", n, who)
}

// namespace is the one that the step is about, or "".
func (r *approval) namespace() string {
	if t := r.Step.Target; t.Resource != nil {
		return t.Resource.Namespace
	}
	return r.Step.Target.Namespace
}

// take makes the caller the only one who decides about a step.
func (a *approvals) take(id string) (*approval, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch r := a.byID[id]; {
	case r == nil:
		return nil, fmt.Errorf("%q: %w", id, ErrNoApproval)
	case a.busy[id]:
		return nil, fmt.Errorf("step %s is being decided about already", id)
	default:
		a.busy[id] = true
		return r, nil
	}
}

func (a *approvals) give(id string) {
	a.mu.Lock()
	delete(a.busy, id)
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// end forgets a step that was decided about.
func (a *approvals) end(ctx context.Context, id string) error {
	a.mu.Lock()
	_, ok := a.byID[id]
	delete(a.byID, id)
	a.mu.Unlock()
	if !ok {
		return nil
	}
	return a.state.Delete(ctx, "approval."+id)
}

// next is the step that expires first, and when.
func (a *approvals) next() (id string, expires time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, r := range a.byID {
		if !a.busy[i] && (expires.IsZero() || r.Expires.Before(expires)) {
			id, expires = i, r.Expires
		}
	}
	return id, expires
}

// asks reports whether a step waits for a person's approval: as its rule says, or
// else its responder.
func (r *running) asks(s *broker.Step) bool {
	if s.Approve != nil {
		return *s.Approve
	}
	return r.Approve != nil && r.Approve(s.Params)
}

// approval puts a step aside that waits for a person, who is told. It returns
// "" for one that doesn't, or was approved.
func (h *Host) approval(ctx context.Context, r *running, req *Request) (status broker.Status, reason string, again time.Duration) {
	s := req.Step
	if s.Approved != nil || !r.asks(s) {
		return "", "", 0
	}
	about := act{Rule: s.Rule, Responder: s.Responder, Object: object(r, req)}
	if r.Kind == Harm {
		if why := h.ledger.cooling(about, &h.Guards, time.Now()); why != "" {
			return h.suppress("cooldown", why)
		}
	}
	now := time.Now().UTC()
	a := &approval{Step: s, About: about.objectKey(), Asked: now, Expires: now.Add(h.Guards.Approval), Urgent: req.Alert.Priority.Urgent()}
	what := describe(req.Target)
	if r.objectOf(s.Params) == NodeObject {
		// The target is only where the alert came from.
		a.Object = "node " + h.Env.Node
		what = a.Object + " (after an alert of " + what + ")"
	}
	if refused := h.approvals.add(a); refused != "" {
		return h.suppress("approval", refused)
	}
	defer h.approvals.give(s.ID)
	if p, ok := r.act.(Previewer); ok {
		previewing, cancel := h.deadline(ctx, r.Deadline)
		res, err := p.Preview(previewing, req)
		cancel()
		if status, done := a.preview(res, err); done {
			if err := h.approvals.end(context.WithoutCancel(ctx), s.ID); err != nil {
				h.Log.Error("that nobody is asked about a step could not be stored", "step", s.ID, "error", err)
			}
			return status, a.Changes, 0
		}
	}
	if err := h.approvals.state.Put(context.WithoutCancel(ctx), "approval."+s.ID, a, 0); err != nil {
		h.Log.Error("a step that waits for approval could not be stored: a restart would forget it", "step", s.ID, "error", err)
	}
	reason = fmt.Sprintf("waits until %s for somebody to decide: stoop approve %s, or stoop deny %[2]s", a.Expires.Format(time.RFC3339), s.ID)
	o := s.Outcome(broker.AwaitingApproval, reason)
	o.Found = map[string]string{"expires": a.Expires.Format(time.RFC3339), "output": cut(req.Alert.Output, 500)}
	if len(s.Params) > 0 {
		o.Found["params"] = cut(string(s.Params), 500)
	}
	if a.Object != "" {
		o.Found["object"] = a.Object
	}
	if a.Changes != "" {
		o.Found["changes"] = cut(a.Changes, 500)
		what += " (" + o.Found["changes"] + ")"
	}
	if f, ok := r.act.(Foreseer); ok {
		foreseeing, cancel := h.deadline(ctx, r.Deadline)
		if err := f.Foresee(foreseeing, req); err != nil {
			o.Found["mind"] = cut(reasonOf(err), 500)
			what += " (mind: " + o.Found["mind"] + ")"
		}
		cancel()
	}
	h.record(o)
	h.Tell("waits for approval", fmt.Sprintf("rule %s wants %s of %s; step %s %s", s.Rule, s.Responder, what, s.ID, reason))
	return broker.AwaitingApproval, reason, 0
}

// preview keeps what a step would change. When that is nothing, or can't be done, the
// step ends with the status, and the reason in Changes; when it is not known, a person
// is told so and asked even so.
func (a *approval) preview(res Result, err error) (status broker.Status, done bool) {
	if err == nil {
		a.Changes = cut(res.Reason, changesMost)
		return broker.Nothing, res.Nothing
	}
	status, retry, _, reason := classify(err)
	if a.Changes = cut(reason, changesMost); retry {
		a.Changes = "what it would change is not known: " + a.Changes
	}
	return status, !retry
}

// cut shows the beginning of a text that an attacker may have written.
func cut(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// ErrNoApproval says that no step of an id waits for approval.
var ErrNoApproval = errors.New("no step of this id waits for approval (stoop approve without an ID lists those that do)")

// Approvals are the steps that wait for a person, the oldest first.
func (h *Host) Approvals() []Approval {
	a := h.approvals
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]Approval, 0, len(a.byID))
	for _, id := range slices.SortedFunc(maps.Keys(a.byID), func(x, y string) int { return a.byID[x].Asked.Compare(a.byID[y].Asked) }) {
		if a.busy[id] {
			continue // not yet, or not any more
		}
		r := a.byID[id]
		out = append(out, Approval{
			ID: id, Asked: r.Asked, Expires: r.Expires, Rule: r.Step.Rule, Responder: r.Step.Responder,
			Params: r.Step.Params, Target: r.Step.Target, Object: r.Object, Changes: r.Changes, Alert: r.Step.Alert, Found: r.Step.Found,
		})
	}
	return out
}

// Approve has a step done that waits for it: it goes the whole way again, with its
// target proved anew, but is held back by nothing that only counts.
func (h *Host) Approve(ctx context.Context, id, actor string) (broker.Outcome, error) {
	if why := h.stopped(); why != "" {
		if !h.pause.Load().Paused {
			return broker.Outcome{}, fmt.Errorf("approve %s: %s; lift that first: %s", id, why, PauseCommand(h.Cluster.Namespace, false))
		}
		return broker.Outcome{}, fmt.Errorf("approve %s: acting is %s: stoop resume first", id, why)
	}
	r, err := h.approvals.take(id)
	if err != nil {
		return broker.Outcome{}, err
	}
	defer h.approvals.give(id)
	if h.Guards.Audit != nil {
		if term, why := h.Guards.Audit.Turn(); term == nil {
			return broker.Outcome{}, fmt.Errorf("approve %s: this stoop does not answer audit events now: %s", id, why)
		}
	}
	now := time.Now().UTC()
	if !now.Before(r.Expires) {
		return broker.Outcome{}, fmt.Errorf("approve %s: it waited only until %s", id, r.Expires.Format(time.RFC3339))
	}
	s := *r.Step
	s.Approved = &broker.Approval{Actor: actor, Time: now}
	if _, err := h.Broker.PublishStep(ctx, &s); err != nil {
		return broker.Outcome{}, fmt.Errorf("approve %s: %w", id, err)
	}
	h.Log.Info("a step was approved", "step", id, "responder", s.Responder, "rule", s.Rule, "actor", actor)
	o := s.Outcome(broker.AwaitingApproval, "approved; its outcome follows")
	o.Actor = actor
	return o, h.approvals.end(context.WithoutCancel(ctx), id)
}

// Deny ends a step that waits for approval. Its chain goes on, as its onFailure
// says.
func (h *Host) Deny(ctx context.Context, id, actor string) (broker.Outcome, error) {
	return h.decide(ctx, id, actor, broker.Denied, "denied by "+actor)
}

// decide ends a step that is not done, and starts the next of its chain.
func (h *Host) decide(ctx context.Context, id, actor string, status broker.Status, reason string) (broker.Outcome, error) {
	r, err := h.approvals.take(id)
	if err != nil {
		return broker.Outcome{}, err
	}
	defer h.approvals.give(id)
	if err := h.next(ctx, r.Step, status, Result{Reason: reason}); err != nil {
		return broker.Outcome{}, fmt.Errorf("%s step %s: the next one of its chain: %w", status, id, err)
	}
	o := r.Step.Outcome(status, reason)
	o.Actor = actor
	h.record(o)
	h.Ended.add(id)
	return o, h.approvals.end(context.WithoutCancel(ctx), id)
}

// approvalLoop ends the steps that nobody has decided about in time, also those
// whose time was over while stoop was down.
func (h *Host) approvalLoop(ctx context.Context) {
	whenDue(ctx, h.approvals.wake, h.approvals.next, func(id string) {
		_, err := h.decide(ctx, id, "", broker.Expired, "nobody has approved it in time")
		if err != nil {
			h.Log.Error("a step that nobody approved could not be ended", "step", id, "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(approvalAgain):
			}
		}
	})
}
