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
	return build(t, moduleDir(t, "stoop"), ".", tags...)
}

// BuildBare builds e2e/cmd/bare, with which the bench compares.
func BuildBare(t harness.T) string {
	t.Helper()
	return build(t, moduleDir(t, "stoop/e2e"), "./cmd/bare")
}

func build(t harness.T, dir, pkg string, tags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w", "-tags="+strings.Join(tags, ","), "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, msg)
	}
	return out
}

// moduleDir is the folder of a module that this one consists of or replaces.
func moduleDir(t harness.T, module string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		t.Fatalf("find the module %s: %v", module, err)
	}
	return strings.TrimSpace(string(out))
}
