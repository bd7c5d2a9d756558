package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"stoop/cli"
)

// Every command that people see has a page, which groff has no complaint about,
// and a completion.
func TestManual(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manual")
	if err := write(dir); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	groff, _ := exec.LookPath("groff")
	pages := 0
	for _, c := range append(cli.Commands().Commands(), cli.Commands()) {
		if c.Hidden {
			continue
		}
		pages++
		name := pageName(c) + ".1"
		text := read(name)
		for _, want := range []string{".SH NAME\n", ".SH SYNOPSIS\n", ".SH DESCRIPTION\n", ".SH EXAMPLES\n", ".SH SEE ALSO\n"} {
			if strings.Count(text, want) != 1 {
				t.Errorf("%s has not one %q", name, want)
			}
		}
		if groff == "" {
			continue
		}
		out, err := exec.Command(groff, "-man", "-Tutf8", "-ww", "-z", filepath.Join(dir, name)).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
	if pages < 15 {
		t.Errorf("only %d pages", pages)
	}
	if run := read("stoop-run.1"); !strings.Contains(run, `\fB\-\-pipe\fR \fIPATH\fR`) || strings.Contains(read("stoop.1"), "stoop\\-child") {
		t.Errorf("stoop-run.1, or the commands in stoop.1:\n%s", run)
	}
	for shell, want := range map[string]string{"bash": "__start_stoop", "zsh": "#compdef stoop", "fish": "complete -c stoop"} {
		if !strings.Contains(read("stoop."+shell), want) {
			t.Errorf("the completion for %s lacks %q", shell, want)
		}
	}
}

// A line of help that begins like a request of roff's is text all the same.
func TestRoff(t *testing.T) {
	for in, want := range map[string]string{
		".hidden --flag": `\&.hidden \-\-flag`,
		"'quoted'":       `\&'quoted'`,
		`a\nb`:           `a\enb`,
	} {
		if got := roff(in); got != want {
			t.Errorf("roff(%q) = %q, want %q", in, got, want)
		}
	}
}
