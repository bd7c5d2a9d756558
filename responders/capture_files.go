package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"stoop/child"
	"stoop/evidence"
	"stoop/node"
	"stoop/param"
)

func captureFiles() Entry {
	return Entry{
		Name: "capture-files",
		Doc:  "Keeps files of the suspect container, also of one whose image has no shell and no tar.",
		Notes: `The files are read on the node, as the container's oldest process has them mounted, so no
program of the container is trusted or needed, the container may be frozen, and nobody in
it notices, save by a file system of his own. That needs the node's rights (hostPID,
CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH, CAP_SYS_CHROOT): where stoop has them not
the step fails and says so.

paths are patterns of the rule's, absolute, * and ? for all but a slash; a folder that one
matches stands for all files below it, in and beyond its mounts, so volumes too. fields
name fields of the alert that hold a path; these an attacker has written, so they mean
one file and no pattern, and are left out of the case where they hold no absolute path.
The kernel resolves every path inside the container's root and never leads out of it. A
symbolic link is recorded with what it says, and the file that it means in the container
is kept; a folder behind one is not entered. Devices, FIFOs and sockets are recorded and
not opened, and so is what the kernel makes up (/proc, /sys, cgroups).

Each case is a folder of the step's id below evidence in the data folder. N.file is the
content of a file, files.jsonl tells of each its path, owner, mode, times and extended
attributes, and the manifest holds the SHA-256 of each piece. maxFile bounds one file,
maxSize all, files their number; what does not fit is cut, and the manifest says so. A
child of stoop's reads them, which has little memory and is killed when timeout is over.
What there was by then is kept. The chain goes on in any case.

Paths such as /var/run/secrets hold tokens that are good until they end: the evidence then
holds them too. Only stoop's user (root) can read it. As of all evidence, the first cases
of one container are kept (evidence.perTarget).`,
		Params:   param.Describe(captureFilesDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedSysAdmin, node.NeedDACReadSearch},
		Kind:     Evidence,
		Object:   ContainerObject,
		Deadline: 3 * time.Minute,
		New: func(env Env) Responder {
			return &fileCapturer{store: env.Evidence, children: ownChildren(env)}
		},
	}
}

type captureFilesParams struct {
	Paths   []string       `param:"paths" doc:"Which files, as absolute paths in the container; * and ? are globs."`
	Fields  []string       `param:"fields" oneof:"fd.name proc.exepath fs.path.name" doc:"Fields of the alert that name a file."`
	Files   int            `param:"files" min:"1" max:"5000" doc:"How many files are kept at most."`
	MaxFile param.Size     `param:"maxFile" min:"0B" max:"4GiB" doc:"How much of one file is kept."`
	MaxSize param.Size     `param:"maxSize" min:"64KiB" max:"4GiB" doc:"How much is kept in all."`
	Timeout param.Duration `param:"timeout" min:"100ms" max:"2m" doc:"How long it may take; what there is by then is kept."`
}

func captureFilesDefaults() captureFilesParams {
	return captureFilesParams{Files: 100, MaxFile: 16 << 20, MaxSize: 128 << 20, Timeout: param.Duration(20 * time.Second)}
}

// pathMost is how long a path may be (PATH_MAX).
const pathMost = 4096

// Validate refuses a path that is none.
func (p captureFilesParams) Validate() error {
	if len(p.Paths) == 0 && len(p.Fields) == 0 {
		return errors.New("paths: name the files, or with fields the fields of the alert that do")
	}
	for _, name := range p.Paths {
		_, err := path.Match(name, "")
		switch {
		case err != nil:
			return fmt.Errorf("paths: %s is no glob", param.Cut(name))
		case !path.IsAbs(name), strings.ContainsRune(name, 0), len(name) >= pathMost:
			return fmt.Errorf("paths: %s is no absolute path", param.Cut(name))
		case slices.Contains(strings.Split(name, "/"), ".."):
			return fmt.Errorf("paths: %s leads upwards (..): write it without that", param.Cut(name))
		}
	}
	return nil
}

// named are the paths that the alert names, and notes on those that are none.
func (p captureFilesParams) named(r *Request) (paths, notes []string) {
	for _, field := range p.Fields {
		name, ok := r.Alert.Field(field)
		name = strings.TrimSuffix(name, " (deleted)")
		switch {
		case !ok:
			notes = append(notes, "the alert has no field "+field)
		case !path.IsAbs(name), strings.ContainsRune(name, 0), len(name) >= pathMost:
			notes = append(notes, fmt.Sprintf("%s is %s, which is no absolute path", field, param.Cut(name)))
		default:
			paths = append(paths, name)
		}
	}
	return paths, notes
}

type fileCapturer struct {
	store    *evidence.Store
	children *child.Launcher
}

// pieceFiles lists what was found, a line of JSON each.
const pieceFiles = "files.jsonl"

func (c *fileCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := captureFilesDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	switch {
	case c.store == nil:
		return Result{}, Refuse("there is no evidence store")
	case r.Container == nil:
		return Result{}, errHost
	}
	paths, notes := params.named(r)
	if len(paths) == 0 && len(params.Paths) == 0 {
		return Result{}, Refuse("%s", strings.Join(notes, "; "))
	}
	at, err := place(r.Container, "")
	if err != nil {
		return Result{}, err
	}
	kept, again, err := beginCase(ctx, c.store, r, r.Container.ID)
	if kept == nil || err != nil {
		return again, err
	}
	for _, note := range notes {
		kept.Note("%s", note)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	room, list := int64(params.MaxSize), &listing{}
	keep := func(name string, most int64, content io.Reader) error {
		// What the child had read by its end is kept also when time is over.
		p, err := kept.Add(context.WithoutCancel(ctx), name, content, min(most, room))
		if room -= p.Size; p.Cut && room <= 0 {
			kept.Note("%s is cut, and what comes after it empty: in all %d bytes are kept", p.Name, int64(params.MaxSize))
		}
		return err
	}
	got, err := c.children.Files(ctx, child.Files{
		Container: at.Container, Suspects: at.Suspects, Globs: params.Paths, Paths: paths,
		Max: int64(params.MaxFile), Count: params.Files,
	}, list.add, keep, func(note string) { kept.Note("%s", note) })
	var no *child.Refusal
	if errors.As(err, &no) {
		if derr := kept.Discard(); derr != nil {
			return Result{}, derr
		}
		if no.Gone {
			return Result{}, fmt.Errorf("%s: %w", no.Reason, ErrGone)
		}
		return Result{}, Refuse("%s", no.Reason)
	}
	if err != nil {
		kept.Note("not all could be had: %v", err)
	}
	if list.n > 0 {
		if _, lerr := kept.Add(context.WithoutCancel(ctx), pieceFiles, &list.lines, -1); lerr != nil {
			err = errors.Join(err, lerr)
		}
	}
	keepAlert(ctx, kept, r)
	if cerr := kept.Close(); cerr != nil {
		return Result{}, errors.Join(err, cerr)
	}
	if err != nil && list.n == 0 {
		return Result{}, err
	}
	return list.result(kept, got, err), nil
}

// listing is files.jsonl being written.
type listing struct {
	lines       bytes.Buffer
	n, contents int
	beyond      int
}

// listingMost is how large it may be.
const listingMost = 8 << 20

func (l *listing) add(f child.FoundFile) {
	b, err := json.Marshal(f)
	if l.n++; err != nil || l.lines.Len()+len(b) > listingMost {
		l.beyond++
		return
	}
	if f.Piece != "" {
		l.contents++
	}
	l.lines.Write(append(b, '\n'))
}

func (l *listing) result(kept *evidence.Case, got child.GotFiles, err error) Result {
	res := Result{Found: foundEvidence(kept)}
	var size int64
	for _, p := range kept.Manifest().Pieces {
		if p.Name != pieceFiles {
			size += p.Size
		}
	}
	res.Found["files"] = strconv.Itoa(l.contents)
	switch {
	case err != nil:
		res.Reason = fmt.Sprintf("captured in part, %d files in %s: %v", l.contents, kept.Path(), err)
	case l.n == 0:
		res.Reason = "no such file is there; " + kept.Path() + " says so"
	default:
		res.Reason = fmt.Sprintf("files captured: %d of %d bytes, in %s", l.contents, size, kept.Path())
	}
	if got.Others > 0 {
		res.Reason += fmt.Sprintf("; %d more have no content to be kept", got.Others)
	}
	if got.Blocked > 0 {
		res.Reason += fmt.Sprintf("; %d did not let themselves be read", got.Blocked)
	}
	return res
}
