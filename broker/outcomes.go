package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Outcomes hands every stored outcome since a time to each, oldest first.
func (b *Broker) Outcomes(ctx context.Context, since time.Time, each func(Outcome) error) error {
	return b.outcomes(ctx, since, func(m jetstream.Msg) error {
		var o Outcome
		if err := json.Unmarshal(m.Data(), &o); err != nil {
			return fmt.Errorf("read an outcome: %w", err)
		}
		return each(o)
	})
}

func (b *Broker) outcomes(ctx context.Context, since time.Time, each func(jetstream.Msg) error) error {
	s, err := b.js.Stream(ctx, StreamOutcomes)
	if err != nil {
		return fmt.Errorf("read the outcomes: %w", err)
	}
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy, InactiveThreshold: readerGone}
	if !since.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	c, err := s.OrderedConsumer(ctx, cfg)
	if err != nil {
		return fmt.Errorf("read the outcomes: %w", err)
	}
	return b.drain(ctx, c, each)
}

// CopyStore copies the files of some streams, and of STATE, from one data folder to
// another, to be opened with ReadOnly.
func CopyStore(to, from string, streams ...string) error {
	if err := checkFormat(from); err != nil {
		return err
	}
	const all = "store/jetstream/$G/streams"
	for _, s := range append(streams, "KV_"+BucketState) {
		src := filepath.Join(from, all, s)
		if _, err := os.Stat(src); errors.Is(err, os.ErrNotExist) {
			continue // what needs it will say so
		}
		if err := os.CopyFS(filepath.Join(to, all, s), os.DirFS(src)); err != nil {
			return fmt.Errorf("copy the data folder: %w", err)
		}
	}
	return nil
}
