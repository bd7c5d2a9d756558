// Package child touches what is a suspect's: its entries in /proc, and files in
// its container's root. It stands beside an alert's way, under the responders
// that keep evidence.
//
// A suspect can make each of these reads hang (a page of its memory that a file
// system of its own answers for) or grow without end, so that they are made by a
// process of their own, which has little memory, writes no file, and can be
// killed at any moment with no harm done: this program once more, as "stoop
// child NAME". What it reads it hands over its standard output, piece by piece;
// keeping it is the parent's business.
package child

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Launcher starts children.
type Launcher struct {
	// Path and Args are this program, and what makes it a child.
	Path string
	Args []string
	// Memory is how much a child may allocate, in bytes.
	Memory uint64
	// Started is told of each child, so that what it raises as alerts is known to
	// be stoop's own; it returns what is called when the child has ended.
	Started func(pid int) (ended func())

	slots chan struct{}
	left  atomic.Int64 // children that were left behind
}

const (
	// atOnce is how many children there are at work, and leftMost how many may
	// have been left behind: with more of them none is started.
	atOnce   = 4
	leftMost = 16
	// memory is enough for the program itself, which is some 30 MiB, and for
	// what it reads, which is never whole in it.
	memory = 192 << 20
	// reap is how long a killed child is waited for, linger one that was done.
	reap   = 2 * time.Second
	linger = 200 * time.Millisecond
	// stderrMost is how much of what a child says of its end is kept.
	stderrMost = 4 << 10
)

// New is a launcher of this very program, also where its file was replaced
// meanwhile.
func New() *Launcher {
	return &Launcher{Path: "/proc/self/exe", Args: []string{"child"}, Memory: memory, slots: make(chan struct{}, atOnce)}
}

// Died is the error of a child that did not end by itself.
type Died struct {
	Why  string
	Said string // on its standard error, the beginning
}

func (e *Died) Error() string {
	if e.Said != "" {
		return e.Why + ": " + e.Said
	}
	return e.Why
}

// running is a child at work.
type running struct {
	ctx    context.Context
	cmd    *exec.Cmd
	stdin  *os.File
	stdout *os.File
	frames *frameReader
	stderr *head
	ended  chan error  // what Wait says
	off    func() bool // the context ends nothing any more
	gone   atomic.Bool // it ended, or was left behind
	leave  func()
}

// start begins a child with its request. The caller ends it by [running.end].
func (l *Launcher) start(ctx context.Context, name string, request any) (*running, error) {
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("start a child for %s: %d are at work already: %w", name, cap(l.slots), ctx.Err())
	}
	if n := l.left.Load(); n >= leftMost {
		<-l.slots
		return nil, fmt.Errorf("start a child for %s: %d earlier ones wait for something of their suspects' and can't be ended; they go with those", name, n)
	}
	release := sync.OnceFunc(func() { <-l.slots })
	r, err := l.launch(ctx, name, release)
	if err != nil {
		release()
		return nil, fmt.Errorf("start a child for %s: %w", name, err)
	}
	b, err := json.Marshal(request)
	if err == nil {
		err = writeFrame(r.stdin, frameRequest, b)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tell the child for %s what to do: %w", name, err), r.end(true, reap))
	}
	return r, nil
}

func (l *Launcher) launch(ctx context.Context, name string, release func()) (*running, error) {
	var files []*os.File
	closeAll := func() {
		for _, f := range files {
			_ = f.Close()
		}
	}
	pipe := func() (r, w *os.File, err error) {
		r, w, err = os.Pipe()
		if err == nil {
			files = append(files, r, w)
		}
		return r, w, err
	}
	inR, inW, err := pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := pipe()
	if err != nil {
		closeAll()
		return nil, err
	}
	r := &running{ctx: ctx, stdin: inW, stdout: outR, frames: newFrameReader(outR), stderr: &head{}, ended: make(chan error, 1)}
	r.cmd = exec.Command(l.Path, append(append([]string{}, l.Args...), name)...)
	r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = inR, outW, r.stderr
	r.cmd.Dir = "/"
	// Nothing of stoop's own environment, in which secrets may be. The runtime
	// collects its garbage long before the limit.
	r.cmd.Env = []string{fmt.Sprintf("GOMEMLIMIT=%d", l.Memory/2), fmt.Sprintf("%s=%d", memoryVariable, l.Memory), "GOTRACEBACK=none"}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	r.cmd.WaitDelay = reap
	r.leave = func() {
		if !r.gone.Swap(true) {
			l.left.Add(1)
			release()
		}
	}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the *thread* that started the child
		// ends, so that the thread stays here for as long as the child lives.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := r.cmd.Start(); err != nil {
			started <- err
			return
		}
		ended := func() {}
		if l.Started != nil {
			ended = l.Started(r.cmd.Process.Pid)
		}
		started <- nil // now it may be told what to do
		err := r.cmd.Wait()
		ended()
		r.ended <- err
		release()
		if r.gone.Swap(true) {
			l.left.Add(-1)
		}
	}()
	err = <-started
	_, _ = inR.Close(), outW.Close()
	if err != nil {
		closeAll()
		return nil, err
	}
	// When time is over the child is killed, and whatever waits for it to say or
	// take something is let go.
	r.off = context.AfterFunc(ctx, func() {
		r.kill()
		soon := time.Now().Add(reap / 4)
		_, _ = outR.SetReadDeadline(soon), inW.SetWriteDeadline(soon)
	})
	return r, nil
}

// kill does nothing to a child that has ended: it goes by pidfd.
func (r *running) kill() { _ = r.cmd.Process.Kill() }

// end waits for the child, but no longer than wait: it was done, or nobody wants to
// hear more of it. kill ends it first. nil: it ended well.
//
// A read of a suspect's may be one that the kernel doesn't let anybody out of.
// Such a child is left behind, dead in all but name, until the suspect is.
func (r *running) end(kill bool, wait time.Duration) error {
	_ = r.stdin.Close()
	defer r.stdout.Close()
	defer r.off()
	if kill {
		r.kill()
	}
	late := time.NewTimer(wait)
	defer late.Stop()
	select {
	case err := <-r.ended:
		return r.why(err)
	case <-late.C:
		r.kill()
		r.leave()
		return errLeft
	}
}

// errLeft is the error of a child that does not even end when it is killed.
var errLeft = &Died{Why: "the child does not end, not even when it is killed: the kernel waits for something of the suspect's"}

func (r *running) why(err error) error {
	if err == nil {
		return nil
	}
	d := &Died{Why: "the child ended: " + err.Error(), Said: r.stderr.String()}
	var exit *exec.ExitError
	switch {
	case errors.Is(r.ctx.Err(), context.DeadlineExceeded):
		d.Why = "the child was killed: its time was over"
	case r.ctx.Err() != nil:
		d.Why = "the child was killed: stoop is being stopped"
	case strings.Contains(d.Said, "out of memory"), strings.Contains(d.Said, "cannot allocate memory"):
		d.Why, d.Said = "the child reached its limit of memory", ""
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			d.Why = fmt.Sprintf("the child was killed by %v", ws.Signal())
		}
	}
	return d
}

// head keeps the beginning of what is written to it.
type head struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (h *head) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.buf.Write(b[:min(len(b), max(0, stderrMost-h.buf.Len()))])
	return len(b), nil
}

func (h *head) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.TrimSpace(h.buf.String())
}

// read takes frames until f has had the last one (it then reports true), or the
// child is gone.
func (r *running) read(f func(kind byte, payload []byte) (done bool, err error)) error {
	for {
		kind, payload, err := r.frames.next()
		if err != nil {
			return err
		}
		if done, err := f(kind, payload); done || err != nil {
			return err
		}
	}
}

// piece is the content of the piece that has just begun, to its end.
type piece struct {
	r    *running
	done bool
	err  error
	rest []byte
}

func (p *piece) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.done {
			return 0, p.err
		}
		kind, payload, err := p.r.frames.next()
		switch {
		case err != nil:
			p.done, p.err = true, errors.New("the child did not get to the end of it")
		case kind == frameData:
			p.rest = payload
		case kind == frameEnd:
			p.done, p.err = true, io.EOF
			if len(payload) > 0 {
				p.err = errors.New(string(payload))
			}
		default:
			p.done, p.err = true, fmt.Errorf("the child says %q in the middle of a piece", kind)
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// drain reads what is left of the piece.
func (p *piece) drain() {
	for !p.done {
		p.rest = nil
		_, _ = p.Read(nil)
	}
}
