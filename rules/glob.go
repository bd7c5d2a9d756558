package rules

import (
	"strings"
	"unicode/utf8"
)

// pattern is a text to compare with, in which * stands for any run of
// characters and ? for any one. Nothing else is special: values of fields hold
// brackets and backslashes.
type pattern struct {
	text  string
	parts []string // between the *; nil: the text has neither * nor ?
}

func newPattern(s string) pattern {
	if !strings.ContainsAny(s, "*?") {
		return pattern{text: s}
	}
	return pattern{text: s, parts: strings.Split(s, "*")}
}

func (p *pattern) glob() bool { return p.parts != nil }

// match takes a time proportional to len(s) for each part, whatever s holds:
// the leftmost place for a part is always as good as any later one.
func (p *pattern) match(s string) bool {
	if p.parts == nil {
		return s == p.text
	}
	first, last := p.parts[0], p.parts[len(p.parts)-1]
	n, ok := prefix(s, first)
	if !ok {
		return false
	}
	s = s[n:]
	if len(p.parts) == 1 {
		return s == ""
	}
	for _, part := range p.parts[1 : len(p.parts)-1] {
		_, end := find(s, part)
		if end < 0 {
			return false
		}
		s = s[end:]
	}
	return suffix(s, last)
}

// prefix reports whether s begins with part, and how many bytes that takes.
func prefix(s, part string) (int, bool) {
	n := 0
	for i := range len(part) {
		switch {
		case n >= len(s):
			return 0, false
		case part[i] == '?':
			_, size := utf8.DecodeRuneInString(s[n:])
			n += size
		case s[n] != part[i]:
			return 0, false
		default:
			n++
		}
	}
	return n, true
}

// find is where part first stands in s, and where it ends; -1, -1: nowhere.
func find(s, part string) (start, end int) {
	if !strings.Contains(part, "?") {
		i := strings.Index(s, part)
		if i < 0 {
			return -1, -1
		}
		return i, i + len(part)
	}
	for i := range s {
		if n, ok := prefix(s[i:], part); ok {
			return i, i + n
		}
	}
	return -1, -1
}

func suffix(s, part string) bool {
	if !strings.Contains(part, "?") {
		return strings.HasSuffix(s, part)
	}
	// As many characters from the end as the part has.
	i := len(s)
	for range utf8.RuneCountInString(part) {
		if i == 0 {
			return false
		}
		_, size := utf8.DecodeLastRuneInString(s[:i])
		i -= size
	}
	n, ok := prefix(s[i:], part)
	return ok && i+n == len(s)
}

// patterns is the list of values of one key: any of them may match.
type patterns struct {
	few   []pattern           // globs, and literals as long as there are few
	exact map[string]struct{} // literals, when there are many
	all   []string            // as written, for people
}

func newPatterns(values []string) *patterns {
	const many = 8
	ps := &patterns{all: values}
	literals := 0
	for _, v := range values {
		if p := newPattern(v); !p.glob() {
			literals++
		}
	}
	for _, v := range values {
		p := newPattern(v)
		if p.glob() || literals < many {
			ps.few = append(ps.few, p)
			continue
		}
		if ps.exact == nil {
			ps.exact = make(map[string]struct{}, literals)
		}
		ps.exact[v] = struct{}{}
	}
	return ps
}

// match reports whether s is one of the values. Nothing, "", never is.
func (ps *patterns) match(s string) bool {
	if s == "" {
		return false
	}
	if _, ok := ps.exact[s]; ok {
		return true
	}
	for i := range ps.few {
		if ps.few[i].match(s) {
			return true
		}
	}
	return false
}

// literal reports whether no value is a glob.
func (ps *patterns) literal() bool {
	for i := range ps.few {
		if ps.few[i].glob() {
			return false
		}
	}
	return true
}

// String is the values for a person: "a, b or 3 more".
func (ps *patterns) String() string { return oneOf(ps.all) }
