package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Verdict is what came of verifying a journal.
type Verdict struct {
	Outcomes int  `json:"outcomes"` // that are kept and chained
	First    Head `json:"first,omitzero"`
	Head     Head `json:"head,omitzero"`
	// Since and Until are the times of the first and the last.
	Since time.Time `json:"since,omitzero"`
	Until time.Time `json:"until,omitzero"`
	// Dropped is how many after the first are gone since so many of their responder
	// followed; Unchained how many are from before there was a journal; Carried how
	// many were carried over from memory, where the disk had been full.
	Dropped   uint64 `json:"dropped,omitempty"`
	Unchained int    `json:"unchained,omitempty"`
	Carried   int    `json:"carried,omitempty"`
	// Seams are the places where what was carried over does not join what stood
	// before it on the disk.
	Seams int `json:"seams,omitempty"`
	// Noted is whether STATE holds the journal's head: without it, outcomes missing
	// at the very end can't be seen.
	Noted bool `json:"noted"`
	// Broken is the first place where the chain is broken; nil: it is whole. Breaks is
	// how many there are.
	Broken *Break `json:"broken,omitempty"`
	Breaks int    `json:"breaks,omitempty"`
}

// Break is a place where a journal is broken.
type Break struct {
	N    uint64    `json:"n"` // the first that is missing or changed
	What string    `json:"what"`
	ID   string    `json:"id,omitempty"`  // of the step whose outcome it is, or that follows
	Time time.Time `json:"time,omitzero"` // of that outcome
}

func (b *Break) Error() string { return b.What }

// verifyTries is how often a journal is read that loses its oldest meanwhile.
const verifyTries = 3

// Verify holds every outcome against the journal's chain. want, if it has a hash,
// has to be contained.
func (b *Broker) Verify(ctx context.Context, want Head) (Verdict, error) {
	for try := 1; ; try++ {
		v, moved, err := b.verify(ctx, want)
		if err != nil {
			return v, fmt.Errorf("verify the journal: %w", err)
		}
		if v.Broken == nil || !moved || try == verifyTries {
			return v, nil
		}
	}
}

func (b *Broker) verify(ctx context.Context, want Head) (v Verdict, moved bool, err error) {
	var n noted
	if v.Noted, err = b.state.Get(ctx, keyJournal, &n); err != nil {
		return v, false, err
	}
	s, err := b.js.Stream(ctx, StreamOutcomes)
	if err != nil {
		return v, false, err
	}
	was := s.CachedInfo()
	c := verifier{verdict: &v, noted: n, want: want, of: map[string]*chain{}}
	err = b.outcomes(ctx, time.Time{}, c.add)
	if errors.Is(err, errStalled) {
		c.broken(v.Head.N+1, about{}, "after number %d: %v", v.Head.N, err)
		err = nil
	}
	if err != nil {
		return v, false, err
	}
	is, err := s.Info(ctx)
	if err != nil {
		return v, false, err
	}
	c.end(is.Config.MaxMsgsPerSubject, is.Config.MaxAge)
	return v, is.State.FirstSeq != was.State.FirstSeq, nil
}

// noted is what STATE holds of the journal.
type noted struct {
	Head
	Time time.Time `json:"time"`
}

// chain is what was seen of one responder's outcomes.
type chain struct {
	name  string
	first link  // the oldest kept
	at    about // that one
	seen  int
	last  Head
	m     uint64
	floor uint64 // the oldest that has to be kept, as the outcomes themselves say
	gone  Head   // the last of them, that another outcome names and that was not seen before it
	by    about  // that other one
}

// gap is where the journal's numbers leave some out.
type gap struct {
	from, to uint64
	by       about // the outcome after it
}

// about is which outcome something is said of.
type about struct {
	n    uint64
	id   string
	time time.Time
}

// verifier goes through a journal in the order of its stream.
type verifier struct {
	verdict *Verdict
	noted   noted
	want    Head
	found   bool // want
	of      map[string]*chain
	gaps    []gap
	begin   uint64 // what has a smaller number may have gone by age or size
	at      about
	carried Head // the last that was carried, as it was in memory
	breaks  []Break
}

func (c *verifier) broken(n uint64, by about, format string, args ...any) {
	c.breaks = append(c.breaks, Break{N: n, What: fmt.Sprintf(format, args...), ID: by.id, Time: by.time})
}

func (c *verifier) add(m jetstream.Msg) error {
	var o Outcome
	bad := json.Unmarshal(m.Data(), &o)
	e, hash := entryOf(m)
	v := c.verdict
	at := about{n: v.Head.N + 1, id: o.ID, time: o.Time}
	if e.link == "" && v.Outcomes == 0 {
		v.Unchained++
		return nil
	}
	l, err := parseLink(e.link)
	if err != nil || bad != nil {
		c.broken(at.n, at, "an outcome after number %d has no link to the one before, or can't be read: it was changed, or added", v.Head.N)
		return nil
	}
	at.n = l.n
	name := strings.TrimPrefix(e.subject, OutcomeSubject(""))
	if e.sum() != hash {
		c.broken(l.n, at, "number %d is not what it was: its hash is another", l.n)
	}
	if o.Responder != name {
		c.broken(l.n, at, "number %d names another responder than its subject, %s", l.n, name)
	}
	switch {
	case v.Outcomes == 0:
		v.First, v.Since = Head{l.n, hash}, o.Time
		c.look(Head{l.n - 1, l.prev})
		c.begin = l.n
		if v.Unchained > 0 && l.n > 1 {
			// What stands before it has no place in the journal: either that is older
			// than the journal, and then nothing that is younger went by age or size,
			// or its links were taken away.
			c.begin = 1
			c.gaps = append(c.gaps, gap{1, l.n - 1, at})
		}
	case l.n <= v.Head.N:
		c.broken(l.n, at, "number %d stands after number %d", l.n, v.Head.N)
	case l.n > v.Head.N+1:
		c.gaps = append(c.gaps, gap{v.Head.N + 1, l.n - 1, at})
	case l.prev != v.Head.Hash:
		c.broken(v.Head.N, c.at, "number %d is not the one that number %d follows: it was changed", v.Head.N, l.n)
	}
	c.lasts(e.last, at)
	c.link(name, l, hash, at)
	if len(e.was) > 0 {
		c.memory(&e, l, at)
	}
	h := Head{l.n, hash}
	if c.noted.N == l.n && c.noted.Hash != hash {
		c.broken(l.n, at, "number %d is not what STATE says it was", l.n)
	}
	c.look(h)
	v.Head, v.Until = h, o.Time
	v.Outcomes++
	c.at = at
	return nil
}

// look looks for the head that has to be contained.
func (c *verifier) look(h Head) {
	if c.want.Hash == h.Hash && (c.want.N == 0 || c.want.N == h.N) {
		c.found = true
	}
}

// link holds an outcome against the one before of its responder.
func (c *verifier) link(name string, l link, hash string, at about) {
	k := c.responder(name)
	switch {
	case k.seen == 0:
		k.first, k.at = l, at
	case l.own.N > k.last.N:
		// Some between are missing. Where they may be, those before them may be as
		// well: they went while this was read.
		k.first, k.at = l, at
	case l.own.N < k.last.N:
		c.broken(k.last.N, at, "number %d of %s does not follow number %d, which stands before it", l.n, name, k.last.N)
	case l.own.Hash != k.last.Hash:
		c.broken(k.last.N, at, "number %d of %s is not the one that number %d follows: it was changed", k.last.N, name, l.n)
	}
	k.seen++
	k.last, k.m = Head{l.n, hash}, l.m
	k.keep(l.room)
}

// keep notes how many are kept after the last.
func (k *chain) keep(room int64) {
	if room > 0 && k.m > uint64(room) {
		k.floor = max(k.floor, k.m-uint64(room)+1)
	}
}

// lasts holds what an outcome names as the last of each responder before it against
// what was seen.
func (c *verifier) lasts(s string, at about) {
	if s == "" {
		return
	}
	for one := range strings.SplitSeq(s, ",") {
		name, head, _ := strings.Cut(one, "=")
		h, err := ParseHead(head)
		if err != nil || h.N == 0 || h.N >= at.n {
			c.broken(at.n, at, "number %d names the last outcomes in a way that can't be read", at.n)
			return
		}
		switch k := c.responder(name); {
		case k.last.N < h.N:
			k.gone, k.by = h, at // it is missing; end says whether it may be
		case k.last != h:
			c.broken(h.N, at, "number %d of %s is not what number %d says it was", h.N, name, at.n)
		}
	}
}

func (c *verifier) responder(name string) *chain {
	k := c.of[name]
	if k == nil {
		k = &chain{name: name}
		c.of[name] = k
	}
	return k
}

// memory holds an outcome that was carried over from memory against what it was there.
func (c *verifier) memory(e *entry, l link, at about) {
	v := c.verdict
	v.Carried++
	for i, was := range e.was {
		f := strings.Split(was, ";")
		if len(f) != 3 {
			c.broken(at.n, at, "number %d says what it was in memory in a way that can't be read", at.n)
			return
		}
		if f[0] == "" {
			continue // another version's
		}
		old, err := parseLink(f[0])
		before := entry{subject: e.subject, data: e.data, link: f[0], last: f[1], was: e.was[:i]}
		if err != nil || before.sum() != f[2] {
			c.broken(at.n, at, "number %d is not what it was in memory", at.n)
			return
		}
		h := Head{old.n, f[2]}
		c.look(h)
		if i < len(e.was)-1 {
			continue
		}
		if c.carried.N+1 == old.n && c.carried.Hash != old.prev || c.carried.N+1 != old.n && l.prev != old.prev {
			v.Seams++
		}
		c.carried = h
	}
}

// end says what can be said only after all was seen.
func (c *verifier) end(room int64, age time.Duration) {
	v := c.verdict
	var explained uint64 // the latest number that may be missing
	for _, k := range c.of {
		k.keep(room)
		if k.seen == 0 {
			continue
		}
		switch from := k.first.own.N; {
		case from < c.begin:
		case k.first.m <= k.floor:
			explained = max(explained, from)
		default:
			c.broken(from, k.at, "number %d of %s is missing: number %d follows it", from, k.name, k.first.n)
		}
	}
	for _, k := range c.of {
		if k.gone.N < c.begin || k.seen > 0 && k.first.own.N >= k.gone.N && k.first.m <= k.floor {
			continue
		}
		c.broken(k.gone.N, k.by, "number %d of %s is missing: number %d names it", k.gone.N, k.name, k.by.n)
	}
	for _, g := range c.gaps {
		if g.to <= explained {
			v.Dropped += g.to - g.from + 1
			continue
		}
		c.broken(max(g.from, explained+1), g.by, "%s missing, before number %d", numbers(max(g.from, explained+1), g.to), g.by.n)
	}
	if n := c.noted; n.N > v.Head.N && (v.Outcomes > 0 || time.Since(n.Time) < age) {
		c.broken(v.Head.N+1, about{}, "%s missing at the end: STATE says that number %d was stored by %s",
			numbers(v.Head.N+1, n.N), n.N, n.Time.UTC().Format(time.DateTime))
	}
	if c.want.Hash != "" && !c.found {
		at := c.want.N
		switch {
		case at == 0:
			c.broken(v.First.N, about{}, "the head %s is not in the journal, which begins at number %d", c.want.Hash, v.First.N)
		case at < v.First.N:
			c.broken(at, about{}, "the head %s is not in the journal any more: it begins at number %d", c.want, v.First.N)
		case at > v.Head.N:
			c.broken(v.Head.N+1, about{}, "the head %s is not in the journal: it ends at number %d", c.want, v.Head.N)
		default:
			c.broken(at, about{}, "the head %s is not in the journal: another outcome has its number, or none", c.want)
		}
	}
	slices.SortStableFunc(c.breaks, func(a, b Break) int { return cmp.Compare(a.N, b.N) })
	c.breaks = slices.CompactFunc(c.breaks, func(a, b Break) bool { return a.N == b.N })
	if v.Breaks = len(c.breaks); v.Breaks > 0 {
		v.Broken = &c.breaks[0]
	}
}

func numbers(from, to uint64) string {
	if from == to {
		return "number " + strconv.FormatUint(from, 10) + " is"
	}
	return fmt.Sprintf("numbers %d to %d are", from, to)
}
