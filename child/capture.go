package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

const opCapture = "capture-proc"

// Suspect is a process to be captured.
type Suspect struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, as in /proc/PID/stat; 0: any
}

// Capture asks for what /proc shows of processes.
type Capture struct {
	// Suspects come in the order in which they matter.
	Suspects []Suspect `json:"suspects"`
	// Container is the whole id that each one's cgroup has to name; "": any.
	Container string `json:"container,omitempty"`
	// Redact are globs on the names of environment variables whose values are
	// not kept.
	Redact []string `json:"redact,omitempty"`
	// MaxExe is how many bytes of an executable are kept.
	MaxExe int64 `json:"maxExe"`
}

// Captured is how it went.
type Captured struct {
	Processes int `json:"processes"` // of which something was had
	Gone      int `json:"gone"`      // which had ended, or whose number is another's
	Blocked   int `json:"blocked"`   // which did not let all of it be read
}

// Capture has a child read what the kernel shows of the suspects. keep gets each
// piece as it comes, at most max bytes of which are wanted, and note a sentence
// for the manifest. An error of keep ends it. [Died]: the child did not end by
// itself, and what was kept until then is not all.
func (l *Launcher) Capture(ctx context.Context, c Capture, keep func(name string, max int64, r io.Reader) error, note func(string)) (Captured, error) {
	r, err := l.start(ctx, opCapture, c)
	if err != nil {
		return Captured{}, err
	}
	var got Captured
	err = r.pieces(&got, keep, note, nil)
	return got, err
}

// pieces takes what the child hands over, to its end, and its last word into got.
// found is for what a child finds besides; nil: it finds nothing.
func (r *running) pieces(got any, keep func(name string, max int64, r io.Reader) error, note func(string), found func([]byte) error) error {
	done := false
	err := r.read(func(kind byte, payload []byte) (bool, error) {
		switch {
		case kind == framePiece:
			var h pieceHead
			if err := json.Unmarshal(payload, &h); err != nil {
				return false, fmt.Errorf("the child says what is no piece: %w", err)
			}
			p := &piece{r: r}
			if err := keep(h.Name, h.Max, p); err != nil {
				return false, err
			}
			p.drain()
		case kind == frameNote:
			note(string(payload))
		case kind == frameFound && found != nil:
			return false, found(payload)
		case kind == frameDone:
			done = true
			return true, json.Unmarshal(payload, got)
		case kind == frameRefused:
			done = true
			return true, asRefusal(payload)
		default:
			return false, fmt.Errorf("the child says %q", kind)
		}
		return false, nil
	})
	return r.over(done, err)
}

// over ends the child. done says that it has said its last word, err why the
// parent listens no more.
func (r *running) over(done bool, err error) error {
	cut := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || r.ctx.Err() != nil
	wait := reap
	if done {
		wait = linger
	}
	end := r.end(!done && !errors.Is(err, io.EOF), wait)
	switch {
	case done || err != nil && !cut:
		return err // whatever becomes of the child
	case end != nil:
		return end
	}
	return &Died{Why: "the child ended before it was done"}
}

func asRefusal(payload []byte) error {
	no := &Refusal{}
	if err := json.Unmarshal(payload, no); err != nil {
		return fmt.Errorf("the child refuses, and says why in no way that can be read: %w", err)
	}
	return no
}
