package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"stoop/e2e/figures"
)

// row is one figure.
type row struct {
	what, stoop, bare, ratio, aim string
	held                          bool
}

func (b *bench) add(r row) {
	b.rows = append(b.rows, r)
	b.Logf("%s: stoop %s, bare %s, %s; aim: %s; held: %s", r.what, r.stoop, r.bare, r.ratio, r.aim, yes(r.held))
}

func (b *bench) note(format string, args ...any) {
	b.notes = append(b.notes, fmt.Sprintf(format, args...))
	b.Logf(format, args...)
}

func yes(held bool) string {
	if held {
		return "yes"
	}
	return "**no**"
}

const (
	beginMark = "<!-- bench: begin; everything up to the end mark is written by e2e/cmd/bench -->"
	endMark   = "<!-- bench: end -->"
)

// report is the part of docs/performance.md that the bench writes.
func (b *bench) report() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured %s on %s, with `%s`.\n\n", time.Now().UTC().Format("2006-01-02"), figures.Machine(), strings.Join(append([]string{"go run ./cmd/bench"}, os.Args[1:]...), " "))
	s.WriteString("| what | stoop | bare | stoop over bare | aim | held |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, r := range b.rows {
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s | %s |\n", r.what, r.stoop, r.bare, r.ratio, r.aim, yes(r.held))
	}
	if len(b.notes) > 0 {
		s.WriteString("\n")
		for _, n := range b.notes {
			fmt.Fprintf(&s, "- %s\n", n)
		}
	}
	return s.String()
}

// more is a difference as a person says it.
func more(d time.Duration) string {
	if d < 0 {
		return figures.MS(-d) + " less"
	}
	return figures.MS(d) + " more"
}

func mib(bytes int64) string   { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
func over(a, b float64) string { return fmt.Sprintf("%.2f×", a/b) }
