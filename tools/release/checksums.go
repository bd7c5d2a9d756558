package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// archives makes a .tar.gz of the programs for every architecture.
func (r *release) archives(ctx context.Context) error {
	for _, arch := range r.arches {
		b, err := r.build(ctx, arch)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("stoop_%s_linux_%s", r.version, arch)
		err = writeFile(filepath.Join(r.out, name+".tar.gz"), func(w io.Writer) error {
			z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
			if err != nil {
				return err
			}
			t := tar.NewWriter(z)
			for _, f := range []struct {
				path string
				mode int64
			}{
				{filepath.Join(b.dir, "stoop"), 0o755},
				{filepath.Join(b.dir, "stoop-hold"), 0o755},
				{filepath.Join(b.dir, "NOTICE"), 0o644},
				{filepath.Join(b.dir, "sbom.cdx.json"), 0o644},
				{filepath.Join(r.root, "rules.yaml"), 0o644},
				{filepath.Join(r.root, "README.md"), 0o644},
			} {
				if err := r.add(t, name+"/"+filepath.Base(f.path), f.path, f.mode); err != nil {
					return err
				}
			}
			if err := t.Close(); err != nil {
				return err
			}
			return z.Close()
		})
		if err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
	}
	return nil
}

// add adds a file to an archive, dated as the release and owned by root.
func (r *release) add(t *tar.Writer, name, path string, mode int64) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return r.addData(t, name, data, mode)
}

func (r *release) addData(t *tar.Writer, name string, data []byte, mode int64) error {
	header := &tar.Header{Name: name, Mode: mode, Size: int64(len(data)), ModTime: r.date, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
	if err := t.WriteHeader(header); err != nil {
		return err
	}
	_, err := t.Write(data)
	return err
}

// checksums writes SHA256SUMS of all that is in the folder, for sha256sum -c.
func (r *release) checksums() error {
	entries, err := os.ReadDir(r.out)
	if err != nil {
		return err
	}
	var sums strings.Builder
	for _, e := range entries { // in the order of their names
		if !e.Type().IsRegular() || e.Name() == "SHA256SUMS" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		f, err := os.Open(filepath.Join(r.out, e.Name()))
		if err != nil {
			return err
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%x  %s\n", h.Sum(nil), e.Name())
	}
	return writeFile(filepath.Join(r.out, "SHA256SUMS"), func(w io.Writer) error {
		_, err := io.WriteString(w, sums.String())
		return err
	})
}
