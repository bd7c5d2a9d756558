package node_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/node"
	"stoop/node/nodetest"
)

// run keeps an index up until the test ends.
func run(t testing.TB, n *node.Node) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	nodetest.Wait(t, "the index to be live", n.Live)
}

func TestFindContainers(t *testing.T) {
	v1, v2 := nodetest.FreezerV1(t), nodetest.UnifiedV2(t)
	for _, indexed := range []bool{false, true} {
		t.Run(fmt.Sprintf("indexed %t", indexed), func(t *testing.T) {
			n := node.New(node.Config{})
			if indexed {
				run(t, n)
			}
			slice := "stooptest" + nodetest.ID()[:8] + ".slice" // no other test's, and no node's
			for _, root := range []string{v1, v2} {
				uid := "0f1e2d3c-1f2e-4a5b-8c7d-9e0f1a2b3c4d"
				under := strings.ReplaceAll(uid, "-", "_")
				for _, form := range []string{
					"kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-%s.scope",
					"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/crio-%s.scope",
					"kubepods/besteffort/pod" + uid + "/%s",
					"docker-%s.scope", "docker/%s", "libpod-%s.scope",
				} {
					id := nodetest.ID()
					dir := filepath.Join(root, slice, fmt.Sprintf(form, id))
					nodetest.Cgroup(t, dir)
					cmd, _ := nodetest.Counter(t, dir)
					for name, ask := range map[string]struct {
						id  string
						pid int
					}{
						"short": {id[:12], 0}, "whole": {id, 0}, "short, pid": {id[:12], cmd.Process.Pid}, "whole, pid": {id, cmd.Process.Pid},
						"a pid of elsewhere": {id[:12], os.Getpid()}, "a pid of nobody": {id[:13], 1 << 30},
					} {
						c, err := n.Container(within(t), ask.id, ask.pid)
						if err != nil {
							t.Errorf("%s by %s: %v", dir, name, err)
							continue
						}
						want := ""
						if strings.HasPrefix(form, "kubepods") {
							want = uid
						}
						var st unix.Stat_t
						if err := unix.Stat(dir, &st); err != nil {
							t.Fatal(err)
						}
						if c.Path != dir || c.ID != id || c.PodUID != want || c.Inode != st.Ino {
							t.Errorf("%s by %s: found %+v", dir, name, c)
						}
					}
				}
			}
		})
	}
}

// In the hybrid layout a container may have cgroups of both versions: the one with
// its processes counts.
func TestFindHybrid(t *testing.T) {
	v1, v2 := nodetest.FreezerV1(t), nodetest.UnifiedV2(t)
	for _, tc := range []struct {
		name string
		in   []string
		want string
	}{
		{"v1", []string{v1}, v1},
		{"v2", []string{v2}, v2},
		{"both", []string{v1, v2}, v2},
		{"none yet", nil, v2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			id := nodetest.ID()
			for _, root := range []string{v1, v2} {
				nodetest.Cgroup(t, filepath.Join(root, "docker", id))
			}
			var dirs []string
			for _, root := range tc.in {
				dirs = append(dirs, filepath.Join(root, "docker", id))
			}
			if len(dirs) > 0 {
				cmd := exec.Command("sleep", "100")
				nodetest.Start(t, nodetest.In{Cgroups: dirs}, cmd)
			}
			c, err := node.New(node.Config{}).Container(within(t), id[:12], 0)
			if err != nil || c.Path != filepath.Join(tc.want, "docker", id) {
				t.Errorf("found %+v, %v", c, err)
			}
		})
	}
}

// A container whose v2 cgroup can't freeze (Linux before 5.2, or it is just going)
// is found in the other hierarchy.
func TestFindHybridWithoutFreezer(t *testing.T) {
	mount, id := t.TempDir(), nodetest.ID()
	for _, file := range []string{"unified/cgroup.controllers", "unified/docker/" + id + "/cgroup.procs", "freezer/tasks", "freezer/docker/" + id + "/cgroup.procs"} {
		path := filepath.Join(mount, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c, err := node.New(node.Config{Cgroup: mount}).Container(within(t), id[:12], 0)
	if err != nil || c.Path != filepath.Join(mount, "freezer/docker", id) {
		t.Errorf("found %+v, %v", c, err)
	}
}

// Two containers whose ids begin alike are refused; the whole id tells them apart.
func TestAmbiguous(t *testing.T) {
	for _, indexed := range []bool{false, true} {
		t.Run(fmt.Sprintf("indexed %t", indexed), func(t *testing.T) {
			root := nodetest.UnifiedV2(t)
			n := node.New(node.Config{})
			if indexed {
				run(t, n)
			}
			one := nodetest.ID()
			two := one[:12] + nodetest.ID()[12:]
			nodetest.Cgroup(t, filepath.Join(root, "docker", one))
			cmd, _ := nodetest.Counter(t, filepath.Join(root, "docker", one))
			if c, err := n.Container(within(t), one[:12], 0); err != nil || c.ID != one {
				t.Errorf("alone: found %+v, %v", c, err)
			}
			nodetest.Cgroup(t, filepath.Join(root, "docker", two))
			if indexed {
				nodetest.Wait(t, "the index to have both", func() bool { return n.Known(one, two) })
			}
			// The hint must not decide: its container may be the other one.
			for _, pid := range []int{0, cmd.Process.Pid} {
				if c, err := n.Container(within(t), one[:12], pid); !errors.Is(err, node.ErrAmbiguous) {
					t.Errorf("pid %d: found %+v, %v", pid, c, err)
				}
			}
			for _, id := range []string{one, two} {
				if c, err := n.Container(within(t), id, 0); err != nil || c.ID != id {
					t.Errorf("found %+v, %v", c, err)
				}
			}
		})
	}
}

// A cgroup that is made inside a container, or by a user of the host, under
// another container's name is not taken for it.
func TestImpostors(t *testing.T) {
	for _, indexed := range []bool{false, true} {
		t.Run(fmt.Sprintf("indexed %t", indexed), func(t *testing.T) {
			victim := nodetest.ID()
			mine := nodetest.CgroupV2(t)
			root := nodetest.UnifiedV2(t)
			n := node.New(node.Config{})
			if indexed {
				run(t, n)
			}
			var cmds []int
			for _, dir := range []string{
				filepath.Join(mine, "docker", victim),
				filepath.Join(mine, "kubepods", "pod0f1e2d3c-1f2e-4a5b-8c7d-9e0f1a2b3c4d", victim),
				filepath.Join(root, "user.slice", "docker-"+victim+".scope"),
				filepath.Join(root, "system.slice", "stooptest"+nodetest.ID()[:8]+".service", "docker-"+victim+".scope"),
			} {
				nodetest.Cgroup(t, dir)
				cmd, _ := nodetest.Counter(t, dir)
				cmds = append(cmds, cmd.Process.Pid)
			}
			for _, pid := range append(cmds, 0) {
				if c, err := n.Container(within(t), victim[:12], pid); !errors.Is(err, node.ErrGone) {
					t.Errorf("pid %d: found %+v, %v", pid, c, err)
				}
			}
			for _, pid := range cmds[:2] { // what is made in a container is that one's
				c, err := n.Container(within(t), filepath.Base(mine), pid)
				if err != nil || c.Path != mine {
					t.Errorf("found %+v, %v", c, err)
				}
			}
			// When the real one comes, it is found despite them.
			real := filepath.Join(root, "docker", victim)
			nodetest.Cgroup(t, real)
			nodetest.Wait(t, "the real one to be found", func() bool {
				c, err := n.Container(within(t), victim[:12], 0)
				return err == nil && c.Path == real
			})
		})
	}
}

// Ids that nobody has may come in any number: they are not looked for each time.
func TestMadeUpIDs(t *testing.T) {
	nodetest.UnifiedV2(t)
	n := node.New(node.Config{})
	run(t, n)
	before := n.Walks()
	id := nodetest.ID()[:12]
	for range 1000 {
		if _, err := n.Container(within(t), id, 0); !errors.Is(err, node.ErrGone) {
			t.Fatal(err)
		}
	}
	if walks := n.Walks() - before; walks > 2 {
		t.Errorf("one id that nobody has made %d walks", walks)
	}
	before = n.Walks()
	began := time.Now()
	done := make(chan struct{})
	for range 50 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 10 {
				if _, err := n.Container(within(t), nodetest.ID()[:12], 0); !errors.Is(err, node.ErrGone) {
					t.Error(err)
				}
			}
		}()
	}
	for range 50 {
		<-done
	}
	if walks, most := n.Walks()-before, int(time.Since(began)/(10*time.Millisecond))+2; walks > most {
		t.Errorf("500 ids that nobody has made %d walks in %s, more than %d", walks, time.Since(began), most)
	}
	for _, bad := range []string{"", "host", "abc", "../../etc/passwd", strings.Repeat("a", 65), "ABCDEF123456", id[:11] + "*"} {
		if c, err := n.Container(within(t), bad, 0); err == nil || errors.Is(err, node.ErrGone) {
			t.Errorf("%q: %+v, %v", bad, c, err)
		}
	}
}

// With the index up, a container is known from the moment its cgroup is made,
// and no alert reads more than its folder: nothing is walked.
func TestIndexFollows(t *testing.T) {
	root := nodetest.UnifiedV2(t)
	n := node.New(node.Config{})
	run(t, n)
	// As runc makes them: the folders above, and at once the one within.
	slice := filepath.Join(root, "stooptest"+nodetest.ID()[:8]+".slice")
	var ids []string
	for range 50 {
		id := nodetest.ID()
		ids = append(ids, id)
		nodetest.Cgroup(t, filepath.Join(slice, "kubepods", "pod"+nodetest.ID()[:32], id))
	}
	nodetest.Wait(t, "the index to have them all", func() bool { return n.Known(ids...) })
	before := n.Walks()
	for _, id := range ids {
		if c, err := n.Container(within(t), id[:12], 0); err != nil || c.ID != id {
			t.Errorf("found %+v, %v", c, err)
		}
	}
	if walks := n.Walks() - before; walks != 0 {
		t.Errorf("%d walks for containers that are in the index", walks)
	}
	for _, id := range ids[:25] {
		matches, _ := filepath.Glob(filepath.Join(slice, "kubepods", "pod*", id))
		if len(matches) != 1 || unix.Rmdir(matches[0]) != nil {
			t.Fatalf("can't remove %v", matches)
		}
	}
	for _, id := range ids[:25] {
		if c, err := n.Container(within(t), id[:12], 0); !errors.Is(err, node.ErrGone) {
			t.Errorf("found %+v, %v", c, err)
		}
	}
	nodetest.Wait(t, "the index to have lost them", func() bool { return !n.Known(ids[0]) && n.Known(ids[25:]...) })
}

// More cgroups come and go than the kernel's queue of notices holds: the index
// is right again afterwards.
func TestIndexSurvivesAnOverflow(t *testing.T) {
	root := nodetest.UnifiedV2(t)
	n := node.New(node.Config{})
	run(t, n)
	slice := filepath.Join(root, "stooptest"+nodetest.ID()[:8]+".slice")
	nodetest.Cgroup(t, slice)
	nodetest.Cgroup(t, filepath.Join(slice, nodetest.ID()))
	id := nodetest.ID()
	n.Held(func() {
		// The index can't take up this one, so all that follows waits for it.
		nodetest.Cgroup(t, filepath.Join(slice, nodetest.ID()))
		for i := range 40_000 {
			file := []string{"cgroup.max.depth", "cgroup.max.descendants"}[i%2] // the same twice would be one notice
			if err := os.WriteFile(filepath.Join(slice, file), []byte("max"), 0); err != nil {
				t.Fatal(err)
			}
		}
		nodetest.Cgroup(t, filepath.Join(slice, id)) // its notice is lost
	})
	nodetest.Wait(t, "the index to know the one that it was not told of", func() bool { return n.Known(id) })
	nodetest.Wait(t, "the index to be live again", n.Live)
}

// bound is a folder where another one is mounted a second time. It is no
// t.TempDir: nothing must ever try to remove what is in there.
func bound(t *testing.T, from string) string {
	t.Helper()
	at, err := os.MkdirTemp("", "stooptest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(at) })
	if err := unix.Mount(from, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		nodetest.Missing(t, "mounts: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

// The hierarchies and /proc may be mounted anywhere.
func TestElsewhere(t *testing.T) {
	nodetest.Root(t)
	proc, cgroup := bound(t, "/proc"), bound(t, "/sys/fs/cgroup")
	dir := nodetest.CgroupV2(t)
	_, count := nodetest.Counter(t, dir)
	n := node.New(node.Config{Proc: proc, Cgroup: cgroup + "/"})
	id := filepath.Base(dir)
	c, err := n.Container(within(t), id[:12], 0)
	if err != nil || !strings.HasPrefix(c.Path, cgroup+"/") || c.ID != id {
		t.Fatalf("found %+v, %v", c, err)
	}
	if _, err := c.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	still(t, count)
	if n.BootID() == "" || n.BootID() != node.New(node.Config{}).BootID() {
		t.Errorf("boot id %q", n.BootID())
	}
	if missing := n.Missing(node.NeedHostPID, node.NeedCgroup, node.NeedKill); missing != nil {
		t.Errorf("missing: %q", missing)
	}
}

func TestMissing(t *testing.T) {
	n := node.New(node.Config{Proc: t.TempDir(), Cgroup: t.TempDir()})
	got := n.Missing(node.NeedHostPID, node.NeedCgroup, "something else")
	if len(got) != 3 || !strings.Contains(got[0], "hostPID: true") || !strings.Contains(got[1], "/sys/fs/cgroup") || !strings.Contains(got[2], "something else") {
		t.Errorf("missing: %q", got)
	}
	if c, err := n.Container(within(t), nodetest.ID(), 0); err == nil || errors.Is(err, node.ErrGone) {
		t.Errorf("without cgroups: %+v, %v", c, err)
	}
	run := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { run <- n.Run(ctx) }()
	cancel()
	if err := <-run; err != nil {
		t.Error(err)
	}
}
