package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/CycloneDX/cyclonedx-go"
)

// built is what was built for one architecture, as files in a folder.
type built struct {
	dir string // stoop, stoop-hold, sbom.cdx.json, NOTICE
}

// build builds the programs for an architecture, once.
func (r *release) build(ctx context.Context, arch string) (*built, error) {
	if b := r.built[arch]; b != nil {
		return b, nil
	}
	b := &built{dir: filepath.Join(r.stage, arch)}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return nil, err
	}
	for name, pkg := range map[string]string{"stoop": ".", "stoop-hold": "./cmd/hold"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
			"-ldflags=-s -w -buildid= -X stoop/cli.release=v"+r.version, "-o", filepath.Join(b.dir, name), pkg)
		cmd.Dir, cmd.Stderr = r.root, os.Stderr
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=")
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("build %s for %s: %w", name, arch, err)
		}
	}
	info, err := buildinfo.ReadFile(filepath.Join(b.dir, "stoop"))
	if err != nil {
		return nil, err
	}
	if err := r.writeSBOM(filepath.Join(b.dir, "sbom.cdx.json"), info); err != nil {
		return nil, fmt.Errorf("list what stoop is made of: %w", err)
	}
	if err := r.writeNotice(ctx, filepath.Join(b.dir, "NOTICE"), info); err != nil {
		return nil, fmt.Errorf("collect the licenses: %w", err)
	}
	r.built[arch] = b
	return b, nil
}

// writeSBOM writes what the program says of its own modules, as CycloneDX.
func (r *release) writeSBOM(path string, info *buildinfo.BuildInfo) error {
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{
		Timestamp: r.date.Format("2006-01-02T15:04:05Z"),
		Component: &cyclonedx.Component{
			Type: cyclonedx.ComponentTypeApplication, BOMRef: "stoop", Name: "stoop", Version: "v" + r.version,
			Licenses: &cyclonedx.Licenses{{License: &cyclonedx.License{ID: "Apache-2.0"}}},
		},
	}
	library := func(path, version string) cyclonedx.Component {
		purl := "pkg:golang/" + path + "@" + version
		return cyclonedx.Component{Type: cyclonedx.ComponentTypeLibrary, BOMRef: purl, PackageURL: purl, Name: path, Version: version}
	}
	components := []cyclonedx.Component{library("std", info.GoVersion)}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		components = append(components, library(m.Path, m.Version))
	}
	refs := make([]string, len(components))
	for i, c := range components {
		refs[i] = c.BOMRef
	}
	bom.Components = &components
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: "stoop", Dependencies: &refs}}
	var b bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&b, cyclonedx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// writeNotice writes stoop's license and those of all that is in the program,
// most of which want to be passed on with it.
func (r *release) writeNotice(ctx context.Context, path string, info *buildinfo.BuildInfo) error {
	var b bytes.Buffer
	own, err := os.ReadFile(filepath.Join(r.root, "LICENSE"))
	if err != nil {
		return err
	}
	fmt.Fprintf(&b, "stoop is licensed as follows. What it is made of has licenses of its own, below.\n\n%s", own)
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-json", "all")
	cmd.Dir, cmd.Stderr = r.root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	dirs := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var m struct{ Path, Version, Dir string }
		if err := d.Decode(&m); err != nil {
			return err
		}
		dirs[m.Path+"@"+m.Version] = m.Dir
	}
	goroot, err := output(ctx, r.root, "go", "env", "GOROOT")
	if err != nil {
		return err
	}
	dirs["Go's standard library@"+info.GoVersion] = goroot
	names := []string{"Go's standard library@" + info.GoVersion}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		names = append(names, m.Path+"@"+m.Version)
	}
	for _, name := range names {
		files, err := licenses(dirs[name])
		if err != nil || len(files) == 0 {
			return fmt.Errorf("%s has no license in %q: %v", name, dirs[name], err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "\n%s\n%s, %s\n\n%s\n", strings.Repeat("-", 72), name, filepath.Base(file), bytes.TrimSpace(text))
		}
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// licenses are a module's files about its license.
func licenses(dir string) ([]string, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		name := strings.ToUpper(e.Name())
		is := slices.ContainsFunc([]string{"LICENSE", "LICENCE", "COPYING", "NOTICE"}, func(p string) bool { return strings.HasPrefix(name, p) })
		if is && e.Type().IsRegular() && !strings.HasSuffix(name, ".GO") {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, nil
}
