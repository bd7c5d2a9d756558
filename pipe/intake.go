package pipe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
)

// DefaultLimit bounds the memory of the alerts that wait to be stored, in
// bytes.
const DefaultLimit = 16 << 20

const (
	batchAlerts = 512
	batchBytes  = 512 << 10
	// storeTimeout bounds one call of the store.
	storeTimeout = 5 * time.Second
	// A store that refuses is asked again after retryFirst, then after twice
	// that, up to retryMost; for as long as there is something to store.
	retryFirst = 5 * time.Millisecond
	retryMost  = time.Second
	// refusals in a row, and an alert goes to the end of its queue, so that one
	// which the store can't take does not hold up those behind it.
	refusals = 8
	// sayEvery is how often, at most, one thing is said again.
	sayEvery = 10 * time.Second
	// overhead is what an alert takes in memory besides its bytes, about.
	overhead = 512
)

// Options are what an [Intake] is made with.
type Options struct {
	Store      Store
	Log        *slog.Logger          // nil: nothing is logged
	Registerer prometheus.Registerer // nil: nothing is counted
	Limit      int                   // bytes of alerts held in memory; 0: [DefaultLimit]
	MaxLine    int                   // bytes of a line without its newline; 0: [DefaultMaxLine]
	// OnShed is told how many alerts of a priority were shed since it was told
	// last: at once the first time, then every ten seconds at most. It has a
	// goroutine of its own, so it may take its time. Lines that were no alerts
	// count as Debug.
	OnShed func(p alert.Priority, n int)
}

// Intake takes arrivals from the sources and brings them to the store, the most
// urgent first; it holds what the store has not taken yet, and sheds the least
// urgent of that when there is too much. Urgent alerts go their own way to the
// store, so that they wait for no others.
type Intake struct {
	store   Store
	log     *slog.Logger
	limit   int
	maxLine int
	onShed  func(alert.Priority, int)
	metrics *metrics

	stop    context.Context // ends when Close gives up, or is done
	giveUp  context.CancelFunc
	running sync.WaitGroup // the lanes
	telling sync.WaitGroup

	mu       sync.Mutex
	queues   [classes]struct{ sheddable, kept queue }
	waiting  [lanes]int // alerts in the queues of a lane
	alerts   int        // queued and on the way to the store
	bytes    int        // the same
	kept     int        // bytes of those that may not be shed
	seq      uint64
	wake     [lanes]chan struct{} // holds one token when a lane has something to do
	room     chan struct{}        // closed, and made anew, when something was settled
	closed   bool
	sending  [lanes][]item // on the way to the store
	storedAt time.Time     // when the store took something last
	shed     [classes]int  // not said yet
	shedNow  chan struct{} // holds one token when there is something to say
}

// A class is a queue: one for each priority, and one for lines that are no
// alerts, which are shed first.
const (
	unparsed = int(alert.Debug) + 1
	classes  = unparsed + 1
)

func classOf(a *Arrival) int {
	if a.Alert == nil || a.Alert.Priority > alert.Debug {
		return unparsed
	}
	return int(a.Alert.Priority)
}

// A lane is a way to the store.
const (
	urgentLane = iota
	otherLane
	lanes
)

func laneOf(class int) int {
	if class != unparsed && alert.Priority(class).Urgent() {
		return urgentLane
	}
	return otherLane
}

// classesOf are a lane's classes, from the first to before the second.
func classesOf(lane int) (from, to int) {
	if lane == urgentLane {
		return 0, int(alert.Critical) + 1
	}
	return int(alert.Critical) + 1, classes
}

// NewIntake starts an intake. Close ends it.
func NewIntake(o Options) *Intake {
	in := &Intake{
		store:   o.Store,
		log:     o.Log,
		limit:   o.Limit,
		maxLine: o.MaxLine,
		onShed:  o.OnShed,
		room:    make(chan struct{}),
		shedNow: make(chan struct{}, 1),
	}
	if in.log == nil {
		in.log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if in.limit <= 0 {
		in.limit = DefaultLimit
	}
	if in.maxLine <= 0 {
		in.maxLine = DefaultMaxLine
	}
	in.metrics = newMetrics(o.Registerer, func() float64 {
		_, n, _ := in.Backlog()
		return float64(n)
	})
	in.stop, in.giveUp = context.WithCancel(context.Background())
	for lane := range lanes {
		in.wake[lane] = make(chan struct{}, 1)
		in.running.Go(func() { in.run(lane) })
	}
	in.telling.Go(in.tell)
	return in
}

// Close waits until all that was put is stored, and ends the intake. When ctx
// ends first, it gives the rest up, and the error says how many that were. The
// sources are to have ended before.
func (in *Intake) Close(ctx context.Context) error {
	in.mu.Lock()
	in.closed = true
	in.mu.Unlock()
	for lane := range lanes {
		signal(in.wake[lane])
	}
	stopWaiting := context.AfterFunc(ctx, in.giveUp)
	in.running.Wait()
	stopWaiting()
	in.giveUp()
	in.telling.Wait()

	in.mu.Lock()
	defer in.mu.Unlock()
	lost := in.alerts
	for class := range classes {
		for _, q := range []*queue{&in.queues[class].sheddable, &in.queues[class].kept} {
			for q.len() > 0 {
				it := q.pop()
				in.settle(&it, false)
			}
		}
	}
	if lost > 0 {
		return fmt.Errorf("ending: %d alerts were not stored: %w", lost, context.Cause(ctx))
	}
	return nil
}

// Backlog is how many alerts are not stored yet, the bytes of memory they
// take, and when the oldest of them was received (zero: there is none).
func (in *Intake) Backlog() (alerts, bytes int, oldest time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	first := func(it *item) {
		if oldest.IsZero() || it.Received.Before(oldest) {
			oldest = it.Received
		}
	}
	for class := range classes {
		for _, q := range []*queue{&in.queues[class].sheddable, &in.queues[class].kept} {
			if q.len() > 0 {
				first(q.first())
			}
		}
	}
	for lane := range lanes {
		for i := range in.sending[lane] {
			first(&in.sending[lane][i])
		}
	}
	return in.alerts, in.bytes, oldest
}

// lastStored is when the store took something last.
func (in *Intake) lastStored() time.Time {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.storedAt
}

// halfEmpty reports whether half of the memory or more is free.
func (in *Intake) halfEmpty() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.bytes < in.limit/2
}

// Ticket stands for arrivals that were put, until each of them is stored or
// lost.
type Ticket struct {
	left, lost int // under the intake's lock
	done       chan struct{}
}

// Done is closed when every arrival of the ticket is stored or lost.
func (t *Ticket) Done() <-chan struct{} { return t.done }

// Lost is how many of the ticket's arrivals were not stored: shed, or given up
// when the intake was closed. It is to be asked after Done.
func (t *Ticket) Lost() int {
	<-t.done
	return t.lost
}

// wait reports whether the ticket was settled before ctx ended.
func (t *Ticket) wait(ctx context.Context) bool {
	select {
	case <-t.done:
		return true
	case <-ctx.Done():
		return false
	}
}

func (t *Ticket) settled() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// Put takes arrivals and never waits. When there is no room for them, it makes
// room by shedding the oldest of the least urgent, which may be one of them.
func (in *Intake) Put(batch []Arrival) *Ticket {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.put(batch, false)
}

// PutKept takes arrivals that are never shed, because their source can wait:
// it waits for room itself, and its error is that of ctx, or that the intake is
// closed. Such arrivals take half of the memory at most.
func (in *Intake) PutKept(ctx context.Context, batch []Arrival) (*Ticket, error) {
	weight := 0
	for i := range batch {
		weight += weigh(&batch[i])
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for in.kept > 0 && in.kept+weight > in.limit/2 || in.bytes > 0 && in.bytes+weight > in.limit {
		room := in.room
		in.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
		}
		in.mu.Lock()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if in.closed {
		return nil, errors.New("the intake is closed")
	}
	return in.put(batch, true), nil
}

func (in *Intake) put(batch []Arrival, kept bool) *Ticket {
	t := &Ticket{left: len(batch), done: make(chan struct{})}
	if len(batch) == 0 {
		close(t.done)
		return t
	}
	if in.closed { // nobody would come for them
		t.lost = len(batch)
		close(t.done)
		return t
	}
	var woken [lanes]bool
	for i := range batch {
		in.metrics.received(&batch[i])
		class := classOf(&batch[i])
		in.seq++
		it := item{Arrival: batch[i], class: class, weight: weigh(&batch[i]), seq: in.seq, ticket: t, kept: kept}
		in.alerts++
		in.bytes += it.weight
		if kept {
			in.kept += it.weight
			in.queues[class].kept.push(it)
		} else {
			in.queues[class].sheddable.push(it)
		}
		in.waiting[laneOf(class)]++
		woken[laneOf(class)] = true
		for in.bytes > in.limit && in.shedOne() {
		}
	}
	for lane, yes := range woken {
		if yes {
			signal(in.wake[lane])
		}
	}
	return t
}

// shedOne drops the oldest of the least urgent alerts that may be shed. There
// may be none: what is on its way to the store can't be taken back.
func (in *Intake) shedOne() bool {
	for class := classes - 1; class >= 0; class-- {
		if q := &in.queues[class].sheddable; q.len() > 0 {
			in.drop(q.pop())
			return true
		}
	}
	return false
}

// drop sheds an item that was taken from its queue.
func (in *Intake) drop(it item) {
	in.waiting[laneOf(it.class)]--
	in.settle(&it, false)
	in.countShed(it.class)
}

func (in *Intake) countShed(class int) {
	in.metrics.shed[class].Inc()
	in.shed[class]++
	signal(in.shedNow)
}

// settle ends an item's stay.
func (in *Intake) settle(it *item, stored bool) {
	in.alerts--
	in.bytes -= it.weight
	if it.kept {
		in.kept -= it.weight
	}
	t := it.ticket
	if stored {
		in.storedAt = time.Now()
	} else {
		t.lost++
	}
	if t.left--; t.left == 0 {
		close(t.done)
	}
}

// run brings one lane's alerts to the store until the intake is closed and the
// lane is empty.
func (in *Intake) run(lane int) {
	var (
		arrivals = make([]Arrival, 0, batchAlerts)
		delay    time.Duration
		since    time.Time // when the store began to refuse
	)
	for {
		batch, ok := in.take(lane)
		if !ok {
			return
		}
		arrivals = arrivals[:0]
		for i := range batch {
			arrivals = append(arrivals, batch[i].Arrival)
		}
		ctx, cancel := context.WithTimeout(in.stop, storeTimeout)
		n, err := in.store.Store(ctx, arrivals)
		cancel()
		clear(arrivals) // stored alerts are not kept alive until the next batch
		n = max(0, min(n, len(batch)))
		if n < len(batch) && err == nil {
			err = errors.New("the store took fewer alerts than it was given and did not say why")
		}
		in.give(lane, n, err)

		switch {
		case n == len(batch), errors.Is(err, ErrUnstorable):
			if !since.IsZero() {
				in.log.Info("the store takes alerts again", "urgent", lane == urgentLane, "took", time.Since(since).Round(time.Millisecond))
			}
			since, delay = time.Time{}, 0
			continue
		case in.stop.Err() != nil:
			return
		case since.IsZero():
			since = time.Now()
			in.log.Error("the store refuses alerts; they wait in memory and are tried again",
				"urgent", lane == urgentLane, "error", err, "limit_bytes", in.limit)
		}
		if n > 0 {
			delay = 0
		}
		delay = min(max(2*delay, retryFirst), retryMost)
		select {
		case <-time.After(delay/2 + rand.N(delay)):
		case <-in.stop.Done():
			return
		}
	}
}

// take waits for the lane's next batch, the most urgent first. It reports false
// when there is none and never will be.
func (in *Intake) take(lane int) ([]item, bool) {
	for {
		in.mu.Lock()
		if in.waiting[lane] > 0 && in.stop.Err() == nil {
			batch := in.sending[lane][:0]
			bytes := 0
			from, to := classesOf(lane)
			for class := from; class < to; class++ {
				q := &in.queues[class]
				for len(batch) < batchAlerts && (bytes < batchBytes) {
					next := &q.sheddable
					if next.len() == 0 || q.kept.len() > 0 && q.kept.first().seq < next.first().seq {
						next = &q.kept
					}
					if next.len() == 0 {
						break
					}
					it := next.pop()
					bytes += it.weight
					batch = append(batch, it)
				}
			}
			in.waiting[lane] -= len(batch)
			in.sending[lane] = batch
			in.mu.Unlock()
			return batch, true
		}
		closed := in.closed
		in.mu.Unlock()
		if closed {
			return nil, false
		}
		select {
		case <-in.wake[lane]:
		case <-in.stop.Done():
			return nil, false
		}
	}
}

// give settles the first n alerts of the lane's batch and puts the others back
// to where they came from, so that a more urgent one may go before them and
// they may be shed.
func (in *Intake) give(lane, n int, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	batch := in.sending[lane]
	for i := range batch[:n] {
		in.settle(&batch[i], true)
	}
	rest := batch[n:]
	if len(rest) > 0 && errors.Is(err, ErrUnstorable) {
		in.settle(&rest[0], false)
		in.countShed(rest[0].class)
		in.log.Error("an alert that can never be stored is dropped", "error", err, "bytes", rest[0].weight-overhead)
		rest = rest[1:]
	}
	in.waiting[lane] += len(rest)
	for i := len(rest) - 1; i >= 0; i-- {
		it := rest[i]
		q := &in.queues[it.class].sheddable
		if it.kept {
			q = &in.queues[it.class].kept
		}
		if i == 0 {
			if it.refused++; it.refused >= refusals {
				it.refused = 0
				q.push(it)
				continue
			}
		}
		q.unpop(it)
	}
	clear(batch)
	in.sending[lane] = batch[:0]
	for in.bytes > in.limit && in.shedOne() {
	}
	close(in.room)
	in.room = make(chan struct{})
}

// tell says what was shed: the first at once, then every [sayEvery] at most.
func (in *Intake) tell() {
	for {
		select {
		case <-in.shedNow:
		case <-in.stop.Done():
		}
		in.mu.Lock()
		shed, ended := in.shed, in.stop.Err() != nil
		in.shed = [classes]int{}
		in.mu.Unlock()
		for class, n := range shed {
			if n == 0 {
				continue
			}
			in.log.Error("alerts were shed: the store did not take them in time and the memory for them is full",
				"priority", className(class), "count", n, "limit_bytes", in.limit)
			if in.onShed != nil {
				in.onShed(min(alert.Priority(class), alert.Debug), n)
			}
		}
		if ended {
			return
		}
		if shed != [classes]int{} {
			select {
			case <-time.After(sayEvery):
			case <-in.stop.Done():
			}
		}
	}
}

// className is a class as metrics and logs call it.
func className(class int) string {
	if class == unparsed {
		return "unparsed"
	}
	return alert.Priority(class).String()
}

// item is an arrival in a queue.
type item struct {
	Arrival
	class   int
	weight  int // bytes
	seq     uint64
	ticket  *Ticket
	kept    bool
	refused int // in a row, as the first of its batch
}

// weigh is about how many bytes of memory an arrival takes.
func weigh(a *Arrival) int {
	if a.Alert == nil {
		return overhead + len(a.Unparsed)
	}
	return overhead + len(a.Alert.Raw) + len(a.Alert.Output)
}

// queue is first in, first out.
type queue struct {
	items []item
	head  int
}

func (q *queue) len() int     { return len(q.items) - q.head }
func (q *queue) first() *item { return &q.items[q.head] }

func (q *queue) push(it item) {
	if q.head > 0 && len(q.items) == cap(q.items) && q.head >= len(q.items)/2 {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, it)
}

func (q *queue) pop() item {
	it := q.items[q.head]
	q.items[q.head] = item{}
	q.head++
	if q.head == len(q.items) {
		q.items, q.head = q.items[:0], 0
		if cap(q.items) > 4*batchAlerts { // what a flood needed is given back
			q.items = nil
		}
	}
	return it
}

// unpop puts an item back to the front.
func (q *queue) unpop(it item) {
	if q.head == 0 {
		room := max(batchAlerts, len(q.items))
		items := make([]item, room+len(q.items), room+2*len(q.items)+1)
		copy(items[room:], q.items)
		q.items, q.head = items, room
	}
	q.head--
	q.items[q.head] = it
}

// signal leaves a token in a channel that holds one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
