package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// State is the bucket STATE: what must outlive a restart and never be pushed
// out by a flood. Keys are of the characters that NATS takes in a subject's
// token, and dots.
type State struct {
	b  *Broker
	kv jetstream.KeyValue
}

// Put stores v as JSON under key; after ttl it is gone, with 0 it stays.
func (s *State) Put(ctx context.Context, key string, v any, ttl time.Duration) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("state %s: %w", key, err)
	}
	return s.put(ctx, key, data, ttl)
}

func (s *State) put(ctx context.Context, key string, data []byte, ttl time.Duration) error {
	ctx, cancel := s.b.bound(ctx)
	defer cancel()
	var opts []jetstream.PublishOpt
	if ttl > 0 {
		opts = append(opts, jetstream.WithMsgTTL(max(ttl, time.Second)))
	}
	// The key-value client has no Put with a ttl; this is what its Put does.
	if _, err := s.b.js.Publish(ctx, "$KV."+BucketState+"."+key, data, opts...); err != nil {
		s.b.judge(ctx, err)
		return fmt.Errorf("store state %s: %w", key, err)
	}
	return nil
}

// Get reads key into v and reports whether it is there.
func (s *State) Get(ctx context.Context, key string, v any) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	e, err := s.kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read state %s: %w", key, err)
	}
	if err := json.Unmarshal(e.Value(), v); err != nil {
		return false, fmt.Errorf("read state %s: %w", key, err)
	}
	return true, nil
}

// Delete forgets key.
func (s *State) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := s.kv.Purge(ctx, key); err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
		return fmt.Errorf("forget state %s: %w", key, err)
	}
	return nil
}

// Each calls f for every key that matches pattern ("act.*"), with its value.
func (s *State) Each(ctx context.Context, pattern string, f func(key string, value []byte, created time.Time) error) error {
	w, err := s.kv.Watch(ctx, pattern, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("read state %s: %w", pattern, err)
	}
	defer func() { _ = w.Stop() }()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case e := <-w.Updates():
			if e == nil { // that was the last one
				return nil
			}
			if err := f(e.Key(), e.Value(), e.Created()); err != nil {
				return err
			}
		}
	}
}

// Probe writes to the store and reports how that went.
func (s *State) Probe(ctx context.Context) error {
	return s.put(ctx, "probe", []byte("{}"), 0)
}

// Dump is every key with its value, but for the journal's head and the router's
// positions: those are the store's own.
func (s *State) Dump(ctx context.Context) (map[string][]byte, error) {
	all := map[string][]byte{}
	err := s.Each(ctx, ">", func(key string, value []byte, _ time.Time) error {
		if key != keyJournal && !strings.HasPrefix(key, keyRouter("")) {
			all[key] = value
		}
		return nil
	})
	return all, err
}

// Restore writes what Dump read from another store. A ttl is lost by it, so
// records that must end carry their own times.
func (s *State) Restore(ctx context.Context, all map[string][]byte) error {
	for key, value := range all {
		if err := s.put(ctx, key, value, 0); err != nil {
			return err
		}
	}
	return nil
}
