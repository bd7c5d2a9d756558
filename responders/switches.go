package responders

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
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
	put(all, keyClusterPause, h.clusterPause.Load())
	put(all, keyEnforced, h.enforced.Load())
	if s := h.settled.Load(); s != nil {
		put(all, keySettled, s)
	}
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

// PausedCluster is the pause of all stoops of the cluster, as this one sees it. Its
// actor is what the annotation says.
type PausedCluster struct {
	Pause
	Namespace string `json:"namespace"`         // whose annotation it is
	Problem   string `json:"problem,omitempty"` // why that can't be read now: what was seen last holds
}

const (
	keyPause        = "pause"
	keyClusterPause = "pause-cluster"
	keyEnforced     = "enforced"
)

func (h *Host) loadPause(ctx context.Context) error {
	for key, to := range map[string]*atomic.Pointer[Pause]{keyPause: &h.pause, keyClusterPause: &h.clusterPause} {
		p := &Pause{}
		if _, err := h.Broker.State().Get(ctx, key, p); err != nil {
			return err
		}
		to.Store(p)
	}
	if h.Cluster != nil {
		// A store that is gone back to may be behind what this process has seen.
		h.seeCluster()
	}
	return nil
}

// Paused is whether acting is stopped on this node, by a person who asked this
// stoop. See [Host.PausedCluster] for the other reason.
func (h *Host) Paused() Pause { return *h.pause.Load() }

// PausedCluster is whether acting is stopped on all nodes; nil without a cluster.
func (h *Host) PausedCluster() *PausedCluster {
	if h.Cluster == nil {
		return nil
	}
	return &PausedCluster{Pause: *h.clusterPause.Load(), Namespace: h.Cluster.Namespace, Problem: h.Cluster.problem()}
}

// followCluster does what the annotation says, until ctx is done.
func (h *Host) followCluster(ctx context.Context) {
	if h.Cluster == nil {
		return
	}
	var stored *Pause // what an earlier store has, this one may lack
	for {
		_, _, _, changed := h.Cluster.last()
		h.seeCluster()
		again := make(<-chan time.Time)
		if is := h.clusterPause.Load(); is != stored {
			if err := h.Broker.State().Put(ctx, keyClusterPause, is, 0); err == nil {
				stored = is
			} else if ctx.Err() == nil {
				h.Log.Error("the cluster's pause could not be stored: it holds for now, but not over a restart while the API server is away", "error", err)
				again = time.After(pauseStore)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
	}
}

// seeCluster pauses or goes on, as the annotation says. Whoever asks whether it is
// paused calls it first, so that nothing is done between seeing and following it.
func (h *Host) seeCluster() {
	h.seeing.Lock()
	defer h.seeing.Unlock()
	paused, why, known, _ := h.Cluster.last()
	p := *h.clusterPause.Load()
	was := p.Paused
	if !known || was == paused && (!paused || p.Actor == why) {
		return
	}
	now := time.Now().UTC()
	p.Paused = paused
	switch {
	case paused && !was:
		p.Since, p.Actor = now, why
	case paused:
		p.Actor = why
	default:
		p.Resumed = now
	}
	h.clusterPause.Store(&p)
	if paused {
		h.Log.Warn("acting is paused on every node of the cluster", "namespace", h.Cluster.Namespace, "annotation", pauseAnnotation, "why", why)
		return
	}
	h.Log.Warn("acting is resumed on every node of the cluster", "namespace", h.Cluster.Namespace)
	h.wakeKeeper()
}

// wakeKeeper has it looked at what was done on the node before a pause.
func (h *Host) wakeKeeper() {
	select {
	case h.resumed <- struct{}{}:
	default:
	}
}

// stopped is the pause that holds now and how it is lifted, or "".
func (h *Host) stopped() string {
	if p := h.pause.Load(); p.Paused {
		return fmt.Sprintf("paused by %s since %s", p.Actor, p.Since.Format(time.RFC3339))
	}
	if h.Cluster == nil {
		return ""
	}
	h.seeCluster()
	if p := h.clusterPause.Load(); p.Paused {
		said := ""
		if p.Actor != "" {
			said = fmt.Sprintf(": %q", p.Actor)
		}
		return fmt.Sprintf("every node of the cluster is paused since %s by the annotation %s of namespace %s%s",
			p.Since.Format(time.RFC3339), pauseAnnotation, h.Cluster.Namespace, said)
	}
	return ""
}

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
		h.wakeKeeper()
	}
	h.Log.Warn("acting is "+map[bool]string{true: "paused", false: "resumed"}[paused], "actor", actor)
	if err := h.Broker.State().Put(ctx, keyPause, p, 0); err != nil {
		return p, fmt.Errorf("it holds for now, but not over a restart: %w", err)
	}
	return p, nil
}

// paused is why a step must not be done for a pause's sake, or "".
func (h *Host) paused(s *broker.Step) string {
	if why := h.stopped(); why != "" {
		return why
	}
	if p := h.pause.Load(); s.Since().Before(p.Resumed) {
		return fmt.Sprintf("the alert came while stoop was paused (until %s)", p.Resumed.Format(time.RFC3339))
	}
	if p := h.clusterPause.Load(); s.Since().Before(p.Resumed) {
		return fmt.Sprintf("the alert came while every node of the cluster was paused (until %s)", p.Resumed.Format(time.RFC3339))
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
