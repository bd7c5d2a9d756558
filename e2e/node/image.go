package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

// The one image of the node, for the pods and for what holds their namespaces.
const image = "stoop.invalid/e2e:1"

// imageRepository is what Falco's container.image.repository says of it.
const imageRepository = "stoop.invalid/e2e"

// applets are what the image has of busybox.
var applets = []string{"cat", "cp", "env", "nc", "rm", "sh", "sleep", "usleep"}

// writeImage writes the image as an archive that containerd imports. There is
// no registry to pull one from.
func writeImage(path string) error { return writeImageOf(path, image, "bin/busybox", busybox, applets) }

// writeImageOf is [writeImage] for an image with another program, and links to it.
func writeImageOf(path, image, at, from string, applets []string) error {
	program, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("read what goes into the image: %w", err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err == nil {
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(content)
		}
	}
	add(tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	add(tar.Header{Name: at, Mode: 0o755}, program)
	for _, a := range applets {
		add(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return fmt.Errorf("write the image's layer: %w", err)
	}
	sum := sha256.Sum256(layer.Bytes())
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		// As the pause container it only has to be there.
		"config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sleep", "1000000"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
	})
	if err != nil {
		return fmt.Errorf("write the image's configuration: %w", err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{image}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return fmt.Errorf("write the image's manifest: %w", err)
	}
	var archive bytes.Buffer
	w = tar.NewWriter(&archive)
	add(tar.Header{Name: "config.json", Mode: 0o644}, config)
	add(tar.Header{Name: "layer.tar", Mode: 0o644}, layer.Bytes())
	add(tar.Header{Name: "manifest.json", Mode: 0o644}, manifest)
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		err = os.WriteFile(path, archive.Bytes(), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	return nil
}
