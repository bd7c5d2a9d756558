package rules_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"stoop/alert"
	"stoop/rules"
)

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, shippedFile) {
		src, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(src)
	}
	c := catalog()
	a, err := alert.Parse([]byte(shell))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		set, err := rules.Parse("f", src, c)
		if err == nil {
			if len(set.Rules) == 0 {
				t.Error("no rules and no error")
			}
			set.Explain(a)
			return
		}
		var ps rules.Problems
		if !errors.As(err, &ps) || len(ps) == 0 {
			t.Fatalf("%T %v", err, err)
		}
		lines := strings.Count(string(src), "\n") + 1
		for _, p := range ps {
			if p.Line < 1 || p.Line > lines || p.Column < 1 || p.Message == "" {
				t.Errorf("%d:%d of %d lines: %q", p.Line, p.Column, lines, p.Message)
			}
		}
		if strings.ContainsRune(err.Error(), '\x1b') {
			t.Error("a control character gets through to the terminal")
		}
	})
}
