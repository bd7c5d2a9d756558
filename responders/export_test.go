package responders

import (
	"encoding/json"
	"time"
)

// What tests in responders_test need to see: they can't be in this package,
// since the conformance suite imports it.
var (
	Classify    = classify
	ErrNoPod    = errNoPod
	ErrUnproved = errUnproved
	SlimPod     = slim
)

// SetProc has p read processes somewhere else than in /proc.
func (p *Pods) SetProc(root string) { p.proc = proc(root) }

// SetWait changes how long p waits for a pod to appear.
func (p *Pods) SetWait(d time.Duration) { p.wait, p.longer = d, 0 }

// OnIntend has f called with what r's responder intends.
func OnIntend(r *Request, f func(undo json.RawMessage)) {
	r.intend = func(undo json.RawMessage, _ time.Duration) { f(undo) }
}

// NewRun is the responder run, which starts wrapper where it would start stoop.
func NewRun(wrapper ...string) func(Env) Responder {
	return func(env Env) Responder {
		r := run().New(env).(*programRunner)
		r.wrapper = wrapper
		return r
	}
}

// Render is what comes of the body of a webhook-call for an alert.
func Render(body string, alert []byte) ([]byte, error) {
	n := notice{Alert: alert}
	return template(body).render(n.lookup)
}

// CheckBody says what is wrong with a body of a webhook-call.
func CheckBody(body string) error { return new(template).UnmarshalText([]byte(body)) }

// NewDrain is the responder drain-node, which renews the Lease after every beat, waits
// for an answer no longer than told, and asks for pods again as soon as it looks.
func NewDrain(env Env, beat, answer time.Duration) Responder {
	d := drainNode().New(env).(*nodeDrainer)
	d.acts.beat, d.acts.answer, d.again = beat, answer, 0
	return d
}

// AgeNodeLease has k believe that it saw the Lease so much earlier.
func (k *Kube) AgeNodeLease(by time.Duration) {
	k.nodeTurn.mu.Lock()
	defer k.nodeTurn.mu.Unlock()
	k.nodeTurn.since = k.nodeTurn.since.Add(-by)
}

// SetUseFor changes how long f uses what it holds without renewing it.
func (f *Fleet) SetUseFor(d time.Duration) { f.terms.useFor, f.terms.heldFor = d, 2*d }

// Left is what f holds for Critical alerts and has not used.
func (f *Fleet) Left() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.left(true)
}

// Seen is how much was spent by all as f saw it last, and its own since.
func (f *Fleet) Seen() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.spent) + len(f.used)
}

// Look has f look at the budget.
func (f *Fleet) Look() { f.poke() }

// SetPaused has r say that stoop is paused.
func (r *Request) SetPaused(why func() string) { r.paused = why }

// SetResync changes how long p follows one watch, how much longer it waits for its
// end, and how long for a read.
func (p *ClusterPause) SetResync(d, late, answer time.Duration) {
	p.resync, p.late, p.answer = d, late, answer
}

// Known reports whether p has read the annotation.
func (p *ClusterPause) Known() bool { _, _, known, _ := p.last(); return known }

// Problem is why p can't read it.
func (p *ClusterPause) Problem() string { return p.problem() }

// SetPace changes after how long e renews the Lease, takes its own turn for over, and
// takes another's.
func (e *Election) SetPace(beat, term, lasts time.Duration) {
	e.beat, e.term, e.lasts = beat, term, lasts
}

// Age has e believe that it wrote the Lease so much earlier.
func (e *Election) Age(by time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held.at = e.held.at.Add(-by)
}
