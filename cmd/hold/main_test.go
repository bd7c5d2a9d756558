package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// It stands beside every Falco, so it is small: on disk, in memory, and in what
// it is made of.
func TestHold(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "stoop-hold")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	fifo := filepath.Join(t.TempDir(), "falco.pipe")
	var said bytes.Buffer
	hold := exec.Command(bin, fifo)
	hold.Stderr = &said
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- hold.Wait() }()
	defer func() { _ = hold.Process.Kill() }()

	// Opened without a reader of its own, which fails where nobody holds the FIFO.
	var w *os.File
	for end := time.Now().Add(10 * time.Second); w == nil; time.Sleep(5 * time.Millisecond) {
		f, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil && time.Now().After(end) {
			t.Fatal(err)
		}
		w = f
	}
	defer w.Close()
	for i := range 3 { // readers come and go
		if _, err := fmt.Fprintf(w, "alert %d\n", i); err != nil {
			t.Fatal(err)
		}
		r, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 64)
		n, err := r.Read(got)
		r.Close()
		if want := fmt.Sprintf("alert %d\n", i); err != nil || string(got[:n]) != want {
			t.Fatalf("read %q, %v; want %q", got[:n], err, want)
		}
	}

	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", hold.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no VmHWM in %s", status)
	}
	kib, err := strconv.Atoi(string(m[1]))
	if err != nil || kib == 0 || kib > 8<<10 {
		t.Errorf("it takes %s KiB of memory, want at most 8 MiB", m[1])
	}

	if err := hold.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("SIGTERM: %v: %s", err, said.Bytes())
		}
	case <-time.After(10 * time.Second):
		t.Fatal("SIGTERM does not end it")
	}
	if !strings.Contains(said.String(), fifo) {
		t.Errorf("it said %s", said.Bytes())
	}

	regular := filepath.Join(t.TempDir(), "falco.pipe")
	if err := os.WriteFile(regular, []byte("an alert\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "usage"},
		{[]string{"--help"}, 2, "usage"},
		{[]string{"a", "b"}, 2, "usage"},
		{[]string{regular}, 1, "is a regular file"},
	} {
		out, err := exec.Command(bin, c.args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != c.code || !bytes.Contains(out, []byte(c.says)) {
			t.Errorf("stoop-hold %q: %v: %s; want code %d and %q", c.args, err, out, c.code, c.says)
		}
	}

	deps, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range strings.Fields(string(deps)) {
		if d != "stoop/cmd/hold" && d != "stoop/pipe/namedpipe" && d != "golang.org/x/sys/unix" {
			t.Errorf("it is made of %s too", d)
		}
	}
}
