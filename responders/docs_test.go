package responders_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"stoop/responders"
)

var update = flag.Bool("update", false, "write docs/responders.md anew")

const docs = "../docs/responders.md"

func TestDocs(t *testing.T) {
	var b bytes.Buffer
	if err := responders.WriteDocs(&b, responders.All()); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.MkdirAll("../docs", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(docs, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s is not what the registry says: run go generate ./responders", docs)
	}
}

// The golden file above would hold whatever the generator leaves out.
func TestDocsSayAll(t *testing.T) {
	var b bytes.Buffer
	if err := responders.WriteDocs(&b, responders.All()); err != nil {
		t.Fatal(err)
	}
	for _, e := range responders.All() {
		_, section, ok := strings.Cut(b.String(), "\n## "+e.Name+"\n")
		if !ok {
			t.Errorf("%s has no section", e.Name)
			continue
		}
		section, _, _ = strings.Cut(section, "\n## ")
		say := []string{e.Doc, strings.TrimSpace(e.Notes)}
		for _, f := range e.Params.Fields {
			say = append(say, "| `"+f.Name+"` |", f.Doc)
			if f.Default != "" {
				say = append(say, "`"+f.Default+"`")
			}
		}
		for _, r := range e.RBAC {
			say = append(say, strings.Join(r.Verbs, ", "))
			say = append(say, r.Resources...)
		}
		for _, s := range say {
			if !strings.Contains(section, s) {
				t.Errorf("%s: the section does not say %q", e.Name, s)
			}
		}
	}
}

// What the host, the rules and the chart take for granted.
func TestRegistry(t *testing.T) {
	form := regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)*$`)
	seen := map[string]bool{}
	for _, e := range responders.All() {
		if !form.MatchString(e.Name) || seen[e.Name] {
			t.Errorf("the name %q is used twice, or no token of a subject", e.Name)
		}
		seen[e.Name] = true
		if !strings.HasSuffix(e.Doc, ".") || e.Notes == "" || e.Params == nil || e.New == nil {
			t.Errorf("%s lacks its doc, notes, parameters or constructor", e.Name)
		}
		most := time.Minute
		switch e.Name {
		case "drain-node", "exec-in-pod", "capture-files", "capture-packets", "checkpoint-container":
			most = 61 * time.Minute // as long as the rule says
		}
		if e.Deadline <= 0 || e.Deadline > most {
			t.Errorf("%s: a try may take %s", e.Name, e.Deadline)
		}
		cluster := e.Object == responders.PodObject || e.Object == responders.NodeObject || e.Object == responders.ResourceObject
		if cluster != (len(e.RBAC) > 0 || e.Grants != nil) {
			t.Errorf("%s acts on the cluster without permissions, or on nothing there with some", e.Name)
		}
		for _, r := range e.RBAC {
			for _, words := range [][]string{r.Verbs, r.Resources, r.APIGroups} {
				if len(words) == 0 || slices.Contains(words, "*") {
					t.Errorf("%s asks for %v: name what is needed", e.Name, r)
				}
			}
		}
		if e.Instead != "" && !slices.ContainsFunc(responders.All(), func(o responders.Entry) bool { return o.Name == e.Instead && o.Object == e.Object }) {
			t.Errorf("%s: there is no %s to do instead", e.Name, e.Instead)
		}
		if e.Lane != nil {
			for _, raw := range []json.RawMessage{nil, json.RawMessage(`{}`), json.RawMessage(`[`)} {
				if lane := e.Lane(raw); lane == "" || len(lane) > 64 {
					t.Errorf("%s: the lane of %s is %q", e.Name, raw, lane)
				}
			}
		}
		for _, f := range e.Params.Fields {
			if f.Doc == "" || !strings.HasSuffix(f.Doc, ".") {
				t.Errorf("%s: parameter %s has no sentence to it", e.Name, f.Name)
			}
		}
		if strings.Contains(fmt.Sprint(e.Doc, e.Notes), "TODO") {
			t.Errorf("%s is not finished", e.Name)
		}
	}
}
