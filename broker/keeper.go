package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Keeper remembers what the routing of one alert means to that of the next, and
// must not forget it when the process is killed.
type Keeper interface {
	// Keep stores all that is remembered of the alerts routed so far. It is
	// called, by several goroutines, before any of these is acknowledged, and
	// before a step on which several alerts agreed is stored.
	Keep(context.Context) error
	// Kept says that such a step is stored.
	Kept(*Step)
}

// StateEntry is a key with its value, for [State.PutAll].
type StateEntry struct {
	Key   string
	Value any
	TTL   time.Duration // after which it is gone; 0: it stays
}

// PutAll stores entries in one go, and returns when all of them are stored.
func (s *State) PutAll(ctx context.Context, all []StateEntry) error {
	ctx, cancel := s.b.bound(ctx)
	defer cancel()
	acks := make([]jetstream.PubAckFuture, 0, len(all))
	for _, r := range all {
		data, err := json.Marshal(r.Value)
		if err != nil {
			return fmt.Errorf("state %s: %w", r.Key, err)
		}
		m := &nats.Msg{Subject: "$KV." + BucketState + "." + r.Key, Data: data}
		if r.TTL > 0 {
			m.Header = nats.Header{jetstream.MsgTTLHeader: {max(r.TTL, time.Second).Round(time.Second).String()}}
		}
		ack, err := s.b.publishAsync(ctx, s.b.js, m)
		if err != nil {
			return fmt.Errorf("store state %s: %w", r.Key, err)
		}
		acks = append(acks, ack)
	}
	for i, ack := range acks {
		var err error
		select {
		case <-ack.Ok():
			continue
		case err = <-ack.Err():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		s.b.judge(ctx, err)
		return fmt.Errorf("store state %s: %w", all[i].Key, err)
	}
	return nil
}

// LastAlerts is the place of the last alert in each lane: of the others, and of the
// urgent ones.
func (b *Broker) LastAlerts(ctx context.Context) (last [2]uint64, err error) {
	for i, l := range []*lane{b.lane(false), b.lane(true)} {
		s, err := b.js.Stream(ctx, l.name)
		if err != nil {
			return last, fmt.Errorf("the last alert of %s: %w", l.name, err)
		}
		last[i] = s.CachedInfo().State.LastSeq
	}
	return last, nil
}
