// Command release makes what is given to users: the programs, the .deb and the
// .rpm, the image, the chart, and what they are made of.
//
//	go run ./release [-version V] [-out DIR] packages|image|all
//
// It is a module of its own, so that nothing of what packs stoop is in stoop.
// The same commit gives the same bytes, wherever and whenever it is built.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("release", flag.ContinueOnError)
	version := f.String("version", "", "the version (default: the commit's tag, or one that says that it has none)")
	out := f.String("out", "", "the folder for what is made (default: dist, in stoop's folder)")
	image := f.String("image", localImage, "where the image is published: the chart's default")
	arches := f.String("arch", "amd64,arm64", "the architectures")
	if err := f.Parse(args); err != nil {
		return err
	}
	r := &release{version: *version, out: *out, arches: strings.Split(*arches, ","), published: *image}
	if err := r.prepare(ctx); err != nil {
		return err
	}
	defer os.RemoveAll(r.stage)
	var err error
	switch what := f.Arg(0); {
	case f.NArg() != 1:
		return fmt.Errorf("name one of packages, image, all")
	case what == "packages":
		err = r.packages(ctx)
	case what == "image":
		err = r.image(ctx)
	case what == "all":
		err = r.all(ctx)
	default:
		return fmt.Errorf("there is nothing called %q: name one of packages, image, all", what)
	}
	if err != nil {
		return err
	}
	return r.checksums()
}

// release is one version of stoop while it is packed.
type release struct {
	version   string    // without the v: 0.3.0
	root      string    // stoop's folder
	out       string    // where what is made goes
	arches    []string  // Go's names
	published string    // where the image is
	date      time.Time // the commit's: what every file in it is dated with
	stage     string    // a folder for what is on its way
	built     map[string]*built
}

// prepare finds out what is to be released.
func (r *release) prepare(ctx context.Context) (err error) {
	// The tools are in a folder of stoop's.
	if r.root, err = output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}"); err != nil {
		return err
	}
	r.root = filepath.Dir(r.root)
	if r.out == "" {
		r.out = filepath.Join(r.root, "dist")
	}
	if r.out, err = filepath.Abs(r.out); err != nil {
		return err
	}
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return err
	}
	seconds := os.Getenv("SOURCE_DATE_EPOCH")
	if seconds == "" {
		if seconds, err = output(ctx, r.root, "git", "log", "-1", "--format=%ct"); err != nil {
			return fmt.Errorf("the commit's date (set SOURCE_DATE_EPOCH where there is no git): %w", err)
		}
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH, or the commit's date: %w", err)
	}
	r.date = time.Unix(n, 0).UTC()
	if r.version == "" {
		if r.version, err = versionOf(ctx, r.root, r.date); err != nil {
			return err
		}
	}
	r.version = strings.TrimPrefix(r.version, "v")
	r.stage, err = os.MkdirTemp("", "stoop-release-")
	r.built = map[string]*built{}
	return err
}

// versionOf is what the commit's tag says, or a version below all others that
// names the commit.
func versionOf(ctx context.Context, root string, date time.Time) (string, error) {
	if tag, err := output(ctx, root, "git", "describe", "--exact-match", "--tags", "--match", "v[0-9]*"); err == nil {
		return tag, nil
	}
	commit, err := output(ctx, root, "git", "rev-parse", "--short=12", "HEAD")
	if err != nil {
		return "", fmt.Errorf("the version (give it by -version where there is no git): %w", err)
	}
	return fmt.Sprintf("0.0.0-dev.%s.g%s", date.Format("20060102150405"), commit), nil
}

// output is what a command says, without the white space around it.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if exit, ok := err.(*exec.ExitError); ok {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// all makes everything.
func (r *release) all(ctx context.Context) error {
	if err := r.packages(ctx); err != nil {
		return err
	}
	if err := r.archives(ctx); err != nil {
		return err
	}
	if err := r.chart(); err != nil {
		return fmt.Errorf("pack the chart: %w", err)
	}
	return r.image(ctx)
}
