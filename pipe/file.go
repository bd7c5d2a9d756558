//go:build unix

package pipe

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"stoop/broker"
)

const (
	// headSize is how much of a file's beginning tells it from another one.
	headSize = 1024
	// pollEvery is how often the file is looked at when nothing tells of its
	// changes; with inotify it is only for what that misses (network file
	// systems, an overflow).
	pollEvery = 500 * time.Millisecond
	// saveEvery is how often the offset is written down, at most.
	saveEvery = 200 * time.Millisecond
)

// File follows a regular file that Falco appends to: from where it stood when
// what it read was last stored, through truncation and through rotation by
// renaming. The first time it begins at the file's beginning.
//
// The file itself is the buffer, so a slow store loses nothing: it is waited
// for.
//
// The libraries that follow files (nxadm/tail, hpcloud/tail and their forks)
// keep no offset over a restart, know no acknowledgement, and have had no
// release since 2023; what is needed here is less than what they do.
type File struct {
	path  string
	state string // the file that holds the offset

	log    *slog.Logger
	in     *Intake
	reader *reader
	file   *os.File
	at     place
	read   int64 // how far file was read; at.Offset is how far that is stored
	marks  []fileMark
	saved  place
	savedT time.Time
}

// place is where reading stands, and in which file.
type place struct {
	Path   string `json:"path"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Head   string `json:"head"` // the SHA-256 of the file's first Length bytes
	Length int    `json:"length"`
	Offset int64  `json:"offset"`
}

// fileMark says that what was read up to end is stored when ticket is settled.
type fileMark struct {
	end    int64
	ticket *Ticket
}

// OpenFile follows the file at path, which need not be there yet, and
// remembers in the folder data how far it got.
func OpenFile(path, data string) (*File, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("following %s: %w", path, err)
	}
	if info, err := os.Stat(abs); err == nil {
		if err := checkRegular(path, info); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(data, 0o700); err != nil {
		return nil, fmt.Errorf("following %s: the folder for its offset: %w", path, err)
	}
	sum := sha256.Sum256([]byte(abs))
	return &File{path: abs, state: filepath.Join(data, "offset-"+hex.EncodeToString(sum[:6])+".json")}, nil
}

func checkRegular(path string, info os.FileInfo) error {
	switch {
	case info.Mode().IsRegular():
		return nil
	case info.Mode()&fs.ModeNamedPipe != 0:
		return fmt.Errorf("%s is a FIFO, which can't be followed as a file: read it with --pipe %s", path, path)
	}
	return fmt.Errorf("%s is no regular file", path)
}

// Run follows the file until ctx ends.
func (f *File) Run(ctx context.Context, in *Intake) error {
	f.in, f.log = in, in.log.With("file", f.path)
	f.reader = newReader(broker.OriginFile, in)
	changes := f.watch()
	defer changes.close()
	defer func() {
		f.settle()
		f.save(true)
		if f.file != nil {
			f.file.Close()
		}
	}()
	if err := f.resume(); err != nil {
		return err
	}
	buf := make([]byte, pieceSize)
	for ctx.Err() == nil {
		more, err := f.step(ctx, buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("following %s: %w", f.path, err)
		}
		f.settle()
		f.save(false)
		if !more {
			f.idle(ctx, changes)
		}
	}
	return nil
}

// idle waits until the file may have changed, or what was read of it is stored.
func (f *File) idle(ctx context.Context, changes *changes) {
	var stored <-chan struct{}
	if len(f.marks) > 0 {
		stored = f.marks[0].ticket.Done()
	}
	every := pollEvery
	if f.at != f.saved {
		every = saveEvery
	}
	timer := time.NewTimer(every)
	defer timer.Stop()
	select {
	case <-changes.c:
	case <-stored:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// resume opens the file where reading stood, which may have been renamed since.
func (f *File) resume() error {
	raw, err := os.ReadFile(f.state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading how far %s was read: %w", f.path, err)
	}
	var at place
	if err := json.Unmarshal(raw, &at); err != nil || at.Path != f.path || at.Offset < 0 || at.Length < 0 || at.Length > headSize {
		f.log.Warn("the remembered offset can't be read; the file is read from its beginning", "state", f.state, "error", err)
		return nil
	}
	candidates := []string{f.path}
	entries, _ := os.ReadDir(filepath.Dir(f.path)) // without them the path itself is tried
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			if _, inode := identity(info); inode == at.Inode {
				candidates = append(candidates, filepath.Join(filepath.Dir(f.path), e.Name()))
			}
		}
	}
	for _, path := range candidates {
		file, err := os.Open(path)
		if err != nil {
			continue
		}
		info, err := file.Stat()
		if err == nil && info.Mode().IsRegular() && info.Size() >= at.Offset && at.is(file, info) {
			f.file, f.at, f.saved, f.read = file, at, at, at.Offset
			return nil
		}
		file.Close()
	}
	f.log.Warn("the file that was followed is gone or was truncated; what is there now is read from its beginning", "offset", at.Offset)
	return nil
}

// step reads the next piece and reports whether there may be more at once.
func (f *File) step(ctx context.Context, buf []byte) (more bool, err error) {
	if f.file == nil {
		if ok, err := f.open(); !ok {
			return false, err
		}
	}
	n, err := f.file.ReadAt(buf, f.read)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if n > 0 {
		// Looked at again after reading, so that nothing is taken for the
		// continuation of a file that it does not continue.
		info, err := f.file.Stat()
		if err != nil {
			return false, err
		}
		if info.Size() < f.read || !f.at.is(f.file, info) {
			return true, f.truncated()
		}
		f.at.learn(f.file)
		return true, f.take(ctx, buf[:n])
	}
	return f.ended()
}

// open opens what is at the path, from its beginning.
func (f *File) open() (bool, error) {
	file, err := os.Open(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	info, err := file.Stat()
	if err == nil {
		err = checkRegular(f.path, info)
	}
	if err != nil {
		file.Close()
		return false, err
	}
	f.file, f.read = file, 0
	f.at = place{Path: f.path}
	f.at.Device, f.at.Inode = identity(info)
	f.at.learn(file)
	return true, nil
}

// ended is at the end of the file: of one that is appended to, that was
// truncated, or that was renamed.
func (f *File) ended() (more bool, err error) {
	info, err := f.file.Stat()
	if err != nil {
		return false, err
	}
	if info.Size() < f.read {
		return true, f.truncated()
	}
	now, err := os.Stat(f.path)
	if err != nil || os.SameFile(now, info) || now.Size() == 0 {
		// Not renamed; or Falco, which keeps its file open until SIGUSR1, still
		// writes to the old one.
		return false, nil
	}
	if info.Size() > f.read { // written while we looked
		return true, nil
	}
	for _, m := range f.marks { // the old file's offset is forgotten
		select {
		case <-m.ticket.Done():
		default:
			return false, nil
		}
	}
	f.in.Put(f.reader.end(time.Now())) // a line that its writer never ended
	f.log.Info("the file was rotated; following the new one")
	f.marks = nil
	f.file.Close()
	f.file = nil
	return true, nil
}

// truncated begins the same file anew.
func (f *File) truncated() error {
	f.log.Info("the file was truncated; reading it from its beginning", "offset", f.read)
	f.reader.lines.reset()
	f.marks = nil
	f.file.Close()
	f.file = nil
	return nil
}

func (f *File) take(ctx context.Context, piece []byte) error {
	arrivals := f.reader.read(piece, time.Now())
	f.read += int64(len(piece))
	t, err := f.in.PutKept(ctx, arrivals)
	if err != nil {
		return err
	}
	f.marks = append(f.marks, fileMark{f.read - int64(f.reader.lines.pending()), t})
	for len(f.marks) > 1 && f.read-f.marks[0].end > window {
		if !f.marks[0].ticket.wait(ctx) {
			return ctx.Err()
		}
		f.settle()
	}
	return nil
}

// settle moves the offset over what is stored.
func (f *File) settle() {
	for len(f.marks) > 0 && f.marks[0].ticket.settled() {
		f.at.Offset = f.marks[0].end
		f.marks = f.marks[1:]
	}
}

// save writes the offset down: into a new file that then takes the place of the
// old one, so that there is a whole one at any time.
func (f *File) save(now bool) {
	if f.file == nil || f.at == f.saved || !now && time.Since(f.savedT) < saveEvery {
		return
	}
	raw, err := json.Marshal(f.at)
	if err == nil {
		if err = os.WriteFile(f.state+".new", raw, 0o600); err == nil {
			err = os.Rename(f.state+".new", f.state)
		}
	}
	if err != nil {
		// It is tried again; until then a restart reads some alerts twice.
		f.log.Warn("the offset can't be written down", "error", err)
	}
	f.saved, f.savedT = f.at, time.Now()
}

// is reports whether the file is the one of the place.
func (p *place) is(file *os.File, info os.FileInfo) bool {
	device, inode := identity(info)
	if device != p.Device || inode != p.Inode {
		return false
	}
	head := make([]byte, p.Length)
	if _, err := file.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	return p.Length == 0 || p.Head == hash(head)
}

// learn remembers more of the beginning of a file that has grown.
func (p *place) learn(file *os.File) {
	if p.Length == headSize {
		return
	}
	head := make([]byte, headSize)
	n, err := file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) || n <= p.Length {
		return
	}
	p.Head, p.Length = hash(head[:n]), n
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func identity(info os.FileInfo) (device, inode uint64) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Dev), st.Ino
	}
	return 0, 0
}

// changes tells that something happened to the file.
type changes struct {
	c       chan struct{} // holds one token
	watcher *fsnotify.Watcher
	done    chan struct{}
}

// watch watches the file's folder, so that it hears of a new file as well.
// Without that the file is looked at every [pollEvery].
func (f *File) watch() *changes {
	c := &changes{c: make(chan struct{}, 1), done: make(chan struct{})}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		if err = w.Add(filepath.Dir(f.path)); err != nil {
			w.Close()
		}
	}
	if err != nil {
		f.log.Warn("nothing tells of the file's changes; it is looked at from time to time", "every", pollEvery, "error", err)
		close(c.done)
		return c
	}
	c.watcher = w
	go func() {
		defer close(c.done)
		for {
			select {
			case e, ok := <-w.Events:
				if !ok {
					return
				}
				// Falco may write to the file under its old name for a while.
				if strings.HasPrefix(e.Name, f.path) {
					signal(c.c)
				}
			case _, ok := <-w.Errors: // an overflow: look
				if !ok {
					return
				}
				signal(c.c)
			}
		}
	}()
	return c
}

func (c *changes) close() {
	if c.watcher != nil {
		c.watcher.Close()
	}
	<-c.done
}
