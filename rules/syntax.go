package rules

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"

	"stoop/param"
)

// decode is the first document of src, without its envelope, and the second if
// there is one.
func decode(src []byte) (root, next *yaml.Node, err error) {
	var docs [2]yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(src))
	for i := range docs {
		switch err := d.Decode(&docs[i]); {
		case errors.Is(err, io.EOF):
			return root, nil, nil
		case err != nil:
			return nil, nil, err
		case i == 1:
			return root, &docs[i], nil
		case len(docs[i].Content) > 0:
			root = docs[i].Content[0]
		}
	}
	return root, nil, nil
}

// syntax is the problem for a source that is no YAML. The library gives no
// column, and for its line that of the enclosing block; so the source is read
// again in single bytes, to see how far it got.
func (p *parser) syntax(src []byte, err error) Problem {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if m := regexp.MustCompile(`^line ([0-9]+): `).FindStringSubmatch(message); m != nil {
		line, _ = strconv.Atoi(m[1])
		message = message[len(m[0]):]
	}
	if regexp.MustCompile(`did not find expected (key|node content|'-' indicator|',' or)`).MatchString(message) {
		line++ // the library counts these from 0
	}
	slow := &slowly{src: src}
	d := yaml.NewDecoder(slow)
	for d.Decode(new(yaml.Node)) == nil {
	}
	// What it reads ahead, and the line that it only just began, are not
	// where the mistake is; at the end of the file it is where the library says.
	read := bytes.TrimRight(src[:max(slow.read-1, 0)], " \n")
	if slow.read < len(src) || line <= 1 {
		line = bytes.Count(read, []byte("\n")) + 1
	}
	line = min(max(line, 1), len(p.lines))
	line, column := p.nearby(line, message)
	text := p.lines[line-1]
	if tab := strings.IndexByte(text, '\t'); tab >= 0 && strings.TrimLeft(text[:tab], " -") == "" {
		return p.problem(line, tab+1, "there is a tab here: YAML is indented with spaces only")
	}
	return p.problem(line, column, advise(message, text))
}

// nearby is the place to show: what the library trips over is often only the
// consequence of what stands a line before.
func (p *parser) nearby(line int, message string) (int, int) {
	if m := regexp.MustCompile(`unknown anchor '(.*)' referenced`).FindStringSubmatch(message); m != nil {
		for l := line; l >= 1; l-- {
			if before, _, ok := strings.Cut(p.lines[l-1], "*"+m[1]); ok {
				return l, utf8.RuneCountInString(before) + 1
			}
		}
	}
	if strings.Contains(message, "did not find expected key") {
		for _, l := range []int{line, line - 1} {
			if l >= 1 && quotedTooEarly(p.lines[l-1]) {
				before, _, _ := strings.Cut(p.lines[l-1], ": ")
				return l, utf8.RuneCountInString(before) + 3
			}
		}
	}
	text := p.lines[line-1]
	return line, len(text) - len(strings.TrimLeft(text, " ")) + 1
}

// quotedTooEarly reports whether a line is a key with a value that begins with
// a quote and goes on behind the next.
func quotedTooEarly(line string) bool {
	return regexp.MustCompile(`^[^"']*: *("[^"]*"|'[^']*') *[^ #,}\]]`).MatchString(line)
}

// slowly reads in single bytes.
type slowly struct {
	src  []byte
	read int
}

func (s *slowly) Read(b []byte) (int, error) {
	if s.read == len(s.src) {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil
	}
	b[0] = s.src[s.read]
	s.read++
	return 1, nil
}

// advise adds to the library's message what people usually did.
func advise(message, line string) string {
	value := strings.TrimSpace(line)
	value = strings.TrimPrefix(value, "- ")
	if _, v, ok := strings.Cut(value, ": "); ok {
		value = strings.TrimSpace(v)
	}
	first := ""
	if value != "" {
		first = value[:1]
	}
	quote := func(what string) string {
		return fmt.Sprintf("%s; write the whole value in single quotes (%s)", what, message)
	}
	switch {
	case strings.Contains(message, "unknown anchor"), first == "*":
		return quote(`YAML takes "*" at the beginning of a value for an alias`)
	case first == "`" || first == "@" || first == "%" && strings.Contains(message, "token"):
		return quote(fmt.Sprintf("no value may begin with %q", first))
	case first == "!":
		return quote(`YAML takes "!" at the beginning of a value for a tag`)
	case quotedTooEarly(line) && strings.Contains(message, "did not find expected"):
		return quote("a value that begins with a quote ends with the next one")
	case strings.Contains(message, "unknown escape"):
		return quote("between double quotes a backslash begins an escape")
	case strings.Contains(message, "mapping values are not allowed"):
		return fmt.Sprintf(`": " in the middle of a value, or wrong indentation; write such a value in single quotes (%s)`, message)
	case strings.Contains(message, "unexpected end of stream"):
		return fmt.Sprintf("a quote or bracket that opens here is never closed (%s)", message)
	case strings.Contains(message, "did not find expected"):
		return fmt.Sprintf("this line doesn't fit to the ones before it; look at the indentation and at quotes and brackets (%s)", message)
	}
	return "this is no YAML: " + param.Cut(message)
}
