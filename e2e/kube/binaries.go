package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Programs that [Binaries] builds when asked to: of the servers, only a node needs
// them.
const (
	Kubelet           = "kubelet"
	ControllerManager = "kube-controller-manager"
)

// What [Binaries] builds, and the packages that they are built from.
var servers = []struct {
	name, pkg string
	always    bool
}{
	{"etcd", "go.etcd.io/etcd/server/v3", true},
	{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", true},
	{Kubelet, "k8s.io/kubernetes/cmd/kubelet", false},
	{ControllerManager, "k8s.io/kubernetes/cmd/kube-controller-manager", false},
}

// buildTimeout is far above the six minutes that a cold build was seen to take
// on two cores.
const buildTimeout = 40 * time.Minute

// Binaries is the folder that holds etcd and kube-apiserver, and what else is
// named, built from the modules that e2e/tools pins. They are built once and kept
// in the user's cache folder, under the hash of those modules and the Go version;
// of two callers at once one builds and the other waits. progress is told what
// takes long.
func Binaries(ctx context.Context, progress func(format string, args ...any), also ...string) (string, error) {
	tools, err := toolsDir(ctx)
	if err != nil {
		return "", err
	}
	key, err := cacheKey(ctx, tools)
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache folder: %w", err)
	}
	dir := filepath.Join(cache, "stoop-e2e", key)
	if len(missing(dir, also)) == 0 {
		return dir, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the cache folder: %w", err)
	}
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	return dir, build(ctx, tools, dir, missing(dir, also), progress)
}

// missing are the names and packages of what is still to be built.
func missing(dir string, also []string) map[string]string {
	out := map[string]string{}
	for _, s := range servers {
		if !s.always && !slices.Contains(also, s.name) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, s.name)); err != nil {
			out[s.name] = s.pkg
		}
	}
	return out
}

func build(ctx context.Context, tools, dir string, pkgs map[string]string, progress func(string, ...any)) error {
	if len(pkgs) == 0 {
		return nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "building-")
	if err != nil {
		return fmt.Errorf("make a folder to build in: %w", err)
	}
	defer os.RemoveAll(tmp)
	version, err := goTool(ctx, tools, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	// Without these the API server calls itself v0.0.0, which its own checks of
	// versions take amiss.
	const v = "k8s.io/component-base/version."
	ldflags := fmt.Sprintf("-s -w -X %sgitVersion=%s -X %sgitMajor=%s -X %sgitMinor=%s -X %sgitTreeState=clean -X %sgitCommit=module",
		v, version, v, major, v, minor, v, v)
	for _, name := range slices.Sorted(maps.Keys(pkgs)) {
		start := time.Now()
		progress("building %s (once, some minutes when Go's build cache is cold) …", name)
		built := filepath.Join(tmp, name)
		if _, err := goTool(ctx, tools, "build", "-trimpath", "-ldflags", ldflags, "-o", built, pkgs[name]); err != nil {
			return err
		}
		if err := os.Rename(built, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("put %s in the cache: %w", name, err)
		}
		progress("built %s in %s", name, time.Since(start).Round(time.Second))
	}
	return nil
}

// toolsDir is e2e/tools, wherever the caller runs inside the module stoop/e2e.
func toolsDir(ctx context.Context) (string, error) {
	root, err := goTool(ctx, "", "list", "-m", "-f", "{{.Dir}}", "stoop/e2e")
	if err != nil {
		return "", fmt.Errorf("this must run inside the module stoop/e2e: %w", err)
	}
	return filepath.Join(root, "tools"), nil
}

func cacheKey(ctx context.Context, tools string) (string, error) {
	h := sha256.New()
	for _, f := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(tools, f))
		if err != nil {
			return "", fmt.Errorf("read what the servers are built from: %w", err)
		}
		h.Write(b)
	}
	version, err := goTool(ctx, tools, "env", "GOVERSION", "GOOS", "GOARCH")
	if err != nil {
		return "", err
	}
	h.Write([]byte(version))
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// goTool runs the go command in dir and returns what it prints.
func goTool(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -buildvcs=false", "GOWORK=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// lock takes an exclusive lock on a file, which ends with the process if
// nothing ends it before.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock on the cached servers: %w", err)
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for another build of the servers (%s): %w", path, ctx.Err())
		}
	}
}
