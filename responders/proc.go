package responders

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"stoop/alert"
)

// proc is where the kernel tells of its processes: /proc.
type proc string

// process is what a process's cgroup says of where it runs.
type process struct {
	pod       types.UID
	container string // the whole id
}

// startTolerance is how far a process's start as Falco tells it may be from
// the kernel's: seen were 3 to 8 ms, and a clock that is being slewed adds some.
const startTolerance = time.Second

// The kubelet's cgroups: /kubepods/burstable/pod<uid>/<id>, or with systemd
// kubepods-burstable-pod<uid with _>.slice/cri-containerd-<id>.scope. Whoever
// may make cgroups inside a container can name them as he likes, but only
// further right.
var (
	cgroupPod       = regexp.MustCompile(`\bpod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})\b`)
	cgroupContainer = regexp.MustCompile(`[0-9a-f]{64}`)
)

// look tells where the alert's process runs; nothing where it is not there any
// more, runs in no pod, or may be another one that was given the same number.
func (root proc) look(t alert.Target) process {
	if t.PID <= 0 {
		return process{}
	}
	dir := filepath.Join(string(root), strconv.FormatInt(t.PID, 10))
	b, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return process{}
	}
	p := readCgroup(b)
	switch {
	case p.pod == "":
		return process{}
	case t.Container != "":
		if p.container == "" || !strings.HasPrefix(p.container, t.Container) {
			return process{}
		}
	case t.PIDStart == 0:
		return process{}
	default:
		start, ok := root.started(dir)
		if !ok || start.Sub(time.Unix(0, t.PIDStart)).Abs() > startTolerance {
			return process{}
		}
	}
	return p
}

// readCgroup reads /proc/PID/cgroup: one line for cgroup v2, one a controller
// for v1. Lines that name different pods prove none.
func readCgroup(b []byte) process {
	var found process
	for line := range bytes.Lines(b) {
		at := cgroupPod.FindSubmatchIndex(line)
		if at == nil || bytes.Contains(line[:at[0]], []byte("user.slice")) {
			continue // users of the host may name their own cgroups
		}
		p := process{pod: types.UID(strings.ReplaceAll(string(line[at[2]:at[3]]), "_", "-"))}
		p.container = string(cgroupContainer.Find(line[at[3]:]))
		if found != (process{}) && found != p {
			return process{}
		}
		found = p
	}
	return found
}

// started is when a process was forked, by the clock on the wall.
func (root proc) started(dir string) (time.Time, bool) {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return time.Time{}, false
	}
	// The command's name, in brackets, may hold spaces and brackets itself.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return time.Time{}, false
	}
	f := strings.Fields(string(b[i+1:]))
	const starttime = 22 - 3 // proc_pid_stat(5) counts from 1, and two come before
	if len(f) <= starttime {
		return time.Time{}, false
	}
	ticks, err := strconv.ParseInt(f[starttime], 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		return time.Time{}, false
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture Go runs on
	return time.Now().Add(-time.Duration(boot.Nano())).Add(time.Duration(ticks) * tick), true
}
