package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"stoop/failpoint"
)

// RouteAlerts hands every stored alert of a lane to match, in the order in
// which they were stored, and publishes the steps that it returns. An alert is
// done with when its steps are stored, and what k keeps; k is nil if there is
// nothing to keep. It returns when ctx is done, or when the store fails.
func (b *Broker) RouteAlerts(ctx context.Context, urgent bool, match func(*Stored) []*Step, k Keeper) error {
	err := b.routeAlerts(ctx, urgent, match, k)
	if ctx.Err() != nil {
		return nil // stopped, be it while it was beginning
	}
	return err
}

func (b *Broker) routeAlerts(ctx context.Context, urgent bool, match func(*Stored) []*Step, k Keeper) error {
	l := b.lane(urgent)
	// Steps are published apart from the alerts, so that neither waits for the
	// other's acknowledgements.
	nc, err := b.Connect("steps of " + l.name)
	if err != nil {
		return err
	}
	defer nc.Close()
	publish, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(4096), jetstream.WithPublishAsyncTimeout(publishTimeout))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	window := make(chan routing, routeWindow)
	done := make(chan error, 1)
	settler := &settler{b: b, lane: l, urgent: urgent, js: publish, keeper: k}
	go func() {
		err := settler.run(ctx, window)
		if err != nil {
			cancel(err)
		}
		done <- err
	}()
	err = b.takeAlerts(ctx, l, window, func(r *routing, s *Stored) {
		s.Urgent = urgent
		for _, step := range match(s) {
			if len(step.Agreed) > 0 {
				r.agreed = append(r.agreed, step)
				continue
			}
			r.acks = append(r.acks, b.publishStepAsync(ctx, publish, step, urgent))
		}
	})
	close(window)
	return errors.Join(err, <-done)
}

// routing is an alert that was held against the rules, and what followed.
type routing struct {
	seq    uint64
	acks   []stepAck
	agreed []*Step // not published yet: that several alerts agreed is stored first
	size   int64   // as this process counts it among those that wait; 0: it does not
	caught bool    // nothing that an earlier process left is behind it
}

// takeAlerts takes a lane's alerts one after the other, and hands what followed from
// each on.
func (b *Broker) takeAlerts(ctx context.Context, l *lane, window chan<- routing, follow func(*routing, *Stored)) error {
	next := l.position.Load() + 1
	hand := func(r routing) error {
		select {
		case window <- r:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	route := func(s *Stored, size int64) error {
		r := routing{seq: s.Seq, size: size}
		if s.ID != "" {
			follow(&r, s)
		}
		next = s.Seq + 1
		return hand(r)
	}
	read := func() error { // what the stream has from next on
		err := b.since(ctx, l.name, "", next, func(m jetstream.Msg) error { return route(newStored(m), 0) })
		if err != nil {
			return fmt.Errorf("read the alerts of %s from %d on: %w", l.name, next, err)
		}
		return nil
	}
	if l.left.Load() > 0 {
		if err := read(); err != nil {
			return err
		}
	}
	if err := hand(routing{seq: next - 1, caught: true}); err != nil {
		return err
	}
	var batch []fed
	for {
		var err error
		if batch, err = l.take(ctx, batch[:0]); err != nil {
			return err
		}
		for _, f := range batch {
			switch {
			case f.seq == next && f.stored != nil:
				err = route(f.stored, f.size)
			case f.seq < next: // it was read from the stream
				err = hand(routing{seq: next - 1, size: f.size})
			default:
				// One before it was stored without an acknowledgement, or there was
				// no room to hold it.
				if err = read(); err == nil {
					next = max(next, f.seq+1) // it may be gone from the stream
					err = hand(routing{seq: next - 1, size: f.size})
				}
			}
			if err != nil {
				return err
			}
		}
		clear(batch)
	}
}

// settler waits until the steps of routed alerts are stored, in order, and keeps the
// lane's position.
type settler struct {
	b      *Broker
	lane   *lane
	urgent bool
	js     jetstream.JetStream // for steps
	keeper Keeper              // or nil
	noted  uint64              // the position that is stored
	again  time.Time           // before which the position is not stored again
	said   time.Time           // when it was said that something could not be stored
}

// run settles until the window is closed and empty, or an error.
func (s *settler) run(ctx context.Context, window <-chan routing) error {
	s.noted = s.lane.position.Load()
	defer s.note(ctx)
	tick := time.NewTicker(notePosition)
	defer tick.Stop()
	batch := make([]routing, 0, keepTogether)
	for {
		select {
		case <-tick.C:
			began := time.Now()
			if began.Before(s.again) {
				continue
			}
			s.note(ctx)
			s.again = time.Now().Add(min(noteRest*time.Since(began), noteMost))
		case r, ok := <-window:
			if !ok {
				return nil
			}
			batch = append(batch[:0], r)
			// What is at hand is stored together.
			for more := r.agreed != nil; more && len(batch) < cap(batch); {
				select {
				case r, more = <-window:
					if more {
						batch = append(batch, r)
					}
				default:
					more = false
				}
			}
			if err := s.settle(ctx, batch); err != nil {
				return err
			}
		}
	}
}

func (s *settler) settle(ctx context.Context, batch []routing) error {
	if batch[0].agreed != nil {
		failpoint.Hit("router.before-keep")
		if err := s.keep(ctx); err != nil {
			// A STATE that takes nothing more must not disarm stoop: only a crash
			// right now would have it forget what agreed.
			if broken := s.b.Err(); broken != nil {
				return broken
			}
			s.unstored("what was counted of alerts could not be stored: a restart may forget it", err)
		}
		failpoint.Hit("router.after-keep")
		for i := range batch {
			for _, step := range batch[i].agreed {
				batch[i].acks = append(batch[i].acks, s.b.publishStepAsync(ctx, s.js, step, s.urgent))
			}
		}
	}
	for _, r := range batch {
		for _, ack := range r.acks {
			if err := s.b.stepStored(ctx, ack); err != nil {
				return err
			}
		}
		for _, step := range r.agreed {
			s.keeper.Kept(step)
		}
		s.lane.position.Store(r.seq)
		if r.size > 0 {
			s.lane.routed(r.size)
		}
		if r.caught {
			s.lane.left.Store(0)
			signal(s.lane.moved)
		}
	}
	return nil
}

// keep has what is remembered of alerts stored, also when stoop is being stopped.
func (s *settler) keep(ctx context.Context) error {
	if s.keeper == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishTimeout)
	defer cancel()
	return s.keeper.Keep(ctx)
}

// note stores the lane's position, and before it all that must not be forgotten of
// the alerts up to it.
func (s *settler) note(ctx context.Context) {
	at := s.lane.position.Load()
	if at == s.noted {
		return
	}
	err := s.keep(ctx)
	if err == nil {
		err = s.b.state.Put(context.WithoutCancel(ctx), keyRouter(s.lane.name), at, 0)
	}
	if err != nil {
		s.unstored("how far alerts are routed could not be stored: a restart will route some again", err)
		return // with what comes next
	}
	s.noted = at
}

// unstored says that something could not be stored, every now and then.
func (s *settler) unstored(what string, err error) {
	if time.Since(s.said) < unstoredEvery {
		return
	}
	s.said = time.Now()
	s.b.log.Error(what, "stream", s.lane.name, "error", err)
}
