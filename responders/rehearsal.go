package responders

import (
	"log/slog"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/node"
)

// Rehearsal says what would become of steps for recorded alerts. It asks the guards
// that the host asks, in its order and with its ledger, at the time that it is told,
// and does nothing: it knows neither the cluster nor the node.
type Rehearsal struct {
	guards  Guards
	running map[string]*running
	ledgers map[broker.Mode]*ledger // what is only told uses nothing up of what is done
}

// NewRehearsal is one that has done nothing yet. Any hostname counts as this node's.
func NewRehearsal(entries []Entry, g Guards) *Rehearsal {
	g.Node = ""
	r := &Rehearsal{guards: g, running: map[string]*running{}, ledgers: map[broker.Mode]*ledger{}}
	for _, mode := range []broker.Mode{broker.Audit, broker.Enforce} {
		r.ledgers[mode] = newLedger(nil, &r.guards)
	}
	for _, e := range entries {
		in := &running{Entry: e}
		if !e.cluster() {
			in.act = e.New(Env{Log: slog.New(slog.DiscardHandler)}) // says what it counts by
		}
		r.running[e.Name] = in
	}
	return r
}

// Rehearsed is what would become of a step.
type Rehearsed struct {
	Status broker.Status // done, suppressed, refused or awaiting-approval
	Guard  string        // that holds it back: its name, or the key of the limit
	Reason string
}

// Step says what would become of a step at a time, and counts it if it would be
// done. The rule's mode counts, and not the program's.
func (r *Rehearsal) Step(a *alert.Alert, s *broker.Step, now time.Time) Rehearsed {
	in := r.running[s.Responder]
	target := s.Target
	target.Node = ""
	req := &Request{Step: s, Alert: a, Target: target}
	if in.Kind == Harm {
		here := *s
		here.Target = target
		if guard, why := r.guards.trust(a, &here, now); guard != "" {
			return Rehearsed{broker.Suppressed, guard, why}
		}
	}
	protected := func() string {
		if in.Kind != Harm {
			return ""
		}
		return r.guards.protected(target, nil)
	}
	of := in.Object
	if in.cluster() {
		of = in.objectOf(s.Params)
	}
	err := lacking(of, target)
	if err == nil && of == PodObject {
		err = nameless(target)
	}
	if err != nil {
		if p := protected(); p != "" {
			return Rehearsed{broker.Suppressed, "protected", p}
		}
		status, _, _, reason := classify(err)
		return Rehearsed{status, "refused", reason}
	}
	if p := protected(); p != "" {
		return Rehearsed{broker.Suppressed, "protected", p}
	}
	if s.Mode == broker.Enforce && in.asks(s) {
		return Rehearsed{Status: broker.AwaitingApproval, Reason: "a person is asked"}
	}
	if in.Kind != Harm {
		return Rehearsed{Status: broker.Done}
	}
	if in.local() {
		// As the node would find them.
		if target.Container != "" && !target.Host {
			req.Container = &node.Container{ID: target.Container}
		}
		if in.Object == ProcessObject {
			req.Process = &node.Process{PID: int(target.PID), Start: uint64(target.PIDStart)}
		}
	}
	l := r.ledgers[s.Mode]
	v := l.begin(s.ID, act{
		Rule: s.Rule, Responder: s.Responder, Object: object(in, req), Namespace: target.Namespace,
		Urgent: a.Priority.Urgent(), Local: in.local(), Began: now,
	}, &r.guards, in.Instead != "", now)
	switch {
	case v.limit != "":
		return Rehearsed{broker.Suppressed, v.limit, v.reason}
	case v.guard != "":
		return Rehearsed{broker.Suppressed, v.guard, v.reason}
	}
	l.end(s.ID, broker.Done, Result{}, now)
	return Rehearsed{Status: broker.Done}
}

// Unchecked is what a rehearsal can't ask, in words.
func Unchecked() []string {
	return []string{
		"whether the pod, container, process or object was still there",
		"priority classes, static pods, and whose pod a container is where the alert doesn't say",
		"the limit of two of one owner's pods, and what would have been done instead",
		"maxUnavailable and what a workload's last pod is spared by",
		"the budget of the whole cluster (guard.limits.cluster)",
		"what a responder itself would have refused, and whether it would have failed",
		"pauses, and whether a person would have approved",
	}
}
