package rules_test

import (
	"bufio"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
	"stoop/rules"
)

const shippedFile = "../rules.yaml"

// registry is what the program itself checks rules by.
func registry() rules.Catalog {
	c := rules.Catalog{}
	for _, e := range responders.All() {
		c[e.Name] = e.Params
	}
	return c
}

func shipped(t testing.TB) *rules.Set {
	t.Helper()
	set, err := rules.Load(shippedFile, registry())
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestShippedRules(t *testing.T) {
	set := shipped(t)
	if len(set.Warnings) > 0 {
		t.Errorf("warnings:\n%v", rules.Problems(set.Warnings).Error())
	}
	if set.Mode != broker.Audit {
		t.Errorf("the mode is %s", set.Mode)
	}
	for _, r := range set.Rules {
		if r.Mode != broker.Audit || r.Description == "" {
			t.Errorf("%s: mode %s, description %q", r.Name, r.Mode, r.Description)
		}
	}
	// What docs and README tell.
	for line, want := range map[string]string{
		`{"rule":"Drop and execute new binary in container","priority":"Critical","output_fields":{"container.id":"0123456789ab"}}`: "delete-pod-on-critical freeze-container capture-proc cut-network delete-pod",
		`{"rule":"Drop and execute new binary in container","priority":"Critical","output_fields":{"container.id":"host"}}`:         "",
		`{"rule":"Netcat Remote Code Execution in Container","priority":"Warning","output_fields":{"container.id":"0123456789ab"}}`: "contain-remote-control freeze-container capture-proc cut-network isolate-pod",
		`{"rule":"Terminal shell in container","priority":"Notice","output_fields":{"container.id":"0123456789ab"}}`:                "label-visited-pod label-pod",
	} {
		var got string
		for _, r := range set.Match(read(t, line)) {
			got += r.Name
			for _, a := range r.Actions {
				got += " " + a.Responder
			}
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}

// What rules.yaml offers in comments must be right as well.
func TestShippedExample(t *testing.T) {
	src, err := os.ReadFile(shippedFile)
	if err != nil {
		t.Fatal(err)
	}
	_, example, ok := strings.Cut(string(src), "#  - name: tell-the-team")
	if !ok {
		t.Fatal("there is no example")
	}
	example = "rules:\n#  - name: tell-the-team" + example
	if _, err := rules.Parse("rules.yaml", []byte(strings.ReplaceAll(example, "\n#", "\n")), registry()); err != nil {
		t.Fatal(err)
	}
}

func corpus(t testing.TB, file string) string {
	t.Helper()
	dir := os.Getenv("STOOP_CORPUS")
	if dir == "" {
		t.Skip("STOOP_CORPUS does not say where the recorded alerts are")
	}
	return filepath.Join(dir, file)
}

// Each of Falco's stable and incubating rules is answered, or a comment says
// why not; and no name is answered that Falco does not have.
func TestShippedRulesGoThroughFalcos(t *testing.T) {
	b, err := os.ReadFile(corpus(t, "falco-rules.json"))
	if err != nil {
		t.Fatal(err)
	}
	var falco []struct {
		Name, Maturity, Priority string
		Tags                     []string
	}
	if err := json.Unmarshal(b, &falco); err != nil {
		t.Fatal(err)
	}
	src, err := os.ReadFile(shippedFile)
	if err != nil {
		t.Fatal(err)
	}
	mentioned := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^ *(?:#  +|- )([A-Z].*)$`).FindAllStringSubmatch(string(src), -1) {
		mentioned[m[1]] = true
	}
	set := shipped(t)
	names := map[string]bool{}
	n := 0
	for _, f := range falco {
		names[f.Name] = true
		if f.Maturity != "stable" && f.Maturity != "incubating" {
			continue
		}
		n++
		if !mentioned[f.Name] {
			t.Errorf("%s (%s) is not mentioned", f.Name, f.Maturity)
		}
		p, err := alert.ParsePriority(f.Priority)
		if err != nil {
			t.Fatal(err)
		}
		a := &alert.Alert{Rule: f.Name, Priority: p, Source: alert.SourceSyscall, Tags: f.Tags}
		noAnswer := strings.Contains(string(src[strings.Index(string(src), "no answer"):]), "#   "+f.Name+"\n")
		if matched := set.Match(a); (len(matched) == 0) != noAnswer || len(matched) > 1 {
			t.Errorf("%s: %d rules match, and it stands among those without an answer: %v", f.Name, len(matched), noAnswer)
		}
	}
	if n < 50 {
		t.Errorf("only %d rules", n)
	}
	for name := range mentioned {
		if !names[name] {
			t.Errorf("Falco has no rule %q", name)
		}
	}
}

// Every recorded alert can be matched and explained.
func TestShippedRulesOnRecordedAlerts(t *testing.T) {
	f, err := os.Open(corpus(t, "alerts-json.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	set := shipped(t)
	matched, all := 0, 0
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		a, err := alert.Parse(lines.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		all++
		got, why := set.Explain(a)
		if (len(got) > 0) != (why == "") || !slices.Equal(got, set.Match(a)) {
			t.Errorf("%s: %d rules match, and yet %q", a.Rule, len(got), why)
		}
		if len(got) > 0 {
			matched++
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	if matched == 0 || matched == all {
		t.Errorf("%d of %d match", matched, all)
	}
	t.Logf("%d of %d recorded alerts match", matched, all)
}
