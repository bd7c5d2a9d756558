package responders_test

import (
	"encoding/json"
	"testing"

	"gopkg.in/yaml.v3"

	"stoop/responders"
)

// check reads parameters as the rules do.
func check(t testing.TB, e responders.Entry, params string) (json.RawMessage, []string) {
	t.Helper()
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(params), &doc); err != nil {
		t.Fatal(err)
	}
	var node *yaml.Node
	if len(doc.Content) > 0 {
		node = doc.Content[0]
	}
	raw, found := e.Params.Check(node)
	var messages []string
	for _, p := range found {
		messages = append(messages, p.Message)
	}
	return raw, messages
}

func checked(t testing.TB, e responders.Entry, params string) json.RawMessage {
	t.Helper()
	raw, messages := check(t, e, params)
	if len(messages) > 0 {
		t.Fatalf("%s: %q", params, messages)
	}
	return raw
}

func problems(t testing.TB, e responders.Entry, params string) []string {
	t.Helper()
	_, messages := check(t, e, params)
	return messages
}
