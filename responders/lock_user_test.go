package responders

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
)

// A user's world is an /etc of the test's own, which the real usermod changes,
// and real processes under an uid that nobody has.
type userWorld struct {
	*userLocker
	uid   uint32
	alert map[string]any
}

const (
	someday  = "20999" // in 2027
	password = "$y$j9T$salt$hash"
)

func newUserWorld(t *testing.T, shadow string) *userWorld {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: processes of another user, and usermod")
	}
	if _, err := os.Stat("/usr/sbin/usermod"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("needs usermod: %v", err)
	}
	w := &userWorld{uid: 1<<20 + rand.Uint32N(1<<20)}
	w.userLocker = lockUser().New(Env{Own: &OwnProcesses{}}).(*userLocker)
	w.root, w.host = t.TempDir(), func() error { return nil }
	if err := os.Mkdir(w.root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"passwd": fmt.Sprintf(`root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
mallory:x:%[1]d:%[1]d:Mallory,,,:/home/mallory:/bin/bash
twice:x:%[2]d:%[2]d::/:/bin/sh
thrice:x:%[2]d:%[2]d::/:/bin/sh
-option:x:%[3]d:%[3]d::/:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
noshadow:x:%[4]d:%[4]d::/:/bin/sh
`, w.uid, w.uid+1<<21, w.uid+1<<22, w.uid+1<<23),
		"shadow": "root:*:19000:0:99999:7:::\nmallory:" + shadow + "\n-option:x:19000:0:99999:7:::\n",
		"group":  fmt.Sprintf("root:x:0:\nmallory:x:%d:\n", w.uid), "gshadow": "root:*::\nmallory:!::\n", "login.defs": "",
	} {
		if err := os.WriteFile(filepath.Join(w.root, "etc", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _, _ = w.killAll(context.Background(), w.uid) }) // also when it fails half-way
	w.alert = map[string]any{"user.name": "mallory", "user.uid": w.uid, "container.id": "host"}
	return w
}

func (w *userWorld) request(t *testing.T, params string, fields map[string]any) *Request {
	t.Helper()
	all := maps.Clone(w.alert)
	maps.Copy(all, fields)
	a := ownAlert(t, time.Now(), all)
	return &Request{
		Alert: a, Target: a.Target(),
		Step: &broker.Step{ID: "0123456789abcdef0123", Action: broker.Action{Responder: "lock-user", Params: json.RawMessage(params)}},
	}
}

// line is the user's line of /etc/shadow, from the password on, without the day
// on which it was changed, which usermod sets.
func (w *userWorld) line(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(w.root + "/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(b), "\nmallory:")
	line, _, _ = strings.Cut(line, "\n")
	return line
}

func (w *userWorld) start(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.uid, Gid: w.uid}, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func TestLockUser(t *testing.T) {
	for _, c := range []struct{ name, before, locked string }{
		{"a password", password + ":19000:0:99999:7:::", "!" + password + ":19000:0:99999:7::1:"},
		{"one that expires someday", password + ":19000:0:99999:7::" + someday + ":", "!" + password + ":19000:0:99999:7::1:"},
		{"keys only", "*:19000:0:99999:7:::", "!*:19000:0:99999:7::1:"},
		{"a locked password", "!" + password + ":19000:0:99999:7:::", "!" + password + ":19000:0:99999:7::1:"},
		{"no password", ":19000:0:99999:7:::", ":19000:0:99999:7::1:"},
		{"one that expired, with a password", password + ":19000:0:99999:7::19000:", "!" + password + ":19000:0:99999:7::19000:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newUserWorld(t, c.before)
			passwd, err := os.ReadFile(w.root + "/etc/passwd")
			if err != nil {
				t.Fatal(err)
			}
			r := w.request(t, `{"ttl":"1h"}`, nil)
			if err := w.Check(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if line := w.line(t); line != c.before {
				t.Fatalf("the check changed it: %s", line)
			}
			var intended json.RawMessage
			r.intend = func(undo json.RawMessage, _ time.Duration) {
				intended = undo
				if line := w.line(t); line != c.before {
					t.Errorf("when it was said what is going to be done it was done: %s", line)
				}
			}
			res, err := w.Act(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			if line := w.line(t); line != c.locked {
				t.Errorf("locked: %s\nwant    %s", line, c.locked)
			}
			if res.TTL != time.Hour || res.Nothing || string(res.Undo) != string(intended) || len(intended) == 0 {
				t.Errorf("result %+v, intended %s", res, intended)
			}

			again, err := w.Act(t.Context(), w.request(t, ``, nil))
			if err != nil || !again.Nothing || again.Undo != nil {
				t.Errorf("the second time: %+v, %v", again, err)
			}
			// It was cut off before the record: another run knows what was there.
			r.Intended, r.Resumed = intended, true
			cut, err := w.Act(t.Context(), r)
			if err != nil || cut.Nothing || string(cut.Undo) != string(res.Undo) {
				t.Errorf("after a crash: %+v, %v", cut, err)
			}

			u := &UndoRequest{ID: "x", Record: res.Undo}
			if res, err := w.Undo(t.Context(), u); err != nil || res.Nothing {
				t.Errorf("undo: %+v, %v", res, err)
			}
			if line := w.line(t); line != c.before {
				t.Errorf("taken back: %s\nwant        %s", line, c.before)
			}
			if res, err := w.Undo(t.Context(), u); err != nil || !res.Nothing {
				t.Errorf("undo once more: %+v, %v", res, err)
			}
			if now, err := os.ReadFile(w.root + "/etc/passwd"); err != nil || string(now) != string(passwd) {
				t.Errorf("/etc/passwd has changed: %s (%v)", now, err)
			}
		})
	}
}

func TestLockUserLeavesTheLocked(t *testing.T) {
	w := newUserWorld(t, "!"+password+":19000:0:99999:7::19000:")
	res, err := w.Act(t.Context(), w.request(t, ``, nil))
	if err != nil || !res.Nothing {
		t.Errorf("%+v, %v", res, err)
	}
	if line := w.line(t); line != "!"+password+":19000:0:99999:7::19000:" {
		t.Errorf("it is now %s", line)
	}
}

// What others did to the account since is theirs.
func TestLockUserUndoSparesOthers(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	res, err := w.Act(t.Context(), w.request(t, ``, nil))
	if err != nil {
		t.Fatal(err)
	}
	usermod := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("/usr/sbin/usermod", append([]string{"--prefix", w.root}, append(args, "mallory")...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	usermod("--expiredate", someday)
	u := &UndoRequest{ID: "x", Record: res.Undo}
	if _, err := w.Undo(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	if line := w.line(t); line != password+":19000:0:99999:7::"+someday+":" {
		t.Errorf("it is now %s", line)
	}
	if out, err := exec.Command("sed", "-i", "/^mallory/d", w.root+"/etc/passwd").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := w.Undo(t.Context(), u); !errors.Is(err, ErrGone) || as[*refusal](err) {
		t.Errorf("the user was removed: %v", err)
	}
	for _, bad := range []string{``, `{}`, `{"name":"root","uid":0,"password":true}`} {
		if _, err := w.Undo(t.Context(), &UndoRequest{Record: json.RawMessage(bad)}); !as[*refusal](err) {
			t.Errorf("undo of %q: %v", bad, err)
		}
	}
}

func TestLockUserRefuses(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	for _, c := range []struct {
		params string
		fields map[string]any
		want   string
	}{
		{``, map[string]any{"user.name": "root", "user.uid": 0}, "root is never locked"},
		{``, map[string]any{"user.name": "daemon", "user.uid": 1}, "the system's"},
		{``, map[string]any{"user.name": "nobody", "user.uid": 65534}, "the system's"},
		{``, map[string]any{"user.name": "mallory", "user.uid": 0}, "has uid 0 there"},
		{``, map[string]any{"user.name": "root", "user.uid": w.uid}, "has uid"},
		{``, map[string]any{"user.name": "alice", "user.uid": w.uid}, "no user"},
		{``, map[string]any{"user.name": nil}, "does not name its user"},
		{``, map[string]any{"user.uid": "<NA>"}, "does not name its user"},
		{``, map[string]any{"user.uid": "12; reboot"}, "no number"},
		{``, map[string]any{"user.uid": "-1"}, "a service started it"},
		{``, map[string]any{"user.name": "../../root", "user.uid": 5000}, "no user"},
		{``, map[string]any{"user.name": "twice", "user.uid": w.uid + 1<<21}, "another name"},
		{``, map[string]any{"user.name": "-option", "user.uid": w.uid + 1<<22}, "no name that usermod takes"},
		{``, map[string]any{"user.name": "noshadow", "user.uid": w.uid + 1<<23}, "no line in /etc/shadow"},
		{``, map[string]any{"container.id": "0123456789ab"}, "a container raised the alert"},
		{`{"protect":["mal*"]}`, nil, "is protected"},
		{`{"user":"login"}`, map[string]any{"user.loginname": "<NA>", "user.loginuid": -1}, "does not name its user"},
		{`{"user":"login"}`, map[string]any{"user.loginname": "mallory", "user.loginuid": -1}, "a service started it"},
		{`{"user":"login"}`, map[string]any{"user.loginname": "root", "user.loginuid": 0}, "root is never locked"},
		{`{"users":["a"]}`, nil, "no parameter"},
	} {
		r := w.request(t, c.params, c.fields)
		err := w.Check(t.Context(), r)
		if status, _, _, reason := classify(err); status != broker.Refused || !strings.Contains(reason, c.want) {
			t.Errorf("%s %v: %s, %s; want it refused: %s", c.params, c.fields, status, reason, c.want)
		}
		if _, err := w.Act(t.Context(), r); err == nil {
			t.Errorf("%s %v: done all the same", c.params, c.fields)
		}
	}
	if line := w.line(t); line != password+":19000:0:99999:7:::" {
		t.Errorf("it is now %s", line)
	}
	w.host = func() error { return errors.New("stoop runs in a container") }
	if err := w.Check(t.Context(), w.request(t, ``, nil)); !as[*refusal](err) || !strings.Contains(err.Error(), "in a container") {
		t.Errorf("in a container: %v", err)
	}
	if _, err := w.Undo(t.Context(), &UndoRequest{Record: json.RawMessage(`{"name":"mallory","uid":5000}`)}); !as[*refusal](err) {
		t.Errorf("undo in a container: %v", err)
	}
	w.host = func() error { return nil }
	w.usermod = "/usr/sbin/no-usermod"
	if _, err := w.Act(t.Context(), w.request(t, ``, nil)); !as[*refusal](err) || !strings.Contains(err.Error(), "no-usermod") {
		t.Errorf("without usermod: %v", err)
	}
}

// The one who logged in is another than the one whose process it is.
func TestLockUserWhoLoggedIn(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	r := w.request(t, `{"user":"login"}`, map[string]any{
		"user.name": "root", "user.uid": 0, "user.loginname": "mallory", "user.loginuid": w.uid,
	})
	if res, err := w.Act(t.Context(), r); err != nil || res.Found["user"] != "mallory" {
		t.Errorf("%+v, %v", res, err)
	}
	if o := w.Object(r); o != "user/\""+strconv.Itoa(int(w.uid))+`"` {
		t.Errorf("the cooldown counts by %s", o)
	}
}

func TestLockUserEndsHisProcesses(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o777), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	shell := w.start(t, "/bin/sh", "-c", "trap '' TERM HUP; setsid sleep 600 & echo $! > "+dir+"/apart; sleep 600")
	// One that is never the same for long.
	hydra := w.start(t, "/bin/sh", "-c", "while :; do (sleep 600 & exec sleep 0.01) & wait $!; done")
	other := exec.Command("/bin/sleep", "600")
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.uid + 1, Gid: w.uid}}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	held := w.start(t, "/bin/sleep", "600")
	container := w.contain(t, held.Process.Pid)
	apart := number(t, dir+"/apart")

	// Between the list and the kill a number may become another's.
	if was, err := proc("/proc").killUser(other.Process.Pid, w.uid); was || err != nil {
		t.Errorf("another user's process was taken for his (%v)", err)
	}
	res, err := w.Act(t.Context(), w.request(t, ``, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{shell.Process.Pid, apart, hydra.Process.Pid} {
		gone(t, pid)
	}
	left, err := proc("/proc").ofUser(w.uid)
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range left {
		if pid != held.Process.Pid && !isZombie(pid) {
			t.Errorf("process %d of his runs on", pid)
		}
	}
	if isZombie(other.Process.Pid) {
		t.Error("another user's process was killed")
	}
	if container && isZombie(held.Process.Pid) {
		t.Error("a container's process was killed, which only has the same number for its user")
	}
	if n, _ := strconv.Atoi(res.Found["killed"]); n < 4 || res.Nothing {
		t.Errorf("result %+v", res)
	}
}

// contain puts a process into a cgroup as a container has.
func (w *userWorld) contain(t *testing.T, pid int) bool {
	t.Helper()
	id := strings.Repeat(alert.IDOf([]byte(t.Name()+w.root)), 2)
	for _, h := range proc("/proc").hierarchies() {
		dir := filepath.Join(h.dir, "docker-"+id+".scope")
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { (&group{dirs: []string{dir}}).remove() })
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
		if writeExisting(dir+"/cgroup.procs", strconv.Itoa(pid)) == nil {
			return true
		}
	}
	if os.Getenv("CI") != "" {
		t.Error("root could make no cgroup here")
	}
	return false
}

// Where logind knows the user, it ends his sessions: a program in its place
// says what it was asked for.
func TestLockUserAsksLogind(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	asked := t.TempDir() + "/asked"
	w.loginctl = t.TempDir() + "/loginctl"
	if err := os.WriteFile(w.loginctl, []byte("#!/bin/sh\necho \"$@\" > "+asked+"\necho 'Connection refused' >&2; exit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	uid := strconv.Itoa(int(w.uid))
	if err := os.MkdirAll(w.root+"/run/systemd/users/"+uid, 0o755); err != nil {
		t.Fatal(err)
	}
	res, err := w.Act(t.Context(), w.request(t, ``, nil))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(asked); string(b) != "terminate-user "+uid+"\n" {
		t.Errorf("logind was asked for %q (%v)", b, err)
	}
	if !strings.Contains(res.Reason, `could not be ended by logind`) || !strings.Contains(res.Reason, `"Connection refused"`) || res.Undo == nil {
		t.Errorf("result %+v", res)
	}
}

func TestLockUserGivesUpInTime(t *testing.T) {
	w := newUserWorld(t, password+":19000:0:99999:7:::")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Act(ctx, w.request(t, ``, nil)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if line := w.line(t); line != password+":19000:0:99999:7:::" {
		t.Errorf("it is now %s", line)
	}
	if most := lockUser().Deadline; most < 2*endSessions+5*time.Second {
		t.Errorf("a try has only %s", most)
	}
}

func TestInContainer(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for groups, want := range map[string]bool{
		"0::/system.slice/docker-" + id + ".scope\n":                                                             true,
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope\n":                               true,
		"8:pids:/docker/" + id + "\n0::/\n":                                                                      true,
		"0::/machine.slice/machine-debian.scope/payload\n":                                                       true,
		"0::/user.slice/user-1000.slice/session-1.scope\n":                                                       false,
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/docker-" + id + ".scope\n":                   false,
		"0::/system.slice/cron.service\n":                                                                        false,
		"0::/user.slice/user-1000.slice/user@1000.service/a\n1:name=systemd:/system.slice/docker-" + id + ".s\n": true,
	} {
		if got := inContainer([]byte(groups)); got != want {
			t.Errorf("%s: %v", groups, got)
		}
	}
}

// In a pid namespace of its own, as a container has, a process is not the
// host's, although its / is.
func TestBareHost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: a pid namespace")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestAsContainer$", "--", "contained")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "in a container") {
		t.Errorf("%v: %s", err, out)
	}
	// Process 1 with another root.
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/1", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/self/ns", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pid:[4026531836]", dir+"/self/ns/pid"); err != nil {
		t.Fatal(err)
	}
	for root, want := range map[string]string{"/": "", t.TempDir(): "not the host's", "/no/such": "can't be told"} {
		_ = os.Remove(dir + "/1/root")
		if err := os.Symlink(root, dir+"/1/root"); err != nil {
			t.Fatal(err)
		}
		err := proc(dir).bareHost()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("process 1 with root %s: %v", root, err)
		}
	}
}

func TestAsContainer(*testing.T) {
	if flag.Arg(0) == "contained" {
		fmt.Println(proc("/proc").bareHost())
	}
}
