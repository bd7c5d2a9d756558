// Package node is the machine that stoop runs on, as its kernel shows it: which
// processes belong to which container, and how a container is frozen, killed,
// or its network entered. It is where an alert's way ends when the answer needs
// no API server: the responders that act on the node itself are built on it.
//
// Nothing here believes an alert. A process is who it is by its start time and
// its cgroup, a container by the cgroup that the container runtime made for it.
package node

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// Config is where the kernel is found. The zero value is this machine, seen from
// a process of the host.
type Config struct {
	Proc   string // where procfs is mounted; "" is /proc
	Cgroup string // where the cgroup hierarchies are mounted; "" is /sys/fs/cgroup
	Log    *slog.Logger
}

// Node knows the containers of this machine.
type Node struct {
	cfg         Config
	log         *slog.Logger
	hierarchies []hierarchy
	index       *index
	clocks      *clocks
	looks       atomic.Int32
	noChildren  bool // the kernel lists no children, as far as a test is concerned
}

// Errors that callers may test for.
var (
	// ErrGone says that the container or the process is not there any more.
	ErrGone = errors.New("not there any more")
	// ErrAmbiguous says that two containers share the shortened id.
	ErrAmbiguous = errors.New("two containers share this id")
	// ErrNotSame says that the number now belongs to another process.
	ErrNotSame = errors.New("another process has this number now")
	// ErrStopping says that a container was told to freeze, and stays so, but not
	// all of its processes have stopped yet.
	ErrStopping = errors.New("not all of its processes have stopped yet")
	// ErrOwn says that the container is left alone whatever is asked.
	ErrOwn = errors.New("it is the container that stoop itself runs in")
)

// New is a node whose containers are looked up when asked; [Node.Run] keeps them
// at hand.
func New(c Config) *Node {
	c.Proc = filepath.Clean(cmp.Or(c.Proc, "/proc"))
	c.Cgroup = filepath.Clean(cmp.Or(c.Cgroup, "/sys/fs/cgroup"))
	n := &Node{cfg: c, log: c.Log, hierarchies: hierarchies(c.Cgroup), index: newIndex(), clocks: &clocks{}}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	n.clocks.note()
	return n
}

// BootID is the kernel's id of this boot; "" where it can't be read.
func (n *Node) BootID() string {
	b, _ := os.ReadFile(filepath.Join(n.cfg.Proc, "sys/kernel/random/boot_id"))
	return strings.TrimSpace(string(b))
}

// Container is a container's cgroup.
type Container struct {
	ID     string // whole
	PodUID string // of the Kubernetes pod; "" for a plain container
	Path   string // the cgroup's folder, of the hierarchy that freezes and kills
	Inode  uint64 // of that folder: a container that is made anew has another

	version int
	node    *Node
}

// Process is one process, held by a pidfd: its number can't come to mean another.
type Process struct {
	PID      int
	Parent   int    // when it was looked at; another where its parent ended since
	Start    uint64 // clock ticks after boot, as in /proc/PID/stat
	Comm     string
	Exe      string // the executable's path as the process sees it; "" where it can't be read
	Kernel   bool   // it is a thread of the kernel's own
	Pidfd    *os.File
	CgroupOf string // the container's whole id; "" for a process of the host

	node *Node
}
