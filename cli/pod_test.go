package cli

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"stoop/node/nodetest"
)

// Folders of the host's become stoop's user's, links stay links, and what they
// point to stays whose it is.
func TestPrepare(t *testing.T) {
	nodetest.Root(t)
	dir := t.TempDir()
	folder, outside := filepath.Join(dir, "data"), filepath.Join(dir, "outside")
	for _, d := range []string{filepath.Join(folder, "a/b"), outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file, other := filepath.Join(folder, "a/b/file"), filepath.Join(outside, "file")
	for _, f := range []string{file, other} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link, linked := filepath.Join(folder, "a/link"), filepath.Join(folder, "folder")
	if err := errors.Join(os.Symlink(other, link), os.Symlink(outside, linked)); err != nil {
		t.Fatal(err)
	}
	owner := func(path string) int {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return int(info.Sys().(*syscall.Stat_t).Uid)
	}
	for range 2 { // the second time there is nothing to do
		if code := Main([]string{"prepare", "--owner=65532:65532", folder}, strings.NewReader(""), t.Output(), t.Output()); code != 0 {
			t.Fatalf("exit %d", code)
		}
		for path, want := range map[string]int{
			folder: 65532, filepath.Dir(file): 65532, file: 65532, link: 65532, linked: 65532, outside: 0, other: 0,
		} {
			if got := owner(path); got != want {
				t.Errorf("%s is of %d, want %d", path, got, want)
			}
		}
	}
	if info, err := os.Stat(folder); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder is %v, %v", info.Mode(), err)
	}
	for _, args := range [][]string{{"prepare", "--owner=stoop", folder}, {"prepare", folder}, {"prepare", "--owner=-1:0", folder}} {
		if code := Main(args, strings.NewReader(""), t.Output(), t.Output()); code != exitUsage {
			t.Errorf("%q: exit %d", args, code)
		}
	}
	if owner(folder) != 65532 {
		t.Error("a wrong owner changed something")
	}
}

func TestProbe(t *testing.T) {
	status := map[string]int{"/healthz": 200, "/readyz": 503}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status[r.URL.Path])
		_, _ = w.Write([]byte("the disk refuses"))
	}))
	defer srv.Close()
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		config, what string
		code         int
		says         string
	}{
		{"http: {listen: 127.0.0.1:" + port + "}", "live", 0, ""},
		{"http: {listen: \":" + port + "\"}", "live", 0, ""},
		{"http: {listen: 0.0.0.0:" + port + "}", "live", 0, ""},
		{"http: {listen: 127.0.0.1:" + port + "}", "ready", exitWrong, "the disk refuses"},
		{"http: {listen: 127.0.0.1:1}", "live", exitWrong, "refused"},
		{"mode: audit", "live", exitWrong, "http.listen is not set"},
		{"mode: audit", "dead", exitUsage, "dead"},
	} {
		file := filepath.Join(t.TempDir(), "stoop.yaml")
		if err := os.WriteFile(file, []byte(tt.config), 0o600); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		code := Main([]string{"probe", tt.what, "--config", file}, strings.NewReader(""), &said, &said)
		if code != tt.code || !strings.Contains(said.String(), tt.says) {
			t.Errorf("%s, %s: exit %d, %s", tt.config, tt.what, code, said.String())
		}
	}
}
