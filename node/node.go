// Package node is the machine that stoop runs on, as its kernel shows it: which
// processes belong to which container, and how a container is frozen, killed,
// or its network entered. It is where an alert's way ends when the answer needs
// no API server: the responders that act on the node itself are built on it.
//
// Nothing here believes an alert. A process is who it is by its start time and
// its cgroup, a container by the cgroup that the container runtime made for it.
package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"syscall"
)

// Config is where the kernel is found. The zero value is this machine, seen from
// a process of the host.
type Config struct {
	Proc   string // where procfs is mounted; "" is /proc
	Cgroup string // where the cgroup hierarchies are mounted; "" is /sys/fs/cgroup
	Log    *slog.Logger
}

// Node knows the containers of this machine.
type Node struct{ cfg Config }

// Errors that callers may test for.
var (
	// ErrGone says that the container or the process is not there any more.
	ErrGone = errors.New("not there any more")
	// ErrAmbiguous says that two containers share the shortened id.
	ErrAmbiguous = errors.New("two containers share this id")
	// ErrNotSame says that the number now belongs to another process.
	ErrNotSame = errors.New("another process has this number now")
)

// New is a node whose containers are looked up when asked; [Node.Run] keeps them
// at hand.
func New(c Config) *Node { return &Node{c} }

// Run keeps the index of containers up to date until ctx is done.
func (n *Node) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// BootID is the kernel's id of this boot.
func (n *Node) BootID() string { return "" }

// Container finds a running container by its id (12 characters or whole). pid, where it is
// not 0, is a process that may be in it: a hint that saves the search, never a proof.
func (n *Node) Container(ctx context.Context, id string, pid int) (*Container, error) {
	return nil, ErrGone
}

// Container is a container's cgroup.
type Container struct {
	ID     string // whole
	PodUID string // of the Kubernetes pod; "" for a plain container
	Path   string // the cgroup's folder, of the hierarchy that freezes and kills
	Inode  uint64 // of that folder: a container that is made anew has another
}

// Pids are the processes in the container, those in cgroups below its own too.
func (c *Container) Pids() ([]int, error) { return nil, nil }

// Freeze stops every process and returns when the kernel says that all have
// stopped. already says that it was frozen before.
func (c *Container) Freeze(ctx context.Context) (already bool, err error) { return false, nil }

// Thaw lets it go on; already says that it was not frozen.
func (c *Container) Thaw(ctx context.Context) (already bool, err error) { return false, nil }

// Frozen reports whether all of it has stopped.
func (c *Container) Frozen() (bool, error) { return false, nil }

// Kill ends every process at once and returns when none is left; how many there were.
func (c *Container) Kill(ctx context.Context) (killed int, err error) { return 0, nil }

// Process proves that pid is the process that start (nanoseconds since 1970, as
// Falco's proc.pid.ts; 0: unknown) and container (its id; "": any, "host": none)
// say, and holds on to it.
func (n *Node) Process(pid int, start int64, container string) (*Process, error) {
	return nil, ErrGone
}

// Process is one process, held by a pidfd: its number can't come to mean another.
type Process struct {
	PID      int
	Start    uint64 // clock ticks after boot, as in /proc/PID/stat
	Comm     string
	Exe      string // the executable's path as the process sees it; "" where it can't be read
	Pidfd    *os.File
	CgroupOf string // the container's whole id; "" for a process of the host
}

// Signal sends a signal through the pidfd; [ErrGone] when it ended before.
func (p *Process) Signal(s syscall.Signal) error { return ErrGone }

// Alive reports whether it still runs.
func (p *Process) Alive() bool { return false }

// Tree is the process and all its descendants, each held; those that ended meanwhile are left out.
func (p *Process) Tree() ([]*Process, error) { return nil, nil }

// Close lets go of it.
func (p *Process) Close() error { return nil }

// Need is something that the machine must grant for an act.
type Need string

// What the node's responders need.
const (
	NeedHostPID       Need = "host pids"      // hostPID: true, or a process of the host
	NeedCgroup        Need = "cgroups"        // the cgroup hierarchy, writable
	NeedKill          Need = "CAP_KILL"       // signal processes of others
	NeedPtrace        Need = "CAP_SYS_PTRACE" // /proc/PID/exe, root, environ, ns of others
	NeedSysAdmin      Need = "CAP_SYS_ADMIN"  // enter namespaces
	NeedNetAdmin      Need = "CAP_NET_ADMIN"  // packet filters
	NeedDACReadSearch Need = "CAP_DAC_READ_SEARCH"
	NeedDACOverride   Need = "CAP_DAC_OVERRIDE"
)

// Missing says, one sentence each, which of the needs this process does not have
// here and what to do about it; nil: all are there.
func (n *Node) Missing(needs ...Need) []string { return nil }
