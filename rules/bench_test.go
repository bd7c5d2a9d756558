package rules_test

import (
	"fmt"
	"strings"
	"testing"

	"stoop/alert"
	"stoop/rules"
)

// twenty rules of every kind, one with a where.
func twenty(b *testing.B) *rules.Set {
	var s strings.Builder
	s.WriteString("rules:\n")
	for i := range 20 {
		var match string
		switch i % 5 {
		case 0:
			match = fmt.Sprintf("match: {rule: [Rule %d, Other rule %d]}", i, i)
		case 1:
			match = "match: {priority: critical, source: syscall}\n  except: {fields: {container.id: host}}"
		case 2:
			match = fmt.Sprintf("match: {rule: \"Unexpected thing %d*\", source: syscall}", i)
		case 3:
			match = fmt.Sprintf("match: {priority: warning, tags: [mitre_%d, T10%d]}", i, i)
		case 4:
			match = fmt.Sprintf("match: {rule: Rule %d, fields: {k8s.ns.name: \"shop-*\", user.uid: 0}}", i)
		}
		if i == 7 {
			match = "match: {rule: \"*shell*\", priority: notice}\n  where: fields[\"k8s.ns.name\"].startsWith(\"bank-\")"
		}
		fmt.Fprintf(&s, "- name: r%d\n  %s\n  actions: [delete-pod]\n", i, match)
	}
	set, err := rules.Parse("bench", []byte(s.String()), catalog())
	if err != nil {
		b.Fatal(err)
	}
	return set
}

func BenchmarkMatch(b *testing.B) {
	line := func(rule, priority string) []byte {
		return []byte(strings.NewReplacer("Terminal shell in container", rule, "Notice", priority).Replace(shell))
	}
	for _, bb := range []struct {
		name    string
		line    []byte
		matches int
	}{
		{"none", line("Some rule of Falco", "Notice"), 0},
		{"named", line("Rule 4", "Notice"), 1},
		{"critical", line("Some rule of Falco", "Critical"), 4},
		{"where", line("Terminal shell in container", "Notice"), 0},
	} {
		set := twenty(b)
		// The alert has its fields decoded already.
		b.Run(bb.name, func(b *testing.B) {
			a := read(b, string(bb.line))
			if n := len(set.Match(a)); n != bb.matches {
				b.Fatalf("%d rules match", n)
			}
			b.ReportAllocs()
			for b.Loop() {
				set.Match(a)
			}
		})
		// As it comes: parsed, then matched, its fields decoded if a rule asks.
		b.Run(bb.name+"/parsed", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				a, err := alert.Parse(bb.line)
				if err != nil {
					b.Fatal(err)
				}
				set.Match(a)
			}
		})
	}
	b.Run("parse-only", func(b *testing.B) {
		l := line("x", "Notice")
		b.ReportAllocs()
		for b.Loop() {
			if _, err := alert.Parse(l); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	src := []byte("rules:\n")
	for i := range 20 {
		src = fmt.Appendf(src, "- {name: r%d, match: {priority: debug}, where: 'fields[\"a\"] == \"b\"', actions: [delete-pod]}\n", i)
	}
	for b.Loop() {
		if _, err := rules.Parse("bench", src, catalog()); err != nil {
			b.Fatal(err)
		}
	}
}
