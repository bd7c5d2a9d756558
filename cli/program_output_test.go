package cli

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Falco's program_output, each variant that docs/falco.md shows, written to by
// popen(3): everything is stored, also what comes while stoop restarts.
func TestProgramOutput(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("popen(3) needs a C compiler: ", err)
	}
	bin := t.TempDir()
	popen := filepath.Join(bin, "popen")
	if out, err := exec.Command(cc, "-O1", "-Wall", "-o", popen, "testdata/popen.c").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A program's name decides which command of a test binary it is.
	if err := os.Symlink(self, filepath.Join(bin, "stoop")); err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../docs/falco.md")
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct{ name, keepAlive, program string }{
		{"one publish for all", "true", "exec stoop publish"},
		{"a publish for each", "false", "stoop publish"},
		{"one cat for all", "true", "exec cat > /run/stoop/falco.pipe"},
		{"a cat for each", "false", "cat > /run/stoop/falco.pipe"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if line := fmt.Sprintf("keep_alive: %s, program: %q}", c.keepAlive, c.program); !strings.Contains(string(doc), line) {
				t.Errorf("docs/falco.md does not show %s", line)
			}
			dir := t.TempDir()
			data, fifo, rules := filepath.Join(dir, "data"), filepath.Join(dir, "falco.pipe"), filepath.Join(dir, "rules.yaml")
			write(t, rules, "mode: enforce\nrules:\n  - name: keep\n    match: {priority: debug}\n    actions:\n      - file: {path: "+dir+"/kept}\n")
			hold := exec.Command(filepath.Join(bin, "stoop"), "hold", fifo)
			if err := hold.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = hold.Process.Kill(); _ = hold.Wait() }()
			var run *exec.Cmd
			start := func() {
				run = exec.Command(filepath.Join(bin, "stoop"), "run", "--mode", "enforce", "--rules", rules, "--data", data, "--pipe", fifo, "--node", "node-1")
				run.Stderr = t.Output()
				if err := run.Start(); err != nil {
					t.Fatal(err)
				}
			}
			stop := func() { _ = run.Process.Signal(syscall.SIGTERM); _ = run.Wait() }
			start()
			defer func() { stop() }()

			program := strings.NewReplacer("stoop publish", "stoop publish --data "+data, "/run/stoop/falco.pipe", fifo).Replace(c.program)
			falco := exec.Command(popen, c.keepAlive, program)
			falco.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			falco.Stderr = t.Output()
			in, err := falco.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			// What comes before enforce is switched on, nothing is done about.
			for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
				if err := exec.Command(filepath.Join(bin, "stoop"), "history", "--data", data).Run(); err == nil {
					break
				} else if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			if err := falco.Start(); err != nil {
				t.Fatal(err)
			}
			const n = 30
			for i := range n {
				if i == n/3 { // while it is away, the next ones are written
					stop()
				}
				if _, err := fmt.Fprintf(in, `{"hostname":"node-1","output":"alert %d","priority":"Notice","rule":"R","source":"syscall","time":%q}`+"\n", i, time.Now().UTC().Format(time.RFC3339Nano)); err != nil {
					t.Fatal(err)
				}
				if i == n/2 {
					start()
				}
			}
			in.Close()
			if err := falco.Wait(); err != nil {
				t.Errorf("the program failed: %v", err)
			}
			var missing []int
			for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				kept, _ := os.ReadFile(filepath.Join(dir, "kept"))
				missing = nil
				for i := range n {
					if !strings.Contains(string(kept), fmt.Sprintf(`"alert %d"`, i)) {
						missing = append(missing, i)
					}
				}
				if len(missing) == 0 {
					break
				}
			}
			if len(missing) > 0 {
				t.Errorf("lost are %v", missing)
			}
		})
	}

	// Nobody there at all: it says so once, goes on reading, and fails at the end.
	t.Run("nobody there", func(t *testing.T) {
		publish := exec.Command(filepath.Join(bin, "stoop"), "publish", "--data", filepath.Join(t.TempDir(), "data"), "--wait", "200ms")
		publish.Stdin = strings.NewReader(strings.Repeat("{}\n", 5))
		began := time.Now()
		out, err := publish.CombinedOutput()
		if err == nil || time.Since(began) < 200*time.Millisecond || strings.Count(string(out), "alerts are lost") != 1 || !strings.Contains(string(out), "15 bytes") {
			t.Errorf("publish: %v: %s", err, out)
		}
	})
}
