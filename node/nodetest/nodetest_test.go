package nodetest_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"stoop/node/nodetest"
)

// Each kind of cgroup holds what was started in it, and is gone afterwards.
func TestCgroups(t *testing.T) {
	for name, make := range map[string]func(testing.TB) string{
		"v1": nodetest.CgroupV1, "v2": nodetest.CgroupV2,
		"pod v1": func(t testing.TB) string { dir, _ := nodetest.PodV1(t); return dir },
		"pod v2": func(t testing.TB) string { dir, _ := nodetest.PodV2(t); return dir },
	} {
		t.Run(name, func(t *testing.T) {
			var dir string
			t.Run("alive", func(t *testing.T) {
				dir = make(t)
				cmd, _ := nodetest.Counter(t, dir)
				if pids := nodetest.Pids(dir); !slices.Contains(pids, cmd.Process.Pid) {
					t.Errorf("process %d is not among %v of %s", cmd.Process.Pid, pids, dir)
				}
				nodetest.Cgroup(t, filepath.Join(dir, "inner")) // goes with it
			})
			if _, err := os.Stat(dir); dir != "" && !os.IsNotExist(err) {
				t.Errorf("%s is still there: %v", dir, err)
			}
		})
	}
}

// A namespace of its own has nothing but lo, for sockets as for processes.
func TestNetns(t *testing.T) {
	ns := nodetest.Netns(t)
	ns.Do(t, func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		return l.Close()
	})
	var out strings.Builder
	cmd := exec.Command("cat", "/proc/self/net/dev")
	cmd.Stdout = &out
	nodetest.Start(t, nodetest.In{Netns: ns}, cmd)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 3 || !strings.Contains(out.String(), "lo:") {
		t.Errorf("the namespace holds more than lo:\n%s", out.String())
	}
}
