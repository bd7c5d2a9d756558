package responders

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"stoop/node"
	"stoop/node/nodetest"
)

// TestSuspect is a conformance.Suspect, which tests of this package can't name:
// the suite imports it.
type TestSuspect struct {
	Container string
	PID       int
	Start     int64
	Fields    map[string]any
	New       func(Env) Responder
	Remove    func()
	Effects   func() int
	Done      func()
	Undone    func()
}

// removed ends a container: its process and its cgroup.
func removed(t testing.TB, dir string, pid int) {
	t.Helper()
	_ = syscall.Kill(pid, syscall.SIGKILL)
	nodetest.Wait(t, "the container to be gone", func() bool {
		err := os.Remove(dir)
		return err == nil || errors.Is(err, os.ErrNotExist)
	})
}

// OnNetwork is what cut-network and block-address act on: a container with a
// connection to somebody.
func OnNetwork(tb testing.TB) *TestSuspect {
	t := tb.(*testing.T)
	t.Helper()
	// The last cleanup of all, when the link is gone: what stands on the host for
	// it would stay in the kernel until the next cut.
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := node.New(node.Config{}).Sweep(ctx); err != nil {
			t.Errorf("sweep: %v", err)
		}
	})
	inside, remote := nodetest.Netns(t), nodetest.Netns(t)
	dir := nodetest.CgroupV2(t)
	cmd := exec.Command("/bin/sleep", "1000")
	nodetest.Start(t, nodetest.In{Cgroups: []string{dir}, Netns: inside}, cmd)
	in, _ := nodetest.Bridge(t, inside, remote)
	conn := dialled(t, inside, remote, in.Host)
	off := func() bool { return !reaches(t, inside, remote, in.Host) }
	return &TestSuspect{
		Container: filepath.Base(dir),
		Fields:    map[string]any{"fd.name": fmt.Sprintf("%s->%s", conn.LocalAddr(), conn.RemoteAddr()), "fd.l4proto": "tcp"},
		Remove:    func() { removed(t, dir, cmd.Process.Pid) },
		Effects: func() int {
			for range 3 { // a datagram may be lost for other reasons
				if !off() {
					return 0
				}
			}
			return 1
		},
		Done: func() {
			if !off() {
				t.Error("the container reaches the other side")
			}
		},
		Undone: func() {
			// Asked for a neighbour in vain, the kernel asks again a second later.
			nodetest.Wait(t, "the container to reach the other side", func() bool { return !off() })
		},
	}
}

// WithFile is what quarantine-file acts on.
func WithFile(t testing.TB) *TestSuspect {
	c := startContainer(t)
	path := c.write("tmp/dropped", "evil", 0o750)
	return &TestSuspect{
		Container: c.ID,
		Fields:    map[string]any{"fd.name": "/tmp/dropped"},
		Remove:    func() { removed(t, c.Path, c.pid) },
		Effects: func() int {
			if exists(path) {
				return 0
			}
			return 1
		},
		Done: func() {
			if exists(path) {
				t.Error("the file is there")
			}
		},
		Undone: func() {
			if b, err := os.ReadFile(path); string(b) != "evil" {
				t.Errorf("the file holds %q: %v", b, err)
			}
		},
	}
}

// AUser is whom lock-user locks, in an /etc of the test's own.
func AUser(t testing.TB) *TestSuspect {
	const before = password + ":19000:0:99999:7:::"
	w := newUserWorld(t.(*testing.T), before)
	line := func() string { return w.line(t.(*testing.T)) }
	return &TestSuspect{
		Fields: w.alert,
		New:    func(Env) Responder { return w.userLocker },
		Effects: func() int {
			if line() != before {
				return 1
			}
			return 0
		},
		Done: func() {
			if line() == before {
				t.Error("the user is not locked")
			}
		},
		Undone: func() {
			if now := line(); now != before {
				t.Errorf("the user is %s, and was %s", now, before)
			}
		},
	}
}
