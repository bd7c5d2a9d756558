package broker

import (
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"
)

const (
	// queueSteps and queueBytes bound what may wait for one responder. Past
	// it, steps for alerts below Critical are given up, and for Critical and
	// above past twice as much: a hanging destination must not fill the
	// stream that the others' steps need.
	queueSteps = 4096
	queueBytes = 8 << 20
	// shareSteps and shareBytes are what each destination of a responder may
	// have waiting in any case, however many steps wait for its others: a dead
	// webhook must not use up the room of the rest. For Critical and above it
	// is twice as much here too.
	shareSteps = 512
	shareBytes = 1 << 20
)

// ErrQueueFull says that too many steps wait for a responder already.
var ErrQueueFull = errors.New("too many steps wait for this responder already")

// queues are those of all responders.
type queues struct {
	mu sync.Mutex
	of map[string]*queue
}

func (q *queues) get(responder string) *queue {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.of == nil {
		q.of = map[string]*queue{}
	}
	if q.of[responder] == nil {
		q.of[responder] = &queue{seed: maphash.MakeSeed(), steps: map[string]*waiting{}, to: map[uint64]load{}, wanted: make(chan struct{})}
	}
	return q.of[responder]
}

// waiting are the responders for which something waits.
func (q *queues) waiting() map[string]bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	all := map[string]bool{}
	for name, queue := range q.of {
		if queue.waiting() > 0 {
			all[name] = true
		}
	}
	return all
}

// queue counts the steps that wait for, or are with, a responder. Each is known
// by its id, so that none is counted in or out twice, however often it is given
// and acknowledged.
type queue struct {
	seed  maphash.Seed
	mu    sync.Mutex
	steps map[string]*waiting
	all   load
	to    map[uint64]load // by destination
	left  int64           // by an earlier process, and not given to anybody since

	// wanted is closed when there is, or will be, something to be consumed: what no
	// rule names needs no connection.
	wanted chan struct{}
	once   sync.Once
}

func (q *queue) want() { q.once.Do(func() { close(q.wanted) }) }

type waiting struct {
	to    uint64 // the destination
	bytes int64
	since time.Time
	given bool // to the responder: so the store has it
}

type load struct{ steps, bytes int64 }

// full reports whether a limit is reached.
func (l load) full(steps, bytes int64) bool { return l.steps >= steps || l.bytes >= bytes }

// destination is where a step goes, as far as the broker can tell: what has the
// same parameters goes to the same place. There are as many as the rules name.
func (q *queue) destination(s *Step) uint64 { return maphash.Bytes(q.seed, s.Params) }

// admit counts a step in that is about to be published, or refuses it. counted
// is false for one that is counted already.
func (q *queue) admit(s *Step, size int, urgent bool) (counted bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.steps[s.ID] != nil {
		return false, nil
	}
	limit := int64(1)
	if urgent {
		limit = 2
	}
	all, to := q.all, q.destination(s)
	all.steps += q.left
	if all.full(limit*queueSteps, limit*queueBytes) && q.to[to].full(limit*shareSteps, limit*shareBytes) {
		return false, fmt.Errorf("%s: %w (%d, %d of them for the same destination)", s.Responder, ErrQueueFull, all.steps, q.to[to].steps)
	}
	q.enter(s.ID, &waiting{to: to, bytes: int64(size), since: time.Now()})
	return true, nil
}

// refused takes back that admit counted a step in: the store did not take it, or
// has it already.
func (q *queue) refused(id string, duplicate bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := q.steps[id]
	if w == nil {
		return
	}
	if !w.given {
		q.leave(id)
	} else if duplicate {
		q.left = max(0, q.left-1) // it was given meanwhile, so it is one of those
	}
}

// give notes that the responder has been given a step.
func (q *queue) give(s *Step, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if w := q.steps[s.ID]; w != nil {
		w.given = true
		return
	}
	q.left = max(0, q.left-1)
	q.enter(s.ID, &waiting{to: q.destination(s), bytes: int64(size), since: time.Now(), given: true})
}

// end counts out a step that is dealt with.
func (q *queue) end(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.leave(id)
}

// enter and leave are called with the lock held.
func (q *queue) enter(id string, w *waiting) {
	q.want()
	q.steps[id] = w
	q.add(w, 1)
}

func (q *queue) leave(id string) {
	if w := q.steps[id]; w != nil {
		delete(q.steps, id)
		q.add(w, -1)
	}
}

func (q *queue) add(w *waiting, n int64) {
	q.all.steps += n
	q.all.bytes += n * w.bytes
	l := q.to[w.to]
	l.steps += n
	l.bytes += n * w.bytes
	if q.to[w.to] = l; l.steps == 0 {
		delete(q.to, w.to)
	}
}

// waiting is how many there are.
func (q *queue) waiting() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.all.steps + q.left
}

// heal holds the count against what the store says: pending is how many steps
// it has for the responder that were not acknowledged. What it can't have any
// more is forgotten, also under a load that never ends.
func (q *queue) heal(pending int64, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.left = min(q.left, pending)
	oldest := actionsAge // by then the stream has dropped it
	if pending == 0 {
		oldest = 2 * publishTimeout // by then it is stored or refused
	}
	for id, w := range q.steps {
		if now.Sub(w.since) > oldest {
			q.leave(id)
		}
	}
}

// set is what an earlier process left.
func (q *queue) set(left int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.left = left
	if left > 0 {
		q.want()
	}
}
