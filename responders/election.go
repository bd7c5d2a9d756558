package responders

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"stoop/alert"
	"stoop/broker"
)

// Turn says whether it is this stoop's turn to answer audit events, which are of no
// node: of several stoops one does.
type Turn interface {
	// Turn returns the time in which it is, as a context that ends with it; or nil,
	// and why it is not.
	Turn() (term context.Context, why string)
}

// Alone is the turn of the only stoop that there is.
type Alone struct{}

// Turn implements [Turn].
func (Alone) Turn() (context.Context, string) { return context.Background(), "" }

const (
	// electionName is the Lease whose holder answers audit events.
	electionName = "stoop-audit-events"

	// The holder renews it after every electionBeat, takes its turn for over when
	// that has not worked for electionTerm, and is dead to the others when they have
	// not seen the Lease change for electionLasts, each by its own clock. The
	// difference is what an act may take to end, and clocks may differ in speed.
	electionBeat  = 2 * time.Second
	electionTerm  = 10 * time.Second
	electionLasts = 15 * time.Second
	// electionAnswer bounds one request.
	electionAnswer = 5 * time.Second
	// electionRefused is when it is tried again where a permission is missing.
	electionRefused = 15 * time.Second
	// standbyAgain is when a step asks again whose turn it is.
	standbyAgain = time.Second
)

// ElectionRBAC is what taking part needs in stoop's own namespace.
func ElectionRBAC() []rbacv1.PolicyRule { return leaseRBAC(electionName) }

// ElectionConfig is what an [Election] is made of.
type ElectionConfig struct {
	Kube       *Kube
	Namespace  string // [Self.Home]
	Name       string // what people know this stoop by: its pod, or its node
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil registers nothing
}

// Election is this stoop's part in finding the one of several that answers audit
// events: by a Lease. It is never its turn before [Election.Run] runs.
type Election struct {
	ElectionConfig
	lease             lease
	beat, term, lasts time.Duration

	mu      sync.Mutex
	held    *leaseHeld // as it was read or written last
	turn    context.Context
	end     context.CancelCauseFunc
	over    *time.Timer // ends the turn when it is not renewed
	version string      // of the Lease, while another one holds it
	since   time.Time   // when that version was first seen
	failed  error       // of the last try; nil when it is well
}

// NewElection asks nothing before [Election.Run].
func NewElection(c ElectionConfig) *Election {
	e := &Election{ElectionConfig: c, beat: electionBeat, term: electionTerm, lasts: electionLasts}
	if e.Log == nil {
		e.Log = slog.New(slog.DiscardHandler)
	}
	// Not its name alone: a process that was started anew does not know what the one
	// before it has under way.
	e.lease = lease{c.Kube, c.Namespace, electionName, c.Name + "_" + rand.Text()[:8]}
	if c.Registerer != nil {
		c.Registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "stoop_audit_events_leader", Help: "1 while it is this stoop that answers audit events.",
		}, func() float64 {
			if term, _ := e.Turn(); term != nil {
				return 1
			}
			return 0
		}))
	}
	return e
}

var errTurnOver = errors.New("it is not this stoop's turn any more to answer audit events: the lease " + electionName + " was lost")

// Run takes part until ctx is done, and then gives the turn back.
func (e *Election) Run(ctx context.Context) {
	timer := time.NewTimer(mathrand.N(e.beat / 4))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			e.leave(ctx)
			return
		case <-timer.C:
		}
		timer.Reset(e.try(ctx))
	}
}

// try renews the Lease, takes it, or looks who has it, and says after how long to try
// again.
func (e *Election) try(ctx context.Context) time.Duration {
	e.mu.Lock()
	held, leading := e.held, e.leads()
	e.mu.Unlock()
	answer := electionAnswer
	if leading {
		answer = min(answer, max(e.beat/4, e.term-time.Since(held.at)))
	}
	asking, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	var err error
	if !leading {
		if held, err = e.lease.read(asking); err == nil && !e.free(held) {
			e.mu.Lock()
			e.held = held
			e.note(ctx, nil)
			e.mu.Unlock()
			return e.beat - e.beat/8 + mathrand.N(e.beat/4)
		}
	}
	if err == nil {
		next := *held
		e.lease.take(&next, e.lasts)
		// A conflict is another one that was faster.
		if err = e.lease.write(asking, &next); err == nil {
			held = &next
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case err == nil:
		e.note(ctx, nil)
		e.begin(held)
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		e.stop() // another one has it, or somebody took it away
		return e.beat / 8
	case apierrors.IsForbidden(err):
		e.stop()
		e.note(ctx, err)
		return electionRefused
	default:
		e.note(ctx, err)
		if leading {
			return e.beat / 4
		}
	}
	return e.beat
}

// free reports whether this stoop may take the Lease: nobody has it, or whoever does
// is dead.
func (e *Election) free(l *leaseHeld) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch l.spec.HolderIdentity {
	case "":
		return true
	case e.lease.holder:
		// An earlier try whose answer was lost, or a turn that had run out.
		return true
	}
	if v := l.object.GetResourceVersion(); v != e.version {
		e.version, e.since = v, time.Now()
	}
	return time.Since(e.since) >= max(e.lasts, min(time.Duration(l.spec.LeaseDurationSeconds)*time.Second, 4*e.lasts))
}

// leads reports whether it is this stoop's turn. The caller holds the lock.
func (e *Election) leads() bool {
	if e.turn == nil || e.turn.Err() != nil {
		return false
	}
	// Both clocks: the monotonic one stands still while the machine sleeps, the
	// other can be set.
	now := time.Now()
	return now.Sub(e.held.at) < e.term && now.Round(0).Sub(e.held.at.Round(0)) < e.term
}

// begin begins the turn, or goes on with it, as of when the Lease was last written.
// The caller holds the lock.
func (e *Election) begin(held *leaseHeld) {
	e.held = held
	left := e.term - time.Since(held.at)
	if left <= 0 {
		e.stop()
		return
	}
	if e.turn != nil && e.turn.Err() == nil && e.over.Stop() {
		e.over.Reset(left)
		return
	}
	e.stop()
	turn, end := context.WithCancelCause(context.Background())
	e.turn, e.end = turn, end
	e.over = time.AfterFunc(left, func() {
		end(errTurnOver)
		e.Log.Warn("this stoop answers no audit events any more: its lease could not be renewed", "lease", e.lease.String())
	})
	e.Log.Info("this stoop answers audit events", "lease", e.lease.String(), "as", e.lease.holder)
}

// stop ends the turn. The caller holds the lock.
func (e *Election) stop() {
	if e.turn == nil {
		return
	}
	if e.over.Stop() {
		e.Log.Warn("this stoop answers no audit events any more", "lease", e.lease.String())
	}
	e.end(errTurnOver)
	e.turn = nil
}

// note takes note of how a try went, and says once that it can't be had. The caller
// holds the lock.
func (e *Election) note(ctx context.Context, err error) {
	before := e.failed
	if e.failed = err; err == nil || ctx.Err() != nil || before != nil && apierrors.IsForbidden(before) == apierrors.IsForbidden(err) {
		return
	}
	_, _, _, reason := classify(err)
	e.Log.Error("the lease of those that answer audit events can't be had", "lease", e.lease.String(), "error", reason)
}

// leave gives the turn back, so that the next one need not wait.
func (e *Election) leave(ctx context.Context) {
	e.mu.Lock()
	leading := e.leads()
	e.stop()
	e.mu.Unlock()
	if !leading {
		return
	}
	held := *e.held
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveFor)
	defer cancel()
	e.lease.give(&held)
	if err := e.lease.write(ctx, &held); err != nil {
		e.Log.Warn("the lease could not be given back: it runs out by itself", "lease", e.lease.String(), "after", e.lasts, "error", err)
	}
}

// Turn implements [Turn].
func (e *Election) Turn() (context.Context, string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.leads():
		return e.turn, ""
	case e.failed != nil:
		_, _, _, reason := classify(e.failed)
		return nil, fmt.Sprintf("the lease %s can't be had: %s", e.lease, reason)
	case e.held != nil && e.held.spec.HolderIdentity != "" && e.held.spec.HolderIdentity != e.lease.holder:
		return nil, fmt.Sprintf("%s answers them (lease %s)", quote(e.held.spec.HolderIdentity), e.lease)
	}
	return nil, fmt.Sprintf("nobody holds the lease %s yet", e.lease)
}

// auditEvent reports whether an alert is about something of the cluster's, and of no
// node.
func auditEvent(a *alert.Alert, t alert.Target) bool {
	return a.Source == alert.SourceAudit || t.Resource != nil
}

// standby says of a step for an audit event, while it is not this stoop's turn, what
// becomes of it: it is held, in case it will be, for as long as the guards let it
// be acted on.
func (h *Host) standby(a *alert.Alert, s *broker.Step, now time.Time) (status broker.Status, reason string, again time.Duration) {
	if h.Guards.Audit == nil || !auditEvent(a, s.Target) {
		return "", "", 0
	}
	term, why := h.Guards.Audit.Turn()
	if term != nil {
		return "", "", 0
	}
	since := a.Time
	if s.Approved != nil {
		since = s.Approved.Time
	}
	if age := now.Sub(since); age > h.Guards.MaxAge {
		status, reason, _ = h.suppress("standby", fmt.Sprintf("another stoop had to answer this audit event: %s. It was kept here for guard.maxAge (%s), in case it became this one's turn", why, h.Guards.MaxAge))
		return status, reason, 0
	}
	return "", "", standbyAgain - standbyAgain/5 + mathrand.N(2*standbyAgain/5)
}
