package responders_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
)

func rehearsalGuards() responders.Guards {
	rates := responders.Limits{Rule: responders.Rate{N: 3, Per: time.Minute}, Namespace: responders.Rate{N: 8, Per: time.Minute}, Node: responders.Rate{N: 20, Per: time.Minute}}
	return responders.Guards{
		Mode: broker.Enforce, Node: "node-1", Namespaces: []string{"kube-*"},
		Cooldown: 5 * time.Minute, MaxAge: 10 * time.Minute, API: rates, Local: rates,
	}
}

func TestRehearsal(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	type step struct {
		after     time.Duration // since the first
		age       time.Duration // of the alert when it arrived
		pod       string        // namespace/name, or "host", or "" for none
		responder string
		mode      broker.Mode
		origin    broker.Origin
		want      broker.Status
		guard     string
	}
	del := func(after time.Duration, pod string, want broker.Status, guard string) step {
		return step{after: after, pod: pod, responder: "delete-pod", mode: broker.Enforce, want: want, guard: guard}
	}
	minute := time.Minute
	for name, steps := range map[string][]step{
		"cooldown": {
			del(0, "shop/a", broker.Done, ""),
			del(minute, "shop/a", broker.Suppressed, "cooldown"),
			del(minute, "shop/b", broker.Done, ""),
			del(6*minute, "shop/a", broker.Done, ""),
		},
		"the rule's limit": {
			del(0, "shop/a", broker.Done, ""),
			del(time.Second, "shop/b", broker.Done, ""),
			del(2*time.Second, "shop/c", broker.Done, ""),
			del(3*time.Second, "shop/d", broker.Suppressed, "guard.limits.rule"),
			del(4*time.Second, "shop/e", broker.Suppressed, "guard.limits.rule"), // the breaker
			{after: 5 * time.Second, pod: "shop/a", responder: "freeze-container", mode: broker.Enforce, want: broker.Done},
			{after: 5 * time.Second, pod: "shop/e", responder: "slack", mode: broker.Enforce, want: broker.Done},
			del(2*minute, "shop/d", broker.Done, ""),
		},
		"audit takes nothing of what is enforced": {
			{pod: "shop/a", responder: "delete-pod", mode: broker.Audit, want: broker.Done},
			{pod: "shop/a", responder: "delete-pod", mode: broker.Audit, want: broker.Suppressed, guard: "cooldown"},
			del(0, "shop/a", broker.Done, ""),
		},
		"never": {
			del(0, "kube-system/dns", broker.Suppressed, "protected"),
			{age: 11 * minute, pod: "shop/a", responder: "delete-pod", mode: broker.Enforce, want: broker.Suppressed, guard: "age"},
			{pod: "shop/a", responder: "delete-pod", mode: broker.Enforce, origin: broker.OriginOpenHTTP, want: broker.Suppressed, guard: "unauthenticated"},
			del(0, "host", broker.Refused, "refused"),
			del(0, "", broker.Refused, "refused"),
			{pod: "shop/a", responder: "lock-user", mode: broker.Enforce, want: broker.Refused, guard: "refused"},
			{pod: "kube-system/dns", responder: "slack", mode: broker.Enforce, want: broker.Done},
		},
		"a person": {
			{pod: "shop/a", responder: "drain-node", mode: broker.Enforce, want: broker.AwaitingApproval},
			{pod: "shop/a", responder: "drain-node", mode: broker.Audit, want: broker.Done},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := responders.NewRehearsal(responders.All(), rehearsalGuards())
			for i, s := range steps {
				now := at.Add(s.after)
				target := alert.Target{Node: "somewhere"}
				switch {
				case s.pod == "host":
					target.Host = true
				case s.pod != "":
					target.Namespace, target.Pod = filepath.Split(s.pod)
					target.Namespace = filepath.Clean(target.Namespace)
					target.Container = fmt.Sprintf("0123456789ab%x", s.pod)
				}
				st := &broker.Step{
					ID: fmt.Sprint(i), Rule: "rule", Mode: s.mode, Target: target, Origin: s.origin,
					Action: broker.Action{Responder: s.responder},
				}
				a := &alert.Alert{ID: fmt.Sprint(i), Time: now.Add(-s.age), Priority: alert.Critical, Source: "syscall"}
				got := r.Step(a, st, now)
				if got.Status != s.want || got.Guard != s.guard {
					t.Errorf("step %d, %s of %q after %s: %+v, want %s by %q", i, s.responder, s.pod, s.after, got, s.want, s.guard)
				}
			}
		})
	}
}

// Every responder can be rehearsed for whatever an alert names.
func TestARehearsalOfEveryResponder(t *testing.T) {
	lines := []string{
		`{"output":"o","priority":"Critical","rule":"A","time":"2026-01-02T03:04:05Z"}`,
		`{"output":"o","output_fields":{"container.id":"host","user.uid":1000,"user.name":"x"},"priority":"Critical","rule":"A","source":"syscall","time":"2026-01-02T03:04:05Z"}`,
		`{"output":"o","output_fields":{"container.id":"0123456789ab","k8s.ns.name":"shop","k8s.pod.name":"web","proc.pid":7,"proc.pid.ts":1767323045000000000,"fd.name":"10.0.0.1:4444->1.2.3.4:443","fs.path.name":"/tmp/x","proc.exepath":"/tmp/x"},"priority":"Critical","rule":"A","source":"syscall","time":"2026-01-02T03:04:05Z"}`,
		`{"output":"o","output_fields":{"ka.target.resource":"rolebindings","ka.target.name":"x","ka.target.namespace":"shop","ka.user.name":"eve"},"priority":"Critical","rule":"A","source":"k8s_audit","time":"2026-01-02T03:04:05Z"}`,
		"03:04:05.000000000: Critical text",
	}
	if dir := os.Getenv("STOOP_CORPUS"); dir != "" {
		f, err := os.Open(filepath.Join(dir, "alerts-json.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		s := bufio.NewScanner(f)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			lines = append(lines, s.Text())
		}
	}
	g := rehearsalGuards()
	g.API, g.Local = responders.Limits{}, responders.Limits{}
	elected := g
	elected.Audit = responders.Alone{}
	rehearsals := []*responders.Rehearsal{responders.NewRehearsal(responders.All(), g), responders.NewRehearsal(responders.All(), elected)}
	would := map[string]bool{}
	for i, line := range lines {
		a, err := alert.Parse([]byte(line))
		if err != nil {
			continue
		}
		for _, e := range responders.All() {
			for _, mode := range []broker.Mode{broker.Audit, broker.Enforce} {
				for _, r := range rehearsals {
					got := r.Step(a, &broker.Step{
						ID: fmt.Sprint(i, e.Name, mode), Rule: e.Name, Mode: mode, Target: a.Target(),
						Action: broker.Action{Responder: e.Name, Params: json.RawMessage(`{}`)},
					}, a.Time)
					if got.Status == broker.Done || got.Status == broker.AwaitingApproval {
						would[e.Name] = true
					} else if got.Reason == "" || got.Guard == "" {
						t.Errorf("%s for line %d: %+v", e.Name, i, got)
					}
				}
			}
		}
	}
	for _, e := range responders.All() {
		if !would[e.Name] {
			t.Errorf("%s would never act", e.Name)
		}
	}
}
