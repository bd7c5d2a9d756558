package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// longest is how long freezing, thawing or killing may take where the context
// sets no deadline.
const longest = 10 * time.Second

// ContainerAt is the container whose cgroup was at path and had the inode
// before: what an undo record holds. [ErrGone] when that cgroup is not there any
// more, or one of another making is.
func (n *Node) ContainerAt(path string, inode uint64) (*Container, error) {
	for _, h := range n.hierarchies {
		e, ok := h.entryOf(path)
		if !ok || filepath.Clean(path) != path {
			continue
		}
		c := &Container{ID: e.Container, PodUID: e.PodUID, Path: e.path, Inode: inode, version: h.version, node: n}
		d, err := c.open()
		if err != nil {
			return nil, err
		}
		return c, d.Close()
	}
	return nil, fmt.Errorf("%q is no container's cgroup below %s", cut(path), n.cfg.Cgroup)
}

// Version is that of the cgroups that it is frozen by: 1 or 2.
func (c *Container) Version() int { return c.version }

// open opens the container's folder, and makes sure that it is the one that was
// found: what is done through it can't reach another.
func (c *Container) open() (*folder, error) {
	f, err := os.OpenFile(c.Path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		if gone(err) {
			return nil, fmt.Errorf("container %s: its cgroup: %w", c.ID, ErrGone)
		}
		return nil, fmt.Errorf("container %s: open its cgroup: %w", c.ID, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("container %s: look at its cgroup: %w", c.ID, err)
	}
	if st.Ino != c.Inode {
		_ = f.Close()
		return nil, fmt.Errorf("container %s: its cgroup was made anew since (inode %d, was %d): %w", c.ID, st.Ino, c.Inode, ErrGone)
	}
	return &folder{f, c}, nil
}

// folder is an open cgroup.
type folder struct {
	*os.File
	of *Container
}

func (d *folder) openFile(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(d.Fd()), name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, d.wrap("open", name, err)
	}
	return os.NewFile(uintptr(fd), filepath.Join(d.of.Path, name)), nil
}

func (d *folder) read(name string) (string, error) {
	f, err := d.openFile(name, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return "", d.wrap("read", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (d *folder) write(name, value string) error {
	f, err := d.openFile(name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := unix.Write(int(f.Fd()), []byte(value)); err != nil {
		return d.wrap("write "+value+" to", name, err)
	}
	return nil
}

func (d *folder) wrap(what, name string, err error) error {
	// A file that is missing in a folder that is there is a kernel without it.
	if gone(err) && !d.there() {
		return fmt.Errorf("container %s: its cgroup: %w", d.of.ID, ErrGone)
	}
	if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("container %s: %s %s: %w (stoop needs the host's /sys/fs/cgroup mounted writable, and root)", d.of.ID, what, name, err)
	}
	return fmt.Errorf("container %s: %s %s: %w", d.of.ID, what, name, err)
}

func (d *folder) there() bool {
	var st unix.Stat_t
	return unix.Fstatat(int(d.Fd()), "cgroup.procs", &st, 0) == nil
}

// key reads one line of cgroup.events.
func (d *folder) key(name string) (bool, error) {
	s, err := d.read("cgroup.events")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(s) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == name {
			return v == "1", nil
		}
	}
	return false, fmt.Errorf("container %s: cgroup.events says nothing of %s: cgroup v2 can do this since Linux 5.2", d.of.ID, name)
}

// await waits until ok, asked whenever the kernel says that cgroup.events
// changed or, where it does not tell, after growing pauses of 0.05 to 5 ms.
func (d *folder) await(ctx context.Context, ok func() (bool, error)) error {
	if d.of.version != 2 {
		for pause := 50 * time.Microsecond; ; pause = min(pause+pause/4, 5*time.Millisecond) {
			if is, err := ok(); is || err != nil {
				return err
			}
			if pause < time.Millisecond && ctx.Err() == nil {
				// Go's own timers take a millisecond at the least.
				short := unix.NsecToTimespec(int64(pause))
				_ = unix.Nanosleep(&short, nil)
				continue
			}
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return ctx.Err()
			}
		}
	}
	events, err := d.openFile("cgroup.events", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer events.Close()
	var b [256]byte
	return poll(ctx, unix.PollFd{Fd: int32(events.Fd()), Events: unix.POLLPRI}, func() (bool, error) {
		// Reading is what makes poll wait for the next change.
		if _, err := unix.Pread(int(events.Fd()), b[:], 0); err != nil {
			return false, d.wrap("read", "cgroup.events", err)
		}
		return ok()
	})
}

// poll waits until ok, which is asked whenever the kernel tells of fd.
func poll(ctx context.Context, fd unix.PollFd, ok func() (bool, error)) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("make an eventfd: %w", err)
	}
	defer unix.Close(wake)
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-told // wake must not be written to after it is closed
		}
	}()
	fds := []unix.PollFd{fd, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		if is, err := ok(); is || err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("wait for the kernel: %w", err)
		}
	}
}

// asked reports whether this very cgroup was told to freeze, whatever is true of
// those above it.
func (d *folder) asked() (bool, error) {
	name := "cgroup.freeze"
	if d.of.version == 1 {
		name = "freezer.self_freezing"
	}
	s, err := d.read(name)
	return s == "1", err
}

func (d *folder) ask(freeze bool) error {
	switch {
	case d.of.version == 1 && freeze:
		return d.write("freezer.state", "FROZEN")
	case d.of.version == 1:
		return d.write("freezer.state", "THAWED")
	case freeze:
		return d.write("cgroup.freeze", "1")
	}
	return d.write("cgroup.freeze", "0")
}

func (d *folder) frozen() (bool, error) {
	if d.of.version == 1 {
		s, err := d.read("freezer.state")
		return s == "FROZEN", err
	}
	return d.key("frozen")
}

// Pids are the processes in the container, those in cgroups below its own too.
func (c *Container) Pids() ([]int, error) {
	d, err := c.open()
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.pids()
}

func (d *folder) pids() ([]int, error) { return d.pidsOf(math.MaxInt) }

// pidsOf are those in the first of the cgroups, at most so many.
func (d *folder) pidsOf(cgroups int) ([]int, error) {
	var pids []int
	hidden := false
	err := filepath.WalkDir(d.of.Path, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil && path != d.of.Path && gone(err):
			return nil
		case err != nil:
			return err
		case !e.IsDir():
			return nil
		case cgroups <= 0:
			return fs.SkipAll
		}
		cgroups--
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		switch {
		case gone(err) && path != d.of.Path, errors.Is(err, syscall.EOPNOTSUPP):
			return nil // of a threaded cgroup: its processes stand above
		case err != nil:
			return err
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil || pid < 0 {
				return fmt.Errorf("%s holds %q", path, cut(f))
			}
			hidden = hidden || pid == 0
			if pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, d.wrap("read", "cgroup.procs", err)
	}
	// The paths above were read after the folder was opened: it has to be the
	// same still.
	if !d.there() {
		return nil, fmt.Errorf("container %s: its cgroup: %w", d.of.ID, ErrGone)
	}
	if hidden {
		return nil, fmt.Errorf("container %s has processes that stoop can't see: set hostPID: true on stoop's pod", d.of.ID)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Own reports whether stoop itself runs in the container; it is neither frozen nor
// killed then.
func (c *Container) Own() (bool, error) {
	d, err := c.open()
	if err != nil {
		return false, err
	}
	defer d.Close()
	return d.own()
}

// ownMost is how many cgroups of a container stoop is looked for in, the
// container's own first. A container that may make cgroups can make so many that
// reading them takes seconds, and those it has for itself.
const ownMost = 1024

func (d *folder) own() (bool, error) {
	if at := d.ownPath(); at != "" {
		return at == d.of.Path || strings.HasPrefix(at, d.of.Path+"/"), nil
	}
	pids, err := d.pidsOf(ownMost)
	return slices.Contains(pids, os.Getpid()), err
}

// ownPath is the folder of stoop's own cgroup in the container's hierarchy; ""
// where it can't be told, as out of a cgroup namespace.
func (d *folder) ownPath() string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	_, lines, _ := readCgroup(b)
	for _, h := range d.of.node.hierarchies {
		if h.version != d.of.version || !strings.HasPrefix(d.of.Path, h.root+"/") {
			continue
		}
		for _, l := range lines {
			if !h.has(l) {
				continue
			}
			at := filepath.Join(h.root, l.path)
			// It is where the path says only if it is seen from the same root.
			if b, err := os.ReadFile(filepath.Join(at, "cgroup.procs")); err == nil && slices.Contains(strings.Fields(string(b)), strconv.Itoa(os.Getpid())) {
				return at
			}
		}
	}
	return ""
}

// spare refuses the container that stoop itself runs in.
func (d *folder) spare() error {
	own, err := d.own()
	if err != nil {
		return err
	}
	if own {
		return fmt.Errorf("container %s: %w", d.of.ID, ErrOwn)
	}
	return nil
}

// bounded is ctx with a deadline of its own, if it has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, longest)
}

// Freeze stops every process and returns when the kernel says that all have
// stopped. already says that it was frozen before.
//
// [ErrStopping] says that ctx was done first. What it began holds all the same:
// whoever stopped does not go on, for one process in a call to the kernel that
// can't be broken off must not free the others. Such a one stops when the call
// comes back, before it runs another instruction of its own.
//
// A container that is frozen only because a cgroup above it is gets frozen by
// itself too.
func (c *Container) Freeze(ctx context.Context) (already bool, err error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	d, err := c.open()
	if err != nil {
		return false, err
	}
	defer d.Close()
	if err := d.spare(); err != nil {
		return false, err
	}
	already, err = d.asked()
	if err != nil {
		return false, err
	}
	return already, d.freeze(ctx, already)
}

func (d *folder) freeze(ctx context.Context, already bool) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("freeze container %s: %w", d.of.ID, err)
	}
	if !already {
		if err := d.ask(true); err != nil {
			return err
		}
	}
	err := d.await(ctx, func() (bool, error) {
		is, err := d.frozen()
		if err != nil || is || d.of.version == 2 {
			return is, err
		}
		// The v1 freezer misses a process that was just being forked, and is
		// made to look again by being asked again.
		return false, d.ask(true)
	})
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("freeze container %s: %w: %w", d.of.ID, ErrStopping, err)
	}
	if err != nil && !already {
		if undo := d.ask(false); undo != nil && !gone(undo) {
			return fmt.Errorf("freeze container %s: %w, and it could not be thawed: %w", d.of.ID, err, undo)
		}
	}
	return err
}

// Thaw lets it go on; already says that it was not frozen.
func (c *Container) Thaw(ctx context.Context) (already bool, err error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	d, err := c.open()
	if err != nil {
		return false, err
	}
	defer d.Close()
	asked, err := d.asked()
	if err != nil {
		return false, err
	}
	if asked {
		if err := d.ask(false); err != nil {
			return false, err
		}
	}
	err = d.await(ctx, func() (bool, error) {
		is, err := d.frozen()
		return !is, err
	})
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return !asked, fmt.Errorf("thaw container %s: it is frozen still; a cgroup above it may be: %w", c.ID, err)
	}
	return !asked, err
}

// Frozen reports whether all of it has stopped.
func (c *Container) Frozen() (bool, error) {
	d, err := c.open()
	if err != nil {
		return false, err
	}
	defer d.Close()
	return d.frozen()
}

// Kill ends every process at once and returns when none is left; how many there were.
//
// Where the processes have to be signalled one by one (v1, and before Linux
// 5.14), the cgroup is left thawed: the frozen of v1 can't die.
func (c *Container) Kill(ctx context.Context) (killed int, err error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	d, err := c.open()
	if err != nil {
		return 0, err
	}
	defer d.Close()
	if err := d.spare(); err != nil {
		return 0, err
	}
	if c.version == 2 {
		pids, err := d.pids()
		if err != nil {
			return 0, err
		}
		err = d.write("cgroup.kill", "1")
		if err == nil {
			return len(pids), d.emptied(ctx)
		}
		if !errors.Is(err, syscall.ENOENT) {
			return 0, err
		}
		// Before Linux 5.14: one by one, like v1.
	}
	return d.killEach(ctx)
}

// emptied waits until no process is left.
func (d *folder) emptied(ctx context.Context) error {
	err := d.await(ctx, func() (bool, error) {
		if d.of.version == 2 {
			is, err := d.key("populated")
			return !is, err
		}
		pids, err := d.pids()
		return len(pids) == 0, err
	})
	switch {
	case errors.Is(err, ErrGone):
		return nil // the runtime took the empty cgroup away
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fmt.Errorf("kill container %s: not all of its processes ended in time: %w", d.of.ID, err)
	}
	return err
}

const (
	killRounds = 100
	killBatch  = 256 // descriptors held at once
)

// killEach freezes, so that nothing is forked meanwhile, signals, and thaws, so
// that the signalled die, until there is nobody left.
func (d *folder) killEach(ctx context.Context) (int, error) {
	killed := map[int]bool{}
	for range killRounds {
		// Where one sleeps so deeply that it does not stop, the others are
		// killed all the same: a quarter of a second is more than all need.
		brief, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
		froze := d.freeze(brief, false)
		cancel()
		if froze != nil && !errors.Is(froze, context.DeadlineExceeded) {
			if errors.Is(froze, ErrStopping) {
				_ = d.ask(false) // it is left thawed, as it says above
			}
			return d.ended(len(killed), froze)
		}
		err := d.signalAll(unix.SIGKILL, killed)
		if thawed := d.ask(false); err == nil {
			err = thawed
		}
		if err != nil {
			return d.ended(len(killed), err)
		}
		brief, cancel = context.WithTimeout(ctx, time.Second)
		err = d.emptied(brief)
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return d.ended(len(killed), err)
		}
	}
	return len(killed), fmt.Errorf("kill container %s: processes are left after %d rounds", d.of.ID, killRounds)
}

// ended turns the cgroup's disappearance in the middle into what it means.
func (d *folder) ended(killed int, err error) (int, error) {
	if errors.Is(err, ErrGone) && killed > 0 {
		return killed, nil
	}
	return killed, err
}

// signalAll signals each process of the container, and notes which.
func (d *folder) signalAll(s syscall.Signal, signalled map[int]bool) error {
	all, err := d.pids()
	if err != nil {
		return err
	}
	for pids := range slices.Chunk(all, killBatch) {
		held := map[int]int{}
		for _, pid := range pids {
			if fd, err := unix.PidfdOpen(pid, 0); err == nil {
				held[pid] = fd
			}
		}
		// Only who is in the container still, now that its number can't come to
		// mean another, was the one that was listed.
		now, err := d.pids()
		for pid, fd := range held {
			if err == nil {
				if _, in := slices.BinarySearch(now, pid); in {
					if kill := unix.PidfdSendSignal(fd, s, nil, 0); kill == nil {
						signalled[pid] = true
					} else if !errors.Is(kill, syscall.ESRCH) {
						err = fmt.Errorf("container %s: signal process %d: %w (stoop needs CAP_KILL)", d.of.ID, pid, kill)
					}
				}
			}
			_ = unix.Close(fd)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
