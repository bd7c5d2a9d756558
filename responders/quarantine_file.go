package responders

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"stoop/alert"
	"stoop/child"
	"stoop/evidence"
	"stoop/node"
	"stoop/param"
)

func quarantineFile() Entry {
	return Entry{
		Name: "quarantine-file",
		Doc:  "Takes the file that the alert names out of the container and keeps it as evidence.",
		Notes: `The file is copied to the evidence store with its owner, mode, times and extended
attributes. When all of that is on the disk, and the name still means the file that was
copied, unchanged, the name is removed. Undo puts the file back with all of these, into
the same container, if nothing else is at its place by then.

What an alert names is the attacker's to choose. So the kernel resolves the path inside
the container's root, as its mount namespace has it, and never leaves that root's own
mount: a volume, which others may share, is refused, and so are /proc, /dev and a single
file that is mounted. The root has to be an overlay, as containerd, CRI-O and Docker
make it. Refused are also whatever is no regular file, a symbolic link as the last part
of the path, the path of a process that sees other files than its container (by chroot,
or mounts of its own) if that still runs, and alerts of the host.

A process that runs the file or has it open goes on: chain kill-process or
kill-container. Other names of the file (hard links) stay, and the outcome says how
many. The alert may name a file of the image as well as one that was dropped, and the
container, when made anew, has the image's files again: use it for rules about dropped
files, behind freeze-container.

A file that could not be kept whole stays where it is: one above maxSize, one for which
evidence.size leaves no room, and the same path in the same container after
evidence.perTarget times. It needs CAP_SYS_CHROOT too, and its undo CAP_CHOWN and
CAP_FOWNER, for set-id bits CAP_FSETID, for file capabilities CAP_SETFCAP.`,
		Params:   param.Describe(quarantineFileDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedSysAdmin, node.NeedDACReadSearch, node.NeedDACOverride},
		Kind:     Harm,
		Object:   ContainerObject,
		Deadline: 30 * time.Second,
		New: func(env Env) Responder {
			return &fileQuarantine{local: env.Local, store: env.Evidence, children: ownChildren(env)}
		},
	}
}

type quarantineFileParams struct {
	Field   string     `param:"field" oneof:"fd.name proc.exepath fs.path.name" doc:"The field of the alert that names the file."`
	MaxSize param.Size `param:"maxSize" min:"1KiB" max:"4GiB" doc:"A larger file is refused."`
}

func quarantineFileDefaults() quarantineFileParams {
	return quarantineFileParams{Field: "fd.name", MaxSize: 64 << 20}
}

type fileQuarantine struct {
	local    *node.Node
	store    *evidence.Store
	children *child.Launcher
}

// The pieces of a case.
const (
	pieceContent = "content"
	pieceFile    = "file.json" // all but the content, as [child.File]
)

// quarantined is the undo record.
type quarantined struct {
	Boot       string `json:"boot"`
	Container  string `json:"container"`
	Cgroup     string `json:"cgroup"`
	Inode      uint64 `json:"inode"` // of the cgroup
	Case       string `json:"case"`  // the step's id
	Path       string `json:"path"`
	SHA256     string `json:"sha256"`
	FileSHA256 string `json:"fileSHA256"` // of file.json
}

// named is the path that the alert names.
func (p quarantineFileParams) named(r *Request) (string, error) {
	name, ok := r.Alert.Field(p.Field)
	base := path.Base(name)
	switch {
	case !ok:
		return "", Refuse("the alert has no field %s", p.Field)
	case p.Field == "proc.exepath" && strings.HasSuffix(name, " (deleted)"):
		return "", Refuse("the executable is deleted already: capture-proc keeps it")
	case !path.IsAbs(name), strings.ContainsRune(name, 0), len(name) >= 4096:
		return "", Refuse("%s is %s, which is no absolute path", p.Field, param.Cut(name))
	case strings.HasSuffix(name, "/"), base == ".", base == "..":
		return "", Refuse("%s is %s, which is a folder", p.Field, param.Cut(name))
	}
	return name, nil
}

func (q *fileQuarantine) params(r *Request) (quarantineFileParams, string, error) {
	params := quarantineFileDefaults()
	if err := r.Decode(&params); err != nil {
		return params, "", Refuse("%v", err)
	}
	switch {
	case r.Container == nil:
		return params, "", errHost
	case q.store == nil:
		return params, "", Refuse("there is no evidence store")
	}
	name, err := params.named(r)
	return params, name, err
}

// Check refuses what names no file. Whether the container has it is seen by Act.
func (q *fileQuarantine) Check(_ context.Context, r *Request) error {
	if _, _, err := q.params(r); err != nil {
		return err
	}
	return spareOwn(r.Container)
}

// Object is the file: another one in the same container is another matter.
func (q *fileQuarantine) Object(r *Request) string {
	_, name, err := q.params(r)
	if err != nil {
		return ""
	}
	return "file/" + r.Container.ID + "/" + alert.IDOf([]byte(name))
}

// place is where a path leads in a container, as its processes see it.
func place(c *node.Container, path string) (child.Place, error) {
	p := child.Place{Container: c.ID, Path: path}
	pids, err := c.Pids()
	if err != nil {
		return p, err
	}
	if len(pids) == 0 {
		return p, fmt.Errorf("container %s has no process: %w", c.ID, ErrGone)
	}
	for _, pid := range pids {
		p.Suspects = append(p.Suspects, child.Suspect{PID: pid})
	}
	return p, nil
}

func (q *fileQuarantine) Act(ctx context.Context, r *Request) (Result, error) {
	params, name, err := q.params(r)
	if err != nil {
		return Result{}, err
	}
	at, err := place(r.Container, name)
	if err != nil {
		return Result{}, err
	}
	if r.Process != nil {
		at.Seen = child.Suspect{PID: r.Process.PID, Start: r.Process.Start}
	}
	kept, err := q.store.Begin(ctx, evidence.About{
		Step: r.Step.ID, Alert: r.Step.AlertID, Rule: r.Step.Rule, Responder: r.Step.Responder,
		Target: r.Container.ID + " " + name,
	})
	switch {
	case errors.Is(err, evidence.ErrFull), errors.Is(err, evidence.ErrEnough):
		return Result{}, Refuse("the file stays where it is: %v", err)
	case err != nil:
		return Result{}, err
	}
	t := &taking{fileQuarantine: q, kept: kept, before: kept.WasFinished()}
	file, err := q.children.Take(ctx, at, int64(params.MaxSize), func(f child.File, content io.Reader) error {
		return t.keep(ctx, f, content)
	})
	return t.result(r, name, file, err)
}

// taking is a file on its way into the evidence store.
type taking struct {
	*fileQuarantine
	kept   *evidence.Case
	before bool // an earlier run had it all in the store
	closed bool
}

// errOther says that the file which an earlier run kept is not at its place any
// more, but another is.
var errOther = errors.New("another file is at its place since")

// keep returns when the file is on the disk.
func (t *taking) keep(ctx context.Context, f child.File, content io.Reader) error {
	if t.before {
		old, _, err := t.file(t.kept.Manifest().Step)
		if err != nil {
			return err
		}
		if !old.Same(f) {
			return errOther
		}
		// It was kept; only its name has to go.
		if _, err := io.Copy(io.Discard, content); err != nil {
			return err
		}
		return t.close()
	}
	p, err := t.kept.Add(ctx, pieceContent, content, -1)
	if err != nil {
		return err
	}
	if !p.Whole() || p.Size != f.Size {
		return Refuse("the file stays where it is, for it could not be kept whole: %s", p.Error)
	}
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if p, err := t.kept.Add(ctx, pieceFile, bytes.NewReader(b), -1); err != nil || !p.Whole() {
		return errors.Join(err, Refuse("the file stays where it is, for what it is could not be kept: %s", p.Error))
	}
	return t.close()
}

// close has all of it on the disk.
func (t *taking) close() error {
	err := t.kept.Close()
	t.closed = err == nil
	return err
}

// result is what a taking came to. The case is kept only if the file is gone from
// its place, or may be.
func (t *taking) result(r *Request, name string, file child.File, err error) (Result, error) {
	var no *child.Refusal
	refused := errors.As(err, &no)
	switch {
	case err == nil:
		return t.done(r, name, links(file))
	case t.before && (refused && no.Gone || errors.Is(err, errOther)):
		// An earlier run took its name away and was killed before it could say so.
		if cerr := t.kept.Close(); cerr != nil {
			return Result{}, cerr
		}
		note := ""
		if errors.Is(err, errOther) {
			note = "; " + errOther.Error()
		}
		return t.done(r, name, note)
	}
	var drop error
	switch {
	case t.before || t.closed && !refused:
		// The child may have been killed before or after it removed the name: the
		// next try will see.
		if drop = t.kept.Close(); !refused {
			err = Retry(err, 0)
		}
	case t.closed:
		drop = t.store.Remove(r.Step.ID)
	default:
		drop = t.kept.Discard()
	}
	switch {
	case refused && no.Later:
		err = Retry(fmt.Errorf("take %s: %w", param.Cut(name), no), time.Second)
	case refused && no.Gone:
		err = fmt.Errorf("take %s: %s: %w", param.Cut(name), no.Reason, ErrGone)
	case refused:
		err = Refuse("%s stays where it is: %s", param.Cut(name), no.Reason)
	case as[*refusal](err), as[*retryable](err):
	case as[*child.Died](err):
		err = Retry(fmt.Errorf("take %s: %w", param.Cut(name), err), 0)
	default:
		err = fmt.Errorf("take %s: %w", param.Cut(name), err)
	}
	if drop != nil {
		err = errors.Join(err, drop)
	}
	return Result{}, err
}

func links(f child.File) string {
	if f.Links < 2 {
		return ""
	}
	return fmt.Sprintf("; the file has %d more names (hard links), which stay", f.Links-1)
}

func (t *taking) done(r *Request, name, note string) (Result, error) {
	m := t.kept.Manifest()
	content, _ := m.Piece(pieceContent)
	meta, _ := m.Piece(pieceFile)
	undo, err := json.Marshal(quarantined{
		Boot: t.local.BootID(), Container: r.Container.ID, Cgroup: r.Container.Path, Inode: r.Container.Inode,
		Case: r.Step.ID, Path: name, SHA256: content.SHA256, FileSHA256: meta.SHA256,
	})
	if err != nil {
		return Result{}, err
	}
	res := Result{Reason: fmt.Sprintf("%s taken out of the container and kept in %s%s", param.Cut(name), t.kept.Path(), note), Undo: undo, Found: foundEvidence(t.kept)}
	res.Found["sha256"], res.Found["file"] = content.SHA256, name
	return res, nil
}

// file reads what a case says of its file, and the SHA-256 of that.
func (q *fileQuarantine) file(step string) (child.File, string, error) {
	var f child.File
	r, _, err := q.store.Read(step, pieceFile)
	if err != nil {
		return f, "", err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return f, "", err
	}
	sum := sha256.Sum256(b)
	return f, hex.EncodeToString(sum[:]), json.Unmarshal(b, &f)
}

// Undo puts the file back into the container that it was taken from.
func (q *fileQuarantine) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec quarantined
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Container == "" || rec.Cgroup == "" || rec.Inode == 0 || rec.Case == "" || rec.Path == "" || rec.SHA256 == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if q.store == nil {
		return Result{}, Refuse("there is no evidence store")
	}
	if q.local.BootID() != rec.Boot {
		return Result{}, fmt.Errorf("container %s ran before the machine was started anew: %w", rec.Container, ErrGone)
	}
	c, err := q.local.ContainerAt(rec.Cgroup, rec.Inode)
	if err != nil {
		return Result{}, err
	}
	if c.ID != rec.Container {
		return Result{}, Refuse("the undo record of step %s names container %s, but a cgroup of container %s", u.ID, rec.Container, c.ID)
	}
	at, err := place(c, rec.Path)
	if err != nil {
		return Result{}, err
	}
	f, sum, err := q.file(rec.Case)
	if err != nil {
		return Result{}, fmt.Errorf("put back %s: %w", param.Cut(rec.Path), err)
	}
	if sum != rec.FileSHA256 {
		return Result{}, Refuse("what the evidence says of %s was changed since", param.Cut(rec.Path))
	}
	content, _, err := q.store.Read(rec.Case, pieceContent)
	if err != nil {
		return Result{}, fmt.Errorf("put back %s: %w", param.Cut(rec.Path), err)
	}
	defer content.Close()
	already, err := q.children.PutBack(ctx, at, f, rec.SHA256, content)
	var no *child.Refusal
	switch {
	case errors.As(err, &no) && no.Gone:
		return Result{}, fmt.Errorf("put back %s: %s: %w", param.Cut(rec.Path), no.Reason, ErrGone)
	case errors.As(err, &no):
		return Result{}, Refuse("%s is not put back: %s", param.Cut(rec.Path), no.Reason)
	case err != nil:
		return Result{}, fmt.Errorf("put back %s: %w", param.Cut(rec.Path), err)
	case already:
		return Result{Nothing: true, Reason: "the file is back already"}, nil
	}
	return Result{Reason: fmt.Sprintf("%s is back; a copy stays in the evidence", param.Cut(rec.Path))}, nil
}
