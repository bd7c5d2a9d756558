package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const testVersion = "9.9.9"

// released makes a release of what git has of this checkout, in a folder of its
// own, and returns the folder of what was made.
func released(t *testing.T, at ...string) string {
	t.Helper()
	source := filepath.Join(append([]string{t.TempDir()}, at...)...)
	copyTree(t, "../..", source)
	out := filepath.Join(t.TempDir(), "dist")
	cmd := exec.CommandContext(t.Context(), "go", "run", "./release", "-version", "v"+testVersion, "-arch", runtime.GOARCH, "-out", out, "all")
	cmd.Dir = filepath.Join(source, "tools")
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	return out
}

// copyTree copies the files that git knows of, as they are now.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	list, err := exec.CommandContext(t.Context(), "git", "-C", from, "ls-files", "-z").Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		info, err := os.Lstat(filepath.Join(from, name))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed, and not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		if !info.Mode().IsRegular() {
			continue
		}
		data, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Two builds of one commit, in two places, are the same to the last byte.
func TestReleaseIsReproducible(t *testing.T) {
	one, two := released(t, "a"), released(t, "somewhere", "else")
	entries, err := os.ReadDir(one)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		if a, b := read(t, filepath.Join(one, e.Name())), read(t, filepath.Join(two, e.Name())); !bytes.Equal(a, b) {
			t.Errorf("%s: two builds differ (%d and %d bytes)", e.Name(), len(a), len(b))
		}
	}
	arch := runtime.GOARCH
	rpmArch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
	want := []string{
		"SHA256SUMS", "stoop-9.9.9-1." + rpmArch + ".rpm", "stoop-9.9.9.tgz", "stoop_9.9.9_" + arch + ".deb", "stoop_9.9.9_image.digest",
		"stoop_9.9.9_image.tar", "stoop_9.9.9_linux_" + arch + ".tar.gz",
	}
	if !slices.Equal(names, want) {
		t.Errorf("made were %q, want %q", names, want)
	}
	sum := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	sum.Dir = one
	if out, err := sum.CombinedOutput(); err != nil || bytes.Count(out, []byte(": OK\n")) != len(want)-1 {
		t.Errorf("sha256sum: %v: %s", err, out)
	}
	t.Run("image", func(t *testing.T) { checkImage(t, one) })
	t.Run("chart", func(t *testing.T) { checkChart(t, one) })
	t.Run("packages", func(t *testing.T) { checkPackages(t, one) })
}

// checkImage holds the image to what is promised of it.
func checkImage(t *testing.T, dist string) {
	dir := t.TempDir()
	untar(t, bytes.NewReader(read(t, filepath.Join(dist, "stoop_9.9.9_image.tar"))), func(h *tar.Header, data []byte) {
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	outer, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(outer); err != nil {
		t.Error(err)
	}
	manifest, err := outer.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 {
		t.Fatalf("the layout holds %v, %v; want one index", manifest, err)
	}
	top := manifest.Manifests[0]
	if got := top.Annotations["org.opencontainers.image.ref.name"]; got != testVersion {
		t.Errorf("it is called %q", got)
	}
	if got := string(read(t, filepath.Join(dist, "stoop_9.9.9_image.digest"))); got != top.Digest.String()+"\n" {
		t.Errorf("the digest is said to be %s, and is %s", got, top.Digest)
	}
	index, err := outer.ImageIndex(top.Digest)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range inner.Manifests {
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if d.Platform.OS != "linux" || d.Platform.Architecture != config.Architecture || config.OS != "linux" {
			t.Errorf("the image for %s is for %s", d.Platform, config.Platform())
		}
		if config.Config.User != "65532:65532" || !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/stoop"}) {
			t.Errorf("it runs %q as %q", config.Config.Entrypoint, config.Config.User)
		}
		checkFiles(t, img)
	}
}

// checkChart holds the chart to what Helm wants of an archive; make chart is for
// what it makes of it.
func checkChart(t *testing.T, dist string) {
	z, err := gzip.NewReader(bytes.NewReader(read(t, filepath.Join(dist, "stoop-9.9.9.tgz"))))
	if err != nil {
		t.Fatal(err)
	}
	content := map[string]string{}
	untar(t, z, func(h *tar.Header, data []byte) { content[h.Name] = string(data) })
	about := content["stoop/Chart.yaml"]
	if !strings.Contains(about, "\nversion: \"9.9.9\"\n") || !strings.Contains(about, "\nappVersion: \"9.9.9\"\n") {
		t.Errorf("Chart.yaml says %s", about)
	}
	if content["stoop/values.yaml"] == "" || content["stoop/templates/daemonset.yaml"] == "" || content["stoop/values.schema.json"] == "" {
		t.Error("the chart lacks something")
	}
	for name := range content {
		if strings.HasPrefix(name, "stoop/ci/") {
			t.Errorf("the chart holds %s", name)
		}
	}
}

func checkFiles(t *testing.T, img v1.Image) {
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	content := map[string][]byte{}
	var names []string
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		size += n
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		untar(t, r, func(h *tar.Header, data []byte) {
			name := fmt.Sprintf("%s %o %d", h.Name, h.Mode, h.Uid)
			names = append(names, name)
			content[h.Name] = data
		})
		r.Close()
	}
	t.Logf("%.1f MB compressed", float64(size)/1e6)
	if size > 30e6 {
		t.Errorf("it is %d bytes compressed, want at most 30 MB", size)
	}
	// All that there is: no shell, no package manager, nothing that is set-id.
	want := []string{
		"etc/ 755 0", "etc/passwd 644 0", "etc/group 644 0", "etc/ssl/ 755 0", "etc/ssl/certs/ 755 0", "etc/ssl/certs/ca-certificates.crt 644 0",
		"run/ 755 0", "run/stoop/ 755 65532", "var/ 755 0", "var/lib/ 755 0", "var/lib/stoop/ 700 65532", "tmp/ 1777 0",
		"etc/ 755 0", "etc/stoop/ 755 0", "etc/stoop/rules.yaml 644 0", "usr/ 755 0", "usr/bin/ 755 0", "usr/bin/stoop 755 0", "usr/bin/stoop-hold 755 0",
		"usr/share/ 755 0", "usr/share/doc/ 755 0", "usr/share/doc/stoop/ 755 0", "usr/share/doc/stoop/NOTICE 644 0", "usr/share/doc/stoop/sbom.cdx.json 644 0",
	}
	if !slices.Equal(names, want) {
		t.Errorf("it holds %q, want %q", names, want)
	}
	for _, name := range []string{"usr/bin/stoop", "usr/bin/stoop-hold"} {
		f, err := elf.NewFile(bytes.NewReader(content[name]))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s is not static: it has a %s", name, p.Type)
			}
		}
	}
	bin := filepath.Join(t.TempDir(), "stoop")
	if err := os.WriteFile(bin, content["usr/bin/stoop"], 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(bin, "--version").CombinedOutput(); err != nil || string(out) != "stoop v"+testVersion+"\n" {
		t.Errorf("stoop --version: %s, %v", out, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(content["etc/ssl/certs/ca-certificates.crt"]) || bytes.Count(content["etc/ssl/certs/ca-certificates.crt"], []byte("BEGIN CERTIFICATE")) < 50 {
		t.Error("it trusts hardly any authority")
	}
	checkSBOM(t, content["usr/share/doc/stoop/sbom.cdx.json"])
	if notice := string(content["usr/share/doc/stoop/NOTICE"]); !strings.Contains(notice, "github.com/nats-io/nats-server/v2@") || !strings.Contains(notice, "Apache License") {
		t.Error("NOTICE does not hold the licenses of what stoop is made of")
	}
}

func checkSBOM(t *testing.T, data []byte) {
	t.Helper()
	var bom cyclonedx.BOM
	if err := cyclonedx.NewBOMDecoder(bytes.NewReader(data), cyclonedx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if bom.Metadata.Component.Name != "stoop" || bom.Metadata.Component.Version != "v"+testVersion {
		t.Errorf("it is of %s %s", bom.Metadata.Component.Name, bom.Metadata.Component.Version)
	}
	have := map[string]bool{}
	for _, c := range *bom.Components {
		have[c.Name] = c.Version != "" && strings.HasPrefix(c.PackageURL, "pkg:golang/"+c.Name+"@")
	}
	for _, want := range []string{"std", "github.com/nats-io/nats-server/v2", "k8s.io/client-go"} {
		if !have[want] {
			t.Errorf("it does not list %s", want)
		}
	}
}

// checkPackages holds the packages to what is promised of them, where this
// machine can look into them. What they do is for make e2e-host.
func checkPackages(t *testing.T, dist string) {
	debs, _ := filepath.Glob(filepath.Join(dist, "*.deb"))
	if len(debs) != 1 {
		t.Fatalf("there are %q", debs)
	}
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("this machine can't look into a .deb: ", err)
	}
	out, err := exec.Command("dpkg-deb", "--fsys-tarfile", debs[0]).Output()
	if err != nil {
		t.Fatal(err)
	}
	mode := map[string]int64{}
	content := map[string][]byte{}
	untar(t, bytes.NewReader(out), func(h *tar.Header, data []byte) {
		name := strings.TrimPrefix(h.Name, ".")
		if h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", name, h.Uid, h.Gid)
		}
		mode[name], content[name] = h.Mode, data
	})
	for name, want := range map[string]int64{
		"/usr/bin/stoop": 0o755, "/etc/stoop/stoop.yaml": 0o644, "/etc/stoop/rules.yaml": 0o644, "/etc/stoop/secrets/": 0o700,
		"/usr/lib/systemd/system/stoop.socket": 0o644, "/usr/lib/systemd/system/stoop.service": 0o644,
		"/usr/lib/systemd/system/falco-modern-bpf.service.d/stoop.conf": 0o644,
		"/usr/lib/sysusers.d/stoop.conf":                                0o644, "/usr/lib/tmpfiles.d/stoop.conf": 0o644,
		"/usr/share/stoop/falco.yaml": 0o644, "/usr/share/stoop/systemd/node.conf": 0o644,
		"/usr/share/man/man1/stoop.1.gz": 0o644, "/usr/share/man/man1/stoop-run.1.gz": 0o644,
		"/usr/share/bash-completion/completions/stoop": 0o644, "/usr/share/zsh/vendor-completions/_stoop": 0o644,
		"/usr/share/fish/vendor_completions.d/stoop.fish": 0o644,
		"/usr/share/doc/stoop/copyright":                  0o644, "/usr/share/doc/stoop/host.md": 0o644,
	} {
		if mode[name] != want {
			t.Errorf("%s has mode %o, want %o", name, mode[name], want)
		}
	}
	z, err := gzip.NewReader(bytes.NewReader(content["/usr/share/man/man1/stoop-run.1.gz"]))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(z); err != nil || !bytes.Contains(text, []byte(".TH STOOP")) {
		t.Errorf("the manual page: %v: %s", err, text)
	}
	conffiles, err := exec.Command("dpkg-deb", "--info", debs[0], "conffiles").Output()
	if err != nil || string(conffiles) != "/etc/stoop/rules.yaml\n/etc/stoop/stoop.yaml\n" {
		t.Errorf("the files that an upgrade leaves alone are %q, %v", conffiles, err)
	}
}

func untar(t *testing.T, r io.Reader, f func(h *tar.Header, data []byte)) {
	t.Helper()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		f(h, data)
	}
}

// A module of the program without a license would be shipped unlawfully.
func TestLicenses(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"LICENSE", "NOTICE.txt", "license_test.go", "README.md", "COPYING"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := licenses(dir)
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	if want := []string{"COPYING", "LICENSE", "NOTICE.txt"}; err != nil || !slices.Equal(files, want) {
		t.Errorf("licenses are %q, %v; want %q", files, err, want)
	}
}

// A commit without a tag has a version too, below every release.
func TestVersionOfNoTag(t *testing.T) {
	r := &release{version: "v1.2.3", out: t.TempDir()}
	if err := r.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(r.stage)
	if r.version != "1.2.3" {
		t.Errorf("the version is %q", r.version)
	}
	v, err := versionOf(t.Context(), r.root, r.date)
	if err != nil || !(strings.HasPrefix(v, "v") || strings.HasPrefix(v, "0.0.0-dev.")) {
		t.Errorf("a commit is version %q, %v", v, err)
	}
}
