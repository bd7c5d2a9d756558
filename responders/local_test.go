package responders

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/evidence"
	"stoop/node"
	"stoop/node/nodetest"
)

// keeper is a stub whose acts live in the kernel.
type keeper struct {
	stub
	keep func(u *UndoRequest) (Result, error)
}

func (k *keeper) Keep(_ context.Context, u *UndoRequest) (Result, error) { return k.keep(u) }

func localEntry(name string, kind Kind, o Object, r Responder) Entry {
	e := entry(name, kind, r)
	e.Object = o
	return e
}

// alertStep is the step of an alert with these fields, further ones of the line
// in extra.
func (b *bench) alertStep(responder, fields string) *broker.Step {
	b.t.Helper()
	b.n++
	now := time.Now().UTC()
	raw := fmt.Appendf(nil, `{"hostname":"n1","priority":"Critical","rule":"R","n":%d,"time":%q,"output_fields":%s}`, b.n, now.Format(time.RFC3339Nano), fields)
	a, err := alert.Parse(raw)
	if err != nil {
		b.t.Fatal(err)
	}
	return &broker.Step{
		ID: broker.StepID(a.ID, "r", 0, ""), AlertID: a.ID, Alert: raw, Received: now, Origin: broker.OriginFIFO,
		Rule: "r", Mode: broker.Enforce, Target: a.Target(), Action: broker.Action{Responder: responder},
	}
}

func container(t testing.TB) (cmd *exec.Cmd, id string) {
	t.Helper()
	dir := nodetest.CgroupV2(t)
	return nodetest.Shell(t, dir, "sleep 1000"), filepath.Base(dir)
}

func pod(t testing.TB) (cmd *exec.Cmd, id, uid string) {
	t.Helper()
	dir, uid := nodetest.PodV2(t)
	return nodetest.Shell(t, dir, "sleep 1000"), filepath.Base(dir), uid
}

// started is when a process began, as Falco writes it.
func started(t testing.TB, pid int) int64 {
	t.Helper()
	at, ok := proc("/proc").started(fmt.Sprintf("/proc/%d", pid))
	if !ok {
		t.Fatalf("process %d has no start", pid)
	}
	return at.Add(5 * time.Millisecond).UnixNano()
}

func TestTheTargetOnTheNode(t *testing.T) {
	cmd, id := container(t)
	inPod, podID, uid := pod(t)
	host := exec.Command("sleep", "1000")
	nodetest.Start(t, nodetest.In{}, host)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		object Object
		fields string
		status broker.Status
		reason string // part of it
		check  func(t *testing.T, r *Request)
	}{
		"container by its short id": {ContainerObject, `{"container.id":"` + id[:12] + `"}`, broker.Done, "", func(t *testing.T, r *Request) {
			if r.Container.ID != id || r.Target.Container != id || r.Process != nil {
				t.Errorf("container %+v, process %+v", r.Container, r.Process)
			}
		}},
		"container by its process": {ContainerObject, fmt.Sprintf(`{"proc.pid":%d,"proc.pid.ts":%d}`, cmd.Process.Pid, started(t, cmd.Process.Pid)), broker.Done, "", func(t *testing.T, r *Request) {
			if r.Container.ID != id || r.Process.PID != cmd.Process.Pid {
				t.Errorf("container %+v, process %+v", r.Container, r.Process)
			}
		}},
		"process": {ProcessObject, fmt.Sprintf(`{"container.id":%q,"proc.pid":%d}`, id[:12], cmd.Process.Pid), broker.Done, "", func(t *testing.T, r *Request) {
			if r.Container.ID != id || r.Process.PID != cmd.Process.Pid {
				t.Errorf("container %+v, process %+v", r.Container, r.Process)
			}
		}},
		"process of the host":            {ProcessObject, fmt.Sprintf(`{"container.id":"host","proc.pid":%d,"proc.pid.ts":%d}`, host.Process.Pid, started(t, host.Process.Pid)), broker.Done, "", nil},
		"process of the host in another": {ProcessObject, fmt.Sprintf(`{"container.id":"host","proc.pid":%d,"proc.pid.ts":%d}`, cmd.Process.Pid, started(t, cmd.Process.Pid)), broker.Nothing, "", nil},
		"process of another container":   {ProcessObject, fmt.Sprintf(`{"container.id":%q,"proc.pid":%d}`, podID[:12], cmd.Process.Pid), broker.Nothing, "", nil},
		"process with another start":     {ProcessObject, fmt.Sprintf(`{"container.id":%q,"proc.pid":%d,"proc.pid.ts":%d}`, id[:12], cmd.Process.Pid, started(t, cmd.Process.Pid)-int64(time.Minute)), broker.Nothing, "", nil},
		"process that is gone":           {ProcessObject, fmt.Sprintf(`{"container.id":%q,"proc.pid":%d}`, id[:12], gone.Process.Pid), broker.Nothing, "", nil},
		"container that is gone":         {ContainerObject, `{"container.id":"` + nodetest.ID()[:12] + `"}`, broker.Nothing, "", nil},
		"no process named":               {ProcessObject, `{"container.id":"` + id[:12] + `"}`, broker.Refused, "append_output", nil},
		"no container named":             {ContainerObject, `{}`, broker.Refused, "append_output", nil},
		"container of the host":          {ContainerObject, `{"container.id":"host"}`, broker.Refused, "host", nil},
		"host of a container":            {HostObject, `{"container.id":"` + id[:12] + `"}`, broker.Refused, "container", nil},
		"host":                           {HostObject, `{"container.id":"host"}`, broker.Done, "", nil},
		"suspect, a container":           {SuspectObject, `{"container.id":"` + id[:12] + `"}`, broker.Done, "", nil},
		"pod that Falco names":           {ContainerObject, fmt.Sprintf(`{"container.id":%q,"k8s.ns.name":"shop","k8s.pod.name":"web"}`, podID[:12]), broker.Done, "", nil},
		"pod that nobody knows":          {ContainerObject, fmt.Sprintf(`{"container.id":%q}`, podID[:12]), broker.Suppressed, "protected", nil},
		"pod in a protected namespace":   {ContainerObject, fmt.Sprintf(`{"container.id":%q,"k8s.ns.name":"kube-system"}`, podID[:12]), broker.Suppressed, "protected", nil},
		"pod with another uid":           {ContainerObject, fmt.Sprintf(`{"container.id":%q,"k8s.ns.name":"shop","k8s.pod.uid":%q}`, podID[:12], "a"+uid[1:]+"0"), broker.Refused, "uid", nil},
		"pod by its process alone":       {ProcessObject, fmt.Sprintf(`{"proc.pid":%d,"proc.pid.ts":%d}`, inPod.Process.Pid, started(t, inPod.Process.Pid)), broker.Suppressed, "protected", nil},
	} {
		t.Run(name, func(t *testing.T) {
			act := &stub{}
			var seen *Request
			act.do = func(_ int, r *Request) (Result, error) { c := *r; seen = &c; return Result{}, nil }
			b := newBench(t, brokertest.New(t), localEntry("one", Harm, c.object, act))
			b.config.Env.Local = node.New(node.Config{})
			b.start()
			b.publish(b.alertStep("one", c.fields))
			o := b.outcomes(1)[0]
			if o.Status != c.status || !strings.Contains(o.Reason, c.reason) {
				t.Fatalf("status %s (%s), want %s (… %s …)", o.Status, o.Reason, c.status, c.reason)
			}
			if act.calls() != map[bool]int{true: 1}[c.status == broker.Done] {
				t.Errorf("the responder was called %d times", act.calls())
			}
			if c.check != nil && seen != nil {
				c.check(t, seen)
			}
		})
	}
}

// Evidence asks no guard, and yet another node's alert is not this node's.
func TestEvidenceOfAnotherNode(t *testing.T) {
	_, id := container(t)
	act := &stub{}
	b := newBench(t, brokertest.New(t), localEntry("one", Evidence, SuspectObject, act))
	b.config.Env.Local = node.New(node.Config{})
	b.start()
	s := b.alertStep("one", `{"container.id":"`+id[:12]+`"}`)
	s.Target.Node = "n2"
	b.publish(s)
	if o := b.outcomes(1)[0]; o.Status != broker.Refused || act.calls() != 0 {
		t.Errorf("%s (%s), %d calls", o.Status, o.Reason, act.calls())
	}
}

// A child that keeps evidence may raise an alert itself, of which none is kept.
func TestEvidenceOfStoopItself(t *testing.T) {
	cmd, id := container(t)
	own := &OwnProcesses{}
	ended := own.Started(cmd.Process.Pid, "")
	defer ended()
	act := &stub{}
	b := newBench(t, brokertest.New(t), localEntry("one", Evidence, SuspectObject, act))
	b.config.Env.Local, b.config.Guards.Own = node.New(node.Config{}), own
	b.start()
	b.publish(b.alertStep("one", fmt.Sprintf(`{"container.id":%q,"proc.pid":%d,"proc.pid.ts":%d}`, id[:12], cmd.Process.Pid, started(t, cmd.Process.Pid))))
	if o := b.outcomes(1)[0]; o.Status != broker.Refused || act.calls() != 0 {
		t.Errorf("%s (%s), %d calls", o.Status, o.Reason, act.calls())
	}
}

// Where the node grants too little, the outcome says what, and in audit mode as
// well.
func TestWhatTheNodeDoesNotGrant(t *testing.T) {
	for mode, want := range map[broker.Mode]broker.Status{broker.Enforce: broker.Failed, broker.Audit: broker.Audited} {
		e := localEntry("one", Harm, ContainerObject, &stub{})
		e.Needs = []node.Need{node.NeedCgroup}
		b := newBench(t, brokertest.New(t), e)
		b.config.Guards.Mode = mode
		b.config.Env.Local = node.New(node.Config{Cgroup: t.TempDir()})
		b.start()
		b.publish(b.alertStep("one", `{"container.id":"0123456789ab"}`))
		if o := b.outcomes(1)[0]; o.Status != want || !strings.Contains(o.Reason, "cgroup") {
			t.Errorf("%s: %s (%s), want %s", mode, o.Status, o.Reason, want)
		}
	}
}

// The breaker for acts through the API server does not stop what the node does
// by itself, nor the other way round.
func TestTheNodesOwnBudget(t *testing.T) {
	g := testGuards()
	g.API = Limits{Rule: Rate{1, time.Minute}}
	g.Local = Limits{Rule: Rate{2, time.Minute}}
	l := newLedger(nil, g)
	now := time.Now()
	n := 0
	try := func(local bool) string {
		n++
		return l.begin(fmt.Sprint(n), act{Rule: "r", Object: fmt.Sprint(n), Local: local, Urgent: true, Began: now}, g, false, now).guard
	}
	for i, want := range []struct {
		local bool
		guard string
	}{{false, ""}, {false, "limit"}, {true, ""}, {true, ""}, {true, "limit"}, {false, "limit"}} {
		if got := try(want.local); got != want.guard {
			t.Errorf("act %d, local %t: guard %q, want %q", i, want.local, got, want.guard)
		}
	}
}

// What was done in the kernel is looked at again after a restart: it holds, it is
// put in force again, or it is said that it was lifted.
func TestWhatIsKeptOverARestart(t *testing.T) {
	for name, c := range map[string]struct {
		keep   func(*UndoRequest) (Result, error)
		status broker.Status // of the outcome after the restart; "" for none
		undo   bool          // it can still be taken back
	}{
		"holds":  {func(*UndoRequest) (Result, error) { return Result{Nothing: true}, nil }, "", true},
		"again":  {func(*UndoRequest) (Result, error) { return Result{Reason: "frozen"}, nil }, broker.Done, true},
		"lifted": {func(*UndoRequest) (Result, error) { return Result{}, ErrGone }, broker.Undone, false},
		"failed": {func(*UndoRequest) (Result, error) { return Result{}, errors.New("broken") }, broker.Failed, true},
	} {
		t.Run(name, func(t *testing.T) {
			_, id := container(t)
			dir := t.TempDir()
			k := &keeper{keep: func(*UndoRequest) (Result, error) {
				t.Error("kept before there was anything")
				return Result{}, nil
			}}
			k.do = func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{"x":1}`)}, nil }
			k.undo = func(*UndoRequest) (Result, error) { return Result{Reason: "back"}, nil }
			store := brokertest.Open(t, broker.Config{Dir: dir})
			b := newBench(t, store, localEntry("one", Harm, ContainerObject, k))
			b.config.Env.Local = node.New(node.Config{})
			b.start()
			s := b.alertStep("one", `{"container.id":"`+id[:12]+`"}`)
			b.publish(s)
			b.outcomes(1)
			b.stop()

			asked := make(chan *UndoRequest, 1)
			k.keep = func(u *UndoRequest) (Result, error) { asked <- u; return c.keep(u) }
			b.start()
			select {
			case u := <-asked:
				if u.ID != s.ID || string(u.Record) != `{"x":1}` {
					t.Errorf("asked about %+v", u)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("it was not asked")
			}
			if c.status != "" {
				if o := b.outcomes(2)[1]; o.ID != s.ID || o.Status != c.status || o.Actor != "restart" {
					t.Errorf("outcome %+v, want %s", o, c.status)
				}
			}
			var all []broker.Outcome
			var err error
			b.until("the look at it is over", func() bool {
				all, err = b.host.UndoAll(t.Context(), "", time.Time{}, "somebody")
				return len(all) == 0 || !strings.Contains(all[0].Reason, "is being taken back already")
			})
			if err != nil || (len(all) == 1) != c.undo {
				t.Fatalf("undo all: %+v, %v", all, err)
			}
			if c.undo && (all[0].ID != s.ID || all[0].Status != broker.Undone) {
				t.Errorf("undo all: %+v", all)
			}
		})
	}
}

// What is held is looked at again when a pause is over, and remembered for
// longer than what is not the kernel's.
func TestWhatIsKeptAfterAPause(t *testing.T) {
	_, id := container(t)
	asked := make(chan string, 10)
	k := &keeper{keep: func(u *UndoRequest) (Result, error) { asked <- u.Actor; return Result{Nothing: true}, nil }}
	k.do = func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{"x":1}`)}, nil }
	b := newBench(t, brokertest.New(t), localEntry("one", Harm, ContainerObject, k))
	b.config.Env.Local = node.New(node.Config{})
	b.start()
	b.publish(b.alertStep("one", `{"container.id":"`+id[:12]+`"}`))
	b.outcomes(1)
	for _, paused := range []bool{true, false} {
		if _, err := b.host.SetPause(t.Context(), paused, "somebody"); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case actor := <-asked:
		if actor != "resume" {
			t.Errorf("asked by %s", actor)
		}
	case <-time.After(10 * time.Second):
		t.Error("it was not asked")
	}
	for _, r := range b.host.undos.kept() {
		if !r.Local || r.over(time.Now().Add(100*undoKept)) {
			t.Errorf("it is forgotten one day: %+v", r)
		}
	}
}

// At the start it is looked at only when it is known whether the cluster is paused,
// and not while it is; then when that is over.
func TestWhatIsKeptAfterTheClustersPause(t *testing.T) {
	_, id := container(t)
	asked := make(chan string, 10)
	k := &keeper{keep: func(u *UndoRequest) (Result, error) { asked <- u.Actor; return Result{Nothing: true}, nil }}
	k.do = func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{"x":1}`)}, nil }
	b := newBench(t, brokertest.New(t), localEntry("one", Harm, ContainerObject, k))
	b.config.Env.Local = node.New(node.Config{})
	b.start()
	b.publish(b.alertStep("one", `{"container.id":"`+id[:12]+`"}`))
	b.outcomes(1)
	b.stop()

	p := &ClusterPause{ClusterPauseConfig: ClusterPauseConfig{Namespace: "stoop"}, began: time.Now(), changed: make(chan struct{})}
	sees := func(paused bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.known, p.paused = true, paused
		p.tell()
	}
	b.config.Cluster = p
	b.start()
	select {
	case actor := <-asked:
		t.Fatalf("asked by %s before it is known", actor)
	case <-time.After(200 * time.Millisecond):
	}
	sees(true)
	for end := time.Now().Add(10 * time.Second); !b.host.PausedCluster().Paused; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is not paused")
		}
	}
	select {
	case actor := <-asked:
		t.Fatalf("asked by %s while paused", actor)
	case <-time.After(200 * time.Millisecond):
	}
	sees(false)
	select {
	case actor := <-asked:
		if actor != "resume" {
			t.Errorf("asked by %s", actor)
		}
	case <-time.After(10 * time.Second):
		t.Error("it was not asked")
	}
}

// A program in audit mode does not act at its start either.
func TestNothingIsKeptInAuditMode(t *testing.T) {
	_, id := container(t)
	k := &keeper{keep: func(*UndoRequest) (Result, error) { return Result{}, errors.New("asked in audit mode") }}
	k.do = func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{"x":1}`)}, nil }
	b := newBench(t, brokertest.Open(t, broker.Config{Dir: t.TempDir()}), localEntry("one", Harm, ContainerObject, k))
	b.config.Env.Local = node.New(node.Config{})
	b.start()
	b.publish(b.alertStep("one", `{"container.id":"`+id[:12]+`"}`))
	b.outcomes(1)
	b.stop()
	b.config.Guards.Mode = broker.Audit
	b.start()
	b.publish(b.alertStep("one", `{"container.id":"`+id[:12]+`"}`)) // comes after the look
	if got := b.outcomes(2); len(got) != 2 || got[1].Status == broker.Failed {
		t.Errorf("outcomes %+v", got)
	}
}

// What can't be taken back here is said, and the rest is taken back.
func TestUndoAllGoesOn(t *testing.T) {
	good, bad := &stub{}, &stub{}
	for _, s := range []*stub{good, bad} {
		s.do = func(int, *Request) (Result, error) { return Result{Undo: jsonRaw(`{}`)}, nil }
	}
	good.undo = func(*UndoRequest) (Result, error) { return Result{}, nil }
	bad.undo = func(*UndoRequest) (Result, error) { return Result{}, Refuse("not here") }
	b := newBench(t, brokertest.New(t), entry("good", Harm, good), entry("bad", Harm, bad)).start()
	for _, r := range []string{"good", "bad", "good"} {
		b.publish(b.step(r))
	}
	b.outcomes(3)
	all, err := b.host.UndoAll(t.Context(), "", time.Time{}, "somebody")
	if err != nil || len(all) != 3 {
		t.Fatalf("%+v, %v", all, err)
	}
	for _, o := range all {
		if want := map[string]broker.Status{"good": broker.Undone, "bad": broker.Failed}[o.Responder]; o.Status != want {
			t.Errorf("%s: %s (%s), want %s", o.Responder, o.Status, o.Reason, want)
		}
	}
	if all, err = b.host.UndoAll(t.Context(), "", time.Time{}, "somebody"); err != nil || len(all) != 1 {
		t.Errorf("once more: %+v, %v", all, err)
	}
}

// What a rule did in one container spares no other container, and no other file in
// the same one: an attacker chooses both.
func TestWhatTheCooldownOfTheNodesOwnCountsBy(t *testing.T) {
	request := func(container, fields string) *Request {
		a, err := alert.Parse([]byte(connectionAlert(fields)))
		if err != nil {
			t.Fatal(err)
		}
		return &Request{Step: &broker.Step{}, Alert: a, Container: &node.Container{ID: container}}
	}
	one, two := nodetest.ID(), nodetest.ID()
	block := blockAddress().New(Env{Local: node.New(node.Config{})}).(Particular)
	quarantine := (&fileQuarantine{store: &evidence.Store{}}).Object
	for name, c := range map[string]struct {
		object func(*Request) string
		fields [2]string
	}{
		"block-address":   {block.Object, [2]string{`,"fd.name":"10.0.0.2:4000->203.0.113.7:443"`, `,"fd.name":"10.0.0.2:4000->203.0.113.8:443"`}},
		"quarantine-file": {quarantine, [2]string{`,"fd.name":"/tmp/a"`, `,"fd.name":"/tmp/b"`}},
	} {
		of := c.object(request(one, c.fields[0]))
		if of == "" || of != c.object(request(one, c.fields[0])) {
			t.Errorf("%s: %q is not the same again", name, of)
		}
		if of == c.object(request(two, c.fields[0])) {
			t.Errorf("%s: the same in another container", name)
		}
		if of == c.object(request(one, c.fields[1])) {
			t.Errorf("%s: another one in the same container", name)
		}
	}
}

// hesitant is a stub whose Check waits for something that never comes.
type hesitant struct {
	stub
	asked atomic.Int32
}

func (h *hesitant) Check(ctx context.Context, _ *Request) error {
	h.asked.Add(1)
	<-ctx.Done()
	return ctx.Err()
}

// What a suspect makes hang, or fail again and again, holds up the chain for a
// minute at the most.
func TestAnActOfTheNodeIsNotTriedForEver(t *testing.T) {
	_, id := container(t)
	fails := &stub{do: func(int, *Request) (Result, error) { return Result{}, Retry(errors.New("not now"), 0) }}
	hangs, next := &hesitant{}, &stub{}
	slow := localEntry("hangs", Harm, ContainerObject, hangs)
	slow.Deadline = 10 * time.Millisecond
	b := newBench(t, brokertest.New(t), localEntry("fails", Harm, ContainerObject, fails), slow, localEntry("next", Harm, ContainerObject, next))
	b.config.Env.Local = node.New(node.Config{})
	b.start()
	for _, first := range []string{"fails", "hangs"} {
		s := b.alertStep(first, `{"container.id":"`+id[:12]+`"}`)
		s.Remaining = []broker.Action{{Responder: "next"}}
		if first == "hangs" {
			s.Received = s.Received.Add(-localFor - time.Second) // before enforce was switched on: Check is asked in audit mode too
		}
		b.publish(s)
		if first == "fails" {
			nodetest.Wait(t, "a try", func() bool { return fails.calls() > 0 })
			b.host.ledger.mu.Lock()
			b.host.ledger.acts[s.ID].Began = time.Now().Add(-localFor)
			b.host.ledger.mu.Unlock()
		}
	}
	got := map[string]broker.Status{}
	for _, o := range b.outcomes(4) {
		got[o.Responder] = o.Status
	}
	if got["fails"] != broker.Failed || got["hangs"] != broker.Failed || next.calls() == 0 {
		t.Errorf("outcomes %v, the next step was done %d times", got, next.calls())
	}
	if hangs.asked.Load() != 1 {
		t.Errorf("asked %d times", hangs.asked.Load())
	}
}
