package broker

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
)

func openIn(t *testing.T, dir string) (*Broker, error) {
	t.Helper()
	return Open(t.Context(), Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
}

// contents are the files of a folder, by their hash.
func contents(t *testing.T, dir string) map[string][sha256.Size]byte {
	t.Helper()
	all := map[string][sha256.Size]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		all[path] = sha256.Sum256(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// After a downgrade a stoop leaves alone what it can't read, and says so; the
// newer one then finds everything.
func TestNewerFormat(t *testing.T) {
	dir := t.TempDir()
	release, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := openIn(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.State().Put(t.Context(), "kept", "still here", 0); err != nil {
		t.Fatal(err)
	}
	b.Close()
	release()
	mark := filepath.Join(dir, "format")
	if got, err := os.ReadFile(mark); err != nil || string(got) != strconv.Itoa(Format)+"\n" {
		t.Fatalf("the mark is %q, %v", got, err)
	}

	for _, text := range []string{strconv.Itoa(Format + 1), "", "nonsense", "0"} {
		if err := os.WriteFile(mark, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		before := contents(t, dir)
		newer := text == strconv.Itoa(Format+1)
		check := func(what string, err error) {
			t.Helper()
			if err == nil || errors.Is(err, ErrNewer) != newer || !strings.Contains(err.Error(), dir) {
				t.Errorf("%s with the mark %q: %v", what, text, err)
			}
		}
		release, err := Lock(dir)
		check("Lock", err)
		if err == nil {
			release()
		}
		b, err := openIn(t, dir)
		check("Open", err)
		if err == nil {
			b.Close()
		}
		check("CopyStore", CopyStore(t.TempDir(), dir, StreamOutcomes))
		after := contents(t, dir)
		for path, sum := range before {
			if after[path] != sum {
				t.Errorf("with the mark %q, %s was touched", text, path)
			}
		}
		if len(after) != len(before) {
			t.Errorf("with the mark %q, there are %d files, before %d", text, len(after), len(before))
		}
	}

	// The newer one again; and one that was written before there was a mark.
	for _, prepare := range []func() error{
		func() error { return os.WriteFile(mark, []byte(strconv.Itoa(Format)), 0o600) },
		func() error { return os.Remove(mark) },
	} {
		if err := prepare(); err != nil {
			t.Fatal(err)
		}
		b, err := openIn(t, dir)
		if err != nil {
			t.Fatal(err)
		}
		var got string
		if ok, err := b.State().Get(t.Context(), "kept", &got); err != nil || !ok || got != "still here" {
			t.Errorf("the state is %q, %v, %v", got, ok, err)
		}
		b.Close()
	}
}

// What was stored with larger bounds, and by a stoop that had a stream more, is
// opened, and what this stoop does not know of stays.
func TestStoreOfAnother(t *testing.T) {
	dir := t.TempDir()
	b, err := Open(t.Context(), Config{Dir: dir, AlertsSize: 4 << 30, OutcomesSize: 2 << 30})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.State().Put(t.Context(), "kept", "still here", 0); err != nil {
		t.Fatal(err)
	}
	_, err = b.js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "OF_A_NEWER", Subjects: []string{"stoop.of.a.newer"}, MaxBytes: 8 << 30, Storage: jetstream.FileStorage,
	})
	if err == nil {
		_, err = b.js.Publish(t.Context(), "stoop.of.a.newer", []byte("kept too"))
	}
	if err != nil {
		t.Fatal(err)
	}
	b.Close()

	if b, err = openIn(t, dir); err != nil {
		t.Fatal(err)
	}
	var got string
	if ok, err := b.State().Get(t.Context(), "kept", &got); err != nil || !ok || got != "still here" {
		t.Errorf("the state is %q, %v, %v", got, ok, err)
	}
	b.Close()

	if b, err = openIn(t, dir); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	s, err := b.js.Stream(t.Context(), "OF_A_NEWER")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.GetMsg(t.Context(), 1); err != nil || string(m.Data) != "kept too" {
		t.Errorf("what the newer one stored: %v, %v", m, err)
	}
}

// The embedded server writes most of the data folder. Whoever takes another
// minor version of it has to find out whether the one before reads what it
// writes: downgrade a stoop by one version. If it does not, Format is raised.
// Then the version here is.
func TestFormatOfTheServer(t *testing.T) {
	const looked = "v2.15."
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`github\.com/nats-io/nats-server/v2 (v[0-9.]+)`).FindSubmatch(mod)
	if m == nil || !bytes.HasPrefix(m[1], []byte(looked)) {
		t.Errorf("nats-server is %s, and it was not looked at whether the stoop before reads what it writes", m)
	}
}
