package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"stoop/alert"
	"stoop/broker"
)

// undo is what STATE holds of a step that can be taken back, under undo.<step
// id>, until it has been.
type undo struct {
	Responder string          `json:"responder"`
	Rule      string          `json:"rule"`
	Alert     string          `json:"alert"`
	Target    alert.Target    `json:"target"`
	Record    json.RawMessage `json:"record"`
	Due       time.Time       `json:"due,omitzero"` // when it is taken back by itself
	Done      time.Time       `json:"done"`         // when the step was done
	Undone    time.Time       `json:"undone,omitzero"`
	// Local: it lives in this machine's kernel, and is remembered for as long as
	// it does there.
	Local bool `json:"local,omitempty"`
	// Intended: it was about to be done, and may have been.
	Intended bool `json:"intended,omitempty"`

	// Of a ttl that could not be carried out: how often, and what was said of
	// it when.
	attempts int
	said     string
	saidAt   time.Time
}

const (
	// undoneKept is how long it is remembered that a step was taken back.
	undoneKept = 24 * time.Hour
	// undoKept is how long a step can be taken back that nothing takes back
	// by itself.
	undoKept = 30 * 24 * time.Hour
	// A ttl that can't be carried out is tried again after undoFirst, and ever
	// less often, up to undoMost apart. Why is said when it is another reason
	// than before, and every undoSaid.
	undoFirst = time.Second
	undoMost  = 5 * time.Minute
	undoSaid  = time.Hour
)

// over reports whether nobody needs the record any more.
func (r *undo) over(now time.Time) bool {
	if !r.Undone.IsZero() {
		return now.Sub(r.Undone) > undoneKept
	}
	return r.Due.IsZero() && !r.Local && now.Sub(r.Done) > undoKept
}

// undos are all of them.
type undos struct {
	state *broker.State
	mu    sync.Mutex
	byID  map[string]*undo
	busy  map[string]bool
	wake  chan struct{} // a token when a due time was added
}

func loadUndos(ctx context.Context, state *broker.State) (*undos, error) {
	u := &undos{state: state, byID: map[string]*undo{}, busy: map[string]bool{}, wake: make(chan struct{}, 1)}
	var old []string
	err := state.Each(ctx, "undo.*", func(key string, value []byte, _ time.Time) error {
		r := &undo{}
		if err := json.Unmarshal(value, r); err != nil {
			return fmt.Errorf("read state %s: %w", key, err)
		}
		if r.over(time.Now()) {
			old = append(old, key)
		} else {
			u.byID[key[len("undo."):]] = r
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, key := range old {
		if err := state.Delete(ctx, key); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// dump adds every record to what a store is to be given.
func (u *undos) dump(into map[string][]byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, r := range u.byID {
		put(into, "undo."+id, r)
	}
}

// add stores how a step is taken back that was done, or is about to be.
func (u *undos) add(ctx context.Context, s *broker.Step, by *Entry, res Result, intended bool) error {
	r := &undo{
		Responder: by.Name, Local: by.local(), Rule: s.Rule, Alert: s.AlertID, Target: s.Target, Record: res.Undo, Done: time.Now().UTC(), Intended: intended,
	}
	if res.TTL > 0 {
		r.Due = time.Now().Add(res.TTL).UTC()
	}
	u.mu.Lock()
	u.byID[s.ID] = r
	stored := *r
	maps.DeleteFunc(u.byID, func(_ string, r *undo) bool { return r.over(r.Done) || r.over(time.Now()) })
	u.mu.Unlock()
	ttl := undoKept
	if res.TTL > 0 || r.Local {
		ttl = 0 // until it has been taken back, however long that takes
	}
	select {
	case u.wake <- struct{}{}:
	default:
	}
	return u.state.Put(ctx, "undo."+s.ID, stored, ttl)
}

// record is what a step that was not taken back left for that, or nil.
func (u *undos) record(id string) json.RawMessage {
	u.mu.Lock()
	defer u.mu.Unlock()
	if r := u.byID[id]; r != nil && r.Undone.IsZero() {
		return r.Record
	}
	return nil
}

// forget drops what was stored of a step that was about to be done, and was not.
func (u *undos) forget(ctx context.Context, id string) error {
	u.mu.Lock()
	r := u.byID[id]
	intended := r != nil && r.Intended
	if intended {
		delete(u.byID, id)
	}
	u.mu.Unlock()
	if !intended {
		return nil
	}
	return u.state.Delete(ctx, "undo."+id)
}

// next is the step that falls due first, and when.
func (u *undos) next() (id string, due time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, r := range u.byID {
		if r.Undone.IsZero() && !r.Due.IsZero() && !u.busy[i] && (due.IsZero() || r.Due.Before(due)) {
			id, due = i, r.Due
		}
	}
	return id, due
}

// kept are those that were not taken back.
func (u *undos) kept() map[string]undo {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := map[string]undo{}
	for id, r := range u.byID {
		if r.Undone.IsZero() {
			out[id] = *r
		}
	}
	return out
}

// take makes the caller the only one who deals with a step until it is given
// back; false: somebody else does.
func (u *undos) take(id string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if r := u.byID[id]; u.busy[id] || r == nil || !r.Undone.IsZero() {
		return false
	}
	u.busy[id] = true
	return true
}

func (u *undos) give(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.busy, id)
}

// end notes that a step is taken back.
func (u *undos) end(ctx context.Context, id string) error {
	u.mu.Lock()
	r := u.byID[id]
	r.Undone = time.Now().UTC()
	stored := *r
	u.mu.Unlock()
	return u.state.Put(ctx, "undo."+id, stored, undoneKept)
}

// outcome is what is said of taking the step back, or of keeping it.
func (r *undo) outcome(id, actor string) broker.Outcome {
	return broker.Outcome{
		ID: id, Time: time.Now().UTC(), Alert: r.Alert, Rule: r.Rule, Responder: r.Responder,
		Target: r.Target, Actor: actor,
	}
}

// ErrNoUndo says that there is nothing to take back under an id.
var ErrNoUndo = errors.New("no step of this id can be taken back (stoop history shows which can)")

// Undo takes a step back. Taking back what was taken back already is the
// status nothing.
func (h *Host) Undo(ctx context.Context, id, actor string) (broker.Outcome, error) {
	o, err := h.undo(ctx, id, actor)
	h.recordFailed(o, err)
	return o, err
}

// Undoable reports whether a step could be taken back.
func (h *Host) Undoable(id string) bool { return h.undos.record(id) != nil }

// recordFailed records that a step could not be taken back.
func (h *Host) recordFailed(o broker.Outcome, err error) {
	if err != nil && (o.Status == broker.Failed || o.Status == broker.Retrying) {
		h.record(o)
	}
}

// undo takes a step back, and records that if it was.
func (h *Host) undo(ctx context.Context, id, actor string) (broker.Outcome, error) {
	u := h.undos
	u.mu.Lock()
	r := u.byID[id]
	if r == nil {
		u.mu.Unlock()
		return broker.Outcome{}, fmt.Errorf("%q: %w", id, ErrNoUndo)
	}
	if u.busy[id] {
		u.mu.Unlock()
		return broker.Outcome{}, fmt.Errorf("step %s is being taken back already", id)
	}
	u.busy[id] = true
	u.mu.Unlock()
	defer u.give(id)
	o := r.outcome(id, actor)
	o.Status, o.Reason = broker.Nothing, "it was taken back already"
	if !r.Undone.IsZero() {
		return o, nil
	}
	run := h.responders[r.Responder]
	if run == nil || run.act == nil {
		return o, fmt.Errorf("take back %s: responder %s can't work here (no cluster?)", id, r.Responder)
	}
	back, ok := run.act.(Undoer)
	if !ok {
		return o, fmt.Errorf("take back %s: %s can't be taken back", id, r.Responder)
	}
	actCtx, cancel := h.deadline(ctx, run.Deadline)
	defer cancel()
	res, err := back.Undo(actCtx, &UndoRequest{ID: id, Target: r.Target, Record: r.Record, Actor: actor})
	status, retry, _, reason := classify(err)
	switch {
	case err == nil && !res.Nothing:
		o.Status, o.Reason, o.Found = broker.Undone, res.Reason, res.Found
	case err == nil:
		o.Reason = res.Reason
	case status == broker.Nothing:
		o.Reason = reason
	default:
		o.Status, o.Reason = broker.Failed, "take back: "+reason
		if retry {
			o.Status = broker.Retrying
		}
		return o, fmt.Errorf("take back %s: %s", id, reason)
	}
	h.record(o)
	if err := u.end(ctx, id); err != nil {
		return o, fmt.Errorf("step %s was taken back, but that could not be stored: %w", id, err)
	}
	return o, nil
}

// UndoAll takes back every step that can be, the latest first: of one rule, or of
// all of them with rule "", and not those done before since. What can't be taken
// back here is said in its outcome, and the rest goes on.
func (h *Host) UndoAll(ctx context.Context, rule string, since time.Time, actor string) ([]broker.Outcome, error) {
	all := h.undos.kept()
	maps.DeleteFunc(all, func(_ string, r undo) bool { return rule != "" && r.Rule != rule || r.Done.Before(since) })
	ids := slices.SortedFunc(maps.Keys(all), func(a, b string) int { return all[b].Done.Compare(all[a].Done) })
	var out []broker.Outcome
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return out, fmt.Errorf("%d of %d steps were dealt with: %w", len(out), len(ids), err)
		}
		o, err := h.Undo(ctx, id, actor)
		if err != nil && o.Reason == "" {
			o.Reason = err.Error()
		}
		if err != nil && o.Status == broker.Nothing {
			o.Status, o.Reason = broker.Failed, err.Error()
		}
		out = append(out, o)
	}
	return out, nil
}

// expireLoop takes back the steps whose ttl is over, also those that fell due
// while stoop was down. One that fails is tried again, ever less often, for as
// long as it can't be done: an isolation must not outlive its ttl because the
// API server was away.
func (h *Host) expireLoop(ctx context.Context) {
	whenDue(ctx, h.undos.wake, h.undos.next, func(id string) {
		if o, err := h.undo(ctx, id, "ttl"); err != nil {
			if attempts, news := h.undos.failed(id, err, time.Now()); news {
				h.recordFailed(o, err)
				h.Log.Warn("a ttl is over, but the step could not be taken back; it is tried again", "step", id, "attempt", attempts, "error", err)
			}
		}
	})
}

// whenDue deals with one step after the other as it falls due, until ctx ends. next is
// the step that is due first, and when; "": none is. wake has a token when that may have
// changed.
func whenDue(ctx context.Context, wake <-chan struct{}, next func() (id string, due time.Time), deal func(id string)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-timer.C:
		}
		id, due := next()
		if id == "" {
			continue
		}
		if wait := time.Until(due); wait > 0 {
			timer.Reset(wait)
			continue
		}
		deal(id)
		timer.Reset(0)
	}
}

// failed puts off, in memory, a step that could not be taken back when its ttl
// was over. It returns how often that was, and whether people have to be told:
// a fault that stays must not fill the history.
func (u *undos) failed(id string, err error, now time.Time) (attempts int, news bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.byID[id]
	if r == nil {
		return 0, true
	}
	r.attempts++
	wait := undoMost
	if r.attempts <= 8 {
		wait = undoFirst << (r.attempts - 1)
	}
	r.Due = now.Add(wait - wait/5 + rand.N(2*wait/5))
	if said := err.Error(); said != r.said || now.Sub(r.saidAt) >= undoSaid {
		r.said, r.saidAt, news = said, now, true
	}
	return r.attempts, news
}
