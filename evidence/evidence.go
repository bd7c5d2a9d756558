// Package evidence keeps what was found of a suspect: one folder a case, with a
// manifest of what is in it and the SHA-256 of each piece. Responders that keep
// something write here, so that limits, permissions and hashes are the same for
// all; an alert's way touches it beside the chain, never in front of an act.
package evidence

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config is where evidence is kept and how much of it.
type Config struct {
	Dir string // made if missing, mode 0700
	// Size is how many bytes of the disk all of it may take, every file counted
	// in whole blocks of 4 KiB; what exceeds it is not kept, and the manifest
	// says so. 0: no limit.
	Size int64
	// PerTarget is how many cases of one target a responder may keep: the first
	// ones, which saw the least of what the answers changed. 0: no limit.
	PerTarget int
	// Age is how old a case gets, from its end, before [Store.Run] takes it away;
	// 0: as old as it likes.
	Age time.Duration
	// Needed reports whether taking a step back would need its case, which then
	// stays however old it is; nil: none is needed.
	Needed func(step string) bool
	// Bucket is where [Store.Run] copies every finished case to; nil: nowhere.
	// Then a case is only taken away when the bucket has it.
	Bucket Bucket
	// Node begins the names in the bucket, which many nodes may share.
	Node       string
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil: nothing is counted
}

// Errors of [Store.Begin] that say that nothing more is to be kept: no fault,
// and no reason for a chain to stop.
var (
	// ErrFull says that all evidence together takes as much as it may.
	ErrFull = errors.New("the evidence store is full")
	// ErrEnough says that the target has as many cases as are kept of one.
	ErrEnough = errors.New("enough evidence of this target is kept")
)

// ErrNoCase says that there is no case of a step.
var ErrNoCase = errors.New("there is no evidence of this step")

// Store is the folder of all cases. One process writes to it at a time; others
// may read.
type Store struct {
	cfg  Config
	root *os.Root

	mu    sync.Mutex
	used  int64             // bytes, in blocks
	cases map[string]string // step → key of its target
	kept  map[string]int    // key of a target → its cases
	open  map[string]bool   // the steps whose cases are being filled
	// ended are the cases that nobody fills, with when they were finished, or begun;
	// pending those that are finished and that the bucket does not have.
	ended   map[string]time.Time
	pending map[string]*upload

	wake                  chan struct{} // a token when there is something to upload
	retryFirst, retryMost time.Duration
	metrics               *metrics
}

// About is what a case is of; its strings may be an attacker's, so none of them
// becomes a path.
type About struct {
	Step      string `json:"step"` // the step's id: names the folder, and a second case of one step continues the first
	Alert     string `json:"alert"`
	Rule      string `json:"rule"`
	Responder string `json:"responder"`
	Target    string `json:"target"` // what the limit per target counts by
}

func (a About) key() string { return a.Responder + "\x00" + a.Target }

// isStep reports whether a step's id may be the name of a folder.
func isStep(id string) bool {
	for i := range len(id) {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '-' || c == '_'):
		default:
			return false
		}
	}
	return id != "" && len(id) <= 128
}

// Open makes the folder, and takes stock of what an earlier process left.
func Open(c Config) (*Store, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the evidence folder: %w", err)
	}
	info, err := os.Lstat(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("look at the evidence folder: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is to hold evidence and is no folder (a symbolic link is not followed)", c.Dir)
	}
	if info.Mode().Perm() != 0o700 {
		c.Log.Warn("the evidence folder was open to others; it is closed now", "dir", c.Dir, "mode", info.Mode().Perm().String())
		if err := os.Chmod(c.Dir, 0o700); err != nil {
			return nil, fmt.Errorf("close the evidence folder to others: %w", err)
		}
	}
	root, err := os.OpenRoot(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the evidence folder: %w", err)
	}
	s := &Store{
		cfg: c, root: root, open: map[string]bool{},
		wake: make(chan struct{}, 1), retryFirst: retryFirst, retryMost: retryMost,
	}
	s.metrics = newMetrics(s, c.Registerer)
	if err := s.takeStock(); err != nil {
		root.Close()
		return nil, err
	}
	return s, nil
}

// Close lets go of the folder. Cases that are still being filled stay
// unfinished.
func (s *Store) Close() error { return s.root.Close() }

// takeStock counts what is in the folder. Somebody may have taken cases away.
func (s *Store) takeStock() error {
	used, cases, kept := int64(0), map[string]string{}, map[string]int{}
	ended, pending := map[string]time.Time{}, map[string]*upload{}
	steps, err := s.steps()
	if err != nil {
		return err
	}
	for _, step := range steps {
		n, err := s.sizeOf(step)
		if err != nil {
			return err
		}
		used += n
		m, err := s.manifest(step)
		if err != nil {
			// Its size counts; whose it is, nobody knows any more.
			s.cfg.Log.Warn("a case of evidence has no manifest that can be read", "step", step, "error", err)
			cases[step] = ""
			continue
		}
		cases[step] = m.key()
		kept[m.key()]++
		switch {
		case !m.Finished():
			// It may be that nobody ever does.
			ended[step] = m.Begun
			continue
		case s.cfg.Bucket != nil && !s.uploaded(step):
			pending[step] = s.pending[step]
			if pending[step] == nil {
				pending[step] = &upload{}
			}
		}
		ended[step] = m.Ended
	}
	s.used, s.cases, s.kept, s.ended, s.pending = used, cases, kept, ended, pending
	return nil
}

// steps are the ids of all cases.
func (s *Store) steps() ([]string, error) {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("list the evidence folder: %w", err)
	}
	var steps []string
	for _, e := range entries {
		if e.IsDir() && isStep(e.Name()) {
			steps = append(steps, e.Name())
		}
	}
	return steps, nil
}

func (s *Store) sizeOf(step string) (int64, error) {
	entries, err := fs.ReadDir(s.root.FS(), step)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("list the evidence of step %s: %w", step, err)
	}
	var n int64
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			n += blocks(info.Size())
		}
	}
	return n, nil
}

const block = 4096

// blocks is what n bytes take on a disk.
func blocks(n int64) int64 {
	return (n + block - 1) / block * block
}

// take sets up to n more bytes, in blocks, aside, and returns how many there was
// room for.
func (s *Store) take(n int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n = blocks(n); s.cfg.Size > 0 {
		n = max(0, min(n, (s.cfg.Size-s.used)/block*block))
	}
	s.used += n
	return n
}

// count corrects what is in use by n, room or not.
func (s *Store) count(n int64) {
	s.mu.Lock()
	s.used += n
	s.mu.Unlock()
}

// Used is how many bytes all evidence takes.
func (s *Store) Used() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

// Begin opens the case of a step, or the one that an earlier run of it left: a
// finished one says so in its manifest, and of one that was cut off the pieces
// that are there stay. [ErrFull] and [ErrEnough] say that none is kept.
func (s *Store) Begin(ctx context.Context, a About) (*Case, error) {
	if !isStep(a.Step) {
		return nil, fmt.Errorf("a step's id of %d characters names no folder of evidence", len(a.Step))
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("begin the evidence of step %s: %w", a.Step, err)
	}
	if err := s.admit(a); err != nil {
		return nil, err
	}
	c := &Case{store: s, about: a, m: Manifest{Version: manifestVersion, About: a, Begun: time.Now().UTC()}}
	if err := c.start(ctx); err != nil {
		s.mu.Lock()
		delete(s.open, a.Step)
		s.mu.Unlock()
		return nil, fmt.Errorf("begin the evidence of step %s: %w", a.Step, err)
	}
	return c, nil
}

// admit says whether a case may be begun, and counts it.
func (s *Store) admit(a About) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[a.Step] {
		return fmt.Errorf("the evidence of step %s is being written already", a.Step)
	}
	if _, there := s.cases[a.Step]; !there {
		why := s.full(a)
		if why != nil && len(s.open) == 0 {
			// Somebody may have made room meanwhile.
			if err := s.takeStock(); err != nil {
				return err
			}
			why = s.full(a)
		}
		if why != nil {
			return why
		}
		s.cases[a.Step] = a.key()
		s.kept[a.key()]++
	}
	s.open[a.Step] = true
	return nil
}

func (s *Store) full(a About) error {
	switch {
	case s.cfg.Size > 0 && s.used+2*block > s.cfg.Size: // a manifest and anything at all
		return fmt.Errorf("%w: %d of %d bytes; take cases away from %s, or raise evidence.size", ErrFull, s.used, s.cfg.Size, s.cfg.Dir)
	case s.cfg.PerTarget > 0 && s.kept[a.key()] >= s.cfg.PerTarget:
		return fmt.Errorf("%w: the first %d cases", ErrEnough, s.cfg.PerTarget)
	}
	return nil
}

// leave says that nobody fills a case any more; gone, that its folder is no
// more.
func (s *Store) leave(step string, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, step)
	if !gone {
		return
	}
	delete(s.ended, step)
	delete(s.pending, step)
	if key, there := s.cases[step]; there {
		delete(s.cases, step)
		if s.kept[key]--; s.kept[key] <= 0 {
			delete(s.kept, key)
		}
	}
}

// Remove takes a case away for good. One that is being filled stays.
func (s *Store) Remove(step string) error {
	s.mu.Lock()
	_, there := s.cases[step]
	busy := s.open[step]
	if there && !busy {
		s.open[step] = true
	}
	s.mu.Unlock()
	switch {
	case !there:
		return fmt.Errorf("step %s: %w", step, ErrNoCase)
	case busy:
		return fmt.Errorf("the evidence of step %s is being written", step)
	}
	return s.remove(step)
}

func (s *Store) remove(step string) error {
	size, err := s.sizeOf(step)
	if err == nil {
		err = s.root.RemoveAll(step)
	}
	if err != nil {
		s.leave(step, false)
		return fmt.Errorf("remove the evidence of step %s: %w", step, err)
	}
	s.count(-size)
	s.leave(step, true)
	return nil
}

// syncDir makes what was done to the names in a folder outlive a lost machine.
func (s *Store) syncDir(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// fileName is a piece's name as one path element: what is no letter, digit, dot,
// dash or underscore becomes %XX, so that two names never become one.
func fileName(name string) string {
	const most = 160
	var b strings.Builder
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	switch s := b.String(); {
	case s == "":
		return "%00"
	case s == manifestName:
		return "%6Danifest.json"
	case len(s) > most:
		return s[:most-20] + "%" + shortHash(name)
	default:
		return s
	}
}

// path is where a file of a case is, below the store's folder.
func path(step, file string) string { return filepath.Join(step, file) }
