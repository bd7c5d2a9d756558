package program

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"stoop/e2e/harness"
)

// Build builds the real program, as it is released, into a folder of t's and
// returns its path. Tags are Go's build tags.
func Build(t harness.T, tags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "stoop")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w",
		"-tags="+strings.Join(tags, ","), "-o", out, ".")
	cmd.Dir = sourceDir(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build stoop: %v\n%s", err, msg)
	}
	return out
}

// sourceDir is the folder of the module stoop.
func sourceDir(t harness.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "stoop").Output()
	if err != nil {
		t.Fatalf("find stoop's module: %v", err)
	}
	return strings.TrimSpace(string(out))
}
