package cli

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// systemd is the end of the notification socket that systemd has.
type systemd struct {
	path string
	mu   sync.Mutex
	said []string
}

func listenSystemd(t *testing.T) *systemd {
	t.Helper()
	s := &systemd{path: filepath.Join(t.TempDir(), "notify")}
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := ln.Read(buf)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.said = append(s.said, string(buf[:n]))
			s.mu.Unlock()
		}
	}()
	return s
}

// count is how many of the messages hold text.
func (s *systemd) count(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, m := range s.said {
		if strings.Contains(m, text) {
			n++
		}
	}
	return n
}

func (s *systemd) await(t *testing.T, text string, n int) {
	t.Helper()
	for end := time.Now().Add(patience); s.count(text) < n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("systemd did not hear %q %d times: %q", text, n, s.said)
		}
	}
}

// The real program tells systemd when it is ready, what it is doing, that it
// lives, and why it ends.
func TestTellsSystemd(t *testing.T) {
	s := listenSystemd(t)
	dir := t.TempDir()
	rules := filepath.Join(dir, "rules.yaml")
	write(t, rules, "rules:\n  - name: a\n    match: {priority: debug}\n    actions:\n      - file: {path: "+dir+"/a}\n")
	stoop := func(args ...string) *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Args = append([]string{"stoop"}, args...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+s.path, "WATCHDOG_USEC=300000")
		cmd.Stderr = t.Output()
		return cmd
	}
	run := stoop("run", "--rules", rules, "--data", filepath.Join(dir, "data"), "--pipe", filepath.Join(dir, "falco.pipe"), "--node", "node-1")
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- run.Wait() }()
	defer func() { _ = run.Process.Kill() }()
	s.await(t, "READY=1", 1)
	s.await(t, "STATUS=mode audit; 1 rules", 1)
	s.await(t, "WATCHDOG=1", 3)
	if err := stoop("pause", "--data", filepath.Join(dir, "data")).Run(); err != nil {
		t.Fatal(err)
	}
	s.await(t, "; paused by ", 1)
	write(t, rules, "rules: nonsense\n")
	s.await(t, "the rules file is wrong", 1)
	if err := run.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.await(t, "STOPPING=1", 1)
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
	if err := stoop("run", "--rules", filepath.Join(dir, "missing.yaml"), "--data", filepath.Join(dir, "data")).Run(); err == nil {
		t.Error("it runs without rules")
	}
	s.await(t, "STATUS=", 4)
	s.await(t, "missing.yaml", 1)
}

// One that is stuck feeds no watchdog, and one that goes on does again.
func TestWatchdogIsFedByTheLiving(t *testing.T) {
	s := listenSystemd(t)
	t.Setenv("NOTIFY_SOCKET", s.path)
	t.Setenv("WATCHDOG_USEC", "30000")
	var mu sync.Mutex
	var stuck error
	asked := 0
	live := func() error {
		mu.Lock()
		defer mu.Unlock()
		asked++
		return stuck
	}
	set := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		stuck, asked = err, 0
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); notifySystemd(ctx, func() string { return "fine" }, live) }()
	defer func() { cancel(); <-done }()
	s.await(t, "WATCHDOG=1", 3)
	set(errors.New("stuck"))
	before := s.count("WATCHDOG=1") // and perhaps one on its way
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		mu.Lock()
		n := asked
		mu.Unlock()
		if n >= 10 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("it is not asked whether it lives")
		}
	}
	if n := s.count("WATCHDOG=1") - before; n > 1 {
		t.Errorf("the watchdog was fed %d times by one that is stuck", n)
	}
	set(nil)
	s.await(t, "WATCHDOG=1", before+3)
}
