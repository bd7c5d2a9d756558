package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/node"
	"stoop/node/nodetest"
)

// onNode is a responder that acts on this very machine, and a request for it.
func onNode(t *testing.T, e Entry, params string) (Responder, *Request) {
	t.Helper()
	n := node.New(node.Config{})
	if missing := n.Missing(e.Needs...); missing != nil {
		nodetest.Missing(t, "%s", strings.Join(missing, "; "))
	}
	r := &Request{Step: &broker.Step{ID: "step"}}
	r.Step.Params = json.RawMessage(params)
	return e.New(Env{Local: n}), r
}

func containerAt(t *testing.T, dir string) *node.Container {
	t.Helper()
	c, err := node.New(node.Config{}).Container(brief(t), filepath.Base(dir), 0)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func standsStill(t *testing.T, count func() int) {
	t.Helper()
	before := count()
	time.Sleep(30 * time.Millisecond) // to see that nothing happens
	if after := count(); after != before {
		t.Errorf("it counted on from %d to %d", before, after)
	}
}

func countsOn(t *testing.T, count func() int) {
	t.Helper()
	before := count()
	nodetest.Wait(t, "the counter to go on", func() bool { return count() > before })
}

// eachCgroup runs a test on containers of both cgroup versions.
func eachCgroup(t *testing.T, f func(t *testing.T, dir string)) {
	t.Run("v1", func(t *testing.T) { f(t, nodetest.CgroupV1(t)) })
	t.Run("v2", func(t *testing.T) { f(t, nodetest.CgroupV2(t)) })
}

// A suspect that can't be frozen must not hold up the rest of its chain.
func TestFreezeInVainIsNotTriedAgain(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		_, count := nodetest.Counter(t, dir)
		f, r := onNode(t, freezeContainer(), `{}`)
		r.Container = containerAt(t, dir)
		late, cancel := context.WithDeadline(context.Background(), time.Now())
		defer cancel()
		_, err := f.Act(late, r)
		if status, retry, _, reason := classify(err); status != broker.Failed || retry || !strings.Contains(reason, "freeze container") {
			t.Errorf("%s, tried again: %t: %s", status, retry, reason)
		}
		countsOn(t, count)
	})
	_, retry, _, _ := classify(overdue(fmt.Errorf("kill container: %w", context.DeadlineExceeded)))
	_, stopped, _, _ := classify(overdue(fmt.Errorf("kill container: %w", context.Canceled)))
	if retry || !stopped {
		t.Errorf("tried again: over time %t, when stoop was stopped %t", retry, stopped)
	}
}

func TestFreezeContainer(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		_, count := nodetest.Counter(t, dir)
		f, r := onNode(t, freezeContainer(), `{}`)
		r.Container = containerAt(t, dir)
		if err := f.(Checker).Check(brief(t), r); err != nil {
			t.Fatal(err)
		}
		countsOn(t, count) // asking did nothing
		res, err := f.Act(brief(t), r)
		if err != nil || res.Nothing || res.Undo == nil || res.TTL != 0 {
			t.Fatalf("%+v, %v", res, err)
		}
		standsStill(t, count)
		if res.Found["container"] != filepath.Base(dir) || res.Found["processes"] != "1" || !strings.HasPrefix(res.Found["cgroup"], "v") {
			t.Errorf("found %v", res.Found)
		}
		if strings.Contains(res.Reason, "kubelet") {
			t.Errorf("no kubelet knows of this container: %s", res.Reason)
		}

		again, err := f.Act(brief(t), r)
		if err != nil || !again.Nothing || again.Undo != nil {
			t.Errorf("again: %+v, %v", again, err)
		}
		// A run that was cut off: what it was about to do is the next one's.
		r.Resumed, r.Intended = true, res.Undo
		if resumed, err := f.Act(brief(t), r); err != nil || resumed.Nothing || string(resumed.Undo) != string(res.Undo) {
			t.Errorf("resumed: %+v, %v", resumed, err)
		}
		// One that was cut off before it was about to do anything froze nothing.
		r.Intended = nil
		if resumed, err := f.Act(brief(t), r); err != nil || !resumed.Nothing || resumed.Undo != nil {
			t.Errorf("resumed, nothing was intended: %+v, %v", resumed, err)
		}

		undo := &UndoRequest{ID: "step", Record: res.Undo}
		// As after a restart, by a process that knows only the record.
		k, _ := onNode(t, freezeContainer(), ``)
		if kept, err := k.(Keeper).Keep(brief(t), undo); err != nil || !kept.Nothing {
			t.Errorf("kept: %+v, %v", kept, err)
		}
		standsStill(t, count)
		if _, err := containerAt(t, dir).Thaw(brief(t)); err != nil {
			t.Fatal(err)
		}
		countsOn(t, count)
		if kept, err := k.(Keeper).Keep(brief(t), undo); err != nil || kept.Nothing {
			t.Errorf("kept, thawed by somebody: %+v, %v", kept, err)
		}
		standsStill(t, count)

		if back, err := k.(Undoer).Undo(brief(t), undo); err != nil || back.Nothing {
			t.Errorf("undo: %+v, %v", back, err)
		}
		countsOn(t, count)
		if back, err := k.(Undoer).Undo(brief(t), undo); err != nil || !back.Nothing {
			t.Errorf("undo again: %+v, %v", back, err)
		}
	})
}

// A process that the kernel can't stop holds up neither the freeze of the others
// nor the chain, and what it stops can be taken back.
func TestFreezeContainerOfOneThatIsStuck(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		release := nodetest.Stuck(t, dir)
		_, count := nodetest.Counter(t, dir)
		f, r := onNode(t, freezeContainer(), `{}`)
		r.Container = containerAt(t, dir)
		began := time.Now()
		res, err := f.Act(brief(t), r)
		if err != nil || res.Nothing || res.Undo == nil || res.Found["stopping"] != "true" || time.Since(began) > 2*stopIn {
			t.Fatalf("%+v, %v after %s", res, err, time.Since(began))
		}
		standsStill(t, count)
		undo := &UndoRequest{ID: "step", Record: res.Undo}
		if kept, err := f.(Keeper).Keep(brief(t), undo); err != nil || !kept.Nothing {
			t.Errorf("kept: %+v, %v", kept, err)
		}
		if back, err := f.(Undoer).Undo(brief(t), undo); err != nil || back.Nothing {
			t.Errorf("undo: %+v, %v", back, err)
		}
		countsOn(t, count)
		release()
	})
}

// What was frozen before this boot, or in a container that was made anew, is gone;
// the one that is there now is left alone.
func TestFreezeContainerRecords(t *testing.T) {
	eachCgroup(t, func(t *testing.T, dir string) {
		f, r := onNode(t, freezeContainer(), `{}`)
		r.Container = containerAt(t, dir)
		res, err := f.Act(brief(t), r)
		if err != nil {
			t.Fatal(err)
		}
		var rec frozenContainer
		if err := json.Unmarshal(res.Undo, &rec); err != nil {
			t.Fatal(err)
		}
		both := map[string]func(rec any) error{
			"undo": func(rec any) error {
				b, _ := json.Marshal(rec)
				_, err := f.(Undoer).Undo(brief(t), &UndoRequest{ID: "step", Record: b})
				return err
			},
			"keep": func(rec any) error {
				b, _ := json.Marshal(rec)
				_, err := f.(Keeper).Keep(brief(t), &UndoRequest{ID: "step", Record: b})
				return err
			},
		}
		other := rec
		other.Boot = "00000000-0000-0000-0000-000000000000"
		elsewhere := rec
		elsewhere.Path = filepath.Dir(rec.Path)
		for name, do := range both {
			if err := do(other); !errors.Is(err, ErrGone) {
				t.Errorf("%s after a reboot: %v", name, err)
			}
			if err := do(elsewhere); err == nil {
				t.Errorf("%s of a folder that is no container's", name)
			}
			for _, bad := range []any{nil, 1, "x", map[string]string{}} {
				if err := do(bad); !as[*refusal](err) {
					t.Errorf("%s of %v: %v", name, bad, err)
				}
			}
		}
		if frozen, err := r.Container.Frozen(); err != nil || !frozen {
			t.Errorf("frozen %t, %v", frozen, err)
		}
		if err := unix.Rmdir(dir); err != nil {
			t.Fatal(err)
		}
		for name, do := range both {
			if err := do(rec); !errors.Is(err, node.ErrGone) {
				t.Errorf("%s of one that went: %v", name, err)
			}
		}
		nodetest.Cgroup(t, dir)
		_, count := nodetest.Counter(t, dir)
		if _, err := containerAt(t, dir).Freeze(brief(t)); err != nil {
			t.Fatal(err)
		}
		if err := both["undo"](rec); !errors.Is(err, node.ErrGone) {
			t.Errorf("undo of one that was made anew: %v", err)
		}
		standsStill(t, count)
		if _, err := containerAt(t, dir).Thaw(brief(t)); err != nil {
			t.Fatal(err)
		}
		if err := both["keep"](rec); !errors.Is(err, node.ErrGone) {
			t.Errorf("keep of one that was made anew: %v", err)
		}
		countsOn(t, count)
	})
}

// A ttl lets go only where it was said to.
func TestFreezeContainerTTL(t *testing.T) {
	for params, want := range map[string]time.Duration{
		`{}`:                                  0,
		`{"ttl":"1h"}`:                        0,
		`{"ttl":"1h","onExpire":"keep"}`:      0,
		`{"ttl":"1h","onExpire":"release"}`:   time.Hour,
		`{"onExpire":"release"}`:              -1,
		`{"ttl":"1h","onExpire":"next"}`:      -1,
		`{"ttl":"0s","onExpire":"release"}`:   -1,
		`{"ttl":"1ms", "onExpire":"release"}`: time.Millisecond,
	} {
		dir := nodetest.CgroupV2(t)
		f, r := onNode(t, freezeContainer(), params)
		r.Container = containerAt(t, dir)
		res, err := f.Act(brief(t), r)
		if want < 0 {
			if frozen, _ := r.Container.Frozen(); !as[*refusal](err) || frozen {
				t.Errorf("%s: %+v, %v, frozen %t", params, res, err, frozen)
			}
			continue
		}
		if err != nil || res.TTL != want || res.Undo == nil {
			t.Errorf("%s: %+v, %v", params, res, err)
		}
	}
}

func TestFreezeContainerOfAPod(t *testing.T) {
	dir, uid := nodetest.PodV2(t)
	f, r := onNode(t, freezeContainer(), `{}`)
	r.Container = containerAt(t, dir)
	res, err := f.Act(brief(t), r)
	if err != nil || !strings.Contains(res.Reason, "liveness probe") || r.Container.PodUID != uid {
		t.Errorf("%+v, %v, pod %s", res, err, r.Container.PodUID)
	}
}

func TestFreezeContainerGone(t *testing.T) {
	dir := nodetest.CgroupV2(t)
	f, r := onNode(t, freezeContainer(), `{}`)
	r.Container = containerAt(t, dir)
	if err := unix.Rmdir(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Act(brief(t), r); !isGone(err) {
		t.Errorf("act: %v", err)
	}
	if err := f.(Checker).Check(brief(t), r); !isGone(err) {
		t.Errorf("check: %v", err)
	}
}
