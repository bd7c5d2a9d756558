package rules_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"stoop/rules"
)

func TestWhen(t *testing.T) {
	set := parse(t, `
rules:
  - name: count
    match: {priority: debug}
    when: {count: 3, within: 90s, by: container}
    actions: [file]
  - name: together
    match: {priority: debug}
    when: {rules: [Shell, "Shell*", "*egress?"], within: 5m, by: user}
    actions: [file]
  - name: plain
    match: {priority: debug}
    actions: [file]
`)
	count, together := set.Rules[0].When, set.Rules[1].When
	if count.Count != 3 || count.Needed() != 3 || count.Within != 90*time.Second || count.By != rules.ByContainer {
		t.Errorf("%+v", count)
	}
	if together.Count != 0 || together.Needed() != 3 || together.Within != 5*time.Minute || together.By != rules.ByUser {
		t.Errorf("%+v", together)
	}
	if set.Rules[2].When != nil {
		t.Error("a rule without a when has one")
	}
	for rule, want := range map[string]uint8{"Shell": 0b011, "Shell in a pod": 0b010, "an egress!": 0b100, "egress": 0, "": 0} {
		if got := together.Which(rule); got != want {
			t.Errorf("%q is %03b of the named rules, want %03b", rule, got, want)
		}
		if count.Which(rule) != 1 {
			t.Errorf("%q does not count", rule)
		}
	}
}

func TestWhensAreBounded(t *testing.T) {
	src := "rules:\n"
	for i := range 33 {
		src += fmt.Sprintf("- {name: r%d, match: {priority: debug}, when: {count: 2, within: 1m, by: pod}, actions: [file]}\n", i)
	}
	_, err := rules.Parse("rules.yaml", []byte(src), catalog())
	if err == nil || !strings.HasPrefix(err.Error(), "rules.yaml:34:47: there are more than 32 rules with a when") {
		t.Errorf("33 of them: %v", err)
	}
}

// A rule's hash is of what it means, not of how it is written; that of its when is
// of what counts.
func TestMeaning(t *testing.T) {
	const base = `
rules:
  - name: a
    mode: audit
    match: {priority: critical, rule: [A, "B*"], fields: {user.uid: 0, k8s.ns.name: [x, y]}}
    except: {fields: {container.id: host}}
    where: size(tags) > 0
    when: {rules: [A, B], within: 1m, by: pod}
    actions: [{delete-pod: {gracePeriod: 2s}}, {isolate-pod: {direction: egress}, onFailure: stop}]
`
	of := func(src string) *rules.Rule { t.Helper(); return parse(t, src).Rules[0] }
	a := of(base)
	with := func(old, to string) string {
		t.Helper()
		if strings.Count(base, old) != 1 {
			t.Fatalf("%q stands %d times in the rules", old, strings.Count(base, old))
		}
		return strings.Replace(base, old, to, 1)
	}
	written := `
# Said in another way.
mode: enforce
rules:
  - actions:
      - delete-pod:
          gracePeriod: "2s" # soon
      - onFailure: stop
        isolate-pod: {direction: egress}
    when: {by: pod, within: 1m, rules: [B, A]}
    where: |
      size(tags) > 0
    except: &host {fields: {container.id: [host]}}
    match:
      rule: ["B*", 'A']
      fields: {k8s.ns.name: [y, x], user.uid: 0}
      priority: critical
    description: What a is for.
    name: a
`
	if b := of(written); b.Hash != a.Hash || b.When.ID != a.When.ID {
		t.Error("how a rule is written changes its hash")
	}
	for _, tt := range []struct {
		old, to       string
		hash, counted bool // whether it changes the rule's hash, and what was counted means nothing any more
	}{
		{"name: a", "name: b", false, true},
		{"mode: audit", "mode: enforce", false, false},
		{"critical", "error", true, true},
		{"[x, y]", "[x, z]", true, true},
		{"container.id: host", "container.id: hosts", true, true},
		{"> 0", "> 1", true, true},
		{"within: 1m", "within: 2m", true, true},
		{"by: pod", "by: container", true, true},
		{"2s", "3s", true, false},
		{"stop", "continue", true, false},
		{"{delete-pod: {gracePeriod: 2s}}, {isolate-pod: {direction: egress}, onFailure: stop}", "{isolate-pod: {direction: egress}, onFailure: stop}, {delete-pod: {gracePeriod: 2s}}", true, false},
	} {
		b := of(with(tt.old, tt.to))
		if (b.Hash != a.Hash) != tt.hash || (b.When.ID != a.When.ID) != tt.counted {
			t.Errorf("%s → %s: the hash changes: %t, what is counted: %t", tt.old, tt.to, b.Hash != a.Hash, b.When.ID != a.When.ID)
		}
	}
}
