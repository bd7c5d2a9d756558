package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The two servers, and the packages that they are built from.
var servers = []struct{ name, pkg string }{
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"},
}

// buildTimeout is far above the six minutes that a cold build was seen to take
// on two cores.
const buildTimeout = 40 * time.Minute

// Binaries is the folder that holds etcd and kube-apiserver, built from the
// modules that e2e/tools pins. They are built once and kept in the user's cache
// folder, under the hash of those modules and the Go version; of two callers at
// once one builds and the other waits. progress is told what takes long.
func Binaries(ctx context.Context, progress func(format string, args ...any)) (string, error) {
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
	if complete(dir) {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("make the cache folder: %w", err)
	}
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if complete(dir) {
		return dir, nil
	}
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	return dir, build(ctx, tools, dir, progress)
}

func complete(dir string) bool {
	for _, s := range servers {
		if _, err := os.Stat(filepath.Join(dir, s.name)); err != nil {
			return false
		}
	}
	return true
}

func build(ctx context.Context, tools, dir string, progress func(string, ...any)) error {
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
	for _, s := range servers {
		start := time.Now()
		progress("building %s (once, some minutes when Go's build cache is cold) …", s.name)
		_, err := goTool(ctx, tools, "build", "-trimpath", "-ldflags", ldflags, "-o", filepath.Join(tmp, s.name), s.pkg)
		if err != nil {
			return err
		}
		progress("built %s in %s", s.name, time.Since(start).Round(time.Second))
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fmt.Errorf("put the servers in the cache: %w", err)
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
