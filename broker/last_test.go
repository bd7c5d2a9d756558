package broker_test

import (
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
)

// The last alert is the last of Falco's: none that stoop raised itself, no line that
// is none, whichever lane it is in.
func TestLastAlert(t *testing.T) {
	b := brokertest.Open(t, broker.Config{})
	last := func(want string) {
		t.Helper()
		a, err := b.LastAlert(t.Context())
		got := ""
		if a != nil {
			got = a.Alert.Output + " " + string(a.Origin)
		}
		if err != nil || got != want {
			t.Errorf("the last alert is %q, %v, want %q", got, err, want)
		}
	}
	at := func(after time.Duration, priority, output string, origin broker.Origin) broker.Arrival {
		t.Helper()
		a, err := alert.Parse([]byte(`{"priority":"` + priority + `","rule":"Shell","output":"` + output + `","time":"2026-01-02T03:04:05Z"}`))
		if err != nil {
			t.Fatal(err)
		}
		return broker.Arrival{Alert: a, Received: time.Unix(1_780_000_000, 0).Add(after), Origin: origin}
	}
	last("")
	store(t, b, at(0, "Critical", "first", broker.OriginFIFO))
	last("first fifo")
	store(t, b, at(1, "Debug", "second", broker.OriginFile))
	last("second file")
	store(t, b, at(2, "Error", "breaker", broker.OriginStoop), broker.Arrival{Unparsed: []byte("nonsense"), Received: time.Now(), Origin: broker.OriginFIFO})
	last("second file")
	store(t, b, at(3, "Emergency", "third", broker.OriginFIFO))
	last("third fifo")
}
