package responders

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/alert"
	"stoop/broker"
	"stoop/child"
	"stoop/evidence"
	"stoop/node"
	"stoop/node/nodetest"
)

// rooted is a container for tests: a process with an overlay as its root, in a cgroup
// of its own.
type rooted struct {
	*node.Container
	local  *node.Node
	pid    int
	dir    string // lower, upper, volume
	inside string // its root, seen from here
	t      testing.TB
}

// startContainer makes one; options are no-overlay and chroot-to-volume.
func startContainer(t testing.TB, options ...string) *rooted {
	t.Helper()
	cgroup := nodetest.CgroupV2(t)
	dir := t.TempDir()
	for _, d := range []string{"lower/etc", "lower/proc", "lower/vol", "lower/old", "lower/tmp", "lower/bin", "upper", "work", "merged", "volume"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"lower/etc/hosts": "", "lower/etc/passwd": "the container's", "lower/bin/tool": "of the image",
		"volume/file": "shared", "volume/hosts": "mounted", "outside": "the host's",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range options {
		where := filepath.Join(dir, o)
		if o == "chroot-to-volume" {
			where = filepath.Join(dir, "lower", o)
		}
		if err := os.WriteFile(where, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/proc/self/exe", "container", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	pid := begin(t, cmd, cgroup)
	c := &rooted{local: node.New(node.Config{}), pid: pid, dir: dir, inside: fmt.Sprintf("/proc/%d/root", pid), t: t}
	var err error
	if c.Container, err = c.local.Container(t.Context(), filepath.Base(cgroup), pid); err != nil {
		t.Fatal(err)
	}
	return c
}

// begin starts a process that says ready, in a cgroup or ("") this one's.
func begin(t testing.TB, cmd *exec.Cmd, cgroup string) int {
	t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	cmd.Stdout = w
	var where nodetest.In
	if cgroup != "" {
		where.Cgroups = []string{cgroup}
	}
	nodetest.Start(t, where, cmd)
	w.Close()
	defer out.Close()
	_ = out.SetReadDeadline(time.Now().Add(10 * time.Second))
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "ready\n" {
		nodetest.Missing(t, "what a container needs: %q, %v", said, err)
	}
	return cmd.Process.Pid
}

// write makes a file in the container.
func (c *rooted) write(name, content string, mode os.FileMode) string {
	c.t.Helper()
	path := filepath.Join(c.inside, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		c.t.Fatal(err)
	}
	return path
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// request is a step for a path in the container.
func (c *rooted) request(id, path string) *Request {
	fields, err := json.Marshal(map[string]any{"fd.name": path})
	if err != nil {
		c.t.Fatal(err)
	}
	a, err := alert.Parse(fmt.Appendf(nil, `{"rule":"R","priority":"Critical","output_fields":%s}`, fields))
	if err != nil {
		c.t.Fatal(err)
	}
	s := &broker.Step{ID: id, AlertID: a.ID, Rule: "r", Action: broker.Action{Responder: "quarantine-file"}}
	return &Request{Step: s, Alert: a, Container: c.Container}
}

// quarantine is the responder with a store of its own.
func (c *rooted) quarantine(conf evidence.Config) *fileQuarantine {
	c.t.Helper()
	if conf.Dir == "" {
		conf.Dir = filepath.Join(c.t.TempDir(), "evidence")
	}
	store, err := evidence.Open(conf)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { store.Close() })
	return quarantineFile().New(Env{Local: c.local, Evidence: store}).(*fileQuarantine)
}

func tryOn(t testing.TB, r Responder, req *Request) (Result, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return r.Act(ctx, req)
}

func TestQuarantineFile(t *testing.T) {
	c := startContainer(t)
	q := c.quarantine(evidence.Config{PerTarget: 3})
	path := c.write("tmp/dropped", "#!/bin/sh\nevil\n", 0o750)
	when := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)
	for _, err := range []error{
		os.Chown(path, 1234, 5678), os.Chmod(path, 0o750|os.ModeSetuid),
		unix.Setxattr(path, "trusted.stoop-test", []byte("a\x00b"), 0), os.Chtimes(path, when, when),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	req := c.request("s1", "/tmp/dropped")
	p, err := c.local.Process(c.pid, 0, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	req.Process = p
	res, err := tryOn(t, q, req)
	if err != nil || res.Nothing || res.Undo == nil || exists(path) {
		t.Fatalf("result %+v, error %v, there: %t", res, err, exists(path))
	}
	if wrong, err := q.store.Verify(t.Context(), "s1"); err != nil || len(wrong) > 0 {
		t.Errorf("verify: %q, %v", wrong, err)
	}
	r, _, err := q.store.Read("s1", pieceContent)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := io.ReadAll(r)
	r.Close()
	if err != nil || string(kept) != "#!/bin/sh\nevil\n" {
		t.Errorf("kept %q, %v", kept, err)
	}

	undo := func() (Result, error) {
		return q.Undo(t.Context(), &UndoRequest{ID: "s1", Record: res.Undo})
	}
	// Not over a file that is there by now, nor through a link.
	for what, put := range map[string]func() error{
		"another file":    func() error { return os.WriteFile(path, []byte("new"), 0o600) },
		"a symbolic link": func() error { return os.Symlink("/etc/passwd", path) },
		"a folder":        func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if _, err := undo(); !as[*refusal](err) {
			t.Errorf("put back over %s: %v", what, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(c.inside, "etc/passwd")); err != nil || string(b) != "the container's" {
		t.Errorf("what a link points at is now %q, %v", b, err)
	}
	u, err := undo()
	if err != nil || u.Nothing {
		t.Fatalf("undo: %+v, %v", u, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 10)
	n, err := unix.Getxattr(path, "trusted.stoop-test", value)
	b, rerr := os.ReadFile(path)
	if rerr != nil || string(b) != string(kept) || st.Mode != unix.S_IFREG|0o4750 || st.Uid != 1234 || st.Gid != 5678 ||
		st.Mtim.Nano() != when.UnixNano() || err != nil || string(value[:n]) != "a\x00b" {
		t.Errorf("back: %q, %v, mode %o, owner %d:%d, mtime %d, attribute %q, %v", b, rerr, st.Mode, st.Uid, st.Gid, st.Mtim.Nano(), value[:max(n, 0)], err)
	}
	if u, err := undo(); err != nil || !u.Nothing {
		t.Errorf("undo once more: %+v, %v", u, err)
	}
	if left, err := filepath.Glob(filepath.Join(c.inside, "tmp/.stoop-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// What a file that is put back is comes from the evidence, and that may have been
// changed.
func TestQuarantineFilePutsBackOnlyWhatItTook(t *testing.T) {
	c := startContainer(t)
	for _, piece := range []string{pieceContent, pieceFile} {
		q := c.quarantine(evidence.Config{})
		path := c.write("tmp/dropped", "evil", 0o600)
		res, err := tryOn(t, q, c.request("s1", "/tmp/dropped"))
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(res.Found["evidence"], piece)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(strings.NewReplacer("evil", "evim", `"mode": 384`, `"mode": 511`).Replace(string(b))), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := q.Undo(t.Context(), &UndoRequest{ID: "s1", Record: res.Undo}); !as[*refusal](err) || exists(path) {
			t.Errorf("%s was changed: %v, there: %t", piece, err, exists(path))
		}
		if left, _ := filepath.Glob(filepath.Join(c.inside, "tmp/.stoop-*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

func TestQuarantineFileUndoIsForTheSameContainer(t *testing.T) {
	c := startContainer(t)
	q := c.quarantine(evidence.Config{})
	c.write("tmp/dropped", "evil", 0o600)
	res, err := tryOn(t, q, c.request("s1", "/tmp/dropped"))
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		change func(*quarantined)
		gone   bool
	}{
		"another boot":      {func(r *quarantined) { r.Boot = "x" }, true},
		"another cgroup":    {func(r *quarantined) { r.Inode++ }, true},
		"another container": {func(r *quarantined) { r.Container = nodetest.ID() }, false},
		"no record":         {func(r *quarantined) { *r = quarantined{} }, false},
		"no evidence":       {func(r *quarantined) { r.Case = "s2" }, false},
	} {
		var rec quarantined
		if err := json.Unmarshal(res.Undo, &rec); err != nil {
			t.Fatal(err)
		}
		c.change(&rec)
		b, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := q.Undo(t.Context(), &UndoRequest{ID: "s1", Record: b}); err == nil || isGone(err) != c.gone {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// The tricks of whoever chooses the path and what is there. Each is refused, or
// leads to nothing, and harms no file of anybody's.
func TestQuarantineFileTricks(t *testing.T) {
	c := startContainer(t)
	in := func(name string) string { return filepath.Join(c.inside, name) }
	host := filepath.Join(c.dir, "outside")
	c.write("tmp/file", "x", 0o600)
	c.write("tmp/large", strings.Repeat("x", 2048), 0o600)
	for _, err := range []error{
		os.Symlink("/etc/passwd", in("tmp/link")), os.Symlink(c.dir, in("tmp/to-host")), os.Symlink("../../../../../../../.."+c.dir, in("tmp/up")),
		os.Symlink("/vol", in("tmp/to-volume")), os.Symlink("/proc/self/root", in("tmp/magic")), os.Symlink("loop", in("tmp/loop")),
		unix.Mkfifo(in("tmp/fifo"), 0o600), unix.Mknod(in("tmp/device"), unix.S_IFCHR|0o600, 1<<8|3), os.Mkdir(in("tmp/folder"), 0o700),
		unix.Mknod(in("tmp/socket"), unix.S_IFSOCK|0o600, 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := snapshot(t, c)
	q := c.quarantine(evidence.Config{})
	for path, want := range map[string]string{
		"/tmp/link":                            "a symbolic link",
		"/tmp/fifo":                            "a FIFO",
		"/tmp/device":                          "a device",
		"/tmp/folder":                          "a folder",
		"/tmp/socket":                          "a socket",
		"/tmp/folder/":                         "a folder",
		"/tmp/folder/..":                       "a folder",
		"/tmp/large":                           "at most 1024",
		"/vol/file":                            "another mount",
		"/tmp/to-volume/file":                  "another mount",
		"/etc/../vol/./file":                   "another mount",
		"/etc/hosts":                           "another mount",
		"/proc/1/comm":                         "another mount",
		"/proc/1/root" + host:                  "another mount",
		"/tmp/magic" + host:                    "another mount",
		"/tmp/to-host/outside":                 "gone",
		"/tmp/up/outside":                      "gone",
		"/../../../../../.." + host:            "gone",
		host:                                   "gone",
		"/tmp/loop/x":                          "symbolic links",
		"/tmp/none":                            "gone",
		"/tmp/file/x":                          "gone",
		"tmp/file":                             "no absolute path",
		"10.0.0.1:80->10.0.0.2:1":              "no absolute path",
		"":                                     "no field",
		"/tmp/a\x00b":                          "no absolute path",
		"/" + strings.Repeat("x/", 3000) + "x": "no absolute path",
	} {
		req := c.request("s1", path)
		req.Step.Params = json.RawMessage(`{"maxSize":"1KiB"}`)
		res, err := tryOn(t, q, req)
		switch {
		case err == nil:
			t.Errorf("%q was taken: %+v", path, res)
		case want == "gone":
			if !isGone(err) {
				t.Errorf("%q: %v, want that it is gone", path, err)
			}
		case !as[*refusal](err) || !strings.Contains(err.Error(), want):
			t.Errorf("%q: %v, want %q", path, err, want)
		}
	}
	if after := snapshot(t, c); !slices.Equal(before, after) {
		t.Errorf("files were\n%q\nand are\n%q", before, after)
	}
	if cases, err := q.store.Cases(); err != nil || len(cases) != 0 {
		t.Errorf("cases are left: %+v, %v", cases, err)
	}
}

// snapshot lists all files that a trick could reach.
func snapshot(t testing.TB, c *rooted) (files []string) {
	t.Helper()
	for _, dir := range []string{c.dir, filepath.Join(c.inside, "tmp"), filepath.Join(c.inside, "etc"), filepath.Join(c.inside, "vol")} {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			files = append(files, path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(files)
	return files
}

// Roots that are no container's own.
func TestQuarantineFileKnowsTheRoot(t *testing.T) {
	t.Run("no overlay", func(t *testing.T) {
		c := startContainer(t, "no-overlay")
		path := c.write("tmp/file", "x", 0o600)
		if _, err := tryOn(t, c.quarantine(evidence.Config{}), c.request("s1", "/tmp/file")); !as[*refusal](err) || !strings.Contains(err.Error(), "no overlay") || !exists(path) {
			t.Errorf("%v, there: %t", err, exists(path))
		}
	})
	// Its first process made a volume its root: the path still means a file of
	// the container's.
	t.Run("chroot", func(t *testing.T) {
		c := startContainer(t, "chroot-to-volume")
		if _, err := tryOn(t, c.quarantine(evidence.Config{}), c.request("s1", "/file")); !isGone(err) {
			t.Error(err)
		}
		// And the process that raised the alert means another one.
		req := c.request("s2", "/etc/passwd")
		p, err := c.local.Process(c.pid, 0, c.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		req.Process = p
		if _, err := tryOn(t, c.quarantine(evidence.Config{}), req); !as[*refusal](err) || !strings.Contains(err.Error(), "sees other files") {
			t.Error(err)
		}
		if !exists(filepath.Join(c.dir, "volume/file")) || !exists(filepath.Join(c.dir, "lower/etc/passwd")) {
			t.Error("a file is gone")
		}
	})
	t.Run("the host's mounts", func(t *testing.T) {
		cgroup := nodetest.CgroupV2(t)
		cmd := nodetest.Shell(t, cgroup, "sleep 60")
		c := &rooted{local: node.New(node.Config{}), t: t}
		var err error
		if c.Container, err = c.local.Container(t.Context(), filepath.Base(cgroup), cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := tryOn(t, c.quarantine(evidence.Config{}), c.request("s1", file)); err == nil || !exists(file) {
			t.Errorf("%v, there: %t", err, exists(file))
		} else if !strings.Contains(err.Error(), "host's own mounts") {
			t.Error(err)
		}
	})
	t.Run("the host", func(t *testing.T) {
		q := &fileQuarantine{}
		c := &rooted{t: t}
		req := c.request("s1", "/etc/passwd")
		req.Container = nil
		if err := q.Check(t.Context(), req); !errors.Is(err, errHost) {
			t.Error(err)
		}
		if _, err := q.Act(t.Context(), req); !errors.Is(err, errHost) {
			t.Error(err)
		}
	})
}

// Other names of the file stay, and are told of; a file of the image goes like
// one that was written later.
func TestQuarantineFileWithMoreNames(t *testing.T) {
	c := startContainer(t)
	path := c.write("tmp/one", "x", 0o600)
	other := filepath.Join(c.inside, "tmp/two")
	if err := os.Link(path, other); err != nil {
		t.Fatal(err)
	}
	q := c.quarantine(evidence.Config{})
	res, err := tryOn(t, q, c.request("s1", "/tmp/one"))
	if err != nil || exists(path) || !exists(other) || !strings.Contains(res.Reason, "1 more names") {
		t.Errorf("%+v, %v, there: %t and %t", res, err, exists(path), exists(other))
	}
	res, err = tryOn(t, q, c.request("s2", "/bin/tool"))
	if err != nil || exists(filepath.Join(c.inside, "bin/tool")) || !exists(filepath.Join(c.dir, "lower/bin/tool")) {
		t.Errorf("a file of the image: %+v, %v", res, err)
	}
	if _, err := q.Undo(t.Context(), &UndoRequest{ID: "s2", Record: res.Undo}); err != nil || !exists(filepath.Join(c.inside, "bin/tool")) {
		t.Errorf("back: %v", err)
	}
}

// The file is not the one any more that was kept.
func TestQuarantineFileIsNotFooledMeanwhile(t *testing.T) {
	c := startContainer(t)
	for what, change := range map[string]func(path string) error{
		"written to": func(path string) error { return os.WriteFile(path, []byte("other"), 0o600) },
		"replaced": func(path string) error {
			if err := os.Rename(path, path+"-moved"); err != nil {
				return err
			}
			return os.WriteFile(path, []byte("evil!"), 0o600)
		},
		"a link": func(path string) error {
			return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path))
		},
	} {
		path := c.write("tmp/file", "evil!", 0o600)
		at, err := place(c.Container, "/tmp/file")
		if err != nil {
			t.Fatal(err)
		}
		_, err = child.New().Take(t.Context(), at, 1000, func(_ child.File, content io.Reader) error {
			if _, err := io.Copy(io.Discard, content); err != nil {
				return err
			}
			return change(path)
		})
		if err == nil || !exists(path) {
			t.Errorf("%s: error %v, there: %t", what, err, exists(path))
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// Somebody makes a file at the place while it is put back.
func TestQuarantineFilePutsBackOverNothing(t *testing.T) {
	c := startContainer(t)
	path := filepath.Join(c.inside, "tmp/file")
	at, err := place(c.Container, "/tmp/file")
	if err != nil {
		t.Fatal(err)
	}
	late := readerFunc(func(b []byte) (int, error) {
		if exists(path) {
			return 0, io.EOF
		}
		return copy(b, "evil"), os.WriteFile(path, []byte("new"), 0o600)
	})
	sum := sha256.Sum256([]byte("evil"))
	_, err = child.New().PutBack(t.Context(), at, child.File{Path: "/tmp/file", Size: 4, Mode: 0o600}, hex.EncodeToString(sum[:]), late)
	var no *child.Refusal
	if b, rerr := os.ReadFile(path); !errors.As(err, &no) || rerr != nil || string(b) != "new" {
		t.Errorf("%v, and there is %q, %v", err, b, rerr)
	}
	if left, _ := filepath.Glob(filepath.Join(c.inside, "tmp/.stoop-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// What can't be kept stays where it is.
func TestQuarantineFileKeepsFirst(t *testing.T) {
	c := startContainer(t)
	path := c.write("tmp/file", strings.Repeat("x", 100_000), 0o600)
	q := c.quarantine(evidence.Config{Size: 64 << 10})
	if _, err := tryOn(t, q, c.request("s1", "/tmp/file")); !as[*refusal](err) || !strings.Contains(err.Error(), "full") || !exists(path) {
		t.Errorf("a store without room: %v, there: %t", err, exists(path))
	}
	q = c.quarantine(evidence.Config{PerTarget: 1})
	if _, err := tryOn(t, q, c.request("s1", "/tmp/file")); err != nil {
		t.Fatal(err)
	}
	c.write("tmp/file", "again", 0o600)
	if _, err := tryOn(t, q, c.request("s2", "/tmp/file")); !as[*refusal](err) || !exists(path) {
		t.Errorf("one too many of a target: %v, there: %t", err, exists(path))
	}
	if cases, err := q.store.Cases(); err != nil || len(cases) != 1 {
		t.Errorf("cases %+v, %v", cases, err)
	}
}

// Killed between any two of its parts, the step ends well the second time.
func TestQuarantineFileGoesOnAfterACrash(t *testing.T) {
	c := startContainer(t)
	path := c.write("tmp/file", "evil", 0o600)
	dir := filepath.Join(t.TempDir(), "evidence")
	q := c.quarantine(evidence.Config{Dir: dir})
	crashed := errors.New("crashed")
	// run is the step up to where it is killed; stoop is then started anew.
	run := func(until func(taking *taking, f child.File, content io.Reader) error) {
		t.Helper()
		kept, err := q.store.Begin(t.Context(), evidence.About{Step: "s1", Responder: "quarantine-file"})
		if err != nil {
			t.Fatal(err)
		}
		at, err := place(c.Container, "/tmp/file")
		if err != nil {
			t.Fatal(err)
		}
		_, err = q.children.Take(t.Context(), at, 1000, func(f child.File, content io.Reader) error {
			if err := until(&taking{fileQuarantine: q, kept: kept}, f, content); err != nil {
				return err
			}
			return crashed
		})
		if !errors.Is(err, crashed) || !exists(path) {
			t.Fatalf("error %v, there: %t", err, exists(path))
		}
		q = c.quarantine(evidence.Config{Dir: dir})
	}
	run(func(k *taking, f child.File, content io.Reader) error { // the content is kept, the rest is not
		_, err := k.kept.Add(t.Context(), pieceContent, content, -1)
		return err
	})
	run(func(k *taking, f child.File, content io.Reader) error { return k.keep(t.Context(), f, content) }) // all but the unlink

	req := c.request("s1", "/tmp/file")
	req.Resumed = true
	res, err := tryOn(t, q, req)
	if err != nil || res.Undo == nil || exists(path) {
		t.Fatalf("resumed: %+v, %v, there: %t", res, err, exists(path))
	}
	// Killed after the unlink.
	res, err = tryOn(t, q, req)
	if err != nil || res.Undo == nil {
		t.Errorf("resumed again: %+v, %v", res, err)
	}
	// And another file is there by then.
	c.write("tmp/file", "new", 0o600)
	res, err = tryOn(t, q, req)
	if err != nil || res.Undo == nil || !strings.Contains(res.Reason, "another file") || !exists(path) {
		t.Errorf("with another file there: %+v, %v, there: %t", res, err, exists(path))
	}
	if wrong, err := q.store.Verify(t.Context(), "s1"); err != nil || len(wrong) > 0 {
		t.Errorf("verify: %q, %v", wrong, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Undo(t.Context(), &UndoRequest{ID: "s1", Record: res.Undo}); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "evil" {
		t.Errorf("back is %q, %v", b, err)
	}
}

// It works on a frozen container, whose processes answer nothing.
func TestQuarantineFileInAFrozenContainer(t *testing.T) {
	c := startContainer(t)
	path := c.write("tmp/file", "x", 0o600)
	if _, err := c.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := tryOn(t, c.quarantine(evidence.Config{}), c.request("s1", "/tmp/file")); err != nil || exists(path) {
		t.Errorf("%v, there: %t", err, exists(path))
	}
	t.Logf("it took %s", time.Since(began))
}
