package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// table is rows that are printed in columns.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// print writes the table so that it fits a terminal of so many columns: the last
// column is wrapped under itself or, where the others leave it too little room for
// a line or for one of its words, stands below them. 0 columns: nothing is wrapped.
func (t *table) print(w io.Writer, columns int) {
	if len(t.rows) == 0 {
		return
	}
	widths := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for _, r := range all {
		for i, c := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(clean(c)))
		}
	}
	last := len(widths) - 1
	left := 0
	for _, n := range widths[:last] {
		left += n + 2
	}
	const least, indent = 30, 4
	need := min(widths[last], least)
	for _, r := range t.rows {
		for word := range strings.FieldsSeq(clean(r[last])) {
			if n := utf8.RuneCountInString(word); n <= columns-indent {
				need = max(need, n)
			}
		}
	}
	below := columns > 0 && columns-left < need
	if below {
		left = indent
	}
	for _, r := range all {
		var line strings.Builder
		for i, c := range r[:last] {
			c = clean(c)
			line.WriteString(c + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
		}
		if below {
			fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
			line.Reset()
			line.WriteString(strings.Repeat(" ", indent))
		}
		for i, part := range wrap(clean(r[last]), columns-left) {
			if i > 0 {
				line.WriteString(strings.Repeat(" ", left))
			}
			fmt.Fprintln(w, strings.TrimRight(line.String()+part, " "))
			line.Reset()
		}
	}
}

// wrap breaks s at spaces into lines of at most n characters; a room too small
// to be of use leaves it whole.
func wrap(s string, n int) []string {
	const least = 16
	if n < least || utf8.RuneCountInString(s) <= n {
		return []string{s}
	}
	var out []string
	line, gap := "", 0
	for word := range strings.SplitSeq(s, " ") {
		if gap++; word == "" {
			continue
		}
		between := strings.Repeat(" ", min(gap, n))
		gap = 0
		for utf8.RuneCountInString(word) > n {
			if line != "" {
				out, line = append(out, line), ""
			}
			r := []rune(word)
			out, word = append(out, string(r[:n])), string(r[n:])
		}
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+len(between)+utf8.RuneCountInString(word) <= n:
			line += between + word
		default:
			out, line = append(out, line), word
		}
	}
	return append(out, line)
}

// clean makes a text that an attacker may have written safe for a terminal: no
// control characters, no changes of direction.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case !unicode.IsPrint(r):
			return '\uFFFD'
		}
		return r
	}, s)
}

// cut shortens s to n characters.
func cut(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}
