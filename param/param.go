// Package param describes the parameters of a responder once: the rules are
// checked, the responder runs and its documentation is written by the same
// description.
package param

import (
	"encoding/json"

	"gopkg.in/yaml.v3"
)

// Description is the parameters of a responder.
type Description struct{ Fields []Field }

// Field is one parameter.
type Field struct {
	Name, Type, Default, Doc string
	Required                 bool
	OneOf                    []string
}

// Problem is a mistake in a parameter, and where it stands.
type Problem struct {
	Node    *yaml.Node
	Message string
}

// Describe reads the description off a struct that holds the defaults.
func Describe(defaults any) *Description { panic("soon") }

// Check ...
func (d *Description) Check(n *yaml.Node) (json.RawMessage, []Problem) { panic("soon") }

// Decode ...
func Decode(raw json.RawMessage, into any) error { panic("soon") }
