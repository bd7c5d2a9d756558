package responders_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/node/nodetest"
	"stoop/responders"
	"stoop/responders/conformance"
)

func world(t testing.TB) conformance.World { return conformance.NewServer(t) }

// notified is a place that counts what is posted to it, and its address.
func notified(t testing.TB, each func(r *http.Request, body []byte)) (string, func() int) {
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("read what was posted: %v", err)
		}
		each(r, body)
		n.Add(1)
	}))
	t.Cleanup(s.Close)
	return s.URL, func() int { return int(n.Load()) }
}

// conformanceCases has one case for every responder; a test holds it to the
// registry.
func conformanceCases() []conformance.Case {
	return slices.Concat([]conformance.Case{
		{
			Responder: "delete-pod",
			Params:    func(testing.TB) (string, func() int) { return `{"force":true}`, nil }, // nothing owns the pod
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
		{
			Responder: "isolate-pod",
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := conformance.PodNow(t, w, pod)
				if now.Labels["stoop.dev/isolated"] != string(pod.UID) {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
				p, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).Get(t.Context(), "stoop-isolate-"+string(pod.UID), metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
				if err != nil || p.Spec.PodSelector.MatchLabels["stoop.dev/isolated"] != string(pod.UID) || selector.Empty() {
					t.Errorf("the policy selects %v (%v)", p.Spec.PodSelector, err)
				}
				if len(p.Spec.PolicyTypes) != 2 || p.Spec.Ingress != nil || p.Spec.Egress != nil {
					t.Errorf("the policy lets something through: %+v", p.Spec)
				}
				if o := p.OwnerReferences; len(o) != 1 || o[0].UID != pod.UID || o[0].Kind != "Pod" || o[0].APIVersion != "v1" || o[0].BlockOwnerDeletion != nil {
					t.Errorf("the policy's owners are %+v", o)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); len(now.Labels) != 1 || now.Labels["app"] != "web" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
				list, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).List(t.Context(), metav1.ListOptions{})
				if err != nil || len(list.Items) != 0 {
					t.Errorf("policies are left: %v, error %v", list.Items, err)
				}
			},
		},
		{
			Responder: "label-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"labels":{"quarantine":"yes","app":""}}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); len(now.Labels) != 1 || now.Labels["quarantine"] != "yes" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := conformance.PodNow(t, w, pod); len(now.Labels) != 1 || now.Labels["app"] != "web" {
					t.Errorf("the pod's labels are %v", now.Labels)
				}
			},
		},
		{
			Responder: "freeze-container",
			Suspect: func(t testing.TB) *conformance.Suspect {
				s, _, count := suspect(t)
				moved := func() bool {
					before := count()
					for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
						if count() != before {
							return true
						}
					}
					return false
				}
				s.Effects = func() int {
					if moved() {
						return 0
					}
					return 1
				}
				s.Done = func() {
					if moved() {
						t.Error("the container's processes run")
					}
				}
				s.Undone = func() {
					if !moved() {
						t.Error("the container's processes stand still")
					}
				}
				return s
			},
		},
		{
			Responder: "run",
			New:       responders.NewRun(os.Args[0], "-test.run=^TestAsRunChild$", "--"),
			Params: func(t testing.TB) (string, func() int) {
				nodetest.Root(t)
				dir := t.TempDir()
				program, ran := filepath.Join(dir, "program"), filepath.Join(dir, "ran")
				// A second run is told that it is one.
				script := "#!/bin/sh\n[ -n \"$STOOP_RESUMED\" ] || cat >>" + ran + "\n"
				if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
					t.Fatal(err)
				}
				return fmt.Sprintf(`{"command":[%q]}`, program), func() int {
					b, err := os.ReadFile(ran)
					if err != nil && !os.IsNotExist(err) {
						t.Error(err)
					}
					return strings.Count(string(b), "\n")
				}
			},
		},
		{Responder: "cut-network", Suspect: as(responders.OnNetwork)},
		{Responder: "block-address", Suspect: as(responders.OnNetwork)},
		{Responder: "quarantine-file", Suspect: as(responders.WithFile)},
		{Responder: "lock-user", Suspect: as(responders.AUser)},
		{
			Responder: "capture-proc",
			Suspect: func(t testing.TB) *conformance.Suspect {
				s, _, _ := suspect(t)
				return s
			},
		},
		{Responder: "kill-container", Suspect: killable},
		{Responder: "kill-process", Suspect: killable},
		{
			Responder: "slack",
			Params: func(t testing.TB) (string, func() int) {
				address, count := notified(t, func(_ *http.Request, body []byte) {
					var m struct{ Text string }
					if err := json.Unmarshal(body, &m); err != nil || strings.Contains(m.Text, "<!") || strings.Contains(m.Text, "https://") {
						t.Errorf("what was posted is %s (%v)", body, err)
					}
				})
				f := filepath.Join(t.TempDir(), "url")
				if err := os.WriteFile(f, []byte(address+"/services/T0/B0/secret\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				return fmt.Sprintf(`{"url":{"file":%q},"channel":"#security"}`, f), count
			},
		},
		{
			Responder: "webhook",
			Params: func(t testing.TB) (string, func() int) {
				address, count := notified(t, func(r *http.Request, body []byte) {
					var m struct{ ID, Rule string }
					if err := json.Unmarshal(body, &m); err != nil || m.ID == "" || m.ID != r.Header.Get("Idempotency-Key") || m.Rule != "conformance" {
						t.Errorf("what was posted is %s (%v)", body, err)
					}
				})
				return fmt.Sprintf(`{"url":%q}`, address), count
			},
		},
		{
			Responder: "file",
			Params: func(t testing.TB) (string, func() int) {
				path := filepath.Join(t.TempDir(), "alerts.jsonl")
				return fmt.Sprintf(`{"path":%q}`, path), func() int {
					b, err := os.ReadFile(path)
					if err != nil && !os.IsNotExist(err) {
						t.Error(err)
					}
					return strings.Count(string(b), "\n")
				}
			},
		},
	},
		conformance.Workloads(),
		nodeCases(),
		conformance.NodeActs("1s"),
		conformance.Access(),
		captureCases(),
		callCases(),
		conformance.Denials(),
	)
}

func as(make func(testing.TB) *responders.TestSuspect) func(testing.TB) *conformance.Suspect {
	return func(t testing.TB) *conformance.Suspect { return (*conformance.Suspect)(make(t)) }
}

// suspect is a container with a process that counts.
func suspect(t testing.TB) (s *conformance.Suspect, cmd *exec.Cmd, count func() int) {
	t.Helper()
	dir := nodetest.CgroupV2(t)
	cmd, count = nodetest.Counter(t, dir)
	start, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return &conformance.Suspect{
		Container: filepath.Base(dir), PID: cmd.Process.Pid, Start: startedAt(t, start),
		Remove: func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		},
	}, cmd, count
}

// startedAt is when a process was forked, in nanoseconds since 1970, out of its
// stat.
func startedAt(t testing.TB, stat []byte) int64 {
	t.Helper()
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	ticks, err := strconv.ParseInt(f[22-3], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	return time.Now().UnixNano() - boot.Nano() + ticks*int64(10*time.Millisecond) + int64(5*time.Millisecond)
}

// killable is one that a step ends.
func killable(t testing.TB) *conformance.Suspect {
	s, cmd, _ := suspect(t)
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	has := func(wait time.Duration) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait.Milliseconds()))
		return n == 1 && err == nil
	}
	s.Effects = func() int {
		if has(100 * time.Millisecond) {
			return 1
		}
		return 0
	}
	s.Done = func() {
		if !has(10 * time.Second) {
			t.Error("the process runs")
		}
	}
	return s
}

func TestConformance(t *testing.T) {
	for _, c := range conformanceCases() {
		c.World = world
		t.Run(cmp.Or(c.Name, c.Responder), func(t *testing.T) {
			if c.Suspect == nil {
				t.Parallel()
			}
			conformance.Run(t, c)
		})
	}
}

func TestEveryResponderIsHeldToTheSuite(t *testing.T) {
	cases := conformanceCases()
	for _, e := range responders.All() {
		if !slices.ContainsFunc(cases, func(c conformance.Case) bool { return c.Responder == e.Name }) {
			t.Errorf("responder %s has no case in the conformance suite", e.Name)
		}
	}
}
