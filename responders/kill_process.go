package responders

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"stoop/node"
	"stoop/param"
)

func killProcess() Entry {
	return Entry{
		Name: "kill-process",
		Doc:  "Kills the process that raised the alert, with all that it started, or sends them another signal.",
		Notes: `The process is held by a pidfd before it is proved to be the alert's, by its start
(proc.pid.ts, to within 20 ms) and by its container's cgroup, so a number that was given
to another process since hits nobody. Falco has to tell proc.pid, and for a process of
the host proc.pid.ts as well: docs/falco.md says how. In a container a process whose
start is not told is proved by its cgroup alone. Of a process that ran before Falco did,
Falco does not know the start: it is mostly left alone, and freeze-container or
kill-container are the answer.

With tree, and the signal KILL or STOP, its descendants are stopped as they are found,
so that none gets away by forking, and then signalled. One that has cut the tie (its
parent ended, as daemons do) is none of the tree any more: kill-container gets those of
a container.

Never signalled are process 1 of the host, threads of the kernel, stoop and its
ancestors, and on the host (not in containers, where a name says nothing) these:

` + fill(strings.Join(protectedNames(), ", ")) + `

Such a name counts only for a process that runs as root, from a file and folder that
only root can write to, so that a copy of a shell gains nothing by it. Names in protect
count whoever runs them. What a protected process in the tree started is left alone with
it.`,
		Params:   param.Describe(killProcessDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedKill, node.NeedPtrace},
		Kind:     Harm,
		Object:   ProcessObject,
		Deadline: 5 * time.Second,
		New:      func(env Env) Responder { return &processKiller{env.Local} },
	}
}

type killProcessParams struct {
	Signal  string   `param:"signal" oneof:"KILL TERM STOP INT HUP QUIT" doc:"What is sent. A process may ignore all but KILL and STOP."`
	Tree    bool     `param:"tree" doc:"Whether all that it started is signalled as well."`
	Protect []string `param:"protect" doc:"Further names of executables of the host that are never signalled; * and ? are globs."`
}

func killProcessDefaults() killProcessParams {
	return killProcessParams{Signal: "KILL", Tree: true}
}

// Validate refuses names that no executable could have.
func (p killProcessParams) Validate() error {
	for _, name := range p.Protect {
		if _, err := path.Match(name, "x"); err != nil || name == "" || strings.Contains(name, "/") {
			return fmt.Errorf("protect: %s is no name of an executable, without its folder", param.Cut(name))
		}
	}
	return nil
}

// number is the signal's; the description allows no other name.
func (p killProcessParams) number() syscall.Signal {
	return map[string]syscall.Signal{
		"KILL": syscall.SIGKILL, "TERM": syscall.SIGTERM, "STOP": syscall.SIGSTOP,
		"INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "QUIT": syscall.SIGQUIT,
	}[p.Signal]
}

// protectedNames are executables that a node can't do without.
func protectedNames() []string {
	return []string{
		"systemd*", "init", "dbus-*", "udevd", "agetty", "login", "sshd*", "cron", "crond", "auditd", "chronyd", "NetworkManager",
		"kubelet", "kube-*", "etcd", "k3s*", "k0s*", "rke2*",
		"containerd*", "crio", "conmon*", "runc", "crun", "dockerd", "docker-*", "podman",
		"falco*", "stoop*",
	}
}

type processKiller struct{ local *node.Node }

// Check refuses processes that are never signalled.
func (k *processKiller) Check(_ context.Context, r *Request) error {
	params, err := k.params(r)
	if err != nil {
		return err
	}
	if why := spared(r.Process, k.local.Ancestry(), params.Protect); why != "" {
		return Refuse("process %s is %s, and never signalled", named(r.Process), why)
	}
	return nil
}

func (k *processKiller) params(r *Request) (killProcessParams, error) {
	params := killProcessDefaults()
	if err := r.Decode(&params); err != nil {
		return params, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, Refuse("%v", err)
	}
	if params.number() == 0 {
		return params, Refuse("signal: %s is none that may be sent", param.Cut(params.Signal))
	}
	return params, nil
}

// spared says why a process is never signalled; "" when it may be.
func spared(p *node.Process, own node.Ancestry, protect []string) string {
	switch {
	case p.PID == 1:
		return "process 1 of the host"
	case p.Kernel:
		return "a thread of the kernel"
	case own.Has(p.PID):
		return "stoop itself or what started it"
	case p.CgroupOf != "":
		return "" // in a container a name says nothing
	case p.Exe == "":
		return "one of the host of which nobody can say what it runs (CAP_SYS_PTRACE shows it)"
	}
	name := filepath.Base(strings.TrimSuffix(p.Exe, " (deleted)"))
	is := func(glob string) bool {
		ok, err := path.Match(glob, name)
		return ok && err == nil
	}
	switch {
	case slices.ContainsFunc(protect, is):
		return "protected by this rule (" + quoted(name) + ")"
	case slices.ContainsFunc(protectedNames(), is) && p.OfRoot():
		return "one that the node can't do without (" + quoted(name) + ")"
	}
	return ""
}

// named is a process for people. It chose both of its names itself.
func named(p *node.Process) string {
	return fmt.Sprintf("%d %s", p.PID, quoted(cmp.Or(p.Exe, p.Comm)))
}

// quoted is the end of what may be an attacker's and long, without control characters.
func quoted(s string) string {
	const most = 128
	if len(s) > most {
		s = "…" + s[len(s)-most:]
	}
	return strconv.QuoteToASCII(s)
}

// endIn is how long the killed may take to be gone; most take under a millisecond.
const endIn = time.Second

func (k *processKiller) Act(ctx context.Context, r *Request) (Result, error) {
	params, err := k.params(r)
	if err != nil {
		return Result{}, err
	}
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	if err := k.Check(ctx, r); err != nil {
		return Result{}, err
	}
	signal := params.number()
	hit := []*node.Process{r.Process}
	var left, notes []string
	if params.Tree {
		held := &family{own: k.local.Ancestry(), protect: params.Protect, spared: map[int]bool{}, left: map[string]bool{}}
		defer held.close()
		if err := held.gather(ctx, r.Process, signal); err != nil {
			if len(held.found) == 0 {
				return Result{}, err
			}
			notes = append(notes, err.Error())
		}
		hit = held.found
		for name := range held.left {
			left = append(left, name)
		}
		slices.Sort(left)
	}
	var done []*node.Process
	for _, p := range hit {
		switch err := p.Signal(signal); {
		case err == nil:
			done = append(done, p)
		case errors.Is(err, node.ErrGone):
		default:
			notes = append(notes, err.Error())
		}
	}
	if len(done) == 0 {
		if len(notes) > 0 {
			return Result{}, errors.New(strings.Join(notes, "; "))
		}
		return Result{}, fmt.Errorf("process %d: %w", r.Process.PID, ErrGone)
	}
	if signal == syscall.SIGKILL {
		notes = append(notes, k.ended(ctx, r, done)...)
	}

	result := Result{Found: map[string]string{
		"process":   named(r.Process),
		"signal":    params.Signal,
		"processes": strconv.Itoa(len(done)),
	}}
	var names []string
	const most = 32
	for i, p := range done {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(done)-most))
			break
		}
		names = append(names, named(p))
	}
	result.Found["signalled"] = strings.Join(names, ", ")
	verb := "got SIG" + params.Signal
	if signal == syscall.SIGKILL {
		verb = "killed"
	}
	result.Reason = fmt.Sprintf("process %d %s", r.Process.PID, verb)
	if n := len(done) - 1; n > 0 {
		result.Reason = fmt.Sprintf("process %d and %d that it started %s", r.Process.PID, n, verb)
	}
	if len(left) > 0 {
		result.Found["left"] = strings.Join(left[:min(len(left), most)], ", ")
		notes = append(notes, fmt.Sprintf("%d protected ones of its tree were left alone, with what they started: %s", len(left), result.Found["left"]))
	}
	if len(notes) > 0 {
		result.Reason += "; " + strings.Join(notes, "; ")
	}
	return result, nil
}

// ended waits for the killed to be gone, and says who is not.
func (k *processKiller) ended(ctx context.Context, r *Request, killed []*node.Process) []string {
	if c := r.Container; c != nil && c.Version() == 1 {
		if frozen, err := c.Frozen(); err == nil && frozen {
			return []string{"their container is frozen by cgroup v1, so they die only when it is thawed"}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, endIn)
	defer cancel()
	var slow []int
	for _, p := range killed {
		if err := p.Wait(ctx); err != nil {
			slow = append(slow, p.PID)
		}
	}
	if len(slow) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("not gone after %s, since they are in a call to the kernel that can't be broken off: %s", endIn, list(slow))}
}

// family is a tree of processes as it is found, one look after the other.
type family struct {
	own     node.Ancestry
	protect []string
	found   []*node.Process // parents first; held
	spared  map[int]bool    // by number: left alone, with what they started
	left    map[string]bool
}

func (s *family) close() {
	for _, p := range s.found {
		_ = p.Close()
	}
}

// treeRounds is how many looks are taken at a tree that keeps growing.
const treeRounds = 32

// gather finds the tree. To kill or stop it, each process is stopped as it is
// found, and the tree looked at again until there is nobody new: who is stopped
// forks no more.
func (s *family) gather(ctx context.Context, root *node.Process, signal syscall.Signal) error {
	stop := signal == syscall.SIGKILL || signal == syscall.SIGSTOP
	for range treeRounds {
		tree, err := root.Tree(s.found...)
		fresh := 0
		for _, p := range tree {
			why := spared(p, s.own, s.protect)
			switch {
			case s.spared[p.Parent]:
				s.spared[p.PID] = true
			case why != "" && p.PID != root.PID:
				s.spared[p.PID] = true
				s.left[named(p)] = true
			default:
				s.found = append(s.found, p)
				fresh++
				if stop {
					_ = p.Signal(syscall.SIGSTOP) // that it can't is told by the signal itself
				}
				continue
			}
			_ = p.Close()
		}
		if err != nil || !stop || fresh == 0 || ctx.Err() != nil {
			return err
		}
	}
	return nil
}
