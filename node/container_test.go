package node_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/node"
	"stoop/node/nodetest"
)

// kinds are the cgroups that a container may have.
func kinds() map[string]func(testing.TB) string {
	return map[string]func(testing.TB) string{"v1": nodetest.CgroupV1, "v2": nodetest.CgroupV2}
}

func each(t *testing.T, f func(t *testing.T, makeCgroup func(testing.TB) string)) {
	for kind, makeCgroup := range kinds() {
		t.Run(kind, func(t *testing.T) { f(t, makeCgroup) })
	}
}

// within bounds an act in a test.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func find(t testing.TB, n *node.Node, dir string) *node.Container {
	t.Helper()
	c, err := n.Container(within(t), filepath.Base(dir)[:12], 0)
	if err != nil {
		t.Fatal(err)
	}
	if c.Path != dir || c.ID != filepath.Base(dir) {
		t.Fatalf("found %+v, not %s", c, dir)
	}
	return c
}

// still makes sure that a counter does not count, by looking long enough for
// one that runs to have counted on.
func still(t testing.TB, count func() int) {
	t.Helper()
	before := count()
	time.Sleep(30 * time.Millisecond) // not to wait for something: to see that nothing happens
	if after := count(); after != before {
		t.Errorf("it counted on from %d to %d", before, after)
	}
}

func goesOn(t testing.TB, count func() int) {
	t.Helper()
	before := count()
	nodetest.Wait(t, "the counter to go on", func() bool { return count() > before })
}

func TestFreezeAndThaw(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		_, count := nodetest.Counter(t, dir)
		// One in a cgroup below, as systemd in a container makes them.
		nodetest.Cgroup(t, filepath.Join(dir, "inner"))
		_, inner := nodetest.Counter(t, filepath.Join(dir, "inner"))
		c := find(t, node.New(node.Config{}), dir)
		if pids, err := c.Pids(); err != nil || len(pids) < 2 {
			t.Errorf("pids %v, error %v", pids, err)
		}
		for round := range 3 {
			if already, err := c.Freeze(within(t)); already || err != nil {
				t.Fatalf("round %d: already %t, error %v", round, already, err)
			}
			still(t, count)
			still(t, inner)
			if already, err := c.Freeze(within(t)); !already || err != nil {
				t.Errorf("freeze again: already %t, error %v", already, err)
			}
			if is, err := c.Frozen(); !is || err != nil {
				t.Errorf("frozen %t, error %v", is, err)
			}
			if already, err := c.Thaw(within(t)); already || err != nil {
				t.Fatalf("thaw: already %t, error %v", already, err)
			}
			goesOn(t, count)
			goesOn(t, inner)
			if already, err := c.Thaw(within(t)); !already || err != nil {
				t.Errorf("thaw again: already %t, error %v", already, err)
			}
			if is, err := c.Frozen(); is || err != nil {
				t.Errorf("frozen %t, error %v", is, err)
			}
		}
	})
}

// Five hundred processes that fork as fast as they can, and ignore what can be
// ignored: all stop, all die, none is left over.
func TestForkBomb(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		for _, frozen := range []bool{false, true} {
			t.Run(fmt.Sprintf("frozen %t", frozen), func(t *testing.T) {
				dir := makeCgroup(t)
				bomb(t, dir, 500)
				c := find(t, node.New(node.Config{}), dir)
				if frozen {
					if _, err := c.Freeze(within(t)); err != nil {
						t.Fatal(err)
					}
					// At once: so many take a while to stop.
					if is, err := c.Frozen(); !is || err != nil {
						t.Errorf("frozen %t, error %v", is, err)
					}
				}
				began := time.Now()
				killed, err := c.Kill(within(t))
				if err != nil || killed < 400 {
					t.Fatalf("killed %d, error %v", killed, err)
				}
				t.Logf("%d killed in %s", killed, time.Since(began))
				// Whoever was forked in the middle would be here by now.
				still(t, func() int { return len(nodetest.Pids(dir)) })
				if pids := nodetest.Pids(dir); len(pids) > 0 {
					t.Errorf("%d live on: %v", len(pids), pids)
				}
				if killed, err := c.Kill(within(t)); killed != 0 || err != nil {
					t.Errorf("kill again: killed %d, error %v", killed, err)
				}
			})
		}
	})
}

// bomb starts processes that replace each other all the time, so that there are
// about n at any moment, in the cgroup.
func bomb(t testing.TB, dir string, n int) {
	t.Helper()
	// Each of n/2 loops has one child at a time that lives for a moment.
	nodetest.Shell(t, dir, fmt.Sprintf(`trap "" TERM INT HUP
i=0; while [ $i -lt %d ]; do (trap "" TERM; while :; do sh -c "read x </dev/zero & sleep 0.0%d" ; done) & i=$((i+1)); done; wait`, n*9/10, 9))
	nodetest.Wait(t, "the bomb to go off", func() bool { return len(nodetest.Pids(dir)) >= n })
}

// A container whose cgroup is not there any more, or was made anew under the
// same name, is not the one that was found.
func TestGone(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		n := node.New(node.Config{})
		c := find(t, n, dir)
		acts := map[string]func(*node.Container) error{
			"pids":   func(c *node.Container) error { _, err := c.Pids(); return err },
			"freeze": func(c *node.Container) error { _, err := c.Freeze(within(t)); return err },
			"thaw":   func(c *node.Container) error { _, err := c.Thaw(within(t)); return err },
			"frozen": func(c *node.Container) error { _, err := c.Frozen(); return err },
			"kill":   func(c *node.Container) error { _, err := c.Kill(within(t)); return err },
			"at":     func(c *node.Container) error { _, err := n.ContainerAt(c.Path, c.Inode); return err },
		}
		for name, act := range acts {
			if err := act(c); err != nil {
				t.Errorf("%s while it is there: %v", name, err)
			}
		}
		if err := unix.Rmdir(dir); err != nil {
			t.Fatal(err)
		}
		for name, act := range acts {
			if err := act(c); !errors.Is(err, node.ErrGone) {
				t.Errorf("%s of a cgroup that is gone: %v", name, err)
			}
		}
		if _, err := n.Container(within(t), c.ID, 0); !errors.Is(err, node.ErrGone) {
			t.Errorf("find it: %v", err)
		}
		nodetest.Cgroup(t, dir)
		_, count := nodetest.Counter(t, dir)
		for name, act := range acts {
			if err := act(c); !errors.Is(err, node.ErrGone) {
				t.Errorf("%s of a cgroup that was made anew: %v", name, err)
			}
		}
		goesOn(t, count)
		nodetest.Wait(t, "the new one to be found", func() bool {
			_, err := n.Container(within(t), c.ID, 0)
			return err == nil
		})
	})
}

// A freeze that does not come to its end in time holds all the same, and one that
// somebody else made stays as it was.
func TestFreezeHasADeadline(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		_, count := nodetest.Counter(t, dir)
		// So many take a while to stop: some of the deadlines pass in the middle of it.
		nodetest.Shell(t, dir, "i=0; while [ $i -lt 300 ]; do sleep 1000 & i=$((i+1)); done; wait")
		nodetest.Wait(t, "all to run", func() bool { return len(nodetest.Pids(dir)) > 300 })
		c := find(t, node.New(node.Config{}), dir)
		for timeout := 50 * time.Microsecond; timeout < time.Second; timeout += timeout / 8 {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			_, err := c.Freeze(ctx)
			cancel()
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			if err == nil {
				break
			}
			if errors.Is(err, node.ErrStopping) {
				nodetest.Wait(t, "it to be frozen", func() bool { is, err := c.Frozen(); return is && err == nil })
				still(t, count)
			}
			if _, err := c.Thaw(within(t)); err != nil {
				t.Fatal(err)
			}
			goesOn(t, count)
		}
		if _, err := c.Freeze(within(t)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _ = c.Freeze(ctx)
		still(t, count)
	})
}

// One process that the kernel can't stop keeps none of the others from being
// stopped, and stops itself as soon as it can.
func TestFreezeOfOneThatIsStuck(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		release := nodetest.Stuck(t, dir)
		_, count := nodetest.Counter(t, dir)
		c := find(t, node.New(node.Config{}), dir)
		for _, before := range []bool{false, true} {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			already, err := c.Freeze(ctx)
			cancel()
			if !errors.Is(err, node.ErrStopping) || already != before {
				t.Fatalf("already %t, %v", already, err)
			}
			still(t, count)
		}
		release()
		nodetest.Wait(t, "all to be frozen", func() bool { is, err := c.Frozen(); return is && err == nil })
		if _, err := c.Thaw(within(t)); err != nil {
			t.Fatal(err)
		}
		goesOn(t, count)
	})
}

// Nor does it let a fork bomb get away, or leave frozen what could not be killed.
func TestKillOfOneThatIsStuck(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		release := nodetest.Stuck(t, dir)
		bomb(t, dir, 100)
		c := find(t, node.New(node.Config{}), dir)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := c.Kill(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("killed: %v", err)
		}
		if left := nodetest.Pids(dir); len(left) != 1 {
			t.Errorf("processes %v are left, and one is stuck", left)
		}
		release()
		nodetest.Wait(t, "the last one to end", func() bool { return len(nodetest.Pids(dir)) == 0 })
	})
}

func TestOwnContainerIsSpared(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		root := filepath.Dir(filepath.Dir(dir))
		before := ownCgroup(t, root)
		put := func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0)
		}
		t.Cleanup(func() {
			if err := put(before); err != nil {
				t.Error(err)
			}
		})
		if err := put(dir); err != nil {
			t.Fatal(err)
		}
		c := find(t, node.New(node.Config{}), dir)
		if _, err := c.Freeze(within(t)); err == nil || !strings.Contains(err.Error(), "stoop itself") {
			t.Errorf("freeze: %v", err) // where the guard is missing, nothing is printed: this very process is frozen
		}
		if _, err := c.Kill(within(t)); err == nil || !strings.Contains(err.Error(), "stoop itself") {
			t.Errorf("kill: %v", err)
		}
	})
}

// A container that fills its cgroup with others, which takes long to read, is
// frozen as fast as any.
func TestFreezeOfManyCgroups(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		_, count := nodetest.Counter(t, dir)
		for i := range 5000 {
			if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		c := find(t, node.New(node.Config{}), dir)
		began := time.Now()
		all, err := c.Pids()
		if err != nil || len(all) == 0 {
			t.Fatal(all, err)
		}
		reading := time.Since(began)
		began = time.Now()
		if _, err := c.Freeze(within(t)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > reading/2 {
			t.Errorf("the freeze took %s, and to read all cgroups %s", took, reading)
		}
		still(t, count)
	})
}

// ownCgroup is where this process is in the hierarchy.
func ownCgroup(t *testing.T, root string) string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if f[1] == filepath.Base(root) || f[1] == "" && filepath.Base(root) != "freezer" {
			return filepath.Join(root, f[2])
		}
	}
	t.Fatalf("no cgroup of %s in %s", root, b)
	return ""
}

// What is done to one container at the same time by several must end, and end as
// one of them said.
func TestManyAtOnce(t *testing.T) {
	each(t, func(t *testing.T, makeCgroup func(testing.TB) string) {
		dir := makeCgroup(t)
		_, count := nodetest.Counter(t, dir)
		c := find(t, node.New(node.Config{}), dir)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 10 {
					if _, err := c.Freeze(within(t)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		still(t, count)
	})
}

// ContainerAt takes an undo record's word for nothing but a container's cgroup.
func TestContainerAt(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	n := node.New(node.Config{})
	c := find(t, n, dir)
	if at, err := n.ContainerAt(c.Path, c.Inode); err != nil || at.ID != c.ID || at.Version() != 2 {
		t.Errorf("%+v, %v", at, err)
	}
	inner := filepath.Join(dir, "inner")
	nodetest.Cgroup(t, inner)
	for _, path := range []string{"", "/", "/etc", filepath.Dir(dir), inner, dir + "/", dir + "/inner/..", filepath.Dir(dir) + "/../docker/" + c.ID, filepath.Dir(dir) + "//" + c.ID, filepath.Dir(filepath.Dir(dir))} {
		if at, err := n.ContainerAt(path, c.Inode); err == nil {
			t.Errorf("%q is container %+v", path, at)
		}
	}
}

func TestPidsAreSorted(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	for range 5 {
		nodetest.Shell(t, dir, "sleep 100")
	}
	pids, err := find(t, node.New(node.Config{}), dir).Pids()
	if err != nil || len(pids) < 5 || !slices.IsSorted(pids) {
		t.Errorf("pids %v, error %v", pids, err)
	}
}
