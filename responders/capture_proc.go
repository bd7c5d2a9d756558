package responders

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"

	"stoop/child"
	"stoop/evidence"
	"stoop/node"
	"stoop/param"
)

func captureProc() Entry {
	return Entry{
		Name: "capture-proc",
		Doc:  "Keeps what the kernel shows of the suspect before it is gone: its memory map, arguments, open files, sockets, and its executable.",
		Notes: `Of the alert's process and its tree, and of all other processes of the container, up to
the number in processes, the evidence store gets what /proc shows: command line,
environment, memory map, status, open files, working folder, cgroup and namespaces; once
a namespace its sockets and mounts; and each executable once, also when it is deleted
from disk. What memory holds is not read. Each case is a folder of the step's id below
evidence in the data folder, with a manifest that holds the SHA-256 of each file. The
outcome names the folder, the SHA-256 of the manifest and that of the suspect's
executable.

It works on a frozen container, and is best done there: freeze-container first. A
suspect can make such reads hang or grow. So a child of stoop's does them, which has
little memory and is killed when timeout is over. What there was by then is kept, and
the manifest says what is missing. The chain goes on in any case.

The first cases of one container, or process of the host, are kept (evidence.perTarget),
and of all together as much as evidence.size: past that the outcome is nothing, and says
why.

In the environment the values of variables whose names match redact are left out, and
logins in addresses. Command lines, and what other files show, are kept as they are: the
evidence may hold secrets of the container's, and only stoop's user (root) can read it.`,
		Params:   param.Describe(captureProcDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedDACReadSearch},
		Kind:     Evidence,
		Object:   SuspectObject,
		Deadline: 45 * time.Second,
		New: func(env Env) Responder {
			return &procCapturer{store: env.Evidence, children: ownChildren(env)}
		},
	}
}

type captureProcParams struct {
	Processes int            `param:"processes" min:"1" max:"512" doc:"How many processes are captured at most, the alert's and its tree first."`
	MaxExe    param.Size     `param:"maxExe" min:"0B" max:"1GiB" doc:"How much of an executable is kept."`
	MaxSize   param.Size     `param:"maxSize" min:"64KiB" max:"4GiB" doc:"How much is kept in all."`
	Redact    []string       `param:"redact" doc:"Names of environment variables whose values are not kept; * and ? are globs, and the case of letters does not count."`
	Timeout   param.Duration `param:"timeout" min:"100ms" max:"30s" doc:"How long it may take; what there is by then is kept."`
}

func captureProcDefaults() captureProcParams {
	return captureProcParams{
		Processes: 64, MaxExe: 64 << 20, MaxSize: 128 << 20, Timeout: param.Duration(10 * time.Second),
		Redact: []string{"*TOKEN*", "*SECRET*", "*PASSW*", "*PASSPHRASE*", "*KEY*", "*CREDENTIAL*", "*AUTH*", "*COOKIE*", "*_PWD", "*_DSN", "*CONNECTION_STRING*"},
	}
}

// Validate refuses a glob that is none.
func (p captureProcParams) Validate() error {
	for _, glob := range p.Redact {
		if _, err := path.Match(glob, ""); err != nil {
			return fmt.Errorf("redact: %s is no glob", param.Cut(glob))
		}
	}
	return nil
}

type procCapturer struct {
	store    *evidence.Store
	children *child.Launcher
}

// toCapture are the processes that a request is about, the most suspect first, and
// how many there are beyond most.
func toCapture(r *Request, most int) (found []child.Suspect, beyond int, err error) {
	seen := map[int]bool{}
	add := func(pid int, start uint64) {
		switch {
		case seen[pid]:
		case len(found) >= most:
			beyond++
		default:
			found = append(found, child.Suspect{PID: pid, Start: start})
		}
		seen[pid] = true
	}
	if r.Process != nil {
		add(r.Process.PID, r.Process.Start)
		tree, terr := r.Process.Tree()
		for _, p := range tree {
			add(p.PID, p.Start)
			_ = p.Close() // the child proves by the start who it is
		}
		if terr != nil && !errors.Is(terr, node.ErrGone) {
			err = fmt.Errorf("the tree of process %d: %w", r.Process.PID, terr)
		}
	}
	if r.Container != nil {
		pids, perr := r.Container.Pids()
		for _, pid := range pids {
			add(pid, 0) // the child proves by its cgroup that it is the container's
		}
		err = errors.Join(err, perr)
	}
	return found, beyond, err
}

func (c *procCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := captureProcDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if c.store == nil {
		return Result{}, Refuse("there is no evidence store")
	}
	want := child.Capture{Redact: params.Redact, MaxExe: int64(params.MaxExe)}
	var target string
	switch {
	case r.Container != nil:
		want.Container, target = r.Container.ID, r.Container.ID
	case r.Process != nil:
		target = fmt.Sprintf("host process %d started at %d", r.Process.PID, r.Process.Start)
	default:
		return Result{}, errNoSuspect
	}
	kept, ended, err := beginCase(ctx, c.store, r, target)
	if kept == nil {
		return ended, err
	}
	var beyond int
	want.Suspects, beyond, err = toCapture(r, params.Processes)
	if len(want.Suspects) == 0 && len(kept.Manifest().Pieces) == 0 {
		if derr := kept.Discard(); derr != nil {
			return Result{}, derr
		}
		if err == nil || errors.Is(err, node.ErrGone) {
			err = fmt.Errorf("no process of it is left: %w", ErrGone)
		}
		return Result{}, err
	}
	if err != nil {
		kept.Note("not every process could be found: %v", err)
	}
	if beyond > 0 {
		kept.Note("%d more processes were not captured: at most %d are", beyond, params.Processes)
	}
	got, err := c.capture(ctx, kept, want, params)
	if err != nil {
		kept.Note("not all could be had: %v", err)
	}
	if len(kept.Manifest().Pieces) == 0 {
		if derr := kept.Discard(); derr != nil {
			return Result{}, errors.Join(err, derr)
		}
		if err == nil {
			err = fmt.Errorf("every process of it has ended: %w", ErrGone)
		}
		return Result{}, err
	}
	keepAlert(ctx, kept, r)
	if cerr := kept.Close(); cerr != nil {
		return Result{}, errors.Join(err, cerr)
	}
	return captured(kept, got, beyond, err), nil
}

// capture has a child look at the suspects, and keeps what it says.
func (c *procCapturer) capture(ctx context.Context, kept *evidence.Case, want child.Capture, params captureProcParams) (child.Captured, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	room := int64(params.MaxSize)
	keep := func(name string, most int64, r io.Reader) error {
		// What the child had read by its end is kept also when time is over.
		p, err := kept.Add(context.WithoutCancel(ctx), name, r, min(most, room))
		if room -= p.Size; p.Cut && room <= 0 {
			kept.Note("%s is cut, and what comes after it empty: in all %d bytes are kept", p.Name, int64(params.MaxSize))
		}
		return err
	}
	return c.children.Capture(ctx, want, keep, func(note string) { kept.Note("%s", note) })
}

// captured is the result of a capture that kept something.
func captured(kept *evidence.Case, got child.Captured, beyond int, err error) Result {
	res := Result{Found: foundEvidence(kept)}
	m := kept.Manifest()
	var size int64
	for _, p := range m.Pieces {
		size += p.Size
		// The first executable is that of the most suspect.
		if strings.HasSuffix(p.Name, ".exe") && p.Whole() && res.Found["exeSHA256"] == "" {
			res.Found["exe"], res.Found["exeSHA256"] = p.Name, p.SHA256
		}
	}
	res.Found["processes"] = strconv.Itoa(got.Processes)
	res.Reason = fmt.Sprintf("processes captured: %d; %d files of %d bytes are in %s", got.Processes, len(m.Pieces), size, kept.Path())
	if beyond > 0 {
		res.Reason += fmt.Sprintf("; %d more processes were not", beyond)
	}
	switch {
	case err != nil:
		res.Reason = fmt.Sprintf("captured in part, %d files in %s: %v", len(m.Pieces), kept.Path(), err)
	case got.Blocked > 0:
		res.Reason += fmt.Sprintf("; %d did not let all of it be read", got.Blocked)
	}
	return res
}

// foundEvidence says where a case is, and what proves it later.
func foundEvidence(kept *evidence.Case) map[string]string {
	return map[string]string{"evidence": kept.Path(), "manifestSHA256": kept.Sum()}
}
