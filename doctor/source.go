package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/pipe/namedpipe"
)

// lookSource looks at where alerts come in.
func lookSource(_ context.Context, e *Examination) []Finding {
	var out []Finding
	if e.Source.Pipe != "" {
		out = append(out, e.lookPipe()...)
	}
	if e.Source.File != "" {
		out = append(out, e.lookFile())
	}
	if e.Source.HTTP != "" {
		out = append(out, e.lookHTTP()...)
	}
	if e.Source.Stdin {
		out = append(out, ok("alerts come on standard input: they are lost, or stall Falco, while stoop restarts"))
	}
	return out
}

// lookPipe looks at the FIFO. It is never opened: to be its reader, if only for a
// moment, can make Falco lose its last one.
func (e *Examination) lookPipe() []Finding {
	path := e.Source.Pipe
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		what := "before Falco is started, which would make a regular file there"
		if f := e.falco(); f.process != nil {
			what = fmt.Sprintf("at once: %s is running, and makes a regular file there at its first alert", f.process)
		}
		return []Finding{missing(fmt.Sprintf("start `stoop hold %s` (or the unit that holds it) %s", path, what), "there is no FIFO %s", path)}
	}
	if err != nil {
		return []Finding{unknown("run this as root, or as stoop runs", "the FIFO can't be looked at: %v", err)}
	}
	if err := namedpipe.Check(path, info); err != nil {
		return []Finding{missing("stoop does not start before that", "%v", err)}
	}
	id, err := identify(path)
	if err != nil {
		return []Finding{unknown("", "the FIFO can't be looked at: %v", err)}
	}
	ps := e.processes()
	lock, lockErr := identify(filepath.Join(e.Data, "run.lock"))
	stoop := func(p *process) bool {
		return len(p.args) > 1 && p.args[1] == "run" ||
			lockErr == nil && slices.ContainsFunc(p.opens, func(o opened) bool { return o.file == lock })
	}
	var readers, holders, others, writers []*process
	for _, p := range ps.with(id, func(o opened) bool { return o.access() == unix.O_RDWR }) {
		if stoop(p) {
			readers = append(readers, p)
		} else {
			holders = append(holders, p)
		}
	}
	others = ps.with(id, func(o opened) bool { return o.access() == unix.O_RDONLY })
	writers = ps.with(id, func(o opened) bool { return o.access() == unix.O_WRONLY })

	said := []string{fmt.Sprintf("%s is a FIFO (%s, of user %d)", path, info.Mode().Perm(), owner(info))}
	for _, r := range []struct {
		what string
		who  []*process
	}{{"read by", readers}, {"held open by", holders}, {"written to by", writers}} {
		if len(r.who) > 0 {
			said = append(said, r.what+" "+listed(r.who))
		}
	}
	f := e.falco()
	if f.process != nil && !slices.Contains(writers, f.process) {
		said = append(said, fmt.Sprintf("not opened by %s, which does so at its first alert", f.process))
	}
	out := []Finding{ok("%s", strings.Join(said, "; "))}
	if !ps.seen() {
		out = append(out, unknown("run this as root, in a pod with hostPID", "who else has the FIFO open: %s", ps.why()))
	}
	if len(holders) == 0 {
		const do = "run `stoop hold` beside stoop, as a service of its own, or let systemd hold it (ListenFIFO=): docs/falco.md"
		const what = "nobody but stoop holds the FIFO open: when stoop restarts, Falco drops every later alert in silence"
		if ps.seen() {
			out = append(out, warning(do, what))
		}
	}
	if len(readers) > 1 {
		out = append(out, warning("end all but one", "%s read the FIFO: only one of them can", listed(readers)))
	}
	if len(others) > 0 {
		out = append(out, missing("end it: each alert goes to one reader only", "%s reads the FIFO and takes alerts away from stoop", listed(others)))
	}
	if f.process != nil {
		if f.process.pipeLink != "" {
			out = append(out, missing(fmt.Sprintf("kill -USR1 %d makes Falco open it anew", f.process.pid),
				"%s writes to another file than the FIFO that is at %s now (%s)", f.process, path, f.process.pipeLink))
		}
		if !writable(info, f.process) {
			out = append(out, missing(fmt.Sprintf("run both as the same user, or chown %d %s", f.process.uid, path),
				"%s runs as user %d, who may not write to the FIFO (%s, of user %d)", f.process, f.process.uid, info.Mode().Perm(), owner(info)))
		}
	}
	return out
}

// listed names some processes.
func listed(ps []*process) string {
	const most = 5
	var names []string
	for i, p := range ps {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(ps)-most))
			break
		}
		names = append(names, p.String())
	}
	return strings.Join(names, ", ")
}

func owner(info os.FileInfo) uint32 {
	if st, is := info.Sys().(*syscall.Stat_t); is {
		return st.Uid
	}
	return 0
}

// writable reports whether a process may open the FIFO for writing, by the user and
// the groups that it runs as.
func writable(info os.FileInfo, p *process) bool {
	st, is := info.Sys().(*syscall.Stat_t)
	switch mode := info.Mode().Perm(); {
	case !is, p.uid == 0:
		return true
	case p.uid == st.Uid:
		return mode&0o200 != 0
	case slices.Contains(p.groups, st.Gid):
		return mode&0o020 != 0
	default:
		return mode&0o002 != 0
	}
}

// lookHTTP looks at what the listener needs; whether it listens, stoop itself tells.
func (e *Examination) lookHTTP() []Finding {
	var out []Finding
	for _, path := range e.Source.HTTPFiles {
		if err := unix.Faccessat(unix.AT_FDCWD, path, unix.R_OK, unix.AT_EACCESS); err != nil {
			out = append(out, missing("make it, for stoop's user to read", "%s, of source.http, can't be read: %v", path, err))
		}
	}
	return append([]Finding{ok("alerts come by HTTP at %s", e.Source.HTTP)}, out...)
}

func (e *Examination) lookFile() Finding {
	path := e.Source.File
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return warning("let Falco's file_output write there", "the file %s is not there yet", path)
	case err != nil:
		return unknown("run this as stoop runs", "the file can't be looked at: %v", err)
	case !info.Mode().IsRegular():
		return missing("name a regular file, or the FIFO as source.pipe", "%s is no regular file", path)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.R_OK, unix.AT_EACCESS); err != nil {
		return missing("let stoop's user read it", "%s can't be read: %v", path, err)
	}
	said := fmt.Sprintf("%s holds %s, last written %s", path, bytesText(info.Size()), info.ModTime().UTC().Format("2006-01-02 15:04:05 UTC"))
	if id, err := identify(path); err == nil {
		if ws := e.processes().with(id, func(o opened) bool { return o.access() != unix.O_RDONLY }); len(ws) > 0 {
			said += "; written to by " + listed(ws)
		}
	}
	return ok("%s", said)
}

// lookStoop asks the stoop that runs on the data folder.
func lookStoop(_ context.Context, e *Examination) []Finding {
	const start = "start it: stoop run, or its unit; docs/falco.md"
	r, err := e.running()
	switch {
	case errors.Is(err, broker.ErrNotRunning):
		if id, lerr := identify(filepath.Join(e.Data, "run.lock")); lerr == nil {
			if who := e.processes().with(id, func(opened) bool { return true }); len(who) > 0 {
				return []Finding{warning("wait until it is ready; its log says what it waits for", "%s works on %s and is not listening yet", listed(who), e.Data)}
			}
		}
		return []Finding{warning(start, "no stoop runs on %s", e.Data)}
	case errors.Is(err, fs.ErrPermission):
		return []Finding{unknown("run this as root, or as stoop's user", "%v", err)}
	case err != nil:
		return []Finding{warning("its log says more", "%v", err)}
	}
	said := fmt.Sprintf("stoop %s runs on %s as node %s, in %s mode", r.Version, e.Data, r.Node, r.Mode)
	if l := r.LastAlert; l != nil {
		said += fmt.Sprintf("; its last alert came %s by %s", l.Received.UTC().Format("2006-01-02 15:04:05 UTC"), l.Origin)
	}
	out := []Finding{ok("%s", said)}
	if r.Paused {
		out = append(out, warning("stoop resume", "it is paused: nothing is acted on"))
	}
	if r.Lift != "" {
		out = append(out, warning(r.Lift, "every node of the cluster is paused: nothing is acted on"))
	}
	if r.Unseen != "" {
		out = append(out, missing("the permissions below, or the namespace", "the cluster's pause would not reach this node: %s", r.Unseen))
	}
	if r.NotReady != "" {
		out = append(out, missing("its log says more", "it is not ready: %s", strings.ReplaceAll(r.NotReady, "\n", "; ")))
	}
	if r.Version != e.Version {
		out = append(out, warning("restart it, if it was upgraded", "this program is %s, the one that runs is %s", e.Version, r.Version))
	}
	if e.RulesErr == nil && r.Rules != e.RulesHash {
		out = append(out, warning("name its rules with --rules; or look into its log for what it has against them",
			"it follows rules %s, and %s are rules %s", r.Rules, e.RulesFile, e.RulesHash))
	}
	switch l := r.LastAlert; {
	case l == nil:
		out = append(out, warning("cause one: a shell in a container, or a line of examples/alerts.jsonl", "it has no alert yet"))
	case l.Text:
		out = append(out, missing("json_output: true in falco.yaml", "its last alert was plain text, which can be forged and starts nothing harmful"))
	case e.AuditEvents: // they are of any host
	case l.Hostname != "" && l.Hostname != r.Node && !slices.Contains(e.Aliases, l.Hostname):
		out = append(out, missing(fmt.Sprintf("aliases: [%s] in stoop.yaml, or FALCO_HOSTNAME=%s for Falco", l.Hostname, r.Node),
			"its last alert was of the host %q, which is not this node: such alerts start nothing harmful", l.Hostname))
	}
	return out
}

// lookRules says what is wrong or doubtful about the rules.
func lookRules(_ context.Context, e *Examination) []Finding {
	if e.RulesErr != nil {
		first, _, _ := strings.Cut(e.RulesErr.Error(), "\n")
		return []Finding{missing(fmt.Sprintf("stoop check --rules %s says all of it", e.RulesFile), "%s", first)}
	}
	steps := "they cause no step"
	if n := len(e.Steps); n == 1 {
		steps = "they can cause one step"
	} else if n > 1 {
		steps = fmt.Sprintf("they can cause %d steps", n)
	}
	out := []Finding{ok("%s can be read, as rules %s; %s", e.RulesFile, e.RulesHash, steps)}
	if len(e.Steps) == 0 {
		out[0] = warning("write some: docs/rules.md", "%s holds no rule", e.RulesFile)
	}
	if n := len(e.Doubts); n > 0 {
		out = append(out, warning("stoop check --rules "+e.RulesFile+" says them all", "%d of their conditions may not mean what they seem to, such as: %s", n, e.Doubts[0]))
	}
	return out
}
