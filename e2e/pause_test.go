package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// annotateHome does what kubectl annotate does to the namespace default, in which
// stoops on a host agree; a nil value takes the annotation away.
func annotateHome(t *testing.T, c *kube.Cluster, value *string) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]*string{"stoop.dev/pause": value}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client.CoreV1().Namespaces().Patch(t.Context(), "default", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// One annotation pauses every node within 2 s; it stops acts and no undo, outlives a
// restart while the API server is away, and when it is taken away all go on.
func TestClusterPause(t *testing.T) {
	t.Parallel()
	c := kube.Start(t) // its own: the annotation is everybody's
	w := worldIn(t, c, allRBAC())
	type member struct {
		*world
		*program.Stoop
	}
	var all []member
	for range 3 {
		m := member{world: &world{Cluster: c, node: c.Node(t), ns: w.ns, account: w.account}}
		m.Stoop = m.stoop(t, `
mode: enforce
rules:
  - name: delete
    match: {rule: Test delete}
    actions: [delete-pod: {force: true}]
  - name: isolate
    match: {rule: Test isolate}
    actions: [isolate-pod]
`)
		all = append(all, m)
	}
	isolated := all[0].pod(t, "isolated")
	undo := all[0].WaitOutcome(all[0].Send(program.Critical("Test isolate", isolated)), "isolate-pod", soon)
	wantStatus(t, undo, broker.Done)
	harness.Eventually(t, soon, 20*time.Millisecond, func() (bool, string) {
		n := 0.0
		for _, m := range all {
			n += m.Metric("stoop_cluster_pause_watched")
		}
		return n == 3, fmt.Sprintf("all to watch; %v do", n)
	})

	// paused waits until every stoop says so.
	paused := func(want float64, within time.Duration) time.Duration {
		t.Helper()
		began := time.Now()
		harness.Eventually(t, within, 2*time.Millisecond, func() (bool, string) {
			for _, m := range all {
				if got := m.Metric(`stoop_paused{source="cluster"}`); got != want {
					return false, fmt.Sprintf("stoop_paused to be %v on node %s", want, m.node)
				}
			}
			return true, ""
		})
		return time.Since(began)
	}
	annotateHome(t, c, new("ann: a rule went wild"))
	t.Logf("all three were paused after %s", paused(1, 2*time.Second).Round(time.Millisecond))

	for i, m := range all {
		pod := m.pod(t, fmt.Sprintf("during-%d", i))
		o := m.WaitOutcome(m.Send(program.Critical("Test delete", pod)), "delete-pod", soon)
		wantStatus(t, o, broker.Suppressed)
		if !strings.Contains(o.Reason, "every node of the cluster") || !strings.Contains(o.Reason, "ann: a rule went wild") {
			t.Errorf("the reason is %s", o.Reason)
		}
		wantAlive(t, c, pod)
	}
	first := all[0]
	if out, errs, code := first.Command("resume"); code != 1 || !strings.Contains(errs, "kubectl annotate namespace default stoop.dev/pause-") {
		t.Errorf("stoop resume: exit %d\n%s%s", code, out, errs)
	}
	pod := first.pod(t, "resumed-in-vain")
	wantStatus(t, first.WaitOutcome(first.Send(program.Critical("Test delete", pod)), "delete-pod", soon), broker.Suppressed)
	first.Run("undo", undo.ID)
	first.WaitStatus(undo.Alert, "isolate-pod", broker.Undone, soon)

	// One starts anew while the API server is away.
	if err := c.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	first.Kill()
	first.Spawn()
	harness.Eventually(t, soon, 20*time.Millisecond, func() (bool, string) {
		out, errs, code := first.Command("pause", "--show")
		return code == 0 && strings.Contains(out, "every node of the cluster is paused since") && strings.Contains(out, "ann: a rule went wild") && strings.Contains(out, "can't be seen"), out + errs
	})
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, time.Minute, 20*time.Millisecond, func() (bool, string) {
		return first.Metric("stoop_cluster_pause_watched") == 1, "it to watch again"
	})
	before := first.pod(t, "restarted")
	wantStatus(t, first.WaitOutcome(first.Send(program.Critical("Test delete", before)), "delete-pod", soon), broker.Suppressed)

	harness.Eventually(t, time.Minute, 20*time.Millisecond, func() (bool, string) {
		for _, m := range all {
			if m.Metric("stoop_cluster_pause_watched") != 1 {
				return false, "all to watch again"
			}
		}
		return true, ""
	})
	annotateHome(t, c, nil)
	t.Logf("all three went on after %s", paused(0, 2*time.Second).Round(time.Millisecond))
	for i, m := range all {
		pod := m.pod(t, fmt.Sprintf("after-%d", i))
		wantStatus(t, m.WaitOutcome(m.Send(program.Critical("Test delete", pod)), "delete-pod", soon), broker.Done)
	}
	wantAlive(t, c, before)
	if out := first.Run("pause", "--show"); out != "acting\n" {
		t.Errorf("stoop pause --show says %q", out)
	}
}

// Without the permission stoop runs, says what is missing, and acts.
func TestClusterPauseForbidden(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, verb := range []string{"get", "list", "watch"} {
		w.Forbid(t, w.account, verb, "", "namespaces")
	}
	s := w.stoop(t, deleteRule)
	pod := w.pod(t, "web-1")
	wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), "delete-pod", soon), broker.Done)
	if out := s.Run("pause", "--show"); !strings.Contains(out, "acting\n") || !strings.Contains(out, "may not list namespaces in the whole cluster") {
		t.Errorf("stoop pause --show says %q", out)
	}
	if got := s.Metric("stoop_cluster_pause_watched"); got != 0 {
		t.Errorf("stoop_cluster_pause_watched is %v", got)
	}
	if !strings.Contains(s.Log(), "the cluster can't be paused as a whole") {
		t.Error("the log does not say so")
	}
}
