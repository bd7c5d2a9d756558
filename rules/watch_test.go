package rules_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stoop/rules"
)

func content(name string) string {
	return fmt.Sprintf("rules:\n- name: %s\n  match: {priority: debug}\n  actions: [file]\n", name)
}

func write(t *testing.T, path, s string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// heard is what a watcher told, in order: "rules x", "error …" or "recovered".
type heard chan string

func (h heard) next(t *testing.T) string {
	t.Helper()
	select {
	case s := <-h:
		return s
	case <-time.After(5 * time.Second):
		t.Fatal("the watcher said nothing")
		return ""
	}
}

func (h heard) want(t *testing.T, want string) {
	t.Helper()
	if got := h.next(t); !strings.HasPrefix(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func watch(t *testing.T, path string, poll time.Duration) heard {
	t.Helper()
	set, err := rules.Load(path, catalog())
	must(t, err)
	h := make(heard, 100)
	w := &rules.Watcher{
		Path: path, Catalog: catalog(), Hash: set.Hash, Poll: poll, Settle: 50 * time.Millisecond,
		OnChange: func(s *rules.Set) { h <- "rules " + s.Rules[0].Name },
		OnError: func(err error) {
			var ps rules.Problems
			if errors.As(err, &ps) {
				h <- "error " + ps.Summary()
				return
			}
			h <- "error " + err.Error()
		},
		OnRecovered: func() { h <- "recovered" },
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for len(h) > 0 {
			t.Errorf("also heard %q", <-h)
		}
	})
	return h
}

// The poll is so slow in these that only events can tell in time.
const never = time.Hour

func TestWatchWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.yaml")
	write(t, path, content("one"))
	h := watch(t, path, never)
	write(t, path, content("two"))
	h.want(t, "rules two")
	write(t, path, content("three"))
	h.want(t, "rules three")
}

func TestWatchRenamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.yaml")
	write(t, path, content("one"))
	h := watch(t, path, never)
	for _, name := range []string{"two", "three"} {
		write(t, path+".swp", content(name))
		must(t, os.Rename(path+".swp", path))
		h.want(t, "rules "+name)
	}
}

// As the kubelet does it: the file is a link through ..data, which is a link to
// a folder that is swapped in one step.
func TestWatchConfigMap(t *testing.T) {
	dir := t.TempDir()
	volume := func(stamp, name string) {
		t.Helper()
		must(t, os.Mkdir(filepath.Join(dir, stamp), 0o700))
		write(t, filepath.Join(dir, stamp, "rules.yaml"), content(name))
		must(t, os.Symlink(stamp, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	volume("..2026_01", "one")
	path := filepath.Join(dir, "rules.yaml")
	must(t, os.Symlink(filepath.Join("..data", "rules.yaml"), path))
	h := watch(t, path, never)
	volume("..2026_02", "two")
	h.want(t, "rules two")
	must(t, os.RemoveAll(filepath.Join(dir, "..2026_01")))
	volume("..2026_03", "three")
	h.want(t, "rules three")
}

func TestWatchThroughALink(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	target := filepath.Join(elsewhere, "mine.yaml")
	write(t, target, content("one"))
	path := filepath.Join(dir, "rules.yaml")
	must(t, os.Symlink(target, path))
	h := watch(t, path, never)
	write(t, target, content("two"))
	h.want(t, "rules two")
}

func TestWatchKeepsTheLastGoodRules(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.yaml")
	write(t, path, content("one"))
	h := watch(t, path, 20*time.Millisecond)
	write(t, path, "rules:\n- nam: x\n")
	h.want(t, "error "+path+`:2:3: unknown key "nam"`)
	write(t, path, "")
	h.want(t, "error "+path+":1:1: there is nothing in this file")
	must(t, os.Remove(path))
	h.want(t, "error reading the rules: stat "+path)
	must(t, os.Mkdir(path, 0o700))
	h.want(t, "error reading the rules: "+path+" is no regular file")
	must(t, os.Remove(path))
	h.want(t, "error reading the rules: stat "+path)
	write(t, path, content("one")) // what is in force
	h.want(t, "recovered")
	write(t, path, content("two"))
	h.want(t, "rules two")
}

// A file system without events: the folder that is watched is gone.
func TestWatchPolls(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	must(t, os.Mkdir(dir, 0o700))
	path := filepath.Join(dir, "rules.yaml")
	write(t, path, content("one"))
	h := watch(t, path, 20*time.Millisecond)
	must(t, os.Rename(dir, dir+"-old"))
	h.want(t, "error reading the rules: stat "+path)
	must(t, os.Mkdir(dir, 0o700))
	write(t, path, content("two"))
	h.want(t, "rules two")
}

// A file that is written in place, piece by piece, is valid after some of them.
// Its pieces follow each other faster than it settles.
func TestWatchNeverTakesHalfAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.yaml")
	write(t, path, content("one"))
	set, err := rules.Load(path, catalog())
	must(t, err)
	got := make(chan *rules.Set, 10)
	w := &rules.Watcher{
		Path: path, Catalog: catalog(), Hash: set.Hash, Poll: never, Settle: 300 * time.Millisecond,
		OnChange: func(s *rules.Set) { got <- s },
		OnError:  func(err error) { t.Errorf("half a file was read: %v", err) },
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx)
	}()
	defer func() {
		cancel()
		<-done
	}()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	for i := range 20 {
		s := fmt.Sprintf("- name: r%d\n  match: {priority: debug}\n  actions: [file]\n", i)
		if i == 0 {
			s = "rules:\n" + s
		}
		_, err := f.WriteString(s)
		must(t, err)
	}
	select {
	case s := <-got:
		if len(s.Rules) != 20 {
			t.Errorf("%d of 20 rules were taken", len(s.Rules))
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the watcher said nothing")
	}
}
