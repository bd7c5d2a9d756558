package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"testing"
	"time"
)

func newQueue() *queue {
	return &queue{seed: maphash.MakeSeed(), steps: map[string]*waiting{}, to: map[uint64]load{}, wanted: make(chan struct{})}
}

func stepTo(destination string, n int) *Step {
	return &Step{ID: fmt.Sprintf("%s-%d", destination, n), Action: Action{Responder: "webhook", Params: json.RawMessage(fmt.Sprintf(`{"url":%q}`, destination))}}
}

// fill admits steps for a destination until one is refused, and says how many.
func (q *queue) fill(t *testing.T, destination string, urgent bool) int {
	t.Helper()
	for n := range 4 * queueSteps {
		if _, err := q.admit(stepTo(destination, n), 100, urgent); err != nil {
			if !errors.Is(err, ErrQueueFull) {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("there is no bound")
	return 0
}

// A dead destination uses up the room that all share, and no more: each of the
// others has its own share even then, and that has a bound too.
func TestADeadDestinationLeavesTheOthersTheirShare(t *testing.T) {
	q := newQueue()
	if n := q.fill(t, "dead", false); n != queueSteps {
		t.Errorf("%d for the dead one, want %d", n, queueSteps)
	}
	for i := range 20 {
		if n := q.fill(t, fmt.Sprint("sound", i), false); n != shareSteps {
			t.Errorf("%d for another, want %d", n, shareSteps)
		}
	}
	// The same where the steps are urgent, with twice the room.
	if n := q.fill(t, "another dead", true); n != 2*shareSteps {
		t.Errorf("%d urgent ones, want %d", n, 2*shareSteps)
	}
	// And by size: four steps of 512 KiB.
	n := 0
	for ; n < 100; n++ {
		if _, err := q.admit(stepTo("large", n), shareBytes/4, false); err != nil {
			break
		}
	}
	if n != 4 {
		t.Errorf("%d large ones, want 4", n)
	}
	for id := range q.steps {
		q.end(id)
	}
	if q.waiting() != 0 || q.all != (load{}) || len(q.to) != 0 {
		t.Errorf("after all have ended: %d wait, %+v, %v", q.waiting(), q.all, q.to)
	}
}

// The count follows what the store has, in whatever order it is heard of.
func TestTheCountOfWaitingSteps(t *testing.T) {
	admit := func(t *testing.T, q *queue, n int) bool {
		t.Helper()
		counted, err := q.admit(stepTo("a", n), 10, false)
		if err != nil {
			t.Fatal(err)
		}
		return counted
	}
	id := func(n int) string { return stepTo("a", n).ID }
	for name, c := range map[string]struct {
		do   func(t *testing.T, q *queue)
		want int64
	}{
		"waits":                      {func(t *testing.T, q *queue) { admit(t, q, 1) }, 1},
		"given, and given again":     {func(t *testing.T, q *queue) { admit(t, q, 1); q.give(stepTo("a", 1), 10); q.give(stepTo("a", 1), 10) }, 1},
		"acknowledged twice":         {func(t *testing.T, q *queue) { admit(t, q, 1); admit(t, q, 2); q.end(id(1)); q.end(id(1)) }, 1},
		"refused":                    {func(t *testing.T, q *queue) { admit(t, q, 1); q.refused(id(1), false) }, 0},
		"refused, but stored":        {func(t *testing.T, q *queue) { admit(t, q, 1); q.refused(id(1), false); q.give(stepTo("a", 1), 10) }, 1},
		"given before it is refused": {func(t *testing.T, q *queue) { admit(t, q, 1); q.give(stepTo("a", 1), 10); q.refused(id(1), false) }, 1},
		"published twice": {func(t *testing.T, q *queue) {
			admit(t, q, 1)
			if admit(t, q, 1) {
				t.Error("it was counted twice")
			}
		}, 1},
		"left by an earlier process": {func(t *testing.T, q *queue) { q.set(2); q.give(stepTo("a", 1), 10) }, 2},
		"left, and published again":  {func(t *testing.T, q *queue) { q.set(1); admit(t, q, 1); q.refused(id(1), true) }, 1},
		"left, published again and given": {func(t *testing.T, q *queue) {
			q.set(1)
			admit(t, q, 1)
			q.give(stepTo("a", 1), 10)
			q.refused(id(1), true)
		}, 1},
		"left, published again, given and done": {func(t *testing.T, q *queue) { q.set(1); q.give(stepTo("a", 1), 10); q.end(id(1)) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			q := newQueue()
			c.do(t, q)
			if got := q.waiting(); got != c.want {
				t.Errorf("%d wait, want %d", got, c.want)
			}
		})
	}
}

// What the store can't have any more is forgotten while others keep coming.
func TestTheCountHealsUnderLoad(t *testing.T) {
	q := newQueue()
	q.set(5) // of which the stream dropped four
	for n := range 3 {
		if _, err := q.admit(stepTo("a", n), 10, false); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	q.heal(4, now)
	if got := q.waiting(); got != 7 {
		t.Errorf("%d wait, want the 3 and at most the 4 that the store has", got)
	}
	// The three outlive their time in the stream; a fourth has just come.
	for _, w := range q.steps {
		w.since = now.Add(-actionsAge - time.Second)
	}
	if _, err := q.admit(stepTo("a", 3), 10, false); err != nil {
		t.Fatal(err)
	}
	q.heal(1, now)
	if got := q.waiting(); got != 2 || q.steps[stepTo("a", 3).ID] == nil {
		t.Errorf("%d wait, want the one that came last, and one that an earlier process may have left", got)
	}
	// Nothing pends: what is only just being stored is left in the count.
	q.heal(0, now)
	if got := q.waiting(); got != 1 {
		t.Errorf("%d wait, want the one that is being stored", got)
	}
	q.heal(0, now.Add(2*publishTimeout+time.Second))
	if got := q.waiting(); got != 0 {
		t.Errorf("%d wait in an empty store", got)
	}
}
