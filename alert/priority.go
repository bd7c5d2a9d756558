package alert

import (
	"fmt"
	"strings"
)

// Priority is how urgent Falco's rule says an alert is. The lower, the more
// urgent, as in syslog: compare with [Priority.AtLeast].
type Priority uint8

// Falco's priorities, the most urgent first.
const (
	Emergency Priority = iota
	Alerting           // Falco's "Alert"
	Critical
	Error
	Warning
	Notice
	Informational
	Debug
)

// Priorities are all of them, the most urgent first.
func Priorities() []Priority {
	return []Priority{Emergency, Alerting, Critical, Error, Warning, Notice, Informational, Debug}
}

func (p Priority) lower() string {
	switch p {
	case Emergency:
		return "emergency"
	case Alerting:
		return "alert"
	case Critical:
		return "critical"
	case Error:
		return "error"
	case Warning:
		return "warning"
	case Notice:
		return "notice"
	case Informational:
		return "informational"
	case Debug:
		return "debug"
	}
	return "unknown"
}

// String is the priority in lower case, as it stands in subjects.
func (p Priority) String() string { return p.lower() }

// AtLeast reports whether p is as urgent as q or more.
func (p Priority) AtLeast(q Priority) bool { return p <= q }

// Urgent reports whether p is Critical or above. Urgent alerts are stored and
// routed apart from the rest, so that no flood gets in their way.
func (p Priority) Urgent() bool { return p.AtLeast(Critical) }

// ParsePriority reads a priority in any case; "Info" is Informational.
func ParsePriority(s string) (Priority, error) {
	for p := Emergency; p <= Debug; p++ {
		if strings.EqualFold(s, p.lower()) {
			return p, nil
		}
	}
	if strings.EqualFold(s, "info") {
		return Informational, nil
	}
	return Debug, fmt.Errorf("unknown priority %q", cut(s, 32))
}

// MarshalText writes the priority in lower case.
func (p Priority) MarshalText() ([]byte, error) { return []byte(p.lower()), nil }

// UnmarshalText reads what [ParsePriority] reads.
func (p *Priority) UnmarshalText(b []byte) error {
	q, err := ParsePriority(string(b))
	if err != nil {
		return err
	}
	*p = q
	return nil
}
