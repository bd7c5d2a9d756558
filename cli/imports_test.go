package cli

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Imports point one way: an alert's. What is not listed here may import
// nothing of stoop's own.
func TestImportsPointOneWay(t *testing.T) {
	allowed := map[string][]string{
		"alert":                  {},
		"param":                  {},
		"failpoint":              {},
		"web":                    {},
		"node":                   {},
		"node/nodetest":          {},
		"evidence":               {},
		"evidence/s3":            {"evidence"},
		"child":                  {},
		"broker":                 {"alert", "failpoint"},
		"broker/brokertest":      {"broker"},
		"pipe":                   {"alert", "broker", "pipe/namedpipe"},
		"pipe/namedpipe":         {},
		"rules":                  {"alert", "broker", "param"},
		"convert":                {"alert", "broker", "param", "rules"},
		"responders":             {"alert", "broker", "child", "evidence", "failpoint", "node", "param"},
		"responders/conformance": {"alert", "broker", "broker/brokertest", "evidence", "node", "responders"},
		"doctor":                 {"broker", "node", "pipe/namedpipe", "responders"},
		"router":                 {"alert", "broker", "rules"},
		"cli":                    {"alert", "broker", "child", "convert", "doctor", "evidence", "evidence/s3", "failpoint", "node", "param", "pipe", "pipe/namedpipe", "responders", "router", "rules", "web"},
		"examples/functions":     {}, // programs of somebody else's, as it were
		"examples/subscriber":    {},
		".":                      {"cli"},
		"cmd/hold":               {"pipe/namedpipe"},
		"cmd/manual":             {"cli"},
	}
	seen := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != ".." && (name == "e2e" || name == "tools" || name == "testdata" || strings.HasPrefix(name, ".")) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		pkg, err := filepath.Rel("..", filepath.Dir(path))
		if err != nil {
			return err
		}
		may, ok := allowed[pkg]
		if !ok {
			t.Errorf("package %s is in no list", pkg)
		}
		seen[pkg] = true
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if own, is := strings.CutPrefix(p, "stoop/"); is && !slices.Contains(may, own) {
				t.Errorf("%s imports %s", path, p)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range allowed {
		if !seen[pkg] {
			t.Errorf("there is no package %s", pkg)
		}
	}
}
