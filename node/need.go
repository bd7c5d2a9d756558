package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

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
	NeedNetRaw        Need = "CAP_NET_RAW"    // packet sockets
	NeedDACReadSearch Need = "CAP_DAC_READ_SEARCH"
	NeedDACOverride   Need = "CAP_DAC_OVERRIDE"
)

// capability is the bit of a need that is one; ok is false for the others.
func (n Need) capability() (bit int, ok bool) {
	switch n {
	case NeedKill:
		return unix.CAP_KILL, true
	case NeedPtrace:
		return unix.CAP_SYS_PTRACE, true
	case NeedSysAdmin:
		return unix.CAP_SYS_ADMIN, true
	case NeedNetAdmin:
		return unix.CAP_NET_ADMIN, true
	case NeedNetRaw:
		return unix.CAP_NET_RAW, true
	case NeedDACReadSearch:
		return unix.CAP_DAC_READ_SEARCH, true
	case NeedDACOverride:
		return unix.CAP_DAC_OVERRIDE, true
	}
	return 0, false
}

// Missing says, one sentence each, which of the needs this process does not have
// here and what to do about it; nil: all are there.
func (n *Node) Missing(needs ...Need) []string {
	var missing []string
	for _, need := range needs {
		var why string
		switch bit, ok := need.capability(); {
		case ok:
			why = lacks(need, bit)
		case need == NeedHostPID:
			why = n.lacksHostPID()
		case need == NeedCgroup:
			why = n.lacksCgroup()
		default:
			why = fmt.Sprintf("nobody knows how to grant %q", string(need))
		}
		if why != "" {
			missing = append(missing, why)
		}
	}
	return missing
}

func lacks(need Need, bit int) string {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Sprintf("stoop's capabilities can't be read: %v", err)
	}
	if data[bit/32].Effective&(1<<(bit%32)) != 0 {
		return ""
	}
	return fmt.Sprintf("stoop lacks %s: run it as root, in a pod with securityContext.capabilities.add: [%s], under systemd with it in CapabilityBoundingSet=",
		need, strings.TrimPrefix(string(need), "CAP_"))
}

// lacksHostPID says why stoop does not see the host's processes.
func (n *Node) lacksHostPID() string {
	const set = "set hostPID: true on stoop's pod (docker run --pid=host)"
	if err := n.sameNumbers(); err != nil {
		return err.Error()
	}
	own, err := os.ReadFile(filepath.Join(n.cfg.Proc, "self", "cgroup"))
	if err != nil {
		return fmt.Sprintf("stoop can't read its own cgroup: %v", err)
	}
	first, err := os.ReadFile(n.procPath(1, "cgroup"))
	if err != nil {
		return fmt.Sprintf("process 1 of the host is not to be seen in %s (%v): %s", n.cfg.Proc, err, set)
	}
	if namespace("pid") == initialPID {
		return ""
	}
	place, _, _ := readCgroup(own)
	one, _, _ := readCgroup(first)
	switch {
	case place.Container != "" && place == one,
		// Out of a cgroup namespace of its own a container sees itself at the root.
		place == Place{} && bytes.Equal(own, first) && namespace("cgroup") != initialCgroup:
		return "stoop runs in a container and sees only that one's processes: " + set
	}
	return ""
}

// The first namespaces have fixed numbers: include/linux/proc_ns.h.
const (
	initialPID    = "pid:[4026531836]"
	initialCgroup = "cgroup:[4026531835]"
)

func namespace(kind string) string {
	link, _ := os.Readlink("/proc/self/ns/" + kind)
	return link
}

func (n *Node) lacksCgroup() string {
	if len(n.hierarchies) == 0 {
		return fmt.Sprintf("there are no cgroups below %s that can freeze (v2 since Linux 5.2, or v1 with its freezer): mount the host's /sys/fs/cgroup there", n.cfg.Cgroup)
	}
	for _, h := range n.hierarchies {
		path := filepath.Join(h.root, "cgroup.procs")
		switch err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); {
		case errors.Is(err, syscall.EROFS):
			return fmt.Sprintf("%s is mounted read-only: mount the host's /sys/fs/cgroup writable (hostPath volume, readOnly: false)", h.root)
		case err != nil:
			return fmt.Sprintf("%s is not writable (%v): run stoop as root", h.root, err)
		}
		// The root of a container's own cgroup namespace is a cgroup that holds
		// processes; the host's root of v2 can't be frozen, nor v1's.
		tell := "cgroup.freeze"
		if h.version == 1 {
			tell = "freezer.state"
		}
		if _, err := os.Stat(filepath.Join(h.root, tell)); err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join(h.root, "cgroup.procs"))
		if err == nil && slices.Contains(strings.Fields(string(b)), strconv.Itoa(os.Getpid())) {
			return fmt.Sprintf("%s shows only stoop's own container: mount the host's /sys/fs/cgroup there (hostPath volume)", h.root)
		}
	}
	return ""
}
