// Package figures is what the programs that measure share: quantiles, how a
// figure is written, what machine it is from, and the part of a document that
// they write again with every run.
package figures

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

// Quantile is the q-th of the durations, by the nearest rank.
func Quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	rank := int(q*float64(len(sorted))+0.9999) - 1
	return sorted[min(max(rank, 0), len(sorted)-1)]
}

// MS is a duration in milliseconds.
func MS(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }

// Machine describes this one as far as it matters.
func Machine() string {
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

// Replace replaces what stands between two marks in a file, or appends it with
// them.
func Replace(path, begin, end, text string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read what to write into: %w", err)
	}
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if ok != ok2 {
		return fmt.Errorf("%s has only one of the marks %s and %s", path, begin, end)
	}
	if !ok {
		before, after = strings.TrimRight(string(old), "\n")+"\n\n", "\n"
	}
	content := before + begin + "\n\n" + text + "\n" + end + after
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write the figures: %w", err)
	}
	return nil
}
