package evidence

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	manifestName    = "manifest.json"
	manifestVersion = 1
	// partial begins the name of a file that is being written. No piece's name
	// begins with a dot.
	partial = ".part-"
	// uploadedName is the file that says that the bucket has the case. It is no
	// piece.
	uploadedName = ".uploaded"
	// notesMost and piecesMost bound a manifest.
	notesMost  = 200
	piecesMost = 10_000
)

// Manifest is what a case's manifest.json says.
type Manifest struct {
	Version int `json:"version"`
	About
	Begun time.Time `json:"begun"`
	Ended time.Time `json:"ended,omitzero"` // zero: it was never finished
	// Pieces are the files, in the order in which they came.
	Pieces []Piece `json:"pieces"`
	// Notes are sentences on what is not there, and why.
	Notes []string `json:"notes,omitempty"`
}

// Finished reports whether all that was to be kept has been dealt with.
func (m Manifest) Finished() bool { return !m.Ended.IsZero() }

// Piece finds a piece by the name that it is listed under.
func (m Manifest) Piece(name string) (Piece, bool) {
	for _, p := range m.Pieces {
		if p.Name == name {
			return p, true
		}
	}
	return Piece{}, false
}

// Piece is one file of a case.
type Piece struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256,omitempty"` // "": there is no file
	Cut    bool   `json:"cut,omitempty"`    // there was more
	Error  string `json:"error,omitempty"`  // why it is not whole, or not there
	// Earlier says that a run which was cut off had written it, and that its
	// hash is the one it had when the next run found it.
	Earlier bool `json:"earlier,omitempty"`
}

// Whole reports whether all there was is in the piece.
func (p Piece) Whole() bool { return p.SHA256 != "" && !p.Cut && p.Error == "" }

// Case is a folder being filled, by one goroutine at a time.
type Case struct {
	store  *Store
	about  About
	m      Manifest
	was    bool // it was finished before, and is as it was
	size   int64
	unsafe []string // files that are not known to be on the disk
	sum    string
	over   bool
}

// start makes the folder, or takes up what is in it.
func (c *Case) start(ctx context.Context) error {
	root, step := c.store.root, c.about.Step
	err := root.Mkdir(step, 0o700)
	switch {
	case errors.Is(err, fs.ErrExist):
		return c.resume(ctx)
	case err != nil:
		c.store.leave(step, true)
		return err
	}
	if err := c.write(false); err != nil {
		if rerr := c.store.remove(step); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return nil
}

// resume takes up the case that an earlier run left.
func (c *Case) resume(ctx context.Context) error {
	root, step := c.store.root, c.about.Step
	if info, err := root.Lstat(step); err != nil || !info.IsDir() {
		return fmt.Errorf("what is at %s is no folder: %w", step, errors.Join(err, fs.ErrInvalid))
	}
	old, err := c.store.manifest(step)
	switch {
	case err == nil && old.Finished():
		c.m, c.was = old, true
		if _, c.sum, err = c.store.hash(ctx, step, manifestName); err != nil {
			return err
		}
	case err == nil:
		c.m.Begun, c.m.Pieces, c.m.Notes = old.Begun, old.Pieces, old.Notes
	default:
		c.Note("the manifest of an earlier run can't be read (%v)", err)
	}
	entries, err := fs.ReadDir(root.FS(), step)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if name == manifestName || name == uploadedName {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(name, partial) || !info.Mode().IsRegular():
			if err := root.RemoveAll(path(step, name)); err != nil {
				return err
			}
			c.store.count(-blocks(info.Size()))
		case !c.was:
			// It has its own name, so it was written to its end.
			p := Piece{Name: name, Earlier: true}
			if p.Size, p.SHA256, err = c.store.hash(ctx, step, name); err != nil {
				return err
			}
			c.put(p)
			c.unsafe = append(c.unsafe, name)
		}
	}
	if !c.was {
		c.Note("an earlier run was cut off; this one began at %s", time.Now().UTC().Format(time.RFC3339Nano))
	}
	c.size, err = c.store.manifestSize(step)
	return err
}

// Path is the case's folder.
func (c *Case) Path() string { return filepath.Join(c.store.cfg.Dir, c.about.Step) }

// Manifest is what is known of the case by now.
func (c *Case) Manifest() Manifest {
	m := c.m
	m.Pieces, m.Notes = slices.Clone(m.Pieces), slices.Clone(m.Notes)
	return m
}

// WasFinished reports whether an earlier run had finished the case, and nothing was
// changed in it since: it was closed, and stoop ended before it could note that the
// step was done.
func (c *Case) WasFinished() bool { return c.was }

// Note adds a sentence to the manifest.
func (c *Case) Note(format string, args ...any) {
	c.was = false
	switch n := len(c.m.Notes); {
	case n < notesMost:
		c.m.Notes = append(c.m.Notes, fmt.Sprintf(format, args...))
	case n == notesMost:
		c.m.Notes = append(c.m.Notes, "there were more notes than are kept")
	}
}

// Add keeps a piece read from r, at most max bytes of it (below 0: all), under
// name (one path element; anything else in it is escaped). What did not fit is
// said in the manifest. It is hashed as it is read, never held whole in memory.
//
// That r fails, or that there is no room, is the piece's Error and not the
// returned one: what could be read is kept. The returned error is the store's
// own, or the context's. An earlier piece of the name is replaced, unless
// nothing came from r.
func (c *Case) Add(ctx context.Context, name string, r io.Reader, max int64) (Piece, error) {
	p := Piece{Name: fileName(name)}
	switch {
	case c.over:
		return p, fmt.Errorf("the evidence of step %s is closed", c.about.Step)
	case len(c.m.Pieces) >= piecesMost:
		c.Note("pieces beyond %d are not kept", piecesMost)
		return p, fmt.Errorf("the evidence of step %s has %d pieces already, no more are kept", c.about.Step, piecesMost)
	}
	c.was = false
	err := c.add(ctx, &p, r, max)
	if err != nil {
		p.Error = err.Error()
		err = fmt.Errorf("keep %s of step %s: %w", p.Name, c.about.Step, err)
	}
	if old, ok := c.m.Piece(p.Name); ok && p.Size == 0 && p.Error != "" && old.SHA256 != "" {
		c.Note("%s is an earlier run's: now it could not be had (%s)", p.Name, p.Error)
		return p, err
	}
	c.put(p)
	return p, err
}

// Drop takes a piece away again: what came was not what it was taken for.
func (c *Case) Drop(name string) error {
	i := slices.IndexFunc(c.m.Pieces, func(p Piece) bool { return p.Name == name })
	if i < 0 || c.over {
		return fmt.Errorf("the evidence of step %s has no piece %.100q to take away", c.about.Step, name)
	}
	c.was = false
	p := c.m.Pieces[i]
	c.m.Pieces = slices.Delete(c.m.Pieces, i, i+1)
	if p.SHA256 == "" {
		return nil
	}
	if err := c.store.root.Remove(path(c.about.Step, p.Name)); err != nil {
		return fmt.Errorf("take %s of step %s away: %w", p.Name, c.about.Step, err)
	}
	c.unsafe = slices.DeleteFunc(c.unsafe, func(n string) bool { return n == p.Name })
	c.store.count(-blocks(p.Size))
	return nil
}

// Doubt marks a piece as not whole, and says why.
func (c *Case) Doubt(name, why string) {
	c.was = false
	for i := range c.m.Pieces {
		if p := &c.m.Pieces[i]; p.Name == name && p.Error == "" {
			p.Error = why
		} else if p.Name == name {
			p.Error += "; " + why
		}
	}
}

// put lists a piece, in the place of one of its name.
func (c *Case) put(p Piece) {
	if i := slices.IndexFunc(c.m.Pieces, func(o Piece) bool { return o.Name == p.Name }); i >= 0 {
		c.m.Pieces[i] = p
		return
	}
	c.m.Pieces = append(c.m.Pieces, p)
}

func (c *Case) add(ctx context.Context, p *Piece, r io.Reader, max int64) (err error) {
	root, temp, file := c.store.root, path(c.about.Step, partial+p.Name), path(c.about.Step, p.Name)
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := &writer{ctx: ctx, store: c.store, to: f, max: max, hash: sha256.New()}
	err = w.copy(r, p)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	p.Size = w.n
	if w.n == 0 && (p.Error != "" || err != nil) {
		// Nothing of it: no file, and none that an earlier run left is lost.
		c.store.count(-w.granted)
		return errors.Join(err, root.Remove(temp))
	}
	c.store.count(blocks(w.n) - w.granted)
	var before int64
	if info, serr := root.Lstat(file); serr == nil {
		before = blocks(info.Size())
	}
	if rerr := root.Rename(temp, file); rerr != nil {
		return errors.Join(err, rerr)
	}
	c.store.count(-before)
	p.SHA256 = hex.EncodeToString(w.hash.Sum(nil))
	c.unsafe = append(c.unsafe, p.Name)
	return err
}

// writer writes as much as the piece and the store may take.
type writer struct {
	ctx     context.Context
	store   *Store
	to      io.Writer
	max     int64
	hash    hash.Hash
	n       int64 // written
	granted int64 // set aside for it in the store
}

// copy reads r to its end. What is r's fault, or the limits', goes into p; what
// is the store's is returned.
func (w *writer) copy(r io.Reader, p *Piece) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for idle := 0; ; {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(*buf)
		if n > 0 {
			idle = 0
			fits := w.fits(int64(n))
			if fits < int64(n) {
				p.Cut = true
				if w.max < 0 || w.n+fits < w.max {
					p.Error = fmt.Sprintf("%v (%d bytes)", ErrFull, w.store.cfg.Size)
				}
			}
			if werr := w.write((*buf)[:fits]); werr != nil {
				p.Cut = true
				return werr
			}
			if p.Cut {
				return nil
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			p.Error = err.Error()
			return nil
		case n == 0:
			if idle++; idle > 100 {
				p.Error = io.ErrNoProgress.Error()
				return nil
			}
		}
	}
}

// fits is how many of n more bytes may be written.
func (w *writer) fits(n int64) int64 {
	if w.max >= 0 {
		n = min(n, w.max-w.n)
	}
	if more := blocks(w.n+n) - w.granted; more > 0 {
		w.granted += w.store.take(more)
	}
	return min(n, w.granted-w.n)
}

func (w *writer) write(b []byte) error {
	n, err := w.to.Write(b)
	w.hash.Write(b[:n])
	w.n += int64(n)
	return err
}

// buffers are what pieces pass through.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// Close writes the manifest, synced, after every piece that it names. The case
// can be read from then on.
func (c *Case) Close() error {
	if c.over {
		return nil
	}
	c.over = true
	if c.was {
		c.store.leave(c.about.Step, false)
		return nil
	}
	c.m.Ended = time.Now().UTC()
	err := c.sync()
	if err == nil {
		// A bucket may have it as it was before.
		err = c.store.forgetUpload(c.about.Step)
	}
	if err == nil {
		err = c.write(true)
	}
	c.store.leave(c.about.Step, false)
	if err != nil {
		return fmt.Errorf("close the evidence of step %s: %w", c.about.Step, err)
	}
	c.store.finished(c.m)
	return nil
}

// Discard takes the case away: there was nothing to keep.
func (c *Case) Discard() error {
	if c.over {
		return nil
	}
	c.over = true
	return c.store.remove(c.about.Step)
}

// Sum is the SHA-256 of the manifest that [Case.Close] wrote: whoever keeps it
// elsewhere can tell later that no piece was changed since.
func (c *Case) Sum() string { return c.sum }

// sync has every piece on the disk before a manifest says that it is there.
func (c *Case) sync() error {
	// At once, since the file system then writes its journal once for many.
	const at = 8
	slices.Sort(c.unsafe)
	names, errs := make(chan string), make([]error, at)
	var all sync.WaitGroup
	for i := range at {
		all.Go(func() {
			for name := range names {
				if err := c.syncFile(name); err != nil {
					errs[i] = err
				}
			}
		})
	}
	for _, name := range slices.Compact(c.unsafe) {
		names <- name
	}
	close(names)
	all.Wait()
	c.unsafe = nil
	return errors.Join(append(errs, c.store.syncDir(c.about.Step))...)
}

func (c *Case) syncFile(name string) error {
	f, err := c.store.root.Open(path(c.about.Step, name))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// write puts the manifest in its place at once, so that there is never half of
// one. It is written whatever the limit says: it tells what is not there.
func (c *Case) write(synced bool) error {
	b, err := json.MarshalIndent(c.m, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	root, temp, file := c.store.root, path(c.about.Step, partial+manifestName), path(c.about.Step, manifestName)
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && synced {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, root.Remove(temp))
	}
	if err := root.Rename(temp, file); err != nil {
		return err
	}
	size := blocks(int64(len(b)))
	c.store.count(size - c.size)
	c.size = size
	sum := sha256.Sum256(b)
	c.sum = hex.EncodeToString(sum[:])
	if !synced {
		return nil
	}
	return errors.Join(c.store.syncDir(c.about.Step), c.store.syncDir("."))
}
