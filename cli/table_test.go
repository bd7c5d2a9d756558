package cli

import (
	"strings"
	"testing"
)

// A table fits the terminal, and breaks no word that need not be broken.
func TestTableFitsTheTerminal(t *testing.T) {
	const path = "/var/lib/stoop/evidence/4f1c0e6f6a4de1d0a2b7"
	for _, tt := range []struct {
		name    string
		row     []string
		columns int
		want    string
	}{
		{"not wrapped", []string{"done", strings.Repeat("words ", 30) + "end"}, 0, "A     B\ndone  " + strings.Repeat("words ", 30) + "end\n"},
		{"under itself", []string{"done", "some words about what was done to it and why"}, 40, "A     B\ndone  some words about what was done to\n      it and why\n"},
		{"below, for a word", []string{"done  ----------", "kept in " + path}, 60, "A\n    B\ndone  ----------\n    kept in " + path + "\n"},
		{"below, for want of room", []string{"done  ----------", "some words about what was done"}, 40, "A\n    B\ndone  ----------\n    some words about what was done\n"},
		{"a word that fits nowhere", []string{"done", strings.Repeat("x", 50)}, 40, "A     B\ndone  " + strings.Repeat("x", 34) + "\n      " + strings.Repeat("x", 16) + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			tab := &table{head: []string{"A", "B"}}
			tab.add(tt.row...)
			tab.print(&out, tt.columns)

			if out.String() != tt.want {
				t.Errorf("got\n%s\nwant\n%s", out.String(), tt.want)
			}
		})
	}
}
