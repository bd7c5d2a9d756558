//go:build linux

package pipe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/pipe/namedpipe"
)

const (
	// pipeSize is what the FIFO should hold: as much as an unprivileged process
	// may ask for. 64 KiB are the kernel's default.
	pipeSize = 1 << 20
	// pieceSize is how much is parsed before it is handed on.
	pieceSize = 64 << 10
	// lookAgain is how often the FIFO is looked at while something unfinished
	// is in it. Linux tells of every write since 5.14; from 5.5 on it told only
	// of those into an empty pipe.
	lookAgain = 25 * time.Millisecond
	// pathEvery is how often it is made sure that the FIFO is still at its path.
	pathEvery = 10 * time.Second
)

// FIFO reads the named pipe that Falco's file_output writes to.
//
// Bytes leave it only when what they say is stored, or when that has taken
// longer than [Patience]. Until then they are looked at: tee(2) copies what is
// in the FIFO into a scratch pipe, "without consuming any data". So a stoop
// that is killed leaves in the FIFO what it had not stored, as long as somebody
// holds it open ([namedpipe.Hold], systemd, Falco itself).
type FIFO struct {
	path    string // "" when it was handed over
	file    *os.File
	raw     syscall.RawConn // of file
	scratch [2]int          // the two ends of the scratch pipe
	size    int             // bytes that the FIFO holds at most
	null    int             // where bytes go that are not wanted, without being copied
}

// OpenFIFO opens the FIFO at path, and creates it with mode 0600 if nothing is
// there. It is to be called before Falco starts: Falco creates a regular file
// where it finds nothing. The error says what else is at the path and what to
// do.
func OpenFIFO(path string) (*FIFO, error) { return openFIFO(path, pipeSize) }

func openFIFO(path string, size int) (*FIFO, error) {
	file, err := namedpipe.Open(path)
	if err != nil {
		return nil, err
	}
	return newFIFO(path, file, size)
}

// HandedFIFO is the FIFO that systemd handed over (ListenFIFO=), or nil if it
// handed over none. Which it was is not told to the processes that this one
// starts.
func HandedFIFO() (*FIFO, error) {
	var fifo *os.File
	for _, f := range activation.Files(true) {
		info, err := f.Stat()
		if fifo == nil && err == nil && info.Mode()&os.ModeNamedPipe != 0 {
			fifo = f
			continue
		}
		f.Close()
	}
	if fifo == nil {
		return nil, nil
	}
	return FIFOFrom(fifo)
}

// FIFOFrom reads a FIFO that is open already, for reading and writing. It takes
// the file over.
func FIFOFrom(f *os.File) (*FIFO, error) {
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("looking at the FIFO that was handed over: %w", err)
	}
	if err := namedpipe.Check(f.Name(), info); err != nil {
		return nil, err
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("looking at the FIFO that was handed over: %w", err)
	}
	if flags&unix.O_ACCMODE != unix.O_RDWR {
		return nil, fmt.Errorf("the FIFO %s was handed over for reading or writing only, and has to be open for both: systemd's ListenFIFO= does that", f.Name())
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("taking over the FIFO: %w", err)
	}
	// It comes without O_NONBLOCK, and Go's poller takes only files with it.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("taking over the FIFO: %w", err)
	}
	return newFIFO("", os.NewFile(uintptr(fd), f.Name()), pipeSize)
}

// newFIFO takes file over.
func newFIFO(path string, file *os.File, size int) (*FIFO, error) {
	f := &FIFO{path: path, file: file, scratch: [2]int{-1, -1}, null: -1}
	if err := f.prepare(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("preparing to read the FIFO %s: %w", file.Name(), err)
	}
	return f, nil
}

func (f *FIFO) prepare(size int) (err error) {
	if f.raw, err = f.file.SyscallConn(); err != nil {
		return err
	}
	if f.null, err = unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("opening %s: %w", os.DevNull, err)
	}
	if err := unix.Pipe2(f.scratch[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("pipe(2): %w", err)
	}
	return f.control(func(fd int) error {
		// Not allowed to be as large: then it stays as it is. The scratch pipe
		// should show all that the FIFO holds.
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, size)
		if got, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0); err == nil {
			f.size = got
			_, _ = unix.FcntlInt(uintptr(f.scratch[0]), unix.F_SETPIPE_SZ, got)
		}
		return nil
	})
}

// control calls do with the FIFO's descriptor.
func (f *FIFO) control(do func(fd int) error) error {
	var result error
	if err := f.raw.Control(func(fd uintptr) { result = do(int(fd)) }); err != nil {
		return err
	}
	return result
}

// Close lets go of the FIFO. Run does it too.
func (f *FIFO) Close() error {
	for _, fd := range []*int{&f.scratch[0], &f.scratch[1], &f.null} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
	return f.file.Close()
}

// Run reads until ctx ends, then waits [Patience] at most for what it has read
// to be stored; what is not stays in the FIFO. It closes the FIFO.
func (f *FIFO) Run(ctx context.Context, in *Intake) error {
	defer f.Close()
	log := in.log.With("fifo", f.file.Name())
	if err := f.lock(ctx, log); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &peek{
		FIFO:   f,
		log:    log,
		in:     in,
		reader: newReader(broker.OriginFIFO, in),
		buf:    make([]byte, pieceSize),
		marks:  make(chan mark, 64),
	}
	// Ends a wait for more when ctx ends.
	stop := context.AfterFunc(ctx, p.kick)
	defer stop()

	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { p.consume(ctx) })
	if f.path != "" {
		running.Go(func() { f.watchPath(ctx, log) })
	}
	defer close(p.marks)
	if err := p.run(ctx); err != nil {
		return fmt.Errorf("reading the FIFO %s: %w", f.file.Name(), err)
	}
	return nil
}

// lock makes sure that nobody else reads the FIFO in this way: two would
// consume each other's bytes. It waits, because a stoop that is about to end
// may still hold it.
func (f *FIFO) lock(ctx context.Context, log *slog.Logger) error {
	for said := false; ; said = true {
		err := f.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("locking the FIFO %s: %w", f.file.Name(), err)
		}
		if !said {
			log.Warn("another stoop reads this FIFO; waiting for it to end")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// watchPath says when the FIFO is not at its path any more. What Falco has open
// is read on; but a Falco that starts anew opens what is at the path.
func (f *FIFO) watchPath(ctx context.Context, log *slog.Logger) {
	said := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pathEvery):
		}
		now, err := os.Stat(f.path)
		own, ownErr := f.file.Stat()
		gone := ownErr == nil && (err != nil || !os.SameFile(now, own))
		if gone && !said {
			log.Error("the FIFO that is read is not at its path any more: a Falco that starts now writes elsewhere; restart stoop, then Falco",
				"path", f.path)
		}
		said = gone
	}
}

// mark says that the FIFO's next bytes are to be consumed when the ticket is
// settled.
type mark struct {
	bytes  int
	ticket *Ticket // nil: at once
	era    int
}

// peek reads a FIFO without consuming it, in one goroutine, and consumes what is
// stored in a second one.
type peek struct {
	*FIFO
	log    *slog.Logger
	in     *Intake
	reader *reader
	buf    []byte
	marks  chan mark

	held    int  // bytes at the end of seen that no mark covers: of the unfinished line
	spilled int  // bytes of the unfinished line that were consumed, because the FIFO was full of it
	hurry   bool // a read deadline may be set

	mu      sync.Mutex
	seen    int       // bytes at the head of the FIFO that were read and not consumed
	era     int       // counts how often somebody else read from the FIFO
	blocked bool      // there is more in the FIFO than the scratch pipe can show
	full    bool      // the writer can't go on until something is consumed
	failed  error     // of the second goroutine
	behind  time.Time // since when the FIFO is half full whenever it is looked at
}

// kick makes a wait for more return.
func (p *peek) kick() { p.file.SetReadDeadline(time.Unix(1, 0)) }

func (p *peek) run(ctx context.Context) error {
	for {
		if err := p.wait(ctx); err != nil {
			return err
		}
		ended := ctx.Err() != nil // then this is the last look
		fresh, limited, era, err := p.look()
		if err != nil {
			return err
		}
		now := time.Now()
		for fresh > 0 {
			n, err := unix.Read(p.scratch[0], p.buf[:min(len(p.buf), fresh)])
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return fmt.Errorf("reading what tee(2) copied: %w", err)
			}
			fresh -= n
			p.take(p.buf[:n], now, era)
		}
		if ended {
			return nil
		}
		if p.held > 0 {
			if err := p.spill(limited); err != nil {
				return err
			}
		}
	}
}

// take reads a piece that the FIFO holds, and marks what of it is done with.
func (p *peek) take(piece []byte, now time.Time, era int) {
	before := p.reader.lines.pending()
	arrivals := p.reader.read(piece, now)
	left := p.reader.lines.pending()
	if left < before+len(piece) { // a line ended, or is too long and skipped
		p.spilled = 0
	}
	p.held += len(piece)
	done := p.held - (left - p.spilled)
	p.held -= done
	if done == 0 {
		return
	}
	m := mark{bytes: done, era: era}
	if len(arrivals) > 0 {
		m.ticket = p.in.Put(arrivals)
	}
	p.marks <- m
}

// wait returns when there is something in the FIFO that was not seen, when it
// is time to look again, or when ctx ends.
//
// The poller is edge-triggered: it tells of a write once, and bytes that are
// left in the FIFO don't wake it again.
func (p *peek) wait(ctx context.Context) error {
	if p.hurry {
		if err := p.file.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
		p.hurry = false
	}
	var failed error
	err := p.raw.Read(func(fd uintptr) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		if failed = p.failed; failed != nil || ctx.Err() != nil {
			return true
		}
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ) // FIONREAD
		if err != nil {
			failed = fmt.Errorf("asking how much there is to read: %w", err)
			return true
		}
		if n != p.seen && !p.blocked {
			return true
		}
		if p.seen > 0 && !p.hurry {
			p.hurry = true
			failed = p.file.SetReadDeadline(time.Now().Add(lookAgain))
		}
		return failed != nil || ctx.Err() != nil // which may have ended, and kicked, before the deadline was set
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.hurry = true
		p.mu.Lock()
		p.blocked = false
		p.mu.Unlock()
		err = nil
	}
	return errors.Join(err, failed)
}

// look copies what is in the FIFO and was not seen into the scratch pipe, and
// returns how many bytes that is, and whether there was more than that.
func (p *peek) look() (fresh int, limited bool, era int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	err = p.control(func(fd int) error {
		n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		if err != nil {
			return fmt.Errorf("asking how much there is to read: %w", err)
		}
		if n < p.seen {
			p.robbed(n)
		}
		if n == p.seen {
			return nil
		}
		if n < p.size/2 {
			p.behind = time.Time{}
		} else if p.behind.IsZero() {
			p.behind = time.Now()
		}
		copied, err := tee(fd, p.scratch[1])
		if err != nil {
			return fmt.Errorf("tee(2): %w", err)
		}
		limited = copied < n
		if copied <= p.seen {
			p.blocked = true
			return p.discard(p.scratch[0], copied)
		}
		fresh = copied - p.seen
		if err := p.discard(p.scratch[0], p.seen); err != nil {
			return err
		}
		p.seen = copied
		return nil
	})
	return fresh, limited, p.era, err
}

// spill consumes the unfinished line when the FIFO is full of it, so that its
// writer can go on. From then on it is in memory alone. The FIFO is also full
// when there is no more of it to be seen.
func (p *peek) spill(limited bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.control(func(fd int) error {
		if !limited {
			// Full is what takes no more: a pipe counts pages, not bytes.
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			if _, err := unix.Poll(fds, 0); err != nil && err != unix.EINTR {
				return fmt.Errorf("poll(2): %w", err)
			}
			if fds[0].Revents&unix.POLLOUT != 0 {
				return nil
			}
		}
		if p.held != p.seen {
			// Room comes when the lines before it are consumed; but perhaps not
			// enough, if they share a page with it.
			p.full = true
			return nil
		}
		if err := p.discard(fd, p.held); err != nil {
			return err
		}
		p.spilled += p.held
		p.seen, p.held = 0, 0
		p.blocked = false
		return nil
	})
}

// robbed begins anew after somebody else read from the FIFO and left n bytes.
func (p *peek) robbed(n int) {
	p.log.Error("somebody else reads from the FIFO, and the alerts that they take are lost to stoop; `fuser -v` on its path shows who", "bytes", p.seen-n)
	p.era++
	p.seen, p.held, p.spilled = 0, 0, 0
	p.reader.lines.reset()
}

// consume takes bytes out of the FIFO when what they say is stored, or has
// waited long enough. When ctx has ended, it leaves in the FIFO what is not
// stored.
func (p *peek) consume(ctx context.Context) {
	var (
		// A store that answers in time and yet takes less than Falco writes
		// would hold Falco up: half of the intake's memory evens that out. Falco
		// waits when it goes on beyond that, which loses nothing.
		patience = patience{in: p.in, rush: func() bool {
			return ctx.Err() == nil && p.stalled(time.Now()) && p.in.halfEmpty()
		}}
		leave bool
	)
	for m := range p.marks {
		if leave || !patience.wait(m.ticket) && ctx.Err() != nil {
			leave = true
			continue
		}
		p.mu.Lock()
		if m.era == p.era {
			err := p.control(func(fd int) error { return p.discard(fd, m.bytes) })
			if err != nil {
				p.failed = fmt.Errorf("consuming what is stored: %w", err)
				leave = true
			}
			p.seen -= m.bytes
		}
		if p.blocked || p.full || p.failed != nil {
			p.blocked, p.full = false, false
			p.kick()
		}
		p.mu.Unlock()
	}
}

// stalled reports whether the FIFO has been half full, or more, for longer than
// [Patience]: its writer is held up by then, or about to be.
func (p *peek) stalled(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.behind.IsZero() && now.Sub(p.behind) > Patience
}

// discard takes n bytes out of a pipe without copying them.
func (p *peek) discard(fd, n int) error {
	for n > 0 {
		moved, err := unix.Splice(fd, nil, p.null, nil, n, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("splice(2) to %s: %w", os.DevNull, err)
		case moved == 0:
			return errors.New("splice(2): the pipe holds less than was seen in it")
		}
		n -= int(moved)
	}
	return nil
}

// tee copies what one pipe holds into another, as far as there is room.
func tee(from, to int) (int, error) {
	for {
		n, err := unix.Tee(from, to, 1<<30, unix.SPLICE_F_NONBLOCK)
		switch err {
		case nil:
			return int(n), nil
		case unix.EAGAIN:
			return 0, nil
		case unix.EINTR:
		default:
			return 0, err
		}
	}
}
