package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

const (
	shortID = 12 // what Falco writes of a container's id

	rescanEvery = time.Minute // in case the kernel's notices are incomplete
	// Ids that nobody has are remembered, and a walk of the cgroups is begun no
	// more often than that, and never takes more than a tenth of a core: an
	// alert can name any id it likes.
	missedFor = time.Second
	missedMax = 1024
	walkEvery = 10 * time.Millisecond
	// maxWatches is how many folders are watched; a node has some hundred.
	maxWatches = 8192
)

// entry is a container's cgroup in one hierarchy.
type entry struct {
	Place
	path    string
	version int
	seen    uint64 // the walk that saw it last
}

// index knows the containers by the beginning of their ids.
type index struct {
	mu     sync.Mutex
	short  map[string][]entry
	walks  uint64 // how many have begun
	missed map[string]time.Time
	// live says that the kernel tells of new cgroups, so that what is not in
	// here is most likely nowhere.
	live bool

	walking chan struct{} // held by the one that walks
	began   time.Time     // the last walk that is complete; of walking's holder
	took    time.Duration
}

func newIndex() *index {
	return &index{short: map[string][]entry{}, missed: map[string]time.Time{}, walking: make(chan struct{}, 1)}
}

func (x *index) add(e entry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	e.seen = x.walks
	short := e.Container[:shortID]
	maps.DeleteFunc(x.missed, func(id string, _ time.Time) bool { return strings.HasPrefix(e.Container, id) })
	for i, have := range x.short[short] {
		if have.path == e.path {
			x.short[short][i] = e
			return
		}
	}
	x.short[short] = append(x.short[short], e)
}

func (x *index) remove(e entry) {
	x.mu.Lock()
	defer x.mu.Unlock()
	short := e.Container[:shortID]
	left := slices.DeleteFunc(x.short[short], func(have entry) bool { return have.path == e.path })
	if x.short[short] = left; len(left) == 0 {
		delete(x.short, short)
	}
}

// find returns the cgroups of the container with this id, or beginning of one.
func (x *index) find(id string) ([]entry, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	var found []entry
	for _, e := range x.short[id[:shortID]] {
		if !strings.HasPrefix(e.Container, id) {
			continue
		}
		if len(found) > 0 && found[0].Container != e.Container {
			return nil, fmt.Errorf("containers %s and %s: %w", found[0].Container, e.Container, ErrAmbiguous)
		}
		found = append(found, e)
	}
	return found, nil
}

func (x *index) missedLately(id string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	at, ok := x.missed[id]
	return ok && time.Since(at) < missedFor
}

func (x *index) miss(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.missed) >= missedMax {
		maps.DeleteFunc(x.missed, func(_ string, at time.Time) bool { return time.Since(at) >= missedFor })
		if len(x.missed) >= missedMax {
			clear(x.missed) // the walks are limited all the same
		}
	}
	x.missed[id] = time.Now()
}

// walk brings the index up to date and calls see for each folder that may hold
// containers. since is when the caller began to wait: a walk that began after
// that is as good as another one.
func (n *Node) walk(ctx context.Context, since time.Time, see func(string)) error {
	x := n.index
	select {
	case x.walking <- struct{}{}:
		defer func() { <-x.walking }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if see == nil {
		if x.began.After(since) {
			return nil
		}
		if wait := time.Until(x.began.Add(max(walkEvery, 10*x.took))); wait > 0 && !x.began.IsZero() {
			t := time.NewTimer(wait)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	began := time.Now()
	x.mu.Lock()
	x.walks++
	this := x.walks
	x.mu.Unlock()
	for _, h := range n.hierarchies {
		if err := h.walk(h.root, see, x.add); err != nil {
			return fmt.Errorf("read the cgroups below %s: %w", h.root, err)
		}
	}
	x.mu.Lock()
	for short, entries := range x.short {
		entries = slices.DeleteFunc(entries, func(e entry) bool { return e.seen < this })
		if x.short[short] = entries; len(entries) == 0 {
			delete(x.short, short)
		}
	}
	x.mu.Unlock()
	x.began, x.took = began, time.Since(began)
	return nil
}

// Container finds a running container by its id (12 characters or whole). pid, where it is
// not 0, is a process that may be in it: a hint that saves the search, never a proof.
//
// Where [Node.Run] runs, the answer is at hand. What is not, is looked for in the
// hint's cgroup, then in all cgroups, which are read for a tenth of the time of
// one core at the most. An id that no container has is [ErrGone], for a second without another
// look; a short one that two have [ErrAmbiguous].
func (n *Node) Container(ctx context.Context, id string, pid int) (*Container, error) {
	if !containerID.MatchString(id) {
		return nil, fmt.Errorf("%q is no container's id, which has 12 to 64 of the digits 0-9a-f", cut(id))
	}
	if len(n.hierarchies) == 0 {
		return nil, fmt.Errorf("there are no cgroups below %s that can be frozen: mount the host's /sys/fs/cgroup there", n.cfg.Cgroup)
	}
	since := time.Now()
	n.index.mu.Lock()
	live := n.index.live
	n.index.mu.Unlock()
	// Without the watch somebody who shares the beginning of the id may be new.
	if live || len(id) == 64 {
		if c, err := n.atHand(id); c != nil || err != nil {
			return c, err
		}
		if n.hinted(id, pid) {
			if c, err := n.atHand(id); c != nil || err != nil {
				return c, err
			}
		}
	}
	if n.index.missedLately(id) {
		return nil, fmt.Errorf("container %s is %w: it has no cgroup here", id, ErrGone)
	}
	if err := n.walk(ctx, since, nil); err != nil {
		return nil, fmt.Errorf("look for container %s: %w", id, err)
	}
	c, err := n.atHand(id)
	if err == nil && c == nil {
		n.index.miss(id)
		err = fmt.Errorf("container %s is %w: it has no cgroup here", id, ErrGone)
	}
	return c, err
}

// hinted adds the container that pid says it is in to the index, where it is
// the one that is looked for and its cgroup is really there.
func (n *Node) hinted(id string, pid int) bool {
	if pid <= 0 {
		return false
	}
	b, err := os.ReadFile(n.procPath(pid, "cgroup"))
	if err != nil {
		return false
	}
	p, lines, ok := readCgroup(b)
	if !ok || !strings.HasPrefix(p.Container, id) {
		return false
	}
	var found bool
	for _, h := range n.hierarchies {
		for _, l := range lines {
			if !h.has(l) {
				continue
			}
			_, upto := readPath(l.path)
			if upto == "" || strings.HasPrefix(upto, "/..") {
				continue // of another cgroup namespace: only a walk finds it
			}
			dir := filepath.Join(h.root, upto)
			if e, ok := h.entryOf(dir); ok {
				if _, err := os.Stat(dir); err == nil {
					n.index.add(e)
					found = true
				}
			}
		}
	}
	return found
}

// atHand looks into the index; nil: it is not there. A container may have
// cgroups in both hierarchies: its processes are asked which one counts.
func (n *Node) atHand(id string) (*Container, error) {
	entries, err := n.index.find(id)
	if err != nil {
		return nil, err
	}
	var best *Container
	var rank int
	for _, e := range entries {
		c := &Container{ID: e.Container, PodUID: e.PodUID, Path: e.path, version: e.version, node: n}
		var st unix.Stat_t
		if err := unix.Stat(e.path, &st); err != nil {
			if gone(err) {
				n.index.remove(e)
			}
			continue
		}
		c.Inode = st.Ino
		r := 1
		if len(entries) > 1 {
			r = c.rank()
		}
		switch {
		case r > rank:
			best, rank = c, r
		case r == rank && best != nil && best.version == c.version:
			return nil, fmt.Errorf("cgroups %s and %s are both of container %s: %w", best.Path, c.Path, c.ID, ErrAmbiguous)
		}
	}
	return best, nil
}

// rank is how much speaks for a container's cgroup being the one where its
// processes are: v2 before v1, as soon as it holds any and can freeze.
func (c *Container) rank() int {
	pids, _ := c.Pids()
	freezes := c.version == 1
	if c.version == 2 {
		_, err := os.Stat(filepath.Join(c.Path, "cgroup.freeze"))
		freezes = err == nil
	}
	switch {
	case !freezes:
		return 0
	case len(pids) > 0:
		return 2 + c.version
	}
	return c.version
}

// Run keeps the index of containers up to date until ctx is done. It returns
// nil then, and an error only where the cgroups can't be read at all; that the
// kernel gives no notices is logged, and the containers are looked up when asked.
func (n *Node) Run(ctx context.Context) error {
	if len(n.hierarchies) == 0 {
		n.log.Warn("there are no cgroups that can be frozen: containers are not to be found", "cgroup", n.cfg.Cgroup)
		<-ctx.Done()
		return nil
	}
	// The kernel's queue takes 16,384 notices; a node makes some hundred a second.
	w, err := fsnotify.NewWatcher()
	if err != nil {
		n.log.Warn("new containers are not told by the kernel, and searched for at each alert", "error", err)
		<-ctx.Done()
		return nil
	}
	defer w.Close()
	defer n.setLive(false)

	watched := &watched{w: w, node: n, dirs: map[string]bool{}}
	if err := n.rescan(ctx, watched); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	t := time.NewTicker(rescanEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.Events:
			if !ok {
				return nil
			}
			n.notice(watched, e)
		case err, ok := <-w.Errors:
			if !ok {
				return nil
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				n.log.Warn("watch the cgroups", "error", err)
				continue
			}
			n.setLive(false) // until all is known again
			n.log.Warn("so many cgroups come and go that the kernel's notices were lost; reading them all")
			if err := n.rescan(ctx, watched); err != nil && ctx.Err() == nil {
				n.log.Warn("read the cgroups", "error", err)
			}
		case <-t.C:
			if err := n.rescan(ctx, watched); err != nil && ctx.Err() == nil {
				n.log.Warn("read the cgroups", "error", err)
			}
		}
	}
}

func (n *Node) rescan(ctx context.Context, w *watched) error {
	for dir := range w.dirs {
		if _, err := os.Stat(dir); err != nil {
			delete(w.dirs, dir)
		}
	}
	n.clocks.note()
	w.full = false
	if err := n.walk(ctx, time.Time{}, w.add); err != nil {
		n.setLive(false)
		return err
	}
	n.setLive(!w.full)
	return nil
}

func (n *Node) setLive(live bool) {
	n.index.mu.Lock()
	defer n.index.mu.Unlock()
	n.index.live = live
}

// notice takes up what the kernel tells of one folder.
func (n *Node) notice(w *watched, e fsnotify.Event) {
	if !e.Has(fsnotify.Create) && !e.Has(fsnotify.Remove) {
		return // somebody wrote into a file there
	}
	i := slices.IndexFunc(n.hierarchies, func(h hierarchy) bool { return strings.HasPrefix(e.Name, h.root+"/") })
	if i < 0 {
		return
	}
	h := n.hierarchies[i]
	entry, is := h.entryOf(e.Name)
	switch {
	case e.Has(fsnotify.Create) && is:
		n.index.add(entry)
	case e.Has(fsnotify.Create) && h.mayHold(e.Name):
		// The folder may have been filled before the watch on it began.
		if st, err := os.Stat(e.Name); err == nil && st.IsDir() {
			if err := h.walk(e.Name, w.add, n.index.add); err != nil {
				n.log.Warn("read a new cgroup", "cgroup", e.Name, "error", err)
			}
			if w.full {
				n.setLive(false)
			}
		}
	case e.Has(fsnotify.Remove) && is:
		n.index.remove(entry)
	case e.Has(fsnotify.Remove):
		delete(w.dirs, e.Name)
	}
}

// watched is the folders that the kernel tells of.
type watched struct {
	w    *fsnotify.Watcher
	node *Node
	dirs map[string]bool
	full bool // not all could be watched
	said bool
}

func (w *watched) add(dir string) {
	if w.dirs[dir] {
		return
	}
	err := error(nil)
	if len(w.dirs) >= maxWatches {
		err = fmt.Errorf("there are more than %d", maxWatches)
	} else {
		err = w.w.Add(dir)
	}
	switch {
	case err == nil:
		w.dirs[dir] = true
	case gone(err):
	default:
		w.full = true
		if w.said {
			return
		}
		w.said = true
		w.node.log.Warn("not all cgroups can be watched, so containers are searched for at each alert; raise fs.inotify.max_user_watches",
			"watched", len(w.dirs), "error", err)
	}
}

// gone reports whether an error says that a cgroup or a process is not there any
// more: an open file of one that was removed answers ENODEV.
func gone(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ESRCH) || errors.Is(err, ErrGone)
}

// cut shortens what an alert wrote for an error.
func cut(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
