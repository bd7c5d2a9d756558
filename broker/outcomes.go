package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Outcomes hands every stored outcome since a time to each, oldest first.
func (b *Broker) Outcomes(ctx context.Context, since time.Time, each func(Outcome) error) error {
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
	return b.drain(ctx, c, func(m jetstream.Msg) error {
		var o Outcome
		if err := json.Unmarshal(m.Data(), &o); err != nil {
			return fmt.Errorf("read an outcome: %w", err)
		}
		return each(o)
	})
}
