//go:build unix

package pipe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
)

// window is how many bytes of standard input may be read ahead of the store.
const window = 1 << 20

// Stdin reads alerts until the end of its file, as in `falco | stoop run
// --stdin`, and ends when all of them are stored.
//
// The other end of a pipe, which may be Falco, is held up by a slow store for
// [Patience] and no longer. A regular file can wait, and loses nothing.
type Stdin struct {
	file *os.File
}

// NewStdin reads from f, which may be a pipe, a terminal, a regular file or
// anything else that can be read. It is not closed.
func NewStdin(f *os.File) *Stdin { return &Stdin{f} }

// Run reads until the end of the file, or until ctx ends.
func (s *Stdin) Run(ctx context.Context, in *Intake) error {
	info, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("looking at standard input: %w", err)
	}
	input, err := newInterruptible(ctx, s.file)
	if err != nil {
		return fmt.Errorf("reading standard input: %w", err)
	}
	defer input.close()

	w := &readAhead{in: in, canWait: info.Mode().IsRegular(), patience: patience{in: in}}
	r := newReader(broker.OriginStdin, in)
	buf := make([]byte, pieceSize)
	for {
		n, err := input.read(buf)
		if n > 0 {
			if err := w.put(ctx, r.read(buf[:n], time.Now()), n); err != nil {
				return nil // ctx has ended
			}
		}
		if errors.Is(err, io.EOF) {
			if err := w.put(ctx, r.end(time.Now()), 0); err != nil {
				return nil
			}
			w.finish(ctx)
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading standard input: %w", err)
		}
	}
}

// readAhead puts what was read, and waits when too much of it is not stored.
type readAhead struct {
	in       *Intake
	canWait  bool // the source need not go on while the store doesn't
	patience patience
	open     []ahead
	bytes    int       // of open
	late     []*Ticket // waited for in vain
}

type ahead struct {
	ticket *Ticket
	bytes  int
}

func (w *readAhead) put(ctx context.Context, arrivals []Arrival, bytes int) error {
	if len(arrivals) == 0 {
		return nil
	}
	var t *Ticket
	if w.canWait {
		var err error
		if t, err = w.in.PutKept(ctx, arrivals); err != nil {
			return err
		}
	} else {
		t = w.in.Put(arrivals)
	}
	w.open = append(w.open, ahead{t, bytes})
	w.bytes += bytes
	for len(w.late) > 0 && w.late[0].settled() {
		w.late = w.late[1:]
	}
	for len(w.open) > 0 {
		first := w.open[0]
		switch {
		case first.ticket.settled():
		case w.bytes <= window:
			return nil
		case w.canWait:
			if !first.ticket.wait(ctx) {
				return ctx.Err()
			}
		case !w.patience.wait(first.ticket):
			w.late = append(w.late, first.ticket)
		}
		w.bytes -= first.bytes
		w.open = w.open[1:]
	}
	return nil
}

// finish waits until all that was put is settled, or ctx ends.
func (w *readAhead) finish(ctx context.Context) {
	for _, t := range w.late {
		if !t.wait(ctx) {
			return
		}
	}
	for _, a := range w.open {
		if !a.ticket.wait(ctx) {
			return
		}
	}
}

// interruptible reads from any kind of file until ctx ends. It asks poll(2)
// whether there is something to read, and so need not make the file
// non-blocking, which would change it for whoever else has it open: a terminal
// for the shell, for instance.
type interruptible struct {
	ctx  context.Context
	fd   int
	wake [2]int // a pipe that is written to when ctx ends
	stop func() bool
	done chan struct{}
}

func newInterruptible(ctx context.Context, f *os.File) (*interruptible, error) {
	r := &interruptible{ctx: ctx, fd: int(f.Fd()), done: make(chan struct{})}
	if err := unix.Pipe(r.wake[:]); err != nil {
		return nil, fmt.Errorf("pipe(2): %w", err)
	}
	unix.CloseOnExec(r.wake[0])
	unix.CloseOnExec(r.wake[1])
	r.stop = context.AfterFunc(ctx, func() {
		defer close(r.done)
		_, _ = unix.Write(r.wake[1], []byte{0})
	})
	return r, nil
}

func (r *interruptible) read(buf []byte) (int, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}, {Fd: int32(r.wake[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil {
			if err == unix.EINTR {
				continue
			}
			return 0, fmt.Errorf("poll(2): %w", err)
		}
		if r.ctx.Err() != nil {
			return 0, r.ctx.Err()
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(r.fd, buf)
		switch {
		case err == unix.EINTR, err == unix.EAGAIN:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (r *interruptible) close() {
	if !r.stop() {
		<-r.done
	}
	unix.Close(r.wake[0])
	unix.Close(r.wake[1])
}
