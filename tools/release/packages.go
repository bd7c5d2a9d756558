package main

import (
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb" // registers itself
	_ "github.com/goreleaser/nfpm/v2/rpm" // likewise
)

// packages makes a .deb and a .rpm for every architecture.
func (r *release) packages(ctx context.Context) error {
	for _, arch := range r.arches {
		b, err := r.build(ctx, arch)
		if err != nil {
			return err
		}
		if err := r.manual(ctx, b.dir); err != nil {
			return fmt.Errorf("write the manual: %w", err)
		}
		for _, format := range []string{"deb", "rpm"} {
			if err := r.pack(format, arch, b.dir); err != nil {
				return fmt.Errorf("make the .%s for %s: %w", format, arch, err)
			}
		}
	}
	return nil
}

// manual writes the manual pages, packed, and the completions into dir.
func (r *release) manual(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "run", "./cmd/manual", dir)
	cmd.Dir, cmd.Stderr = r.root, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if err := cmd.Run(); err != nil {
		return err
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil || len(pages) == 0 {
		return fmt.Errorf("no page was written: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "man"), 0o755); err != nil {
		return err
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			return err
		}
		err = writeFile(filepath.Join(dir, "man", filepath.Base(page)+".gz"), func(w io.Writer) error {
			z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
			if err != nil {
				return err
			}
			if _, err := z.Write(text); err != nil {
				return err
			}
			return z.Close()
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// pack makes one package of packages/nfpm.yaml.
func (r *release) pack(format, arch, stage string) error {
	// The paths in it are those of stoop's folder.
	if err := os.Chdir(r.root); err != nil {
		return err
	}
	text, err := os.ReadFile("packages/nfpm.yaml")
	if err != nil {
		return err
	}
	config, err := nfpm.Parse(strings.NewReader(os.Expand(string(text), func(name string) string {
		return map[string]string{"VERSION": r.version, "ARCH": arch, "STAGE": stage}[name]
	})))
	if err != nil {
		return err
	}
	info, err := config.Get(format)
	if err != nil {
		return err
	}
	info = nfpm.WithDefaults(info)
	info.MTime = r.date
	for _, c := range info.Contents {
		if c.FileInfo != nil {
			c.FileInfo.MTime = r.date
			c.FileInfo.Owner, c.FileInfo.Group = "root", "root"
		}
	}
	info.RPM.BuildHost = "localhost"
	packager, err := nfpm.Get(format)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(r.out, packager.ConventionalFileName(info)), func(w io.Writer) error {
		return packager.Package(info, w)
	})
}

// writeFile writes a file that is whole or not there.
func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
