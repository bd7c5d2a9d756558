package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
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
)

// Store stores the arrivals in order and returns how many of them, from the
// first, are stored: fewer than all only with an error that says why the next
// one was refused. An arrival that an earlier process stored before it was
// killed, and could not take off the pipe, is not stored again.
func (b *Broker) Store(ctx context.Context, batch []Arrival) (int, error) {
	type pending struct {
		ack  jetstream.PubAckFuture // nil: stored before
		lane *lane
		size int64
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
		ack, err := b.publishAsync(ctx, b.js, m)
		if err != nil {
			stop = err
			break
		}
		size := int64(len(m.Data)) + perAlert
		l.sent(size)
		acks = append(acks, pending{ack, l, size})
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
		var at *jetstream.PubAck
		select { // what is stored is stored, also when ctx has ended
		case at = <-p.ack.Ok():
		default:
			select {
			case at = <-p.ack.Ok():
			case err = <-p.ack.Err():
			case <-late.C:
				late.Reset(0) // for those behind it too
				err = jetstream.ErrAsyncPublishTimeout
			case <-b.Failed():
				err = b.Err()
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
		}
		if at != nil {
			p.lane.feed(fed{seq: at.Sequence, size: p.size, stored: batch[i].stored(at.Sequence)})
			if stored == i {
				stored++
			}
			continue
		}
		p.lane.routed(p.size)
		if stored == i {
			stop = fmt.Errorf("store an alert in %s: %w", p.lane.name, err)
		}
		if IsStoreFault(err) || errors.Is(err, jetstream.ErrAsyncPublishTimeout) {
			b.fail(err)
		}
	}
	return stored, stop
}

// stored is an arrival as the router takes it, when it was stored just now.
func (a *Arrival) stored(seq uint64) *Stored {
	s := &Stored{Received: a.Received, StoredAt: time.Now(), Origin: a.Origin, Alert: a.Alert, Seq: seq}
	if a.Alert != nil {
		s.ID, s.Data = a.Alert.ID, a.Alert.Raw
	}
	return s
}

func (b *Broker) message(a *Arrival) *nats.Msg {
	if a.Alert == nil {
		return &nats.Msg{Subject: alert.UnparsedSubject, Data: a.Unparsed, Header: stamp("", a.Received, a.Origin)}
	}
	return &nats.Msg{Subject: a.Alert.Subject(), Data: a.Alert.Raw, Header: stamp(a.Alert.ID, a.Received, a.Origin)}
}

// stamp is the headers of a stored alert, or, with no id, of a line that is none.
func stamp(id string, received time.Time, origin Origin) nats.Header {
	h := make(nats.Header, 3)
	h[HeaderReceived] = []string{strconv.FormatInt(received.UnixNano(), 10)}
	h[HeaderOrigin] = []string{string(origin)}
	if id != "" {
		h[HeaderID] = []string{id}
	}
	return h
}

// receivedAt is when an alert that was stored at a time arrived.
func receivedAt(h nats.Header, stored time.Time) time.Time {
	if ns, err := strconv.ParseInt(h.Get(HeaderReceived), 10, 64); err == nil {
		return time.Unix(0, ns).UTC()
	}
	return stored
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
		err := b.since(ctx, l.name, "", l.position.Load()+1, func(m jetstream.Msg) error {
			s := newStored(m)
			if s.ID == "" {
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

// Stored is an alert as it is in the stream.
type Stored struct {
	ID       string // "": the line is no alert
	Data     []byte // the JSON object
	Received time.Time
	StoredAt time.Time
	Origin   Origin
	Alert    *alert.Alert // what Data says, if this process knows it already

	Urgent bool   // which lane it is in
	Seq    uint64 // its place in the lane, from 1
}

func newStored(m jetstream.Msg) *Stored {
	h := m.Headers()
	s := &Stored{ID: h.Get(HeaderID), Data: m.Data(), Origin: Origin(h.Get(HeaderOrigin))}
	if meta, err := m.Metadata(); err == nil {
		s.StoredAt = meta.Timestamp
		s.Seq = meta.Sequence.Stream
	}
	s.Received = receivedAt(h, s.StoredAt)
	return s
}
