package host

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"stoop/e2e/harness"
	"stoop/e2e/program"
)

const (
	older, newer = "0.1.0", "0.2.0"
	// perSecond is how many alerts are written while all this happens.
	perSecond = 500
	pipe      = "/run/stoop/falco.pipe"
	kept      = "/var/lib/stoop/kept.jsonl"
	// quiet is a log without a line for every step: the host's journal would be
	// what is measured.
	quiet = "log: {level: warn}\n"
)

// format is one kind of package, and what installs and removes it.
type format struct {
	name      string
	install   []string
	upgrade   []string
	downgrade []string
	remove    []string
	purge     []string // nil: there is no such thing
}

func TestDeb(t *testing.T) {
	needs(t)
	install := []string{"dpkg", "--install"}
	live(t, format{
		name: "deb", install: install, upgrade: install, downgrade: install,
		remove: []string{"dpkg", "--remove", "stoop"}, purge: []string{"dpkg", "--purge", "stoop"},
	})
}

// A Debian has no packages of rpm's, so what it needs of them is not looked for.
func TestRPM(t *testing.T) {
	needs(t)
	live(t, format{
		name: "rpm", install: []string{"rpm", "--nodeps", "--install"}, upgrade: []string{"rpm", "--nodeps", "--upgrade"},
		downgrade: []string{"rpm", "--nodeps", "--upgrade", "--oldpackage"}, remove: []string{"rpm", "--erase", "stoop"},
	})
}

// builds are the packages of both versions, made once for all tests, in a folder
// for each version.
var builds struct {
	sync.Mutex
	dir string // STOOP_PACKAGES, if that is set: what is there is not built again
}

func TestMain(m *testing.M) {
	var code int
	err := harness.Outside(context.Background(), os.Stderr, func(t harness.T) {
		if builds.dir = os.Getenv("STOOP_PACKAGES"); builds.dir == "" {
			builds.dir = t.TempDir()
		}
		code = m.Run()
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// packageOf is a version's package, as make packages makes it, at a path on the
// host.
func packageOf(t *testing.T, m *machine, kind, version string) string {
	t.Helper()
	builds.Lock()
	defer builds.Unlock()
	out := filepath.Join(builds.dir, version)
	if _, err := os.Stat(filepath.Join(out, "SHA256SUMS")); err != nil {
		cmd := exec.CommandContext(t.Context(), "go", "run", "./release", "-version", version, "-arch", runtime.GOARCH, "-out", out, "packages")
		cmd.Dir = "../../tools"
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make packages: %v\n%s", err, said)
		}
	}
	found, err := filepath.Glob(filepath.Join(out, "*."+kind))
	if err != nil || len(found) != 1 {
		t.Fatalf("the packages are %q, %v", found, err)
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	path := "/srv/" + filepath.Base(found[0])
	if err := os.WriteFile(m.path(path), data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// live is a package's life on a host.
func live(t *testing.T, f format) {
	m := boot(t)
	first, second := packageOf(t, m, f.name, older), packageOf(t, m, f.name, newer)
	// A stand-in for Falco's unit, under one of the names that Falco's packages use.
	m.write("/etc/systemd/system/falco-modern-bpf.service", "[Service]\nExecStart=/bin/sleep infinity\n")

	m.run(append(f.install, first)...)
	if f.name == "rpm" { // on such hosts nothing is started that nobody asked for
		m.run("systemctl", "enable", "--now", "stoop.socket", "stoop.service")
	}
	m.state("stoop.socket", "active")
	m.state("stoop.service", "active")
	installed(t, m)

	// As an administrator sets it up: rules, a secret, and what uses it.
	m.write("/etc/stoop/rules.yaml", "mode: enforce\nrules:\n  - name: keep\n    match: {priority: debug}\n    actions:\n      - file: {path: "+kept+"}\n")
	m.write("/etc/stoop/secrets/http-token", "not-to-be-read\n")
	m.run("chmod", "0600", "/etc/stoop/secrets/http-token")
	m.write("/etc/stoop/stoop.yaml", quiet+"mode: enforce\nnode: this-host\nsource:\n  http: {listen: 127.0.0.1:2801, token-file: /run/credentials/stoop.service/secret_http-token}\n")
	m.run("systemctl", "restart", "stoop.service")
	m.state("stoop.service", "active")
	status(t, m, "mode enforce; 1 rules")

	socket := m.property("stoop.socket", "ActiveEnterTimestampMonotonic")
	falco := write(t, m)
	during := func(what string, do func()) {
		t.Helper()
		before, began := falco.written.Load(), time.Now()
		do()
		falco.beyond(t, before+perSecond/2)
		t.Logf("%s: %s, %d alerts were written meanwhile", what, time.Since(began).Round(10*time.Millisecond), falco.written.Load()-before)
	}
	during("upgrade", func() {
		m.run(append(f.upgrade, second)...)
		m.state("stoop.service", "active")
		runs(t, m, newer)
		if got := m.run("cat", "/etc/stoop/stoop.yaml"); !strings.Contains(got, "http-token") {
			t.Errorf("the upgrade took the configuration away:\n%s", got)
		}
	})
	during("kill -9", func() {
		again := m.another("stoop.service")
		m.run("systemctl", "kill", "--signal=SIGKILL", "stoop.service")
		again()
	})
	during("systemd starts itself anew", func() { m.run("systemctl", "daemon-reexec") })
	during("stop, and the next alert starts it", func() {
		again := m.another("stoop.service")
		_, _ = m.try("systemctl", "stop", "stoop.service") // by the time it says so, it may run again
		again()
	})
	during("wrong rules, for far more starts than systemd allows by default", func() {
		right := m.run("cat", "/etc/stoop/rules.yaml")
		m.write("/etc/stoop/rules.yaml", "rules: nonsense\n")
		_, _ = m.try("systemctl", "restart", "stoop.service")
		harness.Eventually(t, time.Minute, 100*time.Millisecond, func() (bool, string) {
			var n int
			_, err := fmt.Sscan(m.property("stoop.service", "NRestarts"), &n)
			return err == nil && n >= 7, fmt.Sprintf("7 starts in vain; there were %d", n)
		})
		status(t, m, "rules.yaml")
		m.write("/etc/stoop/rules.yaml", right)
		m.state("stoop.service", "active")
		status(t, m, "mode enforce; 1 rules")
	})
	during("downgrade", func() {
		m.run(append(f.downgrade, first)...)
		m.state("stoop.service", "active")
		runs(t, m, older)
	})
	if got := m.property("stoop.socket", "ActiveEnterTimestampMonotonic"); got != socket {
		t.Error("the socket unit was stopped meanwhile, and the FIFO closed")
	}
	falco.end(t)
	falco.allStored(t, m)

	out := m.run(f.remove...)
	if f.name == "deb" && strings.Contains(out, "Falco still writes") {
		t.Errorf("it warns of a configuration that is not there: %s", out)
	}
	m.state("stoop.service", "inactive")
	m.state("stoop.socket", "inactive")
	if m.exists(pipe) {
		t.Error("the FIFO stays, and Falco would wait at it for ever")
	}
	if !m.exists("/var/lib/stoop/store") || !m.exists("/etc/stoop/stoop.yaml") && f.name == "deb" {
		t.Error("the removal took data or configuration along")
	}
	if f.purge == nil {
		return
	}

	// Back again, as it was; with Falco's part this time.
	m.run(append(f.install, second)...)
	m.state("stoop.service", "active")
	status(t, m, "mode enforce; 1 rules")
	m.run("mkdir", "-p", "/etc/falco/config.d")
	m.run("cp", "/usr/share/stoop/falco.yaml", "/etc/falco/config.d/stoop.yaml")
	if out := m.run(f.remove...); !strings.Contains(out, "Falco still writes to stoop's FIFO") {
		t.Errorf("the removal does not say that Falco still writes: %s", out)
	}
	m.run(f.purge...)
	for _, path := range []string{"/var/lib/stoop", "/etc/stoop", "/run/stoop", "/usr/bin/stoop", "/usr/share/stoop"} {
		if m.exists(path) {
			t.Errorf("%s is left over", path)
		}
	}
	if left, _ := m.try("sh", "-c", "find /etc/systemd /usr/lib/systemd /usr/lib/sysusers.d /usr/lib/tmpfiles.d -name '*stoop*'"); left != "" {
		t.Errorf("left over are %s", left)
	}
}

// installed holds a fresh installation to what the documentation says of it.
func installed(t *testing.T, m *machine) {
	t.Helper()
	info, err := os.Lstat(m.path(pipe))
	if err != nil {
		t.Fatal(err)
	}
	if stat := info.Sys().(*syscall.Stat_t); info.Mode() != fs.ModeNamedPipe|0o600 || stat.Uid != 0 {
		t.Errorf("the FIFO is %s of user %d, want a FIFO of root's that nobody else writes to", info.Mode(), stat.Uid)
	}
	if got := m.run("stat", "--format=%a %U %G", "/etc/stoop", "/etc/stoop/secrets", "/var/lib/stoop"); got != "750 root stoop\n700 root root\n700 stoop stoop\n" {
		t.Errorf("the folders are\n%s", got)
	}
	pid := m.property("stoop.service", "MainPID")
	ids := strings.Fields(m.run("id", "--user", "stoop"))
	for line := range strings.Lines(m.run("cat", "/proc/"+pid+"/status")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if (name == "CapBnd" || name == "CapEff") && strings.Trim(value, "\t0") != "" {
			t.Errorf("%s is %s", name, value)
		}
		if f := strings.Fields(value); name == "Uid" && (len(f) != 4 || f[0] != ids[0] || f[1] != ids[0]) {
			t.Errorf("it runs as %s, want %s", value, ids[0])
		}
	}
	status(t, m, "mode audit; ")
	// Commands of root's reach it.
	if out := m.run("stoop", "history", "-o", "json"); out != "" {
		t.Errorf("the history of a fresh one: %s", out)
	}
	m.run("stoop", "check", "--config", "/etc/stoop/stoop.yaml", "--rules", "/etc/stoop/rules.yaml")
	// Without a kernel of its own or a cluster, it complains of nothing.
	log := m.run("journalctl", "--no-pager", "-o", "cat", "_SYSTEMD_UNIT=stoop.service")
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"level":"ERROR"`) || strings.Contains(line, `"level":"WARN"`) {
			t.Errorf("it says %s", line)
		}
	}
	// Falco's unit, however it is started, has the FIFO before it.
	after, wants := m.property("falco-modern-bpf.service", "After"), m.property("falco-modern-bpf.service", "Wants")
	if !strings.Contains(after, "stoop.socket") || !strings.Contains(wants, "stoop.socket") {
		t.Errorf("Falco's unit is after %s and wants %s", after, wants)
	}
}

// status waits until systemctl status shows a text.
func status(t *testing.T, m *machine, want string) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, 100*time.Millisecond, func() (bool, string) {
		got := m.property("stoop.service", "StatusText")
		return strings.Contains(got, want), fmt.Sprintf("the status %q; it is %q", want, got)
	})
}

// runs fails unless the running program is of a version.
func runs(t *testing.T, m *machine, version string) {
	t.Helper()
	exe := "/proc/" + m.property("stoop.service", "MainPID") + "/exe"
	if got := m.run(exe, "--version"); got != "stoop v"+version+"\n" {
		t.Errorf("what runs is %s, want %s", got, version)
	}
}

// falco is what writes alerts as Falco does: it opens the FIFO once, and an error
// of that one descriptor is for ever.
type falco struct {
	written atomic.Int64
	ids     []string // of what was written; to be read when done
	stop    chan struct{}
	done    chan error
}

func write(t *testing.T, m *machine) *falco {
	t.Helper()
	f, err := os.OpenFile(m.path(pipe), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	w := &falco{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		defer f.Close()
		begin := time.Now()
		for n := 0; ; n++ {
			// What was held up is made up for.
			if wait := time.Until(begin.Add(time.Duration(n) * time.Second / perSecond)); wait > 0 {
				select {
				case <-time.After(wait):
				case <-w.stop:
					w.done <- nil
					return
				}
			}
			select {
			case <-w.stop:
				w.done <- nil
				return
			default:
			}
			line := program.Alert{
				Hostname: "this-host", Output: fmt.Sprintf("alert number %d", n), Priority: "Notice", Rule: "Something", Source: "syscall",
				Fields: map[string]any{"container.id": "host", "proc.cmdline": strings.Repeat("x", 400)}, Time: program.Stamp(time.Now()),
			}.Line()
			if err := f.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
				w.done <- err
				return
			}
			if _, err := f.Write(line); err != nil {
				w.done <- fmt.Errorf("alert %d: %w", n, err)
				return
			}
			w.ids = append(w.ids, program.ID(line))
			w.written.Add(1)
		}
	}()
	t.Cleanup(func() {
		select {
		case <-w.stop:
		default:
			close(w.stop)
		}
	})
	w.beyond(t, perSecond)
	return w
}

// beyond waits until so many alerts have been written.
func (w *falco) beyond(t *testing.T, n int64) {
	t.Helper()
	harness.Eventually(t, time.Minute, 10*time.Millisecond, func() (bool, string) {
		select {
		case err := <-w.done:
			t.Fatalf("Falco could not write: %v", err)
		default:
		}
		return w.written.Load() >= n, fmt.Sprintf("%d alerts to be written; %d are", n, w.written.Load())
	})
}

func (w *falco) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	select {
	case err := <-w.done:
		if err != nil {
			t.Fatalf("Falco could not write: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("the writer does not end")
	}
}

// allStored waits until every alert that was written has been stored and held
// against the rules: each has an outcome.
func (w *falco) allStored(t *testing.T, m *machine) {
	t.Helper()
	have := map[string]bool{}
	missing := 0
	harness.Eventually(t, 2*time.Minute, time.Second, func() (bool, string) {
		out, err := m.try("stoop", "history", "-o", "json")
		if err != nil {
			t.Fatalf("stoop history: %v\n%s", err, out)
		}
		for line := range strings.Lines(out) {
			var o struct{ Alert string }
			if json.Unmarshal([]byte(line), &o) == nil {
				have[o.Alert] = true
			}
		}
		missing = 0
		for _, id := range w.ids {
			if !have[id] {
				missing++
			}
		}
		return missing == 0, fmt.Sprintf("the outcomes of %d of %d alerts", missing, len(w.ids))
	})
	if len(have) != len(w.ids) {
		t.Errorf("%d alerts were written, and %d stored", len(w.ids), len(have))
	}
	t.Logf("%d alerts written, %d stored", len(w.ids), len(have))
}
