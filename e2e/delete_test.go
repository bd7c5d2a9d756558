package e2e

import (
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

func TestDelete(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)

	t.Run("the pod of a critical alert", func(t *testing.T) {
		pod, other := w.pod(t, "web-1"), w.pod(t, "web-2")
		o := s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon)
		wantStatus(t, o, broker.Done)
		if o.Target.UID != string(pod.UID) || o.Rule != "delete-on-critical" || o.Took.Done == 0 {
			t.Errorf("the outcome tells of another pod, rule or no time: %+v", o)
		}
		w.WaitGone(t, pod, soon)
		wantAlive(t, w.Cluster, other)
		for _, r := range w.requests(t) {
			if r.Name == pod.Name && (r.Verb != "delete" || r.UID != string(pod.UID)) {
				t.Errorf("%s %s requires UID %q, want a delete that requires %s", r.Verb, r.Name, r.UID, pod.UID)
			}
		}
	})

	t.Run("and nothing below critical", func(t *testing.T) {
		pod := w.pod(t, "error-1")
		a := program.Critical("Test error", pod)
		a.Priority = "Error"
		below := s.Send(a)
		// A later alert's outcome shows that this one was dealt with.
		last := w.pod(t, "error-2")
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", last)), "delete-pod", soon), broker.Done)
		if got := s.Outcomes(below); len(got) > 0 {
			t.Errorf("there are outcomes:%s", program.Show(got))
		}
		wantAlive(t, w.Cluster, pod)
	})

	t.Run("not the replacement of the same name", func(t *testing.T) {
		old := w.pod(t, "db-0")
		full := program.Critical("Test critical", old)
		byContainer := program.Critical("Test critical", old)
		delete(byContainer.Fields, "k8s.pod.uid")
		byUID := program.Critical("Test critical", old)
		delete(byUID.Fields, "container.id")
		w.Remove(t, old)
		replacement := w.pod(t, "db-0")
		for name, a := range map[string]program.Alert{"container and UID": full, "container": byContainer, "UID": byUID} {
			if o := s.WaitOutcome(s.Send(a), "delete-pod", soon); o.Status != broker.Nothing && o.Status != broker.Refused {
				t.Errorf("alert with %s: %s (%s), want nothing or refused", name, o.Status, o.Reason)
			}
		}
		wantAlive(t, w.Cluster, replacement)
		// The replacement is not spared for its name: it has its own alerts.
		o := s.WaitOutcome(s.Send(program.Critical("Test critical", replacement)), "delete-pod", soon)
		wantStatus(t, o, broker.Done)
		w.WaitGone(t, replacement, soon)
	})

	t.Run("not by its name alone", func(t *testing.T) {
		pod := w.pod(t, "named-0")
		a := program.Critical("Test critical", pod)
		delete(a.Fields, "container.id")
		delete(a.Fields, "k8s.pod.uid")
		if o := s.WaitOutcome(s.Send(a), "delete-pod", soon); o.Status != broker.Refused && o.Status != broker.Failed {
			t.Errorf("the outcome is %s (%s), want refused or failed", o.Status, o.Reason)
		}
		wantAlive(t, w.Cluster, pod)
	})
}

// A replacement that came while stoop was away, with the old pod's alert
// waiting on the FIFO.
func TestDeleteReplacedWhileAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := program.New(t, w.options(deleteRule))
	s.Hold()
	s.Start()
	old := w.pod(t, "db-0")
	s.Stop()
	id := s.Send(program.Critical("Test critical", old))
	w.Remove(t, old)
	replacement := w.pod(t, "db-0")
	s.Start()
	if o := s.WaitOutcome(id, "delete-pod", soon); o.Status != broker.Nothing && o.Status != broker.Refused {
		t.Errorf("the outcome is %s (%s), want nothing or refused", o.Status, o.Reason)
	}
	wantAlive(t, w.Cluster, replacement)
}

// Alerts as Falco wrote them in 2018: no hostname, source, tags or namespace.
func TestOldAlerts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)
	for name, change := range map[string]func(fields map[string]any){
		"container and pod":                        func(map[string]any) {},
		"container and pod, the namespace null":    func(f map[string]any) { f["k8s.ns.name"] = nil },
		"container and pod, the namespace <NA>":    func(f map[string]any) { f["k8s.ns.name"] = "<NA>" },
		"only a container":                         func(f map[string]any) { delete(f, "k8s.pod.name") },
		"only a container, the pod's name is <NA>": func(f map[string]any) { f["k8s.pod.name"] = "<NA>" },
	} {
		t.Run(name, func(t *testing.T) {
			pod := w.pod(t, kube.Name("old"))
			// The same name in another namespace, on the same node.
			twin := w.Pod(t, w.Namespace(t, kube.Name("ns")), pod.Name, w.node, nil)
			fields := map[string]any{
				"container.id": kube.ShortID(pod), "k8s.pod.name": pod.Name,
				"proc.cmdline": "ls -al", "proc.name": "ls", "evt.time": time.Now().UnixNano(),
			}
			change(fields)
			now := time.Now()
			o := s.WaitOutcome(s.Send(program.Alert{
				Output: program.Stamp(now) + ": Critical Something critical happened", Priority: "Critical",
				Rule: "Test critical", Time: program.Stamp(now), Fields: fields,
			}), "delete-pod", soon)
			wantStatus(t, o, broker.Done)
			if o.Target.Namespace != w.ns || o.Target.Pod != pod.Name {
				t.Errorf("the outcome names %s/%s, want %s/%s", o.Target.Namespace, o.Target.Pod, w.ns, pod.Name)
			}
			w.WaitGone(t, pod, soon)
			wantAlive(t, w.Cluster, twin)
		})
	}
}

// Without the permission to delete: one try, and the outcome says what is
// missing.
func TestForbidden(t *testing.T) {
	t.Parallel()
	w := worldIn(t, shared.cluster, responders.BaseRBAC())
	s := w.stoop(t, deleteRule)
	pod := w.pod(t, "web-1")
	began := time.Now()
	o := s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon)
	wantStatus(t, o, broker.Failed)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s to fail, which is more than one try", took)
	}
	for _, word := range []string{"delete", "pods"} {
		if !strings.Contains(o.Reason, word) {
			t.Errorf("the reason does not name the missing permission (%q): %s", word, o.Reason)
		}
	}
	wantAlive(t, w.Cluster, pod)
	if got := w.requests(t); len(got) != 1 || got[0].Code != 403 {
		t.Errorf("the audit log has %+v, want one request, refused with 403", got)
	}

	// The permission may come later; then later alerts are answered.
	t.Run("given later", func(t *testing.T) {
		w.Grant(t, w.account, []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"delete"}}})
		wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical, again", pod)), "delete-pod", soon), broker.Done)
		w.WaitGone(t, pod, soon)
	})
}
