// Package host tests stoop's packages and units on a host whose systemd really
// runs: a Debian tree, booted in a container of its own by systemd-nspawn. It
// installs, upgrades under load, downgrades, removes and purges.
//
// make e2e-host runs it, as root.
package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/e2e/harness"
)

const (
	release = "bookworm"
	// packages are what the tree holds beside the least: a systemd, and rpm for
	// the other package.
	packages = "systemd,systemd-sysv,dbus,rpm"
	// bootWithin is far above what booting was seen to take, which is 2 s.
	bootWithin = time.Minute
	// commandWithin bounds every command on the host.
	commandWithin = 2 * time.Minute
)

// needs fails, or skips where that is allowed, unless this machine can boot a host.
func needs(t *testing.T) {
	t.Helper()
	if os.Getenv("E2E_HOST") == "" {
		t.Skip("make e2e-host runs this: it boots a host, as root")
	}
	if os.Getuid() != 0 {
		t.Fatal("booting a host needs root")
	}
	for _, program := range []string{"systemd-nspawn", "debootstrap", "apt-get", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v (apt-get install systemd-container debootstrap util-linux)", err)
		}
	}
}

// tree is a Debian tree, made once and kept in the user's cache.
func tree(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	name := release + "-" + strings.ReplaceAll(packages, ",", "-")
	dir := filepath.Join(cache, "stoop-e2e", name)
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	// Whatever this machine gets its own packages from.
	mirror, err := exec.Command("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: "+release).Output()
	if err != nil || len(bytes.Fields(mirror)) == 0 {
		t.Fatalf("apt-get knows of no %s: %v (apt-get update)", release, err)
	}
	half := dir + ".new"
	if err := os.RemoveAll(half); err != nil {
		t.Fatal(err)
	}
	t.Logf("making a Debian tree in %s, once", dir)
	out, err := exec.CommandContext(t.Context(), "debootstrap", "--variant=minbase", "--include="+packages, release, half, string(bytes.Fields(mirror)[0])).CombinedOutput()
	if err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, out)
	}
	if err := os.Rename(half, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// machine is a host that was booted.
type machine struct {
	t      *testing.T
	root   string // its files, as they are seen from here
	leader int    // its PID 1
}

// boot boots a host; it is gone at the test's end.
func boot(t *testing.T) *machine {
	t.Helper()
	base := tree(t)
	dir := t.TempDir()
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m := &machine{t: t, root: filepath.Join(dir, "root")}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", base, dir, dir)
	if err := unix.Mount("overlay", m.root, "overlay", 0, options); err != nil {
		t.Fatalf("lay a writable layer over the tree: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(m.root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	name := fmt.Sprintf("stoop-e2e-host-%d", os.Getpid())
	groups := cgroups(t, name)
	script := ""
	for _, g := range groups {
		script += "echo $$ > " + filepath.Join(g, "cgroup.procs") + " && "
	}
	script += `exec systemd-nspawn --quiet --directory="$0" --machine="$1" --register=no --keep-unit --private-network --link-journal=no --console=pipe --boot`
	var said bytes.Buffer
	cmd := exec.Command("/bin/sh", "-c", script, m.root, name)
	cmd.Stdout, cmd.Stderr = &said, &said
	// Its standard input has to stay open.
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := harness.Spawn(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if t.Failed() {
			journal, _ := m.try("journalctl", "--no-pager", "-n", "40", "-o", "short-precise", "-u", "stoop.service", "-u", "stoop.socket")
			t.Logf("the host's journal:\n%s", journal)
		}
		// Its systemd ends all that runs on it.
		if err := p.Stop(30 * time.Second); err != nil {
			t.Logf("end the host: %v", err)
		}
		for _, g := range groups {
			removeCgroup(g)
		}
	})
	harness.Eventually(t, bootWithin, 100*time.Millisecond, func() (bool, string) {
		if !p.Running() {
			t.Fatalf("systemd-nspawn ended:\n%s", said.Bytes())
		}
		if m.leader == 0 {
			m.leader = child(cmd.Process.Pid, "systemd")
		}
		if m.leader == 0 {
			return false, "the host's systemd"
		}
		state, _ := m.try("systemctl", "is-system-running")
		return state == "running\n", "the host to be running; it is " + strings.TrimSpace(state)
	})
	return m
}

// cgroups makes a cgroup for the host where systemd keeps its own.
func cgroups(t *testing.T, name string) []string {
	t.Helper()
	var groups []string
	for _, hierarchy := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err != nil {
			continue
		}
		g := filepath.Join(hierarchy, name)
		if err := os.MkdirAll(g, 0o755); err != nil {
			t.Fatal(err)
		}
		groups = append(groups, g)
	}
	return groups
}

// removeCgroup removes a cgroup and those in it, from the innermost.
func removeCgroup(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}

// child is the process of a name that a process has started, or 0.
func child(parent int, name string) int {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", parent, parent))
	for _, f := range strings.Fields(string(data)) {
		comm, _ := os.ReadFile("/proc/" + f + "/comm")
		if pid, err := strconv.Atoi(f); err == nil && string(comm) == name+"\n" {
			return pid
		}
	}
	return 0
}

// try runs a command on the host.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandWithin)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(m.leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "TERM=dumb", "SYSTEMD_PAGER=", "COLUMNS=200"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run runs a command on the host, which has to succeed.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// property is one of a unit's.
func (m *machine) property(unit, name string) string {
	m.t.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "--value", "--property="+name, unit))
}

// state waits until a unit is in a state.
func (m *machine) state(unit, want string) {
	m.t.Helper()
	harness.Eventually(m.t, 30*time.Second, 50*time.Millisecond, func() (bool, string) {
		got, _ := m.try("systemctl", "is-active", unit)
		return strings.TrimSpace(got) == want, fmt.Sprintf("%s to be %s; it is %s", unit, want, strings.TrimSpace(got))
	})
}

// another returns what waits until a unit runs as another process than now.
func (m *machine) another(unit string) (wait func()) {
	m.t.Helper()
	before := m.property(unit, "MainPID")
	return func() {
		m.t.Helper()
		harness.Eventually(m.t, 30*time.Second, 50*time.Millisecond, func() (bool, string) {
			now := m.property(unit, "MainPID")
			return now != before && now != "0" && m.property(unit, "ActiveState") == "active", unit + " to be started again"
		})
	}
}

// write writes a file on the host.
func (m *machine) write(path, text string) {
	m.t.Helper()
	full := m.path(path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(full+".new", []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(full+".new", full); err != nil {
		m.t.Fatal(err)
	}
}

// path is a path on the host as it is seen from here: through its PID 1, whose /run
// and /tmp are not those of the tree.
func (m *machine) path(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", m.leader, path)
}

func (m *machine) exists(path string) bool {
	_, err := os.Lstat(m.path(path))
	return err == nil
}
