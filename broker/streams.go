package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
)

// The streams and the bucket.
const (
	StreamAlerts   = "ALERTS"
	StreamUrgent   = "ALERTS_URGENT" // Critical and above: no flood of the rest pushes one of them out
	StreamActions  = "ACTIONS"
	StreamOutcomes = "OUTCOMES"
	BucketState    = "STATE"
)

const (
	// alertsPerSubject bounds what one rule of Falco's can take of the
	// stream, so that a flood of it leaves the others in place. It is more
	// than may wait to be routed, so it never discards an unread alert.
	alertsPerSubject = 2 * maxLag
	// outcomeRoom bounds what one responder can take of OUTCOMES: there is one
	// outcome of it for each so many bytes of the stream's size, 65,536 by
	// default. Most take a third of that or less, so a webhook that fails all
	// the time leaves the history of the others in place.
	outcomeRoom = 2 << 10
	actionsSize = 256 << 20
	// actionsAge bounds how long a step may be tried.
	actionsAge = 2 * time.Hour
	stateSize  = 64 << 20
)

// subjects are those below prefix of the priorities from Critical on, and of the others.
func subjects(prefix string) (urgent, other []string) {
	for _, p := range alert.Priorities() {
		s := prefix + p.String() + ".>"
		if p.Urgent() {
			urgent = append(urgent, s)
		} else {
			other = append(other, s)
		}
	}
	return urgent, other
}

func (b *Broker) createStreams(ctx context.Context) error {
	if b.cfg.ReadOnly {
		kv, err := b.js.KeyValue(ctx, BucketState)
		if err != nil {
			return fmt.Errorf("bucket %s: %w", BucketState, err)
		}
		b.state = &State{b: b, kv: kv}
		return nil
	}
	storage := jetstream.FileStorage
	if b.cfg.memory() {
		storage = jetstream.MemoryStorage
	}
	urgent, other := subjects("falco.")
	other = append(other, alert.UnparsedSubject)
	streams := []jetstream.StreamConfig{
		{
			Name: StreamUrgent, Description: "alerts of priority Critical and above, as Falco wrote them", Subjects: urgent,
			MaxAge: b.cfg.AlertsAge, MaxBytes: b.cfg.AlertsSize / 4, MaxMsgsPerSubject: alertsPerSubject,
		},
		{
			Name: StreamAlerts, Description: "alerts of the other priorities, as Falco wrote them", Subjects: other,
			MaxAge: b.cfg.AlertsAge, MaxBytes: b.cfg.AlertsSize - b.cfg.AlertsSize/4, MaxMsgsPerSubject: alertsPerSubject,
		},
		{
			// A step stays after it was acknowledged, so that the same step
			// is refused when a crash makes it be published again.
			Name: StreamActions, Description: "steps to be done", Subjects: []string{"stoop.actions.>"},
			MaxAge: actionsAge, MaxBytes: actionsSize,
			MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true,
		},
		{
			Name: StreamOutcomes, Description: "what became of each step", Subjects: []string{"stoop.outcomes.>"},
			MaxAge: b.cfg.OutcomesAge, MaxBytes: b.cfg.OutcomesSize, MaxMsgsPerSubject: b.cfg.OutcomesSize / outcomeRoom,
		},
	}
	if !b.cfg.memory() {
		streams = append(streams, b.matchedStreams()...)
	}
	for _, c := range streams {
		c.Storage = storage
		// Nothing here relies on Nats-Msg-Id: its memory would cost more than
		// all the rest.
		c.Duplicates = 100 * time.Millisecond
		if _, err := b.js.CreateOrUpdateStream(ctx, c); err != nil {
			return fmt.Errorf("stream %s: %w", c.Name, err)
		}
	}
	kv, err := b.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: BucketState, Description: "what must outlive a restart", Storage: storage,
		MaxBytes: stateSize, LimitMarkerTTL: time.Second,
	})
	if err != nil {
		return fmt.Errorf("bucket %s: %w", BucketState, err)
	}
	b.state = &State{b: b, kv: kv}
	for i := range b.lanes {
		if b.lanes[i], err = b.openLane(ctx, streams[i].Name, streams[i].MaxBytes); err != nil {
			return err
		}
	}
	return nil
}

// errPerSubject is how the server says that a subject holds its one message
// already.
const errPerSubject = "maximum messages per subject exceeded"

// isDuplicate reports whether a publish was refused because the very message is
// there already.
func isDuplicate(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.Description == errPerSubject
}

// IsStoreFault reports whether an error of a publish was refused for a fault of the store:
// it won't heal before the store is opened again.
func IsStoreFault(err error) bool {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	const (
		insufficientResources = 10023
		storageExceeded       = 10047
		storeFailed           = 10077
	)
	switch api.ErrorCode {
	case insufficientResources, storageExceeded, storeFailed:
		return api.Description != errPerSubject && api.Description != errFull
	}
	return false
}

// errFull is how the server says that a stream that discards new messages has
// no room.
const errFull = "maximum bytes exceeded"

func isFull(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.Description == errFull
}
