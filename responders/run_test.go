package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
)

// This test is what the others start in the place of "stoop child run".
func TestAsRunChild(*testing.T) {
	if flag.NArg() > 0 {
		_ = RunChild(flag.Args())
		os.Exit(1)
	}
}

const runAlert = `{"hostname":"node-1","output":"a \"quoted\" $(touch /tmp/x)","priority":"Critical","rule":"R","source":"syscall","time":"2026-11-20T10:00:00.123456789Z","output_fields":{"evt.time":1795168800123456789,"proc.cmdline":"sh -c '; reboot'"}}`

type runWorld struct {
	dir      string
	runner   *programRunner
	evidence string
}

func newRunWorld(t *testing.T) *runWorld {
	t.Helper()
	w := &runWorld{dir: t.TempDir(), evidence: filepath.Join(t.TempDir(), "evidence")}
	store, err := evidence.Open(evidence.Config{Dir: w.evidence, Size: 64 << 20, PerTarget: 8})
	if err != nil {
		t.Fatal(err)
	}
	w.runner = run().New(Env{Node: "node-1", Data: w.dir, Evidence: store, Own: &OwnProcesses{}}).(*programRunner)
	w.runner.wrapper = []string{os.Args[0], "-test.run=^TestAsRunChild$", "--"}
	return w
}

// endWith ends a process with the test that found out about it, if it runs then.
func endWith(t *testing.T, pid int) int {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		t.Cleanup(func() {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			_ = unix.Close(fd)
		})
	}
	return pid
}

// script is a program of the test's.
func (w *runWorld) script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(w.dir, "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func (w *runWorld) request(t *testing.T, params map[string]any) *Request {
	t.Helper()
	raw, err := json.Marshal(params)
	if err != nil {
		t.Fatal(err)
	}
	return &Request{
		Step: &broker.Step{
			ID: alert.IDOf([]byte(w.dir))[:20], AlertID: "0123456789abcdef0123456789abcdef", Alert: json.RawMessage(runAlert),
			Rule: "a rule; $(reboot)", Action: broker.Action{Responder: "run", Params: raw},
		},
	}
}

// kept is a piece of the evidence.
func (w *runWorld) kept(t *testing.T, res Result, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(res.Found["evidence"], name))
	if err != nil {
		t.Fatalf("%v (found %v)", err, res.Found)
	}
	return string(b)
}

func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := unix.Kill(pid, 0); errors.Is(err, unix.ESRCH) || isZombie(pid) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d runs on", pid)
		}
	}
}

// number waits for a file that holds a process's number.
func number(t *testing.T, path string) int {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if pid, aerr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && aerr == nil {
			return endWith(t, pid)
		}
		if time.Now().After(end) {
			t.Fatalf("no number in %s: %v", path, err)
		}
	}
}

func TestRunGivesTheAlertAndNothingElse(t *testing.T) {
	t.Setenv("STOOP_TEST_SECRET", "must not be seen")
	var core syscall.Rlimit
	if err := syscall.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(unix.RLIMIT_CORE, &syscall.Rlimit{Cur: core.Max, Max: core.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Setrlimit(unix.RLIMIT_CORE, &core) })
	w := newRunWorld(t)
	path := w.script(t, `
cat > `+w.dir+`/stdin
env | sort | grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD= > `+w.dir+`/env
for a; do echo "<$a>"; done
pwd; umask; ulimit -n; ulimit -c
echo to stderr >&2
`)
	r := w.request(t, map[string]any{
		"command":     []string{path, "$(reboot)", "two words", "%{proc.cmdline}", ""},
		"environment": map[string]string{"WEBHOOK": "a b"},
	})
	res, err := w.runner.Act(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(w.dir + "/stdin"); string(b) != runAlert+"\n" {
		t.Errorf("on its standard input: %s", b)
	}
	want := []string{
		"PATH=" + runPath, "STOOP_ALERT_ID=0123456789abcdef0123456789abcdef", "STOOP_NODE=node-1",
		"STOOP_RULE=a rule; $(reboot)", "STOOP_STEP=" + r.Step.ID, "WEBHOOK=a b",
	}
	b, _ := os.ReadFile(w.dir + "/env")
	have := strings.Split(strings.TrimSpace(string(b)), "\n")
	slices.Sort(have)
	if !slices.Equal(have, want) {
		t.Errorf("its environment: %q, want %q", have, want)
	}
	if out := w.kept(t, res, "stdout"); out != "<$(reboot)>\n<two words>\n<%{proc.cmdline}>\n<>\n/\n0077\n1024\n0\n" {
		t.Errorf("stdout: %q", out)
	}
	if out := w.kept(t, res, "stderr"); out != "to stderr\n" {
		t.Errorf("stderr: %q", out)
	}
	if res.Found["exit"] != "0" || res.Nothing || res.Undo != nil {
		t.Errorf("result %+v", res)
	}
	r.Resumed = true
	if _, err := w.runner.Act(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(w.dir + "/env"); !strings.Contains(string(b), "STOOP_RESUMED=1\n") {
		t.Errorf("the second time the environment is %s", b)
	}
}

func TestRunFails(t *testing.T) {
	w := newRunWorld(t)
	for _, c := range []struct{ name, script, want string }{
		{"a status", "echo first >&2; printf 'cannot \\033[31mreach it\\n\\n' >&2; exit 3", `ended with exit status 3: "cannot \x1b[31mreach it"`},
		{"silent", "exit 1", "ended with exit status 1"},
		{"a signal", "kill -SEGV $$", "ended with signal: segmentation fault"},
		{"a long line", "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", strings.Repeat("x", 200) + "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			res, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{w.script(t, c.script)}}))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %s", err, c.want)
			}
			if status, retry, _, _ := classify(err); status != broker.Failed || retry {
				t.Errorf("it is %s, tried again: %v", status, retry)
			}
			if len(err.Error()) > 500 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if c.name == "a status" && res.Found["exit"] != "3" {
				t.Errorf("found %v", res.Found)
			}
		})
	}
}

func TestRunRefuses(t *testing.T) {
	w := newRunWorld(t)
	good := w.script(t, "exit 0")
	open := filepath.Join(w.dir, "open")
	if err := os.WriteFile(open, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	shared := filepath.Join(w.dir, "shared")
	if err := os.WriteFile(shared, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(shared, 0, 12345); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(shared, 0o770); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(w.dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		want   string
		params map[string]any
	}{
		{"there is none", map[string]any{}},
		{"no absolute path", map[string]any{"command": []string{"sh", "-c", "x"}}},
		{"no absolute path", map[string]any{"command": []string{"/bin/../bin/sh"}}},
		{"is not there", map[string]any{"command": []string{"/no/such/program"}}},
		{"is no file", map[string]any{"command": []string{w.dir}}},
		{"not executable", map[string]any{"command": []string{plain}}},
		{"everybody may change", map[string]any{"command": []string{open}}},
		{"group", map[string]any{"command": []string{shared}}},
		{"NUL", map[string]any{"command": []string{good, "a\x00b"}}},
		{"no name for a variable", map[string]any{"command": []string{good}, "environment": map[string]string{"A=B": ""}}},
		{"set by stoop", map[string]any{"command": []string{good}, "environment": map[string]string{"STOOP_STEP": ""}}},
	} {
		err := w.runner.Check(t.Context(), w.request(t, c.params))
		if status, _, _, reason := classify(err); status != broker.Refused || !strings.Contains(reason, c.want) {
			t.Errorf("%v: %s, %s; want it refused: %s", c.params, status, reason, c.want)
		}
	}
	if os.Getuid() == 0 {
		if err := os.Chown(good, 12345, 0); err != nil {
			t.Fatal(err)
		}
		if err := w.runner.Check(t.Context(), w.request(t, map[string]any{"command": []string{good}})); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
			t.Errorf("another user's program: %v", err)
		}
	}
}

func TestRunParams(t *testing.T) {
	for text, want := range map[string]string{
		`{command: [/bin/true]}`:                                 "",
		`{command: [/bin/true], timeout: 50s, memory: 16MiB}`:    "",
		`{command: [/bin/true], timeout: 2m}`:                    "50s",
		`{command: [/bin/true], memory: 1MiB}`:                   "16MiB",
		`{command: [/bin/true], output: 1GiB}`:                   "16MiB",
		`{command: [ls, -l]}`:                                    "absolute path",
		`{timeout: 1s}`:                                          "command",
		`{command: [/bin/true], environment: {LD PRELOAD: "x"}}`: "no name",
	} {
		var doc yaml.Node
		if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
			t.Fatal(err)
		}
		_, found := run().Params.Check(doc.Content[0])
		switch {
		case want == "" && len(found) > 0:
			t.Errorf("%s: %s", text, found[0].Message)
		case want != "" && (len(found) == 0 || !strings.Contains(found[0].Message, want)):
			t.Errorf("%s: %v, want %s", text, found, want)
		}
	}
	if most := 50*time.Second + runTerm + groupKill + runPipes; run().Deadline < most+time.Second {
		t.Errorf("the longest run may take %s, a try only %s", most, run().Deadline)
	}
}

func TestRunTimeout(t *testing.T) {
	w := newRunWorld(t)
	path := w.script(t, `
trap 'echo terminated >&2' TERM
sleep 600 & echo $! > `+w.dir+`/child
setsid sh -c 'trap "" TERM; echo $$ > `+w.dir+`/apart; while :; do sleep 600; done' &
while :; do wait; done
`)
	began := time.Now()
	res, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{path}, "timeout": "1s"}))
	if err == nil || !strings.Contains(err.Error(), "ran longer than its timeout (1s)") {
		t.Fatalf("error %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	if out := w.kept(t, res, "stderr"); !strings.Contains(out, "terminated") {
		t.Errorf("stderr %q: it was not asked to end first", out)
	}
	gone(t, number(t, w.dir+"/child"))
	apart := number(t, w.dir+"/apart")
	if needsCgroup(t, res) {
		gone(t, apart)
	}
}

// needsCgroup reports whether the program was in a cgroup. Root always has one.
func needsCgroup(t *testing.T, res Result) bool {
	t.Helper()
	if res.Found["contained"] == "cgroup" {
		return true
	}
	if os.Getuid() == 0 && os.Getenv("CI") != "" {
		t.Error("root could make no cgroup here")
	}
	t.Log("needs root: no cgroup could be made")
	return false
}

// What a program leaves running is ended with it, however far it went.
func TestRunLeavesNothingRunning(t *testing.T) {
	w := newRunWorld(t)
	path := w.script(t, `
sleep 600 & echo $! > `+w.dir+`/child
setsid sh -c 'echo $$ > `+w.dir+`/apart; exec sleep 600' </dev/null >/dev/null 2>&1 &
while ! [ -s `+w.dir+`/apart ]; do sleep 0.01; done
`)
	began := time.Now()
	r := w.request(t, map[string]any{"command": []string{path}})
	res, err := w.runner.Act(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it waited %s for children that held its output", took)
	}
	gone(t, number(t, w.dir+"/child"))
	apart := number(t, w.dir+"/apart")
	if !needsCgroup(t, res) {
		return
	}
	gone(t, apart)
	for _, h := range proc("/proc").hierarchies() {
		if _, err := os.Stat(filepath.Join(h.dir, w.runner.groupName(r))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a cgroup is left in %s: %v", h.dir, err)
		}
	}
}

// Where stoop may make no cgroup, the process group holds the program.
func TestRunWithoutCgroup(t *testing.T) {
	w := newRunWorld(t)
	j := &job{
		command: []string{w.script(t, "sleep 600 & echo $! > "+w.dir+"/child; echo done")}, env: []string{"PATH=" + runPath},
		timeout: 5 * time.Second, memory: 64 << 20, stdout: output{max: 100}, stderr: output{max: 100}, wrapper: w.runner.wrapper,
	}
	if err := j.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if string(j.stdout.head) != "done\n" {
		t.Errorf("stdout %q, stderr %q", j.stdout.head, j.stderr.head)
	}
	gone(t, number(t, w.dir+"/child"))
}

// A cgroup that turns out to take no process must not keep the program from
// running.
func TestRunFallsBack(t *testing.T) {
	w := newRunWorld(t)
	j := &job{
		command: []string{"/bin/true"}, timeout: 5 * time.Second, memory: 64 << 20, wrapper: w.runner.wrapper,
		group: &group{dirs: []string{filepath.Join(w.dir, "none")}},
	}
	if err := j.run(t.Context()); !as[*groupError](err) {
		t.Fatalf("error %v", err)
	}
	j.command, j.group = []string{"/dev/null"}, nil
	if err := j.run(t.Context()); !as[*startError](err) || !errors.Is(err, unix.EACCES) && !strings.Contains(err.Error(), "permission denied") {
		t.Fatalf("error %v", err)
	}
}

func TestRunIsStopped(t *testing.T) {
	w := newRunWorld(t)
	path := w.script(t, "echo $$ > "+w.dir+"/pid; sleep 600")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	r := w.request(t, map[string]any{"command": []string{path}})
	go func() { _, err := w.runner.Act(ctx, r); done <- err }()
	pid := number(t, w.dir+"/pid")
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
	gone(t, pid)
}

// What is left of a run that was cut off with stoop is ended before the next.
func TestRunResumed(t *testing.T) {
	w := newRunWorld(t)
	r := w.request(t, map[string]any{"command": []string{w.script(t, "echo again")}})
	g := newGroup("/proc", w.runner.groupName(r), 64<<20)
	if !g.kills() {
		needsCgroup(t, Result{})
		t.Skip("needs root: a cgroup of its own")
	}
	t.Cleanup(func() { g.kill(); g.remove() })
	left := &job{
		command: []string{"/bin/sleep", "600"}, timeout: time.Minute, memory: 64 << 20,
		wrapper: w.runner.wrapper, group: &group{dirs: g.dirs}, // which does not kill at its end
	}
	done := make(chan error, 1)
	go func() { done <- left.run(t.Context()) }()
	for end := time.Now().Add(10 * time.Second); len(g.pids()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing runs in the cgroup")
		}
	}
	r.Resumed = true
	if _, err := w.runner.Act(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err == nil {
			t.Error("what was left ended by itself")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("what was left runs on")
	}
}

func TestRunMemory(t *testing.T) {
	w := newRunWorld(t)
	path := w.script(t, "exec dd if=/dev/zero of=/dev/null bs=64M count=1")
	_, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{path}, "memory": "32MiB"}))
	if err == nil || !strings.Contains(err.Error(), "dd: ") {
		t.Errorf("64 MiB of 32: %v", err)
	}
	if _, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{path}, "memory": "128MiB"})); err != nil {
		t.Errorf("64 MiB of 128: %v", err)
	}
}

func TestRunKeepsTheBeginning(t *testing.T) {
	w := newRunWorld(t)
	path := w.script(t, "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; head -c 5000000 /dev/zero")
	res, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{path}, "output": "4KiB"}))
	if err != nil {
		t.Fatal(err)
	}
	if out := w.kept(t, res, "stdout"); len(out) != 4096 || !strings.HasPrefix(out, "line 0\nline 1\n") {
		t.Errorf("%d bytes are kept, which begin with %.20q", len(out), out)
	}
}

func TestOutput(t *testing.T) {
	for _, chunk := range []int{1, 7, 100, 5000} {
		o := output{max: 10}
		text := []byte(strings.Repeat("0123456789\n", 800) + "last\n")
		for b := range slices.Chunk(text, chunk) {
			if n, err := o.Write(b); n != len(b) || err != nil {
				t.Fatal(n, err)
			}
		}
		if !bytes.Equal(o.head, text[:11]) || o.lastLine() != "last" || len(o.tail) > tailMost {
			t.Errorf("by %d: head %q, last line %q, tail of %d", chunk, o.head, o.lastLine(), len(o.tail))
		}
	}
}

// If stoop is killed, what it started does not run on.
func TestRunDiesWithStoop(t *testing.T) {
	w := newRunWorld(t)
	// The parent is this test binary again, which starts the program and waits.
	pidFile := w.dir + "/pid"
	parent, err := os.StartProcess(os.Args[0], []string{os.Args[0], "-test.run=^TestAsDyingStoop$", "--", w.script(t, "echo $$ > "+pidFile+"; exec sleep 600")},
		&os.ProcAttr{Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	pid := number(t, pidFile)
	if err := parent.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := parent.Wait(); err != nil {
		t.Fatal(err)
	}
	gone(t, pid)
}

// The machine that this is tested on may end what is left behind by itself, so
// the kernel is asked as well.
func TestRunAsksTheKernelToDieWithStoop(t *testing.T) {
	w := newRunWorld(t)
	res, err := w.runner.Act(t.Context(), w.request(t, map[string]any{"command": []string{os.Args[0], "-test.run=^TestAsProgram$", "--", "signal"}, "memory": "1024TiB"}))
	if err != nil {
		t.Fatal(err)
	}
	if out := w.kept(t, res, "stdout"); !strings.HasPrefix(out, "9\n") {
		t.Errorf("when its parent dies it gets signal %s", out)
	}
}

// deathSignal is of the first thread, on which a program is initialised: what
// another says may be another.
var deathSignal = func() (signal int32) {
	if err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&signal)), 0, 0, 0); err != nil {
		return -1
	}
	return signal
}()

func TestAsProgram(*testing.T) {
	if flag.Arg(0) == "signal" {
		fmt.Println(deathSignal)
	}
}

func TestAsDyingStoop(*testing.T) {
	if flag.NArg() != 1 {
		return
	}
	j := &job{
		command: []string{flag.Arg(0)}, env: []string{"PATH=" + runPath}, timeout: time.Minute, memory: 64 << 20,
		wrapper: []string{os.Args[0], "-test.run=^TestAsRunChild$", "--"},
	}
	fmt.Println(j.run(context.Background()))
}

func ownAlert(t *testing.T, at time.Time, fields map[string]any) *alert.Alert {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"rule": "R", "priority": "Critical", "source": "syscall", "output": "x", "output_fields": fields,
		"time": at.UTC().Format(time.RFC3339Nano),
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := alert.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestOwnProcesses(t *testing.T) {
	w := newRunWorld(t)
	own := w.runner.own
	own.host = func() bool { return true }
	path := w.script(t, `
echo $$ > `+w.dir+`/pid
setsid sh -c 'setsid sh -c "echo \$\$ > `+w.dir+`/apart; exec sleep 600" &' &
read wait < `+w.dir+`/go
`)
	if err := unix.Mkfifo(w.dir+"/go", 0o600); err != nil {
		t.Fatal(err)
	}
	type outcome struct {
		res Result
		err error
	}
	done := make(chan outcome, 1)
	r := w.request(t, map[string]any{"command": []string{path}})
	go func() { res, err := w.runner.Act(t.Context(), r); done <- outcome{res, err} }()
	pid, apart := number(t, w.dir+"/pid"), number(t, w.dir+"/apart")
	starts := func(pid int) int64 {
		at, ok := proc("/proc").started(proc("/proc").dir(int64(pid)))
		if !ok {
			t.Fatalf("process %d is gone", pid)
		}
		return at.UnixNano()
	}
	during := time.Now()
	start, apartStart := starts(pid), starts(apart)
	type fields = map[string]any
	cases := []struct {
		name   string
		at     time.Time
		fields fields
		want   bool
	}{
		{"itself", during, fields{"proc.pid": pid}, true},
		{"itself, with its start", during, fields{"proc.pid": pid, "proc.pid.ts": start}, true},
		{"another of its number, by the start", during, fields{"proc.pid": pid, "proc.pid.ts": start - int64(time.Hour)}, false},
		{"its number long before", during.Add(-time.Hour), fields{"proc.pid": pid}, false},
		{"a child that is gone", during, fields{"proc.pid": 4194300, "proc.ppid": pid}, true},
		{"a child's child that is gone", during, fields{"proc.pid": 4194300, "proc.ppid": 4194299, "proc.apid[1]": 4194299, "proc.apid[2]": pid}, true},
		{"a child before it", during.Add(-time.Hour), fields{"proc.pid": 4194300, "proc.ppid": pid}, false},
		{"a session that was named so", during, fields{"proc.pid": 4194300, "proc.sid": pid, "proc.vpgid": pid}, false},
		{"the test itself", during, fields{"proc.pid": os.Getpid(), "proc.pid.ts": starts(os.Getpid())}, false},
		{"no process", during, fields{"proc.ppid": pid}, false},
	}
	for _, c := range cases {
		if got := own.Owns(ownAlert(t, c.at, c.fields)); got != c.want {
			t.Errorf("%s: owned %v", c.name, got)
		}
	}
	if _, err := os.Stat("/proc/self/cgroup"); err == nil && os.Getuid() == 0 {
		a := ownAlert(t, during, fields{"proc.pid": apart, "proc.pid.ts": apartStart})
		if !own.Owns(a) {
			t.Error("a child that went away by itself is not known by its cgroup")
		}
	}
	own.host = func() bool { return false }
	if own.Owns(ownAlert(t, during, fields{"proc.pid": pid})) {
		t.Error("a number of another namespace is taken for the host's")
	}
	own.host = func() bool { return true }

	if err := os.WriteFile(w.dir+"/go", []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	if o := <-done; o.err != nil {
		t.Fatal(o.err)
	}
	// It is gone, and what it did is still coming in.
	if !own.Owns(ownAlert(t, during, fields{"proc.pid": pid, "proc.pid.ts": start})) {
		t.Error("forgotten as soon as it ended")
	}
	if own.Owns(ownAlert(t, time.Now().Add(time.Minute), fields{"proc.pid": pid})) {
		t.Error("whoever has its number later is taken for it")
	}
	var none *OwnProcesses
	none.Started(1, "")()
	if none.Owns(ownAlert(t, during, fields{"proc.pid": pid})) {
		t.Error("nobody owns something")
	}
}

func TestOwnProcessesForgets(t *testing.T) {
	var own OwnProcesses
	for range ownMost + 100 {
		own.Started(os.Getpid(), "")()
	}
	running := own.Started(os.Getpid(), "")
	if n := len(own.runs); n > ownMost+1 {
		t.Errorf("%d are remembered", n)
	}
	own.forget(time.Now().Add(ownFor + time.Minute))
	if n := len(own.runs); n != 1 {
		t.Errorf("%d are remembered after %s, want the one that runs", n, ownFor)
	}
	running()
}

// The hierarchies of a container with the host's tree mounted, of v1, and of a
// unit of systemd's.
func TestHierarchies(t *testing.T) {
	for _, c := range []struct {
		name, mounts, own string
		want              []hierarchy
	}{
		{
			"systemd's", "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n", "0::/system.slice/stoop.service\n",
			[]hierarchy{{v2: true, dir: "/sys/fs/cgroup/system.slice/stoop.service", path: "/system.slice/stoop.service"}},
		},
		{
			"a container with the host's", "30 23 0:26 /../../.. /host/cgroup\\040fs rw - cgroup2 cgroup2 rw\n", "0::/\n",
			[]hierarchy{{v2: true, dir: "/host/cgroup fs", path: "/../../.."}},
		},
		{
			"v1", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
				"39 31 0:36 / /sys/fs/cgroup/pids rw shared:9 - cgroup cgroup rw,pids\n" +
				"40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n",
			"8:pids:/a\n4:memory:/b\n0::/\n",
			[]hierarchy{{controller: "memory", dir: "/sys/fs/cgroup/memory/b", path: "/b"}, {controller: "pids", dir: "/sys/fs/cgroup/pids/a", path: "/a"}},
		},
		{"none", "35 31 0:32 / /proc rw - proc proc rw\n", "", nil},
	} {
		dir := t.TempDir()
		if err := os.MkdirAll(dir+"/self", 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"mountinfo": c.mounts, "cgroup": c.own} {
			if err := os.WriteFile(filepath.Join(dir, "self", name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := proc(dir).hierarchies(); !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// In v1, and before Linux 5.14, a group is killed one by one.
func TestGroupKillsInV1(t *testing.T) {
	name := "stoop-test-" + alert.IDOf([]byte(t.Name() + time.Now().String()))[:12]
	var g *group
	for _, h := range proc("/proc").hierarchies() {
		dir := filepath.Join(h.dir, name)
		if h.controller == "pids" && os.Mkdir(dir, 0o755) == nil {
			g = &group{dirs: []string{dir}, dir: dir, path: h.path + "/" + name}
		}
	}
	if g == nil {
		t.Skip("needs root: the v1 hierarchy pids")
	}
	t.Cleanup(func() { g.kill(); g.remove() })
	w := newRunWorld(t)
	j := &job{
		command: []string{w.script(t, "i=0; while [ $i -lt 20 ]; do setsid sleep 600 & i=$((i+1)); done; echo $$ > "+w.dir+"/pid; wait")},
		env:     []string{"PATH=" + runPath}, timeout: 20 * time.Second, memory: 64 << 20, wrapper: w.runner.wrapper, group: g,
	}
	done := make(chan error, 1)
	go func() { done <- j.run(t.Context()) }()
	number(t, w.dir+"/pid")
	if n := len(g.pids()); n < 21 {
		t.Errorf("%d processes are in the group", n)
	}
	g.kill()
	err := <-done
	if err == nil {
		t.Error("it ended well")
	}
	if n := len(g.pids()); n > 0 {
		t.Errorf("%d are left", n)
	}
	if status, ok := waitStatus(err); !ok || status.Signal() != syscall.SIGKILL {
		t.Errorf("it ended with %v", err)
	}
}

func waitStatus(err error) (syscall.WaitStatus, bool) {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return status, ok
}
