package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"stoop/node/nodetest"
)

// What docs/containment.md says to type freezes a suspect, shows the evidence, and
// thaws it.
func TestDocsWalkThrough(t *testing.T) {
	t.Parallel()
	nodetest.Root(t)
	data, err := os.ReadFile("../docs/containment.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(data), "\n## Try it by hand\n")
	section, _, ok2 := strings.Cut(section, "\n## ")
	shown := blocks(section, "sh")
	// What a person would wait for after each block, or see.
	seen := []string{
		`for i in $(seq 200); do grep -qs '"msg":"ready"' try/log && break; sleep 0.05; done`,
		`echo $CGROUP > cgroup; for i in $(seq 200); do [ -s try/clock ] && break; sleep 0.05; done`,
		`for i in $(seq 200); do [ $(./stoop history --data try/data -o json | grep -c '"status":"done"') = 2 ] && break; sleep 0.05; done
		 echo == frozen`,
		`echo == evidence`,
		`echo == thawed`,
		`echo == end`,
		``,
	}
	if !ok || !ok2 || len(shown) != len(seen) {
		t.Fatalf("the section has %d blocks of commands, want %d", len(shown), len(seen))
	}
	var script strings.Builder
	for i, block := range shown {
		fmt.Fprintf(&script, "%s\n%s\n", block, seen[i])
	}

	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(dir, "stoop")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-eu", "-c", script.String())
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "COLUMNS=80")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var cgroup string
	t.Cleanup(func() { // where it failed in the middle
		if cmd.Process == nil || cgroup == "" {
			return
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = os.WriteFile(filepath.Join(cgroup, "cgroup.freeze"), []byte("0"), 0)
		_ = os.WriteFile(filepath.Join(cgroup, "freezer.state"), []byte("THAWED"), 0)
		for end := time.Now().Add(5 * time.Second); os.Remove(cgroup) != nil && time.Now().Before(end); {
			if _, err := os.Stat(cgroup); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	out, err := cmd.CombinedOutput()
	if b, rerr := os.ReadFile(filepath.Join(dir, "cgroup")); rerr == nil {
		cgroup = strings.TrimSpace(string(b))
	}
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "try/log"))
		t.Fatalf("%v\n%s\n%s", err, out, log)
	}
	part := func(from, to string) string {
		_, rest, _ := strings.Cut(string(out), "== "+from+"\n")
		s, _, ok := strings.Cut(rest, "== "+to+"\n")
		if !ok {
			t.Fatalf("there is no part %s:\n%s", from, out)
		}
		return s
	}
	clock := func(s string) (stands bool) {
		lines := strings.Split(strings.TrimSpace(s), "\n")
		return lines[len(lines)-1] == lines[len(lines)-2]
	}
	frozen, evidence, thawed := part("frozen", "evidence"), part("evidence", "thawed"), part("thawed", "end")
	switch {
	case !strings.Contains(frozen, "freeze-container") || !strings.Contains(frozen, "capture-proc") || !clock(frozen):
		t.Errorf("it was not frozen:\n%s", frozen)
	case !strings.Contains(evidence, "date +%T.%N > try/now") || !strings.Contains(evidence, `"sha256"`):
		t.Errorf("there is no evidence:\n%s", evidence)
	case !strings.Contains(thawed, "freeze-container: undone") || clock(thawed):
		t.Errorf("it was not thawed:\n%s", thawed)
	}
	for _, left := range []string{cgroup, filepath.Join(dir, "try")} {
		if _, err := os.Stat(left); err == nil {
			t.Errorf("%s is left behind", left)
		}
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("%s", out)
	}
}
