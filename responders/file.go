package responders

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"stoop/param"
)

func file() Entry {
	return Entry{
		Name: "file",
		Doc:  "Appends the alert, and what the steps before came to, to a file as a line of JSON.",
		Notes: `A line holds @timestamp, id (the step's), rule (stoop's), alert (as Falco wrote it),
target, found (what the steps before came to), node, cluster: Filebeat, Vector and
jq read it as it is. Each line is one write; after a crash a line may be there twice,
with one id.

The folder has to exist, and the path is fixed in the rule: nothing of an alert gets
into it. The file is made with mode 0600, and only a regular file is written to, never
what a symbolic link points at. A file that would outgrow maxSize becomes
PATH.1, that one PATH.2, and so on up to keep; the oldest goes. In a pod the folder has
to be mounted from the host, or the file goes with the pod.`,
		Params:   param.Describe(fileDefaults()),
		Kind:     Evidence,
		Object:   NoObject,
		Deadline: 10 * time.Second,
		Lane: func(raw json.RawMessage) string {
			p := fileDefaults()
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return lane("", p.Path)
		},
		New: func(env Env) Responder { return &fileWriter{node: env.Node, cluster: env.Cluster} },
	}
}

type fileParams struct {
	Path    string     `param:"path" required:"true" doc:"The file's absolute path."`
	MaxSize param.Size `param:"maxSize" min:"1MiB" doc:"The file's largest size before the next is begun."`
	Keep    int        `param:"keep" min:"0" max:"1000" doc:"How many full files are kept beside it."`
}

func fileDefaults() fileParams { return fileParams{MaxSize: 64 << 20, Keep: 3} }

// Validate refuses a path that could mean two places.
func (p fileParams) Validate() error {
	if !filepath.IsAbs(p.Path) || filepath.Clean(p.Path) != p.Path || p.Path == "/" {
		return fmt.Errorf("path: %s is no absolute path to a file in its shortest form", param.Cut(p.Path))
	}
	return nil
}

// fileWriter keeps no file open: other programs may rotate or take away what it
// writes, and the next line begins a new one.
type fileWriter struct {
	node, cluster string
	mu            sync.Mutex // one line at a time, and rotation between lines
}

func (w *fileWriter) Act(ctx context.Context, r *Request) (Result, error) {
	params := fileDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	line, err := json.Marshal(struct {
		Timestamp string `json:"@timestamp"`
		notice
	}{time.Now().UTC().Format(time.RFC3339Nano), newNotice(r, w.node, w.cluster)})
	if err != nil {
		return Result{}, Refuse("the alert is no JSON: %v", err)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("write to %s: %w", params.Path, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Resumed && holds(params.Path, r.Step.ID) {
		return Result{Nothing: true, Reason: "the line is in " + params.Path + " already"}, nil
	}
	if err := appendLine(params, append(line, '\n')); err != nil {
		err = fmt.Errorf("write to %s: %w", params.Path, err)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = Retry(err, 0)
		}
		return Result{}, err
	}
	return Result{Reason: "written to " + params.Path}, nil
}

func appendLine(p fileParams, line []byte) error {
	f, size, err := openAppend(p.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if size > 0 && size+int64(len(line)) > int64(p.MaxSize) {
		if err := rotate(p.Path, p.Keep); err != nil {
			return fmt.Errorf("rotate: %w", err)
		}
		f.Close()
		if f, size, err = openAppend(p.Path); err != nil {
			return err
		}
		defer f.Close()
	}
	if n, err := f.Write(line); err != nil {
		if n > 0 {
			// Half a line would spoil the next one.
			err = errors.Join(err, f.Truncate(size))
		}
		return err
	}
	return f.Close()
}

// openAppend opens or makes the file, and nothing that is no regular file.
func openAppend(path string) (*os.File, int64, error) {
	// O_NONBLOCK so that a FIFO that somebody put there blocks nothing.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, 0, errors.New("it is a symbolic link, which is not followed")
	case errors.Is(err, os.ErrNotExist):
		return nil, 0, fmt.Errorf("its folder is not there: make %s first", filepath.Dir(path))
	case err != nil:
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// rotate makes room at path: path becomes path.1, and so on.
func rotate(path string, keep int) error {
	if keep == 0 {
		return os.Remove(path)
	}
	nth := func(n int) string { return fmt.Sprintf("%s.%d", path, n) }
	for n := keep - 1; n >= 1; n-- {
		if err := os.Rename(nth(n), nth(n+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return os.Rename(path, nth(1))
}

// holds reports whether the file has a line of this step.
func holds(path, id string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false
	}
	quoted, err := json.Marshal(id)
	if err != nil {
		return false
	}
	// Right behind the timestamp, which has a length of its own; further on
	// stands the alert, which may hold anything.
	const front = 256
	want := append([]byte(`"id":`), quoted...)
	for r := bufio.NewReaderSize(f, 64<<10); ; {
		head, err := r.ReadSlice('\n')
		if bytes.Contains(head[:min(len(head), front)], want) {
			return true
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = r.ReadSlice('\n')
		}
		if err != nil {
			return false // the end
		}
	}
}
