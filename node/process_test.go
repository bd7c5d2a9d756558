package node_test

import (
	"errors"
	"fmt"
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

	"stoop/node"
	"stoop/node/nodetest"
)

// start runs a command of the host until the test ends, and says when it began as
// Falco would.
func start(t testing.TB, args ...string) (pid int, began int64) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid, startOf(t, cmd.Process.Pid)
}

// startOf is a process's start by the clock on the wall, to the tick.
func startOf(t testing.TB, pid int) int64 {
	t.Helper()
	return startIn(t, "/proc", pid)
}

func startIn(t testing.TB, proc string, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("%s/%d/stat", proc, pid))
	if err != nil {
		t.Fatal(err)
	}
	ticks, err := strconv.ParseInt(strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	return time.Now().UnixNano() - boot.Nano() + ticks*int64(10*time.Millisecond)
}

func TestProcess(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	id := filepath.Base(dir)
	cmd := nodetest.Shell(t, dir, "while :; do sleep 1; done")
	in, inBegan := cmd.Process.Pid, startOf(t, cmd.Process.Pid)
	host, hostBegan := start(t, "sleep", "100")
	n := node.New(node.Config{})
	ms := int64(time.Millisecond)
	other := nodetest.ID()
	for _, tc := range []struct {
		name      string
		pid       int
		start     int64
		container string
		want      error // nil: proved; errors.ErrUnsupported: any other
	}{
		{"by start", in, inBegan, "", nil},
		{"by container", in, 0, id[:12], nil},
		{"by whole container", in, 0, id, nil},
		{"by both", in, inBegan, id[:12], nil},
		{"as Falco tells it", in, inBegan + 8*ms, id[:12], nil},
		{"of the host", host, hostBegan, "host", nil},
		{"of the host, anywhere", host, hostBegan + 3*ms, "", nil},

		{"a little early", in, inBegan - 40*ms, "", node.ErrNotSame},
		{"a little late", in, shown(t, in) + 50*ms, "", node.ErrNotSame},
		{"a number used again", in, inBegan - int64(time.Hour), id[:12], node.ErrNotSame},
		{"a later one", in, inBegan + int64(time.Hour), id[:12], node.ErrNotSame},
		{"another container", in, inBegan, other[:12], node.ErrNotSame},
		{"another container, no start", in, 0, other[:12], node.ErrNotSame},
		{"a container's, said to be the host's", in, inBegan, "host", node.ErrNotSame},
		{"the host's, said to be a container's", host, hostBegan, id[:12], node.ErrNotSame},
		{"nobody", 1<<22 + 7, inBegan, "", node.ErrGone},
		{"its number alone", host, 0, "", errors.ErrUnsupported},
		{"its number alone, on the host", host, 0, "host", errors.ErrUnsupported},
		{"no number", 0, inBegan, id[:12], errors.ErrUnsupported},
		{"a group", -in, inBegan, id[:12], errors.ErrUnsupported},
		{"no time", in, -1, id[:12], errors.ErrUnsupported},
		{"no container", in, inBegan, "../..", errors.ErrUnsupported},
		{"a container too short", in, inBegan, id[:11], errors.ErrUnsupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := n.Process(tc.pid, tc.start, tc.container)
			if err == nil {
				defer p.Close()
			}
			switch {
			case tc.want == nil && err != nil, tc.want != nil && err == nil:
				t.Fatalf("%+v, %v", p, err)
			case tc.want == nil:
				if p.PID != tc.pid || !p.Alive() || p.Parent != os.Getpid() || p.Exe == "" || p.Comm == "" || (p.CgroupOf == id) != (tc.pid == in) {
					t.Errorf("%+v", p)
				}
			case errors.Is(tc.want, errors.ErrUnsupported):
				if errors.Is(err, node.ErrGone) || errors.Is(err, node.ErrNotSame) {
					t.Error(err)
				}
			case !errors.Is(err, tc.want):
				t.Error(err)
			}
		})
	}
}

// shown is when the kernel first made a process's folder in /proc, which Falco
// takes for the start of one that ran before it did.
func shown(t testing.TB, pid int) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ctim.Nano()
}

// One that ran before Falco is told by when Falco found it, where that can be known.
func TestProcessBeforeFalco(t *testing.T) {
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	time.Sleep(100 * time.Millisecond) // nobody looks at it meanwhile
	found := shown(t, cmd.Process.Pid)
	n := node.New(node.Config{})
	p, err := n.Process(cmd.Process.Pid, found, "host")
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Close()
	if p, err := n.Process(cmd.Process.Pid, found+int64(50*time.Millisecond), "host"); !errors.Is(err, node.ErrNotSame) {
		t.Errorf("%+v, %v", p, err)
	}
}

// A thread's number is no process's.
func TestThreadIsNoProcess(t *testing.T) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil || len(tasks) < 2 {
		t.Skipf("no threads: %v", err)
	}
	tid, _ := strconv.Atoi(tasks[1].Name())
	if p, err := node.New(node.Config{}).Process(tid, startOf(t, tid), ""); err == nil {
		t.Errorf("%+v", p)
	}
}

func TestSignal(t *testing.T) {
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	p, err := node.New(node.Config{}).Process(cmd.Process.Pid, startOf(t, cmd.Process.Pid), "host")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(within(t)); err != nil || p.Alive() {
		t.Errorf("alive %t, %v", p.Alive(), err)
	}
	// A zombie still has its number, and is nobody.
	if err := p.Signal(unix.SIGKILL); !errors.Is(err, node.ErrGone) {
		t.Errorf("signal a zombie: %v", err)
	}
	_ = cmd.Wait()
	if err := p.Signal(unix.SIGKILL); !errors.Is(err, node.ErrGone) {
		t.Errorf("signal nobody: %v", err)
	}
	if _, err := p.Tree(); !errors.Is(err, node.ErrGone) {
		t.Errorf("the tree of nobody: %v", err)
	}
}

// TestNumberUsedAgain makes the kernel give a process's number to another one
// between the alert and the act, in a pid namespace of its own, where it can be told
// which number comes next.
func TestNumberUsedAgain(t *testing.T) {
	if os.Getenv("STOOP_TEST_PIDNS") == "" {
		nodetest.Root(t)
		cmd := exec.Command(os.Args[0], "-test.run=^TestNumberUsedAgain$", "-test.v")
		cmd.Env = append(os.Environ(), "STOOP_TEST_PIDNS=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		out, err := cmd.CombinedOutput()
		if strings.Contains(string(out), "--- SKIP") {
			nodetest.Missing(t, "a pid namespace where numbers can be chosen:\n%s", out)
		}
		if err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	// The host's /proc, where numbers mean others than those that can be signalled.
	foreign := bound(t, "/proc")
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Skip(err)
	}
	if p, err := node.New(node.Config{Proc: foreign}).Process(1, startIn(t, foreign, 1), ""); err == nil || !strings.Contains(err.Error(), "hostPID: true") {
		t.Errorf("the host's process 1 is taken for the namespace's: %+v, %v", p, err)
	}
	if missing := node.New(node.Config{Proc: foreign}).Missing(node.NeedHostPID); len(missing) != 1 {
		t.Errorf("missing with the host's /proc: %q", missing)
	}
	n := node.New(node.Config{})
	first := exec.Command("sleep", "100")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	pid := first.Process.Pid
	began := startOf(t, pid)
	held, err := n.Process(pid, began, "")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	_ = first.Process.Kill()
	_ = first.Wait()
	if _, err := n.Process(pid, began, ""); !errors.Is(err, node.ErrGone) {
		t.Errorf("nobody has the number: %v", err)
	}
	// Far enough from the first one's start that they are told apart.
	for time.Now().UnixNano() < began+int64(100*time.Millisecond) {
		time.Sleep(time.Millisecond)
	}
	var second *exec.Cmd
	for range 100 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Skip(err)
		}
		c := exec.Command("sleep", "100")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
		if c.Process.Pid == pid {
			second = c
			break
		}
	}
	if second == nil {
		t.Skipf("nobody was given number %d again", pid)
	}
	if p, err := n.Process(pid, began, ""); !errors.Is(err, node.ErrNotSame) {
		t.Errorf("the number's new owner is taken for the old one: %+v, %v", p, err)
	}
	// One that was held before is still who it was.
	if err := held.Signal(unix.SIGKILL); !errors.Is(err, node.ErrGone) || held.Alive() {
		t.Errorf("signal the old one: %v, alive %t", err, held.Alive())
	}
	if _, err := held.Tree(); !errors.Is(err, node.ErrGone) {
		t.Errorf("the old one's tree: %v", err)
	}
	if p, err := n.Process(pid, startOf(t, pid), ""); err != nil || !p.Alive() {
		t.Errorf("the new owner by its own start: %v", err)
	}
}

func TestTree(t *testing.T) {
	for name, n := range map[string]*node.Node{"children": node.New(node.Config{}), "by parent": node.New(node.Config{}).WithoutChildren()} {
		t.Run(name, func(t *testing.T) {
			dir := nodetest.CgroupV2(t)
			// Three levels, and somebody who is none of the family.
			cmd := nodetest.Shell(t, dir, `sh -c 'sleep 1000 & sh -c "sleep 1001 & wait" & wait' & sleep 1002 & wait`)
			nodetest.Shell(t, dir, "sleep 1003")
			nodetest.Wait(t, "the family to be complete", func() bool { return len(nodetest.Pids(dir)) >= 8 })
			p, err := n.Process(cmd.Process.Pid, startOf(t, cmd.Process.Pid), filepath.Base(dir))
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			tree, err := p.Tree()
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			seen := map[int]bool{}
			for i, q := range tree {
				defer q.Close()
				if i > 0 && !seen[q.Parent] || seen[q.PID] || !q.Alive() || q.CgroupOf != filepath.Base(dir) {
					t.Errorf("%+v does not come after its parent, once", q)
				}
				seen[q.PID] = true
				names = append(names, q.Comm)
			}
			slices.Sort(names)
			if tree[0].PID != p.PID || strings.Join(names, " ") != "sh sh sh sleep sleep sleep" {
				t.Errorf("tree %v", names)
			}
		})
	}
}

// Who is held from an earlier look is not returned again, only who is new.
func TestTreeAgain(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "sleep 1000 & read line; sleep 1001 & wait")
	cmd.Stdin = r
	dir := nodetest.CgroupV2(t) // all that it starts goes with it
	nodetest.Start(t, nodetest.In{Cgroups: []string{dir}}, cmd)
	r.Close()
	defer w.Close()
	p, err := node.New(node.Config{}).Process(cmd.Process.Pid, startOf(t, cmd.Process.Pid), filepath.Base(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var held []*node.Process
	defer func() {
		for _, q := range held {
			q.Close()
		}
	}()
	look := func() (fresh int) {
		tree, err := p.Tree(held...)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, tree...)
		return len(tree)
	}
	nodetest.Wait(t, "the shell and its first child to be seen", func() bool { look(); return len(held) == 2 })
	if n := look(); n != 0 {
		t.Errorf("%d were returned again", n)
	}
	if _, err := w.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	nodetest.Wait(t, "the second child to be seen", func() bool { look(); return len(held) == 3 })
	if parent := held[2].Parent; parent != p.PID {
		t.Errorf("the new one is a child of %d, want %d", parent, p.PID)
	}
}

// A tree that grows while it is looked at: everybody who was there at the end is
// in it, as long as their parents live.
func TestTreeThatGrows(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	cmd := nodetest.Shell(t, dir, `i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done; wait`)
	p, err := node.New(node.Config{}).Process(cmd.Process.Pid, startOf(t, cmd.Process.Pid), "")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	nodetest.Wait(t, "all hundred to be in the tree", func() bool {
		tree, err := p.Tree()
		for _, q := range tree {
			_ = q.Close()
		}
		return err == nil && len(tree) == 101
	})
}

func TestOwn(t *testing.T) {
	n := node.New(node.Config{})
	pid, _ := start(t, "sleep", "100")
	if !n.Own(os.Getpid()) || !n.Own(os.Getppid()) || !n.Own(1) || n.Own(pid) || n.Own(0) {
		t.Errorf("own: self %t, parent %t, first %t, child %t", n.Own(os.Getpid()), n.Own(os.Getppid()), n.Own(1), n.Own(pid))
	}
}

// Names mean something only where root alone could have given them.
func TestOfRoot(t *testing.T) {
	nodetest.Root(t)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name               string
		user, owner        int
		mode, folder       os.FileMode
		want, removedLater bool
	}{
		{"root's", 0, 0, 0o755, 0o755, true, false},
		{"root's, removed", 0, 0, 0o755, 0o755, true, true},
		{"a user's copy", 1000, 1000, 0o755, 0o755, false, false},
		{"root runs a user's copy", 0, 1000, 0o755, 0o755, false, false},
		{"a user runs root's", 1000, 0, 0o755, 0o755, false, false},
		{"one that others may write", 0, 0, 0o757, 0o755, false, false},
		{"one where others may put what they like", 0, 0, 0o755, 0o777, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "stooptest") // t.TempDir is closed to other users
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			exe := filepath.Join(dir, "sshd")
			if err := errors.Join(os.WriteFile(exe, b, 0o755), os.Chmod(dir, tc.folder), os.Chown(exe, tc.owner, -1), os.Chmod(exe, tc.mode)); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(exe, "100")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(tc.user), Gid: uint32(tc.user)}}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			if tc.removedLater {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			p, err := node.New(node.Config{}).Process(cmd.Process.Pid, startOf(t, cmd.Process.Pid), "host")
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if got := p.OfRoot(); got != tc.want {
				t.Errorf("of root: %t (%s)", got, p.Exe)
			}
		})
	}
}
