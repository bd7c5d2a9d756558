package responders

import (
	"math/rand/v2"
	"sync"
	"time"

	"stoop/broker"
)

const (
	// laneConcurrency is how many steps to one destination are under way at once.
	laneConcurrency = 4
	// parkedMost is how many steps of a responder wait in memory until there is
	// room in their lane. Those past it are given back to the store, and ask again.
	parkedMost = 1024
)

// lanes are the destinations of a responder. A step that finds its own busy is
// parked: it holds up none that goes elsewhere, and asks nobody in vain while it
// waits, for a destination may hang for long, and have thousands waiting.
type lanes struct {
	mu     sync.Mutex
	of     map[string]*destination
	parked int
}

type destination struct {
	underWay int
	parked   []*broker.Delivery // in the order they came
}

// enter takes a place in a lane, or parks the step: then full is false, and
// [lanes.leave] returns it to whoever makes room. full is true where no more can be
// parked.
func (l *lanes) enter(name string, d *broker.Delivery) (entered, full bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	to := l.of[name]
	if to == nil {
		to = &destination{}
		l.of[name] = to
	}
	switch {
	case to.underWay < laneConcurrency:
		to.underWay++
		return true, false
	case l.parked >= parkedMost:
		return false, true
	}
	d.Keep()
	to.parked = append(to.parked, d)
	l.parked++
	return false, false
}

// leave gives a place back: to the step that it returns, which has waited longest.
func (l *lanes) leave(name string) *broker.Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	to := l.of[name]
	if len(to.parked) > 0 {
		next := to.parked[0]
		to.parked = to.parked[1:]
		l.parked--
		return next
	}
	if to.underWay--; to.underWay == 0 {
		delete(l.of, name)
	}
	return nil
}

// fullAgain is when a step asks again that could not even be parked. All that
// were parked go first.
func fullAgain() time.Duration { return 10*time.Second + rand.N(10*time.Second) }
