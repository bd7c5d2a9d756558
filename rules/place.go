package rules

import (
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// place is where a character stands in the file; both from 1.
type place struct{ line, column int }

// places tells for each character of a scalar's text, and for the end of it,
// where it stands in the file. Folding, indentation and escapes lie between the
// two: but for white space, the characters follow each other in the same order,
// so walking along both finds them. It is nil where that does not work out.
func places(lines []string, n *yaml.Node) []place {
	c := &cursor{line: n.Line, column: n.Column}
	for _, l := range lines {
		c.lines = append(c.lines, []rune(strings.TrimSuffix(l, "\r")))
	}
	for c.at() == '&' || c.at() == '!' { // an anchor or a tag comes first
		for !isSpace(c.at()) && c.at() != end {
			c.next()
		}
		c.space()
	}
	style := n.Style &^ yaml.TaggedStyle
	switch style {
	case yaml.LiteralStyle, yaml.FoldedStyle:
		for c.at() != '\n' && c.at() != end {
			c.next()
		}
	case yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle:
		c.next()
	}
	var ps []place
	for _, r := range n.Value {
		if isSpace(r) {
			ps = append(ps, place{c.line, c.column})
			continue
		}
		c.space()
		for style == yaml.DoubleQuotedStyle && c.at() == '\\' && c.escapedSpace() {
			c.space()
		}
		ps = append(ps, place{c.line, c.column})
		switch {
		case style == yaml.DoubleQuotedStyle && c.at() == '\\':
			c.escape()
		case c.at() != r:
			return nil
		default:
			c.next()
			if style == yaml.SingleQuotedStyle && r == '\'' {
				c.next() // it is written twice
			}
		}
	}
	return append(ps, place{c.line, c.column})
}

const end rune = -1

func isSpace(r rune) bool { return r == ' ' || r == '\t' || r == '\n' || r == '\r' }

// cursor walks over the lines of a file.
type cursor struct {
	lines        [][]rune
	line, column int
}

func (c *cursor) peek(ahead int) rune {
	if c.line < 1 || c.line > len(c.lines) {
		return end
	}
	switch l, i := c.lines[c.line-1], c.column-1+ahead; {
	case i < len(l):
		return l[i]
	case i == len(l):
		return '\n'
	}
	return end
}

func (c *cursor) at() rune { return c.peek(0) }

func (c *cursor) next() {
	switch c.at() {
	case end:
	case '\n':
		c.line++
		c.column = 1
	default:
		c.column++
	}
}

func (c *cursor) space() {
	for isSpace(c.at()) {
		c.next()
	}
}

// escapedSpace steps over an escape that stands for white space or for nothing.
func (c *cursor) escapedSpace() bool {
	switch c.peek(1) {
	case '\n', ' ', '\t', 'n', 't', 'r':
		c.next()
		c.next()
		return true
	}
	digits := c.digits()
	code := make([]rune, digits)
	for i := range code {
		code[i] = c.peek(2 + i)
	}
	if v, err := strconv.ParseUint(string(code), 16, 32); err != nil || !isSpace(rune(v)) {
		return false
	}
	c.escape()
	return true
}

// digits is how many hexadecimal ones belong to the escape.
func (c *cursor) digits() int {
	switch c.peek(1) {
	case 'x':
		return 2
	case 'u':
		return 4
	case 'U':
		return 8
	}
	return 0
}

func (c *cursor) escape() {
	for range c.digits() + 2 {
		c.next()
	}
}
