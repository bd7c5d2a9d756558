package responders

import (
	"fmt"
	"slices"
	"time"
)

// budget is what the whole cluster may do within a window, as it stands in a
// ConfigMap that every stoop changes in turn.
//
// A credit is granted by being written here, as held or as spent, and only as
// long as what was spent within the window and what is held are less than the
// limit. Whoever uses one that it holds reports that later: until then it is
// counted as held. So in no window can there be more uses than the limit, whoever
// crashes when: what the last of them was granted with counted all the others.
type budget struct {
	Held    map[string]*credit `json:"held,omitempty"`    // by process
	Spent   []spending         `json:"spent,omitempty"`   // within the window
	Waiting map[string]*queued `json:"waiting,omitempty"` // by node
}

// credit is what a process may use without asking.
type credit struct {
	Node    string    `json:"node"`
	N       int       `json:"n"`
	Other   int       `json:"other"` // of them, for alerts below Critical too
	Renewed time.Time `json:"renewed"`
}

// spending is one credit used.
type spending struct {
	Step  string    `json:"step,omitempty"` // "" of credit that was held for too long
	By    string    `json:"by,omitempty"`   // the process that held it
	Node  string    `json:"node"`
	At    time.Time `json:"at"` // not before it was used
	Other bool      `json:"other,omitempty"`
	Space string    `json:"ns,omitempty"` // the namespace, see spaceOf; "" of an act in none
}

// queued is a node that was refused for want of credit. What is free next is kept
// for the ones that have had the least.
type queued struct {
	Since time.Time `json:"since"`
	Seen  time.Time `json:"seen"` // refused the last time
	Other bool      `json:"other,omitempty"`
}

// terms are what a budget is kept by.
type terms struct {
	limit Rate
	// useFor is how long a process uses what it holds without renewing it. After
	// heldFor, which is longer, others take it for spent: it may have been.
	useFor, heldFor time.Duration
	// margin is for how much longer than the window what was spent counts: the
	// clocks of several API servers are not quite the same.
	margin time.Duration
	// askFor bounds asking: a credit granted while somebody waits for it is used
	// within that time or not at all.
	askFor time.Duration
}

func termsOf(limit Rate) terms {
	useFor := min(max(limit.Per/2, 30*time.Second), 5*time.Minute)
	return terms{
		limit: limit, useFor: useFor, heldFor: 2 * useFor,
		margin: min(limit.Per/10, 5*time.Second), askFor: 2 * time.Second,
	}
}

// waitWindows is for how many windows a node that was refused keeps its place: also
// one whose alerts are rare has its turn.
const waitWindows = 3

// waitingMost bounds how many nodes keep a place: the ConfigMap holds them all.
const waitingMost = 1000

// share is how much of the budget one node may have within a window.
func (t *terms) share() int { return max(1, t.limit.N/4) }

// half is how much of n one namespace may have within a window.
func half(n int) int { return (n + 1) / 2 }

// other is how much of n alerts below Critical may have.
func other(n int) int { return n - n/4 }

// settle forgets what is over.
func (b *budget) settle(t *terms, now time.Time) {
	latest := now.Add(t.askFor + t.margin)
	for id, c := range b.Held {
		if now.Sub(c.Renewed) < t.heldFor {
			continue
		}
		delete(b.Held, id)
		for i := range min(max(c.N, 0), t.limit.N) {
			b.Spent = append(b.Spent, spending{By: id, Node: c.Node, At: c.Renewed.Add(t.useFor), Other: i < c.Other})
		}
	}
	b.Spent = slices.DeleteFunc(b.Spent, func(s spending) bool { return now.Sub(s.At) >= t.limit.Per+t.margin })
	for i := range b.Spent {
		if b.Spent[i].At.After(latest) { // nobody's clock was right
			b.Spent[i].At = latest
		}
	}
	for node, q := range b.Waiting {
		if now.Sub(q.Seen) >= waitWindows*t.limit.Per {
			delete(b.Waiting, node)
		}
	}
}

// reclaim is what a process has of credit that others took for spent, since it could
// not renew it in time: it knows what of it was used.
func (b *budget) reclaim(id, node string) *credit {
	own := &credit{Node: node}
	b.Spent = slices.DeleteFunc(b.Spent, func(s spending) bool {
		if s.By != id {
			return false
		}
		own.N++
		if s.Other {
			own.Other++
		}
		return true
	})
	return own
}

// tally is what of a budget is gone.
type tally struct{ all, other int }

func (a *tally) add(n, other int) { a.all, a.other = a.all+n, a.other+other }

// gone is what is spent or held: of the whole, and by node.
func (b *budget) gone() (tally, map[string]tally) {
	var all tally
	nodes := map[string]tally{}
	add := func(node string, n, other int) {
		a := nodes[node]
		a.add(n, other)
		all.add(n, other)
		nodes[node] = a
	}
	for _, c := range b.Held {
		add(c.Node, c.N, c.Other)
	}
	for _, s := range b.Spent {
		o := 0
		if s.Other {
			o = 1
		}
		add(s.Node, 1, o)
	}
	return all, nodes
}

// crowded is why a namespace gets no further credit, or "". Whoever may make pods
// in it can raise as many alerts as they like: what they use up is never all, neither
// of the cluster's nor of one node's.
func (b *budget) crowded(t *terms, node, space string, urgent bool) string {
	if space == "" {
		return ""
	}
	var all, here tally
	for _, s := range b.Spent {
		if s.Space != space {
			continue
		}
		o := 0
		if s.Other {
			o = 1
		}
		all.add(1, o)
		if s.Node == node {
			here.add(1, o)
		}
	}
	per := ago(t.limit.Per)
	for _, m := range []struct {
		had  tally
		n    int
		whom string
	}{{all, t.limit.N, "the whole cluster"}, {here, t.share(), "this node"}} {
		switch most := half(m.n); {
		case m.had.all >= most:
			return fmt.Sprintf("namespace %s has had %d of the %d harmful steps that %s may do within %s, and no namespace gets more than half", space, m.had.all, m.n, m.whom, per)
		case !urgent && m.had.other >= other(most):
			return fmt.Sprintf("alerts below Critical in namespace %s have had %d of the %d harmful steps that %s may do for one namespace within %s; the rest is for Critical", space, m.had.other, most, m.whom, per)
		}
	}
	return ""
}

// held is how much all processes hold.
func (b *budget) held() int {
	n := 0
	for _, c := range b.Held {
		n += c.N
	}
	return n
}

// spentOn reports whether a step has its credit.
func (b *budget) spentOn(step string) bool {
	return step != "" && slices.ContainsFunc(b.Spent, func(s spending) bool { return s.Step == step })
}

// unspend takes back what a step was given.
func (b *budget) unspend(step string) bool {
	n := len(b.Spent)
	b.Spent = slices.DeleteFunc(b.Spent, func(s spending) bool { return s.Step == step })
	return len(b.Spent) != n
}

// ahead is how many nodes that wait come before this one: those that have had
// less, or as much and have waited longer. Alerts below Critical wait for all the
// others; others are those of them.
func (b *budget) ahead(node string, urgent bool, nodes map[string]tally) (all, others int) {
	self := b.Waiting[node]
	for name, q := range b.Waiting {
		if name == node || urgent && q.Other {
			continue
		}
		before := !urgent && !q.Other
		if !before {
			mine, theirs := nodes[node].all, nodes[name].all
			before = theirs < mine || theirs == mine && (self == nil || q.Since.Before(self.Since))
		}
		if before {
			all++
			if q.Other {
				others++
			}
		}
	}
	return all, others
}

// refuses is why a node gets no further credit, or "". queue says that it might
// get one as soon as others' are free again.
func (b *budget) refuses(t *terms, node string, urgent bool) (why string, queue bool) {
	all, nodes := b.gone()
	mine := nodes[node]
	n, per := t.limit.N, ago(t.limit.Per)
	ahead, others := b.ahead(node, urgent, nodes)
	// Half of the budget at most is kept for those who wait: some of them may
	// not come back.
	ahead, others = min(ahead, n/2), min(others, n/2)
	switch {
	case mine.all >= t.share():
		return fmt.Sprintf("this node has had %d of the %d harmful steps that the whole cluster may do within %s, and no node gets more than a quarter", mine.all, n, per), false
	case !urgent && mine.other >= other(t.share()):
		return fmt.Sprintf("alerts below Critical have had %d of the %d harmful steps that this node may do within %s; the rest is for Critical", mine.other, t.share(), per), false
	case all.all >= n:
		return fmt.Sprintf("the whole cluster has had its %d harmful steps within %s", n, per), true
	case !urgent && all.other >= other(n):
		return fmt.Sprintf("alerts below Critical have had %d of the %d harmful steps that the whole cluster may do within %s; the rest is for Critical", all.other, n, per), true
	case all.all+ahead >= n, !urgent && all.other+others >= other(n):
		return fmt.Sprintf("the whole cluster has had nearly all of its %d harmful steps within %s, and what is left is for nodes that have had less", n, per), true
	}
	return "", false
}

// queue has a node wait.
func (b *budget) queue(t *terms, node string, urgent bool, now time.Time) (changed bool) {
	q := b.Waiting[node]
	switch {
	case q == nil && len(b.Waiting) >= waitingMost:
		return false
	case q == nil:
		if b.Waiting == nil {
			b.Waiting = map[string]*queued{}
		}
		b.Waiting[node] = &queued{Since: now, Seen: now, Other: !urgent}
		return true
	case q.Other && urgent:
		q.Other, q.Seen = false, now
		return true
	case now.Sub(q.Seen) >= t.limit.Per/10:
		q.Seen = now
		return true
	}
	return false
}

// prefetch gives a process credit before it needs it, as long as there is plenty:
// one for any alert, then one for Critical ones alone. All of them hold no more than
// a quarter, and nobody any of the last quarter: what a namespace leaves of the budget
// must not be held by nodes that have no use for it.
func (b *budget) prefetch(t *terms, id, node string) (changed bool) {
	for held, c := range b.Held {
		// What an earlier process of this node held may have been used: one
		// that is killed again and again must not use up the budget by that.
		if held != id && c.Node == node {
			return false
		}
	}
	for len(b.Waiting) == 0 {
		own := b.Held[id]
		if own == nil {
			own = &credit{Node: node}
		}
		most := t.limit.N / 4
		if own.N == 1 {
			most = t.limit.N / 8
		}
		forAny := own.Other < 1
		all, _ := b.gone()
		if own.N >= 2 || b.held() >= most || all.all >= other(t.limit.N) {
			return changed
		}
		if why, _ := b.refuses(t, node, !forAny); why != "" {
			return changed
		}
		own.N++
		if forAny {
			own.Other++
		}
		if b.Held == nil {
			b.Held = map[string]*credit{}
		}
		b.Held[id], changed = own, true
	}
	return changed
}

// check says what of a budget can't be.
func (b *budget) check() error {
	for id, c := range b.Held {
		if c == nil || c.N < 0 || c.Other < 0 || c.Other > c.N {
			return fmt.Errorf("held.%s makes no sense", id)
		}
	}
	for node, q := range b.Waiting {
		if q == nil {
			return fmt.Errorf("waiting.%s makes no sense", node)
		}
	}
	return nil
}
