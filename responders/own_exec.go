package responders

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"stoop/alert"
)

// ownExec is one command that stoop has had executed in a container. The container
// runtime starts it, so that nothing of it leads back to stoop's own processes.
//
// It is known by its container and its command line, for as long as it was executed.
// Whoever is in that container can start a process with the same command line
// meanwhile. So the command line has to be the very same, the process has to have
// begun while the command was executed, and where its parent is still to be seen, that
// must not be in the container: what the runtime starts has its parent outside.
type ownExec struct {
	container  string
	lines      []string // of the command, as Falco writes proc.cmdline
	start, end time.Time
}

// Executing remembers from now on that a command is executed in a container. commands
// are what its process is seen as, one after the other: env, for one, is replaced by
// what it runs. The function that it returns is to be called when it has ended.
func (o *OwnProcesses) Executing(container string, commands ...[]string) (ended func()) {
	if o == nil {
		return func() {}
	}
	e := &ownExec{container: container, start: time.Now().Add(-ownSlack)}
	for _, c := range commands {
		e.lines = append(e.lines, commandLine(c))
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	kept := o.execs[:0]
	for i, e := range o.execs {
		if !e.end.IsZero() && (time.Since(e.end) > ownFor || len(o.execs)-i > ownMost) {
			continue
		}
		kept = append(kept, e)
	}
	clear(o.execs[len(kept):])
	o.execs = append(kept, e)
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if e.end.IsZero() {
			e.end = time.Now()
		}
	}
}

// commandLine is a command as Falco writes it: the name that the kernel keeps of the
// program, of at most 15 bytes, and the arguments.
func commandLine(command []string) string {
	const most = 15
	name := filepath.Base(command[0])
	name = name[:min(len(name), most)]
	return strings.Join(append([]string{name}, command[1:]...), " ")
}

// executed reports whether an alert is about a command that stoop had executed, or
// about a process that such a command started.
func (o *OwnProcesses) executed(a *alert.Alert, t alert.Target) bool {
	if t.Container == "" {
		return false
	}
	o.mu.Lock()
	var execs []ownExec
	for _, e := range o.execs {
		if e.at(a.Time) && sameContainer(e.container, t.Container) && (t.PIDStart == 0 || e.at(time.Unix(0, t.PIDStart))) {
			execs = append(execs, *e)
		}
	}
	o.mu.Unlock()
	for _, e := range execs {
		for depth := range ownDepth {
			line, there := commandLineOf(a, depth)
			if !there {
				break
			}
			for _, own := range e.lines {
				if line == own && !o.startedInside(a, depth, e.container) {
					return true
				}
			}
		}
	}
	return false
}

func (e *ownExec) at(t time.Time) bool {
	return !t.Before(e.start) && (e.end.IsZero() || !t.After(e.end.Add(ownSlack)))
}

// commandLineOf is the command line of the alert's process, or of one of its parents.
func commandLineOf(a *alert.Alert, depth int) (string, bool) {
	switch depth {
	case 0:
		return a.Field("proc.cmdline")
	case 1:
		if line, ok := a.Field("proc.pcmdline"); ok {
			return line, true
		}
	}
	return a.Field(fmt.Sprintf("proc.acmdline[%d]", depth))
}

// startedInside reports whether a process, the alert's or one of its parents, was
// started by one of the container. A parent that is gone, or was not named, says
// nothing: the runtime's own is gone quickly.
func (o *OwnProcesses) startedInside(a *alert.Alert, depth int, container string) bool {
	text, ok := a.Field(fmt.Sprintf("proc.apid[%d]", depth+1))
	if !ok && depth == 0 {
		text, _ = a.Field("proc.ppid")
	}
	pid, err := strconv.ParseInt(text, 10, 64)
	if err != nil || pid <= 1 {
		return false
	}
	// Where stoop does not see the host's numbers, it sees none of that container's
	// processes either, whatever the number means here.
	root := o.proc()
	b, err := os.ReadFile(filepath.Join(root.dir(pid), "cgroup"))
	if err != nil || !strings.Contains(string(b), container) {
		return false
	}
	// Not one that has the number since.
	at, ok := root.started(root.dir(pid))
	return ok && !at.After(a.Time.Add(ownSlack))
}
