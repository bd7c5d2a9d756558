// Package doctor looks at everything that an alert passes on its way, from Falco to
// the act, and says what is there and what is missing, each with what to do. It reads
// and asks; it changes nothing, opens no FIFO, and starts no program. What it finds
// in files and of processes, others wrote: whoever prints it escapes it.
package doctor

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"stoop/node"
	"stoop/responders"
)

// Status is what a finding comes to.
type Status string

const (
	OK      Status = "ok"
	Warning Status = "warning" // it works, and something will not as one would think
	Missing Status = "missing" // something is needed, and not there
	Unknown Status = "unknown" // it can't be seen from here
)

// Finding is one thing that a check found.
type Finding struct {
	Check  string `json:"check"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	Do     string `json:"do,omitempty"` // what to do about it
}

// Check looks at one thing.
type Check struct {
	Name   string
	Doc    string        // what it looks at, for the documentation
	Within time.Duration // its deadline
	look   func(context.Context, *Examination) []Finding
}

// Checks are all there are, in the order of an alert's way.
func Checks() []Check {
	const disk, net = 5 * time.Second, 15 * time.Second
	return []Check{
		{"stoop", "whether one runs on the data folder, whether it is ready, its mode, its rules, its last alert", disk, lookStoop},
		{"rules", "whether the rules can be read, and what is doubtful about them", disk, lookRules},
		{"source", "where alerts come in: the FIFO, who writes, reads and holds it; or the file", disk, lookSource},
		{"falco", "Falco's configuration as Falco puts it together, and the running Falco's name for this node", disk, lookFalco},
		{"data", "the data folder, its owner and mode, its file system and free space", disk, lookData},
		{"api", "whether the API server answers, as whom, and how long it takes", net, lookAPI},
		{"permissions", "each permission that the rules need, asked for by SelfSubjectAccessReview", net, lookPermissions},
		{"network", "what the cluster's network plugin does with policies", net, lookNetwork},
		{"node", "what the rules' responders need of this machine", disk, lookNode},
		{"clock", "this machine's clock against the API server's and Falco's", net, lookClock},
		{"versions", "stoop, Falco, the kernel, systemd, containerd", disk, lookVersions},
	}
}

// Names are those of checks.
func Names(checks []Check) []string {
	var names []string
	for _, c := range checks {
		names = append(names, c.Name)
	}
	return names
}

// Source is where the configuration has alerts come from.
type Source struct {
	Pipe, File, HTTP string   // paths, host:port
	HTTPFiles        []string // that its listener needs
	Stdin            bool
}

// Running is what a running stoop says of itself.
type Running struct {
	Version string `json:"version"`
	Node    string `json:"node"`
	Mode    string `json:"mode"`
	Rules   string `json:"rules"` // their hash
	Paused  bool   `json:"paused,omitempty"`
	// The whole cluster's pause is not lifted on a node: how it is.
	Lift      string     `json:"lift,omitempty"`
	Unseen    string     `json:"unseen,omitempty"`   // why it can't be seen whether the cluster is paused
	NotReady  string     `json:"notReady,omitempty"` // why
	LastAlert *LastAlert `json:"lastAlert,omitempty"`
}

// LastAlert is the alert that a running stoop stored last.
type LastAlert struct {
	Rule     string    `json:"rule"`
	Time     time.Time `json:"time"` // as Falco wrote it
	Received time.Time `json:"received"`
	Hostname string    `json:"hostname,omitempty"`
	Text     bool      `json:"text,omitempty"` // plain text, not JSON
	Origin   string    `json:"origin"`
}

// Config is what is examined.
type Config struct {
	Version string // of this program

	Node     string
	Aliases  []string
	MaxAge   time.Duration // guard.maxAge
	Source   Source
	Data     string
	KeepMost int64 // bytes that stoop keeps in the data folder at most

	RulesFile string
	RulesErr  error
	RulesHash string
	Doubts    []string // what is doubtful about the rules
	Entries   []responders.Entry
	Steps     []responders.Planned // that the rules may cause

	// Kube is the API server; nil without a cluster, or with KubeErr.
	Kube      *responders.Kube
	KubeErr   error
	Server    string
	Dates     *Dates // of its answers
	Namespace string // stoop's own
	// AuditEvents says that it answers those, and so needs other permissions.
	AuditEvents bool

	Host *node.Node
	// Running asks the stoop that runs on the data folder; the error is
	// [broker.ErrNotRunning] when none does.
	Running func(context.Context) (Running, error)

	Falco        string // a configuration file of Falco's; "": found
	FalcoVersion string // "": found

	proc string // /proc; tests have others
}

// Examination is one look at everything: what several checks need is looked up
// once.
type Examination struct {
	Config
	processes func() *processes
	falco     func() *falco
	running   func() (Running, error)
	identity  func() (responders.Identity, error)
}

// sharedWithin bounds what several checks wait for.
const sharedWithin = 4 * time.Second

// Examine makes the checks, all at once, and returns what they found in their order.
// One that does not come to its end in time is reported as unknown, and left to end
// with the process: a look at a file system that hangs can't be called off.
func Examine(ctx context.Context, c Config, checks []Check) []Finding {
	if c.proc == "" {
		c.proc = "/proc"
	}
	e := &Examination{Config: c}
	shared := func() (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, sharedWithin) }
	e.processes = sync.OnceValue(func() *processes {
		ctx, cancel := shared()
		defer cancel()
		return e.lookAround(ctx)
	})
	e.falco = sync.OnceValue(func() *falco {
		ctx, cancel := shared()
		defer cancel()
		return e.findFalco(ctx)
	})
	e.running = sync.OnceValues(func() (Running, error) {
		ctx, cancel := shared()
		defer cancel()
		return e.Running(ctx)
	})
	e.identity = sync.OnceValues(func() (responders.Identity, error) {
		ctx, cancel := shared()
		defer cancel()
		return e.Kube.WhoAmI(ctx)
	})
	found := make([][]Finding, len(checks))
	var all sync.WaitGroup
	for i, check := range checks {
		all.Go(func() { found[i] = check.within(ctx, e) })
	}
	all.Wait()
	return slices.Concat(found...)
}

// within is what the check finds in its time.
func (c Check) within(ctx context.Context, e *Examination) []Finding {
	ctx, cancel := context.WithTimeout(ctx, c.Within)
	defer cancel()
	got := make(chan []Finding, 1)
	go func() { got <- c.look(ctx, e) }()
	// A little longer: what heeds the deadline says more than that it passed.
	late := time.NewTimer(c.Within + time.Second)
	defer late.Stop()
	var found []Finding
	select {
	case found = <-got:
	case <-late.C:
		found = []Finding{unknown("something that hangs may be in the way; try again", "this took longer than %s", c.Within)}
	}
	for i := range found {
		found[i].Check = c.Name
	}
	return found
}

func ok(format string, args ...any) Finding {
	return Finding{Status: OK, Found: fmt.Sprintf(format, args...)}
}

func warning(do, format string, args ...any) Finding {
	return Finding{Status: Warning, Found: fmt.Sprintf(format, args...), Do: do}
}

func missing(do, format string, args ...any) Finding {
	return Finding{Status: Missing, Found: fmt.Sprintf(format, args...), Do: do}
}

func unknown(do, format string, args ...any) Finding {
	return Finding{Status: Unknown, Found: fmt.Sprintf(format, args...), Do: do}
}

// uses are the responders of the rules for which f holds, by name, each once.
func (e *Examination) uses(f func(*responders.Entry) bool) []string {
	var names []string
	for _, s := range e.Steps {
		i := slices.IndexFunc(e.Entries, func(en responders.Entry) bool { return en.Name == s.Responder })
		if i >= 0 && f(&e.Entries[i]) && !slices.Contains(names, s.Responder) {
			names = append(names, s.Responder)
		}
	}
	slices.Sort(names)
	return names
}
