package doctor

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/node"
	"stoop/responders"
)

// A process of these tests is this program: it opens the files that it is told, says so,
// and waits for the end of its input.
func TestMain(m *testing.M) {
	if how := os.Getenv("DOCTOR_TEST_OPEN"); how != "" {
		flags, err := strconv.Atoi(how)
		for path := range strings.SplitSeq(os.Getenv("DOCTOR_TEST_PATH"), ":") {
			if err == nil {
				_, err = unix.Open(path, flags|unix.O_NONBLOCK, 0)
			}
		}
		fmt.Println(err)
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		return
	}
	os.Exit(m.Run())
}

// open starts a process of the name, with the arguments, that has a file open, or
// several with colons between them.
func open(t *testing.T, path string, flags int, name string, args ...string) (pid int, stop func()) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(exe, program); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "DOCTOR_TEST_OPEN="+strconv.Itoa(flags), "DOCTOR_TEST_PATH="+path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() { in.Close(); _ = cmd.Wait() }
	t.Cleanup(stop)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("%s could not open %s: %q, %v", name, path, line, err)
	}
	return cmd.Process.Pid, stop
}

func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "falco.pipe")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func config(t *testing.T) Config {
	t.Helper()
	return Config{
		Version: "1.0", Node: "node-1", MaxAge: 10 * time.Minute, Data: t.TempDir(),
		RulesFile: "rules.yaml", RulesHash: "abc", Entries: responders.All(), Namespace: "stoop",
		Host:    node.New(node.Config{}),
		Running: func(context.Context) (Running, error) { return Running{}, broker.ErrNotRunning },
	}
}

func steps(names ...string) []responders.Planned {
	var out []responders.Planned
	for _, n := range names {
		out = append(out, responders.Planned{Responder: n, Params: json.RawMessage("{}")})
	}
	return out
}

// examine makes one check.
func examine(t *testing.T, c Config, name string) []Finding {
	t.Helper()
	all := Checks()
	i := slices.IndexFunc(all, func(k Check) bool { return k.Name == name })
	if i < 0 {
		t.Fatalf("there is no check %s", name)
	}
	found := Examine(t.Context(), c, all[i:i+1])
	for _, f := range found {
		if f.Check != name || f.Found == "" || f.Status == Missing && f.Do == "" {
			t.Errorf("%s found %+v", name, f)
		}
	}
	return found
}

// has wants a finding of a status that holds all the words, in what was found or what to do.
func has(t *testing.T, found []Finding, status Status, words ...string) {
	t.Helper()
	for _, f := range found {
		if f.Status == status && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(f.Found+" > "+f.Do, w) }) {
			return
		}
	}
	t.Errorf("nothing is %s with %q in %+v", status, words, found)
}

// none wants no finding of these statuses.
func none(t *testing.T, found []Finding, statuses ...Status) {
	t.Helper()
	for _, f := range found {
		if slices.Contains(statuses, f.Status) {
			t.Errorf("found %+v", f)
		}
	}
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A check that hangs is said to, and holds up no other.
func TestDeadline(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	checks := []Check{
		{Name: "hangs", Within: 10 * time.Millisecond, look: func(context.Context, *Examination) []Finding { <-release; return nil }},
		{Name: "quick", Within: time.Minute, look: func(context.Context, *Examination) []Finding { return []Finding{ok("fine")} }},
	}
	found := Examine(t.Context(), config(t), checks)
	if len(found) != 2 || found[0].Check != "hangs" || found[0].Status != Unknown || found[1] != (Finding{"quick", OK, "fine", ""}) {
		t.Errorf("found %+v", found)
	}
}

// Every check says something on a machine where nothing is, in words that name what to do.
func TestNothingThere(t *testing.T) {
	c := config(t)
	c.Source.Pipe = filepath.Join(t.TempDir(), "none")
	c.Steps = steps("delete-pod", "isolate-pod", "kill-process")
	var names []string
	for _, f := range Examine(t.Context(), c, Checks()) {
		if f.Check == "" || f.Found == "" || strings.Contains(f.Found+f.Do, "%!") {
			t.Errorf("found %+v", f)
		}
		if !slices.Contains(names, f.Check) {
			names = append(names, f.Check)
		}
	}
	if want := Names(Checks()); !slices.Equal(names, want) {
		t.Errorf("checks %v said something, want %v", names, want)
	}
}
