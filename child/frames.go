package child

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// What parent and child say to each other: a letter, the length of what follows
// in four bytes, and that.
const (
	frameRequest = 'Q' // to the child: the request, JSON
	frameGo      = 'G' // to the child: do it
	framePiece   = 'P' // a piece begins, JSON [pieceHead]
	frameData    = 'D' // some of it; to the child too
	frameEnd     = 'E' // it ends; why it is not whole, if so
	frameNote    = 'N' // a sentence for the manifest
	frameFound   = 'F' // what was found, JSON; the child then waits for frameGo
	frameDone    = 'Z' // all is done, JSON
	frameRefused = 'R' // it is not done, and why: [refusal]
)

// frameMost is the largest frame.
const frameMost = 1 << 20

type pieceHead struct {
	Name string `json:"name"`
	Max  int64  `json:"max"`
}

func writeFrame(w io.Writer, kind byte, payload []byte) error {
	if len(payload) > frameMost {
		return fmt.Errorf("a frame of %d bytes is too large", len(payload))
	}
	// In one write: whoever is killed in between leaves no half a head.
	b := make([]byte, 0, 5+len(payload))
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	_, err := w.Write(append(b, payload...))
	return err
}

// frameReader reads frames; what it returns holds until the next one.
type frameReader struct {
	r   *bufio.Reader
	buf []byte
}

func newFrameReader(r io.Reader) *frameReader { return &frameReader{r: bufio.NewReaderSize(r, 64<<10)} }

func (f *frameReader) next() (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint32(head[1:]))
	if n > frameMost {
		return 0, nil, fmt.Errorf("a frame of %d bytes is too large", n)
	}
	if cap(f.buf) < n {
		f.buf = make([]byte, n)
	}
	payload = f.buf[:n]
	if _, err := io.ReadFull(f.r, payload); err != nil {
		return 0, nil, err
	}
	return head[0], payload, nil
}
