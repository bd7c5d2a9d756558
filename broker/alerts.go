package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
	"stoop/failpoint"
)

// Arrival is one line that came in on the pipe.
type Arrival struct {
	Alert    *alert.Alert // nil: the line is no alert
	Unparsed []byte       // the line, when Alert is nil; it goes to falco.unparsed
	Received time.Time    // when its last byte was read
	Origin   Origin
}

// The headers of a stored alert. Only stoop publishes on these subjects, so a
// reader may believe them.
const (
	HeaderID       = "Stoop-Id"       // the alert's id
	HeaderReceived = "Stoop-Received" // when it arrived, in nanoseconds since 1970
	HeaderOrigin   = "Stoop-Origin"
)

const (
	// publishTimeout is when an unanswered publish counts as refused.
	publishTimeout = 5 * time.Second
	// maxLag bounds the alerts of a lane that are stored and not yet routed.
	// When it is reached, Store waits, and the pipe sheds what is least
	// urgent: so the streams never discard an alert that nobody has read.
	maxLag = 20_000
	// perAlert is about what a stored alert takes besides its bytes.
	perAlert = 300
)

// lane is one of the two streams of alerts, and how far the router is behind.
type lane struct {
	name   string
	most   int64 // bytes that may wait: half of what the stream holds
	alerts atomic.Int64
	bytes  atomic.Int64
	moved  chan struct{} // a token when the router has caught up with some
}

func (l *lane) full() bool {
	return l.alerts.Load() >= maxLag || l.bytes.Load() >= l.most
}

func (l *lane) stored(bytes int) {
	l.alerts.Add(1)
	l.bytes.Add(int64(bytes) + perAlert)
}

func (l *lane) routed(bytes int) {
	l.alerts.Add(-1)
	l.bytes.Add(-int64(bytes) - perAlert)
	select {
	case l.moved <- struct{}{}:
	default:
	}
}

// room waits until the router has caught up enough for another alert.
func (l *lane) room(ctx context.Context) error {
	for l.full() {
		select {
		case <-l.moved:
		case <-ctx.Done():
			return fmt.Errorf("%s: %d alerts wait to be routed: %w", l.name, l.alerts.Load(), context.Cause(ctx))
		}
	}
	// The token may have been another's: pass it on.
	select {
	case l.moved <- struct{}{}:
	default:
	}
	return nil
}

func (b *Broker) lane(urgent bool) *lane {
	if urgent {
		return b.lanes[0]
	}
	return b.lanes[1]
}

// underway holds alerts that this process has parsed and stored, until the
// router takes them: it need not parse them again. What it does not find here
// (too much was under way, or another process stored it) it parses.
type underway struct {
	mu    sync.Mutex
	byID  map[string]*alert.Alert
	bytes int
}

const (
	underwayMost  = 4096
	underwayBytes = 4 << 20
)

func (u *underway) put(a *alert.Alert) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byID == nil {
		u.byID = map[string]*alert.Alert{}
	}
	if len(u.byID) < underwayMost && u.bytes < underwayBytes && u.byID[a.ID] == nil {
		u.byID[a.ID] = a
		u.bytes += len(a.Raw)
	}
}

func (u *underway) take(id string) *alert.Alert {
	u.mu.Lock()
	defer u.mu.Unlock()
	a := u.byID[id]
	if a != nil {
		delete(u.byID, id)
		u.bytes -= len(a.Raw)
	}
	return a
}

// Unrouted is how many alerts are stored and wait for the router.
func (b *Broker) Unrouted() int64 { return b.lanes[0].alerts.Load() + b.lanes[1].alerts.Load() }

// Store stores the arrivals in order and returns how many of them, from the
// first, are stored: fewer than all only with an error that says why the next
// one was refused. An arrival that an earlier process stored before it was
// killed, and could not take off the pipe, is not stored again.
func (b *Broker) Store(ctx context.Context, batch []Arrival) (int, error) {
	type pending struct {
		ack   jetstream.PubAckFuture // nil: stored before
		lane  *lane
		bytes int
	}
	acks := make([]pending, 0, len(batch))
	var stop error
	for i := range batch {
		m := b.message(&batch[i])
		l := b.lane(batch[i].Alert != nil && batch[i].Alert.Priority.Urgent())
		if id := m.Header.Get(HeaderID); id != "" {
			if _, ok := b.seen[id]; ok {
				acks = append(acks, pending{})
				continue
			}
		}
		if stop = l.room(ctx); stop != nil {
			break
		}
		if a := batch[i].Alert; a != nil {
			b.underway.put(a)
		}
		ack, err := b.publishAsync(ctx, b.js, m)
		if err != nil {
			b.underway.take(m.Header.Get(HeaderID))
			stop = err
			break
		}
		l.stored(len(m.Data))
		acks = append(acks, pending{ack, l, len(m.Data)})
		for _, subject := range b.cfg.Mirror {
			// Nobody waits for a mirror: it is for those who listen now.
			if err := b.conn.PublishMsg(&nats.Msg{Subject: subject, Header: m.Header, Data: m.Data}); err != nil {
				b.log.Warn("mirror an alert", "subject", subject, "error", err)
			}
		}
	}
	// One clock for all of them: a timer for each would cost more than to wait.
	late := time.NewTimer(publishTimeout)
	defer late.Stop()
	stored := 0
	for i, p := range acks {
		if p.ack == nil {
			if stored == i {
				stored++
			}
			continue
		}
		var err error
		select { // what is stored is stored, also when ctx has ended
		case <-p.ack.Ok():
			if stored == i {
				stored++
			}
			continue
		default:
		}
		select {
		case <-p.ack.Ok():
			if stored == i {
				stored++
			}
			continue
		case err = <-p.ack.Err():
		case <-late.C:
			late.Reset(0) // for those behind it too
			err = jetstream.ErrAsyncPublishTimeout
		case <-b.Failed():
			err = b.Err()
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		p.lane.routed(p.bytes)
		if a := batch[i].Alert; a != nil {
			b.underway.take(a.ID)
		}
		if stored == i {
			stop = fmt.Errorf("store an alert in %s: %w", p.lane.name, err)
		}
		if IsStoreFault(err) || errors.Is(err, jetstream.ErrAsyncPublishTimeout) {
			b.fail(err)
		}
	}
	return stored, stop
}

func (b *Broker) message(a *Arrival) *nats.Msg {
	m := &nats.Msg{Header: make(nats.Header, 3)}
	m.Header[HeaderReceived] = []string{strconv.FormatInt(a.Received.UnixNano(), 10)}
	m.Header[HeaderOrigin] = []string{string(a.Origin)}
	if a.Alert == nil {
		m.Subject, m.Data = alert.UnparsedSubject, a.Unparsed
		return m
	}
	m.Subject, m.Data = a.Alert.Subject(), a.Alert.Raw
	m.Header[HeaderID] = []string{a.Alert.ID}
	return m
}

// seenMax is how many stored alerts are remembered from before a restart: more
// than a pipe of 1 MiB holds.
const seenMax = 8192

// lastStored is the ids of the alerts that were stored last. A process that was
// killed may have stored them and left them on the pipe.
func (b *Broker) lastStored(ctx context.Context) (map[string]struct{}, error) {
	seen := map[string]struct{}{}
	for _, l := range b.lanes {
		s, err := b.js.Stream(ctx, l.name)
		if err != nil {
			return nil, err
		}
		st := s.CachedInfo().State
		if st.Msgs == 0 {
			continue
		}
		start := st.FirstSeq
		if st.LastSeq >= seenMax && st.LastSeq-seenMax+1 > start {
			start = st.LastSeq - seenMax + 1
		}
		c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
			DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: start, HeadersOnly: true, InactiveThreshold: readerGone,
		})
		if err != nil {
			return nil, err
		}
		err = b.drain(ctx, c, func(m jetstream.Msg) error {
			if id := m.Headers().Get(HeaderID); id != "" {
				seen[id] = struct{}{}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("read the last alerts of %s: %w", l.name, err)
		}
	}
	return seen, nil
}

const (
	// readerGone is when the server forgets a reader that has gone without a word.
	readerGone = 10 * time.Second
	// readerStalls is when a store that gives nothing more counts as damaged.
	readerStalls = 5 * time.Second
)

// errStalled says that a store holds more than it gives.
var errStalled = errors.New("the store does not give what it holds: its files are damaged")

// drain hands over what a consumer has to give now, and returns at its end.
func (b *Broker) drain(ctx context.Context, c jetstream.Consumer, each func(jetstream.Msg) error) error {
	info, err := c.Info(ctx)
	if err != nil {
		return err
	}
	// It was made for this, and is not needed any more.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishTimeout)
		defer cancel()
		_ = b.js.DeleteConsumer(ctx, info.Stream, c.CachedInfo().Name)
	}()
	if info.NumPending == 0 {
		return nil
	}
	it, err := c.Messages(jetstream.StopAfter(int(info.NumPending)))
	if err != nil {
		return err
	}
	defer it.Stop()
	for range info.NumPending {
		next, cancel := context.WithTimeoutCause(ctx, readerStalls, errStalled)
		m, err := it.Next(jetstream.NextContext(next))
		if err != nil && ctx.Err() == nil && next.Err() != nil {
			err = context.Cause(next)
		}
		cancel()
		if errors.Is(err, jetstream.ErrMsgIteratorClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := each(m); err != nil {
			return err
		}
		meta, err := m.Metadata()
		if err == nil && meta.NumPending == 0 {
			return nil
		}
	}
	return nil
}

// UnroutedAlerts are the stored alerts that the router has not dealt with: what
// a store that is being left still has to do.
func (b *Broker) UnroutedAlerts(ctx context.Context) ([]Arrival, error) {
	var out []Arrival
	for _, l := range b.lanes {
		c, err := b.js.Consumer(ctx, l.name, routerConsumer.Durable)
		if err != nil {
			return out, fmt.Errorf("consumer %s of %s: %w", routerConsumer.Durable, l.name, err)
		}
		err = b.since(ctx, l.name, "", c.CachedInfo().AckFloor.Stream+1, func(m jetstream.Msg) error {
			s := newStored(m)
			if s == nil {
				out = append(out, Arrival{Unparsed: m.Data(), Received: time.Now()})
				return nil
			}
			a, err := alert.Parse(s.Data)
			if err != nil {
				return nil
			}
			a.ID = s.ID
			out = append(out, Arrival{Alert: a, Received: s.Received, Origin: s.Origin})
			return nil
		})
		if err != nil {
			return out, fmt.Errorf("read what is to be routed of %s: %w", l.name, err)
		}
	}
	return out, nil
}

// since reads a stream from a sequence on.
func (b *Broker) since(ctx context.Context, stream, filter string, seq uint64, each func(jetstream.Msg) error) error {
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(seq, 1), InactiveThreshold: readerGone}
	if filter != "" {
		cfg.FilterSubjects = []string{filter}
	}
	c, err := b.js.OrderedConsumer(ctx, stream, cfg)
	if err != nil {
		return err
	}
	return b.drain(ctx, c, each)
}

// Stored is an alert as it comes out of the stream.
type Stored struct {
	ID       string
	Data     []byte // the JSON object
	Received time.Time
	StoredAt time.Time
	Origin   Origin
	Alert    *alert.Alert // what Data says, if this process knows it already

	Urgent bool   // which lane it is in
	Seq    uint64 // its place in the lane, from 1
	Again  bool   // it was given before, to this process or an earlier one
}

func newStored(m jetstream.Msg) *Stored {
	h := m.Headers()
	s := &Stored{ID: h.Get(HeaderID), Data: m.Data(), Origin: Origin(h.Get(HeaderOrigin))}
	if s.ID == "" {
		return nil // falco.unparsed
	}
	if meta, err := m.Metadata(); err == nil {
		s.StoredAt = meta.Timestamp
		s.Seq, s.Again = meta.Sequence.Stream, meta.NumDelivered > 1
	}
	s.Received = s.StoredAt
	if ns, err := strconv.ParseInt(h.Get(HeaderReceived), 10, 64); err == nil {
		s.Received = time.Unix(0, ns).UTC()
	}
	return s
}

// routerConsumer is where the router stands in a lane. It acknowledges an
// alert and with it all before: the router takes them in order.
var routerConsumer = jetstream.ConsumerConfig{
	Durable: "router", AckPolicy: jetstream.AckAllPolicy, MaxAckPending: 4 * maxLag,
	AckWait: 30 * time.Second,
}

// openLane makes the lane's consumer where it is missing, and counts what an
// earlier process left to be routed.
func (b *Broker) openLane(ctx context.Context, stream string, size int64) (*lane, error) {
	l := &lane{name: stream, most: size / 2, moved: make(chan struct{}, 1)}
	c, err := b.js.Consumer(ctx, stream, routerConsumer.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		// A new consumer would be given the whole history, and stoop would
		// answer alerts of yesterday. What lies in the stream without a
		// consumer was routed, or can't be told from what was.
		cfg := routerConsumer
		cfg.DeliverPolicy = jetstream.DeliverNewPolicy
		c, err = b.js.CreateConsumer(ctx, stream, cfg)
	}
	if err != nil {
		return nil, fmt.Errorf("consumer %s of %s: %w", routerConsumer.Durable, stream, err)
	}
	info := c.CachedInfo()
	l.alerts.Store(int64(info.NumPending) + int64(info.NumAckPending))
	return l, nil
}

const (
	// ackEvery is how often the router's progress is acknowledged. A crash
	// routes the alerts of the last such while again; their steps are refused
	// as there already.
	ackEvery = 50 * time.Millisecond
	// routeWindow bounds the alerts whose steps are on their way into
	// ACTIONS.
	routeWindow = 1024
	// keepTogether is for how many alerts at most it is stored at once that
	// others agree with them.
	keepTogether = 256
	// pullExpiry bounds how long a pull that got lost can hold a consumer up.
	pullExpiry = 5 * time.Second
)

// RouteAlerts hands every stored alert of a lane to match, in the order in
// which they were stored, and publishes the steps that it returns. An alert is
// acknowledged when its steps are stored, and what k keeps; k is nil if there is
// nothing to keep. It returns when ctx is done, or when the store fails.
func (b *Broker) RouteAlerts(ctx context.Context, urgent bool, match func(*Stored) []*Step, k Keeper) error {
	err := b.routeAlerts(ctx, urgent, match, k)
	if ctx.Err() != nil {
		return nil // stopped, be it while the consumer was being made
	}
	return err
}

func (b *Broker) routeAlerts(ctx context.Context, urgent bool, match func(*Stored) []*Step, k Keeper) error {
	l := b.lane(urgent)
	nc, err := b.Connect("router " + l.name)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	// Steps are published apart from the alerts, so that neither waits for the
	// other's acknowledgements.
	steps, err := b.Connect("steps of " + l.name)
	if err != nil {
		return err
	}
	defer steps.Close()
	publish, err := jetstream.New(steps, jetstream.WithPublishAsyncMaxPending(4096), jetstream.WithPublishAsyncTimeout(publishTimeout))
	if err != nil {
		return err
	}
	c, err := b.consumer(ctx, js, l.name, routerConsumer)
	if err != nil {
		return err
	}
	// A pull that got lost is made anew by itself: an error for it would end
	// the program.
	it, err := c.Messages(jetstream.PullMaxMessages(500), jetstream.PullExpiry(pullExpiry),
		jetstream.WithMessagesErrOnMissingHeartbeat(false))
	if err != nil {
		return fmt.Errorf("consume %s: %w", l.name, err)
	}
	defer it.Stop()

	window := make(chan routing, routeWindow)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	settler := &settler{b: b, lane: l, urgent: urgent, js: publish, keeper: k}
	go func() {
		err := settler.run(ctx, window)
		if err != nil {
			cancel(err)
		}
		_ = nc.FlushTimeout(time.Second)
		done <- err
	}()
	for {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			close(window)
			return errors.Join(err, <-done)
		}
		r := routing{msg: m}
		if s := newStored(m); s != nil {
			s.Alert = b.underway.take(s.ID)
			s.Urgent = urgent
			for _, step := range match(s) {
				if len(step.Agreed) > 0 {
					r.agreed = append(r.agreed, step)
					continue
				}
				r.acks = append(r.acks, b.publishStepAsync(ctx, publish, step, urgent))
			}
		}
		select {
		case window <- r:
		case <-ctx.Done():
		}
	}
}

// routing is an alert that was held against the rules, and what followed.
type routing struct {
	msg    jetstream.Msg
	acks   []stepAck
	agreed []*Step // not published yet: that several alerts agreed is stored first
}

// settler waits until the steps of routed alerts are stored, in order, and
// acknowledges the alerts.
type settler struct {
	b       *Broker
	lane    *lane
	urgent  bool
	js      jetstream.JetStream // for steps
	keeper  Keeper              // or nil
	last    jetstream.Msg       // not acknowledged yet, nor is what came before it
	counted uint64
}

// run settles until the window is closed and empty, or an error.
func (s *settler) run(ctx context.Context, window <-chan routing) error {
	defer s.acknowledge(ctx)
	tick := time.NewTicker(ackEvery)
	defer tick.Stop()
	batch := make([]routing, 0, keepTogether)
	for {
		select {
		case <-tick.C:
			s.acknowledge(ctx)
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
			return err
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
		s.last = r.msg
		// One that was given twice is counted once.
		if meta, err := r.msg.Metadata(); err == nil && meta.Sequence.Stream > s.counted {
			s.counted = meta.Sequence.Stream
			s.lane.routed(len(r.msg.Data()))
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

func (s *settler) acknowledge(ctx context.Context) {
	if s.last == nil {
		return
	}
	if err := s.keep(ctx); err != nil {
		s.b.log.Warn("acknowledge alerts", "stream", s.lane.name, "error", err)
		return // with what comes next
	}
	if err := s.last.Ack(); err != nil {
		s.b.log.Warn("acknowledge alerts", "stream", s.lane.name, "error", err)
	}
	s.last = nil
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
