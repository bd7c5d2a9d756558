package responders

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
)

// FleetConfig is what a [Fleet] is made of.
type FleetConfig struct {
	Kube       *Kube
	Namespace  string // where the ConfigMap is: stoop's own
	Node       string // this node's name
	Limit      Rate   // of the whole cluster
	Log        *slog.Logger
	Tell       func(title, detail string) // as [Config.Tell]
	Registerer prometheus.Registerer      // nil registers nothing
}

// Fleet is this node's part in a budget of the whole cluster: so many harmful
// steps within a window, wherever they are done. It is kept in the cluster itself,
// in a ConfigMap that every stoop changes by its resource version, so that there
// is no centre to it.
//
// A node holds a little credit ahead, so that an alert need not wait for the API
// server, and asks for more when it needs more.
type Fleet struct {
	FleetConfig
	terms   terms
	id      string // of this process
	maps    *gentype.Client[*corev1.ConfigMap]
	server  serverTime
	metrics *fleetMetrics

	wake chan struct{} // a token when there is something to ask or to report

	mu       sync.Mutex
	own      credit    // as it stands in the ConfigMap
	fresh    time.Time // when what renewed it was sent
	used     []use     // of it, or beyond it, and not known to be reported
	returned []string  // steps whose credit goes back, though it may be reported
	waiting  []*asking
	spent    []spending             // by all, as last seen
	refused  map[refusee]refusalFor // never many: each has used up a share
	told     map[string]time.Time   // by namespace, "" of all
	ended    bool
}

// use is a credit used that is not known to be reported.
type use struct {
	spending
	beyond bool // a person has approved the step: none of what is held
	sent   bool // in a report, which may have arrived
}

// asking is a step that waits for the answer.
type asking struct {
	step   string
	space  string
	urgent bool
	answer chan error // of one
	gone   bool       // nobody waits any more
}

// refusee is whom a refusal holds for: alerts in one namespace, or all where that
// is "".
type refusee struct {
	space  string
	urgent bool
}

// noCredit is why a step is refused, "" where it is not. space says that only
// alerts in that namespace are.
type noCredit struct{ reason, space string }

// refusalFor is an answer that holds for a while, so that a storm of alerts does
// not become one of requests.
type refusalFor struct {
	err   *heldBack
	until time.Time
}

// heldBack says that the fleet's budget lets a step not be done.
type heldBack struct{ reason string }

func (e *heldBack) Error() string { return e.reason }

// HeldBack reports whether an error of [Fleet.Take] says that there is no credit to
// be had now. Any other may pass.
func HeldBack(err error) bool { return as[*heldBack](err) }

const (
	// fleetName and fleetKey are where the budget is kept.
	fleetName = "stoop-budget"
	fleetKey  = "budget"
	// fleetMost is how large the limit may be: the ConfigMap holds all of it.
	fleetMost = 2000
	// takeFor bounds how long a step waits for credit: for an update that is
	// under way, and its own.
	takeFor = 5 * time.Second
	// refusedLeast and refusedMost are how long it is not asked again.
	refusedLeast = 250 * time.Millisecond
	refusedMost  = 5 * time.Second
	// forbiddenFor is the same where a permission is missing.
	forbiddenFor = 30 * time.Second
	// returnedMax bounds what goes back while the API server is away.
	returnedMax = 10_000
	// leaveFor bounds giving back what is held at the end.
	leaveFor = 2 * time.Second
)

// fleetRBAC is what keeping the budget needs in stoop's own namespace.
func fleetRBAC() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		// RBAC can't bind a create to a name.
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{fleetName}, Verbs: []string{"get", "update"}},
	}
}

// NewFleet is this node's part in the budget. It asks nothing before
// [Fleet.Run].
func NewFleet(c FleetConfig) (*Fleet, error) {
	if err := CheckFleetLimit(c.Limit); err != nil {
		return nil, fmt.Errorf("guard.limits.cluster: %w", err)
	}
	f := &Fleet{FleetConfig: c, terms: termsOf(c.Limit), id: rand.Text(), wake: make(chan struct{}, 1)}
	if f.Log == nil {
		f.Log = slog.New(slog.DiscardHandler)
	}
	if f.Tell == nil {
		f.Tell = func(string, string) {}
	}
	f.metrics = newFleetMetrics(c.Registerer)
	rc := rest.CopyConfig(c.Kube.config)
	rc.Wrap(f.server.watch)
	rc.GroupVersion, rc.APIPath = &corev1.SchemeGroupVersion, "/api"
	client, err := rest.RESTClientFor(rc)
	if err != nil {
		return nil, fmt.Errorf("client for the fleet's budget: %w", err)
	}
	f.maps = gentype.NewClient("configmaps", client, c.Kube.params, c.Namespace, func() *corev1.ConfigMap { return &corev1.ConfigMap{} })
	return f, nil
}

// CheckFleetLimit says why there can be no budget with a limit.
func CheckFleetLimit(limit Rate) error {
	switch {
	case limit.N < 1 || limit.Per <= 0:
		return errors.New("the fleet's budget has no limit")
	case limit.N > fleetMost:
		return fmt.Errorf("%d steps are more than the %d that one ConfigMap is to hold", limit.N, fleetMost)
	case limit.Per < time.Second:
		return fmt.Errorf("a window of %s is too short: at least a second", limit.Per)
	}
	return nil
}

// Run keeps this node's part until ctx is done, and then gives back what it holds.
func (f *Fleet) Run(ctx context.Context) {
	timer := time.NewTimer(mathrand.N(time.Second)) // not all of a fleet at once
	defer timer.Stop()
	failed := 0
	for {
		select {
		case <-ctx.Done():
			f.leave(ctx)
			return
		case <-f.wake:
		case <-timer.C:
		}
		err := f.update(ctx, false)
		next := f.terms.useFor/4 + mathrand.N(f.terms.useFor/8)
		switch {
		case err == nil && failed > 0:
			f.Log.Info("the fleet's budget is kept again", "configmap", f.name())
			failed = 0
		case err == nil || ctx.Err() != nil:
		default:
			if failed++; failed == 1 {
				f.Log.Warn("the fleet's budget can't be asked: only the credit that this node holds can be used", "configmap", f.name(), "error", err)
			}
			next = backoff(failed)
		}
		timer.Reset(next)
	}
}

// leave ends it: what is held goes back, and nobody gets any more.
func (f *Fleet) leave(ctx context.Context) {
	f.mu.Lock()
	f.ended = true
	f.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveFor)
	defer cancel()
	if err := f.update(ctx, true); err != nil {
		f.Log.Warn("what this node holds of the fleet's budget could not be given back, and counts as spent", "configmap", f.name(), "error", err)
	}
}

func (f *Fleet) name() string { return f.Namespace + "/" + fleetName }

// spaceOf is the namespace that a step's credit counts for, or "". It is short:
// the ConfigMap holds it with every step.
func spaceOf(t alert.Target) string {
	ns := t.Namespace
	if ns == "" && t.Resource != nil {
		ns = t.Resource.Namespace
	}
	if len(ns) > 63 { // there is none with such a name
		return alert.IDOf([]byte(ns))
	}
	return ns
}

// Take takes one credit for a step in a namespace, "" for one in none, and waits for
// it only where the node holds none, or believes that the namespace has had its
// share. It returns an error that is [HeldBack] where there is none to be had.
func (f *Fleet) Take(ctx context.Context, step, space string, urgent bool) error {
	f.mu.Lock()
	switch {
	case f.ended:
		f.mu.Unlock()
		return context.Canceled
	case slices.ContainsFunc(f.used, func(u use) bool { return u.Step == step }) && !slices.Contains(f.returned, step):
		f.mu.Unlock()
		return nil
	case f.has(urgent) && !f.crowded(space, urgent):
		f.used = append(f.used, use{spending: spending{Step: step, Node: f.Node, At: f.server.now(), Other: !urgent, Space: space}})
		f.mu.Unlock()
		f.poke()
		return nil
	}
	for _, of := range []string{"", space} {
		if r, ok := f.refused[refusee{of, urgent}]; ok && time.Now().Before(r.until) {
			f.mu.Unlock()
			return r.err
		}
	}
	w := &asking{step: step, space: space, urgent: urgent, answer: make(chan error, 1)}
	f.waiting = append(f.waiting, w)
	f.mu.Unlock()
	f.poke()

	timer := time.NewTimer(takeFor)
	defer timer.Stop()
	var err error
	select {
	case err := <-w.answer:
		return err
	case <-timer.C:
		err = fmt.Errorf("the fleet's budget (ConfigMap %s) did not answer within %s", f.name(), takeFor)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case err := <-w.answer: // just now
		return err
	default:
	}
	w.gone = true
	return err
}

// Count notes a step that is done whatever the budget says: a person has approved
// it.
func (f *Fleet) Count(step, space string, urgent bool) {
	f.mu.Lock()
	if len(f.used) < fleetMost {
		f.used = append(f.used, use{spending: spending{Step: step, Node: f.Node, At: f.server.now(), Other: !urgent, Space: space}, beyond: true})
	}
	f.mu.Unlock()
	f.poke()
}

// Give gives back what a step was given that did nothing.
func (f *Fleet) Give(step string) {
	f.mu.Lock()
	i := slices.IndexFunc(f.used, func(u use) bool { return u.Step == step })
	switch {
	case i >= 0 && !f.used[i].sent:
		f.used = slices.Delete(f.used, i, i+1)
		f.metrics.credit.Set(float64(f.left(true)))
	case len(f.returned) < returnedMax:
		f.returned = append(f.returned, step)
	}
	f.mu.Unlock()
	f.poke()
}

func (f *Fleet) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func classOf(urgent bool) int {
	if urgent {
		return 1
	}
	return 0
}

// has reports whether there is credit that can be used now. The caller holds the
// lock.
func (f *Fleet) has(urgent bool) bool {
	// Both clocks: the monotonic one stands still while the machine sleeps, the
	// other can be set.
	now := time.Now()
	if now.Sub(f.fresh) >= f.terms.useFor || now.Round(0).Sub(f.fresh.Round(0)) >= f.terms.useFor {
		return false
	}
	return f.left(urgent) > 0
}

// crowded reports whether a namespace has had its share, as far as this node knows:
// by what it saw last, and what it has used itself since. The caller holds the lock.
func (f *Fleet) crowded(space string, urgent bool) bool {
	b := budget{Spent: slices.Clone(f.spent)}
	for _, u := range f.used {
		b.Spent = append(b.Spent, u.spending)
	}
	b.settle(&f.terms, f.server.now())
	return b.crowded(&f.terms, f.Node, space, urgent) != ""
}

// refuse keeps an answer for a while, and reports whether people are to be told of
// it: once a window. The caller holds the lock.
func (f *Fleet) refuse(whom refusee, err *heldBack, until time.Time) (tell bool) {
	now := time.Now()
	if f.refused == nil {
		f.refused, f.told = map[refusee]refusalFor{}, map[string]time.Time{}
	}
	maps.DeleteFunc(f.refused, func(_ refusee, r refusalFor) bool { return now.After(r.until) })
	maps.DeleteFunc(f.told, func(_ string, at time.Time) bool { return now.Sub(at) >= f.terms.limit.Per })
	f.refused[whom] = refusalFor{err, until}
	if _, ok := f.told[whom.space]; ok {
		return false
	}
	f.told[whom.space] = now
	return true
}

// left is what is held and not used. The caller holds the lock.
func (f *Fleet) left(urgent bool) int {
	n, others := f.own.N, f.own.Other
	for _, u := range f.used {
		if u.beyond {
			continue
		}
		n--
		if u.Other {
			others--
		}
	}
	if urgent {
		return max(n, 0)
	}
	return max(min(n, others), 0)
}

// asked is what one update is about.
type asked struct {
	used     []use
	returned []string
	waiting  []*asking
	leaving  bool
}

// update reports what was used, asks for what is wanted, and renews what is held.
// Somebody else's update in between is a conflict, and it is tried again.
func (f *Fleet) update(ctx context.Context, leaving bool) (err error) {
	ctx, cancel := context.WithTimeout(ctx, f.terms.askFor)
	defer cancel()
	f.mu.Lock()
	a := asked{used: slices.Clone(f.used), returned: slices.Clone(f.returned), waiting: f.waiting, leaving: leaving}
	f.waiting = nil
	for i := range f.used {
		f.used[i].sent = true
	}
	f.mu.Unlock()
	// Critical ones first.
	slices.SortStableFunc(a.waiting, func(x, y *asking) int { return classOf(y.urgent) - classOf(x.urgent) })
	defer func() {
		if err != nil {
			f.fail(&a, err)
		}
	}()
	for try := 0; ; try++ {
		err := f.try(ctx, &a)
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			f.metrics.count(err)
			return err
		}
		f.metrics.updates.WithLabelValues("conflict").Inc()
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
		case <-time.After(mathrand.N(10 * time.Millisecond << min(try, 5))):
		}
	}
}

// try is one read and, where it changes anything, one write.
func (f *Fleet) try(ctx context.Context, a *asked) error {
	m, err := f.maps.Get(ctx, fleetName, metav1.GetOptions{})
	found := err == nil
	if apierrors.IsNotFound(err) {
		m, err = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
			Namespace: f.Namespace, Name: fleetName, Labels: map[string]string{labelManagedBy: managedBy},
		}}, nil
	}
	if err != nil {
		return err
	}
	b := &budget{}
	if data := m.Data[fleetKey]; data != "" {
		err := json.Unmarshal([]byte(data), b)
		if err == nil {
			err = b.check()
		}
		if err != nil {
			return &heldBack{fmt.Sprintf("the fleet's budget in ConfigMap %s can't be read (%v): delete it, and it is made anew", f.name(), err)}
		}
	}
	began, now := time.Now(), f.server.now()
	b.settle(&f.terms, now)
	refused, changed := f.apply(b, a, now)
	if changed {
		if own := b.Held[f.id]; own != nil {
			own.Renewed = now.UTC()
		}
		data, err := json.Marshal(b)
		if err != nil {
			return err
		}
		if m.Data == nil {
			m.Data = map[string]string{}
		}
		m.Data[fleetKey] = string(data)
		if found {
			_, err = f.maps.Update(ctx, m, metav1.UpdateOptions{})
		} else {
			_, err = f.maps.Create(ctx, m, metav1.CreateOptions{})
		}
		if err != nil {
			return err
		}
	}
	f.commit(b, a, refused, began, changed)
	return nil
}

// apply does to the budget what is asked, and returns why steps are refused and
// whether it changed anything.
func (f *Fleet) apply(b *budget, a *asked, now time.Time) (refused []noCredit, changed bool) {
	own := b.Held[f.id]
	if own == nil {
		own = b.reclaim(f.id, f.Node)
	}
	before := *own
	for _, step := range a.returned {
		changed = b.unspend(step) || changed
	}
	for _, u := range a.used {
		// One that is spent was reported, although the answer was lost; one
		// that is given back needs no report; and one that is longer ago than
		// the window counts no more.
		if b.spentOn(u.Step) || slices.Contains(a.returned, u.Step) || now.Sub(u.At) >= f.terms.limit.Per+f.terms.margin {
			continue
		}
		b.Spent, changed = append(b.Spent, u.spending), true
		if u.beyond {
			continue
		}
		own.N = max(own.N-1, 0)
		if u.Other {
			own.Other--
		}
		own.Other = max(min(own.Other, own.N), 0)
	}
	set := func() {
		if b.Held == nil {
			b.Held = map[string]*credit{}
		}
		if b.Held[f.id] = own; own.N == 0 {
			delete(b.Held, f.id)
		}
	}
	set()
	refused = make([]noCredit, len(a.waiting))
	scarce := false
	for i, w := range a.waiting {
		if b.spentOn(w.step) {
			continue
		}
		if why := b.crowded(&f.terms, f.Node, w.space, w.urgent); why != "" {
			refused[i] = noCredit{why, w.space}
			continue
		}
		why, queue := b.refuses(&f.terms, f.Node, w.urgent)
		if refused[i].reason = why; why == "" {
			delete(b.Waiting, f.Node)
			b.Spent = append(b.Spent, spending{Step: w.step, Node: f.Node, At: now.Add(f.terms.askFor).UTC(), Other: !w.urgent, Space: w.space})
			changed = true
			continue
		}
		scarce = true
		if queue {
			changed = b.queue(&f.terms, f.Node, w.urgent, now.UTC()) || changed
		}
	}
	switch {
	case a.leaving:
		own.N, own.Other = 0, 0
		set()
		changed = changed || before.N > 0
	case !scarce:
		changed = b.prefetch(&f.terms, f.id, f.Node) || changed
	}
	if own := b.Held[f.id]; own != nil && now.Sub(own.Renewed) >= f.terms.useFor/5 {
		changed = true // to renew it
	}
	return refused, changed
}

// commit takes over what was written, and answers who waits.
func (f *Fleet) commit(b *budget, a *asked, refused []noCredit, began time.Time, written bool) {
	var tell []string
	f.mu.Lock()
	f.own, f.spent = credit{}, b.Spent
	if own := b.Held[f.id]; own != nil {
		f.own = *own
	}
	if written {
		f.fresh = began
	}
	f.used = slices.DeleteFunc(f.used, func(u use) bool {
		return slices.ContainsFunc(a.used, func(s use) bool { return s.Step == u.Step })
	})
	f.returned = f.returned[len(a.returned):]
	// It is asked again when the first credit is free, or soon after.
	until := time.Now().Add(min(max(b.firstFree(&f.terms).Sub(f.server.now()), refusedLeast), refusedMost))
	for i, w := range a.waiting {
		if refused[i].reason == "" {
			delete(f.refused, refusee{"", w.urgent})
			delete(f.refused, refusee{w.space, w.urgent})
			f.answer(w, nil)
			continue
		}
		err := &heldBack{refused[i].reason + " (guard.limits.cluster)"}
		if f.refuse(refusee{refused[i].space, w.urgent}, err, until) {
			tell = append(tell, err.reason)
		}
		f.answer(w, err)
	}
	f.metrics.credit.Set(float64(f.left(true)))
	f.mu.Unlock()
	all, _ := b.gone()
	f.metrics.spent.Set(float64(all.all))
	for _, why := range tell {
		f.Tell("the fleet's budget is exhausted", why)
	}
}

// answer answers one who waits. The caller holds the lock.
func (f *Fleet) answer(w *asking, err error) {
	if w.gone && err == nil && len(f.returned) < returnedMax {
		f.returned = append(f.returned, w.step)
		f.poke()
	}
	w.answer <- err
}

// fail answers those who wait that it could not be asked.
func (f *Fleet) fail(a *asked, err error) {
	var held *heldBack
	until := time.Now().Add(refusedMost)
	switch {
	case errors.As(err, &held):
	case apierrors.IsForbidden(err):
		_, _, _, why := classify(err)
		held = &heldBack{why + "; without it the fleet's budget can't be kept: guard.limits.cluster: 0 turns it off"}
		until = time.Now().Add(forbiddenFor)
	case apierrors.IsNotFound(err):
		held = &heldBack{fmt.Sprintf("the fleet's budget has no place: there is no namespace %s; make it, or turn the budget off by guard.limits.cluster: 0", f.Namespace)}
	case apierrors.IsInvalid(err), apierrors.IsRequestEntityTooLargeError(err):
		held = &heldBack{fmt.Sprintf("the API server does not take the fleet's budget: %v; guard.limits.cluster: 0 turns it off", err)}
	default:
		err = fmt.Errorf("ask for credit of the fleet's budget (ConfigMap %s): %w", f.name(), err)
	}
	tell := ""
	f.mu.Lock()
	for _, w := range a.waiting {
		if held == nil {
			f.answer(w, err)
			continue
		}
		if f.refuse(refusee{"", w.urgent}, held, until) {
			tell = held.reason
		}
		f.answer(w, held)
	}
	f.mu.Unlock()
	if tell != "" {
		f.Tell("the fleet's budget can't be kept", tell)
	}
}

// firstFree is when the first credit that is spent is free again.
func (b *budget) firstFree(t *terms) time.Time {
	var first time.Time
	for _, s := range b.Spent {
		if first.IsZero() || s.At.Before(first) {
			first = s.At
		}
	}
	return first.Add(t.limit.Per + t.margin)
}

// serverTime is the API server's: the clocks of the nodes may be wrong.
type serverTime struct {
	mu        sync.Mutex
	at, local time.Time // the same moment; zero as long as no answer was seen
}

// now is the time there.
func (s *serverTime) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.at.IsZero() {
		return now.UTC()
	}
	return s.at.Add(now.Sub(s.local)).UTC()
}

// watch reads the time off every answer.
func (s *serverTime) watch(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(r)
		if err == nil {
			s.note(resp.Header.Get("Date"), time.Now())
		}
		return resp, err
	})
}

func (s *serverTime) note(date string, local time.Time) {
	at, err := http.ParseTime(date)
	if err != nil {
		return
	}
	// It has whole seconds. A clock that is as near as that is finer.
	if d := local.Sub(at); d > -time.Second && d < 2*time.Second {
		at = local.Round(0)
	} else {
		at = at.Add(time.Second / 2)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.local = at, local
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// fleetMetrics are what is counted of the budget.
type fleetMetrics struct {
	credit, spent prometheus.Gauge
	updates       *prometheus.CounterVec
}

func newFleetMetrics(r prometheus.Registerer) *fleetMetrics {
	m := &fleetMetrics{
		credit:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "stoop_fleet_credit", Help: "Harmful steps that this node may do of the cluster's budget without asking."}),
		spent:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "stoop_fleet_used", Help: "What of the cluster's budget was used within the window, or is held by a node, as last seen."}),
		updates: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stoop_fleet_updates_total", Help: "Tries to read or change the cluster's budget, by result: ok, conflict, error."}, []string{"result"}),
	}
	if r != nil {
		r.MustRegister(m.credit, m.spent, m.updates)
	}
	return m
}

func (m *fleetMetrics) count(err error) {
	if err != nil {
		m.updates.WithLabelValues("error").Inc()
		return
	}
	m.updates.WithLabelValues("ok").Inc()
}

// charge takes a credit of the fleet's for a step that has its place in the
// ledger. It returns what became of the step instead, and why, or after how long
// to ask again; the place is given back then.
func (h *Host) charge(ctx context.Context, d *broker.Delivery, r *running, urgent, begun bool) (status broker.Status, reason string, again time.Duration) {
	s := d.Step
	if h.Fleet == nil || !r.cluster() {
		return "", "", 0
	}
	if rec := h.ledger.get(s.ID); rec != nil && rec.Fleet {
		return "", "", 0 // a further try of a step that has its credit
	}
	if s.Approved != nil {
		h.Fleet.Count(s.ID, spaceOf(s.Target), urgent)
		h.ledger.charged(s.ID)
		return "", "", 0
	}
	err := h.Fleet.Take(ctx, s.ID, spaceOf(s.Target), urgent)
	if err == nil {
		h.ledger.charged(s.ID)
		return "", "", 0
	}
	if !begun {
		h.ledger.release(s.ID)
	}
	var held *heldBack
	if errors.As(err, &held) {
		status, reason, again = h.suppress("cluster", held.reason)
		return status, reason, again
	}
	h.Log.Debug("a step waits for the fleet's budget", "step", s.ID, "rule", s.Rule, "error", err)
	return "", "", backoff(d.Attempt)
}

// refund gives back the credit of a step that ended without having done anything.
func (h *Host) refund(id string) {
	if rec := h.ledger.get(id); h.Fleet != nil && rec != nil && rec.Fleet && rec.Status != broker.Done {
		h.Fleet.Give(id)
	}
}

// charged notes that a step has its credit of the fleet's.
func (l *ledger) charged(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.acts[id]; a != nil {
		a.Fleet = true
	}
}

// release forgets a step that has not been begun after all.
func (l *ledger) release(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop(id)
}
