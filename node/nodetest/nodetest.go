// Package nodetest makes what tests of the node's own responders act on: real
// cgroups that look like a container's, real processes in them, real network
// namespaces. It is no part of an alert's way. Whatever it makes goes when the
// test ends.
package nodetest

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Root skips the test unless it runs as root, or fails it where CI is set. See
// [Missing] for what else a machine may lack.
func Root(t testing.TB) {
	t.Helper()
	const why = "needs root: it makes cgroups, namespaces and processes of its own"
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") != "":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

// Missing skips the test because the machine lacks something, or fails it where
// CI is set: there a skipped test would be one that nobody ever runs.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("missing here: "+format, args...)
	}
	t.Skipf("missing here: "+format, args...)
}

// Wait polls until ok, and fails the test when it never is.
func Wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s in vain for %s", what)
		}
	}
}

// ID is a container's id that nobody else has.
func ID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

// mounted is where the first file system of the kind is; "" if there is none.
func mounted(fstype, option string) string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 || g[0] != fstype {
			continue
		}
		if option == "" || strings.Contains(","+g[2]+",", ","+option+",") {
			return f[4]
		}
	}
	return ""
}

// FreezerV1 is the root of the freezer hierarchy of cgroup v1.
func FreezerV1(t testing.TB) string {
	t.Helper()
	Root(t)
	root := mounted("cgroup", "freezer")
	if root == "" {
		Missing(t, "cgroup v1 with its freezer hierarchy")
	}
	return root
}

// UnifiedV2 is the root of the cgroup v2 hierarchy.
func UnifiedV2(t testing.TB) string {
	t.Helper()
	Root(t)
	root := mounted("cgroup2", "")
	if root == "" {
		Missing(t, "cgroup v2")
	}
	return root
}

// CgroupV1 makes the freezer cgroup of a container and returns its folder, whose
// name is the container's whole id: /sys/fs/cgroup/freezer/docker/<id>.
func CgroupV1(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(FreezerV1(t), "docker", ID())
	Cgroup(t, dir)
	return dir
}

// CgroupV2 is CgroupV1 for cgroup v2: /sys/fs/cgroup/unified/docker/<id>, or
// without unified where there is no v1.
func CgroupV2(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(UnifiedV2(t), "docker", ID())
	Cgroup(t, dir)
	return dir
}

// PodV1 and PodV2 make the cgroup of a container in a Kubernetes pod.
func PodV1(t testing.TB) (dir, podUID string) {
	t.Helper()
	return pod(t, FreezerV1(t))
}

// PodV2 is PodV1 for cgroup v2.
func PodV2(t testing.TB) (dir, podUID string) {
	t.Helper()
	return pod(t, UnifiedV2(t))
}

func pod(t testing.TB, root string) (dir, uid string) {
	id := ID()
	uid = id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:32]
	dir = filepath.Join(root, "kubepods", "burstable", "pod"+uid, ID())
	Cgroup(t, dir)
	return dir, uid
}

// Cgroup makes the cgroup at dir, with the folders above it. When the test ends
// all that runs in it is killed, and it is removed with those of the folders
// above that were made for it.
func Cgroup(t testing.TB, dir string) {
	t.Helper()
	var made []string
	for p := dir; ; p = filepath.Dir(p) {
		if _, err := os.Stat(p); err == nil {
			break
		}
		made = append(made, p)
	}
	// Another test may remove its empty folder between our look and our mkdir.
	var err error
	for range 100 {
		if err = os.MkdirAll(dir, 0o755); err == nil || !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		Missing(t, "a writable cgroup hierarchy: %v", err)
	}
	t.Cleanup(func() {
		if err := remove(dir); err != nil {
			t.Errorf("removing cgroup %s: %v", dir, err)
		}
		for _, p := range made {
			_ = unix.Rmdir(p) // others may be in there by now
		}
	})
}

// remove ends what runs in a cgroup and takes it away.
func remove(dir string) error {
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		var folders []string
		_ = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				folders = append(folders, p)
			}
			return nil
		})
		for i := len(folders) - 1; i >= 0; i-- {
			_ = os.WriteFile(filepath.Join(folders[i], "cgroup.kill"), []byte("1"), 0)
			for _, pid := range Pids(folders[i]) {
				if pid != os.Getpid() {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
			thaw(folders[i])
			err = unix.Rmdir(folders[i])
		}
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	return err
}

func thaw(dir string) {
	// Opened without O_CREATE: each folder has one of the two.
	for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
		if f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteString(value)
			_ = f.Close()
		}
	}
}

// Pids are the processes in one cgroup.
func Pids(dir string) []int {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil && n > 0 {
			pids = append(pids, n)
		}
	}
	return pids
}

// In is where a process starts.
type In struct {
	Cgroups []string // folders, at most one of each hierarchy
	Netns   *Network // nil: the test's
}

// Start starts a command where in says, and returns when it is there. When the
// test ends it is killed and waited for.
func Start(t testing.TB, in In, cmd *exec.Cmd) {
	t.Helper()
	started := make(chan error)
	aside(func() {
		// The child is born into the namespace that this thread is in. The
		// thread ends with this goroutine, for it is never unlocked.
		started <- in.start(cmd)
	})
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for _, dir := range in.Cgroups {
			thaw(dir) // the frozen of v1 don't die
		}
		_ = cmd.Wait()
	})
	for _, dir := range in.Cgroups {
		Wait(t, "process to be in "+dir, func() bool {
			return slices.Contains(Pids(dir), cmd.Process.Pid) || !running(cmd.Process.Pid)
		})
	}
}

// running reports whether a process is more than a zombie.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := bytes.Cut(b, []byte(") "))
	return err == nil && len(rest) > 0 && rest[0] != 'Z' && rest[0] != 'X'
}

func (in In) start(cmd *exec.Cmd) error {
	if in.Netns != nil {
		if err := unix.Setns(int(in.Netns.File.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
	}
	for _, dir := range in.Cgroups {
		if _, err := os.Stat(filepath.Join(dir, "tasks")); err == nil {
			// Nothing is born into a cgroup of v1 but from within: a shell goes
			// there and becomes the command.
			cmd.Args = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(dir, "cgroup.procs"), cmd.Path}, cmd.Args[1:]...)
			cmd.Path = "/bin/sh"
			continue
		}
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer f.Close()
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
	return cmd.Start()
}

// Shell runs a script of sh in a cgroup. What it prints first is waited for, so
// that the caller knows that it got there.
func Shell(t testing.TB, cgroup, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "echo ready\n"+script)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	Start(t, In{Cgroups: []string{cgroup}}, cmd)
	_ = w.Close()
	defer r.Close()
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the shell in %s said %q: %v", cgroup, line, err)
	}
	return cmd
}

// Counter runs a process in a cgroup that writes ever growing numbers into a
// file as fast as it can, and returns it with a function that reads the last
// one. It is how a test sees whether a process runs.
func Counter(t testing.TB, cgroup string) (cmd *exec.Cmd, count func() int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "count")
	cmd = Shell(t, cgroup, `i=0; while :; do i=$((i+1)); echo $i >`+file+`; done`)
	count = func() int {
		b, _ := os.ReadFile(file)
		n, _ := strconv.Atoi(string(bytes.TrimSpace(b)))
		return n
	}
	Wait(t, "the counter to count", func() bool { return count() > 0 })
	return cmd, count
}

// Network is a network namespace.
type Network struct{ File *os.File }

// Netns makes a network namespace in which nothing but its loopback is, which is
// up. It lasts as long as its file is open: until the test ends.
func Netns(t testing.TB) *Network {
	t.Helper()
	Root(t)
	type result struct {
		f   *os.File
		err error
	}
	made := make(chan result)
	aside(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{err: err}
			return
		}
		if err := loopbackUp(); err != nil {
			made <- result{err: err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		made <- result{f, err}
	})
	r := <-made
	if r.err != nil {
		Missing(t, "network namespaces: %v", r.err)
	}
	t.Cleanup(func() { _ = r.f.Close() })
	return &Network{r.f}
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// Do runs f in a thread that is in the namespace and is thrown away afterwards.
// Sockets that f makes stay in the namespace wherever they are used. f must not
// end the test (t.Fatal): it runs in a goroutine of its own.
func (n *Network) Do(t testing.TB, f func() error) {
	t.Helper()
	done := make(chan error)
	aside(func() {
		if err := unix.Setns(int(n.File.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		done <- f()
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
