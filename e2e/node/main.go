// Command node runs stoop on a real node: a kubelet, containerd and real pods
// beside it, in which an attacker from outside holds a shell. It measures, from
// the moment an alert is on the FIFO, when that shell is frozen, cut off or dead,
// and in the same run what deleting the pod through the API alone comes to. Run
// it as root in e2e:
//
//	go run ./node [-n 20] [-bare | -inpod | -chart] [-write ../docs/performance.md]
//
// All of the node lives in one network, mount and pid namespace of its own. Only
// its cgroups and a temporary folder are where others can see them, under one
// name that ends with this process's number. They are removed at the end, also
// after an error or an interrupt; after a kill -9 the next run does that. What does not happen as it should (a
// thawed shell that does not go on, a packet after the cut, a wrong hash in the
// evidence) is an error, not a figure.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"stoop/e2e/figures"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

const (
	beginMark = "<!-- node:begin -->"
	endMark   = "<!-- node:end -->"
)

// allWithin is far above what a run was seen to take once all is built.
const allWithin = 20 * time.Minute

// settings are what the command hands to itself inside the namespaces.
type settings struct {
	Dir     string // of this run: everything on disk is in it
	Cgroup  string // the name of the node's cgroup in every hierarchy
	Stoop   string // the program
	Repeat  int    // samples of each of stoop's figures
	Bare    bool   // without stoop
	InPod   bool   // only what acts in the pod, without figures
	Chart   *chart // instead of all else: stoop as the chart installs it
	Command string // as the report names it
}

func main() {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case stageInit:
			os.Exit(asInit(os.Args[2]))
		case stageWork:
			os.Exit(work(os.Args[2]))
		}
	}
	n := flag.Int("n", 20, "how many `samples` of each of stoop's figures, at least 10 for those that are to be kept")
	write := flag.String("write", "", "the `file` whose part between the markers "+beginMark+" and "+endMark+" is replaced")
	bare := flag.Bool("bare", false, "only what the API alone comes to, without stoop")
	inPod := flag.Bool("inpod", false, "only what acts in the pod: that it works, no figures")
	installed := flag.Bool("chart", false, "stoop as the chart installs it: that it works, and loses no alert when it is killed and upgraded")
	flag.Parse()
	if flag.NArg() > 0 || *n < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, allWithin)
	defer cancel()
	var report string
	err := harness.Outside(ctx, os.Stderr, func(t harness.T) { report = run(t, *n, *bare, *inPod, *installed) })
	if err == nil && *write != "" {
		err = figures.Replace(*write, beginMark, endMark, report)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}

// run builds what is needed, has the work done inside, and returns the report.
func run(t harness.T, n int, bare, inPod, installed bool) string {
	if err := check(); err != nil {
		t.Fatalf("%v", err)
	}
	// Here, because inside there is no network to fetch modules over.
	if _, err := kube.Binaries(t.Context(), t.Logf, kube.Kubelet); err != nil {
		t.Fatalf("%v", err)
	}
	s := settings{
		Repeat: n, Bare: bare, InPod: inPod,
		Command: strings.Join(append([]string{"go run ./node"}, os.Args[1:]...), " "),
	}
	if !bare {
		s.Stoop = program.Build(t)
	}
	if installed {
		s.Chart = buildChart(t)
	}
	sweep(t.Logf)
	name := prefix + strconv.Itoa(os.Getpid())
	s.Dir, s.Cgroup = makeDir(t, name), name
	makeCgroups(t, name)
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatalf("write the settings: %v", err)
	}
	path := filepath.Join(s.Dir, "settings.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatalf("write the settings: %v", err)
	}
	var report bytes.Buffer
	err = enter(t.Context(), s, path, io.MultiWriter(os.Stdout, &report))
	if ctxErr := context.Cause(t.Context()); ctxErr != nil {
		t.Fatalf("ended early: %v", ctxErr)
	}
	if err != nil {
		t.Fatalf("inside the node: %v", err)
	}
	return report.String()
}

// work is the second half of the command, inside: the node, the figures, and on
// stdout the report.
func work(path string) int {
	var s settings
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err == nil {
		// Whoever asks for a temporary folder gets one in ours.
		err = os.Setenv("TMPDIR", s.Dir)
	}
	if err == nil {
		err = harness.Outside(context.Background(), os.Stderr, func(t harness.T) {
			m := &measuring{rig: startRig(t, s)}
			if s.Chart != nil {
				m.rig.installed()
				return
			}
			if s.InPod {
				m.inPodOnly()
				return
			}
			m.all()
			fmt.Print(m.report())
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
