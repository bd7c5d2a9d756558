// Command pin writes e2e/tools/go.mod for other versions of Kubernetes and
// etcd: run it in e2e as go run ./cmd/pin v1.36.3 v3.6.8, then go mod tidy in
// e2e/tools.
//
// Kubernetes' own go.mod replaces its staging modules by folders that are not
// in its module, so whoever builds it as a module has to replace them by their
// published versions.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	if len(os.Args) != 3 || !strings.HasPrefix(os.Args[1], "v1.") {
		fmt.Fprintln(os.Stderr, "usage: go run ./cmd/pin v1.KUBERNETES vETCD")
		os.Exit(2)
	}
	if err := pin(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "pin:", err)
		os.Exit(1)
	}
}

func pin(kubernetes, etcd string) error {
	var module struct{ GoMod string }
	if err := goJSON(&module, "mod", "download", "-json", "k8s.io/kubernetes@"+kubernetes); err != nil {
		return err
	}
	var file struct {
		Go      string
		Replace []struct{ Old, New struct{ Path string } }
	}
	if err := goJSON(&file, "mod", "edit", "-json", module.GoMod); err != nil {
		return err
	}
	staging := "v0." + strings.TrimPrefix(kubernetes, "v1.")
	var b bytes.Buffer
	language := strings.Join(strings.Split(file.Go, ".")[:2], ".")
	fmt.Fprintf(&b, "module stoop/e2e/tools\n\ngo %s\n\ngodebug default=go%s\n\n", file.Go, language)
	fmt.Fprintf(&b, "require (\n\tgo.etcd.io/etcd/server/v3 %s\n\tk8s.io/kubernetes %s\n)\n\nreplace (\n", etcd, kubernetes)
	for _, r := range file.Replace {
		if strings.HasPrefix(r.New.Path, "./staging/") {
			fmt.Fprintf(&b, "\t%s => %s %s\n", r.Old.Path, r.Old.Path, staging)
		}
	}
	b.WriteString(")\n")
	return os.WriteFile(filepath.Join("tools", "go.mod"), b.Bytes(), 0o644)
}

func goJSON(into any, args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir = os.TempDir() // outside of this module, whose replacements are not meant
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return nil
}
