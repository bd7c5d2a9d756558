package router

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/rules"
)

// Trust is what keeps an alert from counting towards something harmful.
type Trust struct {
	// Harms reports whether a responder harms.
	Harms func(responder string) bool
	// Distrust is why nothing harmful may be started by an alert, or "".
	Distrust func(a *alert.Alert, t alert.Target, o broker.Origin, now time.Time) string
	// MaxAge is how old an alert may be to count for anything; 0: 10 minutes.
	MaxAge time.Duration
}

const (
	defaultMaxAge = 10 * time.Minute
	// whenFuture is how far ahead of this node's clock an alert may be.
	whenFuture = 30 * time.Second
	// whenKeys bounds the targets of one rule for which something is counted, and
	// whenAlerts divided by what the rule counts to does: what is kept of a rule is
	// bounded either way.
	whenKeys   = 1024
	whenAlerts = 16 << 10
	// whenShards is into how many parts a rule's targets are divided to be stored.
	whenShards = 32
	// eachKept bounds what is kept for one target of alerts of the same rules of
	// those that are waited for together.
	eachKept = 16
	// saidEvery is how often it is said that a rule has too many targets.
	saidEvery = 10 * time.Minute
)

// Counts is what the rules with a when have counted so far: which alerts on one
// target came within a time.
//
// It goes by the alerts' own time, so that it makes no difference how late or in
// which order they arrive. An alert is known by its id and counts once.
type Counts struct {
	trust Trust
	log   *slog.Logger

	mu    sync.Mutex
	rules map[string]*ruleCounts // by [rules.When.ID]
	at    [2]uint64              // the last alert of each lane that was looked at
	clock time.Time              // the latest now

	storing sync.Mutex // held while state is being stored, in the order in which it became so
	state   *broker.State

	waiting prometheus.GaugeFunc
	reached prometheus.Counter
	dropped prometheus.Counter
}

// ruleCounts are those of one rule.
type ruleCounts struct {
	rule   string
	when   *rules.When
	most   int // targets
	keys   int
	shares map[string]int // how many targets each share has
	newest int64          // the latest of its alerts
	shards [whenShards]shard
	said   time.Time // when it was said that there are too many
}

// shard is a part of a rule's targets, stored together.
type shard struct {
	targets map[string]*counted
	// fired is what agreed with an alert whose step may not be stored yet.
	fired map[alertID][]alertID
	// until is the place in each lane up to which alerts were counted in it, when an
	// earlier process stored it.
	until [2]uint64
	dirty bool
}

// counted is what was counted for one target.
type counted struct {
	share  string // who pays for it, when there are too many
	seen   []seen // in the order of their time
	spent  []alertID
	newest int64
}

// seen is an alert that counts.
type seen struct {
	id    alertID
	at    int64  // its own time, in nanoseconds since 1970
	which uint8  // of the rules that are waited for, see [rules.When.Which]
	exact uint64 // of the pod's UID, or the container's whole id; 0: it does not say
}

type alertID [16]byte

func idOf(s string) alertID {
	var id alertID
	if n, err := hex.Decode(id[:], []byte(s)); err != nil || n != len(id) {
		sum := sha256.Sum256([]byte(s))
		copy(id[:], sum[:])
	}
	return id
}

// NewCounts counts nothing yet.
func NewCounts(trust Trust, log *slog.Logger, reg prometheus.Registerer) *Counts {
	if trust.MaxAge == 0 {
		trust.MaxAge = defaultMaxAge
	}
	c := &Counts{
		trust: trust, log: log, rules: map[string]*ruleCounts{},
		reached: prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_when_reached_total", Help: "How often as many alerts agreed as a rule's when waits for."}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_when_dropped_total", Help: "Targets that were forgotten, with what a rule's when had counted for them, since there were too many."}),
	}
	c.waiting = prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "stoop_when_targets", Help: "Targets for which a rule's when has counted something."}, func() float64 {
		c.mu.Lock()
		defer c.mu.Unlock()
		n, now := 0, time.Now()
		for _, r := range c.rules {
			for i := range r.shards {
				r.prune(&r.shards[i], now.Add(-c.trust.MaxAge))
			}
			n += r.keys
		}
		return float64(n)
	})
	if reg != nil {
		reg.MustRegister(c.waiting, c.reached, c.dropped)
	}
	return c
}

// SetRules forgets what was counted for rules that are not in force any more, or
// count otherwise.
func (c *Counts) SetRules(s *rules.Set) {
	c.mu.Lock()
	defer c.mu.Unlock()
	inForce := map[string]bool{}
	for _, r := range s.Rules {
		if r.When != nil {
			inForce[r.When.ID] = true
		}
	}
	maps.DeleteFunc(c.rules, func(id string, _ *ruleCounts) bool { return !inForce[id] })
}

// of is a rule's. The lock is held.
func (c *Counts) of(r *rules.Rule) *ruleCounts {
	rc := c.rules[r.When.ID]
	if rc == nil {
		rc = newRuleCounts(r)
		c.rules[r.When.ID] = rc
	}
	return rc
}

func newRuleCounts(r *rules.Rule) *ruleCounts {
	rc := &ruleCounts{rule: r.Name, when: r.When, shares: map[string]int{}}
	rc.most = min(whenKeys, whenAlerts/r.When.Needed())
	for i := range rc.shards {
		rc.shards[i] = shard{targets: map[string]*counted{}, fired: map[alertID][]alertID{}}
	}
	return rc
}

// Arrived is an alert as it is counted.
type Arrived struct {
	Alert    *alert.Alert
	Target   alert.Target
	Origin   broker.Origin
	Received time.Time
	Now      time.Time

	// Where it stands in the stream; with Seq 0 it is of none.
	Urgent bool
	Seq    uint64
}

// Agreement is whether as many alerts agree as a rule waits for.
type Agreement struct {
	Reached bool
	Agreed  []string // the ids of the latest of them, at most [broker.AgreedMost]
	Why     string   // otherwise: how many do, or why this one does not count
}

// Waiting reports whether one of these rules waits for several alerts.
func Waiting(matched []*rules.Rule) bool {
	return slices.ContainsFunc(matched, func(r *rules.Rule) bool { return r.When != nil })
}

// Add counts an alert for those rules it matches that wait for several. All rules
// that match it are given in one call; the agreements are in their order, those of
// rules without a when mean nothing.
func (c *Counts) Add(in Arrived, matched []*rules.Rule) []Agreement {
	out := make([]Agreement, len(matched))
	c.mu.Lock()
	defer c.mu.Unlock()
	if in.Now.After(c.clock) {
		c.clock = in.Now
	}
	lane := 0
	if in.Urgent {
		lane = 1
	}
	for i, r := range matched {
		if r.When != nil {
			out[i] = c.add(&in, lane, r)
		}
	}
	if in.Seq > c.at[lane] {
		c.at[lane] = in.Seq
	}
	return out
}

func (c *Counts) add(in *Arrived, lane int, r *rules.Rule) Agreement {
	w := r.When
	which := w.Which(in.Alert.Rule)
	if which == 0 {
		return Agreement{Why: "its rule is none of those that are waited for"}
	}
	at := in.Alert.Time
	if at.IsZero() {
		at = in.Received
	}
	if why := c.distrust(in, at, r); why != "" {
		return Agreement{Why: "it does not count: " + why}
	}
	key, share, exact, why := common(w.By, in.Alert, in.Target)
	if why != "" {
		return Agreement{Why: "it does not count: " + why}
	}
	rc := c.of(r)
	sh := &rc.shards[shardOf(key)]
	id := idOf(in.Alert.ID)
	if agreed, ok := sh.fired[id]; ok { // it comes again: its step may not have been stored
		return Agreement{Reached: true, Agreed: texts(agreed)}
	}
	about := " " + aboutKey(w.By, key)
	t := sh.targets[key]
	again := in.Seq > 0 && in.Seq <= sh.until[lane]
	if !again && t != nil {
		again = slices.Contains(t.spent, id) || slices.ContainsFunc(t.seen, func(s seen) bool { return s.id == id })
	}
	if again {
		return Agreement{Why: "it was counted before" + about}
	}
	rc.newest = max(rc.newest, at.UnixNano())
	if t == nil {
		if rc.keys >= rc.most {
			c.makeRoom(rc)
		}
		t = &counted{share: share}
		rc.put(sh, key, t)
	}
	sh.dirty = true
	s := seen{id: id, at: at.UnixNano(), which: which, exact: exact}
	t.insert(s, w, c.clock.Add(-c.trust.MaxAge-w.Within).UnixNano())
	t.newest = max(t.newest, s.at)
	agreed, n := t.agree(s, w)
	if agreed == nil {
		return Agreement{Why: fmt.Sprintf("%d of %d within %s", n, w.Needed(), short(w.Within)) + about}
	}
	// What agreed is used up, and with it all else that was counted of the same.
	t.seen = slices.DeleteFunc(t.seen, func(o seen) bool { return same(o.exact, s.exact) })
	t.spent = agreed
	last := agreed[max(0, len(agreed)-broker.AgreedMost):]
	sh.fired[id] = last
	c.reached.Inc()
	return Agreement{Reached: true, Agreed: texts(last)}
}

// distrust is why an alert does not count, or "".
func (c *Counts) distrust(in *Arrived, at time.Time, r *rules.Rule) string {
	harms := c.trust.Harms != nil && slices.ContainsFunc(r.Actions, func(a broker.Action) bool { return c.trust.Harms(a.Responder) })
	if harms && c.trust.Distrust != nil {
		if why := c.trust.Distrust(in.Alert, in.Target, in.Origin, in.Now); why != "" {
			return why
		}
	}
	switch age := in.Now.Sub(at); {
	case age > c.trust.MaxAge:
		return fmt.Sprintf("the alert is %s old, more than guard.maxAge (%s)", age.Round(time.Second), c.trust.MaxAge)
	case -age > whenFuture:
		return fmt.Sprintf("the alert is from the future, by %s", (-age).Round(time.Second))
	}
	return ""
}

// common is what an alert has in common with those that it may agree with, and who
// pays for it when there is too much: exact tells apart what has the same name.
// why says what is missing.
func common(by rules.By, a *alert.Alert, t alert.Target) (key, share string, exact uint64, why string) {
	share = "namespace " + t.Namespace
	user, audited := a.Field("ka.user.name")
	if audited {
		// Whoever makes requests chooses what they name, and many of them.
		share = "user " + accountOf(user)
	}
	switch by {
	case rules.ByPod:
		switch {
		case t.Pod != "" && t.Namespace != "":
			return t.Namespace + "/" + t.Pod, share, hash(t.UID), ""
		case t.Resource != nil && t.Resource.Resource == "pods" && t.Resource.Name != "" && t.Resource.Namespace != "":
			return t.Resource.Namespace + "/" + t.Resource.Name, share, 0, ""
		}
		return "", "", 0, "it names no pod"
	case rules.ByContainer:
		if len(t.Container) < shortID {
			return "", "", 0, "it names no container"
		}
		if len(t.Container) > shortID {
			exact = hash(t.Container)
		}
		return t.Container[:shortID], share, exact, ""
	case rules.ByNode:
		return t.Node, share, 0, ""
	case rules.ByNamespace:
		switch {
		case t.Namespace != "":
			return t.Namespace, share, 0, ""
		case t.Resource != nil && t.Resource.Namespace != "":
			return t.Resource.Namespace, share, 0, ""
		}
		return "", "", 0, "it names no namespace"
	case rules.ByUser:
		if audited {
			return bounded("user " + user), share, 0, ""
		}
		if t.Host {
			// The number of who logged in stays the same under su and sudo. In a
			// container a number is nobody's in particular.
			for _, field := range []string{"user.loginuid", "user.uid"} {
				if uid, ok := a.Field(field); ok && uid != "-1" && uid != "4294967295" {
					return bounded("uid " + uid), share, 0, ""
				}
			}
		}
		return "", "", 0, "it names no user whom the API server or this host knows"
	}
	return "", "", 0, fmt.Sprintf("nobody knows what %q is", by)
}

// shortID is how long a container's id is where it is not written out.
const shortID = 12

// accountOf is who pays for what a user of the API server does: who may make service
// accounts in a namespace has as many as he likes.
func accountOf(user string) string {
	if rest, ok := strings.CutPrefix(user, "system:serviceaccount:"); ok {
		ns, _, _ := strings.Cut(rest, ":")
		return "system:serviceaccount:" + ns
	}
	return bounded(user)
}

// bounded is a text that is not too long to be kept.
func bounded(s string) string {
	const most = 128
	if len(s) <= most {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return s[:most/2] + " " + hex.EncodeToString(sum[:16])
}

// same reports whether two alerts may be of the same pod or container.
func same(a, b uint64) bool { return a == 0 || b == 0 || a == b }

// insert puts an alert in its place, and drops what can't agree with anything any
// more: what comes is not older than before by more than within.
func (t *counted) insert(s seen, w *rules.When, before int64) {
	t.seen = slices.DeleteFunc(t.seen, func(o seen) bool { return o.at < before })
	i, _ := slices.BinarySearchFunc(t.seen, s, func(a, b seen) int { return cmp.Or(cmp.Compare(a.at, b.at), -1) })
	t.seen = slices.Insert(t.seen, i, s)
	if w.Count > 0 {
		if most := 3 * w.Count; len(t.seen) > most {
			t.seen = slices.Delete(t.seen, 0, 1)
		}
		return
	}
	t.thin(s.which, w)
}

// thin leaves out one of too many alerts of the same rules: of those that are long
// past, or else of all, one that has others right before and after it, so that what
// is left is spread over the time.
func (t *counted) thin(which uint8, w *rules.When) {
	var of, past []int
	long := t.seen[len(t.seen)-1].at - int64(w.Within+whenFuture)
	for i, s := range t.seen {
		if s.which == which {
			if of = append(of, i); s.at < long {
				past = of
			}
		}
	}
	if len(of) <= eachKept {
		return
	}
	if len(past) > 0 {
		of = past
	}
	out, least := of[0], int64(-1)
	for i := 1; i+1 < len(of); i++ {
		if gap := t.seen[of[i+1]].at - t.seen[of[i-1]].at; least < 0 || gap < least {
			out, least = of[i], gap
		}
	}
	t.seen = slices.Delete(t.seen, out, out+1)
}

// agree is the alerts that agree with s, s as the last, if they are as many as are
// needed; else how many of these there are.
func (t *counted) agree(s seen, w *rules.When) (agreed []alertID, n int) {
	near := make([]seen, 0, len(t.seen))
	exact := s.exact
	for i := len(t.seen) - 1; i >= 0; i-- {
		o := t.seen[i]
		if o.at > s.at+int64(w.Within) || o.at < s.at-int64(w.Within) || !same(exact, o.exact) {
			continue
		}
		if exact == 0 { // of which pod or container it is, the latest says
			exact = o.exact
		}
		near = append(near, o)
	}
	slices.Reverse(near)
	for first := range near {
		from := near[first].at
		if from > s.at {
			break
		}
		last := first
		for last < len(near) && near[last].at-from <= int64(w.Within) {
			last++
		}
		chosen := near[first:last]
		if w.Count == 0 {
			chosen = oneOfEach(chosen, len(w.Rules))
		}
		n = max(n, min(len(chosen), w.Needed()))
		if len(chosen) < w.Needed() {
			continue
		}
		for _, o := range chosen {
			if o.id != s.id {
				agreed = append(agreed, o.id)
			}
		}
		return append(agreed, s.id), w.Needed()
	}
	return nil, n
}

// oneOfEach is alerts of which each stands for another one of the rules that are
// waited for: of as many rules as can be.
func oneOfEach(all []seen, rules int) []seen {
	var of [rules8]int // which alert stands for a rule, from 1
	var which uint8
	for _, s := range all {
		which |= s.which
	}
	if bits.OnesCount8(which) < rules {
		return make([]seen, bits.OnesCount8(which)) // too few, whichever it is
	}
	var tried uint8
	var place func(i int) bool
	place = func(i int) bool {
		for r := range rules {
			if all[i].which&(1<<r) == 0 || tried&(1<<r) != 0 {
				continue
			}
			tried |= 1 << r
			if of[r] == 0 || place(of[r]-1) {
				of[r] = i + 1
				return true
			}
		}
		return false
	}
	for i := range all {
		tried = 0
		place(i)
	}
	var chosen []seen
	for i := range all {
		if slices.Contains(of[:], i+1) {
			chosen = append(chosen, all[i])
		}
	}
	return chosen
}

const rules8 = rules.MaxTogether

// makeRoom forgets targets of a rule: those that came too long ago, or else an eighth
// of those of the share that has the most, so that who makes many pods pushes out his
// own. Of these it is those that are the farthest from what is waited for, the oldest
// first.
func (c *Counts) makeRoom(rc *ruleCounts) {
	type target struct {
		shard *shard
		key   string
		*counted
	}
	var all, largest []target
	most := 0
	for _, n := range rc.shares {
		most = max(most, n)
	}
	for i := range rc.shards {
		sh := &rc.shards[i]
		for key, t := range sh.targets {
			if len(t.seen) == 0 || t.newest+int64(rc.when.Within+whenFuture) < rc.newest {
				all = append(all, target{sh, key, t})
			} else if rc.shares[t.share] == most {
				largest = append(largest, target{sh, key, t})
			}
		}
	}
	forget := func(t target) {
		rc.forget(t.shard, t.key)
		t.shard.dirty = true
	}
	for _, t := range all {
		forget(t)
	}
	if len(all) > 0 {
		return
	}
	slices.SortFunc(largest, func(a, b target) int {
		return cmp.Or(cmp.Compare(len(a.seen), len(b.seen)), cmp.Compare(a.newest, b.newest), strings.Compare(a.key, b.key))
	})
	for _, t := range largest[:max(1, len(largest)/8)] {
		forget(t)
		c.dropped.Inc()
	}
	if now := c.clock; now.Sub(rc.said) > saidEvery {
		rc.said = now
		if c.log != nil {
			c.log.Warn("a rule counts alerts of too many targets: what was counted of some is forgotten", "rule", rc.rule, "targets", rc.most, "by", string(rc.when.By))
		}
	}
}

// prune forgets the targets with which nothing can agree any more: what counts is
// not older than before.
func (rc *ruleCounts) prune(sh *shard, before time.Time) {
	for key, t := range sh.targets {
		if t.newest+int64(rc.when.Within) < before.UnixNano() {
			rc.forget(sh, key)
		}
	}
}

func (rc *ruleCounts) forget(sh *shard, key string) {
	share := sh.targets[key].share
	delete(sh.targets, key)
	rc.keys--
	if rc.shares[share]--; rc.shares[share] == 0 {
		delete(rc.shares, share)
	}
}

func (rc *ruleCounts) put(sh *shard, key string, t *counted) {
	sh.targets[key] = t
	rc.keys++
	rc.shares[t.share]++
}

func shardOf(key string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))
	return int(h.Sum32() % whenShards)
}

func hash(s string) uint64 {
	if s == "" {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(s))
	return max(h.Sum64(), 1)
}

func texts(ids []alertID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = hex.EncodeToString(id[:])
	}
	return out
}

// aboutKey is the target in a sentence.
func aboutKey(by rules.By, key string) string {
	switch by {
	case rules.ByUser: // whose name may be anything
		kind, name, _ := strings.Cut(key, " ")
		return fmt.Sprintf("by %s %q", kind, name)
	case rules.ByNode:
		return "on one node"
	}
	return "on " + string(by) + " " + key
}

// short is a duration without the zeros that Go writes behind it.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
