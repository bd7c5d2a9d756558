// Command bench measures the figures that stoop is to hold, each beside the
// bare figure of the same run, and writes them into docs/performance.md:
// run it in e2e as
//
//	go run ./cmd/bench [-write ../docs/performance.md] [-only latency,storm,…] [-quick]
//
// It runs the real program against a real API server, on this machine; nothing
// else should run beside it. The section node needs none, but root, and is left
// out without.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/e2e/figures"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

// sections are the parts of the bench, in the order in which they run: what is
// best alone on the machine comes before the first that needs a cluster.
var sections = []struct {
	name    string
	run     func(*bench)
	cluster bool
}{
	{"size", (*bench).size, false},
	{"node", (*bench).node, false},
	{"idle", (*bench).idle, true},
	{"throughput", (*bench).throughput, false},
	{"latency", (*bench).latency, true},
	{"storm", (*bench).storm, true},
}

func main() {
	write := flag.String("write", "", "the `file` whose part between the bench's markers is replaced")
	only := flag.String("only", "", "run only these `sections`, separated by commas: size, node, idle, throughput, latency, storm")
	quick := flag.Bool("quick", false, "a tenth of the samples: to see that the bench works")
	grace := flag.Int("grace", 1, "the grace period of all deletes, in `seconds`")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{quick: *quick, grace: int64(*grace)}
	err := harness.Outside(ctx, os.Stderr, func(t harness.T) {
		b.T = t
		b.setUp()
		for _, s := range sections {
			if *only == "" || slices.Contains(strings.Split(*only, ","), s.name) {
				t.Logf("— %s", s.name)
				if s.cluster && b.cluster == nil {
					b.startCluster()
				}
				s.run(b)
			}
		}
	})
	if err == nil {
		text := b.report()
		fmt.Print(text)
		if *write != "" {
			err = figures.Replace(*write, beginMark, endMark, text)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	harness.T
	quick bool
	grace int64

	bin, bare string
	cluster   *kube.Cluster
	account   *kube.Account
	rows      []row
	notes     []string
}

func (b *bench) setUp() {
	b.bin = program.Build(b)
	b.bare = program.BuildBare(b)
}

func (b *bench) startCluster() {
	b.cluster = kube.StartWithoutAudit(b)
	rules := append(responders.BaseRBAC(), responders.PauseRBAC("default")...)
	for _, r := range responders.All() {
		rules = append(rules, r.RBAC...)
	}
	// The bench's own bare requests are the same account's: watch is for it.
	rules = append(rules, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"watch"}})
	b.account = b.cluster.Account(b, rules)
}

// samples is n, or a tenth of it in a quick run.
func (b *bench) samples(n int) int {
	if b.quick {
		return max(n/10, 10)
	}
	return n
}

func (b *bench) deleteRules() string {
	return fmt.Sprintf(`
mode: enforce
rules:
  - name: delete-on-critical
    match: {priority: critical}
    actions:
      - delete-pod: {gracePeriod: %ds, force: true}
`, b.grace)
}

// options are those of every stoop that the bench starts: it enforces, without
// limits.
func (b *bench) options(node, rules string) program.Options {
	return program.Options{
		Bin: b.bin, Node: node, Kubeconfig: b.account.Kubeconfig, Mode: "enforce", Rules: rules,
		Config: program.NoLimits,
	}
}
