package rules

import (
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestPattern(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"a", "a", true},
		{"a", "ab", false},
		{"", "", true},
		{"*", "", true},
		{"**", "x", true},
		{"?", "", false},
		{"?", "ä", true},
		{"?", "äb", false},
		{"a*", "a", true},
		{"*a", "ba", true},
		{"*a", "ab", false},
		{"a*a", "a", false}, // one a is not two
		{"a*a", "aa", true},
		{"a*b*c", "aXbYc", true},
		{"a*b*c", "aXcYb", false},
		{"*ab?d*", "xabcabxd", true},
		{"*ab?d*", "xabcabxe", false},
		{"??*", "ä", false},
		{"??*", "äö", true},
		{"*??", "xäö", true},
		{"*?", "", false},
		{"[a]*", "[a]b", true},
		{"[a]*", "ab", false},
		{`\*`, `\x`, true},
		{`a\?`, `a\b`, true},
		{"/tmp/*/x?", "/tmp/a/b/xy", true},
		{"*\xff?", "a\xffb", true},
	} {
		p := newPattern(tt.pattern)
		if got := p.match(tt.s); got != tt.want {
			t.Errorf("%q and %q: got %v", tt.pattern, tt.s, got)
		}
	}
}

func FuzzPattern(f *testing.F) {
	for _, p := range []string{"a*b?c", "*", "??", "a", "[*]", "*aa*a?"} {
		f.Add(p, "aabbcc")
	}
	f.Fuzz(func(t *testing.T, pattern, s string) {
		// Only what both sides read alike: a regular expression can't say
		// "any byte that is no character".
		if len(pattern) > 100 || len(s) > 200 || !utf8.ValidString(pattern) || !utf8.ValidString(s) {
			t.Skip()
		}
		q := regexp.QuoteMeta(pattern)
		q = strings.ReplaceAll(strings.ReplaceAll(q, `\*`, `(?s:.*)`), `\?`, `(?s:.)`)
		want := regexp.MustCompile(`^(?:` + q + `)$`).MatchString(s)
		p := newPattern(pattern)
		if got := p.match(s); got != want {
			t.Errorf("%q and %q: got %v", pattern, s, got)
		}
	})
}

// Whoever writes the fields of an alert must not be able to make matching slow.
func TestPatternOnLongValues(t *testing.T) {
	start := time.Now()
	s := strings.Repeat("a", 256<<10)
	for _, pattern := range []string{strings.Repeat("*a", 100) + "*b", strings.Repeat("*a?a", 50) + "*b", "*" + strings.Repeat("a?", 10) + "b*"} {
		if p := newPattern(pattern); p.match(s) {
			t.Errorf("%q matches", pattern)
		}
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("it took %s", took)
	}
}
