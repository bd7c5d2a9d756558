package rules

import (
	"bytes"
	"encoding/json"

	"gopkg.in/yaml.v3"

	"stoop/param"
)

// Settings reads another YAML file of stoop's, its configuration, by a
// description of its keys, and finds in it what is wrong in the way that it is
// found in rules: all of it, as [Problems]. A file without a key is fine.
func Settings(file string, src []byte, d *param.Description) (json.RawMessage, error) {
	p := &parser{file: file}
	var raw json.RawMessage
	if blank(src) {
		return nil, nil
	}
	if root := p.document(src); root != nil {
		found := []param.Problem(nil)
		raw, found = d.Check(root)
		p.params(root, "", found)
	}
	if len(p.problems) > 0 {
		return nil, Problems(tidy(p.problems))
	}
	return raw, nil
}

// Document reads YAML of others in the way that rules are read: one document, not
// too large, and what is wrong with it as [Problems]. It is nil where there is none.
func Document(file string, src []byte) (*yaml.Node, error) {
	p := &parser{file: file}
	if blank(src) {
		return nil, nil
	}
	root := p.document(src)
	if len(p.problems) > 0 {
		return nil, Problems(tidy(p.problems))
	}
	return root, nil
}

// blank reports whether there is nothing but comments and white space.
func blank(src []byte) bool {
	for line := range bytes.Lines(src) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}
