package responders

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/alert"
	"stoop/broker"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func testGuards() *Guards {
	return &Guards{
		Mode: broker.Enforce, Node: "n1", Aliases: []string{"n1.example"},
		Self:       Self{PID: 77, Container: strings.Repeat("ab", 32), User: "system:serviceaccount:stoop:stoop", Namespace: "stoop", Pod: "stoop-x"},
		Namespaces: []string{"kube-*", "stoop"}, PriorityClasses: []string{"system-*"},
		Cooldown: 5 * time.Minute, MaxAge: 10 * time.Minute, Approval: time.Hour,
	}
}

func TestTrust(t *testing.T) {
	line := func(at time.Time, rest string) string {
		return fmt.Sprintf(`{"priority":"Critical","rule":"R","hostname":"n1","time":%q%s}`, at.Format(time.RFC3339Nano), rest)
	}
	for name, c := range map[string]struct {
		line   string
		origin broker.Origin
		guard  string
	}{
		"a good one":            {line(noon, ""), broker.OriginFIFO, ""},
		"an audit event":        {line(noon, `,"source":"k8s_audit"`), broker.OriginFIFO, "audit-events"},
		"one of another source": {line(noon, `,"output_fields":{"ka.target.resource":"secrets","ka.target.name":"a"}`), broker.OriginFIFO, "audit-events"},
		"an alias":              {strings.Replace(line(noon, ""), `"n1"`, `"n1.example"`, 1), broker.OriginFIFO, ""},
		"no hostname":           {strings.Replace(line(noon, ""), `"hostname":"n1",`, "", 1), broker.OriginFIFO, ""},
		"another node":          {strings.Replace(line(noon, ""), `"n1"`, `"n2"`, 1), broker.OriginFIFO, "node"},
		"a name that begins so": {strings.Replace(line(noon, ""), `"n1"`, `"n11"`, 1), broker.OriginFIFO, "node"},
		"text":                  {"12:00:00.1: Critical a shell", broker.OriginFIFO, "text"},
		"internal":              {line(noon, `,"source":"internal"`), broker.OriginFIFO, "internal"},
		"stoop's own alert":     {line(noon, ""), broker.OriginStoop, "internal"},
		"open HTTP":             {line(noon, ""), broker.OriginOpenHTTP, "unauthenticated"},
		"ten minutes old":       {line(noon.Add(-10*time.Minute), ""), broker.OriginFIFO, ""},
		"older":                 {line(noon.Add(-10*time.Minute-1), ""), broker.OriginFIFO, "age"},
		"a moment ahead":        {line(noon.Add(20*time.Second), ""), broker.OriginFIFO, ""},
		"from the future":       {line(noon.Add(31*time.Second), ""), broker.OriginFIFO, "age"},
		"no time":               {strings.Replace(line(noon, ""), "2026-", "26-", 1), broker.OriginFIFO, "age"},
		"stoop's process":       {line(noon, `,"output_fields":{"proc.pid":77}`), broker.OriginFIFO, "self"},
		"stoop's container":     {line(noon, `,"output_fields":{"container.id":"abababababab"}`), broker.OriginFIFO, "self"},
		"another container":     {line(noon, `,"output_fields":{"container.id":"abababababac"}`), broker.OriginFIFO, ""},
	} {
		a, err := alert.Parse([]byte(c.line))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		guard, why := testGuards().trust(a, &broker.Step{Target: a.Target(), Origin: c.origin}, noon)
		if guard != c.guard || (why == "") != (guard == "") {
			t.Errorf("%s: guard %q (%s), want %q", name, guard, why, c.guard)
		}
	}
}

// The stoop that answers audit events answers those of any host, and nothing else.
func TestTrustOfAuditEvents(t *testing.T) {
	for name, c := range map[string]struct{ rest, guard string }{
		"an audit event":              {`,"source":"k8s_audit"`, ""},
		"by another":                  {`,"source":"k8s_audit","output_fields":{"ka.user.name":"eve"}`, ""},
		"by stoop":                    {`,"source":"k8s_audit","output_fields":{"ka.user.name":"system:serviceaccount:stoop:stoop"}`, "self"},
		"by a node's stoop":           {`,"source":"k8s_audit","output_fields":{"ka.user.name":"system:serviceaccount:stoop:node"}`, "self"},
		"by one named alike":          {`,"source":"k8s_audit","output_fields":{"ka.user.name":"system:serviceaccount:stoops:stoop"}`, ""},
		"an alert of a node":          {`,"source":"syscall"`, "node"},
		"an alert without a source":   {``, "node"},
		"an event of another source":  {`,"source":"mine","output_fields":{"ka.target.resource":"secrets","ka.target.name":"a"}`, ""},
		"an event of a container too": {`,"source":"k8s_audit","output_fields":{"container.id":"abababababab"}`, "self"},
	} {
		a, err := alert.Parse(fmt.Appendf(nil, `{"priority":"Critical","rule":"R","hostname":"falco-0","time":%q%s}`, noon.Format(time.RFC3339Nano), c.rest))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		g := testGuards()
		g.Audit = Alone{}
		if guard, why := g.trust(a, &broker.Step{Target: a.Target(), Origin: broker.OriginFIFO}, noon); guard != c.guard || (why == "") != (guard == "") {
			t.Errorf("%s: guard %q (%s), want %q", name, guard, why, c.guard)
		}
	}
}

func TestProtected(t *testing.T) {
	pod := func(ns, class string, annotations map[string]string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "p", Annotations: annotations},
			Spec:       corev1.PodSpec{PriorityClassName: class},
		}
	}
	for name, c := range map[string]struct {
		target alert.Target
		pod    *corev1.Pod
		want   string
	}{
		"an ordinary pod":      {alert.Target{Namespace: "shop", Pod: "p"}, pod("shop", "", nil), ""},
		"a protected space":    {alert.Target{Namespace: "kube-system"}, nil, "namespace kube-system is protected"},
		"the pod's space":      {alert.Target{Namespace: "shop"}, pod("kube-public", "", nil), "namespace kube-public is protected"},
		"stoop's own space":    {alert.Target{Namespace: "stoop", Pod: "other"}, nil, "namespace stoop is protected"},
		"a priority class":     {alert.Target{}, pod("shop", "system-node-critical", nil), "priority class system-node-critical is protected"},
		"a tenant's own class": {alert.Target{}, pod("shop", "my-system-class", nil), ""},
		"a static pod":         {alert.Target{}, pod("shop", "", map[string]string{"kubernetes.io/config.mirror": "x"}), "static pod"},
		"what a tenant writes": {alert.Target{}, pod("shop", "", map[string]string{"stoop.dev/protect": "true"}), ""},
	} {
		got := testGuards().protected(c.target, c.pod)
		if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	g := testGuards()
	g.Namespaces = nil
	if got := g.protected(alert.Target{Namespace: "stoop", Pod: "stoop-x"}, nil); got == "" {
		t.Error("stoop's own pod is not protected by itself")
	}
}

// begun lets a step begin and, when it may, ends it as done.
func begun(l *ledger, g *Guards, id string, a act, now time.Time) verdict {
	a.Began = now
	v := l.begin(id, a, g, true, now)
	if v == (verdict{}) {
		l.end(id, broker.Done, Result{}, now)
	}
	return v
}

func TestCooldown(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	a := act{Rule: "r", Responder: "delete-pod", Object: "pod/1", Namespace: "shop"}
	if v := begun(l, g, "1", a, noon); v != (verdict{}) {
		t.Fatalf("the first: %+v", v)
	}
	if v := begun(l, g, "2", a, noon.Add(5*time.Minute-1)); v.guard != "cooldown" {
		t.Errorf("within the cooldown: %+v", v)
	}
	for name, change := range map[string]func(*act){
		"another rule":      func(a *act) { a.Rule = "s" },
		"another object":    func(a *act) { a.Object = "pod/2" },
		"another responder": func(a *act) { a.Responder = "isolate-pod" },
	} {
		b := a
		change(&b)
		if v := begun(l, g, name, b, noon.Add(time.Minute)); v != (verdict{}) {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if v := begun(l, g, "3", a, noon.Add(5*time.Minute)); v != (verdict{}) {
		t.Errorf("after the cooldown: %+v", v)
	}
}

func TestCooldownStartsAtDone(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	a := act{Rule: "r", Responder: "delete-pod", Object: "pod/1", Began: noon}
	if v := l.begin("1", a, g, false, noon); v != (verdict{}) {
		t.Fatal(v)
	}
	if v := l.begin("2", a, g, false, noon); !v.busy {
		t.Errorf("while the first is under way: %+v", v)
	}
	l.end("1", broker.Failed, Result{}, noon)
	if v := l.begin("2", a, g, false, noon); v != (verdict{}) {
		t.Errorf("after the first failed: %+v", v)
	}
	if v := l.begin("2", a, g, false, noon); v != (verdict{}) {
		t.Errorf("a further try of the second: %+v", v)
	}
}

func TestOwnersLimit(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	step := func(i int, at time.Time) verdict {
		return begun(l, g, fmt.Sprint(i), act{Rule: "r", Responder: "delete-pod", Object: fmt.Sprintf("pod/%d", i), Owner: "rs-1"}, at)
	}
	for i, want := range []string{"", "", "owner", "owner"} {
		if v := step(i, noon.Add(time.Duration(i)*time.Minute)); v.guard != want {
			t.Errorf("delete %d: %+v, want %q", i, v, want)
		}
	}
	if v := step(9, noon.Add(30*time.Minute)); v.guard != "" {
		t.Errorf("half an hour after the first: %+v", v)
	}
	if v := begun(l, g, "x", act{Rule: "r", Responder: "delete-pod", Object: "pod/x", Owner: "rs-2"}, noon); v.guard != "" {
		t.Errorf("another owner: %+v", v)
	}
}

func TestLimits(t *testing.T) {
	minute := time.Minute
	for name, c := range map[string]struct {
		rule, namespace, node int
		step                  func(i int) act
		let                   int // how many are let through
		breaker               string
	}{
		"no limit":                 {0, 0, 0, func(i int) act { return act{Rule: "r", Namespace: "a"} }, 50, ""},
		"one rule":                 {5, 0, 0, func(i int) act { return act{Rule: "r", Namespace: fmt.Sprint(i)} }, 5, "rule r"},
		"one namespace":            {0, 5, 0, func(i int) act { return act{Rule: fmt.Sprint(i), Namespace: "a", Urgent: true} }, 5, "namespace a"},
		"the same, below critical": {0, 5, 0, func(i int) act { return act{Rule: fmt.Sprint(i), Namespace: "a"} }, 4, "alerts below Critical in namespace a"},
		"half of the node":         {0, 0, 10, func(i int) act { return act{Rule: "r", Namespace: "a", Urgent: true} }, 5, "namespace a"},
		"the node, critical":       {0, 0, 10, func(i int) act { return act{Namespace: fmt.Sprint(i), Urgent: true} }, 10, "this node"},
		"the node, below critical": {0, 0, 10, func(i int) act { return act{Namespace: fmt.Sprint(i)} }, 8, "alerts below Critical on this node"},
	} {
		g, l := testGuards(), newLedger(nil, testGuards())
		g.API = Limits{Rate{c.rule, minute}, Rate{c.namespace, minute}, Rate{c.node, minute}}
		let, opened := 0, ""
		for i := range 50 {
			a := c.step(i)
			a.Object = fmt.Sprintf("pod/%d", i)
			v := begun(l, g, fmt.Sprint(i), a, noon.Add(time.Duration(i)*time.Millisecond))
			if v == (verdict{}) {
				let++
			}
			if v.opened != "" {
				if opened != "" {
					t.Errorf("%s: a second breaker opened: %s", name, v.opened)
				}
				opened = v.opened
			}
		}
		if let != c.let || opened != c.breaker {
			t.Errorf("%s: %d let through and breaker %q, want %d and %q", name, let, opened, c.let, c.breaker)
		}
	}
}

// What is below Critical never takes the reserve, and Critical has it still when
// the breaker of the rest is open.
func TestCriticalKeepsItsReserve(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	g.API.Node = Rate{8, time.Minute}
	for i := range 20 {
		begun(l, g, fmt.Sprint("low", i), act{Object: fmt.Sprint(i), Namespace: fmt.Sprint("ns", i)}, noon)
	}
	let := 0
	for i := range 20 {
		if v := begun(l, g, fmt.Sprint("high", i), act{Object: fmt.Sprint("c", i), Namespace: fmt.Sprint("ns", i), Urgent: true}, noon); v == (verdict{}) {
			let++
		}
	}
	if let != 2 {
		t.Errorf("%d critical steps were let through, want 2", let)
	}
}

func TestABreakerClosesByItself(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	g.API.Rule = Rate{1, time.Minute}
	step := func(i int, at time.Time) verdict {
		return begun(l, g, fmt.Sprint(i), act{Rule: "r", Object: fmt.Sprint(i)}, at)
	}
	step(0, noon)
	if v := step(1, noon.Add(30*time.Second)); v.opened == "" {
		t.Fatalf("%+v", v)
	}
	if v := step(2, noon.Add(89*time.Second)); v.guard != "limit" || v.opened != "" {
		t.Errorf("while it is open: %+v", v)
	}
	if v := step(3, noon.Add(91*time.Second)); v != (verdict{}) {
		t.Errorf("afterwards: %+v", v)
	}
}

func TestTheLedgerForgets(t *testing.T) {
	g, l := testGuards(), newLedger(nil, testGuards())
	for i := range 1000 {
		begun(l, g, fmt.Sprint(i), act{Rule: "r", Object: fmt.Sprint(i), Owner: fmt.Sprint(i), Namespace: fmt.Sprint(i)}, noon)
	}
	begun(l, g, "late", act{Rule: "r", Object: "late"}, noon.Add(2*testGuards().keep()))
	if len(l.acts) != 1 || len(l.order) != 1 || len(l.last) != 1 {
		t.Errorf("%d acts, %d in order, %d objects are still known", len(l.acts), len(l.order), len(l.last))
	}
}

func TestObjectNeverDependsOnText(t *testing.T) {
	for want, target := range map[string]alert.Target{
		"pod/u":                  {UID: "u", Container: "0123456789abcdef", PID: 5},
		"pod/a/b":                {Namespace: "a", Pod: "b", Container: "0123456789ab"},
		"container/0123456789ab": {Container: "0123456789abcdef", PID: 5},
		"process/5/6":            {PID: 5, PIDStart: 6},
		"node/n":                 {Node: "n"},
	} {
		if got := objectOf(target); got != want {
			t.Errorf("%+v: %s, want %s", target, got, want)
		}
	}
}
