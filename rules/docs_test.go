package rules_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"stoop/rules"
)

// Whatever docs/rules.md shows as rules is right, or wrong in just the way that
// the text after it says.
func TestDocumentation(t *testing.T) {
	src, err := os.ReadFile("../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```(yaml|text)\n(.*?)^```").FindAllStringSubmatch(string(src), -1)
	n := 0
	for i, b := range blocks {
		if b[1] != "yaml" || !strings.Contains(b[2], "rules:") {
			continue
		}
		if strings.HasPrefix(b[2], "# rules.yaml") {
			continue // cli holds these against the responders that there are
		}
		n++
		set, err := rules.Parse("rules.yaml", []byte(b[2]), catalog())
		switch {
		case strings.HasPrefix(b[2], "# broken"):
			if err == nil || err.Error()+"\n" != blocks[i+1][2] {
				t.Errorf("the error is\n%v\nand the text says\n%s", err, blocks[i+1][2])
			}
		case err != nil:
			t.Errorf("%v\nin\n%s", err, b[2])
		case len(set.Warnings) > 0:
			t.Errorf("%v\nin\n%s", rules.Problems(set.Warnings).Error(), b[2])
		}
	}
	if n < 5 {
		t.Errorf("only %d examples", n)
	}
}
