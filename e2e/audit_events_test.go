package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// secretRule answers a Secret that somebody makes by deleting it.
const secretRule = `
mode: enforce
rules:
  - name: no-secrets
    match: {source: k8s_audit, rule: Test secret}
    actions:
      - delete-resource: {kinds: [secrets], manifestFirst: false}
        approve: false
`

// audits is a part of the cluster where audit events are answered, with exactly the
// permissions that stoop rbac prints for that.
type audits struct {
	*world
}

func newAudits(t *testing.T) audits {
	t.Helper()
	w := audits{worldIn(t, shared.cluster, nil)}
	name := w.account.User[strings.LastIndex(w.account.User, ":")+1:]
	w.Apply(t, name, printed(t, secretRule, name, "--audit-events"))
	return w
}

// member starts a stoop that may answer audit events, and does not wait until it is
// ready: a standby never is.
func (w audits) member(t *testing.T) *program.Stoop {
	t.Helper()
	o := w.options(secretRule)
	o.Config += "kubernetes: {qps: 5000, burst: 5000, auditEvents: elected}\n"
	o.Config = strings.Replace(o.Config, "kubernetes: {qps: 5000, burst: 5000}\n", "", 1)
	o.Node = kube.Name("deployment")
	s := program.New(t, o)
	s.Spawn("POD_NAMESPACE=" + kube.AccountNamespace)
	harness.Eventually(t, soon, 5*time.Millisecond, func() (bool, string) {
		_, _, code := s.Command("pause", "--show")
		return code == 0, "stoop to answer"
	})
	return s
}

func (w audits) secret(t *testing.T, name string) *corev1.Secret {
	t.Helper()
	s, err := w.Client.CoreV1().Secrets(w.ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w audits) gone(t *testing.T, name string) bool {
	t.Helper()
	_, err := w.Client.CoreV1().Secrets(w.ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	return err != nil
}

// made is the event that says so, as Falco's plugin writes it on whatever host it
// runs.
func (w audits) made(name string) program.Alert {
	now := time.Now().UTC()
	return program.Alert{
		Hostname: "falco-k8saudit-0", Output: "a secret was made", Priority: "Warning", Rule: "Test secret", Source: "k8s_audit",
		Time: program.Stamp(now),
		Fields: map[string]any{
			"ka.verb": "create", "ka.response.code": "201", "ka.user.name": "mallory",
			"ka.target.resource": "secrets", "ka.target.name": name, "ka.target.namespace": w.ns,
		},
	}
}

// deletes are stoop's requests to delete a Secret.
func (w audits) deletes(t *testing.T, name string) (n int) {
	t.Helper()
	for _, r := range w.requests(t) {
		if r.Resource == "secrets" && r.Verb == "delete" && r.Name == name {
			n++
		}
	}
	return n
}

// Of two stoops that both get every audit event one answers, and the other when that
// one is killed.
func TestAuditEvents(t *testing.T) {
	t.Parallel()
	w := newAudits(t)
	one, two := w.member(t), w.member(t)

	// Exactly one is ready.
	var leader, standby *program.Stoop
	harness.Eventually(t, soon, 20*time.Millisecond, func() (bool, string) {
		a, whyA := one.Readyz()
		b, whyB := two.Readyz()
		if a == b {
			return false, fmt.Sprintf("one of the two to be ready: %s; %s", whyA, whyB)
		}
		if leader, standby = one, two; b {
			leader, standby = two, one
		}
		return true, ""
	})
	harness.Eventually(t, soon, 20*time.Millisecond, func() (bool, string) {
		_, why := standby.Readyz()
		return strings.Contains(why, "answers them (lease stoop-system/stoop-audit-events); this stoop stands by"), "the standby to say who leads: " + why
	})
	if leader.Metric("stoop_audit_events_leader") != 1 || standby.Metric("stoop_audit_events_leader") != 0 {
		t.Error("the metric does not say who leads")
	}

	w.secret(t, "first")
	event := w.made("first")
	id := leader.Send(event)
	standby.Send(event)
	wantStatus(t, leader.WaitOutcome(id, "delete-resource", soon), broker.Done)
	if !w.gone(t, "first") {
		t.Error("the secret is there")
	}

	// A node's stoop, which gets it too, starts nothing for it.
	node := program.Start(t, program.Options{Bin: shared.bin, Node: w.Node(t), Mode: "enforce", Rules: secretRule, Config: program.NoLimits})
	o := node.WaitOutcome(node.Send(event), "delete-resource", soon)
	wantStatus(t, o, broker.Suppressed)
	if !strings.Contains(o.Reason, "kubernetes.auditEvents: elected") {
		t.Errorf("the reason is %s", o.Reason)
	}
	// What comes to the standby while the leader dies is answered in the Lease's time.
	w.secret(t, "second")
	leader.Kill()
	killed := time.Now()
	id = standby.Send(w.made("second"))
	wantStatus(t, standby.WaitOutcome(id, "delete-resource", 30*time.Second), broker.Done)
	took := time.Since(killed)
	t.Logf("the standby answered %s after the leader was killed", took.Round(100*time.Millisecond))
	if took > 20*time.Second {
		t.Errorf("the standby answered after %s", took)
	}
	harness.Eventually(t, soon, 20*time.Millisecond, standby.Readyz)
	// The first event, which it had held, asks for nothing again.
	wantStatus(t, standby.WaitOutcome(program.ID(event.Line()), "delete-resource", soon), broker.Nothing)
	for _, name := range []string{"first", "second"} {
		if n := w.deletes(t, name); n != 1 || !w.gone(t, name) {
			t.Errorf("the audit log has %d requests to delete the secret %s", n, name)
		}
	}

	// The one that is told to end gives the turn back.
	leader.Spawn("POD_NAMESPACE=" + kube.AccountNamespace)
	standby.Stop()
	given := time.Now()
	harness.Eventually(t, soon, 20*time.Millisecond, leader.Readyz)
	t.Logf("the next one was ready %s after the one before was told to end", time.Since(given).Round(100*time.Millisecond))
}
