package router

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"stoop/broker"
	"stoop/rules"
)

// keyWhen begins the keys of what was counted: keyWhen, the rule's
// [rules.When.ID], and the number of a shard.
const keyWhen = "when."

// storedShard is a shard in STATE.
type storedShard struct {
	Rule    string                 `json:"rule"` // for people
	Until   [2]uint64              `json:"until"`
	Targets map[string]storedCount `json:"targets,omitempty"`
	Fired   map[alertID][]alertID  `json:"fired,omitempty"`
}

type storedCount struct {
	Share string       `json:"share"`
	Seen  []storedSeen `json:"seen,omitempty"`
	Spent []alertID    `json:"spent,omitempty"`
	Last  int64        `json:"last"`
}

type storedSeen struct {
	ID    alertID `json:"id"`
	At    int64   `json:"at"`
	Which uint8   `json:"which"`
	Exact uint64  `json:"exact,omitempty"`
}

func (id alertID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

func (id *alertID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(id) {
		return fmt.Errorf("%q is no id of an alert", b)
	}
	_, err := hex.Decode(id[:], b)
	return err
}

// open takes b as the store. The first time, it reads from it what an earlier
// process had counted by the rules in force; later this process knows it better.
func (c *Counts) open(ctx context.Context, b *broker.Broker, set *rules.Set) error {
	c.storing.Lock()
	defer c.storing.Unlock()
	if c.state != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		// Another store counts its alerts anew. Those of the old one that come over
		// are known by their ids.
		c.at = [2]uint64{}
		for _, rc := range c.rules {
			for i := range rc.shards {
				rc.shards[i].until = c.at
				rc.shards[i].dirty = true
			}
		}
		c.state = b.State()
		return nil
	}
	last, err := b.LastAlerts(ctx)
	if err != nil {
		return err
	}
	byID := map[string]*rules.Rule{}
	for _, r := range set.Rules {
		if r.When != nil {
			byID[r.When.ID] = r
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err = b.State().Each(ctx, keyWhen+">", func(key string, value []byte, _ time.Time) error {
		id, number, _ := strings.Cut(strings.TrimPrefix(key, keyWhen), ".")
		n, err := strconv.Atoi(number)
		r := byID[id]
		if r == nil || err != nil || n < 0 || n >= whenShards {
			return nil // of a rule that is gone, or counts otherwise by now: its time ends it
		}
		var st storedShard
		if err := json.Unmarshal(value, &st); err != nil {
			c.log.Error("what a rule had counted can't be read, and is left out", "rule", r.Name, "error", err)
			return nil
		}
		c.of(r).load(n, &st, last)
		return nil
	})
	if err != nil {
		return err
	}
	c.state = b.State()
	return nil
}

// load takes over a shard that an earlier process stored. last are the last alerts
// of the lanes: a store that is not this one may have had more.
func (rc *ruleCounts) load(n int, st *storedShard, last [2]uint64) {
	sh := &rc.shards[n]
	for lane, until := range st.Until {
		if until <= last[lane] {
			sh.until[lane] = until
		}
	}
	for key, sc := range st.Targets {
		if rc.keys >= rc.most {
			break
		}
		t := &counted{share: sc.Share, spent: sc.Spent, newest: sc.Last}
		for _, s := range sc.Seen {
			t.seen = append(t.seen, seen{s.ID, s.At, s.Which, s.Exact})
		}
		rc.put(sh, key, t)
		rc.newest = max(rc.newest, t.newest)
	}
	for id, agreed := range st.Fired {
		sh.fired[id] = agreed
	}
}

// Keep implements [broker.Keeper].
func (c *Counts) Keep(ctx context.Context) error {
	c.storing.Lock()
	defer c.storing.Unlock()
	entries, of := c.changed()
	if len(entries) == 0 {
		return nil
	}
	err := c.state.PutAll(ctx, entries)
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, sh := range of {
			sh.dirty = true
		}
	}
	return err
}

// changed is what is to be stored.
func (c *Counts) changed() (entries []broker.StateEntry, of []*shard) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, rc := range c.rules {
		// Nothing can agree with it after that.
		ttl := rc.when.Within + c.trust.MaxAge + time.Minute
		for i := range rc.shards {
			sh := &rc.shards[i]
			if !sh.dirty {
				continue
			}
			sh.dirty = false
			rc.prune(sh, c.clock.Add(-c.trust.MaxAge))
			entries = append(entries, broker.StateEntry{Key: keyWhen + id + "." + strconv.Itoa(i), Value: rc.stored(sh, c.at), TTL: ttl})
			of = append(of, sh)
		}
	}
	return entries, of
}

func (rc *ruleCounts) stored(sh *shard, at [2]uint64) json.RawMessage {
	for lane := range at { // an alert that came again after a restart may be far behind
		at[lane] = max(at[lane], sh.until[lane])
	}
	st := storedShard{Rule: rc.rule, Until: at, Targets: make(map[string]storedCount, len(sh.targets)), Fired: sh.fired}
	for key, t := range sh.targets {
		sc := storedCount{Share: t.share, Spent: t.spent, Last: t.newest, Seen: make([]storedSeen, len(t.seen))}
		for i, s := range t.seen {
			sc.Seen[i] = storedSeen{s.id, s.at, s.which, s.exact}
		}
		st.Targets[key] = sc
	}
	data, err := json.Marshal(st)
	if err != nil { // there is nothing in it that JSON can't hold
		panic(fmt.Sprintf("what a rule has counted: %v", err))
	}
	return data
}

// Kept implements [broker.Keeper]: an alert whose step is stored need not fire again.
func (c *Counts) Kept(s *broker.Step) {
	id := idOf(s.AlertID)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rc := range c.rules {
		if rc.rule != s.Rule {
			continue
		}
		for i := range rc.shards {
			delete(rc.shards[i].fired, id)
		}
	}
}
