package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// chartVersion are the lines of Chart.yaml that a release sets.
var chartVersion = regexp.MustCompile(`(?m)^(version|appVersion): .*$`)

// localImage is what the chart's values have where nothing is published.
const localImage = "localhost/stoop"

// chart packs the Helm chart as helm package does, with the release's version,
// and the same each time, which helm package is not.
func (r *release) chart() error {
	dir := filepath.Join(r.root, "charts", "stoop")
	return writeFile(filepath.Join(r.out, "stoop-"+r.version+".tgz"), func(w io.Writer) error {
		z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
		if err != nil {
			return err
		}
		t := tar.NewWriter(z)
		err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // in the order of the names
			if err != nil {
				return err
			}
			name, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			// What only the tests need; .helmignore says the same to Helm.
			if d.IsDir() && name == "ci" {
				return fs.SkipDir
			}
			if d.IsDir() || name == ".helmignore" {
				return nil
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if name == "Chart.yaml" {
				if n := len(chartVersion.FindAll(data, -1)); n != 2 {
					return fmt.Errorf("%s has %d lines of versions, not 2", path, n)
				}
				data = chartVersion.ReplaceAll(data, fmt.Appendf(nil, "${1}: %q", r.version))
			}
			if name == "values.yaml" {
				was := []byte("\n  repository: " + localImage + "\n")
				if n := bytes.Count(data, was); n != 1 {
					return fmt.Errorf("%s names the image %s %d times, not once", path, localImage, n)
				}
				data = bytes.ReplaceAll(data, was, fmt.Appendf(nil, "\n  repository: %s\n", r.published))
			}
			return r.addData(t, "stoop/"+strings.ReplaceAll(name, string(filepath.Separator), "/"), bytes.Clone(data), 0o644)
		})
		if err != nil {
			return err
		}
		if err := t.Close(); err != nil {
			return err
		}
		return z.Close()
	})
}
