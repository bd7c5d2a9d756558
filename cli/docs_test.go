package cli

import (
	"bytes"
	"flag"
	"os"
	"strings"
	"testing"

	"stoop/param"
	"stoop/responders"
	"stoop/rules"
)

var update = flag.Bool("update", false, "write the generated documentation again")

const (
	tableBegin = "<!-- generated from the program: make docs -->\n"
	tableEnd   = "<!-- end of what is generated -->\n"
)

// docs/configuration.md holds every key with its real default, and its example
// is a configuration that stoop takes.
func TestDocsConfiguration(t *testing.T) {
	const path = "../docs/configuration.md"
	var b strings.Builder
	b.WriteString("| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
	configRows(&b, "", param.Describe(defaults()).Fields)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", path)
	}
	want := before + tableBegin + b.String() + tableEnd + after
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(data) {
		t.Errorf("%s is not what the program says: make docs", path)
	}
	n := 0
	for part := range strings.SplitSeq(want, "```yaml\n") {
		if n++; n == 1 {
			continue
		}
		example, _, _ := strings.Cut(part, "```")
		if _, err := rules.Settings("example", []byte(example), param.Describe(defaults())); err != nil {
			t.Errorf("an example of %s: %v", path, err)
		}
	}
	if n < 2 {
		t.Errorf("%s has no example", path)
	}
}

func configRows(b *strings.Builder, prefix string, fields []param.Field) {
	for _, f := range fields {
		if len(f.Fields) > 0 && f.Type == "mapping" {
			configRows(b, prefix+f.Name+".", f.Fields)
			continue
		}
		typ, def := f.Type, ""
		if len(f.OneOf) > 0 {
			typ = strings.Join(f.OneOf, ", ")
		}
		if f.Default != "" {
			def = "`" + f.Default + "`"
		}
		b.WriteString("| `" + prefix + f.Name + "` | " + typ + " | " + def + " | " + f.Doc + " |\n")
		if f.Type == "list of mapping" {
			configRows(b, prefix+f.Name+"[].", f.Fields)
		}
	}
}

// The rules that ship are good, warn of nothing, and act on nothing as they
// are.
func TestShippedRules(t *testing.T) {
	set, err := rules.Load("../rules.yaml", catalogOf(responders.All()))
	if err != nil {
		t.Fatal(err)
	}
	if len(set.Warnings) > 0 {
		t.Errorf("warnings: %v", set.Warnings)
	}
	for _, r := range set.Rules {
		if r.Mode != "audit" {
			t.Errorf("rule %s is in %s mode", r.Name, r.Mode)
		}
	}
	demo, err := os.ReadFile("../examples/demo-rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	demo = bytes.ReplaceAll(demo, []byte("@dir@"), []byte("/tmp"))
	if _, err := rules.Parse("demo-rules.yaml", demo, catalogOf(responders.All())); err != nil {
		t.Error(err)
	}
}

// Every command has a long help and an example, and they fit a terminal.
func TestDocsHelp(t *testing.T) {
	p := &program{stdin: os.Stdin, stdout: t.Output(), stderr: t.Output()}
	root := p.root()
	for _, c := range append(root.Commands(), root) {
		if c.Hidden {
			continue // stoop starts it, nobody else
		}
		if c.Short == "" || c.Long == "" || c.Example == "" {
			t.Errorf("stoop %s: the help lacks something", c.Name())
		}
		for _, text := range []string{c.Long, c.Example, c.UsageString()} {
			for line := range strings.Lines(text) {
				if n := len([]rune(strings.TrimRight(line, "\n"))); n > 80 {
					t.Errorf("stoop %s: a line of %d characters in the help: %s", c.Name(), n, line)
				}
			}
		}
	}
}
