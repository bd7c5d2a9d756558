package responders

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"stoop/node"
	"stoop/node/nodetest"
)

// hold proves a process by its container, or by its start on the host.
func hold(t *testing.T, pid int, dir string) *node.Process {
	t.Helper()
	container, start := "host", StartOf(t, pid)
	if dir != "" {
		container, start = filepath.Base(dir), 0
	}
	p, err := node.New(node.Config{}).Process(pid, start, container)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// StartOf is when a process began, as Falco would tell it.
func StartOf(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	ticks, err := strconv.ParseInt(strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var boot, now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
		t.Fatal(err)
	}
	return now.Nano() - boot.Nano() + ticks*10_000_000
}

// run starts a program of the host until the test ends.
func runProgram(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func TestKillProcess(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	_, count := nodetest.Counter(t, dir)
	cmd := nodetest.Shell(t, dir, `trap "" TERM; sh -c 'sleep 1000 & sleep 1001 & wait' & while :; do sleep 1; done`)
	nodetest.Wait(t, "the tree", func() bool { return len(nodetest.Pids(dir)) >= 6 })
	k, r := onNode(t, killProcess(), `{}`)
	r.Process, r.Container = hold(t, cmd.Process.Pid, dir), containerAt(t, dir)
	res, err := k.Act(brief(t), r)
	if err != nil || res.Nothing || !strings.Contains(res.Found["signalled"], strconv.Itoa(cmd.Process.Pid)) || res.Found["signal"] != "KILL" {
		t.Fatalf("%+v, %v", res, err)
	}
	if n, _ := strconv.Atoi(res.Found["processes"]); n < 4 {
		t.Errorf("found %v", res.Found)
	}
	if r.Process.Alive() {
		t.Error("it lives on")
	}
	if pids := nodetest.Pids(dir); len(pids) != 1 {
		t.Errorf("only the counter should live on: %v", pids)
	}
	countsOn(t, count)
	if _, err := k.Act(brief(t), r); !isGone(err) {
		t.Errorf("again: %v", err)
	}
}

// A process alone: its children live on.
func TestKillProcessWithoutItsTree(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	cmd := nodetest.Shell(t, dir, `sleep 1000 & wait`)
	nodetest.Wait(t, "the child", func() bool { return len(nodetest.Pids(dir)) == 2 })
	k, r := onNode(t, killProcess(), `{"tree":false}`)
	r.Process = hold(t, cmd.Process.Pid, dir)
	if res, err := k.Act(brief(t), r); err != nil || res.Found["processes"] != "1" {
		t.Errorf("%+v, %v", res, err)
	}
	if pids := nodetest.Pids(dir); len(pids) != 1 || pids[0] == cmd.Process.Pid {
		t.Errorf("%v live on", pids)
	}
}

// A tree that forks on while it is killed leaves nobody behind.
func TestKillProcessThatForks(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	// Every branch has one child at a time, started anew as soon as it ends.
	cmd := nodetest.Shell(t, dir, `i=0; while [ $i -lt 40 ]; do sh -c 'while :; do sleep 0.01; done' & i=$((i+1)); done; wait`)
	nodetest.Wait(t, "the tree", func() bool { return len(nodetest.Pids(dir)) >= 60 })
	k, r := onNode(t, killProcess(), `{}`)
	r.Process = hold(t, cmd.Process.Pid, dir)
	res, err := k.Act(brief(t), r)
	if err != nil {
		t.Fatal(err)
	}
	nodetest.Wait(t, "all to be gone", func() bool { return len(nodetest.Pids(dir)) == 0 })
	if n, _ := strconv.Atoi(res.Found["processes"]); n < 41 {
		t.Errorf("%+v", res)
	}
}

func TestKillProcessSignals(t *testing.T) {
	for name, want := range map[string]syscall.Signal{
		"KILL": syscall.SIGKILL, "TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "QUIT": syscall.SIGQUIT, "STOP": 0,
	} {
		t.Run(name, func(t *testing.T) {
			cmd := runProgram(t, "sleep", "1000")
			k, r := onNode(t, killProcess(), `{"signal":"`+name+`"}`)
			r.Process = hold(t, cmd.Process.Pid, "")
			if res, err := k.Act(brief(t), r); err != nil || res.Found["signal"] != name {
				t.Fatalf("%+v, %v", res, err)
			}
			if want == 0 {
				nodetest.Wait(t, "it to be stopped", func() bool {
					b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
					return strings.Contains(string(b), ") T ")
				})
				return
			}
			_ = cmd.Wait()
			if got := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != want {
				t.Errorf("it ended by %v", got)
			}
		})
	}
	for _, params := range []string{`{"signal":"CONT"}`, `{"signal":"9"}`, `{"protect":["/bin/sh"]}`, `{"protect":["["]}`, `{"protect":[""]}`, `{"sginal":"TERM"}`} {
		cmd := runProgram(t, "sleep", "1000")
		k, r := onNode(t, killProcess(), params)
		r.Process = hold(t, cmd.Process.Pid, "")
		if res, err := k.Act(brief(t), r); !as[*refusal](err) || !r.Process.Alive() {
			t.Errorf("%s: %+v, %v", params, res, err)
		}
	}
}

// called is a copy of a program under another name.
func called(t *testing.T, program, name string) string {
	t.Helper()
	from, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	path := filepath.Join(t.TempDir(), name)
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// What a node can't do without is never signalled, whatever an alert says.
func TestKillProcessSpares(t *testing.T) {
	nodetest.Root(t)
	refused := func(t *testing.T, p *node.Process, params string) {
		t.Helper()
		k, r := onNode(t, killProcess(), params)
		r.Process = p
		if err := k.(Checker).Check(brief(t), r); !as[*refusal](err) {
			t.Errorf("check: %v", err)
		}
		// The signal that would do the least, should the guard not hold.
		if res, err := k.Act(brief(t), r); !as[*refusal](err) {
			t.Errorf("act: %+v, %v", res, err)
		}
	}
	const mild = `{"signal":"STOP","tree":false}`
	t.Run("the host's first", func(t *testing.T) {
		k := &processKiller{node.New(node.Config{})}
		if why := spared(&node.Process{PID: 1, Exe: "/x", CgroupOf: nodetest.ID()}, k.local.Ancestry(), nil); !strings.Contains(why, "process 1") {
			t.Errorf("it is %q", why)
		}
	})
	t.Run("a kernel thread", func(t *testing.T) {
		b, _ := os.ReadFile("/proc/2/comm")
		if string(b) != "kthreadd\n" {
			t.Skip("no kernel threads are to be seen here")
		}
		p := hold(t, 2, "")
		k := &processKiller{node.New(node.Config{})}
		if why := spared(p, k.local.Ancestry(), nil); !strings.Contains(why, "kernel") {
			t.Errorf("%+v is %q", p, why)
		}
	})
	t.Run("stoop", func(t *testing.T) {
		// Its ancestors alike; a child of its own may be signalled.
		k := &processKiller{node.New(node.Config{})}
		for _, pid := range []int{os.Getpid(), os.Getppid()} {
			if why := spared(hold(t, pid, ""), k.local.Ancestry(), nil); !strings.Contains(why, "stoop itself") {
				t.Errorf("process %d is %q", pid, why)
			}
		}
	})
	for _, name := range []string{"sshd", "systemd", "systemd-logind", "init", "kubelet", "containerd", "containerd-shim-runc-v2", "crio", "conmon", "runc", "dockerd", "falco", "stoop"} {
		t.Run(name, func(t *testing.T) {
			cmd := runProgram(t, called(t, "sleep", name), "1000")
			refused(t, hold(t, cmd.Process.Pid, ""), mild)
		})
	}
	t.Run("removed since", func(t *testing.T) { // as after an upgrade
		path := called(t, "sleep", "sshd")
		cmd := runProgram(t, path, "1000")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		refused(t, hold(t, cmd.Process.Pid, ""), mild)
	})
	t.Run("by the rule", func(t *testing.T) {
		cmd := runProgram(t, called(t, "sleep", "batch-17"), "1000")
		refused(t, hold(t, cmd.Process.Pid, ""), `{"signal":"STOP","tree":false,"protect":["batch-*"]}`)
	})
	t.Run("unseen", func(t *testing.T) {
		k := &processKiller{node.New(node.Config{})}
		if spared(&node.Process{PID: 1 << 22, Comm: "x"}, k.local.Ancestry(), nil) == "" {
			t.Error("a process of the host of which nobody knows what it runs may be signalled")
		}
	})
}

// Whoever gives himself a protected name is not protected by it: in a
// container, as another user, or by what is written over his own name.
func TestKillProcessIsNotFooledByNames(t *testing.T) {
	killed := func(t *testing.T, p *node.Process, params string) {
		t.Helper()
		k, r := onNode(t, killProcess(), params)
		r.Process = p
		if res, err := k.Act(brief(t), r); err != nil || p.Alive() {
			t.Errorf("%+v, %v, alive %t", res, err, p.Alive())
		}
	}
	t.Run("in a container", func(t *testing.T) {
		dir := nodetest.CgroupV2(t)
		cmd := exec.Command(called(t, "sleep", "sshd"), "1000")
		nodetest.Start(t, nodetest.In{Cgroups: []string{dir}}, cmd)
		killed(t, hold(t, cmd.Process.Pid, dir), `{"protect":["sshd"]}`)
	})
	t.Run("another user", func(t *testing.T) {
		nodetest.Root(t)
		path := called(t, "sleep", "sshd")
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		cmd := runProgram(t, path, "1000")
		killed(t, hold(t, cmd.Process.Pid, ""), `{}`)
	})
	t.Run("its own name for itself", func(t *testing.T) {
		cmd := &exec.Cmd{Path: called(t, "sleep", "miner"), Args: []string{"/usr/sbin/sshd", "1000"}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		killed(t, hold(t, cmd.Process.Pid, ""), `{}`)
	})
}

// A protected process in the tree is left alone, and what it started with it.
func TestKillProcessLeavesTheProtectedInTheTree(t *testing.T) {
	nodetest.Root(t)
	sh := called(t, "sh", "containerd")
	file := filepath.Join(t.TempDir(), "pid")
	cmd := runProgram(t, "sh", "-c", sh+` -c 'sleep 1000 & echo $! >`+file+`; wait' & sleep 1001 & wait`)
	var grandchild int
	nodetest.Wait(t, "the tree", func() bool {
		b, _ := os.ReadFile(file)
		grandchild, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return grandchild > 0
	})
	t.Cleanup(func() { _ = unix.Kill(grandchild, unix.SIGKILL) }) // and its parent ends with it
	k, r := onNode(t, killProcess(), `{}`)
	r.Process = hold(t, cmd.Process.Pid, "")
	spared := hold(t, grandchild, "")
	res, err := k.Act(brief(t), r)
	if err != nil || r.Process.Alive() || !strings.Contains(res.Found["left"], "containerd") || !strings.Contains(res.Reason, "left alone") {
		t.Errorf("%+v, %v", res, err)
	}
	if !spared.Alive() {
		t.Error("what the protected one started was killed")
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", spared.Parent))
	if !slices.Contains([]string{"S", "R"}, strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[0]) {
		t.Errorf("the protected one does not run: %s", b)
	}
	if strings.Contains(res.Found["signalled"], strconv.Itoa(spared.PID)) {
		t.Errorf("found %v", res.Found)
	}
}

// A name that its owner chose reaches an outcome without its control characters.
func TestKillProcessEscapesNames(t *testing.T) {
	cmd := runProgram(t, called(t, "sleep", "a\n\x1b[31m\"b"), "1000")
	k, r := onNode(t, killProcess(), `{}`)
	r.Process = hold(t, cmd.Process.Pid, "")
	res, err := k.Act(brief(t), r)
	if err != nil {
		t.Fatal(err)
	}
	for key, v := range res.Found {
		if strings.ContainsAny(v, "\n\x1b") {
			t.Errorf("%s: %q", key, v)
		}
	}
	if !strings.Contains(res.Found["process"], `\n`) {
		t.Errorf("found %v", res.Found)
	}
}

// In a container that cgroup v1 has frozen, nobody dies at once, and the outcome
// says so instead of waiting.
func TestKillProcessInAFrozenContainer(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		cmd, _ := nodetest.Counter(t, dir)
		k, r := onNode(t, killProcess(), `{}`)
		r.Process, r.Container = hold(t, cmd.Process.Pid, dir), containerAt(t, dir)
		if _, err := r.Container.Freeze(brief(t)); err != nil {
			t.Fatal(err)
		}
		res, err := k.Act(brief(t), r)
		if err != nil || r.Process.Alive() != strings.Contains(res.Reason, "thawed") {
			t.Errorf("%+v, %v, alive %t", res, err, r.Process.Alive())
		}
		if _, err := r.Container.Thaw(brief(t)); err != nil {
			t.Fatal(err)
		}
		if err := r.Process.Wait(brief(t)); err != nil {
			t.Errorf("it lives on: %v", err)
		}
	})
}
