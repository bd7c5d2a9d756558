package node

import (
	"os"
	"strings"
	"testing"
	"time"

	"stoop/node/nodetest"
)

// Looking at an executable on a file system that does not answer ends in time.
func TestOfRootHasADeadline(t *testing.T) {
	cgroup := nodetest.CgroupV2(t)
	release := nodetest.Stuck(t, cgroup)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var dir string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[0] == "stoop-test" && strings.Contains(f[1], t.Name()) {
			dir = f[1]
		}
	}
	p := &Process{PID: os.Getpid(), Exe: dir + "/bin/sshd", node: New(Config{})}
	began := time.Now()
	if dir == "" || !p.OfRoot() || time.Since(began) > 10*ofRootIn {
		t.Errorf("%q: it is none of root's, or that took %s", dir, time.Since(began))
	}
	release()
	nodetest.Wait(t, "the look to end", func() bool { return p.node.looks.Load() == 0 })
}
