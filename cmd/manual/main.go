// Command manual writes what a package holds beside the program: manual pages
// and completions for shells, both from the commands themselves.
//
//	go run ./cmd/manual DIR
//
// It is no part of stoop, which is the smaller for it.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"stoop/cli"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: manual DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "manual:", err)
		os.Exit(1)
	}
}

// write writes DIR/stoop*.1, and DIR/stoop.bash, stoop.zsh and stoop.fish.
func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root := cli.Commands()
	pages := []*cobra.Command{root}
	for _, c := range root.Commands() {
		if !c.Hidden {
			pages = append(pages, c)
		}
	}
	for _, c := range pages {
		if err := os.WriteFile(filepath.Join(dir, pageName(c)+".1"), []byte(page(c, pages)), 0o644); err != nil {
			return err
		}
	}
	for shell, generate := range map[string]func(path string) error{
		"bash": func(path string) error { return root.GenBashCompletionFileV2(path, true) },
		"zsh":  root.GenZshCompletionFile,
		"fish": func(path string) error { return root.GenFishCompletionFile(path, true) },
	} {
		if err := generate(filepath.Join(dir, "stoop."+shell)); err != nil {
			return err
		}
	}
	return nil
}

// pageName is the name of a command's page: stoop-run.
func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// page is a command's manual page, in man(7)'s macros.
func page(c *cobra.Command, all []*cobra.Command) string {
	var b strings.Builder
	name := pageName(c)
	fmt.Fprintf(&b, ".TH %s 1 \"\" stoop \"stoop's manual\"\n", strings.ToUpper(roff(name)))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(lowerFirst(c.Short)))
	b.WriteString(".SH SYNOPSIS\n")
	use := c.UseLine()
	if !c.HasParent() {
		use = "stoop COMMAND [flags]"
	}
	fmt.Fprintf(&b, ".nf\n%s\n.fi\n", roff(use))
	b.WriteString(".SH DESCRIPTION\n")
	prose(&b, c.Long)
	if !c.HasParent() {
		b.WriteString(".SH COMMANDS\n")
		for _, other := range all[1:] {
			fmt.Fprintf(&b, ".TP\n.BR %s (1)\n%s\n", roff(pageName(other)), roff(other.Short))
		}
	}
	if c.LocalFlags().HasAvailableFlags() {
		b.WriteString(".SH OPTIONS\n")
		c.LocalFlags().VisitAll(func(f *pflag.Flag) { option(&b, f) })
	}
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(c.Example))
	}
	if !c.HasParent() {
		b.WriteString(".SH EXIT STATUS\n0: fine. 1: the thing asked about is wrong, or what was asked can't be done. 2: wrong usage.\n")
		b.WriteString(".SH FILES\n")
		for _, f := range [][2]string{
			{"/etc/stoop/stoop.yaml", "the configuration"},
			{"/etc/stoop/rules.yaml", "the rules"},
			{"/run/stoop/falco.pipe", "the FIFO that Falco writes to"},
			{"/var/lib/stoop", "alerts, steps, outcomes, evidence, the local socket"},
			{"/usr/share/doc/stoop", "what is more than a page"},
		} {
			fmt.Fprintf(&b, ".TP\n.I %s\n%s\n", roff(f[0]), roff(f[1]))
		}
	}
	b.WriteString(".SH SEE ALSO\n")
	var also []string
	for _, other := range all {
		if other != c {
			also = append(also, fmt.Sprintf(".BR %s (1)", roff(pageName(other))))
		}
	}
	b.WriteString(strings.Join(also, " ,\n") + "\n")
	return b.String()
}

func option(b *strings.Builder, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	what, usage := pflag.UnquoteUsage(f)
	flag := `\fB` + roff("--"+f.Name) + `\fR`
	if f.Shorthand != "" {
		flag = `\fB` + roff("-"+f.Shorthand) + `\fR, ` + flag
	}
	if what != "" {
		flag += ` \fI` + roff(what) + `\fR`
	}
	fmt.Fprintf(b, ".TP\n%s\n%s", flag, roff(usage))
	if d := f.DefValue; d != "" && d != "false" && d != "0" && d != "[]" && !strings.Contains(usage, "default") {
		b.WriteString(roff(" (default " + d + ")"))
	}
	b.WriteString("\n")
}

// prose writes paragraphs; lines that are indented stay as they are.
func prose(b *strings.Builder, text string) {
	for i, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		if kept := strings.HasPrefix(paragraph, " ") || strings.Contains(paragraph, "\n "); kept {
			fmt.Fprintf(b, ".nf\n%s\n.fi\n", roff(paragraph))
		} else {
			b.WriteString(roff(paragraph) + "\n")
		}
	}
}

// roff is text that roff takes for nothing else.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// lowerFirst is a sentence as it stands behind a name and a dash.
func lowerFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}
