package evidence

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

func open(t testing.TB, c Config) *Store {
	t.Helper()
	s, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func about(step string) About {
	return About{Step: step, Alert: "a1", Rule: "r", Responder: "capture-proc", Target: "c1"}
}

func begin(t testing.TB, s *Store, a About) *Case {
	t.Helper()
	c, err := s.Begin(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func add(t testing.TB, c *Case, name, content string) Piece {
	t.Helper()
	p, err := c.Add(t.Context(), name, strings.NewReader(content), -1)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func finish(t testing.TB, c *Case) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func verified(t testing.TB, s *Store, step string) {
	t.Helper()
	if wrong, err := s.Verify(t.Context(), step); err != nil || len(wrong) > 0 {
		t.Errorf("verify %s: %q, %v", step, wrong, err)
	}
}

func TestACaseIsKept(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "data", "evidence")
	s := open(t, Config{Dir: dir, Size: 1 << 20, PerTarget: 3})
	c := begin(t, s, about("0123456789abcdef0123"))
	content := strings.Repeat("what it was ", 20_000)
	p := add(t, c, "17.maps", content)
	if want := (Piece{Name: "17.maps", Size: int64(len(content)), SHA256: sum([]byte(content))}); p != want {
		t.Errorf("the piece is %+v, want %+v", p, want)
	}
	c.Note("one of %d was not there", 2)
	finish(t, c)

	b, err := os.ReadFile(filepath.Join(c.Path(), "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Sum() != sum(b) {
		t.Error("the manifest's sum is not its SHA-256")
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	if m.About != about("0123456789abcdef0123") || !m.Finished() || time.Since(m.Ended) > time.Minute || m.Ended.Before(m.Begun) ||
		!slices.Equal(m.Pieces, []Piece{p}) || !slices.Equal(m.Notes, []string{"one of 2 was not there"}) {
		t.Errorf("the manifest is %s", b)
	}
	for path, want := range map[string]os.FileMode{
		dir: os.ModeDir | 0o700, c.Path(): os.ModeDir | 0o700, filepath.Join(c.Path(), "17.maps"): 0o600, filepath.Join(c.Path(), "manifest.json"): 0o600,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s has the mode %v (%v)", path, info.Mode(), err)
		}
	}
	verified(t, s, m.Step)
	r, got, err := s.Read(m.Step, "17.maps")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if back, err := io.ReadAll(r); err != nil || string(back) != content || got != p {
		t.Errorf("read back %d bytes of %+v, %v", len(back), got, err)
	}
	if _, err := c.Add(t.Context(), "late", strings.NewReader("x"), -1); err == nil {
		t.Error("a closed case takes more")
	}
}

// The manifest is complete when it appears: neither a reader nor a crash finds
// half of one.
func TestTheManifestAppearsAtOnce(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	for i := range 2000 {
		c.put(Piece{Name: fmt.Sprintf("p%d", i)})
	}
	stop, reader := make(chan struct{}), sync.WaitGroup{}
	reads := 0
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.manifest("s1"); err != nil {
				t.Errorf("read while it is written: %v", err)
				return
			}
			reads++
		}
	})
	for range 50 {
		if err := c.write(false); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	reader.Wait()
	if reads == 0 {
		t.Skip("the reader had no turn")
	}
}

func TestNamesStayInTheFolder(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	names := []string{
		"../../etc/passwd", "/etc/shadow", "..", ".", "", "manifest.json", "%6Danifest.json", ".part-x", "a\x00b", "a\nb", "a%b", "a%25b",
		"\xff\xfe", strings.Repeat("n", 5000), strings.Repeat("n", 4999) + "m", "naïve", "C:\\x",
	}
	listed := make([]string, len(names))
	for i, name := range names {
		listed[i] = add(t, c, name, fmt.Sprint(i)).Name
	}
	finish(t, c)
	verified(t, s, "s1")
	entries, err := os.ReadDir(c.Path())
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(names)+1 {
		t.Errorf("%d names became %d files", len(names), len(entries)-1)
	}
	for _, e := range entries {
		if e.Name() != "manifest.json" && !isName(e.Name()) || len(e.Name()) > 200 || strings.ContainsAny(e.Name(), "\n\\") || !utf8.ValidString(e.Name()) {
			t.Errorf("a file is called %q", e.Name())
		}
	}
	for i, name := range names {
		r, _, err := s.Read("s1", listed[i])
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if b, _ := io.ReadAll(r); string(b) != fmt.Sprint(i) {
			t.Errorf("%q has the content of %s", name, b)
		}
		r.Close()
	}
	for _, step := range []string{"", "..", ".", "a/b", "../x", ".x", strings.Repeat("x", 200), "a b", "a\x00"} {
		if _, err := s.Begin(t.Context(), about(step)); err == nil {
			t.Errorf("a case of the step %q was begun", step)
		}
		if _, err := s.Case(step); !errors.Is(err, ErrNoCase) {
			t.Errorf("the case of the step %q: %v", step, err)
		}
	}
}

// A manifest that somebody changed names a file outside.
func TestAManifestLeadsNowhere(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: filepath.Join(dir, "evidence")})
	c := begin(t, s, about("s1"))
	add(t, c, "x", "x")
	finish(t, c)
	if err := os.WriteFile(filepath.Join(dir, "outside"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(c.Path(), "manifest.json")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.ReplaceAll(b, []byte(`"name": "x"`), []byte(`"name": "../../outside"`)), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, _, err := s.Read("s1", "../../outside"); err == nil {
		r.Close()
		t.Error("a file outside was read")
	}
	// Not into another case either.
	other := begin(t, s, about("s2"))
	add(t, other, "y", "another's")
	finish(t, other)
	if err := os.WriteFile(file, bytes.ReplaceAll(b, []byte(`"name": "x"`), []byte(`"name": "../s2/y"`)), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, _, err := s.Read("s1", "../s2/y"); err == nil {
		r.Close()
		t.Error("another case's file was read")
	}
	// A symbolic link in the place of a piece.
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(c.Path(), "x")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("manifest.json", filepath.Join(c.Path(), "x")); err != nil {
		t.Fatal(err)
	}
	if r, _, err := s.Read("s1", "x"); err == nil {
		r.Close()
		t.Error("a symbolic link was followed")
	}
}

func TestVerifyFindsWhatWasChanged(t *testing.T) {
	for name, c := range map[string]struct {
		change func(dir string) error
		want   string
	}{
		"a byte":      {func(d string) error { return os.WriteFile(filepath.Join(d, "x"), []byte("ten bytez\n"), 0o600) }, "x has the SHA-256"},
		"the length":  {func(d string) error { return os.WriteFile(filepath.Join(d, "x"), nil, 0o600) }, "x has 0 bytes, it had 10"},
		"taken away":  {func(d string) error { return os.Remove(filepath.Join(d, "x")) }, "x can't be read"},
		"one more":    {func(d string) error { return os.WriteFile(filepath.Join(d, "y"), nil, 0o600) }, "y is in no manifest"},
		"not changed": {func(string) error { return nil }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, Config{Dir: t.TempDir()})
			k := begin(t, s, about("s1"))
			add(t, k, "x", "ten bytes\n")
			finish(t, k)
			if err := c.change(k.Path()); err != nil {
				t.Fatal(err)
			}
			wrong, err := s.Verify(t.Context(), "s1")
			if err != nil || len(wrong) != min(1, len(c.want)) || c.want != "" && !strings.HasPrefix(wrong[0], c.want) {
				t.Errorf("verify: %q, %v", wrong, err)
			}
		})
	}
}

func TestAPieceIsCut(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	for max, want := range map[int64]Piece{
		-1: {Size: 10, SHA256: sum([]byte("0123456789"))},
		10: {Size: 10, SHA256: sum([]byte("0123456789"))},
		4:  {Size: 4, SHA256: sum([]byte("0123")), Cut: true},
		0:  {Size: 0, SHA256: sum(nil), Cut: true},
	} {
		want.Name = fmt.Sprintf("p%d", max)
		if max < 0 {
			want.Name = "all"
		}
		for _, r := range []io.Reader{strings.NewReader("0123456789"), iotest.OneByteReader(strings.NewReader("0123456789")), iotest.DataErrReader(strings.NewReader("0123456789"))} {
			if p, err := c.Add(t.Context(), want.Name, r, max); err != nil || p != want {
				t.Errorf("at most %d: %+v, %v", max, p, err)
			}
		}
	}
	// The source's fault is the piece's, and what was read stays.
	broken := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("no such process")))
	if p, err := c.Add(t.Context(), "broken", broken, -1); err != nil || p.Error != "no such process" || p.Size != 4 || p.SHA256 != sum([]byte("half")) || p.Whole() {
		t.Errorf("a source that fails: %+v, %v", p, err)
	}
	if p, err := c.Add(t.Context(), "none", iotest.ErrReader(errors.New("no")), -1); err != nil || p.Error != "no" || p.SHA256 != "" {
		t.Errorf("a source that fails at once: %+v, %v", p, err)
	}
	if p, err := c.Add(t.Context(), "endless", zeros{}, -1); err != nil || p.Error != io.ErrNoProgress.Error() {
		t.Errorf("a source that says nothing: %+v, %v", p, err)
	}
	finish(t, c)
	verified(t, s, "s1")
}

type zeros struct{}

func (zeros) Read([]byte) (int, error) { return 0, nil }

func TestAddHonoursItsContext(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	ctx, cancel := context.WithCancel(t.Context())
	r := readerFunc(func(b []byte) (int, error) { cancel(); return len(b), nil })
	p, err := c.Add(ctx, "endless", r, -1)
	if !errors.Is(err, context.Canceled) || p.Size == 0 || p.Whole() {
		t.Errorf("piece %+v, error %v", p, err)
	}
	finish(t, c)
	verified(t, s, "s1")
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// A piece is never whole in memory.
func TestAddStreams(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const size = 64 << 20
	p, err := c.Add(t.Context(), "big", io.LimitReader(rand.NewChaCha8([32]byte{}), size), -1)
	runtime.ReadMemStats(&after)
	if err != nil || p.Size != size {
		t.Fatalf("%+v, %v", p, err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("a piece of %d bytes took %d bytes of memory", size, n)
	}
}

// onDisk is what the store's files take, counted apart from the store.
func onDisk(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			n += (info.Size() + 4095) / 4096 * 4096
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTheSizeIsLimitedOverRestarts(t *testing.T) {
	dir := t.TempDir()
	conf := Config{Dir: dir, Size: 100_000}
	s := open(t, conf)
	c := begin(t, s, about("s1"))
	add(t, c, "first", strings.Repeat("x", 60_000))
	finish(t, c)
	if s.Used() != onDisk(t, dir) {
		t.Errorf("%d bytes are counted, %d are there", s.Used(), onDisk(t, dir))
	}
	s.Close()

	s = open(t, conf)
	if s.Used() != onDisk(t, dir) {
		t.Errorf("after a restart %d bytes are counted, %d are there", s.Used(), onDisk(t, dir))
	}
	c = begin(t, s, about("s2"))
	p, err := c.Add(t.Context(), "second", strings.NewReader(strings.Repeat("y", 60_000)), -1)
	if err != nil || !p.Cut || !strings.Contains(p.Error, "full") || p.Size < 20_000 || p.Size > 40_000 {
		t.Errorf("what exceeds the size: %+v, %v", p, err)
	}
	if p, err := c.Add(t.Context(), "third", strings.NewReader("z"), -1); err != nil || !p.Cut || p.Size != 0 || p.SHA256 != "" || !strings.Contains(p.Error, "full") {
		t.Errorf("with no room at all: %+v, %v", p, err)
	}
	finish(t, c)
	verified(t, s, "s2")
	if n := onDisk(t, dir); n > conf.Size || s.Used() != n {
		t.Errorf("%d bytes are there, %d are counted, %d may be", n, s.Used(), conf.Size)
	}
	_, err = s.Begin(t.Context(), about("s3"))
	if !errors.Is(err, ErrFull) {
		t.Errorf("a case in a full store: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "s3")); !os.IsNotExist(err) {
		t.Errorf("it has a folder: %v", err)
	}
	// Somebody makes room by hand.
	if err := os.RemoveAll(filepath.Join(dir, "s1")); err != nil {
		t.Fatal(err)
	}
	finish(t, begin(t, s, about("s3")))
	// And by the store.
	if err := s.Remove("s2"); err != nil {
		t.Fatal(err)
	}
	if s.Used() != onDisk(t, dir) {
		t.Errorf("%d bytes are counted, %d are there", s.Used(), onDisk(t, dir))
	}
	if err := s.Remove("s2"); !errors.Is(err, ErrNoCase) {
		t.Errorf("removed twice: %v", err)
	}
}

// A piece that is written anew counts once.
func TestAPieceInTheOthersPlaceCountsOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, Size: 1 << 20})
	c := begin(t, s, about("s1"))
	for _, n := range []int{300_000, 10, 200_000} {
		add(t, c, "x", strings.Repeat("x", n))
	}
	finish(t, c)
	if len(c.Manifest().Pieces) != 1 || s.Used() != onDisk(t, dir) {
		t.Errorf("%d pieces, %d bytes are counted, %d are there", len(c.Manifest().Pieces), s.Used(), onDisk(t, dir))
	}
	verified(t, s, "s1")
}

func TestTheFirstOfATargetAreKept(t *testing.T) {
	dir := t.TempDir()
	conf := Config{Dir: dir, PerTarget: 2}
	s := open(t, conf)
	for _, step := range []string{"s1", "s2"} {
		finish(t, begin(t, s, about(step)))
	}
	refused := func(s *Store) {
		t.Helper()
		if _, err := s.Begin(t.Context(), about("s3")); !errors.Is(err, ErrEnough) {
			t.Errorf("a third case of one target: %v", err)
		}
	}
	refused(s)
	other := about("s4")
	other.Target = "c2"
	finish(t, begin(t, s, other))
	other = about("s5")
	other.Responder = "quarantine-file"
	finish(t, begin(t, s, other))
	// The one that a step began goes on.
	finish(t, begin(t, s, about("s2")))
	s.Close()
	s = open(t, conf)
	refused(s)
	finish(t, begin(t, s, about("s1")))
	refused(s)
	// One in which there was nothing makes room.
	c := begin(t, s, about("s1"))
	if err := c.Discard(); err != nil {
		t.Fatal(err)
	}
	finish(t, begin(t, s, about("s3")))
	cases, err := s.Cases()
	var steps []string
	for _, m := range cases {
		steps = append(steps, m.Step)
	}
	if err != nil || !slices.Equal(steps, []string{"s2", "s4", "s5", "s3"}) {
		t.Errorf("the cases are %q, %v", steps, err)
	}
}

func TestACaseIsFilledOnce(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	c := begin(t, s, about("s1"))
	if _, err := s.Begin(t.Context(), about("s1")); err == nil {
		t.Error("a case is filled twice at once")
	}
	if err := s.Remove("s1"); err == nil {
		t.Error("a case was removed while it is filled")
	}
	finish(t, c)
	finish(t, begin(t, s, about("s1")))
}

// Killed in the middle: what was whole stays, what was half goes, the case goes
// on.
func TestACaseGoesOnAfterACrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, PerTarget: 1})
	c := begin(t, s, about("s1"))
	add(t, c, "kept", "from the first run")
	add(t, c, "again", "old")
	begun := c.Manifest().Begun
	half := filepath.Join(c.Path(), partial+"half")
	if err := os.WriteFile(half, bytes.Repeat([]byte("x"), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Close() // never closed: the process was killed

	s = open(t, Config{Dir: dir, PerTarget: 1})
	if wrong, err := s.Verify(t.Context(), "s1"); err != nil || !slices.Contains(wrong, "the case was never finished") {
		t.Errorf("verify says %q, %v", wrong, err)
	}
	c = begin(t, s, about("s1"))
	if c.WasFinished() {
		t.Error("a case that was cut off counts as finished")
	}
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("half a piece is left: %v", err)
	}
	add(t, c, "again", "new")
	if p, err := c.Add(t.Context(), "kept", iotest.ErrReader(errors.New("no such process")), -1); err != nil || p.Error == "" {
		t.Errorf("%+v, %v", p, err)
	}
	finish(t, c)
	verified(t, s, "s1")
	m, err := s.Case("s1")
	if err != nil {
		t.Fatal(err)
	}
	kept, _ := m.Piece("kept")
	again, _ := m.Piece("again")
	if !kept.Earlier || kept.SHA256 != sum([]byte("from the first run")) || again.Earlier || again.SHA256 != sum([]byte("new")) ||
		!m.Begun.Equal(begun) || len(m.Notes) != 2 || !strings.Contains(m.Notes[0], "cut off") || s.Used() != onDisk(t, dir) {
		t.Errorf("the manifest is %+v, %d bytes counted, %d there", m, s.Used(), onDisk(t, dir))
	}

	c = begin(t, s, about("s1"))
	if !c.WasFinished() || len(c.Manifest().Pieces) != 2 {
		t.Errorf("a finished case is taken up as %+v", c.Manifest())
	}
	finish(t, c)
	verified(t, s, "s1")
}

// Without a manifest that can be read the pieces are still there.
func TestABrokenManifest(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	c := begin(t, s, about("s1"))
	add(t, c, "x", "x")
	finish(t, c)
	s.Close()
	if err := os.WriteFile(filepath.Join(dir, "s1", "manifest.json"), []byte(`{"version":1,"pie`), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	cases, err := s.Cases()
	if err != nil || len(cases) != 1 || len(cases[0].Notes) != 1 || cases[0].Step != "s1" {
		t.Errorf("cases %+v, %v", cases, err)
	}
	c = begin(t, s, about("s1"))
	finish(t, c)
	verified(t, s, "s1")
	if p, ok := c.Manifest().Piece("x"); !ok || !p.Earlier {
		t.Errorf("the manifest is %+v", c.Manifest())
	}
}

func TestOpenIsWary(t *testing.T) {
	dir := t.TempDir()
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "file")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{link, file} {
		if s, err := Open(Config{Dir: d}); err == nil {
			s.Close()
			t.Errorf("%s was opened", d)
		}
	}
	wide := filepath.Join(dir, "wide")
	if err := os.Mkdir(wide, 0o755); err != nil {
		t.Fatal(err)
	}
	open(t, Config{Dir: wide})
	if info, err := os.Stat(wide); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder has the mode %v, %v", info.Mode(), err)
	}
}

// A full disk: what was written stays, the error says so, the next goes on when
// there is room.
func TestAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Skipf("needs root: no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, Config{Dir: dir})
	c := begin(t, s, about("s1"))
	p, err := c.Add(t.Context(), "big", io.LimitReader(rand.NewChaCha8([32]byte{}), 1<<20), -1)
	if !errors.Is(err, unix.ENOSPC) || p.Whole() || p.Size == 0 || !p.Cut {
		t.Errorf("piece %+v, error %v", p, err)
	}
	if err := c.Close(); err == nil {
		verified(t, s, "s1")
	} else if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("close: %v", err)
	}
	if err := s.Remove("s1"); err != nil {
		t.Fatal(err)
	}
	c = begin(t, s, about("s2"))
	add(t, c, "small", "x")
	finish(t, c)
	verified(t, s, "s2")
}

func TestManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	const size = 400_000
	s := open(t, Config{Dir: dir, Size: size})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			c, err := s.Begin(t.Context(), about(fmt.Sprintf("s%d", i)))
			if errors.Is(err, ErrFull) {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			for j := range 4 {
				if _, err := c.Add(t.Context(), fmt.Sprint(j), strings.NewReader(strings.Repeat("x", 30_000)), -1); err != nil {
					t.Error(err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	// The manifests are written whatever the limit says.
	if n := onDisk(t, dir); n != s.Used() || n > size+8*4096 || n < size/2 {
		t.Errorf("%d bytes are there, %d are counted", n, s.Used())
	}
}

// BenchmarkClose is what a case of a usual capture costs: 60 small files.
func BenchmarkClose(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir()})
	for i := range b.N {
		c := begin(b, s, about(fmt.Sprintf("s%d", i)))
		for j := range 60 {
			add(b, c, fmt.Sprint(j), "some hundred bytes, as most of what a process shows of itself")
		}
		finish(b, c)
	}
}
