package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
	"stoop/failpoint"
)

// StepID is the id of a step: the same for the same alert, rule and position,
// whenever and however often it is made. variant tells apart a step that a
// guard put in another's place; it is "" for a rule's own.
func StepID(alertID, rule string, position int, variant string) string {
	return alert.IDOf([]byte(alertID + "\x00" + rule + "\x00" + strconv.Itoa(position) + "\x00" + variant))[:20]
}

// StepSubject is where a step is published: one message a subject.
func StepSubject(responder, id string) string { return "stoop.actions." + responder + "." + id }

// OutcomeSubject is where the outcomes of a responder are published.
func OutcomeSubject(responder string) string { return "stoop.outcomes." + responder }

const (
	// pullExpiry bounds how long a pull that got lost can hold a consumer up.
	pullExpiry = 5 * time.Second
	// redeliverAfter is when a step that nobody holds any more is given
	// again; who works on one says so every keepEvery.
	redeliverAfter = 10 * time.Second
	keepEvery      = 3 * time.Second
	// trimAbove is the size of ACTIONS from which on acknowledged steps are
	// removed before their time.
	trimAbove = 16 << 20
)

// ErrTooLarge says that a step is more than a message may hold.
var ErrTooLarge = errors.New("the step is too large for a message")

// Waiting is how many steps wait for, or are with, a responder.
func (b *Broker) Waiting(responder string) int64 { return b.queues.get(responder).waiting() }

func (b *Broker) stepMsg(s *Step) (*nats.Msg, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("step %s: %w", s.ID, err)
	}
	id := s.ID
	if s.Approved != nil {
		// It was there before, and put aside.
		id += "-approved"
	}
	return &nats.Msg{Subject: StepSubject(s.Responder, id), Data: data}, nil
}

// stepAck is a step on its way into ACTIONS.
type stepAck struct {
	step    *Step
	counted bool
	ack     jetstream.PubAckFuture // nil: err, or given up
	err     error
}

// refused counts a step out that was counted in and that the store did not take.
func (b *Broker) refused(a stepAck, duplicate bool) {
	if a.counted {
		b.queues.get(a.step.Responder).refused(a.step.ID, duplicate)
	}
}

// publishStepAsync publishes a step; or, when too many wait for its responder,
// the one after it: what can't be told must not keep a pod from being deleted.
func (b *Broker) publishStepAsync(ctx context.Context, js jetstream.JetStream, s *Step, urgent bool) stepAck {
	for s != nil {
		m, err := b.stepMsg(s)
		var counted bool
		if err == nil {
			counted, err = b.queues.get(s.Responder).admit(s, len(m.Data), urgent)
		}
		if err != nil {
			s = b.giveUp(s, err)
			continue
		}
		failpoint.Hit("router.before-publish")
		a := stepAck{step: s, counted: counted}
		if a.ack, err = b.publishAsync(ctx, js, m); err != nil {
			b.refused(a, false)
			a.ack, a.err = nil, err
		}
		return a
	}
	return stepAck{}
}

// giveUp records a step that was never stored. It is told in full, as an
// outcome: nothing that a rule asked for ends in silence.
// It returns the step that the chain goes on with, if it does.
func (b *Broker) giveUp(s *Step, err error) *Step {
	b.tell(s.Outcome(Failed, err.Error()))
	if s.OnFailure != Stop {
		return s.Next(Finding{Responder: s.Responder, Status: Failed, Reason: err.Error()})
	}
	why := s.Responder + " before it failed, and its onFailure is stop"
	for s = s.Next(); s != nil; s = s.Next() {
		b.tell(s.Outcome(Suppressed, why))
	}
	return nil
}

func (b *Broker) tell(o Outcome) {
	if err := b.PublishOutcome(o); err != nil {
		b.log.Error("a step was given up, and its outcome could not be stored", "step", o.ID, "responder", o.Responder, "rule", o.Rule, "reason", o.Reason, "error", err)
	}
}

// stepStored waits until a step is in ACTIONS. That it was there already is
// the mark of an earlier run, and fine.
func (b *Broker) stepStored(ctx context.Context, a stepAck) error {
	if a.err != nil {
		return a.err
	}
	if a.ack == nil {
		return nil
	}
	var err error
	select {
	case <-a.ack.Ok():
		failpoint.Hit("router.after-publish")
		return nil
	case err = <-a.ack.Err():
	case <-b.Failed():
		return b.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	b.refused(a, isDuplicate(err))
	switch {
	case isDuplicate(err):
		return nil
	case isFull(err):
		b.trim(ctx)
		for s := a.step; s != nil; {
			_, err := b.PublishStep(ctx, s)
			if err == nil {
				return nil
			}
			if b.Err() != nil || ctx.Err() != nil {
				return err
			}
			s = b.giveUp(s, err)
		}
		return nil
	}
	b.fail(err)
	return fmt.Errorf("store step %s: %w", a.step.ID, err)
}

// PublishStep stores the next step of a chain and reports whether it was new.
func (b *Broker) PublishStep(ctx context.Context, s *Step) (stored bool, err error) {
	m, err := b.stepMsg(s)
	if err != nil {
		return false, err
	}
	counted, err := b.queues.get(s.Responder).admit(s, len(m.Data), true)
	if err != nil {
		return false, err
	}
	ctx, cancel := b.bound(ctx)
	defer cancel()
	if _, err = b.js.PublishMsg(ctx, m); err == nil {
		return true, nil
	}
	b.refused(stepAck{step: s, counted: counted}, isDuplicate(err))
	if errors.Is(err, nats.ErrMaxPayload) {
		return false, fmt.Errorf("%w: %d bytes, with all that the steps before found", ErrTooLarge, len(m.Data))
	}
	if isDuplicate(err) {
		return false, nil
	}
	b.judge(ctx, err)
	return false, fmt.Errorf("store step %s for %s: %w", s.ID, s.Responder, err)
}

// Outcome is the step's outcome so far; node, cluster and time are the
// caller's to add.
func (s *Step) Outcome(status Status, reason string) Outcome {
	return Outcome{
		ID: s.ID, Time: time.Now().UTC(), Alert: s.AlertID, Rule: s.Rule, Responder: s.Responder,
		Status: status, Reason: reason, Target: s.Target, Rules: s.Rules, Agreed: s.Agreed, Took: s.Took,
	}
}

// Delivery is a step that was given to a responder's consumer.
type Delivery struct {
	Step    *Step
	Attempt int // from 1; a crash counts too
	msg     jetstream.Msg
	b       *Broker
	held    *held
	kept    bool
}

// Keep says that the step will be ended after the handle that it was given to has
// returned. It goes on being this process's, and is given back when ConsumeSteps
// ends first.
func (d *Delivery) Keep() { d.kept = true }

// Ack says that the step is dealt with.
func (d *Delivery) Ack() error {
	d.held.remove(d.msg)
	d.b.queues.get(d.Step.Responder).end(d.Step.ID)
	if err := d.msg.Ack(); err != nil {
		return fmt.Errorf("acknowledge step %s: %w", d.Step.ID, err)
	}
	return nil
}

// Retry gives the step back, to be given again after delay.
func (d *Delivery) Retry(delay time.Duration) error {
	d.held.remove(d.msg)
	return d.msg.NakWithDelay(delay)
}

func stepsConsumer(responder string) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable: responder, FilterSubject: StepSubject(responder, "*"),
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: redeliverAfter,
		// What may wait is bounded where it is published. A bound here would
		// have the steps of a dead destination hold up those of the others.
		MaxAckPending: -1,
	}
}

// OpenSteps counts what an earlier process left for a responder, before anything is
// routed to it. One that never had a step has no consumer yet, and one that had its
// first when that process was killed may have none either.
func (b *Broker) OpenSteps(ctx context.Context, responder string) error {
	c, err := b.js.Consumer(ctx, StreamActions, responder)
	switch {
	case err == nil:
		info := c.CachedInfo()
		b.queues.get(responder).set(int64(info.NumPending) + int64(info.NumAckPending))
		return nil
	case !errors.Is(err, jetstream.ErrConsumerNotFound):
		return fmt.Errorf("consumer %s of %s: %w", responder, StreamActions, err)
	}
	s, err := b.js.Stream(ctx, StreamActions)
	if err != nil {
		return fmt.Errorf("steps left for %s: %w", responder, err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(StepSubject(responder, "*")))
	if err != nil {
		return fmt.Errorf("steps left for %s: %w", responder, err)
	}
	b.queues.get(responder).set(int64(len(info.State.Subjects)))
	return nil
}

// Expect says that there will be steps for these responders, so that the first one
// finds its consumer connected.
func (b *Broker) Expect(responders ...string) {
	for _, r := range responders {
		b.queues.get(r).want()
	}
}

// ConsumeSteps hands the steps for a responder to handle, at most concurrency
// of them at a time, until ctx is done; it returns when the last handle has.
// handle ends each with Ack or Retry, or keeps it to end it later; one that it does
// none of this with is given again. It connects when there is a first step, or was said
// to be one to expect.
func (b *Broker) ConsumeSteps(ctx context.Context, responder string, concurrency int, handle func(context.Context, *Delivery)) error {
	select {
	case <-b.queues.get(responder).wanted:
	case <-ctx.Done():
		return nil
	}
	err := b.consumeSteps(ctx, responder, concurrency, handle)
	if ctx.Err() != nil {
		return nil // stopped, be it while the consumer was being made
	}
	return err
}

func (b *Broker) consumeSteps(ctx context.Context, responder string, concurrency int, handle func(context.Context, *Delivery)) error {
	nc, err := b.Connect("responder " + responder)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	c, err := b.consumer(ctx, js, StreamActions, stepsConsumer(responder))
	if err != nil {
		return err
	}
	// One message at a time: what waits in the client's buffer is nobody's,
	// and would be given again while it waits.
	// A pull that got lost is made anew by itself: an error for it would end
	// the program.
	it, err := c.Messages(jetstream.PullMaxMessages(1), jetstream.PullExpiry(pullExpiry),
		jetstream.WithMessagesErrOnMissingHeartbeat(false))
	if err != nil {
		return fmt.Errorf("consume the steps of %s: %w", responder, err)
	}
	defer it.Stop()

	// When the consumer ends by itself, what is being handled is told so too: it may
	// hang, or have very much waiting behind it.
	handling, end := context.WithCancel(ctx)
	var running sync.WaitGroup
	held := &held{msgs: map[jetstream.Msg]struct{}{}}
	keepCtx, stopKeeping := context.WithCancel(context.WithoutCancel(ctx))
	var keeper sync.WaitGroup
	keeper.Go(func() { held.keep(keepCtx) })
	defer func() {
		end()
		running.Wait()
		stopKeeping()
		keeper.Wait()
		held.giveBack()
		_ = nc.FlushTimeout(time.Second)
	}()

	slots := make(chan struct{}, concurrency)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("consume the steps of %s: %w", responder, err)
		}
		step := &Step{}
		if err := json.Unmarshal(m.Data(), step); err != nil {
			b.log.Error("a stored step can't be read, and is left out", "responder", responder, "error", err)
			_ = m.Term()
			<-slots
			continue
		}
		b.queues.get(responder).give(step, len(m.Data()))
		d := &Delivery{Step: step, msg: m, b: b, held: held}
		if meta, err := m.Metadata(); err == nil {
			d.Attempt = int(meta.NumDelivered)
		}
		held.add(m)
		running.Go(func() {
			defer func() { <-slots }()
			handle(handling, d)
			if !d.kept {
				held.remove(m)
			}
		})
	}
}

// consumer makes a durable consumer, or takes the one that is there over. What
// an earlier process had been given and not acknowledged is given again at
// once: the process is gone, there is nothing to wait for.
func (b *Broker) consumer(ctx context.Context, js jetstream.JetStream, stream string, cfg jetstream.ConsumerConfig) (jetstream.Consumer, error) {
	if c, err := js.Consumer(ctx, stream, cfg.Durable); err == nil {
		was := c.CachedInfo()
		cfg.DeliverPolicy = was.Config.DeliverPolicy // can't be changed
		if was.NumAckPending == 0 && was.Config.AckWait == cfg.AckWait {
			return c, nil
		}
		hurry := cfg
		hurry.AckWait = time.Millisecond
		if _, err := js.CreateOrUpdateConsumer(ctx, stream, hurry); err != nil {
			return nil, fmt.Errorf("consumer %s of %s: %w", cfg.Durable, stream, err)
		}
		// The server looks at its pending messages 100 ms after AckWait
		// changed (nats-server, consumer.updateConfig).
		select {
		case <-time.After(150 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	c, err := js.CreateOrUpdateConsumer(ctx, stream, cfg)
	if err != nil {
		return nil, fmt.Errorf("consumer %s of %s: %w", cfg.Durable, stream, err)
	}
	return c, nil
}

// UnfinishedSteps are the steps that nobody may have ended: what a store that is
// being left still has to do. Some of them may have been done.
func (b *Broker) UnfinishedSteps(ctx context.Context) ([]*Step, error) {
	s, err := b.js.Stream(ctx, StreamActions)
	if err != nil {
		return nil, fmt.Errorf("read the unfinished steps: %w", err)
	}
	var out []*Step
	read := func(responder, subject string, from uint64) error {
		err := b.since(ctx, StreamActions, subject, from, func(m jetstream.Msg) error {
			step := &Step{}
			if err := json.Unmarshal(m.Data(), step); err != nil {
				return nil
			}
			out = append(out, step)
			return nil
		})
		if err != nil {
			return fmt.Errorf("read the unfinished steps of %s: %w", responder, err)
		}
		return nil
	}
	waiting := b.queues.waiting()
	list := s.ListConsumers(ctx)
	for c := range list.Info() {
		delete(waiting, c.Name)
		if c.NumPending == 0 && c.NumAckPending == 0 {
			continue
		}
		if err := read(c.Name, c.Config.FilterSubject, c.AckFloor.Stream+1); err != nil {
			return out, err
		}
	}
	if err := list.Err(); err != nil {
		return out, err
	}
	for responder := range waiting { // the store failed before it had a consumer
		if err := read(responder, StepSubject(responder, "*"), 1); err != nil {
			return out, err
		}
	}
	return out, nil
}

// held are the messages that somebody works on.
type held struct {
	mu   sync.Mutex
	msgs map[jetstream.Msg]struct{}
}

func (h *held) add(m jetstream.Msg)    { h.mu.Lock(); h.msgs[m] = struct{}{}; h.mu.Unlock() }
func (h *held) remove(m jetstream.Msg) { h.mu.Lock(); delete(h.msgs, m); h.mu.Unlock() }

// giveBack gives back what was kept and not ended: nobody works on it any more.
func (h *held) giveBack() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range h.msgs {
		_ = m.Nak()
	}
}

// keep tells the server that the messages are being worked on.
func (h *held) keep(ctx context.Context) {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		h.mu.Lock()
		for m := range h.msgs {
			_ = m.InProgress()
		}
		h.mu.Unlock()
	}
}

// TrimLoop removes acknowledged steps from ACTIONS when it has grown, until ctx
// is done. They stay so long only to be recognised when they come again; STATE
// knows the harmful ones besides.
func (b *Broker) TrimLoop(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s, err := b.js.Stream(ctx, StreamActions)
		if err != nil {
			continue
		}
		if s.CachedInfo().State.Bytes > trimAbove {
			b.trim(ctx)
		}
		list := s.ListConsumers(ctx)
		for c := range list.Info() {
			b.queues.get(c.Name).heal(int64(c.NumPending)+int64(c.NumAckPending), time.Now())
		}
	}
}

func (b *Broker) trim(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	s, err := b.js.Stream(ctx, StreamActions)
	if err != nil {
		return
	}
	list := s.ListConsumers(ctx)
	for c := range list.Info() {
		if c.AckFloor.Stream == 0 {
			continue
		}
		err := s.Purge(ctx, jetstream.WithPurgeSubject(c.Config.FilterSubject), jetstream.WithPurgeSequence(c.AckFloor.Stream+1))
		if err != nil {
			b.log.Warn("remove acknowledged steps", "consumer", c.Name, "error", err)
		}
	}
}
