package host

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"stoop/e2e/harness"
	"stoop/e2e/program"
)

// The drop-in of the node's own responders grants what they need: as the unit
// runs it, stoop looks at a suspect, cuts its network, freezes it, takes both
// back, and kills it.
func TestNodeProfile(t *testing.T) {
	needs(t)
	m := boot(t)
	const freezer = "/sys/fs/cgroup/freezer"
	if !m.exists(freezer + "/cgroup.procs") {
		t.Skip("this machine has cgroup v2, of which systemd-nspawn shows the booted host a part: stoop takes it for a container, and freezes nothing")
	}
	m.run("mount", "-o", "remount,bind,rw", freezer) // a host's own is not read-only
	m.run("dpkg", "--install", packageOf(t, m, "deb", newer))
	m.state("stoop.service", "active")
	m.write("/etc/stoop/stoop.yaml", "mode: enforce\nnode: this-host\nguard: {settle: 0s}\n")
	m.write("/etc/stoop/rules.yaml", `mode: enforce
rules:
  - name: contain
    match: {rule: Contain}
    actions:
      - capture-proc
      - capture-files: {paths: [/etc/hostname]}
      - capture-packets: {duration: 1s}
      - cut-network
      - freeze-container
  - name: kill
    match: {rule: Kill}
    actions:
      - kill-process
  - name: told
    match: {rule: Told}
    actions:
      - run: {command: [/bin/sh, -c, "cat > /var/lib/stoop/told"]}
`)
	m.run("mkdir", "-p", "/etc/systemd/system/stoop.service.d")
	m.run("ln", "-s", "/usr/share/stoop/systemd/node.conf", "/etc/systemd/system/stoop.service.d/")
	m.run("systemctl", "daemon-reload")
	m.run("systemctl", "restart", "stoop.service")
	m.state("stoop.service", "active")

	// A suspect in a cgroup like a container's, with a network of its own.
	raw := make([]byte, 32)
	_, _ = rand.Read(raw)
	id := hex.EncodeToString(raw)
	cgroup := freezer + "/docker/" + id // the machine's own, which systemd-nspawn shows whole
	t.Cleanup(func() { _ = os.Remove(cgroup); _ = os.Remove(freezer + "/docker") })
	m.run("mkdir", "-p", cgroup)
	m.run("systemd-run", "--quiet", "--unit=suspect", "--property=KillMode=process",
		"sh", "-c", "echo 0 > "+cgroup+"/cgroup.procs && exec unshare --net --mount sleep 1000")
	var pid int
	harness.Eventually(t, 10*time.Second, 20*time.Millisecond, func() (bool, string) {
		pid, _ = strconv.Atoi(m.property("suspect.service", "MainPID"))
		comm, _ := os.ReadFile(m.path(fmt.Sprintf("/proc/%d/comm", pid)))
		return string(comm) == "sleep\n", "the suspect"
	})
	procs, err := os.ReadFile(cgroup + "/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	outside := strings.TrimSpace(string(procs)) // its number as this machine has it
	for _, args := range []string{"link add eth0 type veth peer name beyond", "link set eth0 up", "link set beyond up"} {
		if out, err := exec.Command("nsenter", append([]string{"-t", outside, "-n", "ip"}, strings.Fields(args)...)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}

	raise := func(rule string) string {
		line := program.Alert{
			Hostname: "this-host", Output: "something", Priority: "Critical", Rule: rule, Source: "syscall", Time: program.Stamp(time.Now()),
			Fields: map[string]any{"container.id": id[:12], "container.full_id": id, "proc.pid": pid},
		}.Line()
		f, err := os.OpenFile(m.path(pipe), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(line); err != nil {
			t.Fatal(err)
		}
		return program.ID(line)
	}
	outcomes := func(alert string, want int) map[string]string {
		t.Helper()
		got := map[string]string{}
		harness.Eventually(t, 30*time.Second, 100*time.Millisecond, func() (bool, string) {
			for line := range strings.Lines(m.run("stoop", "history", "-o", "json")) {
				var o struct{ Alert, Responder, Status, Reason string }
				if err := json.Unmarshal([]byte(line), &o); err != nil {
					t.Fatal(err)
				}
				if o.Alert == alert && o.Status != "retrying" {
					got[o.Responder] = o.Status + " " + o.Reason
				}
			}
			return len(got) == want, fmt.Sprintf("%d outcomes; there are %q", want, got)
		})
		return got
	}
	allDone := func(got map[string]string) {
		t.Helper()
		for responder, outcome := range got {
			if !strings.HasPrefix(outcome, "done ") {
				t.Errorf("%s: %s", responder, outcome)
			}
		}
	}
	stopped := func() bool {
		state, err := os.ReadFile(cgroup + "/freezer.state")
		if err != nil {
			t.Fatal(err)
		}
		return string(state) == "FROZEN\n"
	}
	allDone(outcomes(raise("Contain"), 5))
	if !stopped() {
		t.Error("the suspect is not frozen")
	}
	if out := m.run("stoop", "undo", "--all"); !strings.Contains(out, "freeze-container") || !strings.Contains(out, "cut-network") || stopped() {
		t.Errorf("the undo says %s", out)
	}
	allDone(outcomes(raise("Kill"), 1))
	m.state("suspect.service", "failed")
	allDone(outcomes(raise("Told"), 1))

	// And no more than the drop-in lists.
	const want = "00000000802c303f"
	status := m.run("cat", "/proc/"+m.property("stoop.service", "MainPID")+"/status")
	if !strings.Contains(status, "CapBnd:\t"+want+"\n") || !strings.Contains(status, "CapEff:\t"+want+"\n") || !strings.Contains(status, "NoNewPrivs:\t1\n") {
		t.Errorf("its capabilities are not %s:\n%s", want, status)
	}

	// Back to the other profile, the data folder is its user's again.
	m.run("rm", "/etc/systemd/system/stoop.service.d/node.conf")
	m.run("systemctl", "daemon-reload")
	m.run("systemctl", "restart", "stoop.service")
	m.state("stoop.service", "active")
	if got := m.run("stat", "--format=%U", "/var/lib/stoop", "/var/lib/stoop/store"); got != "stoop\nstoop\n" {
		t.Errorf("the data folder belongs to %s", got)
	}
}
