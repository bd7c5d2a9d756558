package main

import (
	"net"
	"testing"
	"time"
)

// A silence begins with the first question that nobody answers, not with the
// last one that somebody did: between them nobody knows.
func TestSilent(t *testing.T) {
	t.Parallel()
	b := beat{last: -1}
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-done })
	const answered = 100
	go func() {
		defer close(done)
		every(stop, func() {
			if n := b.ask(); n < answered {
				b.answer(n)
			}
		})
	}()
	b.waitAlive(t, "the other side", 50)
	began := b.silent(t, "the other side")
	b.mu.Lock()
	defer b.mu.Unlock()
	if want := b.sent[answered]; !began.Equal(want) {
		t.Errorf("the silence began %s after the first question without an answer", began.Sub(want))
	}
	if time.Since(began) < quiet {
		t.Errorf("silence was declared after %s, want no sooner than %s", time.Since(began), quiet)
	}
}

// The kernel's own check of a ping: the sum of all its words is 0xffff.
func TestEchoRequest(t *testing.T) {
	t.Parallel()
	for _, n := range []uint64{0, 1, 1 << 40, 1<<64 - 1} {
		b := echoRequest(n)
		var sum uint32
		for i := 0; i < len(b); i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		if sum != 0xffff {
			t.Errorf("echo request %d: the checksum comes to %#x", n, sum)
		}
	}
	if net.ParseIP(attackerIP) == nil {
		t.Errorf("%s is no address", attackerIP)
	}
}
