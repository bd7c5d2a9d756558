package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How far a process's start as Falco tells it may be from the kernel's. Falco
// has it in nanoseconds, the kernel in ticks, which it rounds down to; seen were 3
// to 8 ms in between. Two ticks both ways leave room for the moment between a
// fork and Falco's seeing it, and are far less than it takes to use up all
// numbers and come back to this one.
const (
	tick           = 10 * time.Millisecond // USER_HZ is 100 on every architecture Go runs on
	startTolerance = 2 * tick
)

// clocks is where CLOCK_REALTIME stood against CLOCK_BOOTTIME. Both are slewed
// alike, so that the difference changes only when the clock is set. Falco takes it
// once, when it starts: a start that it tells has to be placed by what was so then.
type clocks struct {
	mu   sync.Mutex
	seen []time.Duration // the latest last
}

const clocksMax = 8

func (c *clocks) note() []time.Duration {
	// A thread that is put aside between the two readings makes them differ:
	// the reading that took the least time is right.
	best, offset := int64(math.MaxInt64), time.Duration(0)
	for range 4 {
		var before, real, after unix.Timespec
		if unix.ClockGettime(unix.CLOCK_BOOTTIME, &before) != nil || unix.ClockGettime(unix.CLOCK_REALTIME, &real) != nil ||
			unix.ClockGettime(unix.CLOCK_BOOTTIME, &after) != nil {
			return nil
		}
		if took := after.Nano() - before.Nano(); took < best {
			best, offset = took, time.Duration(real.Nano()-before.Nano()-took/2)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.IndexFunc(c.seen, func(o time.Duration) bool { return (o - offset).Abs() < 2*time.Millisecond }); i < 0 {
		c.seen = append(c.seen, offset)
		if len(c.seen) > clocksMax {
			c.seen = slices.Delete(c.seen, 0, 1)
		}
	}
	return slices.Clone(c.seen)
}

// stat is what /proc/PID/stat says.
type stat struct {
	comm   string
	parent int
	kernel bool // a thread of the kernel's own
	start  uint64
}

func readStat(b []byte) (stat, error) {
	bad := fmt.Errorf("/proc/PID/stat is %q, and can't be read", cut(string(b)))
	// The name, in brackets, may hold spaces and brackets itself.
	from, to := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if from < 0 || to < from {
		return stat{}, bad
	}
	f := strings.Fields(string(b[to+1:]))
	const ppid, flags, starttime = 4 - 3, 9 - 3, 22 - 3 // proc_pid_stat(5) counts from 1, and two come before
	if len(f) <= starttime {
		return stat{}, bad
	}
	s := stat{comm: string(b[from+1 : to])}
	var err, err2, err3 error
	var fl uint64
	s.parent, err = strconv.Atoi(f[ppid])
	fl, err2 = strconv.ParseUint(f[flags], 10, 64)
	s.start, err3 = strconv.ParseUint(f[starttime], 10, 64)
	if errors.Join(err, err2, err3) != nil || s.start > math.MaxInt64/uint64(tick) {
		return stat{}, bad
	}
	const kthread = 0x00200000 // PF_KTHREAD
	s.kernel = fl&kthread != 0
	return s, nil
}

func (n *Node) procPath(pid int, name string) string {
	return filepath.Join(n.cfg.Proc, strconv.Itoa(pid), name)
}

func (n *Node) stat(pid int) (stat, error) {
	b, err := os.ReadFile(n.procPath(pid, "stat"))
	if err != nil {
		if gone(err) {
			return stat{}, ErrGone
		}
		return stat{}, err
	}
	return readStat(b)
}

// Locate tells where the process runs that pid, start and container name, as
// [Node.Process] proves it, but without holding on to it: it may be gone by the time
// that this returns.
func (n *Node) Locate(pid int, start int64, container string) (Place, error) {
	if err := provable(pid, start, container); err != nil {
		return Place{}, err
	}
	b, err := os.ReadFile(n.procPath(pid, "cgroup"))
	if err != nil {
		if gone(err) {
			err = ErrGone
		}
		return Place{}, fmt.Errorf("read its cgroup: %w", err)
	}
	p, _, ok := readCgroup(b)
	if !ok {
		return Place{}, fmt.Errorf("its cgroups are of several containers: %w", ErrNotSame)
	}
	switch {
	case container == "host" && p != Place{}:
		return Place{}, fmt.Errorf("it runs in container %s, not on the host itself: %w", p.Container, ErrNotSame)
	case container == "host", container == "":
	case p.Container == "":
		return Place{}, fmt.Errorf("it runs in no container: %w", ErrNotSame)
	case !strings.HasPrefix(p.Container, container):
		return Place{}, fmt.Errorf("it runs in container %s: %w", p.Container, ErrNotSame)
	}
	if start == 0 {
		return p, nil
	}
	s, err := n.stat(pid)
	if err != nil {
		return Place{}, fmt.Errorf("read its start: %w", err)
	}
	return p, n.began(pid, s.start, start)
}

// began makes sure that a process's start is the one that Falco tells.
func (n *Node) began(pid int, ticks uint64, start int64) error {
	var apart time.Duration
	for _, offset := range n.clocks.note() {
		apart = time.Duration(start) - offset - time.Duration(ticks)*tick
		if apart.Abs() <= startTolerance {
			return nil
		}
	}
	if apart > 0 {
		// Falco finds those that run when it starts in /proc, and takes for
		// their start when the kernel first showed their folder there.
		var st unix.Stat_t
		if err := unix.Stat(n.procPath(pid, ""), &st); err == nil && time.Duration(start-st.Ctim.Nano()).Abs() <= startTolerance {
			return nil
		}
		return fmt.Errorf("it began %s before the one that the alert tells of, or Falco began after it: %w", apart.Round(time.Millisecond), ErrNotSame)
	}
	return fmt.Errorf("it began %s after the one that the alert tells of: %w", -apart.Round(time.Millisecond), ErrNotSame)
}

// provable refuses what names no certain process.
func provable(pid int, start int64, container string) error {
	switch {
	case pid <= 0 || pid > math.MaxInt32:
		return fmt.Errorf("%d is no number of a process", pid)
	case start < 0:
		return fmt.Errorf("%d is no time at which a process began", start)
	case container != "" && container != "host" && !containerID.MatchString(container):
		return fmt.Errorf("%q is no container's id, which has 12 to 64 of the digits 0-9a-f", cut(container))
	case start == 0 && (container == "" || container == "host"):
		return errors.New("without proc.pid.ts a process's number alone proves nothing: it may have been given to another (let Falco's append_output add it)")
	}
	return nil
}

// Process proves that pid is the process that start (nanoseconds since 1970, as
// Falco's proc.pid.ts; 0: unknown) and container (its id; "": any, "host": none)
// say, and holds on to it.
//
// A start has to be within two clock ticks, 20 ms, of the kernel's. Without one
// the container has to be known, and the process in it. [ErrGone] when there is no such
// process, [ErrNotSame] when its number belongs to another one.
func (n *Node) Process(pid int, start int64, container string) (*Process, error) {
	if err := provable(pid, start, container); err != nil {
		return nil, err
	}
	if err := n.sameNumbers(); err != nil {
		return nil, err
	}
	// First held, then looked at: what is seen is of the one that is held, as
	// long as that lives.
	p, err := n.openProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	place, err := n.Locate(pid, start, container)
	if err == nil && !p.Alive() {
		err = ErrGone
	}
	if err != nil {
		_ = p.Close()
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	p.CgroupOf = place.Container
	return p, nil
}

// sameNumbers makes sure that a number in Proc means the same to system calls.
func (n *Node) sameNumbers() error {
	self, err := os.Readlink(filepath.Join(n.cfg.Proc, "self"))
	if err != nil {
		return fmt.Errorf("%s does not show stoop itself, so its numbers are not those that stoop may signal: set hostPID: true on stoop's pod: %w", n.cfg.Proc, err)
	}
	if self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("%s numbers processes otherwise than stoop sees them (itself %s, not %d): set hostPID: true on stoop's pod", n.cfg.Proc, self, os.Getpid())
	}
	return nil
}

// openProcess opens a process and reads what is known of it, but not where it runs.
func (n *Node) openProcess(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, syscall.ESRCH), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOENT):
		return nil, ErrGone // or it is a thread's number
	case errors.Is(err, syscall.ENOSYS):
		return nil, fmt.Errorf("open its pidfd: %w (Linux can do this since 5.3)", err)
	case err != nil:
		return nil, fmt.Errorf("open its pidfd: %w", err)
	}
	// Not a file that Go's poller would take for its own: it is polled here.
	p := &Process{PID: pid, Pidfd: os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid)), node: n}
	s, err := n.stat(pid)
	if err != nil {
		_ = p.Close()
		return nil, err
	}
	p.Start, p.Comm, p.Kernel, p.Parent = s.start, s.comm, s.kernel, s.parent
	p.Exe, _ = os.Readlink(n.procPath(pid, "exe"))
	if !p.Alive() {
		_ = p.Close()
		return nil, ErrGone
	}
	return p, nil
}

// Signal sends a signal through the pidfd; [ErrGone] when it ended before.
func (p *Process) Signal(s syscall.Signal) error {
	if !p.Alive() {
		return fmt.Errorf("signal process %d: %w", p.PID, ErrGone)
	}
	err := p.control(func(fd int) error { return unix.PidfdSendSignal(fd, s, nil, 0) })
	switch {
	case errors.Is(err, syscall.ESRCH):
		err = ErrGone
	case errors.Is(err, syscall.EPERM):
		err = fmt.Errorf("%w (stoop needs CAP_KILL)", err)
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// Alive reports whether it still runs; a zombie does not.
func (p *Process) Alive() bool {
	ended := false
	err := p.control(func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, 0)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			ended = n > 0
			return err
		}
	})
	return err == nil && !ended
}

// Wait returns when it has ended, or with the context's error.
func (p *Process) Wait(ctx context.Context) error {
	return p.control(func(fd int) error {
		return poll(ctx, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}, func() (bool, error) { return !p.Alive(), nil })
	})
}

// ofRootIn is how long looking at an executable may take, and ofRootMost how many
// such looks may hang: the file system may be one that whoever runs the process
// answers for.
const (
	ofRootIn   = 250 * time.Millisecond
	ofRootMost = 32
)

// OfRoot reports whether it runs as root an executable that only root can have
// put where it is: one of which the name says what it is. One that can't be looked
// at in time may be: better one too many spared.
func (p *Process) OfRoot() bool {
	n := p.node
	if n.looks.Add(1) > ofRootMost {
		n.looks.Add(-1)
		return true
	}
	is := make(chan bool, 1)
	pid, exe := p.PID, p.Exe
	go func() {
		defer n.looks.Add(-1)
		is <- n.ofRoot(pid, exe)
	}()
	late := time.NewTimer(ofRootIn)
	defer late.Stop()
	select {
	case root := <-is:
		return root
	case <-late.C:
		return true
	}
}

func (n *Node) ofRoot(pid int, exePath string) bool {
	var proc, exe, dir unix.Stat_t
	if unix.Stat(n.procPath(pid, ""), &proc) != nil || unix.Stat(n.procPath(pid, "exe"), &exe) != nil {
		return false
	}
	path := strings.TrimSuffix(exePath, " (deleted)")
	if err := unix.Stat(filepath.Join(n.procPath(pid, "root"), filepath.Dir(path)), &dir); err != nil {
		dir = unix.Stat_t{} // it was removed since, or replaced with its folder
	}
	const others = 0o022
	return proc.Uid == 0 && exe.Uid == 0 && dir.Uid == 0 && exe.Mode&others == 0 && (dir.Mode&others == 0 || dir.Mode == 0)
}

// control calls f with the pidfd, which is not closed meanwhile.
func (p *Process) control(f func(fd int) error) error {
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// Close lets go of it.
func (p *Process) Close() error { return p.Pidfd.Close() }

const (
	maxTree   = 4096 // processes of a tree that are held
	maxRounds = 64   // looks for more of them
)

// Tree is the process and all its descendants, each held; those that ended
// meanwhile are left out. Parents come before their children, the process itself,
// held a second time, first; the caller closes each.
//
// It looks again until there is nobody new, so that a child that is just being
// forked is found; a child whose parent ended before it was found is not: it is
// somebody else's then. With more than 4,096 processes those that were found
// come with an error.
//
// Known are those that an earlier look returned and the caller still holds: they
// are not opened again, and only who is new is returned, which may be nobody.
func (p *Process) Tree(known ...*Process) ([]*Process, error) {
	n := p.node
	tree := slices.Clone(known)
	if len(tree) == 0 {
		root, err := n.openProcess(p.PID)
		if err == nil && (root.Start != p.Start || !p.Alive()) {
			_ = root.Close()
			err = ErrGone
		}
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", p.PID, err)
		}
		root.CgroupOf = p.CgroupOf
		tree = append(tree, root)
	}
	held := map[int]*Process{}
	for _, q := range tree {
		held[q.PID] = q
	}
	for range maxRounds {
		before := len(tree)
		for i := 0; i < len(tree); i++ {
			children, err := n.children(tree[i])
			if err != nil {
				return tree[len(known):], fmt.Errorf("list the children of process %d: %w", tree[i].PID, err)
			}
			for _, pid := range children {
				if have := held[pid]; have != nil && have.Alive() {
					continue
				}
				if len(tree) >= maxTree {
					return tree[len(known):], fmt.Errorf("process %d has more than %d descendants", p.PID, maxTree)
				}
				child, err := n.openProcess(pid)
				if errors.Is(err, ErrGone) {
					continue
				}
				if err != nil {
					return tree[len(known):], fmt.Errorf("process %d: %w", pid, err)
				}
				// Its parent is alive, so the parent's number still is that
				// one's, and this is its child.
				if child.Parent != tree[i].PID || !tree[i].Alive() {
					_ = child.Close()
					continue
				}
				if b, err := os.ReadFile(n.procPath(pid, "cgroup")); err == nil {
					place, _, _ := readCgroup(b)
					child.CgroupOf = place.Container
				}
				tree, held[pid] = append(tree, child), child
			}
		}
		if len(tree) == before {
			break
		}
	}
	var alive []*Process
	for _, q := range tree[len(known):] {
		if q.Alive() {
			alive = append(alive, q)
		} else {
			_ = q.Close()
		}
	}
	if len(alive) == 0 && len(known) == 0 {
		return nil, fmt.Errorf("process %d: %w", p.PID, ErrGone)
	}
	return alive, nil
}

// children are the numbers of a process's children, of all its threads.
func (n *Node) children(p *Process) ([]int, error) {
	if n.noChildren {
		return n.childrenByParent(p.PID)
	}
	tasks, err := filepath.Glob(n.procPath(p.PID, "task/[0-9]*"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join(task, "children"))
		switch {
		case err != nil && !gone(err):
			return nil, err
		case err != nil:
			if _, there := os.Stat(filepath.Join(task, "stat")); there == nil {
				return n.childrenByParent(p.PID) // a kernel without CONFIG_PROC_CHILDREN
			}
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// childrenByParent asks every process for its parent.
func (n *Node) childrenByParent(parent int) ([]int, error) {
	names, err := folders(n.cfg.Proc)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if s, err := n.stat(pid); err == nil && s.parent == parent {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Ancestry are stoop itself and its ancestors.
type Ancestry struct {
	pids  []int
	whole bool
}

// Ancestry reads it anew. It never gains a member later: who adopts the child of
// a process that ended was an ancestor before.
func (n *Node) Ancestry() Ancestry {
	var a Ancestry
	for at, left := os.Getpid(), 1024; at > 0 && left > 0; left-- {
		a.pids = append(a.pids, at)
		s, err := n.stat(at)
		if err != nil {
			return a
		}
		at = s.parent
	}
	a.whole = true
	return a
}

// Has reports whether pid is one of them, or may be, where they can't be read:
// better one too many spared.
func (a Ancestry) Has(pid int) bool { return !a.whole || slices.Contains(a.pids, pid) }

// Own reports whether pid is stoop itself or one of its ancestors.
func (n *Node) Own(pid int) bool { return n.Ancestry().Has(pid) }
