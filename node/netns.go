package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrHostNetwork says that the container is in the host's network, which is
// never cut: that would take the node, and stoop with it, off the cluster.
var ErrHostNetwork = errors.New("it is in the host's network")

// maxNetworks is how many network namespaces of one container are looked at. A
// container that may make namespaces can make any number; the one that the
// runtime made for it is that of its oldest process, and comes first.
const maxNetworks = 32

// Network is a network namespace, held open: it can't end or come to mean
// another while it is. A pod's containers share one.
type Network struct {
	Inode  uint64 // its number, used again after it is gone
	Cookie uint64 // its number, never used again in this boot; 0 before Linux 5.14
	PID    int    // a process in it; 0 for the host's

	file *os.File
	here bool // stoop itself is in it
}

// Close lets go of it.
func (w *Network) Close() error { return w.file.Close() }

func closeAll(nets []*Network) {
	for _, w := range nets {
		w.Close()
	}
}

// Networks are the network namespaces of the container's processes, its own
// first, each to be closed. Those that it shares with the host, or with stoop,
// are not among them: inHost says how many of its processes are there, and when
// all of them are the error is [ErrHostNetwork].
func (n *Node) Networks(ctx context.Context, c *Container) (nets []*Network, inHost int, err error) {
	return n.networks(ctx, c.ID, c.Pids)
}

func (n *Node) networks(ctx context.Context, name string, members func() ([]int, error)) (nets []*Network, inHost int, err error) {
	pids, err := members()
	if err != nil {
		return nil, 0, fmt.Errorf("processes of container %s: %w", name, err)
	}
	reserved, err := n.reserved()
	if err != nil {
		return nil, 0, err
	}
	// One pass without holding on to anything: nearly always all are in the same.
	byLink := map[string][]int{}
	var links []string
	var denied error
	for _, pid := range pids {
		link, err := os.Readlink(n.netPath(pid))
		switch {
		case errors.Is(err, os.ErrPermission):
			denied = fmt.Errorf("network of process %d: %w (CAP_SYS_PTRACE is needed)", pid, err)
			continue
		case err != nil || link == "":
			continue // ended meanwhile
		case slices.Contains(reserved, link):
			inHost++
			continue
		}
		if byLink[link] == nil {
			links = append(links, link)
		}
		byLink[link] = append(byLink[link], pid)
	}
	if len(links) == 0 {
		if denied != nil {
			return nil, inHost, denied
		}
		if inHost > 0 {
			return nil, inHost, fmt.Errorf("container %s: %w", name, ErrHostNetwork)
		}
		return nil, 0, fmt.Errorf("container %s has no processes: %w", name, ErrGone)
	}
	if len(links) > 1 {
		oldest := map[string]uint64{}
		for link, pids := range byLink {
			oldest[link] = ^uint64(0)
			for _, pid := range pids {
				oldest[link] = min(oldest[link], n.startOf(pid))
			}
		}
		slices.SortStableFunc(links, func(a, b string) int { return cmp.Compare(oldest[a], oldest[b]) })
		links = links[:min(len(links), maxNetworks)]
	}
	for _, link := range links {
		w, err := n.holdOne(ctx, byLink[link], link, members)
		if err != nil {
			closeAll(nets)
			return nil, inHost, err
		}
		if w != nil {
			nets = append(nets, w)
		}
	}
	if len(nets) == 0 {
		return nil, inHost, fmt.Errorf("container %s has no processes: %w", name, ErrGone)
	}
	return nets, inHost, nil
}

// holdOne holds the namespace that link names through one of the processes; nil
// when none of them is left.
func (n *Node) holdOne(ctx context.Context, pids []int, link string, members func() ([]int, error)) (*Network, error) {
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		w, err := n.hold(pid, link, members)
		if err != nil || w != nil {
			return w, err
		}
	}
	return nil, nil
}

// hold opens the process's namespace and makes sure that it was the container's
// process whose namespace was opened: the number could have come to mean a
// process of another pod in between. The pidfd says that it is one process from
// before the opening until after the container was asked again.
func (n *Node) hold(pid int, link string, members func() ([]int, error)) (*Network, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, nil //nolint:nilerr // it ended
	}
	defer unix.Close(pidfd)
	f, err := os.Open(n.netPath(pid))
	if err != nil {
		return nil, nil //nolint:nilerr // it ended
	}
	w, err := newNetwork(f, pid)
	if err != nil {
		return nil, err
	}
	now, err := members()
	if err != nil {
		w.Close()
		return nil, err
	}
	// It may have moved to another namespace since its link was read, the host's
	// for one.
	if w.String() != link || !slices.Contains(now, pid) || unix.PidfdSendSignal(pidfd, 0, nil, 0) != nil {
		w.Close()
		return nil, nil
	}
	return w, nil
}

func newNetwork(f *os.File, pid int) (*Network, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return &Network{Inode: st.Ino, PID: pid, file: f}, nil
}

// HostNetwork is the host's: that of process 1, wherever stoop runs.
func (n *Node) HostNetwork() (*Network, error) {
	path, err := n.hostPath()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the host's network: %w", err)
	}
	w, err := newNetwork(f, 0)
	if err != nil {
		return nil, err
	}
	// Not from Config.Proc, where stoop may be seen under another number.
	link, err := os.Readlink("/proc/thread-self/ns/net")
	w.here = err == nil && link == w.String()
	return w, nil
}

// hostPath is where the host's namespace is found. Where a security module lets
// nobody look at process 1 it is process 2, if that is the kernel's first thread,
// which is in the namespace that the machine booted with.
func (n *Node) hostPath() (string, error) {
	path := n.netPath(1)
	_, err := os.Readlink(path)
	if errors.Is(err, os.ErrPermission) && n.kernelThread(2) {
		path = n.netPath(2)
		_, err = os.Readlink(path)
	}
	if err != nil {
		return "", fmt.Errorf("the host's network: %w (stoop needs hostPID, and CAP_SYS_PTRACE)", err)
	}
	return path, nil
}

func (n *Node) kernelThread(pid int) bool {
	const flag = 0x00200000 // PF_KTHREAD
	f := n.statOf(pid)
	if len(f) <= 6 {
		return false
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	return err == nil && flags&flag != 0
}

// String is how the kernel writes it.
func (w *Network) String() string { return "net:[" + strconv.FormatUint(w.Inode, 10) + "]" }

// reserved are the namespaces that are never touched.
func (n *Node) reserved() ([]string, error) {
	path, err := n.hostPath()
	if err != nil {
		return nil, err
	}
	host, err := os.Readlink(path)
	if err != nil {
		return nil, fmt.Errorf("the host's network: %w", err)
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("stoop's own network: %w", err)
	}
	return []string{host, own}, nil
}

// findNetwork looks for a namespace among those of all processes; hint is one
// that was in it. [ErrGone] when there is none. Only taking back and keeping up
// look this way: no alert waits for it.
func (n *Node) findNetwork(ctx context.Context, inode, cookie uint64, hint int) (*Network, error) {
	link := (&Network{Inode: inode}).String()
	try := func(pid int) *Network {
		if at, err := os.Readlink(n.netPath(pid)); err != nil || at != link {
			return nil
		}
		f, err := os.Open(n.netPath(pid))
		if err != nil {
			return nil
		}
		w, err := newNetwork(f, pid)
		if err != nil {
			return nil
		}
		if w.Inode != inode {
			w.Close()
			return nil
		}
		return w
	}
	w := try(hint)
	if w == nil {
		entries, err := os.ReadDir(n.procDir())
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if pid, err := strconv.Atoi(e.Name()); err == nil {
				if w = try(pid); w != nil {
					break
				}
			}
		}
	}
	if w == nil {
		return nil, fmt.Errorf("network namespace %d: %w", inode, ErrGone)
	}
	if cookie != 0 {
		s, err := w.open(ctx, unix.NETLINK_ROUTE)
		if err != nil {
			w.Close()
			return nil, err
		}
		s.Close()
		if w.Cookie != cookie {
			w.Close()
			return nil, fmt.Errorf("network namespace %d is another one by now: %w", inode, ErrGone)
		}
	}
	return w, nil
}

// sockets are netlink sockets that belong to one namespace, whatever thread uses
// them.
type sockets map[int]*netlink.Conn

func (s sockets) Close() {
	for _, c := range s {
		c.Close()
	}
}

// open makes sockets in the namespace, one of each netlink family, which answer
// until the context's deadline.
func (w *Network) open(ctx context.Context, families ...int) (sockets, error) {
	s := sockets{}
	err := w.run(func() error {
		for _, family := range families {
			c, err := netlink.Dial(family, nil)
			if err != nil {
				return fmt.Errorf("netlink socket: %w", err)
			}
			s[family] = c
			if w.Cookie == 0 {
				w.Cookie = cookieOf(c)
			}
			deadline, ok := ctx.Deadline()
			if !ok {
				deadline = time.Now().Add(10 * time.Second)
			}
			if err := c.SetDeadline(deadline); err != nil {
				return err
			}
		}
		return ctx.Err()
	})
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// cookieOf is the number of the socket's namespace that is never used again.
func cookieOf(c *netlink.Conn) (cookie uint64) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	raw.Control(func(fd uintptr) {
		cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	})
	if err != nil {
		return 0 // before Linux 5.14
	}
	return cookie
}

// run calls f on a thread that is in the namespace and thrown away afterwards:
// no other goroutine can find itself there, whatever fails on the way back.
func (w *Network) run(f func() error) error {
	if w.here {
		return f()
	}
	done := make(chan error, 1)
	go enter(int(w.file.Fd()), f, done)
	err := <-done
	runtime.KeepAlive(w)
	return err
}

func enter(fd int, f func() error, done chan<- error) {
	// Never unlocked: the thread ends with this goroutine.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The process's first thread can't be thrown away, and it is the one whose
		// namespace others see as the process's. While this goroutine holds it, the
		// next gets another.
		defer runtime.UnlockOSThread()
		inner := make(chan error, 1)
		go enter(fd, f, inner)
		done <- <-inner
		return
	}
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		done <- fmt.Errorf("enter a network namespace: %w (CAP_SYS_ADMIN is needed)", err)
		return
	}
	done <- f()
}

func (n *Node) procDir() string {
	if n.cfg.Proc == "" {
		return "/proc"
	}
	return n.cfg.Proc
}

func (n *Node) netPath(pid int) string {
	return filepath.Join(n.procDir(), strconv.Itoa(pid), "ns", "net")
}

// startOf is when the process began, in clock ticks after boot; the largest
// number when it is gone.
func (n *Node) startOf(pid int) uint64 {
	if f := n.statOf(pid); len(f) > 19 {
		if t, err := strconv.ParseUint(f[19], 10, 64); err == nil {
			return t
		}
	}
	return ^uint64(0)
}

// statOf are the fields of /proc/PID/stat after the name, which may hold spaces
// and brackets.
func (n *Node) statOf(pid int) []string {
	b, err := os.ReadFile(filepath.Join(n.procDir(), strconv.Itoa(pid), "stat"))
	if i := strings.LastIndexByte(string(b), ')'); err == nil && i >= 0 {
		return strings.Fields(string(b[i+1:]))
	}
	return nil
}

// mayChangeNetwork reports whether one of the container's processes holds
// NET_ADMIN, or could come to.
func (n *Node) mayChangeNetwork(pids []int) bool {
	const bit = 1 << unix.CAP_NET_ADMIN
	for _, pid := range pids {
		b, err := os.ReadFile(filepath.Join(n.procDir(), strconv.Itoa(pid), "status"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(line, ":")
			switch name {
			case "CapPrm", "CapEff", "CapBnd", "CapAmb":
				if caps, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64); err == nil && caps&bit != 0 {
					return true
				}
			}
		}
	}
	return false
}
