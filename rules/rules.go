// Package rules is what should follow from an alert: it reads rules.yaml, says
// what is wrong with it, and tells which rules match an alert.
//
// On an alert's way it stands between the broker, which stored the alert, and
// the responders, which do the steps of the rules that matched. It knows no
// responder: the [Catalog] tells it which there are and what parameters they
// take.
//
// Rules come from whoever may delete pods, and are believed; the alerts they
// are matched against are not. Matching costs a bounded time whatever an alert
// holds, and whatever goes wrong in it means "does not match".
package rules

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"gopkg.in/yaml.v3"

	"stoop/broker"
	"stoop/param"
)

// Catalog holds the responders that rules may name, with their parameters.
type Catalog map[string]*param.Description

// names are the responders in alphabetical order.
func (c Catalog) names() []string {
	names := make([]string, 0, len(c))
	for name := range c {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Set is a file of rules, checked and ready to match. It does not change any
// more and may be used by many goroutines at once.
type Set struct {
	File     string
	Mode     broker.Mode // the file's, for the rules that name none
	Rules    []*Rule     // in the order of the file
	Hash     string      // the first 12 hexadecimal digits of the source's SHA-256
	Warnings []Problem   // what is allowed and yet hardly meant

	index index
}

// Rule is one rule: what it asks of an alert and which steps follow.
type Rule struct {
	Name        string
	Description string
	Mode        broker.Mode // its own, or the file's; the program's is a ceiling for it
	Actions     []broker.Action
	When        *When  // how many alerts have to agree; nil: one is enough
	Hash        string // of what the rule means: all but its name, description and mode

	position int // in the file, from 0
	match    conditions
	except   *conditions
	where    *expression

	nameNode, whenNode *yaml.Node // only while the file is read
}

// What a file of rules may hold at most.
const (
	maxFile  = 1 << 20 // bytes
	maxRules = 1000
	maxNodes = 1 << 20 // with every alias written out
)

// Load reads the rules in the file at path. What is wrong with its content is
// the error [Problems]; any other error means that there is no content: no such
// file, no permission, a folder, or more than 1 MiB.
func Load(path string, c Catalog) (*Set, error) {
	src, err := read(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, src, c)
}

func read(path string) ([]byte, error) {
	// Looked at before it is opened: a FIFO would block the open.
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading the rules: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading the rules: %s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the rules: %w", err)
	}
	src, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("reading the rules: %w", err)
	}
	return src, nil
}
