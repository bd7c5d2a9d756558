package responders

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// settled is since when each rule means what it means, by its hash: one that is new,
// or was changed, only tells what it would do until it is as old as
// [Guards.Settle].
type settled struct {
	Rules map[string]known `json:"rules"`

	until map[string]time.Time // by name, of those in force
}

type known struct {
	Since time.Time `json:"since,omitzero"` // zero: it was in force before any was known
	Gone  time.Time `json:"gone,omitzero"`  // since when it is not in force any more
}

const (
	keySettled = "settled"
	// backWithin is how long a rule that is gone may come back as it was without
	// having to settle anew, and goneMost bounds how many are remembered for it.
	backWithin = 24 * time.Hour
	goneMost   = 2000
)

func (h *Host) loadSettled(ctx context.Context) error {
	s := &settled{}
	found, err := h.Broker.State().Get(ctx, keySettled, s)
	if err != nil {
		return err
	}
	if found {
		h.settled.Store(s)
	}
	return nil
}

// SettleRules says which rules are in force, by name, and the hash of what each
// means. Those that are new begin to settle; but the first rules of all don't, in a
// stoop that knew none: its guard is that it begins in audit mode.
func (h *Host) SettleRules(ctx context.Context, hashes map[string]string) error {
	now := time.Now().UTC()
	old := h.settled.Load()
	s := &settled{Rules: map[string]known{}, until: map[string]time.Time{}}
	var begin []string
	for name, hash := range hashes {
		k := known{Since: now}
		if old == nil {
			k.Since = time.Time{}
		} else if was, ok := old.Rules[hash]; ok {
			k.Since = was.Since
		}
		s.Rules[hash] = k
		if until := k.Since.Add(h.Guards.Settle); !k.Since.IsZero() && h.Guards.Settle > 0 && until.After(now) {
			s.until[name] = until
			if k.Since.Equal(now) {
				begin = append(begin, name)
			}
		}
	}
	if old != nil {
		s.remember(old, now, h.Guards.Settle)
	}
	h.settled.Store(s)
	if len(begin) > 0 {
		slices.Sort(begin)
		h.Log.Warn("rules that are new or were changed tell only what they would do, until they have settled",
			"rules", strings.Join(begin, ", "), "until", now.Add(h.Guards.Settle), "do", "guard.settle in stoop.yaml says for how long")
	}
	if old != nil && maps.Equal(s.Rules, old.Rules) {
		return nil
	}
	return h.Broker.State().Put(ctx, keySettled, s, 0)
}

// remember keeps what old knows of rules that had settled and are gone.
func (s *settled) remember(old *settled, now time.Time, settle time.Duration) {
	type gone struct {
		hash string
		known
	}
	var all []gone
	for hash, k := range old.Rules {
		if _, inForce := s.Rules[hash]; inForce {
			continue
		}
		if k.Gone.IsZero() {
			if now.Sub(k.Since) < settle {
				continue // it never has
			}
			k.Gone = now
		}
		if now.Sub(k.Gone) < backWithin {
			all = append(all, gone{hash, k})
		}
	}
	slices.SortFunc(all, func(a, b gone) int { return cmp.Or(b.Gone.Compare(a.Gone), cmp.Compare(a.hash, b.hash)) })
	for _, g := range all[:min(len(all), goneMost)] {
		s.Rules[g.hash] = g.known
	}
}

// settling is why a rule does not enforce yet what came at a time, or "".
func (h *Host) settling(rule string, received time.Time) string {
	s := h.settled.Load()
	if s == nil {
		return ""
	}
	until, ok := s.until[rule]
	if !ok || !received.Before(until) {
		return ""
	}
	return fmt.Sprintf("the rule is new, or was changed: it enforces from %s on (guard.settle)", until.Format(time.RFC3339))
}
