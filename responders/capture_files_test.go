package responders

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stoop/child"
	"stoop/evidence"
)

// fileCapture is one capture of a test's.
type fileCapture struct {
	*fileCapturer
	c *rooted
}

func (c *rooted) capture(conf evidence.Config) fileCapture {
	c.t.Helper()
	conf.Dir = filepath.Join(c.t.TempDir(), "evidence")
	store, err := evidence.Open(conf)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { store.Close() })
	return fileCapture{captureFiles().New(Env{Local: c.local, Evidence: store}).(*fileCapturer), c}
}

func (f fileCapture) act(id, fdName, params string) (Result, error) {
	f.c.t.Helper()
	req := f.c.request(id, fdName)
	req.Step.Params = json.RawMessage(params)
	return tryOn(f.c.t, f.fileCapturer, req)
}

// found reads a case: each file by its path, and what was kept of it.
func (f fileCapture) found(id string) (files map[string]child.FoundFile, contents map[string]string) {
	f.c.t.Helper()
	files, contents = map[string]child.FoundFile{}, map[string]string{}
	for line := range strings.Lines(piece(f.c.t, f.store, id, pieceFiles)) {
		var found child.FoundFile
		if err := json.Unmarshal([]byte(line), &found); err != nil {
			f.c.t.Fatalf("%q: %v", line, err)
		}
		files[found.Path] = found
		if found.Piece != "" {
			contents[found.Path] = piece(f.c.t, f.store, id, found.Piece)
		}
	}
	if wrong, err := f.store.Verify(f.c.t.Context(), id); err != nil || len(wrong) > 0 {
		f.c.t.Errorf("verify: %q, %v", wrong, err)
	}
	return files, contents
}

func TestCaptureFiles(t *testing.T) {
	c := startContainer(t)
	f := c.capture(evidence.Config{})
	in := func(name string) string { return filepath.Join(c.inside, name) }
	for _, dir := range []string{"tmp/deep/deeper", "tmp/other"} {
		if err := os.MkdirAll(in(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c.write("tmp/evil", "of the attacker's", 0o750|os.ModeSetuid)
	c.write("tmp/deep/deeper/a\nb", "with a newline", 0o600)
	c.write("tmp/other/x.log", "log", 0o600)
	for name, target := range map[string]string{
		"tmp/out":    "../../../../../../outside",   // no file of the container's
		"tmp/passwd": "/etc/passwd",                 // the container's, not the host's
		"tmp/folder": "/etc",                        // not entered
		"tmp/magic":  "/proc/self/root/etc/passwd",  // the child's own root, if it were followed
		"tmp/loop":   "loop",                        //
		"tmp/rel":    "../../../../../../bin/tool",  // stays inside
		"tmp/up":     "deep/../../../../etc/passwd", //
	} {
		if err := os.Symlink(target, in(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(in("tmp/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(in("tmp/device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil { // /dev/zero
		t.Fatal(err)
	}
	res, err := f.act("s1", "/vol/../vol/file", `{"paths":["/tmp","/vol/*","/etc/pass?d","/no/such","/proc/version","/proc/*/cmdline"],"fields":["fd.name","proc.exepath"]}`)
	if err != nil || res.Nothing {
		t.Fatalf("%+v, %v", res, err)
	}
	files, contents := f.found("s1")
	want := map[string]string{
		"/vol/../vol/file": "shared", "/vol/file": "shared", "/vol/hosts": "mounted", "/etc/passwd": "the container's",
		"/tmp/evil": "of the attacker's", "/tmp/deep/deeper/a\nb": "with a newline", "/tmp/other/x.log": "log",
		"/tmp/passwd": "the container's", "/tmp/rel": "of the image", "/tmp/up": "the container's",
	}
	for name, content := range want {
		if contents[name] != content {
			t.Errorf("%q holds %q, want %q (%+v)", name, contents[name], content, files[name])
		}
	}
	for name, content := range contents {
		if _, ok := want[name]; !ok {
			t.Errorf("%q was kept too: %.100q", name, content)
		}
	}
	for _, name := range []string{"/tmp/out", "/tmp/folder", "/tmp/magic", "/tmp/loop", "/tmp/fifo", "/tmp/device", "/proc/version"} {
		if got, ok := files[name]; !ok || got.Why == "" || got.Piece != "" {
			t.Errorf("%s: %+v, want it recorded, with why it is not read", name, got)
		}
	}
	if got := files["/tmp/out"].Link; got != "../../../../../../outside" {
		t.Errorf("the link says %q", got)
	}
	if got := files["/tmp/evil"]; got.Mode != 0o4750 || got.Size != int64(len("of the attacker's")) || got.Modify.IsZero() {
		t.Errorf("the file is %+v", got)
	}
	notes := strings.Join(manifestOf(t, f.store, "s1").Notes, "\n")
	for _, say := range []string{`"/no/such" is not there`, "no field proc.exepath"} {
		if !strings.Contains(notes, say) {
			t.Errorf("the manifest's notes do not say %q: %s", say, notes)
		}
	}
	if res.Found["files"] != fmt.Sprint(len(want)) {
		t.Errorf("found %v", res.Found)
	}

	// A second run of the step reads nothing again.
	c.write("tmp/evil", "changed", 0o600)
	if again, err := f.act("s1", "/vol/file", `{"paths":["/tmp"]}`); err != nil || again.Found["evidence"] != res.Found["evidence"] {
		t.Errorf("a second run: %+v, %v", again, err)
	}
	if _, contents := f.found("s1"); contents["/tmp/evil"] != "of the attacker's" {
		t.Errorf("a second run kept %q", contents["/tmp/evil"])
	}
}

func manifestOf(t *testing.T, s *evidence.Store, step string) evidence.Manifest {
	t.Helper()
	m, err := s.Case(step)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCaptureFilesHasLimits(t *testing.T) {
	c := startContainer(t)
	f := c.capture(evidence.Config{})
	big := c.write("tmp/big", "", 0o600)
	if err := os.Truncate(big, 1<<40); err != nil { // sparse
		t.Fatal(err)
	}
	for i := range 50 {
		c.write(fmt.Sprintf("tmp/file-%02d", i), "1234567890", 0o600)
	}
	res, err := f.act("one", "", `{"paths":["/tmp/big"],"maxFile":"1MiB"}`)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := manifestOf(t, f.store, "one").Piece("1.file")
	if p.Size != 1<<20 || !p.Cut {
		t.Errorf("of a file of 1 TiB is kept %+v (%+v)", p, res)
	}
	if _, err := f.act("count", "", `{"paths":["/tmp/file-*"],"files":10}`); err != nil {
		t.Fatal(err)
	}
	if _, contents := f.found("count"); len(contents) != 10 {
		t.Errorf("with files: 10 there are %d", len(contents))
	}
	if m := manifestOf(t, f.store, "count"); !strings.Contains(strings.Join(m.Notes, "\n"), "more than 10 files") {
		t.Errorf("the manifest does not say that there are more: %v", m.Notes)
	}
	if _, err := f.act("all", "", `{"paths":["/tmp"],"maxFile":"1MiB","maxSize":"64KiB"}`); err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, p := range manifestOf(t, f.store, "all").Pieces {
		if p.Name != pieceFiles {
			sum += p.Size
		}
	}
	if sum != 64<<10 {
		t.Errorf("with maxSize: 64KiB there are %d bytes", sum)
	}
}

// What the alert names means one file, and no pattern.
func TestCaptureFilesOfTheAlert(t *testing.T) {
	c := startContainer(t)
	f := c.capture(evidence.Config{})
	for _, bad := range []string{"tmp/x", "/tmp/\x00", "/" + strings.Repeat("a", 5000), ""} {
		res, err := f.act("bad", bad, `{"fields":["fd.name"]}`)
		if !as[*refusal](err) {
			t.Errorf("%.20q: %+v, %v; want a refusal", bad, res, err)
		}
	}
	if steps, err := filepath.Glob(filepath.Join(filepath.Dir(c.dir), "*/evidence/*")); err == nil && len(steps) > 0 {
		t.Errorf("there are cases: %v", steps)
	}
	c.write("tmp/[a]*", "odd", 0o600)
	c.write("tmp/aa", "another", 0o600)
	for id, name := range map[string]string{"glob": "/tmp/[a]*", "folder": "/tmp", "up": "/../../../../../../../etc/passwd", "root": "/proc/1/root/etc/passwd"} {
		if _, err := f.act(id, name, `{"fields":["fd.name"]}`); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if _, contents := f.found("glob"); len(contents) != 1 || contents["/tmp/[a]*"] != "odd" {
		t.Errorf("a path that looks like a pattern: %v", contents)
	}
	if _, contents := f.found("folder"); len(contents) != 0 {
		t.Errorf("a folder that the alert names: %v", contents)
	}
	if _, contents := f.found("up"); len(contents) != 1 || contents["/../../../../../../../etc/passwd"] != "the container's" {
		t.Errorf("a path upwards: %v", contents)
	}
	if m := manifestOf(t, f.store, "root"); len(m.Pieces) != 1 || m.Pieces[0].Name != "alert.json" {
		t.Errorf("through a link of /proc: %v, %v", m.Pieces, m.Notes)
	}
}

func TestCaptureFilesValidate(t *testing.T) {
	for _, bad := range [][]string{{"tmp"}, {"/tmp/[a"}, {"/tmp/../etc"}, {""}, nil} {
		if err := (captureFilesParams{Paths: bad}).Validate(); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if err := (captureFilesParams{Paths: []string{"/tmp/*.log", "/"}}).Validate(); err != nil {
		t.Error(err)
	}
}

// In a frozen container; the container is gone afterwards.
func TestCaptureFilesInAFrozenContainer(t *testing.T) {
	c := startContainer(t)
	f := c.capture(evidence.Config{})
	c.write("tmp/evil", "evil", 0o600)
	if _, err := c.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Thaw(t.Context()) })
	if _, err := f.act("s1", "", `{"paths":["/tmp/*"]}`); err != nil {
		t.Fatal(err)
	}
	if _, contents := f.found("s1"); contents["/tmp/evil"] != "evil" {
		t.Errorf("kept: %v", contents)
	}
	if frozen, err := c.Frozen(); err != nil || !frozen {
		t.Errorf("frozen: %t, %v", frozen, err)
	}
	if _, err := c.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	removed(t, c.Path, c.pid)
	if res, err := f.act("s2", "", `{"paths":["/tmp/*"]}`); !isGone(err) {
		t.Errorf("of a container that is gone: %+v, %v", res, err)
	}
	if _, err := f.store.Case("s2"); !errors.Is(err, evidence.ErrNoCase) {
		t.Error("there is a case of a container that is gone")
	}
}

// The first files of many are the same in every run.
func TestCaptureFilesNamesAreSorted(t *testing.T) {
	c := startContainer(t)
	f := c.capture(evidence.Config{})
	for _, name := range []string{"c", "a", "b"} {
		c.write("tmp/"+name, name, 0o600)
	}
	if _, err := f.act("s1", "", `{"paths":["/tmp"]}`); err != nil {
		t.Fatal(err)
	}
	var order []string
	for line := range strings.Lines(piece(t, f.store, "s1", pieceFiles)) {
		var found child.FoundFile
		if err := json.Unmarshal([]byte(line), &found); err != nil {
			t.Fatal(err)
		}
		order = append(order, found.Path)
	}
	if !slices.IsSorted(order) || len(order) != 3 {
		t.Errorf("the files come as %v", order)
	}
}

// WithFiles is what capture-files looks at.
func WithFiles(t testing.TB) *TestSuspect {
	c := startContainer(t)
	c.write("tmp/dropped", "evil", 0o750)
	return &TestSuspect{
		Container: c.ID, Fields: map[string]any{"fd.name": "/tmp/dropped"},
		Remove: func() { removed(t, c.Path, c.pid) },
	}
}
