// Package router leads an alert from the stream ALERTS to its steps: it asks
// the rules which of them match, and writes the routing slip of each. It is the
// one place where alerts, rules and steps meet.
package router

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/rules"
)

// SubjectTail is where verdicts are published while somebody watches.
const SubjectTail = "stoop.tail"

// Verdict is what the router made of an alert: for stoop tail.
type Verdict struct {
	Alert    string    `json:"alert"` // its id
	Time     time.Time `json:"time"`  // of its arrival
	Rule     string    `json:"rule"`  // Falco's
	Priority string    `json:"priority"`
	Source   string    `json:"source,omitempty"`
	Output   string    `json:"output,omitempty"`
	Hostname string    `json:"hostname,omitempty"`
	Pod      string    `json:"pod,omitempty"` // namespace/name
	Matched  []Match   `json:"matched,omitempty"`
	Waits    []Wait    `json:"waits,omitempty"`
	Why      string    `json:"why,omitempty"` // why no rule matched
}

// Wait is a rule that matched an alert and waits for others that agree.
type Wait struct {
	Rule string `json:"rule"` // of rules.yaml
	Why  string `json:"why"`  // how many agree, or why this alert does not count
}

// Match is a rule that matched an alert, and what follows from it.
type Match struct {
	Rule  string      `json:"rule"` // of rules.yaml
	Mode  broker.Mode `json:"mode"`
	Steps []string    `json:"steps"` // responders, in order
}

// MatchOf is a rule's match.
func MatchOf(r *rules.Rule) Match {
	m := Match{Rule: r.Name, Mode: r.Mode}
	for _, a := range r.Actions {
		m.Steps = append(m.Steps, a.Responder)
	}
	return m
}

// Router routes alerts by the rules in force.
type Router struct {
	rules   atomic.Pointer[rules.Set]
	counts  *Counts
	log     *slog.Logger
	watched atomic.Int64 // until when somebody watches, in nanoseconds since 1970
	count   atomic.Uint64
	routed  prometheus.CounterFunc
	matched prometheus.Counter
	none    prometheus.Counter
}

// New is a router; it routes by no rules until [Router.SetRules].
func New(log *slog.Logger, reg prometheus.Registerer, trust Trust) *Router {
	r := &Router{
		log:     log,
		counts:  NewCounts(trust, log, reg),
		matched: prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_rules_matched_total", Help: "Matches of an alert and a rule."}),
		none:    prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_alerts_unmatched_total", Help: "Alerts that no rule matched."}),
	}
	r.routed = prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "stoop_alerts_routed_total", Help: "Alerts that were held against the rules."},
		func() float64 { return float64(r.count.Load()) })
	r.rules.Store(&rules.Set{})
	reg.MustRegister(r.routed, r.matched, r.none)
	return r
}

// SetRules puts rules in force for the alerts from now on.
func (r *Router) SetRules(s *rules.Set) {
	r.rules.Store(s)
	r.counts.SetRules(s)
}

// Rules are those in force.
func (r *Router) Rules() *rules.Set { return r.rules.Load() }

// Routed is how many alerts were held against the rules.
func (r *Router) Routed() uint64 { return r.count.Load() }

// Watch makes the router publish its verdicts for d from now.
func (r *Router) Watch(d time.Duration) { r.watched.Store(time.Now().Add(d).UnixNano()) }

// Run routes the alerts of both lanes of b until ctx is done.
func (r *Router) Run(ctx context.Context, b *broker.Broker) error {
	if err := r.counts.open(ctx, b, r.rules.Load()); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var lanes sync.WaitGroup
	errs := [2]error{}
	for i, urgent := range []bool{true, false} {
		lanes.Go(func() {
			errs[i] = b.RouteAlerts(ctx, urgent, func(s *broker.Stored) []*broker.Step { return r.route(b, s) }, r.counts)
			cancel()
		})
	}
	lanes.Wait()
	if errs[0] != nil {
		return errs[0]
	}
	return errs[1]
}

// route is the way of one alert.
func (r *Router) route(b *broker.Broker, s *broker.Stored) []*broker.Step {
	r.count.Add(1)
	a := s.Alert
	if a == nil {
		var err error
		if a, err = alert.Parse(s.Data); err != nil { // the pipe parsed it: only a damaged store gets here
			r.log.Error("a stored alert can't be read", "alert", s.ID, "error", err)
			return nil
		}
		a.ID = s.ID // a plain-text line's is that of the line, not of the JSON made of it
	}
	set := r.rules.Load()
	matched := set.Match(a)
	var target alert.Target
	if len(matched) > 0 {
		target = a.Target()
	}
	var agreements []Agreement // nil: none of them waits for others
	if Waiting(matched) {
		agreements = r.counts.Add(Arrived{
			Alert: a, Target: target, Origin: s.Origin, Received: s.Received, Now: time.Now(),
			Urgent: s.Urgent, Seq: s.Seq,
		}, matched)
	}
	if time.Now().UnixNano() < r.watched.Load() {
		r.tell(b, a, s.Received, set, matched, agreements)
	}
	if len(matched) == 0 {
		r.none.Inc()
		return nil
	}
	r.matched.Add(float64(len(matched)))
	b.KeepMatched(s, a)
	took := broker.Took{
		Stored:  broker.Micros(s.StoredAt.Sub(s.Received).Microseconds()),
		Matched: broker.MicrosSince(s.Received),
	}
	steps := make([]*broker.Step, 0, len(matched))
	for i, rule := range matched {
		step := &broker.Step{
			ID:      broker.StepID(a.ID, rule.Name, 0, ""),
			AlertID: a.ID, Alert: json.RawMessage(s.Data), Received: s.Received, Origin: s.Origin,
			Rule: rule.Name, Rules: set.Hash, Mode: rule.Mode,
			Action: rule.Actions[0], Remaining: rule.Actions[1:],
			Target: target, Took: took,
		}
		if rule.When != nil {
			if !agreements[i].Reached {
				continue
			}
			step.Agreed = agreements[i].Agreed
		}
		steps = append(steps, step)
	}
	return steps
}

func (r *Router) tell(b *broker.Broker, a *alert.Alert, received time.Time, set *rules.Set, found []*rules.Rule, agreements []Agreement) {
	t := a.Target()
	v := Verdict{
		Alert: a.ID, Time: received, Rule: a.Rule, Priority: a.Priority.String(), Source: a.Source,
		Output: a.Output, Hostname: a.Hostname,
	}
	if t.Pod != "" {
		v.Pod = t.Namespace + "/" + t.Pod
	}
	for i, rule := range found {
		if rule.When != nil && !agreements[i].Reached {
			v.Waits = append(v.Waits, Wait{Rule: rule.Name, Why: agreements[i].Why})
			continue
		}
		v.Matched = append(v.Matched, MatchOf(rule))
	}
	if len(found) == 0 {
		_, v.Why = set.Explain(a)
	}
	data, err := json.Marshal(v)
	if err == nil {
		err = b.Conn().Publish(SubjectTail, data)
	}
	if err != nil {
		r.log.Warn("publish a verdict for tail", "error", err)
	}
}
