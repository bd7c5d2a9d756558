package responders

import (
	"bytes"
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// group is the cgroup that one program and all its children run in, whatever
// sessions and process groups they make. It is a folder below stoop's own in
// each hierarchy that stoop may write to: cgroup2, and on older machines those of
// v1 that count processes and memory. nil has no folder and does nothing.
type group struct {
	dirs []string
	path string // as /proc/PID/cgroup says it, in the hierarchy that kills
	dir  string // of that hierarchy; "": none
}

// newGroup makes the folders, with the limits that each hierarchy can hold. Where
// there are some already, an earlier run of the same step was cut off, and what
// is left of it is killed first. It does what it can: nil says that that was
// nothing.
func newGroup(root proc, name string, memory int64) *group {
	var g group
	for _, h := range root.hierarchies() {
		dir := filepath.Join(h.dir, name)
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) {
			left := &group{dirs: []string{dir}, dir: dir}
			left.kill()
			left.remove()
			err = os.Mkdir(dir, 0o755)
		}
		if err != nil {
			continue // no cgroups, or not ours to make
		}
		g.dirs = append(g.dirs, dir)
		if h.v2 || h.controller == "pids" && g.dir == "" {
			g.dir, g.path = dir, h.path+"/"+name
		}
		// Not every hierarchy has every one of them.
		for file, value := range map[string]int64{
			"memory.max": memory, "memory.swap.max": 0, "memory.oom.group": 1,
			"memory.limit_in_bytes": memory, "pids.max": runProcesses,
		} {
			_ = writeExisting(filepath.Join(dir, file), strconv.FormatInt(value, 10))
		}
	}
	if len(g.dirs) == 0 {
		return nil
	}
	return &g
}

func (g *group) folders() []string {
	if g == nil {
		return nil
	}
	return g.dirs
}

// kills reports whether the group takes in every child.
func (g *group) kills() bool { return g != nil && g.dir != "" }

func (g *group) name() string {
	if g == nil {
		return ""
	}
	return g.path
}

// groupKill bounds how long it is waited for the last process to go.
const groupKill = 2 * time.Second

// kill ends every process in the group and returns when none is left, or after
// [groupKill].
func (g *group) kill() {
	if !g.kills() {
		return
	}
	_ = writeExisting(filepath.Join(g.dir, "pids.max"), "0") // none is made any more
	whole := writeExisting(filepath.Join(g.dir, "cgroup.kill"), "1") == nil
	for end := time.Now().Add(groupKill); time.Now().Before(end); time.Sleep(time.Millisecond) {
		pids := g.pids()
		if len(pids) == 0 {
			return
		}
		if whole {
			continue
		}
		// Before Linux 5.14, or in v1.
		for _, pid := range pids {
			g.killOne(pid)
		}
	}
}

// pids are the processes in the group and the groups below it.
func (g *group) pids() []int {
	var pids []int
	_ = filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for f := range bytes.FieldsSeq(b) {
			if pid, err := strconv.Atoi(string(f)); err == nil && pid > 0 && !isZombie(pid) {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// killOne kills a process, unless its number is another's by now.
func (g *group) killOne(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if slices.Contains(g.pids(), pid) {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// isZombie reports whether a process is dead and only waits to be waited for: v1
// lists those as well.
func isZombie(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	i := bytes.LastIndexByte(b, ')')
	return err == nil && i > 0 && i+2 < len(b) && b[i+2] == 'Z'
}

// remove takes the folders away, and those that the program made in them.
func (g *group) remove() {
	for _, top := range g.folders() {
		for end := time.Now().Add(groupKill); ; time.Sleep(time.Millisecond) {
			var dirs []string
			_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				_ = unix.Rmdir(dir)
			}
			// The kernel may still be clearing up behind the last process.
			if _, err := os.Stat(top); err != nil || time.Now().After(end) {
				break
			}
		}
	}
}

// hierarchy is where stoop itself stands in one of the kernel's cgroup trees.
type hierarchy struct {
	v2         bool
	controller string // of v1: "pids" or "memory"; "" for v2
	dir        string // stoop's own folder
	path       string // the same, as /proc/PID/cgroup says it; "" is the root
}

// hierarchies are those that can hold a program: cgroup2 first.
func (root proc) hierarchies() []hierarchy {
	mounts, err := os.ReadFile(filepath.Join(string(root), "self", "mountinfo"))
	if err != nil {
		return nil
	}
	own, err := os.ReadFile(filepath.Join(string(root), "self", "cgroup"))
	if err != nil {
		return nil
	}
	// "0::/path" for v2, "8:pids:/path" for v1.
	paths := map[string]string{}
	for line := range strings.Lines(string(own)) {
		part := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(part) == 3 {
			for c := range strings.SplitSeq(part[1], ",") {
				paths[c] = part[2]
			}
		}
	}
	var found []hierarchy
	seen := map[string]bool{}
	for line := range strings.Lines(string(mounts)) {
		// proc_pid_mountinfo(5): … root mountpoint options … - type source options
		front, back, _ := strings.Cut(line, " - ")
		f, b := strings.Fields(front), strings.Fields(back)
		if len(f) < 6 || len(b) < 3 {
			continue
		}
		h := hierarchy{v2: b[0] == "cgroup2"}
		if b[0] == "cgroup" {
			for c := range strings.SplitSeq(b[2], ",") {
				if c == "pids" || c == "memory" {
					h.controller = c
				}
			}
		}
		at, ok := paths[h.controller]
		if !h.v2 && h.controller == "" || !ok || seen[h.controller] {
			continue
		}
		seen[h.controller] = true
		mounted, top := unescape(f[4]), unescape(f[3])
		rel, err := filepath.Rel(top, at)
		switch {
		case strings.HasPrefix(top, "/.."):
			// The host's tree, mounted into a container that has a cgroup
			// namespace of its own: begin at its top.
			h.dir, h.path = mounted, top
		case err == nil && rel != ".." && !strings.HasPrefix(rel, "../"):
			h.dir, h.path = filepath.Join(mounted, rel), strings.TrimSuffix(at, "/")
		default:
			continue // stoop's own place is not in what is mounted
		}
		found = append(found, h)
	}
	slices.SortStableFunc(found, func(a, b hierarchy) int { return cmp.Compare(a.controller, b.controller) })
	return found
}

// unescape reads a path of mountinfo, in which white space is octal.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// writeExisting writes to a file of the kernel's, and makes none.
func writeExisting(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
