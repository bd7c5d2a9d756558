package responders

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"stoop/alert"
	"stoop/node"
)

// proc is where the kernel tells of its processes: /proc.
type proc string

// process is what a process's cgroup says of where it runs.
type process struct {
	pod       types.UID
	container string // the whole id
}

// startTolerance is how far a process's start as Falco tells it may be from the
// kernel's where stoop's own are to be left alone; where one is acted on, node is
// far stricter.
const startTolerance = time.Second

// cgroupContainer is what gives a cgroup away that may be a container's, whoever
// made it.
var cgroupContainer = regexp.MustCompile(`[0-9a-f]{64}`)

// look tells where the alert's process runs; nothing where it is not there any
// more, runs in no pod, or may be another one that was given the same number. It
// is another one unless the alert's container is its own or, where the alert has
// none, its start the alert's.
func (root proc) look(t alert.Target) process {
	if t.PID <= 0 || t.PID > math.MaxInt32 {
		return process{}
	}
	start := t.PIDStart
	if t.Container != "" {
		start = 0
	}
	at, err := node.New(node.Config{Proc: string(root)}).Locate(int(t.PID), start, t.Container)
	if err != nil || at.PodUID == "" {
		return process{}
	}
	return process{types.UID(at.PodUID), at.Container}
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
