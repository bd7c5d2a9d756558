package broker

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxLag bounds the alerts of a lane that are stored and not yet routed.
	// When it is reached, Store waits, and the pipe sheds what is least
	// urgent: so the streams never discard an alert that nobody has read.
	maxLag = 20_000
	// perAlert is about what a stored alert takes besides its bytes.
	perAlert = 300
	// heldMost and heldBytes bound the alerts of a lane that are kept in memory
	// for the router. The others it reads from the stream.
	heldMost  = 4096
	heldBytes = 4 << 20
	// keepTogether is for how many alerts at most it is stored at once that others
	// agree with them.
	keepTogether = 256
	// notePosition is how often the router's position is stored. A crash routes the
	// alerts of the last such while again; their steps are refused as there already.
	notePosition = 50 * time.Millisecond
	// noteRest is for how many times as long as that took it is left alone then, up to
	// noteMost: of much that was counted, each time all of what changed is stored.
	noteRest = 20
	noteMost = time.Second
	// unstoredEvery is how often it is said that this, or what is to be kept, could not
	// be stored.
	unstoredEvery = 10 * time.Second
	// routeWindow bounds the alerts whose steps are on their way into ACTIONS.
	routeWindow = 1024
)

// lane is one of the two streams of alerts, and how far the router is in it.
//
// The stream is what counts: the router takes its alerts by their sequence, one
// after the other. That most of them are handed to it by the very process that
// stored them, and are not read back, only saves the way.
type lane struct {
	name     string
	most     int64         // bytes that may wait: half of what the stream holds
	position atomic.Uint64 // the sequence up to which all steps are stored
	left     atomic.Int64  // what an earlier process had stored and not routed
	alerts   atomic.Int64  // sent to the store by this process, and not routed
	bytes    atomic.Int64
	moved    chan struct{} // a token when the router has caught up with some

	mu   sync.Mutex
	fed  []fed // in the order in which it was acknowledged
	held int   // how many of them are held in memory, and their bytes
	size int64
	come chan struct{} // a token when something was fed
}

// fed is an alert that the stream has.
type fed struct {
	seq    uint64
	size   int64
	stored *Stored // nil: it must be read from the stream
}

func (l *lane) full() bool {
	return l.alerts.Load()+l.left.Load() >= maxLag || l.bytes.Load() >= l.most
}

func (l *lane) sent(size int64) {
	l.alerts.Add(1)
	l.bytes.Add(size)
}

func (l *lane) routed(size int64) {
	l.alerts.Add(-1)
	l.bytes.Add(-size)
	signal(l.moved)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
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
	signal(l.moved) // the token may have been another's: pass it on
	return nil
}

// feed hands the router an alert that was stored.
func (l *lane) feed(f fed) {
	l.mu.Lock()
	if l.held < heldMost && l.size < heldBytes {
		l.held++
		l.size += f.size
	} else {
		f.stored = nil
	}
	l.fed = append(l.fed, f)
	l.mu.Unlock()
	signal(l.come)
}

// take waits for alerts that were fed, and appends them to into.
func (l *lane) take(ctx context.Context, into []fed) ([]fed, error) {
	for {
		l.mu.Lock()
		if len(l.fed) > 0 {
			into = append(into, l.fed...)
			clear(l.fed)
			l.fed, l.held, l.size = l.fed[:0], 0, 0
			l.mu.Unlock()
			return into, nil
		}
		l.mu.Unlock()
		select {
		case <-l.come:
		case <-ctx.Done():
			return into, context.Cause(ctx)
		}
	}
}

func (b *Broker) lane(urgent bool) *lane {
	if urgent {
		return b.lanes[0]
	}
	return b.lanes[1]
}

// Unrouted is how many alerts are stored and wait for the router.
func (b *Broker) Unrouted() int64 {
	var n int64
	for _, l := range b.lanes {
		n += l.alerts.Load() + l.left.Load()
	}
	return n
}

// keyRouter is the key of STATE with the router's position in a stream.
func keyRouter(stream string) string { return "router." + stream }

// openLane reads where the router stands in a stream.
func (b *Broker) openLane(ctx context.Context, stream string, size int64) (*lane, error) {
	l := &lane{name: stream, most: size / 2, moved: make(chan struct{}, 1), come: make(chan struct{}, 1)}
	s, err := b.js.Stream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", stream, err)
	}
	st := s.CachedInfo().State
	var position uint64
	known, err := b.state.Get(ctx, keyRouter(stream), &position)
	if err != nil {
		return nil, err
	}
	if !known || position > st.LastSeq {
		// Of what lies in a stream without a position, or in another than the one
		// it was for, nobody can tell what was routed: stoop would answer alerts of
		// yesterday.
		position = st.LastSeq
		if !b.cfg.ReadOnly {
			if err := b.state.Put(ctx, keyRouter(stream), position, 0); err != nil {
				return nil, err
			}
		}
	}
	l.position.Store(position)
	l.left.Store(int64(min(st.LastSeq-position, st.Msgs)))
	return l, nil
}
