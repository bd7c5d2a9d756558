package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	opTake    = "take-file"
	opPutBack = "put-back-file"
)

// Place is a path inside a container.
type Place struct {
	// Container is the whole id, and Suspects its processes: the one that has
	// run for longest says what the container's root is.
	Container string    `json:"container"`
	Suspects  []Suspect `json:"suspects"`
	// Path is absolute, as a process sees that has the container's root.
	Path string `json:"path"`
	// Seen is the process whose path it is; 0: nobody's. It is refused where it
	// has another root than its container.
	Seen Suspect `json:"seen,omitzero"`
}

// File is what a file is besides its content.
type File struct {
	Path   string            `json:"path"`
	Mode   uint32            `json:"mode"` // permissions, with set-id and sticky bits
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Size   int64             `json:"size"`
	Access time.Time         `json:"atime"`
	Modify time.Time         `json:"mtime"`
	Change time.Time         `json:"ctime"`
	Dev    uint64            `json:"dev"`
	Inode  uint64            `json:"inode"`
	Links  uint64            `json:"links"` // how many names it has
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// Same reports whether f is the file that o was, and nobody wrote to it.
func (f File) Same(o File) bool {
	return f.Dev == o.Dev && f.Inode == o.Inode && f.Size == o.Size && f.Modify.Equal(o.Modify) && f.Change.Equal(o.Change)
}

// take is the request of [Launcher.Take].
type take struct {
	Place
	Max int64 `json:"max"`
}

// Take takes a file out of a container. A child opens it and hands it over to
// keep; only when keep has returned without an error, so that what is kept is on
// the disk, is its name removed, and only if it still means the file that was
// kept, unchanged. [Refusal]: it is not taken, and why.
func (l *Launcher) Take(ctx context.Context, p Place, max int64, keep func(f File, content io.Reader) error) (File, error) {
	var f File
	r, err := l.start(ctx, opTake, take{p, max})
	if err != nil {
		return f, err
	}
	done := false
	err = r.read(func(kind byte, payload []byte) (bool, error) {
		switch kind {
		case frameFound:
			if err := json.Unmarshal(payload, &f); err != nil {
				return false, err
			}
			p := &piece{r: r}
			if err := keep(f, p); err != nil {
				return false, err
			}
			if p.drain(); !errors.Is(p.err, io.EOF) {
				return false, p.err
			}
			return false, writeFrame(r.stdin, frameGo, nil)
		case frameDone:
			done = true
			return true, nil
		case frameRefused:
			done = true
			return true, asRefusal(payload)
		}
		return false, fmt.Errorf("the child says %q", kind)
	})
	return f, r.over(done, err)
}

// putBack is the request of [Launcher.PutBack].
type putBack struct {
	Place
	File   File   `json:"file"`
	SHA256 string `json:"sha256"`
}

// PutBack puts a file that was taken back where it was, with all that it was. It
// is there whole or not at all. already says that it is there already;
// [Refusal]: it is not put back, and why.
func (l *Launcher) PutBack(ctx context.Context, p Place, f File, sha256 string, content io.Reader) (already bool, err error) {
	r, err := l.start(ctx, opPutBack, putBack{p, f, sha256})
	if err != nil {
		return false, err
	}
	done := false
	err = r.read(func(kind byte, payload []byte) (bool, error) {
		switch kind {
		case frameFound:
			return false, r.send(content)
		case frameDone:
			done = true
			return true, json.Unmarshal(payload, &already)
		case frameRefused:
			done = true
			return true, asRefusal(payload)
		}
		return false, fmt.Errorf("the child says %q", kind)
	})
	return already, r.over(done, err)
}

// send gives the child all of content.
func (r *running) send(content io.Reader) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := content.Read(buf)
		if n > 0 {
			if werr := writeFrame(r.stdin, frameData, buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return writeFrame(r.stdin, frameEnd, nil)
		}
		if err != nil {
			return fmt.Errorf("read what was kept: %w", err)
		}
	}
}
