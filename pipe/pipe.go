// Package pipe is where alerts come in: from a FIFO, from standard input, from
// a file that Falco appends to, or over HTTP.
//
// It is the second stop on an alert's way. A [Source] turns bytes into lines
// and lines into alerts, the [Intake] hands them to the [Store] (which the
// broker is) and tells the source when they are stored. Only then does the
// source let go of the bytes: a FIFO's are consumed, a file's offset moves on,
// an HTTP request is answered. So what was written to stoop outlives a crash of
// stoop, and what arrives twice because of it is told apart by the alert's id.
//
// Falco writes all its outputs from one thread, and a full pipe stalls every
// one of them. So where the writer can't wait, the store may hold it up for
// [Patience] and no longer; after that alerts are kept in memory, and shed from
// there, the least urgent first, when the memory is full.
package pipe

import (
	"context"
	"errors"
	"time"

	"stoop/broker"
)

// Patience is how long bytes stay in Falco's pipe because the store has not
// yet taken what they say.
const Patience = 100 * time.Millisecond

// Arrival is one line that came in. Where it is no alert, Unparsed holds the
// line, cut to [MaxUnparsed] bytes.
type Arrival = broker.Arrival

// MaxUnparsed bounds what is kept of a line that is no alert, in bytes.
const MaxUnparsed = 64 << 10

// Store takes arrivals for good. It is what the broker is to the pipe.
type Store interface {
	// Store stores the arrivals in order and returns how many of them, counted
	// from the first, are stored: fewer than all only with an error that says
	// why the next one was refused. It is called from two goroutines at once
	// (one for the urgent alerts), gives up when ctx ends, and may see an
	// arrival again that it stored before it returned an error. An error that
	// wraps [ErrUnstorable] means that the next arrival can never be stored;
	// with any other it is tried again.
	Store(ctx context.Context, batch []Arrival) (int, error)
}

// ErrUnstorable is for a [Store] to say that an arrival will never be stored,
// because it is too large or not allowed. It is dropped and counted as shed.
var ErrUnstorable = errors.New("can never be stored")

// Source is one way in. Run reads until ctx ends or the source does, hands
// what it reads to the intake, and returns nil in both cases. Its error means
// that nothing comes in by this way any more, and says what to do.
type Source interface {
	Run(ctx context.Context, in *Intake) error
}

// patience waits for tickets on behalf of a writer that must not be stalled.
// Once it has waited in vain, it does not wait again until the store has caught
// up with what it waited for: the writer is held up once, not for every piece.
type patience struct {
	in   *Intake     // a store that takes alerts in time is waited for, up to patienceMost
	rush func() bool // whether there is no time even for that; nil: there is
	late *Ticket
}

// wait reports whether t is settled.
func (p *patience) wait(t *Ticket) bool {
	if t == nil || t.settled() {
		return true
	}
	if p.rush != nil && p.rush() {
		return false
	}
	if p.late != nil && !p.late.settled() {
		p.late = t
		return false
	}
	p.late = nil
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	for begun := time.Now(); ; {
		select {
		case <-t.Done():
			return true
		case <-timer.C:
		}
		if p.rush != nil && p.rush() {
			return false
		}
		// It is not slow for there being much before t.
		if left := Patience - time.Since(p.in.lastStored()); left > 0 && time.Since(begun) < patienceMost {
			timer.Reset(left)
			continue
		}
		p.late = t
		return false
	}
}

// patienceMost bounds how long a ticket is waited for while the store takes
// others.
const patienceMost = time.Second
