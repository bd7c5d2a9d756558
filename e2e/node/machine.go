package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"stoop/e2e/harness"
)

// The halves of the command that run inside, as its first argument.
const (
	stageInit = "as-init" // process 1 of the node
	stageWork = "work"    // everything else
)

const cgroups = "/sys/fs/cgroup"

// Where Debian puts what a node needs, and which package it is from.
const (
	busybox  = "/bin/busybox"
	cniBin   = "/usr/lib/cni"
	runcPath = "/usr/sbin/runc"
)

// check says what is missing on this machine.
func check() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes namespaces and cgroups, and runs a container runtime")
	}
	var missing, packages []string
	for _, n := range []struct{ file, pkg string }{
		{"containerd", "containerd"},
		{"ctr", "containerd"},
		{runcPath, "runc"},
		{cniBin + "/bridge", "containernetworking-plugins"},
		{cniBin + "/host-local", "containernetworking-plugins"},
		{cniBin + "/loopback", "containernetworking-plugins"},
		{"ip", "iproute2"},
		{"mount", "mount"},
		{busybox, "busybox-static"},
	} {
		if _, err := exec.LookPath(n.file); err != nil || n.file == busybox && !static(busybox) {
			missing = append(missing, n.file)
			if !slices.Contains(packages, n.pkg) {
				packages = append(packages, n.pkg)
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing: %s; on Debian: apt-get install --no-install-recommends %s",
			strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	return nil
}

// static reports whether a program needs no libraries: it is to run in an image
// that has none.
func static(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// enter runs this program again as process 1 of new namespaces, and returns when
// it and everything that it started is gone.
func enter(ctx context.Context, s settings, path string, stdout io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	cmd := exec.Command(self, stageInit, path)
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	// What copies stdout waits for its last writer, which may be a process
	// that is still being killed.
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET}
	p, err := harness.Spawn(cmd)
	if err != nil {
		return fmt.Errorf("make the node's namespaces: %w", err)
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
	}
	for range 100 {
		// The kernel ends with process 1 whatever is left in its namespace, but
		// a frozen process of cgroup v1 dies only when it is thawed.
		if err := p.Signal(syscall.SIGKILL); err != nil {
			return err
		}
		thaw(s.Cgroup)
		select {
		case <-p.Done():
			return p.Wait(time.Second)
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("process %d, the node's first, survives SIGKILL", p.PID)
}

// asInit is process 1 of the node: it makes the mounts, starts the work, and
// takes in the processes whose parents are gone.
func asInit(path string) int {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is started by the command itself only")
		return 2
	}
	if err := mounts(filepath.Dir(path)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "find this program:", err)
		return 1
	}
	worker, err := os.StartProcess(self, []string{self, stageWork, path}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the work inside:", err)
		return 1
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			fmt.Fprintln(os.Stderr, "wait for the work inside:", err)
			return 1
		case pid == worker.Pid && status.Exited():
			return status.ExitStatus()
		case pid == worker.Pid:
			fmt.Fprintln(os.Stderr, "the work inside ended:", status.Signal())
			return 1
		}
	}
}

// mounts are those of the node: the machine's, of which nothing gets out, with
// /proc of the new pid namespace and a /run of its own.
func mounts(dir string) error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"none", "/", "", syscall.MS_REC | syscall.MS_PRIVATE, ""},
		{"proc", "/proc", "proc", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
		// The kubelet and containerd want to share mounts with their containers.
		{"none", "/", "", syscall.MS_REC | syscall.MS_SHARED, ""},
		{"tmpfs", "/run", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=755"},
	} {
		if err := syscall.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
		}
	}
	if err := os.Mkdir("/run/lock", 0o755); err != nil {
		return fmt.Errorf("fill /run: %w", err)
	}
	return maskSysctls(filepath.Join(dir, "sysctl"))
}

// maskSysctls shows the kubelet the values that it wants of the whole machine,
// and would set if they were others, instead of having them changed.
func maskSysctls(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("mask what the kubelet would change: %w", err)
	}
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0",
		"kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		mask, real := filepath.Join(dir, filepath.Base(name)), "/proc/sys/"+name
		if err := os.WriteFile(mask, []byte(value+"\n"), 0o644); err != nil {
			return fmt.Errorf("mask what the kubelet would change: %w", err)
		}
		if err := syscall.Mount(mask, real, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("mask %s from the kubelet: %w", real, err)
		}
	}
	return nil
}

// prefix begins the names of what a run leaves to be seen, followed by the
// number of its process.
const prefix = "stoop-e2e-node-"

// makeDir makes the run's folder; it is removed with t.
func makeDir(t harness.T, name string) string {
	t.Helper()
	dir := filepath.Join(os.TempDir(), name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatalf("make the node's folder: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Logf("remove the node's folder: %v", err)
		}
	})
	return dir
}

// hierarchies are the folders under which the node has a cgroup of its own: of
// version 1 one for each controller, of version 2 the one.
func hierarchies() ([]string, error) {
	if unified() {
		return []string{cgroups}, nil
	}
	entries, err := os.ReadDir(cgroups)
	if err != nil {
		return nil, fmt.Errorf("look for the cgroup hierarchies: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() { // not the symlinks beside them
			out = append(out, filepath.Join(cgroups, e.Name()))
		}
	}
	return out, nil
}

// unified reports whether the machine has cgroup v2 alone.
func unified() bool {
	_, err := os.Stat(cgroups + "/cgroup.controllers")
	return err == nil
}

// makeCgroups makes the node's cgroups; they are removed with t.
func makeCgroups(t harness.T, name string) {
	t.Helper()
	dirs, err := hierarchies()
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := removeCgroups(name, 10*time.Second); err != nil {
			t.Logf("%v", err)
		}
	})
	for _, dir := range dirs {
		own := filepath.Join(dir, name)
		if err := os.Mkdir(own, 0o755); err != nil {
			t.Fatalf("make the node's cgroup: %v", err)
		}
		// A cpuset of version 1 takes nobody in before it is told of what.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(dir, f))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(own, f), b, 0o644)
			}
			if err != nil {
				t.Fatalf("set up the node's cpuset: %v", err)
			}
		}
	}
}

// removeCgroups removes the node's cgroups, and tries for as long as within: a
// process leaves its cgroups a little after its end.
func removeCgroups(name string, within time.Duration) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	deadline := time.Now().Add(within)
	for {
		err = nil
		for _, dir := range dirs {
			err = errors.Join(err, removeCgroup(filepath.Join(dir, name)))
		}
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove a cgroup: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeCgroup(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a cgroup: %w", err)
	}
	return nil
}

// thaw lets every frozen cgroup of the node go on.
func thaw(name string) {
	dirs, err := hierarchies()
	if err != nil {
		return
	}
	for _, dir := range dirs {
		// Errors need no answer: what matters is whether the processes end.
		_ = filepath.WalkDir(filepath.Join(dir, name), func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			switch e.Name() {
			case "freezer.state":
				_ = os.WriteFile(path, []byte("THAWED"), 0)
			case "cgroup.freeze":
				_ = os.WriteFile(path, []byte("0"), 0)
			}
			return nil
		})
	}
}

// sweep removes what was left by runs that were killed before they could. What was
// frozen in their cgroups had the SIGKILL waiting for it.
func sweep(logf func(string, ...any)) {
	dirs, err := hierarchies()
	if err != nil {
		return
	}
	left := map[string]bool{}
	for _, dir := range append(dirs, os.TempDir()) {
		paths, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
		if err != nil {
			continue
		}
		for _, path := range paths {
			left[filepath.Base(path)] = true
		}
	}
	for name := range left {
		pid, err := strconv.Atoi(strings.TrimPrefix(name, prefix))
		if err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		thaw(name)
		err = removeCgroups(name, 5*time.Second)
		if err := errors.Join(err, os.RemoveAll(filepath.Join(os.TempDir(), name))); err != nil {
			logf("of an earlier run: %v", err)
		}
	}
}
