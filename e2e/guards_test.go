package e2e

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"stoop/broker"
	"stoop/e2e/program"
)

// In audit mode everything happens save the act.
func TestAuditTouchesNothing(t *testing.T) {
	t.Parallel()
	rules := `
rules:
  - name: delete-on-critical
    match: {priority: critical}
    actions: [isolate-pod, label-pod: {labels: {quarantine: "yes"}}, delete-pod: {force: true}]
`
	for name, c := range map[string]struct{ mode, rules string }{
		"as installed":                 {"", rules},
		"the program's mode is audit":  {"audit", "mode: enforce\n" + rules},
		"the rules' mode is audit":     {"enforce", "mode: audit\n" + rules},
		"the one rule's mode is audit": {"enforce", "mode: enforce\n" + strings.Replace(rules, "    match:", "    mode: audit\n    match:", 1)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			o := w.options(c.rules)
			o.Mode = c.mode
			s := program.Start(t, o)
			pod := w.pod(t, "web-1")
			id := s.Send(program.Critical("Test critical", pod))
			for _, responder := range []string{"isolate-pod", "label-pod", "delete-pod"} {
				o := s.WaitOutcome(id, responder, soon)
				wantStatus(t, o, broker.Audited)
				if o.Target.UID != string(pod.UID) {
					t.Errorf("%s: the target was not found: %+v", responder, o.Target)
				}
			}
			w.wantUntouched(t, pod)
			w.wantNoRequests(t)

			if c.mode != "" {
				return
			}
			t.Run("nor when enforce is switched on afterwards", func(t *testing.T) {
				s.Stop()
				s.SetMode("enforce")
				s.SetRules("mode: enforce\n" + rules)
				s.Start()
				last := w.pod(t, "web-2")
				s.WaitStatus(s.Send(program.Critical("Test critical", last)), "delete-pod", broker.Done, soon)
				wantAlive(t, w.Cluster, pod)
			})
		})
	}
}

func TestGuards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)
	w.Namespace(t, "kube-system")

	suppressed := func(t *testing.T, pod *corev1.Pod, line []byte, word string) {
		t.Helper()
		s.Write(line)
		o := s.WaitOutcome(program.ID(line), "delete-pod", soon)
		wantStatus(t, o, broker.Suppressed)
		if !strings.Contains(o.Reason, word) {
			t.Errorf("the reason lacks %q: %s", word, o.Reason)
		}
		wantAlive(t, w.Cluster, pod)
	}

	t.Run("a protected namespace", func(t *testing.T) {
		pod := w.Pod(t, "kube-system", "dns-"+w.node, w.node, nil)
		suppressed(t, pod, program.Critical("Test critical", pod).Line(), "kube-system")
	})
	t.Run("a protected namespace that the alert does not name", func(t *testing.T) {
		pod := w.Pod(t, "kube-system", "dns2-"+w.node, w.node, nil)
		a := program.Critical("Test critical", pod)
		for _, f := range []string{"k8s.ns.name", "k8s.pod.name", "k8s.pod.uid"} {
			delete(a.Fields, f)
		}
		suppressed(t, pod, a.Line(), "kube-system")
	})
	t.Run("a protected priority class", func(t *testing.T) {
		pod := w.Pod(t, w.ns, "vital", w.node, func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical" })
		suppressed(t, pod, program.Critical("Test critical", pod).Line(), "system-node-critical")
	})
	t.Run("another node's alert", func(t *testing.T) {
		pod := w.pod(t, "elsewhere")
		a := program.Critical("Test critical", pod)
		a.Hostname = "another-node"
		suppressed(t, pod, a.Line(), "another-node")
	})
	t.Run("an old alert", func(t *testing.T) {
		pod := w.pod(t, "old")
		a := program.Critical("Test critical", pod)
		a.Time = program.Stamp(time.Now().Add(-11 * time.Minute))
		suppressed(t, pod, a.Line(), "old")
	})
	t.Run("an alert from the future", func(t *testing.T) {
		pod := w.pod(t, "future")
		a := program.Critical("Test critical", pod)
		a.Time = program.Stamp(time.Now().Add(5 * time.Minute))
		suppressed(t, pod, a.Line(), "future")
	})
	t.Run("an alert without a time", func(t *testing.T) {
		pod := w.pod(t, "timeless")
		a := program.Critical("Test critical", pod)
		a.Time = ""
		suppressed(t, pod, a.Line(), "time")
	})
	t.Run("no guard stood in a good alert's way", func(t *testing.T) {
		pod := w.pod(t, "good")
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon), broker.Done)
	})
	t.Run("and only that one asked for anything", func(t *testing.T) {
		if got := w.requests(t); len(got) != 1 {
			t.Errorf("the audit log has %d requests, want 1: %+v", len(got), got)
		}
	})
	// Last, since it makes stoop distrust what comes close behind.
	t.Run("a text alert", func(t *testing.T) {
		pod := w.pod(t, "text")
		line := []byte(time.Now().UTC().Format(time.RFC3339Nano) + ": Critical Shell in a container (k8s.ns.name=" + w.ns + " k8s.pod.name=" + pod.Name + ")\n")
		suppressed(t, pod, line, "text")
	})
	t.Run("JSON that a text alert may have carried with it", func(t *testing.T) {
		pod := w.pod(t, "forged")
		suppressed(t, pod, program.Critical("Test critical", pod).Line(), "text")
	})
}

func TestPause(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)
	s.Run("pause")
	during := w.pod(t, "during")
	id := s.Send(program.Critical("Test critical", during))
	wantStatus(t, s.WaitOutcome(id, "delete-pod", soon), broker.Suppressed)

	t.Run("outlives a restart", func(t *testing.T) {
		s.Kill()
		s.Start()
		pod := w.pod(t, "restarted")
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon), broker.Suppressed)
	})

	w.wantNoRequests(t)
	s.Run("resume")
	after := w.pod(t, "after")
	wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", after)), "delete-pod", soon), broker.Done)
	w.WaitGone(t, after, soon)
	wantAlive(t, w.Cluster, during)
}

// A Deployment whose pods keep raising alerts: two deletes, then isolation.
func TestOwnerIsIsolatedInstead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)
	pods := w.Deployment(t, w.ns, "loop", w.node, 3)
	for _, pod := range pods[:2] {
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon), broker.Done)
		w.WaitGone(t, pod, soon)
	}
	id := s.Send(program.Critical("Test critical", pods[2]))
	wantStatus(t, s.WaitOutcome(id, "isolate-pod", soon), broker.Done)
	wantAlive(t, w.Cluster, pods[2])
	w.wantIsolated(t, pods[2])
}

// Past the limit the breaker holds harmful steps back, and says so.
func TestBlastRadius(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	o := w.options(deleteRule)
	o.Config = "guard: {limits: {rule: 2/1m, namespace: 0, node: 0}}\n"
	s := program.Start(t, o)
	var done, suppressed int
	for _, pod := range w.Pods(t, w.ns, "web", w.node, 8) {
		switch o := s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon); o.Status {
		case broker.Done:
			done++
		case broker.Suppressed:
			suppressed++
			wantAlive(t, w.Cluster, pod)
		default:
			t.Errorf("the outcome is %s (%s)", o.Status, o.Reason)
		}
	}
	if done < 2 || suppressed == 0 {
		t.Errorf("%d deleted and %d held back, want at least 2 and some", done, suppressed)
	}
	got := 0
	for _, r := range w.requests(t) {
		if r.Resource == "pods" { // and not the fleet's budget
			got++
		}
	}
	if got != done {
		t.Errorf("the audit log has %d deletes, the history %d", got, done)
	}
}
