package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// crashRules writes noise to a file in dir.
func crashRules(dir string) string {
	return `
mode: enforce
rules:
  - name: delete
    match: {rule: Test delete}
    actions: [delete-pod: {force: true}]
  - name: isolate-then-delete
    match: {rule: Test chain}
    actions: [isolate-pod, delete-pod: {force: true}]
  - name: isolate
    match: {rule: Test isolate}
    actions: [isolate-pod]
  - name: isolate-after-three
    match: {rule: Test count}
    when: {count: 3, within: 60s, by: pod}
    actions: [isolate-pod]
  - name: keep
    match: {rule: Test noise}
    actions:
      - file: {path: ` + filepath.Join(dir, "noise.jsonl") + `}
`
}

// wantOnce checks with the audit log that the user asked for no change of one
// object twice. A request that the API server itself failed (5xx) had to be
// sent again and does not count.
func wantOnce(t *testing.T, c *kube.Cluster, user string) (requests int) {
	t.Helper()
	seen := map[string][]kube.Request{}
	for _, r := range c.Requests(t, user) {
		if r.Code >= 500 || r.Interrupted {
			continue
		}
		requests++
		object := r.UID
		if object == "" { // patches and creates: every name is used once
			object = r.Namespace + "/" + r.Name
		}
		key := r.Verb + " " + r.Resource + " " + object
		seen[key] = append(seen[key], r)
	}
	for key, all := range seen {
		if len(all) > 1 {
			codes := ""
			for _, r := range all {
				codes += fmt.Sprintf(" %s → %d", r.Time.Format("15:04:05.000000"), r.Code)
			}
			t.Errorf("sent %d times: %s:%s", len(all), key, codes)
		}
	}
	return requests
}

// expectation is an alert that was written, and the steps that must have an
// outcome for it.
type expectation struct {
	id         string
	pod        *corev1.Pod // nil for noise
	responders []string
}

// wantAll waits until every step has its final outcome, and checks what is
// left of the pods.
func wantAll(t *testing.T, w *world, s *program.Stoop, expected []expectation, within time.Duration) {
	t.Helper()
	type step struct{ alert, responder string }
	final := map[step][]broker.Outcome{}
	harness.Eventually(t, within, 500*time.Millisecond, func() (bool, string) {
		clear(final)
		for _, o := range s.History() {
			if program.Final(o.Status) {
				k := step{o.Alert, o.Responder}
				final[k] = append(final[k], o)
			}
		}
		missing, first := 0, ""
		for _, e := range expected {
			for _, r := range e.responders {
				if len(final[step{e.id, r}]) == 0 {
					if missing++; first == "" {
						first = e.id + " " + r
					}
				}
			}
		}
		return missing == 0, fmt.Sprintf("the outcomes of %d steps of %d alerts, the first %s", missing, len(expected), first)
	})
	statuses, wrong := map[broker.Status]int{}, 0
	for _, e := range expected {
		for _, r := range e.responders {
			outcomes := final[step{e.id, r}]
			last := outcomes[len(outcomes)-1]
			statuses[last.Status]++
			if last.Status != broker.Done && last.Status != broker.Nothing {
				if wrong++; wrong <= 5 {
					t.Errorf("%s of the alert %s: %s (%s)", r, e.id, last.Status, last.Reason)
				}
			}
			if len(outcomes) > 1 {
				statuses["told more than once"]++
			}
		}
		if e.pod == nil {
			continue
		}
		if last := e.responders[len(e.responders)-1]; last == "delete-pod" {
			w.WaitGone(t, e.pod, soon)
		} else {
			w.wantIsolated(t, e.pod)
		}
	}
	t.Logf("%d alerts, their steps: %v", len(expected), statuses)
}

func kind(rule string) []string {
	switch rule {
	case "Test delete":
		return []string{"delete-pod"}
	case "Test chain":
		return []string{"isolate-pod", "delete-pod"}
	case "Test isolate", "Test count":
		return []string{"isolate-pod"}
	}
	return []string{"file"}
}

// noise is an alert that is only written down.
func noise(node string, n int) program.Alert {
	now := time.Now()
	return program.Alert{
		Hostname: node, Output: fmt.Sprintf("Noise number %d", n), Priority: "Notice", Rule: "Test noise",
		Source: "syscall", Time: program.Stamp(now), Fields: map[string]any{"container.id": "host", "evt.num": n},
	}
}

// kill -9 at 20 random moments under load: no alert that was written is lost,
// and nothing is asked for twice.
func TestKilledAtRandomMoments(t *testing.T) {
	const (
		kills   = 20
		perRule = 150 // pods for each of the three kinds of harmful step
		tick    = 20 * time.Millisecond
		perTick = 6 // lines of noise: 300 a second
	)
	w := newWorld(t)
	s := program.New(t, w.options(crashRules(t.TempDir())))
	s.Hold()

	var expected []expectation
	var lines [][]byte
	add := func(a program.Alert, pod *corev1.Pod) {
		line := a.Line()
		lines = append(lines, line)
		expected = append(expected, expectation{program.ID(line), pod, kind(a.Rule)})
	}
	var pods []*corev1.Pod
	var rules []string
	for _, rule := range []string{"Test delete", "Test chain", "Test isolate"} {
		for _, pod := range w.Pods(t, w.ns, kube.Name("pod"), w.node, perRule) {
			pods, rules = append(pods, pod), append(rules, rule)
		}
	}
	rand.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i]; rules[i], rules[j] = rules[j], rules[i] })

	killed := make(chan struct{})
	var writer sync.WaitGroup
	var writeErr error
	writer.Go(func() {
		ticker := time.NewTicker(tick)
		defer ticker.Stop()
		n := 0
		for tickNumber := 0; ; tickNumber++ {
			select {
			case <-killed: // the rest comes at once
				if len(pods) == 0 {
					return
				}
			case <-ticker.C:
			case <-t.Context().Done():
				return
			}
			lines = lines[:0]
			for range perTick {
				add(noise(w.node, n), nil)
				n++
			}
			if tickNumber%2 == 0 && len(pods) > 0 {
				add(program.Critical(rules[0], pods[0]), pods[0])
				pods, rules = pods[1:], rules[1:]
			}
			if writeErr = s.TryWrite(lines...); writeErr != nil {
				return
			}
		}
	})
	for k := range kills {
		s.Spawn()
		// Every other kill comes early, while what waited is worked off.
		alive := rand.N(1500 * time.Millisecond)
		if k%2 == 1 {
			alive = rand.N(400 * time.Millisecond)
		}
		select {
		case <-s.Process().Done():
			t.Fatalf("stoop ended by itself: %v\n%s", s.Process().Wait(0), s.LogTail(20))
		case <-time.After(alive):
		}
		s.Kill()
	}
	s.Start()
	close(killed)
	writer.Wait()
	if writeErr != nil {
		t.Fatal(writeErr)
	}
	wantAll(t, w, s, expected, 2*time.Minute)
	t.Logf("%d kills, %d requests in the audit log", kills, wantOnce(t, w.Cluster, w.account.User))
}

// The same at each of the places where a crash would hurt most.
func TestKilledAtFailPoints(t *testing.T) {
	t.Parallel()
	for _, point := range []string{
		"pipe.after-store",
		"router.before-publish", "router.after-publish",
		"router.before-keep", "router.after-keep",
		"host.before-intent", "host.after-intent", "host.after-act",
		"host.after-result", "host.after-next", "host.before-ack",
	} {
		t.Run(point, func(t *testing.T) {
			w := newWorld(t)
			o := w.options(crashRules(t.TempDir()))
			o.Bin = shared.failing
			s := program.New(t, o)
			s.Hold()
			s.Start("STOOP_FAILPOINT=" + point)
			var expected []expectation
			for i, rule := range []string{"Test chain", "Test delete", "Test isolate"} {
				pod := w.pod(t, fmt.Sprintf("pod-%d", i))
				expected = append(expected, expectation{s.Send(program.Critical(rule, pod)), pod, kind(rule)})
			}
			// Of these three one step follows, of the last.
			pod := w.pod(t, "pod-of-three")
			for range 2 {
				s.Send(program.Critical("Test count", pod))
			}
			expected = append(expected, expectation{s.Send(program.Critical("Test count", pod)), pod, kind("Test count")})
			var exit *exec.ExitError
			if err := s.Process().Wait(soon); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("stoop did not die at %s: %v", point, err)
			}
			s.Start()
			wantAll(t, w, s, expected, time.Minute)
			wantOnce(t, w.Cluster, w.account.User)
		})
	}
}
