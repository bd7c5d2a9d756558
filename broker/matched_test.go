package broker_test

import (
	"bytes"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
)

func storedAlert(t *testing.T, priority, rule string, n int) (*broker.Stored, *alert.Alert) {
	t.Helper()
	line := fmt.Sprintf(`{"output":"number %d  \u0061%s","priority":%q,"rule":%q,"time":"2026-01-02T03:04:05.%09dZ"}`, n, strings.Repeat("x", 1500), priority, rule, n)
	a, err := alert.Parse([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return &broker.Stored{ID: a.ID, Data: a.Raw, Received: time.Unix(1_800_000_000, int64(n)).UTC(), Origin: broker.OriginFIFO}, a
}

// readKept reads all pages of a stream.
func readKept(t *testing.T, b *broker.Broker, stream string, since time.Time) (all []broker.Kept, pages int) {
	t.Helper()
	for from := uint64(0); ; pages++ {
		p, err := b.Kept(t.Context(), stream, from, since)
		if err != nil {
			t.Fatal(err)
		}
		// As it goes to a client.
		alerts, err := broker.ParseKept(p.Append(nil))
		if err != nil || len(alerts) != len(p.Alerts) {
			t.Fatalf("%d of %d alerts: %v", len(alerts), len(p.Alerts), err)
		}
		all = append(all, alerts...)
		if from = p.Next; from == 0 {
			return all, pages + 1
		}
	}
}

func TestMatchedAlertsAreKept(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, broker.Config{Dir: dir})
	var want []*broker.Stored
	for n := range 2000 { // as many as may wait
		s, a := storedAlert(t, "Warning", "Shell", n)
		want = append(want, s)
		b.KeepMatched(s, a)
	}
	urgent, a := storedAlert(t, "Critical", "Shell", 1)
	b.KeepMatched(urgent, a)
	b.Close() // stores what waits

	b = openStore(t, broker.Config{Dir: dir})
	defer b.Close()
	all, pages := readKept(t, b, broker.StreamMatched, time.Time{})
	if len(all) != len(want) || pages < 2 || b.MatchedLost() != 0 {
		t.Fatalf("%d of %d alerts in %d pages", len(all), len(want), pages)
	}
	for i, k := range all {
		if w := want[i]; k.ID != w.ID || !bytes.Equal(k.Data, w.Data) || !k.Received.Equal(w.Received) || k.Origin != w.Origin {
			t.Fatalf("number %d is %+v, want %+v", i, k, w)
		}
	}
	if all, _ := readKept(t, b, broker.StreamMatchedUrgent, time.Time{}); len(all) != 1 || all[0].ID != urgent.ID {
		t.Errorf("urgent: %+v", all)
	}
	if all, _ := readKept(t, b, broker.StreamMatched, time.Now().Add(time.Hour)); len(all) != 0 {
		t.Errorf("of the future: %d", len(all))
	}
	if _, err := b.Kept(t.Context(), broker.StreamOutcomes, 0, time.Time{}); err == nil {
		t.Error("any stream can be read")
	}
}

// A flood of one rule of Falco's does not push out what the others raised, nor what is
// urgent.
func TestAFloodOfMatchedAlerts(t *testing.T) {
	b := openStore(t, broker.Config{Dir: t.TempDir(), MatchedSize: 1 << 20})
	defer b.Close()
	keep := func(priority, rule string, n int) {
		s, a := storedAlert(t, priority, rule, n)
		for lost := b.MatchedLost(); ; lost = b.MatchedLost() {
			b.KeepMatched(s, a)
			if b.MatchedLost() == lost {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	keep("Critical", "Shell", 0)
	keep("Warning", "Shell", 1)
	for n := range 2000 {
		keep("Warning", "Noise", n)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		all, _ := readKept(t, b, broker.StreamMatched, time.Time{})
		if len(all) == 1+3<<18/8192 && strings.Contains(string(all[len(all)-1].Data), "number 1999 ") {
			if !strings.Contains(string(all[0].Data), "Shell") {
				t.Errorf("the first is %s", all[0].Data)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d are kept", len(all))
		}
	}
	if all, _ := readKept(t, b, broker.StreamMatchedUrgent, time.Time{}); len(all) != 1 {
		t.Errorf("urgent: %d", len(all))
	}
}

// A flood that matches is not kept in full, holds nobody up, and leaves room for what is
// urgent.
func TestTooManyMatchedAlerts(t *testing.T) {
	var told atomic.Int64
	b := openStore(t, broker.Config{Dir: t.TempDir(), Unkept: func() { told.Add(1) }})
	defer b.Close()
	for n := range 10_000 {
		s, a := storedAlert(t, "Warning", "Noise", n)
		b.KeepMatched(s, a)
	}
	lost := b.MatchedLost()
	if lost < 5000 || told.Load() != int64(lost) {
		t.Errorf("%d of 10000 are lost, %d told", lost, told.Load())
	}
	for n := range 100 {
		s, a := storedAlert(t, "Critical", "Shell", n)
		b.KeepMatched(s, a)
	}
	if more := b.MatchedLost() - lost; more > 0 {
		t.Errorf("%d urgent ones are lost", more)
	}
}

// What there is no room for is counted and nobody waits: in memory none is kept.
func TestMatchedAlertsThatAreNotKept(t *testing.T) {
	b := openStore(t, broker.Config{})
	defer b.Close()
	s, a := storedAlert(t, "Warning", "Shell", 1)
	b.KeepMatched(s, a)
	if n := b.MatchedLost(); n != 1 {
		t.Errorf("%d are counted", n)
	}
	if all, _ := readKept(t, b, broker.StreamMatched, time.Time{}); len(all) != 0 {
		t.Errorf("%d are kept", len(all))
	}
}

func TestParseKeptRefusesWhatIsNone(t *testing.T) {
	for _, text := range []string{"x", "a 1 fifo 5\nab", "a 1 fifo -1\n\n", "a x fifo 1\na\n", "a 1 fifo 9999999999999999999\na\n", "a 1 1\na\n", "a 1 fifo 2\nab"} {
		if all, err := broker.ParseKept([]byte(text)); err == nil {
			t.Errorf("%q is %+v", text, all)
		}
	}
}

// Lines that are no alerts lie among them, and no rule is tried on them.
func TestLinesThatAreNoAlertsAreNotKept(t *testing.T) {
	b := openStore(t, broker.Config{Dir: t.TempDir()})
	defer b.Close()
	a := arrival(t, 1, "Warning")
	store(t, b, broker.Arrival{Unparsed: []byte("garbage"), Received: time.Now(), Origin: broker.OriginFIFO}, a)
	all, _ := readKept(t, b, broker.StreamAlerts, time.Time{})
	if len(all) != 1 || all[0].ID != a.Alert.ID {
		t.Errorf("%+v is kept, want the alert alone", all)
	}
}
