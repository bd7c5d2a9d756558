package responders

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"stoop/node/nodetest"
)

func TestKillContainer(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		for range 3 {
			nodetest.Shell(t, dir, `trap "" TERM INT HUP QUIT; sleep 1000 & sleep 1001 & wait`)
		}
		elsewhere := nodetest.CgroupV2(t)
		_, count := nodetest.Counter(t, elsewhere)
		k, r := onNode(t, killContainer(), `{}`)
		r.Container = containerAt(t, dir)
		if err := k.(Checker).Check(brief(t), r); err != nil || len(nodetest.Pids(dir)) < 3 {
			t.Fatalf("check: %v, %d live", err, len(nodetest.Pids(dir)))
		}
		res, err := k.Act(brief(t), r)
		if err != nil || res.Nothing || res.Found["processes"] == "0" || res.Undo != nil || strings.Contains(res.Reason, "kubelet") {
			t.Errorf("%+v, %v", res, err)
		}
		if pids := nodetest.Pids(dir); len(pids) > 0 {
			t.Errorf("%v live on", pids)
		}
		countsOn(t, count)
		if res, err := k.Act(brief(t), r); err != nil || !res.Nothing {
			t.Errorf("again: %+v, %v", res, err)
		}
		if err := unix.Rmdir(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Act(brief(t), r); !isGone(err) {
			t.Errorf("the container is gone: %v", err)
		}
	})
}

// What freeze-container stopped dies as well.
func TestKillFrozenContainer(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		nodetest.Counter(t, dir)
		f, r := onNode(t, freezeContainer(), `{}`)
		r.Container = containerAt(t, dir)
		if _, err := f.Act(brief(t), r); err != nil {
			t.Fatal(err)
		}
		k, _ := onNode(t, killContainer(), ``)
		if res, err := k.Act(brief(t), r); err != nil || res.Nothing || len(nodetest.Pids(dir)) > 0 {
			t.Errorf("%+v, %v, %v live on", res, err, nodetest.Pids(dir))
		}
	})
}

func TestKillContainerOfAPod(t *testing.T) {
	dir, _ := nodetest.PodV1(t)
	nodetest.Counter(t, dir)
	k, r := onNode(t, killContainer(), `{}`)
	r.Container = containerAt(t, dir)
	res, err := k.Act(brief(t), r)
	if err != nil || !strings.Contains(res.Reason, "kubelet") || !strings.Contains(res.Reason, "delete-pod") {
		t.Errorf("%+v, %v", res, err)
	}
}
