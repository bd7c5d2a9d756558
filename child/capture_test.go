package child

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"stoop/node/nodetest"
)

// suspect is a process that tests look at.
func suspect(args []string) int {
	switch args[0] {
	case "parent":
		r, err := New().start(context.Background(), "hang", struct{}{})
		if err != nil {
			return 1
		}
		// Its first word: it has its limits, and waits.
		if _, _, err := r.frames.next(); err != nil {
			return 1
		}
		fmt.Println(r.cmd.Process.Pid)
	case "fuse":
		if err := beFUSE(args[1], args[2]); err != nil {
			fmt.Println(err)
			return 1
		}
		return 0
	}
	time.Sleep(time.Minute)
	return 0
}

// run starts a suspect, and returns it with what it says first.
func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	said, err := bufio.NewReader(out).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return strings.TrimSpace(said)
}

// startOf is a process's start, in clock ticks.
func startOf(t testing.TB, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	n, err := started(b)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

type caught struct {
	Captured
	pieces map[string]string
	notes  []string
}

func capture(t testing.TB, c Capture) (caught, error) {
	t.Helper()
	return captureWith(t, New(), c)
}

func captureWith(t testing.TB, l *Launcher, c Capture) (caught, error) {
	t.Helper()
	got := caught{pieces: map[string]string{}}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var err error
	got.Captured, err = l.Capture(ctx, c, func(name string, max int64, r io.Reader) error {
		b, err := io.ReadAll(io.LimitReader(r, max))
		got.pieces[name] = string(b)
		if err != nil {
			got.pieces[name] += "!" + err.Error()
		}
		return nil
	}, func(n string) { got.notes = append(got.notes, n) })
	return got, err
}

func sleeper(t testing.TB, path string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(path, "-c", `echo ready; read line`, "an argument")
	cmd.Env = env
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	if said := run(t, cmd); said != "ready" {
		t.Fatalf("the suspect says %q", said)
	}
	return cmd
}

func copyOf(t testing.TB, path string) (file, sum string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// It has to be another file than that of every shell on the machine.
	b = append(b, "not the shell"...)
	file = filepath.Join(t.TempDir(), "suspect")
	if err := os.WriteFile(file, b, 0o755); err != nil {
		t.Fatal(err)
	}
	h := sha256.Sum256(b)
	return file, hex.EncodeToString(h[:])
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func TestCapture(t *testing.T) {
	nodetest.Root(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	exe, want := copyOf(t, "/bin/sh")
	cmd := sleeper(t, exe, "HOME=/root", "API_TOKEN=tok123", "empty=", "db_password=p=w", "URL=postgres://u:hunter2@db:5432/x?y=z", "AWS_ACCESS_KEY_ID=AKIA")
	if err := os.Remove(exe); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	got, err := capture(t, Capture{
		Suspects: []Suspect{{pid, startOf(t, pid)}, {os.Getpid(), 0}}, MaxExe: 64 << 20,
		Redact: []string{"*TOKEN*", "*PASSWORD*", "*KEY*"},
	})
	if err != nil || got.Processes != 2 || got.Gone != 0 || got.Blocked != 0 || len(got.notes) != 0 {
		t.Fatalf("%+v, notes %q, error %v", got.Captured, got.notes, err)
	}
	at := func(kind string) string { return got.pieces[fmt.Sprintf("%d.%s", pid, kind)] }
	if sum(at("exe")) != want {
		t.Error("the executable that is deleted from disk has another hash")
	}
	if at("cmdline") != exe+"\x00-c\x00echo ready; read line\x00an argument\x00" {
		t.Errorf("cmdline %q", at("cmdline"))
	}
	for _, entry := range []string{
		"HOME=/root\x00", "API_TOKEN=<redacted, 6 bytes>\x00", "empty=\x00", "db_password=<redacted, 3 bytes>\x00",
		"URL=postgres://<redacted>@db:5432/x?y=z\x00", "AWS_ACCESS_KEY_ID=<redacted, 4 bytes>\x00",
	} {
		if !strings.Contains(at("environ"), entry) {
			t.Errorf("environ lacks %q: %q", entry, at("environ"))
		}
	}
	for name, content := range got.pieces {
		if name == fmt.Sprintf("%d.exe", os.Getpid()) {
			continue // this test's, with these very words
		}
		for _, secret := range []string{"tok123", "p=w", "hunter2", "AKIA", sum("tok123")[:8]} {
			if strings.Contains(content, secret) {
				t.Errorf("%s holds the secret %s", name, secret)
			}
		}
	}
	if !strings.Contains(at("maps"), exe+" (deleted)") || !strings.Contains(at("status"), "Name:\tsuspect\n") {
		t.Errorf("maps %q\nstatus %q", at("maps"), at("status"))
	}
	var f facts
	if err := json.Unmarshal([]byte(at("json")), &f); err != nil {
		t.Fatal(err)
	}
	if f.PID != pid || f.PPID != os.Getpid() || f.Comm != "suspect" || f.Start != startOf(t, pid) || f.Exe != exe || !f.ExeDeleted ||
		f.ExePiece != fmt.Sprintf("%d.exe", pid) || f.Root != "/" || len(f.Cgroup) == 0 || len(f.Namespaces) < 6 || len(f.Errors) != 0 {
		t.Errorf("facts %+v", f)
	}
	if i := slices.IndexFunc(f.Files, func(o openFile) bool { return o.FD == 0 }); i < 0 || !strings.HasPrefix(f.Files[i].To, "pipe:") || f.Files[i].Flags == "" {
		t.Errorf("open files %+v", f.Files)
	}
	netns := strings.Trim(strings.TrimPrefix(f.Namespaces["net"], "net:"), "[]")
	port := fmt.Sprintf(":%04X ", l.Addr().(*net.TCPAddr).Port)
	if !strings.Contains(got.pieces["net-"+netns+".tcp"], port) {
		t.Errorf("the sockets lack %s: %q", port, got.pieces["net-"+netns+".tcp"])
	}
	mnt := strings.Trim(strings.TrimPrefix(f.Namespaces["mnt"], "mnt:"), "[]")
	if !strings.Contains(got.pieces["mnt-"+mnt+".mountinfo"], " /proc ") {
		t.Error("the mounts lack /proc")
	}
}

// Processes with one executable share a piece, and one that is too large is cut.
func TestCaptureOfExecutables(t *testing.T) {
	nodetest.Root(t)
	exe, _ := copyOf(t, "/bin/sh")
	a, b := sleeper(t, exe).Process.Pid, sleeper(t, exe).Process.Pid
	got, err := capture(t, Capture{Suspects: []Suspect{{PID: a}, {PID: b}}, MaxExe: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if _, two := got.pieces[fmt.Sprintf("%d.exe", b)]; two || len(got.pieces[fmt.Sprintf("%d.exe", a)]) != 1000 {
		t.Errorf("the second has its own: %t, the first has %d bytes", two, len(got.pieces[fmt.Sprintf("%d.exe", a)]))
	}
	var f facts
	if err := json.Unmarshal([]byte(got.pieces[fmt.Sprintf("%d.json", b)]), &f); err != nil || f.ExePiece != fmt.Sprintf("%d.exe", a) {
		t.Errorf("the second's is %q, %v", f.ExePiece, err)
	}
}

// Whose number is another's by now, or who is not in the container, is not
// captured.
func TestCaptureOfOthers(t *testing.T) {
	nodetest.Root(t)
	pid := sleeper(t, "/bin/sh").Process.Pid
	dead := exec.Command("/bin/true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		Capture
		want string
	}{
		"another start":     {Capture{Suspects: []Suspect{{pid, startOf(t, pid) + 1}}}, "another process has its number"},
		"another container": {Capture{Suspects: []Suspect{{PID: pid}}, Container: nodetest.ID()}, "not in the container"},
		"ended":             {Capture{Suspects: []Suspect{{PID: dead.Process.Pid}}}, "it has ended"},
	} {
		got, err := capture(t, c.Capture)
		if err != nil || got.Gone != 1 || got.Processes != 0 || len(got.pieces) != 0 || len(got.notes) != 1 || !strings.Contains(got.notes[0], c.want) {
			t.Errorf("%s: %+v, %d pieces, notes %q, error %v", name, got.Captured, len(got.pieces), got.notes, err)
		}
	}
}

// A frozen process, which is the usual one, is captured; in v1 and v2.
func TestCaptureOfAFrozenContainer(t *testing.T) {
	for name, c := range map[string]struct {
		cgroup             func(testing.TB) string
		file, freeze, thaw string
		frozen             func(dir string) bool
	}{
		"v1": {nodetest.CgroupV1, "freezer.state", "FROZEN", "THAWED", func(dir string) bool {
			b, _ := os.ReadFile(filepath.Join(dir, "freezer.state"))
			return string(b) == "FROZEN\n"
		}},
		"v2": {nodetest.CgroupV2, "cgroup.freeze", "1", "0", func(dir string) bool {
			b, _ := os.ReadFile(filepath.Join(dir, "cgroup.events"))
			return strings.Contains(string(b), "frozen 1")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := c.cgroup(t)
			cmd, _ := nodetest.Counter(t, dir)
			if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.freeze), 0); err != nil {
				t.Fatal(err)
			}
			defer os.WriteFile(filepath.Join(dir, c.file), []byte(c.thaw), 0)
			nodetest.Wait(t, "the container to be frozen", func() bool { return c.frozen(dir) })
			pid := cmd.Process.Pid
			got, err := capture(t, Capture{Suspects: []Suspect{{pid, startOf(t, pid)}}, Container: filepath.Base(dir), MaxExe: 64 << 20})
			if err != nil || got.Processes != 1 || got.Blocked != 0 {
				t.Fatalf("%+v, notes %q, error %v", got.Captured, got.notes, err)
			}
			shell, err := os.ReadFile("/bin/sh")
			if err != nil {
				t.Fatal(err)
			}
			at := func(kind string) string { return got.pieces[fmt.Sprintf("%d.%s", pid, kind)] }
			if at("exe") != string(shell) || at("cmdline") == "" || at("environ") == "" || !strings.Contains(at("maps"), "[stack]") {
				t.Errorf("exe %d bytes, cmdline %q, environ %q, maps %q", len(at("exe")), at("cmdline"), at("environ"), at("maps"))
			}
		})
	}
}

// A process whose executable does not answer holds up no other piece, and the
// child that can't be ended any more is counted until the kernel lets it go.
func TestCaptureOfAProcessThatBlocks(t *testing.T) {
	exe, hang, release := hangingFile(t, "/bin/sh")
	pid, other := sleeper(t, exe).Process.Pid, sleeper(t, "/bin/sh").Process.Pid
	hang()
	began := time.Now()
	l := New()
	got, err := captureWith(t, l, Capture{Suspects: []Suspect{{PID: pid}, {PID: other}}, MaxExe: 64 << 20})
	took := time.Since(began)
	if err != nil || got.Processes != 2 || got.Blocked != 1 {
		t.Fatalf("%+v, notes %q, error %v", got.Captured, got.notes, err)
	}
	if !strings.HasSuffix(got.pieces[fmt.Sprintf("%d.exe", pid)], "!"+errBlocked.Error()) {
		t.Errorf("its executable is %q", got.pieces[fmt.Sprintf("%d.exe", pid)])
	}
	if !strings.Contains(got.pieces[fmt.Sprintf("%d.maps", pid)], "[stack]") || got.pieces[fmt.Sprintf("%d.exe", other)] == "" ||
		!strings.Contains(got.pieces[fmt.Sprintf("%d.maps", other)], "[stack]") {
		t.Error("other pieces are missing")
	}
	if took > 2*exePatience+reap {
		t.Errorf("it took %s", took)
	}
	if n := l.left.Load(); n != 1 || len(l.slots) != 0 {
		t.Errorf("%d children were left behind, %d slots are taken", n, len(l.slots))
	}
	release()
	nodetest.Wait(t, "the child to end", func() bool { return l.left.Load() == 0 })
}

func TestRedaction(t *testing.T) {
	all := redactor{"*TOKEN*", "*PASS*", "X"}
	for in, want := range map[string]string{
		"":                                "",
		"A=b\x00":                         "A=b\x00",
		"TOKEN=\x00":                      "TOKEN=<redacted, 0 bytes>\x00",
		"my_token_x=a=b=c\x00A=1\x00":     "my_token_x=<redacted, 5 bytes>\x00A=1\x00",
		"a/TOKEN/b=x\x00":                 "a/TOKEN/b=<redacted, 1 bytes>\x00",
		"x=secret\x00xx=kept\x00":         "x=<redacted, 6 bytes>\x00xx=kept\x00",
		"no equals\x00":                   "no equals\x00",
		"TOKEN":                           "TOKEN\x00",
		"\x00\x00A=b\x00":                 "\x00\x00A=b\x00",
		"U=https://a:b@h/ http://c@d\x00": "U=https://<redacted>@h/ http://c@d\x00",
		"U=redis://:p%40:w@h\x00":         "U=redis://<redacted>@h\x00",
		"U=see a:b@c\x00":                 "U=see a:b@c\x00",
	} {
		if got := string(all.environ([]byte(in))); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
	if err := (redactor{"["}).validate(); err == nil {
		t.Error("a glob that is none passes")
	}
}

func TestInContainer(t *testing.T) {
	id := nodetest.ID()
	for cgroup, want := range map[string]bool{
		"0::/docker/" + id + "\n":                                      true,
		"0::/kubepods.slice/x.slice/cri-containerd-" + id + ".scope\n": true,
		"4:freezer:/docker/" + id + "/inner\n0::/\n":                   true,
		"0::/docker/" + nodetest.ID() + "\n":                           false,
		"0::/docker/0" + id + "\n":                                     false,
		"0::/docker/" + id[:12] + "\n":                                 false,
		"0::/\n":                                                       false,
	} {
		if got := inContainer([]byte(cgroup), id); got != want {
			t.Errorf("%q: %t", cgroup, got)
		}
	}
}
