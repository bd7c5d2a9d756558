package rules

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Problem is one thing that is wrong, or odd, with a file of rules.
type Problem struct {
	File    string `json:"file"`
	Line    int    `json:"line"`   // from 1
	Column  int    `json:"column"` // in characters, from 1
	Message string `json:"message"`

	source string // the line; "" where it should not be shown
	secret bool   // the line may hold a secret, so that no problem in it may show it
}

// At is a problem in a file that others read: src is the whole of it.
func At(file string, src []byte, line, column int, message string) Problem {
	p := &parser{file: file, lines: strings.Split(strings.ToValidUTF8(string(src), "\uFFFD"), "\n")}
	return p.problem(line, column, message)
}

// String is "file:line:column: message", and under it the line and a caret.
func (p Problem) String() string {
	s := fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	if p.source == "" {
		return s
	}
	line, caret := excerpt(p.source, p.Column)
	return s + "\n    " + line + "\n    " + strings.Repeat(" ", caret) + "^"
}

// excerpt is a line as a person can read it, cut to fit a terminal, and where
// in it the column is.
func excerpt(line string, column int) (string, int) {
	const most, before = 100, 60
	r := []rune(strings.TrimRight(line, "\r\n \t"))
	at := min(max(column-1, 0), len(r))
	for i, c := range r {
		if c == '\t' || !unicode.IsPrint(c) {
			r[i] = ' '
		}
	}
	if at > before {
		cut := at - before
		r, at = append([]rune("…"), r[cut:]...), before+1
	}
	if len(r) > most {
		r = append(r[:most:most], '…')
	}
	return string(r), at
}

// Problems is everything that is wrong with a file, in the order of its lines.
type Problems []Problem

// Error is all of them, each with its line and a caret under it.
func (ps Problems) Error() string {
	all := make([]string, len(ps))
	for i, p := range ps {
		all[i] = p.String()
	}
	return strings.Join(all, "\n")
}

// Summary is the first of them in one line, for a log, and how many more there
// are.
func (ps Problems) Summary() string {
	if len(ps) == 0 {
		return "no problem"
	}
	p := ps[0]
	s := fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	if more := len(ps) - 1; more > 0 {
		s += fmt.Sprintf(" (and %d more)", more)
	}
	return s
}

// tidy sorts by place and leaves out what is said twice, as happens under an
// alias, and what nobody would read any more.
func tidy(ps []Problem) []Problem {
	const most = 100
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	secret := map[int]bool{}
	for _, p := range ps {
		secret[p.Line] = secret[p.Line] || p.secret
	}
	for i := range ps {
		if secret[ps[i].Line] {
			ps[i].source, ps[i].secret = "", true
		}
	}
	ps = slices.Compact(ps)
	if len(ps) > most {
		last := ps[most]
		last.Message = fmt.Sprintf("… and %d more from here on", len(ps)-most)
		ps = append(ps[:most:most], last)
	}
	return ps
}
