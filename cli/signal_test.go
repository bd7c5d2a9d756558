package cli

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// The first SIGTERM lets a step that is under way go on for a while; the second
// ends the process at once.
func TestSignals(t *testing.T) {
	for name, c := range map[string]struct {
		signals int
		atLeast time.Duration
		atMost  time.Duration
		code    int
	}{
		"one":  {1, 4 * time.Second, 10 * time.Second, 0},
		"both": {2, 0, 2 * time.Second, 128 + int(syscall.SIGTERM)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan struct{}, 16)
			end := make(chan struct{})
			hanging := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				asked <- struct{}{}
				<-end
			}))
			defer hanging.Close()
			defer close(end)
			dir := t.TempDir()
			rules := filepath.Join(dir, "rules.yaml")
			write(t, rules, fmt.Sprintf("mode: enforce\nrules:\n  - name: tell\n    match: {priority: debug}\n    actions:\n      - webhook: {url: %q}\n", hanging.URL))
			fifo := filepath.Join(dir, "falco.pipe")
			cmd := exec.Command(os.Args[0])
			cmd.Args = []string{"stoop", "run", "--mode", "enforce", "--rules", rules, "--data", filepath.Join(dir, "data"), "--pipe", fifo, "--node", "node-1"}
			cmd.Stderr = t.Output()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			exited := make(chan error, 1)
			go func() { exited <- cmd.Wait() }()
			w := openFIFO(t, fifo)
			if _, err := fmt.Fprintf(w, `{"hostname":"node-1","priority":"Critical","rule":"R","time":%q}`+"\n", time.Now().UTC().Format(time.RFC3339Nano)); err != nil {
				t.Fatal(err)
			}
			select {
			case <-asked:
			case <-time.After(patience):
				t.Fatal("the webhook was not called")
			}
			began := time.Now()
			for range c.signals {
				if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond) // two at once are one to the kernel
			}
			var err error
			select {
			case err = <-exited:
			case <-time.After(patience):
				_ = cmd.Process.Kill()
				t.Fatal("it does not end")
			}
			code := 0
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				code = exit.ExitCode()
			}
			if took := time.Since(began); took < c.atLeast || took > c.atMost || code != c.code {
				t.Errorf("it ended after %s with %d, want %s to %s and %d", took, code, c.atLeast, c.atMost, c.code)
			}
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// openFIFO waits for the FIFO and opens it as Falco does.
func openFIFO(t *testing.T, path string) *os.File {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			t.Cleanup(func() { f.Close() })
			return f
		}
	}
	t.Fatalf("there is no reader of %s", path)
	return nil
}
