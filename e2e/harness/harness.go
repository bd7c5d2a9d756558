// Package harness is what the end-to-end tests and the bench share: what they
// need of a test, processes that never outlive it, and waiting with a deadline.
//
// It stands outside an alert's way and looks at both its ends.
package harness

import (
	"context"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// T is the part of [testing.TB] that the harness uses. The bench, which is no
// test, brings its own.
type T interface {
	Helper()
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	TempDir() string
	Context() context.Context
	Failed() bool
}

var _ T = testing.TB(nil)

// Nap sleeps for as little as it is told to: time.Sleep takes a millisecond where
// the kernel's timers are coarse. It holds a thread meanwhile.
func Nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // woken early: the caller looks early
}

// Eventually calls ok every interval until it reports true, and fails t with
// what ok says it still waits for when that takes longer than within.
func Eventually(t T, within, interval time.Duration, ok func() (done bool, waitingFor string)) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		done, waitingFor := ok()
		if done {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s still waiting for %s", within, waitingFor)
		}
		select {
		case <-time.After(interval):
		case <-t.Context().Done():
			t.Fatalf("interrupted while waiting for %s", waitingFor)
		}
	}
}

// FreePort is a TCP port on 127.0.0.1 that nothing listened on a moment ago.
func FreePort(t T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("find a free port: %v", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Loopback is the address of a port on 127.0.0.1.
func Loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
