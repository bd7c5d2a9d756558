package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// user is whom the image's programs run as, unless the pod says otherwise. No
// distribution gives this number to anybody.
const user = 65532

// imageName is what the image is called where it is loaded from its archive.
const imageName = "localhost/stoop"

// image makes an archive with an OCI layout: one image for every architecture,
// under one index.
func (r *release) image(ctx context.Context) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range r.arches {
		img, err := r.imageFor(ctx, arch)
		if err != nil {
			return fmt.Errorf("make the image for %s: %w", arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	dir := filepath.Join(r.stage, "layout")
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = l.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": r.version,
		"io.containerd.image.name":          imageName + ":" + r.version,
	}))
	if err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	name := fmt.Sprintf("stoop_%s_image", r.version)
	if err := writeFile(filepath.Join(r.out, name+".tar"), func(w io.Writer) error { return r.archive(w, dir) }); err != nil {
		return err
	}
	return writeFile(filepath.Join(r.out, name+".digest"), func(w io.Writer) error {
		_, err := fmt.Fprintln(w, digest)
		return err
	})
}

// imageFor is the image of one architecture. What changes seldom has a layer of
// its own.
func (r *release) imageFor(ctx context.Context, arch string) (v1.Image, error) {
	b, err := r.build(ctx, arch)
	if err != nil {
		return nil, err
	}
	base := files{
		{path: "etc/passwd", data: fmt.Appendf(nil, "root:x:0:0:root:/:/none\nstoop:x:%d:%d:stoop:/var/lib/stoop:/none\n", user, user)},
		{path: "etc/group", data: fmt.Appendf(nil, "root:x:0:\nstoop:x:%d:\n", user)},
		{path: "etc/ssl/certs/ca-certificates.crt", data: authorities()},
		{path: "run/stoop", mode: fs.ModeDir | 0o755, owner: user},
		{path: "var/lib/stoop", mode: fs.ModeDir | 0o700, owner: user},
		{path: "tmp", mode: fs.ModeDir | fs.ModeSticky | 0o777},
	}
	program := files{
		{path: "etc/stoop/rules.yaml", from: filepath.Join(r.root, "rules.yaml")},
		{path: "usr/bin/stoop", from: filepath.Join(b.dir, "stoop"), mode: 0o755},
		{path: "usr/bin/stoop-hold", from: filepath.Join(b.dir, "stoop-hold"), mode: 0o755},
		{path: "usr/share/doc/stoop/NOTICE", from: filepath.Join(b.dir, "NOTICE")},
		{path: "usr/share/doc/stoop/sbom.cdx.json", from: filepath.Join(b.dir, "sbom.cdx.json")},
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range []struct {
		what  string
		files files
	}{{"user, folders, certificate authorities", base}, {"stoop", program}} {
		layer, err := r.layer(l.files)
		if err != nil {
			return nil, err
		}
		img, err = mutate.Append(img, mutate.Addendum{
			Layer: layer, MediaType: types.OCILayer,
			History: v1.History{Created: v1.Time{Time: r.date}, CreatedBy: "make image", Comment: l.what},
		})
		if err != nil {
			return nil, err
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: r.date}
	config.Config = v1.Config{
		User:       fmt.Sprintf("%d:%d", user, user),
		Env:        []string{"PATH=/usr/bin"},
		Entrypoint: []string{"/usr/bin/stoop"},
		Cmd:        []string{"run"},
		WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.title":    "stoop",
			"org.opencontainers.image.version":  r.version,
			"org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	return mutate.ConfigFile(img, config)
}

// authorities are the certificates that Mozilla trusts, for whatever stoop
// reaches over TLS.
func authorities() []byte {
	var b bytes.Buffer
	for root := range bundle.Roots() {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // a buffer takes all
	}
	return b.Bytes()
}

// file is one in an image, or a folder.
type file struct {
	path  string
	from  string // a file's content is that of this file,
	data  []byte // or this
	mode  fs.FileMode
	owner int
}

type files []file

// layer is a layer of the given files, and of the folders that they are in.
func (r *release) layer(list files) (v1.Layer, error) {
	var b bytes.Buffer
	t := tar.NewWriter(&b)
	have := map[string]bool{".": true}
	var folders func(dir string) error
	folders = func(dir string) error {
		if have[dir] {
			return nil
		}
		have[dir] = true
		if err := folders(path.Dir(dir)); err != nil {
			return err
		}
		return t.WriteHeader(&tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: r.date})
	}
	for _, f := range list {
		if err := folders(path.Dir(f.path)); err != nil {
			return nil, err
		}
		h := &tar.Header{Name: f.path, Typeflag: tar.TypeReg, Mode: int64(f.mode.Perm()), ModTime: r.date, Uid: f.owner, Gid: f.owner}
		if f.mode.IsDir() {
			have[f.path] = true
			h.Name, h.Typeflag = f.path+"/", tar.TypeDir
		}
		if f.mode&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		if f.mode == 0 {
			h.Mode = 0o644
		}
		data := f.data
		if f.from != "" {
			var err error
			if data, err = os.ReadFile(f.from); err != nil {
				return nil, err
			}
		}
		h.Size = int64(len(data))
		if err := t.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := t.Write(data); err != nil {
			return nil, err
		}
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(9))
}

// archive writes a folder as a tar, the same each time.
func (r *release) archive(w io.Writer, dir string) error {
	t := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error { // in the order of the names
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		return r.add(t, strings.ReplaceAll(name, string(filepath.Separator), "/"), p, 0o644)
	})
	if err != nil {
		return err
	}
	return t.Close()
}
