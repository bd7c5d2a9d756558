package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"stoop/e2e/figures"
)

// row is one figure.
type row struct {
	what, how string
	times     []time.Duration
	aim       *aim // nil: none was set
}

// aim is how long something may take.
type aim struct{ p50, most time.Duration }

// fast is the aim of what stops a suspect.
var fast = &aim{3 * time.Millisecond, 10 * time.Millisecond}

func (m *measuring) add(r row) {
	m.rows = append(m.rows, r)
	m.Logf("%s, by %s: p50 %s, at most %s of %d: %v", r.what, r.how, figures.MS(r.p50()), figures.MS(r.most()), len(r.times), r.times)
}

func (m *measuring) note(format string, args ...any) {
	m.notes = append(m.notes, fmt.Sprintf(format, args...))
}

func (r row) p50() time.Duration  { return figures.Quantile(r.times, .5) }
func (r row) most() time.Duration { return figures.Quantile(r.times, 1) }

func (r row) held() string {
	switch {
	case r.aim == nil:
		return "—"
	case r.p50() <= r.aim.p50 && r.most() <= r.aim.most:
		return "yes"
	}
	return "**no**"
}

// report is the part of docs/performance.md that this command writes.
func (m *measuring) report() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured %s on %s, with `%s`.\n\n", time.Now().UTC().Format("2006-01-02"), figures.Machine(), m.Command)
	fmt.Fprintf(&s, "Aims: p50 at most %s, none of them more than %s.\n\n", figures.MS(fast.p50), figures.MS(fast.most))
	s.WriteString("| from the alert's write to the FIFO, or the DELETE, until … | by | p50 | at most | samples | aim held |\n| --- | --- | ---: | ---: | ---: | --- |\n")
	for _, r := range m.rows {
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %d | %s |\n", r.what, r.how, figures.MS(r.p50()), figures.MS(r.most()), len(r.times), r.held())
	}
	s.WriteString("\n")
	fmt.Fprintf(&s, "- The suspect is a reverse shell: it ignores SIGTERM, its program was put on the disk and deleted again, and the attacker talks to it every %s over the one open connection. Dead: by a pidfd. Silent: nothing is answered any more, from the last answer or the first question without one, whichever was later.\n", beatEvery)
	if !m.Bare {
		fmt.Fprintf(&s, "- Frozen: the kernel says so of the container's cgroup, looked at every %s; each time the suspect stood still, and went on after `stoop undo`. Cut: shell and pings alike; each time nothing more came out or in while the suspect's processes went on, and the same connection came back after `stoop undo`. In the chain, where all is frozen, the network is watched by pings alone, which the pod's kernel answers.\n", lookEvery)
		m.note("%s", m.account())
	}
	for _, n := range m.notes {
		fmt.Fprintf(&s, "- %s\n", n)
	}
	return s.String()
}

// account is what stoop says itself, of which the outside knows nothing.
func (m *measuring) account() string {
	var parts []string
	for _, step := range slices.Sorted(maps.Keys(m.took)) {
		t := m.took[step]
		parts = append(parts, fmt.Sprintf("%s %s and %s (%d)", step, figures.MS(figures.Quantile(t, .5)), figures.MS(figures.Quantile(t, 1)), len(t)))
	}
	return "By stoop's own account, from the alert's arrival until the step was done, p50 and most: " + strings.Join(parts, ", ") + "."
}
