package pipe

import "bytes"

// DefaultMaxLine is how long a line may be, in bytes without its newline.
// Falco sets no limit; audit events reach 256 KiB.
const DefaultMaxLine = 1 << 20

// lines puts lines together from pieces of any size. Every byte is looked at
// once, however small the pieces are.
type lines struct {
	max      int
	part     []byte // of the unfinished line
	skipping bool   // the unfinished line is too long; what comes of it is dropped
	length   int    // of the unfinished line
}

// feed takes the next piece and calls line for every line that it ends,
// without its newline; the slice is valid during the call. A line longer than
// max is not kept: overlong is called with its length when its end is found.
func (l *lines) feed(piece []byte, line func([]byte), overlong func(length int)) {
	for len(piece) > 0 {
		end := bytes.IndexByte(piece, '\n')
		if end < 0 {
			l.add(piece)
			return
		}
		switch {
		case l.length == 0 && end <= l.max:
			line(piece[:end])
		default:
			l.add(piece[:end])
			l.finish(line, overlong)
		}
		piece = piece[end+1:]
	}
}

// finish ends the unfinished line, if there is one, as a newline would.
func (l *lines) finish(line func([]byte), overlong func(length int)) {
	switch {
	case l.skipping:
		overlong(l.length)
	case l.length > 0:
		line(l.part)
	}
	l.reset()
}

func (l *lines) add(piece []byte) {
	l.length += len(piece)
	switch {
	case l.skipping:
	case l.length > l.max:
		l.skipping = true
		l.part = nil
	default:
		l.part = append(l.part, piece...)
	}
}

func (l *lines) reset() {
	l.length, l.skipping = 0, false
	// A long line's memory is not kept for the short ones that follow.
	if cap(l.part) > 64<<10 {
		l.part = nil
	}
	l.part = l.part[:0]
}

// pending is how many bytes of the unfinished line are kept.
func (l *lines) pending() int { return len(l.part) }
