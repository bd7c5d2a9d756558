package child

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// memoryVariable tells a child how much it may allocate.
const memoryVariable = "STOOP_CHILD_MEMORY"

// op is one kind of work. It runs in the child.
type op func(request json.RawMessage, p *parent) error

func ops() map[string]op {
	return map[string]op{
		opCapture: serveCapture,
		opFiles:   serveFiles,
		opTake:    serveTake,
		opPutBack: servePutBack,
	}
}

// Names are the kinds of work that a child can be asked for.
func Names() []string { return []string{opCapture, opFiles, opTake, opPutBack} }

// Main is the child: it does the work of the name and returns the exit code.
func Main(name string, stdin io.Reader, stdout, stderr io.Writer) int {
	return serve(ops(), name, stdin, stdout, stderr)
}

func serve(ops map[string]op, name string, stdin io.Reader, stdout, stderr io.Writer) int {
	if err := serveOp(ops, name, stdin, stdout); err != nil {
		fmt.Fprintf(stderr, "%v\n", err)
		return 1
	}
	return 0
}

func serveOp(ops map[string]op, name string, stdin io.Reader, stdout io.Writer) error {
	do, memory := ops[name], os.Getenv(memoryVariable)
	if do == nil || memory == "" {
		return errors.New("this command is stoop's own: a running stoop starts it")
	}
	most, err := strconv.ParseUint(memory, 10, 64)
	if err != nil {
		return fmt.Errorf("read %s: %w", memoryVariable, err)
	}
	if err := limit(most, fileSize(name)); err != nil {
		return err
	}
	p := &parent{in: newFrameReader(stdin), out: stdout}
	kind, payload, err := p.in.next()
	switch {
	case err != nil:
		return fmt.Errorf("read the request: %w", err)
	case kind != frameRequest:
		return fmt.Errorf("a request is expected, not %q", kind)
	}
	err = do(append(json.RawMessage(nil), payload...), p)
	var no *Refusal
	if errors.As(err, &no) {
		b, merr := json.Marshal(no)
		if merr != nil {
			return merr
		}
		return p.say(frameRefused, b)
	}
	return err
}

// limit has the kernel hold this process to what it may take. The processor's
// time is the parent's to watch.
func limit(memory, file uint64) error {
	// The first to go when memory is short, before stoop. Where the kernel does
	// not let it say so, nothing is lost.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	syscall.Umask(0o077)
	for _, l := range []struct {
		name     string
		resource int
		most     uint64
	}{
		{"core", unix.RLIMIT_CORE, 0}, // what it read would be in it
		{"fsize", unix.RLIMIT_FSIZE, file},
		{"data", unix.RLIMIT_DATA, memory},
		{"nofile", unix.RLIMIT_NOFILE, 1024},
	} {
		if raced && l.resource == unix.RLIMIT_DATA {
			continue
		}
		var now syscall.Rlimit
		if err := syscall.Getrlimit(l.resource, &now); err != nil {
			return fmt.Errorf("read the limit %s: %w", l.name, err)
		}
		n := min(l.most, now.Max)
		if err := syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("set the limit %s to %d: %w", l.name, n, err)
		}
	}
	return nil
}

// fileSize is how large a file a kind of work may write: only one of them writes
// any, and that a file which was taken.
func fileSize(name string) uint64 {
	if name == opPutBack {
		return 1 << 40
	}
	return 0
}

// Refusal is the error of work that a child won't do, and why.
type Refusal struct {
	// Gone says that what it is about is not there; Later, that it may work
	// later.
	Gone   bool   `json:"gone,omitempty"`
	Later  bool   `json:"later,omitempty"`
	Reason string `json:"reason"`
}

func (r *Refusal) Error() string { return r.Reason }

func refuse(format string, args ...any) error { return &Refusal{Reason: fmt.Sprintf(format, args...)} }

func gone(format string, args ...any) error {
	return &Refusal{Gone: true, Reason: fmt.Sprintf(format, args...)}
}

// parent is who a child works for.
type parent struct {
	in  *frameReader
	out io.Writer
}

func (p *parent) say(kind byte, payload []byte) error { return writeFrame(p.out, kind, payload) }

func (p *parent) sayJSON(kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return p.say(kind, b)
}

func (p *parent) note(format string, args ...any) error {
	return p.say(frameNote, fmt.Appendf(nil, format, args...))
}

// piece hands r over as a piece, at most max bytes of it. What is r's fault ends
// the piece; the error returned is that the parent does not listen.
func (p *parent) piece(name string, max int64, r io.Reader) error {
	if err := p.sayJSON(framePiece, pieceHead{name, max}); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	var why string
	for sent := int64(0); sent <= max; {
		n, err := r.Read(buf)
		if n > 0 {
			// One byte beyond the most tells that there is more.
			n = int(min(int64(n), max+1-sent))
			sent += int64(n)
			if err := p.say(frameData, buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			why = err.Error()
			break
		}
	}
	return p.say(frameEnd, []byte(why))
}

// goAhead waits until the parent says that it has what it was given.
func (p *parent) goAhead() error {
	kind, _, err := p.in.next()
	switch {
	case err != nil:
		return errors.New("the parent is gone, or does not want it done")
	case kind != frameGo:
		return fmt.Errorf("the parent says %q", kind)
	}
	return nil
}
