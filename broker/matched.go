package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
)

// The streams of the alerts that matched a rule, which rules are tried on later.
// What is urgent is apart here too.
const (
	StreamMatched       = "MATCHED"
	StreamMatchedUrgent = "MATCHED_URGENT"
)

const (
	// matchedPrefix stands before the rest of an alert's own subject.
	matchedPrefix = "stoop.matched."
	// matchedRoom bounds what one rule of Falco's can take of a stream: one alert for
	// each so many bytes, an eighth of it with alerts of 1 KiB.
	matchedRoom = 8 << 10
	// matchedWaiting and matchedBytes bound the alerts that wait to be kept, and
	// matchedUnderway those that the store has not acknowledged.
	matchedWaiting  = 4096
	matchedBytes    = 8 << 20
	matchedUnderway = 256
	// matchedAtOnce are kept in matchedEvery, and no more: 2,000 a second, which would
	// fill the streams in minutes as it is. A flood that matches has better uses for the
	// processors.
	matchedAtOnce = 100
	matchedEvery  = 50 * time.Millisecond
	// matchedStop is how long the last ones are waited for when stoop is stopped.
	matchedStop = 2 * time.Second
	// lostEvery is how often it is said that some are not kept.
	lostEvery = time.Minute
)

// matched keeps alerts that matched a rule, beside the way: what it has no room for
// is not kept, and nobody waits for it.
type matched struct {
	ch    chan *nats.Msg // nil: none is kept
	bytes atomic.Int64   // of those in ch
	lost  atomic.Uint64
}

func (b *Broker) matchedStreams() []jetstream.StreamConfig {
	urgent, other := subjects(matchedPrefix)
	size := b.cfg.MatchedSize
	limit := func(size int64) int64 { return max(1, size/matchedRoom) }
	return []jetstream.StreamConfig{
		{
			Name: StreamMatchedUrgent, Description: "alerts of priority Critical and above that matched a rule, as Falco wrote them", Subjects: urgent,
			MaxAge: b.cfg.MatchedAge, MaxBytes: size / 4, MaxMsgsPerSubject: limit(size / 4),
		},
		{
			Name: StreamMatched, Description: "alerts of the other priorities that matched a rule, as Falco wrote them", Subjects: other,
			MaxAge: b.cfg.MatchedAge, MaxBytes: size - size/4, MaxMsgsPerSubject: limit(size - size/4),
		},
	}
}

// KeepMatched keeps an alert that matched a rule, so that other rules can be tried on
// it. It never waits; what could not be kept is counted: [Broker.MatchedLost].
func (b *Broker) KeepMatched(s *Stored, a *alert.Alert) {
	k := &b.matched
	room, bytes := cap(k.ch), int64(matchedBytes)
	if !a.Priority.Urgent() {
		room, bytes = room/2, bytes/2 // the rest is for the urgent ones
	}
	size := int64(len(s.Data)) + perAlert
	if len(k.ch) >= room || k.bytes.Load()+size > bytes {
		b.unkept()
		return
	}
	m := &nats.Msg{Subject: matchedPrefix + strings.TrimPrefix(a.Subject(), "falco."), Data: s.Data, Header: stamp(s.ID, s.Received, s.Origin)}
	select {
	case k.ch <- m:
		k.bytes.Add(size)
	default:
		b.unkept()
	}
}

// unkept counts an alert that is not kept.
func (b *Broker) unkept() {
	b.matched.lost.Add(1)
	if b.cfg.Unkept != nil {
		b.cfg.Unkept()
	}
}

// MatchedLost is how many alerts that matched a rule were not kept.
func (b *Broker) MatchedLost() uint64 { return b.matched.lost.Load() }

// matchedLoop stores what is to be kept, until ctx is done and the rest is stored.
func (b *Broker) matchedLoop(ctx context.Context) {
	k := &b.matched
	say := time.NewTicker(lostEvery)
	defer say.Stop()
	var said uint64
	var js jetstream.JetStream // made when it is needed
	keep := func(m *nats.Msg) {
		k.bytes.Add(-int64(len(m.Data)) - perAlert)
		err := b.Err()
		if err == nil && js == nil {
			js, err = b.matchedStream()
		}
		if err == nil {
			_, err = b.publishAsync(b.sound, js, m)
		}
		if err != nil {
			b.unkept()
		}
	}
	var window time.Time // when more may be kept
	n := 0
	for {
		select {
		case m := <-k.ch:
			if now := time.Now(); now.After(window) {
				window, n = now.Add(matchedEvery), 0
			}
			keep(m)
			if n++; n == matchedAtOnce {
				select {
				case <-time.After(time.Until(window)):
				case <-ctx.Done():
				}
			}
			continue
		case <-say.C:
			if lost := k.lost.Load(); lost > said {
				b.log.Warn("alerts that matched a rule are not kept for trying other rules on them", "alerts", lost-said)
				said = lost
			}
			continue
		case <-ctx.Done():
		}
		break
	}
	for len(k.ch) > 0 {
		keep(<-k.ch)
	}
	if js == nil {
		return
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-b.Failed():
	case <-time.After(matchedStop):
	}
	js.Conn().Close()
}

// matchedStream connects: so much under way is the store's to take, and not the
// alerts'.
func (b *Broker) matchedStream() (jetstream.JetStream, error) {
	nc, err := b.Connect("matched")
	if err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(matchedUnderway), jetstream.WithPublishAsyncTimeout(publishTimeout),
		jetstream.WithPublishAsyncErrHandler(func(jetstream.JetStream, *nats.Msg, error) { b.unkept() }))
	if err != nil {
		nc.Close()
	}
	return js, err
}

// Kept is a stored alert, as it is read to try rules on it.
type Kept struct {
	ID       string
	Data     []byte
	Received time.Time
	Origin   Origin
}

// KeptStreams are the streams that alerts can be read from: what matched a rule, and
// all of the last while.
func KeptStreams() []string {
	return []string{StreamMatchedUrgent, StreamMatched, StreamUrgent, StreamAlerts}
}

// KeptPage are alerts of one stream.
type KeptPage struct {
	Alerts []Kept
	Next   uint64 // where the next page begins; 0: there is none
	Left   uint64 // how many alerts follow
}

// keptPage is how many bytes of alerts a page holds, about: with the largest alert at
// its end it still fits into a message.
const keptPage = 5 << 19

var errPageFull = errors.New("the page is full")

// Kept reads a page of a stream from a sequence on, or, where that is 0, from a time
// on. A stream that is not there has none.
func (b *Broker) Kept(ctx context.Context, stream string, from uint64, since time.Time) (KeptPage, error) {
	var p KeptPage
	if !slices.Contains(KeptStreams(), stream) {
		return p, fmt.Errorf("read alerts: there is no stream %q; there are %s", stream, strings.Join(KeptStreams(), ", "))
	}
	cfg := jetstream.OrderedConsumerConfig{InactiveThreshold: readerGone}
	switch {
	case from > 0:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, from
	case !since.IsZero():
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	c, err := b.js.OrderedConsumer(ctx, stream, cfg)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return p, nil
	}
	size := 0
	if err == nil {
		err = b.drain(ctx, c, func(m jetstream.Msg) error {
			if s := newStored(m); s.ID != "" {
				p.Alerts = append(p.Alerts, Kept{s.ID, s.Data, s.Received, s.Origin})
			}
			meta, err := m.Metadata()
			if err != nil {
				return err
			}
			if size += len(m.Data()) + perAlert; size < keptPage || meta.NumPending == 0 {
				return nil
			}
			p.Next, p.Left = meta.Sequence.Stream+1, meta.NumPending
			return errPageFull
		})
	}
	if err != nil && !errors.Is(err, errPageFull) {
		return p, fmt.Errorf("read the alerts of %s: %w", stream, err)
	}
	return p, nil
}

// Append writes the alerts as text: for each a line "ID RECEIVED ORIGIN LENGTH", so
// many bytes, and a newline.
func (p *KeptPage) Append(to []byte) []byte {
	for _, k := range p.Alerts {
		to = fmt.Appendf(to, "%s %d %s %d\n", k.ID, k.Received.UnixNano(), k.Origin, len(k.Data))
		to = append(append(to, k.Data...), '\n')
	}
	return to
}

// ParseKept reads what Append wrote. The alerts share its memory.
func ParseKept(text []byte) ([]Kept, error) {
	var all []Kept
	for len(text) > 0 {
		line, rest, ok := bytes.Cut(text, []byte("\n"))
		f := strings.Fields(string(line))
		if !ok || len(f) != 4 {
			return all, errors.New("read alerts: a line is not ID RECEIVED ORIGIN LENGTH")
		}
		at, err := strconv.ParseInt(f[1], 10, 64)
		n, nerr := strconv.Atoi(f[3])
		if err = errors.Join(err, nerr); err != nil || n < 0 || n >= len(rest) {
			return all, fmt.Errorf("read alerts: %q: a number is wrong", line)
		}
		all = append(all, Kept{ID: f[0], Received: time.Unix(0, at).UTC(), Origin: Origin(f[2]), Data: rest[:n:n]})
		text = rest[n+1:]
	}
	return all, nil
}
