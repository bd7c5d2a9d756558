package e2e

import (
	"testing"
	"time"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// The API server is away for 20 s: the steps wait, and are then done, once.
func TestAPIServerAway(t *testing.T) {
	t.Parallel()
	c := kube.Start(t) // its own: the other tests go on with theirs
	w := worldIn(t, c, allRBAC())
	s := w.stoop(t, `
mode: enforce
rules:
  - name: delete-on-critical
    match: {rule: Test delete}
    actions: [delete-pod: {force: true}]
  - name: isolate-on-critical
    match: {rule: Test isolate}
    actions: [isolate-pod]
`)
	deleted, isolated := w.pod(t, "web-1"), w.pod(t, "web-2")
	// An alert before shows that stoop's own view of the pods is there.
	first := w.pod(t, "web-0")
	wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test delete", first)), "delete-pod", soon), broker.Done)

	if err := c.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	gone := time.Now()
	deletion := s.Send(program.Critical("Test delete", deleted))
	isolation := s.Send(program.Critical("Test isolate", isolated))
	if o := s.WaitStatus(deletion, "delete-pod", broker.Retrying, soon); o.Reason == "" {
		t.Error("the outcome retrying does not say why")
	}
	s.WaitStatus(isolation, "isolate-pod", broker.Retrying, soon)
	harness.Eventually(t, time.Minute, 100*time.Millisecond, func() (bool, string) {
		return time.Since(gone) > 20*time.Second, "20 s to pass"
	})
	if !s.Process().Running() {
		t.Fatal("stoop ended")
	}
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	for id, responder := range map[string]string{deletion: "delete-pod", isolation: "isolate-pod"} {
		wantStatus(t, s.WaitOutcome(id, responder, time.Minute), broker.Done)
	}
	t.Logf("done %s after the API server was back", time.Since(back).Round(100*time.Millisecond))
	w.WaitGone(t, deleted, soon)
	w.wantIsolated(t, isolated)
	wantOnce(t, c, w.account.User)

	// And stoop sees pods that came later.
	later := w.pod(t, "web-3")
	wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Test delete", later)), "delete-pod", soon), broker.Done)
}
