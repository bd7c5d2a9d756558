package rules_test

import (
	"slices"
	"testing"
)

func TestExact(t *testing.T) {
	for _, tt := range []struct {
		match string
		want  []string
	}{
		{`{priority: debug}`, nil},
		{`{fields: {k8s.ns.name: shop}}`, []string{"shop"}},
		{`{fields: {k8s.ns.name: [web, shop, web]}}`, []string{"shop", "web"}},
		{`{fields: {k8s.ns.name: [a, b, c, d, e, f, g, h, i, j]}}`, []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"}},
		{`{fields: {k8s.ns.name: "shop-*"}}`, nil},
		{`{fields: {k8s.ns.name: [shop, "web?"]}}`, nil},
		{`{fields: {k8s.pod.name: shop}}`, nil},
	} {
		r := parse(t, "rules: [{name: a, match: "+tt.match+", actions: [file]}]").Rules[0]
		if got := r.Exact("k8s.ns.name"); !slices.Equal(got, tt.want) || (got == nil) != (tt.want == nil) {
			t.Errorf("%s: got %q, want %q", tt.match, got, tt.want)
		}
	}
}
