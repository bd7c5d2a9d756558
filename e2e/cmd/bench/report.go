package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
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
	fmt.Fprintf(&s, "Measured %s on %s, with `%s`.\n\n", time.Now().UTC().Format("2006-01-02"), machine(), strings.Join(append([]string{"go run ./cmd/bench"}, os.Args[1:]...), " "))
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

// machine describes this one as far as it matters.
func machine() string {
	model := "an unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				model = strings.TrimSpace(strings.TrimLeft(strings.TrimSpace(name), ":"))
				break
			}
		}
	}
	kernel := "unknown"
	var u syscall.Utsname
	if syscall.Uname(&u) == nil {
		var name []byte
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			name = append(name, byte(c))
		}
		kernel = string(name)
	}
	return fmt.Sprintf("%s, %d cores, Linux %s, %s", model, runtime.NumCPU(), kernel, goVersion())
}

func goVersion() string {
	out, err := exec.Command("go", "env", "GOVERSION").Output()
	if err != nil {
		return runtime.Version()
	}
	return strings.TrimSpace(string(out))
}

// replacePart replaces the part between the marks, or appends it.
func replacePart(path, text string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read what to write into: %w", err)
	}
	before, rest, ok := strings.Cut(string(old), beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if ok != ok2 {
		return fmt.Errorf("%s has only one of the bench's two marks", path)
	}
	if !ok {
		before, after = strings.TrimRight(string(old), "\n")+"\n\n", "\n"
	}
	content := before + beginMark + "\n\n" + text + "\n" + endMark + after
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write the figures: %w", err)
	}
	return nil
}

// quantile is the q-th of the durations, by the nearest rank.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	rank := int(q*float64(len(sorted))+0.9999) - 1
	return sorted[min(max(rank, 0), len(sorted)-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }

// more is a difference as a person says it.
func more(d time.Duration) string {
	if d < 0 {
		return ms(-d) + " less"
	}
	return ms(d) + " more"
}

func mib(bytes int64) string   { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
func over(a, b float64) string { return fmt.Sprintf("%.2f×", a/b) }
