package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test program is the child, and the suspects, too.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "child" {
		all := ops()
		all["hog"], all["hang"], all["crash"], all["write"], all["environment"], all["silent"] = hog, hang, crash, write, environment, silent
		os.Exit(serve(all, os.Args[2], os.Stdin, os.Stdout, os.Stderr))
	}
	if len(os.Args) > 2 && os.Args[1] == "suspect" {
		os.Exit(suspect(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func hog(_ json.RawMessage, p *parent) error {
	if err := p.piece("before", 10, strings.NewReader("before")); err != nil {
		return err
	}
	var all [][]byte
	for range 1024 {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
	}
	return p.sayJSON(frameDone, Captured{Processes: len(all)})
}

func hang(_ json.RawMessage, p *parent) error {
	if err := p.sayJSON(framePiece, pieceHead{"half", 1 << 20}); err != nil {
		return err
	}
	if err := p.say(frameData, []byte("half of it")); err != nil {
		return err
	}
	time.Sleep(time.Hour)
	return nil
}

func crash(json.RawMessage, *parent) error { panic("the child crashes") }

func silent(json.RawMessage, *parent) error { return nil }

func write(_ json.RawMessage, p *parent) error {
	f, err := os.CreateTemp("", "stoop-child-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.WriteString("x"); !errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("a child wrote a file (%v)", err)
	}
	return p.sayJSON(frameDone, Captured{})
}

func environment(_ json.RawMessage, p *parent) error {
	if err := p.note("%s", strings.Join(os.Environ(), " ")); err != nil {
		return err
	}
	return p.sayJSON(frameDone, Captured{})
}

// do has a child do a kind of work of the tests' own.
func do(ctx context.Context, t testing.TB, l *Launcher, name string) (pieces map[string]string, notes []string, err error) {
	t.Helper()
	pieces = map[string]string{}
	r, err := l.start(ctx, name, struct{}{})
	if err != nil {
		return nil, nil, err
	}
	err = r.pieces(&Captured{}, func(name string, _ int64, content io.Reader) error {
		b, err := io.ReadAll(content)
		pieces[name] = string(b)
		if err != nil {
			pieces[name] += "!" + err.Error()
		}
		return nil
	}, func(n string) { notes = append(notes, n) }, nil)
	return pieces, notes, err
}

// A child that hangs is killed when its time is over, and what it had said by
// then is there.
func TestAChildIsKilledAtItsDeadline(t *testing.T) {
	l := New()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	began := time.Now()
	pieces, _, err := do(ctx, t, l, "hang")
	var died *Died
	if !errors.As(err, &died) || !strings.Contains(died.Why, "its time was over") {
		t.Errorf("error %v", err)
	}
	if got := pieces["half"]; got != "half of it!the child did not get to the end of it" {
		t.Errorf("the piece is %q", got)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s", took)
	}
	if n := len(l.slots); n != 0 {
		t.Errorf("%d slots are taken", n)
	}
}

func TestAChildEndsWhenStoopIsStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	_, _, err := do(ctx, t, New(), "hang")
	if err == nil || !strings.Contains(err.Error(), "stoop is being stopped") {
		t.Errorf("error %v", err)
	}
}

func TestAChildHasLittleMemory(t *testing.T) {
	if raced {
		t.Skip("built with -race, which needs more memory than a child may have")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	pieces, _, err := do(ctx, t, New(), "hog")
	var died *Died
	if !errors.As(err, &died) || !strings.Contains(died.Why, "memory") || pieces["before"] != "before" {
		t.Errorf("pieces %q, error %v", pieces, err)
	}
}

func TestAChildThatCrashes(t *testing.T) {
	_, _, err := do(t.Context(), t, New(), "crash")
	var died *Died
	if !errors.As(err, &died) || !strings.Contains(died.Said, "the child crashes") {
		t.Errorf("error %v", err)
	}
	if _, _, err := do(t.Context(), t, New(), "silent"); !errors.As(err, &died) {
		t.Errorf("a child that ends without a word: %v", err)
	}
	if _, _, err := do(t.Context(), t, New(), "no-such-work"); !errors.As(err, &died) {
		t.Errorf("a child that knows nothing: %v", err)
	}
	if _, _, err := do(t.Context(), t, &Launcher{Path: "/nonexistent", slots: make(chan struct{}, 1)}, "crash"); err == nil || errors.As(err, &died) {
		t.Errorf("a program that is not there: %v", err)
	}
}

func TestAChildWritesNoFile(t *testing.T) {
	if _, _, err := do(t.Context(), t, New(), "write"); err != nil {
		t.Error(err)
	}
}

// Nothing of stoop's environment gets to it.
func TestAChildsEnvironment(t *testing.T) {
	t.Setenv("STOOP_TEST_SECRET", "hunter2")
	_, notes, err := do(t.Context(), t, New(), "environment")
	if err != nil || len(notes) != 1 || strings.Contains(notes[0], "hunter2") || !strings.HasPrefix(notes[0], "GOMEMLIMIT=") {
		t.Errorf("environment %q, error %v", notes, err)
	}
}

// A child does not outlive its parent, nor the thread that started it.
func TestAChildDiesWithItsParent(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "suspect", "parent")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "%d\n", &pid); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(poll, 5000); err != nil || n != 1 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		t.Errorf("the child lives on: %d, %v", n, err)
	}
}

func TestChildrenAreCounted(t *testing.T) {
	l := New()
	ctx, cancel := context.WithCancel(t.Context())
	var all []*running
	for range atOnce {
		r, err := l.start(ctx, "hang", struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	short, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if _, err := l.start(short, "hang", struct{}{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more child: %v", err)
	}
	l.left.Store(leftMost)
	<-l.slots
	if _, err := l.start(t.Context(), "hang", struct{}{}); err == nil || !strings.Contains(err.Error(), "can't be ended") || len(l.slots) != atOnce-1 {
		t.Errorf("with many left behind: %v, %d slots taken", err, len(l.slots))
	}
	l.slots <- struct{}{}
	cancel()
	for _, r := range all {
		if err := r.end(true, reap); err == nil {
			t.Error("a child that hung ended well")
		}
	}
	if len(l.slots) != 0 {
		t.Errorf("%d slots are taken", len(l.slots))
	}
}

// Whoever runs the hidden command by hand is told.
func TestMainIsForStoopOnly(t *testing.T) {
	var said strings.Builder
	if code := Main(opCapture, strings.NewReader(""), io.Discard, &said); code != 1 || !strings.Contains(said.String(), "stoop's own") {
		t.Errorf("exit code %d: %s", code, said.String())
	}
}
