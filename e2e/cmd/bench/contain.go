package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/e2e/harness"
	"stoop/e2e/program"
	"stoop/node/nodetest"
)

// asTest lets what is made for tests be used by a program that is none. What a
// test would skip for ends the run.
type asTest struct {
	testing.TB // nil: nodetest calls nothing but what stands here
	t          harness.T
}

func (a asTest) Helper()                           {}
func (a asTest) Logf(format string, args ...any)   { a.t.Logf(format, args...) }
func (a asTest) Fatal(args ...any)                 { a.t.Fatalf("%s", fmt.Sprint(args...)) }
func (a asTest) Fatalf(format string, args ...any) { a.t.Fatalf(format, args...) }
func (a asTest) Skip(args ...any)                  { a.t.Fatalf("%s", fmt.Sprint(args...)) }
func (a asTest) Skipf(format string, args ...any)  { a.t.Fatalf(format, args...) }
func (a asTest) Cleanup(f func())                  { a.t.Cleanup(f) }
func (a asTest) TempDir() string                   { return a.t.TempDir() }

// Errorf comes from what is cleaned up, which goes on.
func (a asTest) Errorf(format string, args ...any) { a.t.Logf(format, args...) }

// processes is how many run in each container.
const processes = 10

// container is a cgroup as a container runtime makes it, with processes that do
// nothing.
type container struct {
	id, dir string
	main    int // the process that started the others
	freezer string
	frozen  string // what the file freezer says once all is frozen
}

// contain makes a container. It lasts as long as t, and its processes no longer
// than this program: they read from a pipe of which it holds the other end.
func contain(t harness.T, life *os.File, network *nodetest.Network) *container {
	tb, c := asTest{t: t}, &container{}
	if v1() {
		c.dir = nodetest.CgroupV1(tb)
		c.freezer, c.frozen = filepath.Join(c.dir, "freezer.state"), "FROZEN"
	} else {
		c.dir = nodetest.CgroupV2(tb)
		c.freezer, c.frozen = filepath.Join(c.dir, "cgroup.events"), "frozen 1"
	}
	c.id = filepath.Base(c.dir)
	cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf("exec 3<&0; i=1; while [ $i -lt %d ]; do cat <&3 & i=$((i+1)); done; wait", processes))
	cmd.Stdin = life
	nodetest.Start(tb, nodetest.In{Cgroups: []string{c.dir}, Netns: network}, cmd)
	c.main = cmd.Process.Pid
	harness.Eventually(t, 10*time.Second, time.Millisecond, func() (bool, string) {
		return len(nodetest.Pids(c.dir)) == processes, "a container's processes"
	})
	return c
}

// v1 reports whether containers are frozen by cgroup v1 here.
func v1() bool {
	_, err := os.Stat("/sys/fs/cgroup/freezer/tasks")
	return err == nil
}

func version() string {
	if v1() {
		return "v1"
	}
	return "v2"
}

// ask has the kernel freeze the container or thaw it, and does not wait.
func (c *container) ask(freeze bool) error {
	file, value := "cgroup.freeze", map[bool]string{true: "1", false: "0"}
	if v1() {
		file, value = "freezer.state", map[bool]string{true: "FROZEN", false: "THAWED"}
	}
	return c.write(file, value[freeze])
}

func (c *container) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(c.dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// alert is what Falco would say of the container's first process.
func (c *container) alert(t harness.T, rule string) []byte {
	now := time.Now().UTC()
	return program.Alert{
		Hostname: "bench",
		Output:   "A shell talks to somebody outside | container_id=" + c.id[:12],
		Fields: map[string]any{
			"container.id": c.id[:12], "container.name": "main", "container.image.repository": "docker.io/library/debian",
			"evt.time": now.UnixNano(), "evt.type": "dup2", "fd.name": "10.0.0.9:40000->203.0.113.7:4444",
			"proc.cmdline": "sh", "proc.name": "sh", "proc.pid": c.main, "proc.pid.ts": forkTime(t, c.main),
		},
		Priority: "Critical", Rule: rule, Source: "syscall",
		Tags: []string{"container", "network", "mitre_execution"},
		Time: program.Stamp(now),
	}.Line()
}

// forkTime is when a process began, in nanoseconds since 1970, as Falco says it:
// some milliseconds later than /proc does.
func forkTime(t harness.T, pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatalf("read when a process began: %v", err)
	}
	// The name, in brackets, may hold anything: count from behind it.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks int64
	if _, err := fmt.Sscan(fields[19], &ticks); err != nil {
		t.Fatalf("read when process %d began: %v", pid, err)
	}
	var real, boot unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_REALTIME, &real), unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)); err != nil {
		t.Fatalf("read the clock: %v", err)
	}
	const tick, later = 10 * time.Millisecond, 5 * time.Millisecond
	return real.Nano() - boot.Nano() + int64(time.Duration(ticks)*tick+later)
}

// seen is what an observer saw: when, or why it did not.
type seen struct {
	at  time.Time
	err error
}

const (
	// lookEvery is how often an observer looks. Go's own timers are no use for
	// it: they take a millisecond at the least.
	lookEvery = 20 * time.Microsecond
	// askEvery is the pause between an answer and the next question.
	askEvery = 100 * time.Microsecond
	// answerIn is how long an answer may take; it takes some 20 µs.
	answerIn = 2 * time.Millisecond
	// silentFor is for how long there is no answer before we believe it.
	silentFor = 10 * time.Millisecond
	// soon bounds what takes milliseconds.
	soon = 10 * time.Second
)

// observe runs look in a thread of its own, whose sleeps are as short as is
// asked for, and returns once it runs. look calls ready when it has begun.
func observe(look func(ready func()) (time.Time, error)) <-chan seen {
	out, running := make(chan seen, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
		begun := false
		at, err := look(func() {
			if !begun {
				begun = true
				close(running)
			}
		})
		out <- seen{at, err}
		if !begun {
			close(running)
		}
	}()
	<-running
	return out
}

// watchFrozen tells when the kernel says that the container is frozen.
func (c *container) watchFrozen() <-chan seen {
	return observe(func(ready func()) (time.Time, error) {
		f, err := os.Open(c.freezer)
		if err != nil {
			return time.Time{}, err
		}
		defer f.Close()
		var b [256]byte
		for deadline := time.Now().Add(soon); ; harness.Nap(lookEvery) {
			n, err := unix.Pread(int(f.Fd()), b[:], 0)
			now := time.Now()
			switch {
			case err != nil:
				return now, fmt.Errorf("read %s: %w", c.freezer, err)
			case strings.Contains(string(b[:n]), c.frozen):
				return now, nil
			case now.After(deadline):
				return now, errors.New("the container does not freeze")
			}
			ready()
		}
	})
}

// watchDead tells when the last of the processes has ended.
func watchDead(pids []int) <-chan seen {
	return observe(func(ready func()) (time.Time, error) {
		var fds []unix.PollFd
		defer func() {
			for _, fd := range fds {
				_ = unix.Close(int(fd.Fd))
			}
		}()
		for _, pid := range pids {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return time.Time{}, fmt.Errorf("hold on to process %d: %w", pid, err)
			}
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		ready()
		// One after the other: the last one's end is what counts.
		deadline := time.Now().Add(soon)
		for i := 0; i < len(fds); {
			n, err := unix.Poll(fds[i:i+1], 100)
			if err != nil && err != unix.EINTR {
				return time.Time{}, fmt.Errorf("wait for a process's end: %w", err)
			}
			if n > 0 {
				i++
			} else if time.Now().After(deadline) {
				return time.Time{}, fmt.Errorf("%d of %d processes live on", len(fds)-i, len(fds))
			}
		}
		return time.Now(), nil
	})
}

// talk is two sockets that talk to each other over a link, one of them in the
// namespace at its end.
type talk struct {
	inside, host int
	asked        uint32
}

func newTalk(t harness.T, network *nodetest.Network, c *nodetest.Cable) *talk {
	k := &talk{inside: -1, host: -1}
	t.Cleanup(func() {
		_ = unix.Close(k.inside)
		_ = unix.Close(k.host)
	})
	const port = 4444
	insideAddr, hostAddr := &unix.SockaddrInet4{Port: port, Addr: c.Inside.As4()}, &unix.SockaddrInet4{Port: port, Addr: c.Host.As4()}
	open := func(fd *int, from, to unix.Sockaddr) (err error) {
		if *fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		if err = unix.Bind(*fd, from); err == nil {
			err = unix.Connect(*fd, to)
		}
		return err
	}
	if err := open(&k.host, hostAddr, insideAddr); err != nil {
		t.Fatalf("open a socket to a container: %v", err)
	}
	network.Do(asTest{t: t}, func() error { return open(&k.inside, insideAddr, hostAddr) })
	return k
}

// ask sends a packet out of the namespace and back into it, and reports whether
// it arrived.
func (k *talk) ask() bool {
	k.asked++
	packet := []byte{byte(k.asked), byte(k.asked >> 8), byte(k.asked >> 16), byte(k.asked >> 24)}
	pass := func(from, to int) bool {
		if _, err := unix.Write(from, packet); err != nil {
			return false
		}
		for deadline := time.Now().Add(answerIn); ; {
			left := time.Until(deadline)
			if left <= 0 {
				return false
			}
			timeout := unix.NsecToTimespec(int64(left))
			if n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(to), Events: unix.POLLIN}}, &timeout, nil); n <= 0 && err != unix.EINTR {
				return false
			}
			var b [8]byte
			if n, err := unix.Read(to, b[:]); err == nil && slices.Equal(b[:n], packet) {
				return true
			}
		}
	}
	return pass(k.inside, k.host) && pass(k.host, k.inside)
}

// watchSilent tells when the link fell silent. That was between the last packet
// that got through and the next one, which did not: the later of the two counts.
func (k *talk) watchSilent() <-chan seen {
	return observe(func(ready func()) (time.Time, error) {
		var lost time.Time
		answers := 0
		for deadline := time.Now().Add(soon); ; harness.Nap(askEvery) {
			asked := time.Now()
			if k.ask() {
				lost = time.Time{}
				if answers++; answers == 10 {
					ready()
				}
				if asked.After(deadline) {
					return asked, errors.New("the container is not cut off")
				}
				continue
			}
			if lost.IsZero() {
				lost = asked
			}
			switch silent := time.Since(lost); {
			case answers >= 10 && silent > silentFor:
				return lost, nil
			case answers < 10 && asked.After(deadline):
				return lost, errors.New("the container has no network")
			}
		}
	})
}
