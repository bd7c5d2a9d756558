package responders

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"stoop/broker"
)

// Dump is all that STATE should hold by what this process knows. A store that
// refused the last writes does not.
func (h *Host) Dump() map[string][]byte {
	all := map[string][]byte{}
	h.ledger.dump(all)
	h.undos.dump(all)
	h.approvals.dump(all)
	put(all, keyPause, h.pause.Load())
	put(all, keyEnforced, h.enforced.Load())
	return all
}

// Lost are the outcomes that the store refused.
func (h *Host) Lost() []broker.Outcome {
	h.lost.mu.Lock()
	defer h.lost.mu.Unlock()
	return h.lost.all
}

// lost keeps outcomes for the next store, as many as there is sense in.
type lost struct {
	mu  sync.Mutex
	all []broker.Outcome
}

const lostMax = 10_000

func (l *lost) add(o broker.Outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.all) < lostMax {
		l.all = append(l.all, o)
	}
}

// Pause is whether acting is stopped, and since when.
type Pause struct {
	Paused  bool      `json:"paused"`
	Since   time.Time `json:"since,omitzero"`
	Resumed time.Time `json:"resumed,omitzero"` // what arrived before is never acted on
	Actor   string    `json:"actor,omitempty"`
}

const (
	keyPause    = "pause"
	keyEnforced = "enforced"
)

func (h *Host) loadPause(ctx context.Context) error {
	p := &Pause{}
	if _, err := h.Broker.State().Get(ctx, keyPause, p); err != nil {
		return err
	}
	h.pause.Store(p)
	return nil
}

// Paused is whether acting is stopped.
func (h *Host) Paused() Pause { return *h.pause.Load() }

// OpenBreakers is how many breakers hold harmful steps back.
func (h *Host) OpenBreakers() int { return h.ledger.openBreakers(time.Now()) }

// SetPause stops acting, or goes on; it holds over restarts. Undo still works
// while paused. When it can't be stored it holds for this process all the
// same, and the error says so.
func (h *Host) SetPause(ctx context.Context, paused bool, actor string) (Pause, error) {
	p := *h.pause.Load()
	if p.Paused == paused {
		return p, nil
	}
	now := time.Now().UTC()
	p.Paused, p.Actor = paused, actor
	if paused {
		p.Since = now
	} else {
		p.Resumed = now
	}
	h.pause.Store(&p)
	if !paused {
		select {
		case h.resumed <- struct{}{}:
		default:
		}
	}
	h.Log.Warn("acting is "+map[bool]string{true: "paused", false: "resumed"}[paused], "actor", actor)
	if err := h.Broker.State().Put(ctx, keyPause, p, 0); err != nil {
		return p, fmt.Errorf("it holds for now, but not over a restart: %w", err)
	}
	return p, nil
}

// paused is why a step must not be done for a pause's sake, or "".
func (h *Host) paused(s *broker.Step) string {
	p := h.pause.Load()
	switch {
	case p.Paused:
		return fmt.Sprintf("paused by %s since %s", p.Actor, p.Since.Format(time.RFC3339))
	case s.Since().Before(p.Resumed):
		return fmt.Sprintf("the alert came while stoop was paused (until %s)", p.Resumed.Format(time.RFC3339))
	}
	return ""
}

// enforced is since when the program and each rule enforce: what was stored
// before is not acted on.
type enforced struct {
	Program time.Time            `json:"program,omitzero"`
	Rules   map[string]time.Time `json:"rules,omitempty"`
}

func (e *enforced) since(rule string) time.Time {
	t := e.Rules[rule]
	if e.Program.After(t) {
		return e.Program
	}
	return t
}

func (h *Host) loadEnforced(ctx context.Context) error {
	e := &enforced{}
	if _, err := h.Broker.State().Get(ctx, keyEnforced, e); err != nil {
		return err
	}
	h.enforced.Store(e)
	return nil
}

// SetRules says which rules are in force and in which mode. It notes since when
// each enforces; one that did already keeps its time.
func (h *Host) SetRules(ctx context.Context, modes map[string]broker.Mode) error {
	old := h.enforced.Load()
	now := time.Now().UTC()
	e := &enforced{Rules: map[string]time.Time{}}
	if h.Guards.Mode == broker.Enforce {
		if e.Program = old.Program; e.Program.IsZero() {
			e.Program = now
		}
	}
	for rule, mode := range modes {
		if mode != broker.Enforce {
			continue
		}
		if t, ok := old.Rules[rule]; ok {
			e.Rules[rule] = t
		} else {
			e.Rules[rule] = now
		}
	}
	h.enforced.Store(e)
	if e.Program.Equal(old.Program) && maps.Equal(e.Rules, old.Rules) {
		return nil
	}
	return h.Broker.State().Put(ctx, keyEnforced, e, 0)
}
