package pipe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// following is a file in a folder of its own, and where its offset is kept.
type following struct {
	t          *testing.T
	path, data string
	store      *shelf
	in         *Intake
	out        *logged
	stop       func() error
}

func follow(t *testing.T) *following {
	dir := t.TempDir()
	f := &following{t: t, path: filepath.Join(dir, "falco.json"), data: filepath.Join(dir, "data"), store: &shelf{}}
	f.in, f.out = intake(t, Options{Store: f.store})
	return f
}

func (f *following) start() {
	f.t.Helper()
	file, err := OpenFile(f.path, f.data)
	if err != nil {
		f.t.Fatal(err)
	}
	f.stop = start(f.t, file, f.in)
}

func (f *following) restart() {
	f.t.Helper()
	if err := f.stop(); err != nil {
		f.t.Fatal(err)
	}
	f.start()
}

func (f *following) append(rules ...string) {
	f.t.Helper()
	for _, r := range rules {
		write(f.t, f.path, line(r, "Notice"), os.O_APPEND|os.O_CREATE)
	}
}

func (f *following) rename() {
	f.t.Helper()
	if err := os.Rename(f.path, f.path+".1"); err != nil {
		f.t.Fatal(err)
	}
}

func (f *following) want(rules ...string) {
	f.t.Helper()
	eventually(f.t, func() error {
		if got := f.store.rules(); fmt.Sprint(got) != fmt.Sprint(rules) {
			return fmt.Errorf("stored %v, want %v\n%s", got, rules, f.out)
		}
		return nil
	})
}

func TestFileAppended(t *testing.T) {
	f := follow(t)
	f.start() // before it is there
	f.append("a")
	f.want("a")
	f.append("b", "c")
	f.want("a", "b", "c")
	text := line("d", "Notice")
	write(t, f.path, text[:50], os.O_APPEND)
	write(t, f.path, text[50:], os.O_APPEND)
	f.want("a", "b", "c", "d")
}

func TestFileBeginsAtItsBeginning(t *testing.T) {
	f := follow(t)
	f.append("a", "b")
	f.start()
	f.want("a", "b")
}

func TestFileRestart(t *testing.T) {
	f := follow(t)
	f.append("a", "b")
	f.start()
	f.want("a", "b")
	text := line("c", "Notice")
	write(t, f.path, text[:30], os.O_APPEND) // an unfinished line is read again as a whole
	f.restart()
	write(t, f.path, text[30:], os.O_APPEND)
	f.want("a", "b", "c")
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	f.append("d")
	f.start()
	f.want("a", "b", "c", "d")
	f.restart()
	f.append("e")
	f.want("a", "b", "c", "d", "e")
}

func TestFileTruncated(t *testing.T) {
	f := follow(t)
	f.append("a", "b")
	f.start()
	f.want("a", "b")
	if err := os.Truncate(f.path, 0); err != nil {
		t.Fatal(err)
	}
	f.append("c")
	f.want("a", "b", "c")

	// While stoop is away, and grown past the offset since.
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(f.path, 0); err != nil {
		t.Fatal(err)
	}
	f.append("d", "e", "f", "g")
	f.start()
	f.want("a", "b", "c", "d", "e", "f", "g")
}

func TestFileRotated(t *testing.T) {
	f := follow(t)
	f.append("a")
	f.start()
	f.want("a")
	f.rename()
	// Falco has its file open until SIGUSR1, and writes on.
	write(t, f.path+".1", line("b", "Notice"), os.O_APPEND)
	f.want("a", "b")
	f.append() // nothing there yet
	write(t, f.path, "", os.O_CREATE)
	write(t, f.path+".1", line("c", "Notice"), os.O_APPEND)
	f.want("a", "b", "c")
	f.append("d")
	f.want("a", "b", "c", "d")
	if err := os.Remove(f.path + ".1"); err != nil {
		t.Fatal(err)
	}
	f.rename()
	f.append("e")
	f.want("a", "b", "c", "d", "e")
}

// Rotated while stoop was away: the rest of the old file comes first.
func TestFileRotatedWhileAway(t *testing.T) {
	f := follow(t)
	f.append("a")
	f.start()
	f.want("a")
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	f.append("b")
	f.rename()
	f.append("c")
	f.start()
	f.want("a", "b", "c")

	// And gone altogether.
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(f.path); err != nil {
		t.Fatal(err)
	}
	f.append("d")
	f.start()
	f.want("a", "b", "c", "d")
}

// The offset moves only over what is stored.
func TestFileNotStored(t *testing.T) {
	f := follow(t)
	f.append("a")
	f.start()
	f.want("a")
	f.store.set(func(context.Context, []Arrival) (int, error) { return 0, errFull })
	f.append("b")
	eventually(t, func() error {
		if n, _, _ := f.in.Backlog(); n != 1 {
			return errors.New("not read")
		}
		return nil
	})
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.in.Close(ctx); err == nil {
		t.Fatal("the intake stored it")
	}
	f.store.set(nil)
	f.in, f.out = intake(t, Options{Store: f.store})
	f.start()
	f.want("a", "b")
}

// More than the memory for alerts goes through while the store is slow.
func TestFileWaitsForTheStore(t *testing.T) {
	f := follow(t)
	const n = 3000
	write(t, f.path, strings.Repeat(sized("a", "Debug", 1000), n), os.O_CREATE)
	f.in, _ = intake(t, Options{Store: f.store, Limit: 256 << 10})
	refuse := 3
	f.store.set(func(context.Context, []Arrival) (int, error) {
		if refuse--; refuse >= 0 {
			return 0, errFull
		}
		return 0, nil
	})
	f.start()
	f.store.has(t, n)
}

func TestFileSpoiltState(t *testing.T) {
	for _, state := range []string{"", "{", "null", `{"offset":-1}`, `{"length":100000000000}`} {
		f := follow(t)
		f.append("a")
		file, err := OpenFile(f.path, f.data)
		if err != nil {
			t.Fatal(err)
		}
		write(t, file.state, state, os.O_CREATE)
		f.start()
		f.want("a")
		if f.out.count("the remembered offset can't be read") != 1 {
			t.Errorf("%q: not said", state)
		}
	}
}

func TestFileKinds(t *testing.T) {
	if _, err := OpenFile(t.TempDir(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a folder: %v", err)
	}
}

func TestFileEndsPromptly(t *testing.T) {
	f := follow(t)
	f.store.set(func(ctx context.Context, _ []Arrival) (int, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	})
	write(t, f.path, strings.Repeat(sized("a", "Debug", 1000), 20000), os.O_CREATE)
	f.start()
	eventually(t, func() error {
		if n, _, _ := f.in.Backlog(); n == 0 {
			return errors.New("not read")
		}
		return nil
	})
	begun := time.Now()
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("it took %v", took)
	}
}
