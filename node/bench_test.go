package node_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"stoop/node"
	"stoop/node/nodetest"
)

// BenchmarkContain is what finding, freezing and killing a container takes on a
// node with 200 containers and 2,000 processes.
func BenchmarkContain(b *testing.B) {
	for kind, root := range map[string]func(testing.TB) string{"v1": nodetest.FreezerV1, "v2": nodetest.UnifiedV2} {
		b.Run(kind, func(b *testing.B) {
			dirs := crowd(b, root(b), 200, 10)
			n := node.New(node.Config{})
			run(b, n)
			ctx := within(b)
			next := func(i int) string { return filepath.Base(dirs[i%len(dirs)])[:12] }
			measure := func(name string, act func(c *node.Container) error, after func(c *node.Container) error) {
				b.Run(name, func(b *testing.B) {
					var took []time.Duration
					for i := 0; b.Loop(); i++ {
						began := time.Now()
						c, err := n.Container(ctx, next(i), 0)
						if err == nil {
							err = act(c)
						}
						took = append(took, time.Since(began))
						b.StopTimer()
						if err == nil {
							err = after(c)
						}
						if err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
					slices.Sort(took)
					b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
					b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
				})
			}
			nothing := func(*node.Container) error { return nil }
			measure("find", nothing, nothing)
			measure("freeze", func(c *node.Container) error { _, err := c.Freeze(ctx); return err },
				func(c *node.Container) error { _, err := c.Thaw(ctx); return err })
			killed := 0 // each container only once
			b.Run("kill", func(b *testing.B) {
				var took []time.Duration
				for range 100 {
					if killed == len(dirs) {
						break
					}
					began := time.Now()
					c, err := n.Container(ctx, next(killed), 0)
					if err == nil {
						_, err = c.Kill(ctx)
					}
					if err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(began))
					killed++
				}
				if len(took) == 0 {
					b.Skip("nobody is left")
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
				b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
			})
		})
	}
}

// crowd makes containers with processes in each, as pods have them.
func crowd(b *testing.B, root string, containers, processes int) []string {
	b.Helper()
	var dirs []string
	for range containers {
		id := nodetest.ID()
		dir := filepath.Join(root, "kubepods", "burstable", fmt.Sprintf("pod%s-%s-%s-%s-%s", id[:8], id[8:12], id[12:16], id[16:20], id[20:32]), nodetest.ID())
		nodetest.Cgroup(b, dir)
		cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf("i=1; while [ $i -lt %d ]; do sleep 1000 & i=$((i+1)); done; wait", processes))
		nodetest.Start(b, nodetest.In{Cgroups: []string{dir}}, cmd)
		dirs = append(dirs, dir)
	}
	nodetest.Wait(b, "all processes to run", func() bool {
		return !slices.ContainsFunc(dirs, func(dir string) bool { return len(nodetest.Pids(dir)) < processes })
	})
	return dirs
}
