package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"stoop/alert"
	"stoop/broker"
)

// act is what STATE holds of a harmful step, under act.<step id>: that it was
// about to be done, and what came of it. Cooldowns and limits are counted from
// these records, so a restart forgets none of them.
type act struct {
	Rule      string            `json:"rule"`
	Responder string            `json:"responder"`
	Object    string            `json:"object"`
	Namespace string            `json:"namespace,omitempty"`
	Owner     string            `json:"owner,omitempty"`
	Urgent    bool              `json:"urgent,omitempty"`
	Local     bool              `json:"local,omitempty"`    // done by this node itself
	Approved  bool              `json:"approved,omitempty"` // by a person: no limit holds it back
	Fleet     bool              `json:"fleet,omitempty"`    // it has its credit of the fleet's budget
	Began     time.Time         `json:"began"`
	Ended     time.Time         `json:"ended,omitzero"`
	Status    broker.Status     `json:"status,omitempty"` // "" until it is known
	Reason    string            `json:"reason,omitempty"`
	Found     map[string]string `json:"found,omitempty"`
	Undo      bool              `json:"undo,omitempty"`
	Instead   string            `json:"instead,omitempty"` // what was done in its place
}

// breaker is what STATE holds of an open one.
type breaker struct {
	Key   string    `json:"key"`
	Until time.Time `json:"until"`
}

// keep is how long a record is needed: as long as any guard counts by it, and
// as its step can come again after a crash.
func (g *Guards) keep() time.Duration {
	longest := max(ownerWindow, g.Cooldown)
	for _, l := range []Limits{g.API, g.Local} {
		longest = max(longest, l.Rule.Per, l.Namespace.Per, l.Node.Per)
	}
	return 15*time.Minute + longest
}

const (
	// actsMax bounds the records in memory. Only with every limit off can
	// there be so many; the oldest are forgotten then.
	actsMax = 100_000
)

// ledger keeps the records of harmful steps in memory and in STATE.
type ledger struct {
	state *broker.State // nil: nothing outlives the process
	mu    sync.Mutex
	acts  map[string]*act      // by step
	order []string             // the steps, oldest first
	last  map[string]string    // the latest step by rule, responder and object
	times map[string]*window   // by what a limit counts
	open  map[string]time.Time // breakers, until
	told  map[string]time.Time // what people were told of, by what it is about
	kept  time.Duration        // how long a record is needed
}

// tellOnce reports whether people are to be told of something: once in the
// owner's window.
func (l *ledger) tellOnce(about string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.DeleteFunc(l.told, func(_ string, at time.Time) bool { return now.Sub(at) > ownerWindow })
	if _, ok := l.told[about]; ok {
		return false
	}
	l.told[about] = now
	return true
}

// window is when steps of a kind were begun, oldest first.
type window []stamp

type stamp struct {
	at time.Time
	id string
}

// count is how many were begun less than per ago; older ones are forgotten if
// they are older than keep as well.
func (w *window) count(now time.Time, per, keep time.Duration) int {
	i := 0
	for i < len(*w) && now.Sub((*w)[i].at) >= keep {
		i++
	}
	*w = (*w)[i:]
	n := 0
	for j := len(*w) - 1; j >= 0 && now.Sub((*w)[j].at) < per; j-- {
		n++
	}
	return n
}

func (w *window) remove(id string) {
	for j := len(*w) - 1; j >= 0; j-- {
		if (*w)[j].id == id {
			*w = append((*w)[:j:j], (*w)[j+1:]...)
			return
		}
	}
}

func newLedger(state *broker.State, g *Guards) *ledger {
	return &ledger{
		state: state, acts: map[string]*act{}, last: map[string]string{}, kept: g.keep(),
		times: map[string]*window{}, open: map[string]time.Time{}, told: map[string]time.Time{},
	}
}

// The accounts that a step is counted in.
func (a *act) objectKey() string { return a.Rule + "\x00" + a.Responder + "\x00" + a.Object }

func (a *act) ownerKey() string {
	return "owner\x00" + a.Rule + "\x00" + a.Responder + "\x00" + a.Owner
}

// A step of the API server's and one of this node's never share an account, but
// for the owner's.
func (a *act) account(name, of string) string {
	if a.Local {
		name = "local " + name
	}
	return name + "\x00" + of
}
func (a *act) ruleKey() string           { return a.account("rule", a.Rule) }
func (a *act) namespaceKey() string      { return a.account("namespace", a.Namespace) }
func (a *act) namespaceOtherKey() string { return a.account("namespace, below Critical", a.Namespace) }
func (a *act) nodeKey() string           { return a.account("node", "") }
func (a *act) nodeOtherKey() string      { return a.account("node, below Critical", "") }

func (a *act) accounts() []string {
	keys := []string{a.ruleKey(), a.nodeKey()}
	if a.Namespace != "" {
		keys = append(keys, a.namespaceKey())
		if !a.Urgent {
			keys = append(keys, a.namespaceOtherKey())
		}
	}
	if a.Owner != "" {
		keys = append(keys, a.ownerKey())
	}
	if !a.Urgent {
		keys = append(keys, a.nodeOtherKey())
	}
	return keys
}

// add enters a step. The caller holds the lock.
func (l *ledger) add(id string, a *act) {
	l.acts[id] = a
	l.order = append(l.order, id)
	l.last[a.objectKey()] = id
	if a.Status != "" && a.Status != broker.Done {
		return
	}
	for _, k := range a.accounts() {
		if l.times[k] == nil {
			l.times[k] = &window{}
		}
		*l.times[k] = append(*l.times[k], stamp{a.Began, id})
	}
}

func (l *ledger) count(key string, now time.Time, per time.Duration) int {
	w := l.times[key]
	if w == nil {
		return 0
	}
	n := w.count(now, per, max(per, ownerWindow))
	if len(*w) == 0 {
		delete(l.times, key)
	}
	return n
}

func (l *ledger) load(ctx context.Context) error {
	type entry struct {
		id string
		a  *act
	}
	var entries []entry
	var old []string
	now := time.Now()
	err := l.state.Each(ctx, "act.*", func(key string, value []byte, _ time.Time) error {
		a := &act{}
		if err := json.Unmarshal(value, a); err != nil {
			return fmt.Errorf("read state %s: %w", key, err)
		}
		if now.Sub(a.Began) < l.kept {
			entries = append(entries, entry{key[len("act."):], a})
		} else {
			old = append(old, key)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range old { // its ttl was lost on the way from another store
		if err := l.state.Delete(ctx, key); err != nil {
			return err
		}
	}
	slices.SortStableFunc(entries, func(x, y entry) int { return x.a.Began.Compare(y.a.Began) })
	for _, e := range entries {
		l.add(e.id, e.a)
	}
	return l.state.Each(ctx, "breaker.*", func(key string, value []byte, _ time.Time) error {
		var b breaker
		if err := json.Unmarshal(value, &b); err != nil {
			return fmt.Errorf("read state %s: %w", key, err)
		}
		l.open[b.Key] = b.Until
		return nil
	})
}

// get is the record of a step, or nil.
func (l *ledger) get(id string) *act {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.acts[id]; a != nil {
		c := *a
		return &c
	}
	return nil
}

// verdict is what the ledger's guards say of a step.
type verdict struct {
	guard, reason string // of the guard that holds it back; "" lets it through
	busy          bool   // another step of the same rule on the same object is under way
	opened        string // the breaker that opened by this step; people are told
	limit         string // the key of the limit in the configuration
}

// begin asks the guards that count, and takes the step's place in their
// accounts when they let it through. It writes nothing yet.
func (l *ledger) begin(id string, a act, g *Guards, instead bool, now time.Time) verdict {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep(now)
	if l.acts[id] != nil { // a further try of a step that has its place
		return verdict{}
	}
	if b := l.acts[l.last[a.objectKey()]]; b != nil {
		if b.Status == "" {
			return verdict{busy: true}
		}
		if reason := b.cooling(g, now); reason != "" && !a.Approved {
			return verdict{guard: "cooldown", reason: reason}
		}
	}
	if a.Approved {
		// A person has decided: it is counted, and held back by nothing that counts.
		l.add(id, &a)
		return verdict{}
	}
	if instead && a.Owner != "" {
		if n := l.count(a.ownerKey(), now, ownerWindow); n >= ownerDeletes {
			return verdict{guard: "owner", reason: fmt.Sprintf("this rule has answered %d pods of the same owner within %s already, and another would change nothing", n, ago(ownerWindow))}
		}
	}
	for _, m := range g.limitsOf(&a) {
		used := l.count(m.account, now, m.per)
		if until, ok := l.open[m.name]; ok && now.Before(until) {
			return verdict{guard: "limit", limit: m.key, reason: fmt.Sprintf("the breaker of %s is open for another %s (%s)", m.name, ago(until.Sub(now)), m.key)}
		}
		if used >= m.max {
			l.open[m.name] = now.Add(m.per)
			return verdict{
				guard: "limit", opened: m.name, limit: m.key,
				reason: fmt.Sprintf("%s has had its %d harmful steps within %s (%s); its breaker is open for %s", m.name, m.max, ago(m.per), m.key, ago(m.per)),
			}
		}
	}
	l.add(id, &a)
	return verdict{}
}

// cooling is why what was done is not done again yet, or "".
func (a *act) cooling(g *Guards, now time.Time) string {
	left := g.Cooldown - now.Sub(a.Ended)
	switch {
	case left <= 0 || a.Status != broker.Done && a.Instead == "":
		return ""
	case a.Instead != "":
		return fmt.Sprintf("cooldown: this rule had %s done here instead %s ago, and will ask again in %s", a.Instead, ago(now.Sub(a.Ended)), ago(left))
	}
	return fmt.Sprintf("cooldown: this rule did this here %s ago, and will again in %s", ago(now.Sub(a.Ended)), ago(left))
}

// cooling is why a person is not asked yet about doing the same again, or "".
func (l *ledger) cooling(a act, g *Guards, now time.Time) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.acts[l.last[a.objectKey()]]; b != nil {
		return b.cooling(g, now)
	}
	return ""
}

// limit is one bound on the blast radius.
type limit struct {
	account string // what it counts
	name    string // of the breaker, for people
	max     int
	per     time.Duration
	key     string // of the configuration
}

// limitsOf are the limits that a step is held against. A namespace gets at most
// half of the node's, and alerts below Critical at most three quarters: what
// one of them uses up is never all.
func (g *Guards) limitsOf(a *act) []limit {
	l, key, by := g.API, "guard.limits", ""
	if a.Local {
		l, key, by = g.Local, "guard.localLimits", ", acts on the node itself"
	}
	var out []limit
	if l.Rule.N > 0 {
		out = append(out, limit{a.ruleKey(), "rule " + a.Rule + by, l.Rule.N, l.Rule.Per, key + ".rule"})
	}
	for _, m := range []limit{
		{max: (l.Node.N + 1) / 2, per: l.Node.Per, key: "half of " + key + ".node"},
		{max: l.Namespace.N, per: l.Namespace.Per, key: key + ".namespace"},
	} {
		if m.max == 0 || a.Namespace == "" {
			continue
		}
		if !a.Urgent {
			out = append(out, limit{a.namespaceOtherKey(), "alerts below Critical in namespace " + a.Namespace + by, m.max - m.max/4, m.per, m.key + ", less a quarter for Critical"})
		}
		m.account, m.name = a.namespaceKey(), "namespace "+a.Namespace+by
		out = append(out, m)
	}
	if l.Node.N > 0 {
		if !a.Urgent {
			out = append(out, limit{a.nodeOtherKey(), "alerts below Critical on this node" + by, l.Node.N - l.Node.N/4, l.Node.Per, key + ".node, less a quarter for Critical"})
		}
		out = append(out, limit{a.nodeKey(), "this node" + by, l.Node.N, l.Node.Per, key + ".node"})
	}
	return out
}

// ago shows a duration to a person: whole seconds, without zero parts.
func ago(d time.Duration) string {
	s := d.Round(time.Second).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// save writes a step's record to STATE.
func (l *ledger) save(ctx context.Context, id string) error {
	l.mu.Lock()
	a, ok := l.acts[id]
	var c act
	if ok {
		c = *a
	}
	l.mu.Unlock()
	if !ok || l.state == nil {
		return nil
	}
	return l.state.Put(ctx, "act."+id, c, l.kept)
}

// saveBreaker writes an open breaker to STATE.
func (l *ledger) saveBreaker(ctx context.Context, key string) error {
	l.mu.Lock()
	b := breaker{Key: key, Until: l.open[key]}
	l.mu.Unlock()
	if l.state == nil {
		return nil
	}
	return l.state.Put(ctx, breakerKey(key), b, time.Until(b.Until)+time.Second)
}

// openBreakers is how many are open.
func (l *ledger) openBreakers(now time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, until := range l.open {
		if now.Before(until) {
			n++
		}
	}
	return n
}

// end notes what came of a step, and reports whether it had been begun. Only
// what was done counts for cooldowns and limits.
func (l *ledger) end(id string, status broker.Status, res Result, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.acts[id]
	if a == nil {
		return false
	}
	a.Status, a.Reason, a.Found, a.Ended, a.Undo = status, res.Reason, res.Found, now, res.Undo != nil
	if status != broker.Done {
		l.uncount(id, a)
	}
	return true
}

// instead notes of a step that something gentler is done in its place.
func (l *ledger) instead(id, responder string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.acts[id]; a != nil {
		a.Instead = responder
	}
}

// dump adds every record to what a store is to be given.
func (l *ledger) dump(into map[string][]byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, a := range l.acts {
		put(into, "act."+id, a)
	}
	for key, until := range l.open {
		put(into, breakerKey(key), breaker{key, until})
	}
}

// put adds a value, which JSON can always hold.
func put(into map[string][]byte, key string, v any) {
	if data, err := json.Marshal(v); err == nil {
		into[key] = data
	}
}

func breakerKey(name string) string { return "breaker." + alert.IDOf([]byte(name)) }

func (l *ledger) uncount(id string, a *act) {
	for _, k := range a.accounts() {
		if w := l.times[k]; w != nil {
			w.remove(id)
		}
	}
}

func (l *ledger) drop(id string) {
	a := l.acts[id]
	if a == nil {
		return
	}
	delete(l.acts, id)
	if l.last[a.objectKey()] == id {
		delete(l.last, a.objectKey())
	}
	l.uncount(id, a)
}

// sweep forgets what no guard asks for any more. The caller holds the lock.
func (l *ledger) sweep(now time.Time) {
	for len(l.order) > 0 {
		a := l.acts[l.order[0]]
		if a != nil && now.Sub(a.Began) < l.kept && len(l.acts) <= actsMax {
			break
		}
		l.drop(l.order[0])
		l.order = l.order[1:]
	}
	if len(l.open) > 0 {
		maps.DeleteFunc(l.open, func(_ string, until time.Time) bool { return now.After(until) })
	}
}
