package pipe

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
)

var errFull = errors.New("the disk is full")

func TestTicket(t *testing.T) {
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	ticket := in.Put([]Arrival{arrival(t, "a", "Notice"), arrival(t, "b", "Critical"), {Unparsed: []byte("x")}})
	<-ticket.Done()
	if n := len(store.all()); n != 3 || ticket.Lost() != 0 {
		t.Fatalf("settled with %d stored and %d lost", n, ticket.Lost())
	}
	if ticket = in.Put(nil); !ticket.settled() {
		t.Fatal("a ticket for nothing is open")
	}
}

// gate holds a store's calls up until it is opened.
type gate struct {
	entered chan int // the size of each batch that waits
	open    chan struct{}
}

func newGate() *gate { return &gate{make(chan int, 1000), make(chan struct{})} }

func (g *gate) pass(ctx context.Context, batch []Arrival) (int, error) {
	g.entered <- len(batch)
	select {
	case <-g.open:
		return 0, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func TestMoreUrgentFirst(t *testing.T) {
	g := newGate()
	store := &shelf{before: g.pass}
	in, _ := intake(t, Options{Store: store})
	in.Put([]Arrival{arrival(t, "occupies", "Debug"), arrival(t, "occupies", "Critical")})
	<-g.entered // one of each lane
	<-g.entered
	var batch []Arrival
	for _, p := range []string{"Debug", "Informational", "Notice", "Warning", "Error", "Critical", "Alert", "Emergency"} {
		batch = append(batch, arrival(t, p+" 1", p), arrival(t, p+" 2", p))
	}
	batch = append(batch, Arrival{Unparsed: []byte("x")})
	in.Put(batch)
	close(g.open)
	store.has(t, 19)
	var urgent, other []string
	for _, r := range store.all() {
		switch {
		case r.Alert == nil:
			other = append(other, "!")
		case r.Alert.Rule == "occupies":
		case r.Alert.Priority.Urgent():
			urgent = append(urgent, r.Alert.Rule)
		default:
			other = append(other, r.Alert.Rule)
		}
	}
	equal(t, "urgent", urgent, []string{"Emergency 1", "Emergency 2", "Alert 1", "Alert 2", "Critical 1", "Critical 2"})
	equal(t, "other", other, []string{"Error 1", "Error 2", "Warning 1", "Warning 2", "Notice 1", "Notice 2", "Informational 1", "Informational 2", "Debug 1", "Debug 2", "!"})
}

// An urgent alert is stored while the store hangs over others.
func TestUrgentHasItsOwnWay(t *testing.T) {
	hang := make(chan struct{})
	store := &shelf{before: func(ctx context.Context, batch []Arrival) (int, error) {
		if batch[0].Alert.Priority.Urgent() {
			return 0, nil
		}
		<-hang
		return 0, nil
	}}
	in, _ := intake(t, Options{Store: store})
	slow := in.Put([]Arrival{arrival(t, "slow", "Error")})
	eventually(t, func() error {
		if _, bytes, _ := in.Backlog(); bytes == 0 {
			return errors.New("not put")
		}
		return nil
	})
	<-in.Put([]Arrival{arrival(t, "urgent", "Critical")}).Done()
	if slow.settled() {
		t.Error("the other was stored too")
	}
	close(hang)
	<-slow.Done()
}

func TestShedsTheLeastUrgentAndOldestFirst(t *testing.T) {
	g := newGate()
	store := &shelf{before: g.pass}
	registry := prometheus.NewRegistry()
	var mu sync.Mutex
	told := map[alert.Priority]int{}
	one := weigh(&Arrival{Alert: parse(t, line("Notice 1", "Notice"))})
	in, out := intake(t, Options{Store: store, Registerer: registry, Limit: 6 * (one + 20), OnShed: func(p alert.Priority, n int) {
		mu.Lock()
		defer mu.Unlock()
		told[p] += n
	}})
	in.Put([]Arrival{arrival(t, "first", "Error"), arrival(t, "first", "Critical")})
	<-g.entered
	<-g.entered
	// Two of six are on their way; four have room.
	notices := in.Put([]Arrival{
		arrival(t, "Notice 1", "Notice"), arrival(t, "Notice 2", "Notice"), arrival(t, "Notice 3", "Notice"), arrival(t, "Notice 4", "Notice"),
	})
	debug := in.Put([]Arrival{arrival(t, "Debug 1", "Debug")})
	if !debug.settled() || debug.Lost() != 1 {
		t.Error("a Debug alert took a Notice's place")
	}
	in.Put([]Arrival{arrival(t, "Notice 5", "Notice")})
	in.Put([]Arrival{arrival(t, "Critical", "Critical"), arrival(t, "Error", "Error")})
	if alerts, bytes, oldest := in.Backlog(); alerts != 6 || bytes > 6*(one+20) || oldest.IsZero() {
		t.Errorf("the backlog is %d alerts of %d bytes, the oldest of %v", alerts, bytes, oldest)
	}
	close(g.open)
	<-notices.Done()
	if notices.Lost() != 3 {
		t.Errorf("%d of the first four notices were lost, want 3", notices.Lost())
	}
	store.has(t, 6)
	left := map[string]int{}
	for _, name := range store.rules() {
		left[name]++
	}
	if want := map[string]int{"first": 2, "Critical": 1, "Error": 1, "Notice 4": 1, "Notice 5": 1}; fmt.Sprint(left) != fmt.Sprint(want) {
		t.Errorf("%v were stored, want %v", left, want)
	}
	if n := value(in.metrics.shed[alert.Notice]); n != 3 {
		t.Errorf("%v notices are counted as shed", n)
	}
	if n := value(in.metrics.shed[alert.Debug]); n != 1 {
		t.Errorf("%v debug alerts are counted as shed", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := in.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(told) != fmt.Sprint(map[alert.Priority]int{alert.Notice: 3, alert.Debug: 1}) {
		t.Errorf("told of %v", told)
	}
	if n := out.count("alerts were shed"); n < 2 || n > 3 {
		t.Errorf("said %d times:\n%s", n, out)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "stoop_intake_bytes" && f.GetMetric()[0].GetGauge().GetValue() != 0 {
			t.Errorf("stoop_intake_bytes is %v at the end", f.GetMetric()[0])
		}
	}
}

func TestFloodStaysBounded(t *testing.T) {
	const limit = 1 << 20
	store := &shelf{before: func(context.Context, []Arrival) (int, error) { return 0, errFull }}
	in, out := intake(t, Options{Store: store, Limit: limit})
	urgent := in.Put([]Arrival{arrival(t, "urgent", "Critical")})
	d := arrival(t, "flood", "Debug")
	for range 20000 {
		in.Put([]Arrival{d, d})
		if _, bytes, _ := in.Backlog(); bytes > limit {
			t.Fatalf("%d bytes are held", bytes)
		}
	}
	if urgent.settled() {
		t.Error("the urgent alert was shed")
	}
	store.set(nil)
	<-urgent.Done()
	if urgent.Lost() != 0 {
		t.Error("the urgent alert was lost")
	}
	eventually(t, func() error {
		if n, bytes, _ := in.Backlog(); n != 0 || bytes != 0 {
			return fmt.Errorf("%d alerts of %d bytes are left", n, bytes)
		}
		return nil
	})
	if n := out.count("the store refuses alerts"); n != 2 { // one a lane
		t.Errorf("said %d times:\n%s", n, out)
	}
	if n := out.count("alerts were shed"); n != 1 {
		t.Errorf("said %d times:\n%s", n, out)
	}
}

func TestRefusalsAreTriedAgainInOrder(t *testing.T) {
	calls := 0
	store := &shelf{}
	store.before = func(_ context.Context, batch []Arrival) (int, error) {
		if calls++; calls%3 != 0 { // takes one, none, all, one, none, all, …
			return calls % 3 % 2, errFull
		}
		return 0, nil
	}
	in, _ := intake(t, Options{Store: store})
	var want []string
	var batch []Arrival
	for i := range 10 {
		want = append(want, fmt.Sprint("rule ", i))
		batch = append(batch, arrival(t, want[i], "Notice"))
	}
	ticket := in.Put(batch)
	<-ticket.Done()
	if ticket.Lost() != 0 {
		t.Errorf("%d were lost", ticket.Lost())
	}
	equal(t, "stored", store.rules(), want)
}

func TestUnstorableHoldsUpNobody(t *testing.T) {
	for _, permanent := range []bool{true, false} {
		t.Run(fmt.Sprint("permanent ", permanent), func(t *testing.T) {
			store := &shelf{}
			store.before = func(_ context.Context, batch []Arrival) (int, error) {
				for i, a := range batch {
					if a.Alert.Rule != "poison" {
						continue
					}
					if permanent {
						return i, fmt.Errorf("too large: %w", ErrUnstorable)
					}
					return i, errFull
				}
				return 0, nil
			}
			in, out := intake(t, Options{Store: store})
			poison := in.Put([]Arrival{arrival(t, "a", "Notice"), arrival(t, "poison", "Notice")})
			good := in.Put([]Arrival{arrival(t, "b", "Notice"), arrival(t, "c", "Notice")})
			<-good.Done()
			if good.Lost() != 0 {
				t.Error("the alerts behind it were lost")
			}
			equal(t, "stored", store.rules(), []string{"a", "b", "c"})
			if !permanent {
				store.set(nil)
			}
			<-poison.Done()
			if want := map[bool]int{true: 1, false: 0}[permanent]; poison.Lost() != want {
				t.Errorf("%d were lost, want %d", poison.Lost(), want)
			}
			if permanent && out.count("can never be stored is dropped") != 1 {
				t.Errorf("it was not said:\n%s", out)
			}
		})
	}
}

func TestPutKept(t *testing.T) {
	store := &shelf{before: func(context.Context, []Arrival) (int, error) { return 0, errFull }}
	in, _ := intake(t, Options{Store: store, Limit: 64 << 10})
	d := arrival(t, "kept", "Debug")
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	var tickets []*Ticket
	waits := make(chan struct{})
	time.AfterFunc(200*time.Millisecond, func() { close(waits); cancel() })
	for {
		ticket, err := in.PutKept(ctx, []Arrival{d})
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			break
		}
		tickets = append(tickets, ticket)
		n++
	}
	select {
	case <-waits:
	default:
		t.Error("it did not wait")
	}
	if _, bytes, _ := in.Backlog(); n == 0 || bytes > 32<<10 {
		t.Errorf("%d were put, %d bytes are held; half of the limit are %d", n, bytes, 32<<10)
	}
	// A flood of urgent alerts sheds none of them.
	c := arrival(t, "flood", "Critical")
	for range 1000 {
		in.Put([]Arrival{c})
	}
	store.set(nil)
	for _, ticket := range tickets {
		<-ticket.Done()
		if ticket.Lost() != 0 {
			t.Fatal("a kept alert was shed")
		}
	}
	if _, err := in.PutKept(context.Background(), []Arrival{d}); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

func TestCloseGivesUp(t *testing.T) {
	store := &shelf{before: func(context.Context, []Arrival) (int, error) { return 0, errFull }}
	in := NewIntake(Options{Store: store})
	ticket := in.Put([]Arrival{arrival(t, "a", "Notice"), arrival(t, "a", "Critical")})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := in.Close(ctx); err == nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close: %v", err)
	}
	if ticket.Lost() != 2 {
		t.Errorf("%d are lost", ticket.Lost())
	}
	if late := in.Put([]Arrival{arrival(t, "a", "Notice")}); late.Lost() != 1 {
		t.Error("an alert was put into a closed intake")
	}
}

func TestCloseStoresWhatWaits(t *testing.T) {
	store := &shelf{before: func(context.Context, []Arrival) (int, error) { return 0, errFull }}
	in := NewIntake(Options{Store: store})
	for range 2000 {
		in.Put([]Arrival{arrival(t, "a", "Notice")})
	}
	store.set(nil)
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := in.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(store.all()); n != 2000 {
		t.Errorf("%d are stored", n)
	}
}

func TestQueue(t *testing.T) {
	var q queue
	var want []uint64 // a plain slice does the same
	next := uint64(0)
	for i := range 20000 {
		switch {
		case i%7 < 4:
			next++
			q.push(item{seq: next})
			want = append(want, next)
		case len(want) > 0 && (i%7 < 6 || i > 15000):
			if got := q.pop().seq; got != want[0] {
				t.Fatalf("popped %d, want %d", got, want[0])
			}
			want = want[1:]
		default:
			next++
			q.unpop(item{seq: next})
			want = append([]uint64{next}, want...)
		}
		if q.len() != len(want) {
			t.Fatalf("it holds %d, want %d", q.len(), len(want))
		}
	}
}
