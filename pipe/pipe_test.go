package pipe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"stoop/alert"
)

// within bounds what a test waits for; it is never waited for in full.
const within = 10 * time.Second

// shelf is a Store that keeps what it is given.
type shelf struct {
	mu       sync.Mutex
	arrivals []Arrival
	calls    int
	// before, if set, is called outside the lock before a batch is taken; its
	// results are the store's when it has an error.
	before func(ctx context.Context, batch []Arrival) (int, error)
}

func (s *shelf) Store(ctx context.Context, batch []Arrival) (int, error) {
	s.mu.Lock()
	s.calls++
	before := s.before
	s.mu.Unlock()
	n := len(batch)
	var err error
	if before != nil {
		if n, err = before(ctx, batch); err == nil {
			n = len(batch)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrivals = append(s.arrivals, batch[:n]...)
	return n, err
}

func (s *shelf) set(before func(ctx context.Context, batch []Arrival) (int, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = before
}

func (s *shelf) all() []Arrival {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Arrival(nil), s.arrivals...)
}

// rules are the rule names of the alerts in the order they were stored in;
// lines that are no alerts stand as "!".
func (s *shelf) rules() []string {
	var names []string
	for _, a := range s.all() {
		if a.Alert == nil {
			names = append(names, "!")
			continue
		}
		names = append(names, a.Alert.Rule)
	}
	return names
}

// has waits until the store holds n arrivals.
func (s *shelf) has(t *testing.T, n int) {
	t.Helper()
	eventually(t, func() error {
		if got := len(s.all()); got != n {
			return fmt.Errorf("%d arrivals are stored, want %d", got, n)
		}
		return nil
	})
}

func eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// logged is what was logged.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), s)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// intake starts an intake that the test closes at its end.
func intake(t *testing.T, o Options) (*Intake, *logged) {
	t.Helper()
	out := &logged{}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(out, nil))
	}
	in := NewIntake(o)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := in.Close(ctx); err != nil && !t.Failed() && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	return in, out
}

// start runs a source until the test ends, or stop is called; stop fails the
// test when the source does not end promptly, and returns its error.
func start(t *testing.T, s Source, in *Intake) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, in) }()
	var (
		once sync.Once
		err  error
	)
	stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(within):
				t.Error("the source did not end when its context did")
			}
		})
		return err
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

// line is an alert as Falco writes it, with its newline.
func line(rule, priority string) string { return sized(rule, priority, 0) }

// sized is an alert of at least n bytes, without its newline when n is exact.
func sized(rule, priority string, n int) string {
	const form = `{"hostname":"node-a","output":"10:21:03.120000001: %s %s%s","output_fields":{"evt.time":1760000000123456789,"container.id":"host"},"priority":"%s","rule":"%s","source":"syscall","tags":[],"time":"2025-10-09T08:53:20.123456789Z"}`
	s := fmt.Sprintf(form, priority, rule, "", priority, rule)
	if missing := n - len(s); missing > 0 {
		s = fmt.Sprintf(form, priority, rule, strings.Repeat("x", missing), priority, rule)
	}
	return s + "\n"
}

func parse(t testing.TB, s string) *alert.Alert {
	t.Helper()
	a, err := alert.Parse([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func arrival(t testing.TB, rule, priority string) Arrival {
	return Arrival{Alert: parse(t, line(rule, priority)), Received: time.Now(), Origin: "fifo"}
}

func equal[T comparable](t *testing.T, what string, got, want []T) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func write(t testing.TB, path, text string, flags int) {
	t.Helper()
	f, err := os.OpenFile(path, flags|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// value is what a counter counts.
func value(m prometheus.Metric) float64 {
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		panic(err)
	}
	return out.GetCounter().GetValue() + out.GetGauge().GetValue()
}
