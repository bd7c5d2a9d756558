// Package brokertest gives a test a running broker in one call.
package brokertest

import (
	"log/slog"
	"testing"

	"stoop/broker"
)

// New is a broker in memory, closed when the test ends.
func New(t testing.TB) *broker.Broker {
	t.Helper()
	return Open(t, broker.Config{})
}

// Open is a broker as configured, closed when the test ends.
func Open(t testing.TB, c broker.Config) *broker.Broker {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	b, err := broker.Open(t.Context(), c)
	if err != nil {
		t.Fatalf("open the broker: %v", err)
	}
	t.Cleanup(b.Close)
	return b
}
