package convert_test

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"stoop/convert"
	"stoop/responders"
	"stoop/rules"
)

var update = flag.Bool("update", false, "write what comes of the files in testdata again")

func catalog(t testing.TB) rules.Catalog {
	t.Helper()
	c := rules.Catalog{}
	for _, e := range responders.All() {
		c[e.Name] = e.Params
	}
	return c
}

// Beside NAME.yaml in testdata stands what comes of it: NAME.out, the rules or what
// is refused. NAME-2.yaml is a file that overrides it.
func TestTalon(t *testing.T) {
	names, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		if strings.HasSuffix(name, "-2.yaml") {
			continue
		}
		n++
		t.Run(filepath.Base(name), func(t *testing.T) {
			files := []convert.File{file(t, name)}
			if second := strings.TrimSuffix(name, ".yaml") + "-2.yaml"; exists(second) {
				files = append(files, file(t, second))
			}
			got, err := convert.Talon(files, catalog(t))
			var refused rules.Problems
			switch {
			case errors.As(err, &refused):
				got = []byte(err.Error() + "\n")
			case err != nil:
				t.Fatal(err)
			}
			out := strings.TrimSuffix(name, ".yaml") + ".out"
			if *update {
				if err := os.WriteFile(out, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("what comes of it is\n%s\nand not, as in %s,\n%s", got, out, want)
			}
		})
	}
	if n == 0 {
		t.Error("there is nothing to convert in testdata")
	}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func file(t testing.TB, name string) convert.File {
	t.Helper()
	src, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return convert.File{Name: filepath.Base(name), Src: src}
}
