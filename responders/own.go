package responders

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"stoop/alert"
	"stoop/child"
)

// OwnProcesses remembers the programs that stoop has started, so that an alert
// about one of them, or about what it started in turn, starts nothing. The zero
// value is ready; nil remembers nothing and owns nothing.
//
// Most of them are gone when the alert arrives, and their numbers may be others'
// by then. So what counts is when the alert was raised: while a program ran, its
// number was nobody else's.
//
// An alert is recognised by its process (proc.pid) or by one of its parents
// (proc.ppid, proc.apid[n]), which Falco takes from the kernel as the host
// counts; proc.sid and proc.vpgid are not looked at, because they are numbers of
// the process's own namespace, and whoever makes one can choose them. While the
// process is still there, its cgroup and its parents in /proc tell as well. So
// the one that is not recognised is a process of a program's children that is
// gone when its alert is looked at, and whose alert names no parent that stoop
// started itself.
type OwnProcesses struct {
	mu    sync.Mutex
	runs  []*ownRun
	execs []*ownExec
	host  func() bool // whether this process sees the host's numbers; nil asks the kernel
	root  proc        // "" is /proc
}

// ownChildren starts stoop's own children, and remembers them.
func ownChildren(env Env) *child.Launcher {
	l := child.New()
	l.Started = func(pid int) func() { return env.Own.Started(pid, "") }
	return l
}

// ownRun is one program's time.
type ownRun struct {
	pid        int64
	start, end time.Time // zero end: it runs
	cgroup     string    // that holds it and its children, as /proc/PID/cgroup says it; "": none
}

const (
	// ownFor is how long a program that has ended is remembered, and ownMost
	// how many are. An alert that comes later is too old to act on by any
	// sensible guard.maxAge.
	ownFor  = 15 * time.Minute
	ownMost = 4096
	// ownSlack is how far Falco's clock for an event may be from stoop's own.
	ownSlack = 50 * time.Millisecond
	// ownDepth bounds how many parents are looked at.
	ownDepth = 32
)

// Started remembers a program from now on. The function that it returns is to
// be called when the program has ended, before its number can become another's:
// before it is waited for.
func (o *OwnProcesses) Started(pid int, cgroup string) (ended func()) {
	if o == nil {
		return func() {}
	}
	now := time.Now()
	// Started returns after the fork, and Falco may have seen the program
	// before that.
	run := &ownRun{pid: int64(pid), start: now.Add(-ownSlack), cgroup: cgroup}
	if at, ok := o.proc().started(o.proc().dir(int64(pid))); ok && at.Before(run.start) {
		run.start = at.Add(-ownSlack)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.forget(now)
	o.runs = append(o.runs, run)
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if run.end.IsZero() {
			run.end = time.Now()
		}
	}
}

// forget drops what ended long ago.
func (o *OwnProcesses) forget(now time.Time) {
	kept := o.runs[:0]
	for i, r := range o.runs {
		if !r.end.IsZero() && (now.Sub(r.end) > ownFor || len(o.runs)-i > ownMost) {
			continue
		}
		kept = append(kept, r)
	}
	clear(o.runs[len(kept):])
	o.runs = kept
}

// Owns reports whether a program that stoop started, or one that such a program
// started, raised the alert.
func (o *OwnProcesses) Owns(a *alert.Alert) bool {
	if o == nil || a.Text || a.Time.IsZero() {
		return false
	}
	t := a.Target()
	if o.executed(a, t) {
		return true
	}
	o.mu.Lock()
	runs := make([]ownRun, 0, len(o.runs))
	for _, r := range o.runs {
		if r.at(a.Time) {
			runs = append(runs, *r)
		}
	}
	o.mu.Unlock()
	if len(runs) == 0 || !o.seesHost() {
		return false
	}
	if t.PID == 0 {
		return false
	}
	known := func(pid int64) bool {
		for _, r := range runs {
			if r.pid == pid {
				return true
			}
		}
		return false
	}
	for _, r := range runs {
		if r.pid == t.PID && (t.PIDStart == 0 || r.at(time.Unix(0, t.PIDStart))) {
			return true
		}
	}
	for _, parent := range parents(a) {
		if known(parent) {
			return true
		}
	}
	return o.lives(t, runs, known)
}

// at reports whether the program ran at a time.
func (r *ownRun) at(t time.Time) bool {
	return !t.Before(r.start) && (r.end.IsZero() || !t.After(r.end.Add(ownSlack)))
}

// parents are the numbers of the process's parents, as far as the alert has them.
func parents(a *alert.Alert) []int64 {
	var pids []int64
	add := func(field string) {
		s, _ := a.Field(field)
		if n, err := strconv.ParseInt(s, 10, 64); err == nil && n > 1 {
			pids = append(pids, n)
		}
	}
	add("proc.ppid")
	for i := 1; i <= ownDepth; i++ {
		add(fmt.Sprintf("proc.apid[%d]", i))
	}
	return pids
}

// lives looks at a process that is still there: in whose cgroup it is, and
// who its parents are.
func (o *OwnProcesses) lives(t alert.Target, runs []ownRun, known func(int64) bool) bool {
	root := o.proc()
	dir := root.dir(t.PID)
	if t.PIDStart == 0 {
		return false // it may be another one by now
	}
	if at, ok := root.started(dir); !ok || at.Sub(time.Unix(0, t.PIDStart)).Abs() > startTolerance {
		return false
	}
	if b, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
		for line := range strings.Lines(string(b)) {
			part := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
			if len(part) < 3 {
				continue
			}
			for _, r := range runs {
				if r.cgroup != "" && (part[2] == r.cgroup || strings.HasPrefix(part[2], r.cgroup+"/")) {
					return true
				}
			}
		}
	}
	pid := t.PID
	for range ownDepth {
		parent, ok := root.parent(pid)
		if !ok || parent <= 1 {
			return false
		}
		if known(parent) {
			return true
		}
		pid = parent
	}
	return false
}

// seesHost reports whether the numbers that stoop sees are those that Falco
// writes. In a pod without hostPID they are not; then it is stoop's own container
// that the guard knows its programs by.
func (o *OwnProcesses) seesHost() bool {
	if o.host != nil {
		return o.host()
	}
	return o.proc().initialPids()
}

func (o *OwnProcesses) proc() proc {
	if o.root == "" {
		return "/proc"
	}
	return o.root
}

func (root proc) dir(pid int64) string {
	return filepath.Join(string(root), strconv.FormatInt(pid, 10))
}

// initialPids reports whether this process is in the pid namespace that the
// kernel began with: the one that Falco counts in.
func (root proc) initialPids() bool {
	// The kernel gives it this number since 3.8 (PROC_PID_INIT_INO).
	const initial = "pid:[4026531836]"
	link, err := os.Readlink(filepath.Join(string(root), "self", "ns", "pid"))
	return err == nil && link == initial
}

// parent is the number of the process that a process would be waited for by.
func (root proc) parent(pid int64) (int64, bool) {
	b, err := os.ReadFile(filepath.Join(root.dir(pid), "stat"))
	if err != nil {
		return 0, false
	}
	i := bytes.LastIndexByte(b, ')') // the command's name may hold brackets itself
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 2 {
		return 0, false
	}
	n, err := strconv.ParseInt(f[1], 10, 64)
	return n, err == nil
}
