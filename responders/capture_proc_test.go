package responders

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/node"
	"stoop/node/nodetest"
)

func capturer(t testing.TB, conf evidence.Config) *procCapturer {
	t.Helper()
	if conf.Dir == "" {
		conf.Dir = filepath.Join(t.TempDir(), "evidence")
	}
	store, err := evidence.Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return captureProc().New(Env{Evidence: store}).(*procCapturer)
}

// suspected is a step for a container, or for a process of the host.
func suspected(t testing.TB, id string, c *node.Container, p *node.Process) *Request {
	t.Helper()
	a, err := alert.Parse([]byte(`{"rule":"R","priority":"Critical"}`))
	if err != nil {
		t.Fatal(err)
	}
	s := &broker.Step{ID: id, AlertID: a.ID, Rule: "r", Action: broker.Action{Responder: "capture-proc"}}
	return &Request{Step: s, Alert: a, Container: c, Process: p}
}

// inCgroup finds the container of a cgroup that a test made.
func inCgroup(t testing.TB, local *node.Node, cgroup string, pid int) *node.Container {
	t.Helper()
	c, err := local.Container(t.Context(), filepath.Base(cgroup), pid)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func piece(t testing.TB, s *evidence.Store, step, name string) string {
	t.Helper()
	r, _, err := s.Read(step, name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The usual chain: the container is frozen, and then looked at. Its most suspect
// process has deleted its executable.
func TestCaptureProcOfAFrozenContainer(t *testing.T) {
	for name, make := range map[string]func(testing.TB) string{"v1": nodetest.CgroupV1, "v2": nodetest.CgroupV2} {
		t.Run(name, func(t *testing.T) {
			cgroup, local := make(t), node.New(node.Config{})
			shell, err := os.ReadFile("/bin/sh")
			if err != nil {
				t.Fatal(err)
			}
			exe := filepath.Join(t.TempDir(), "evil")
			if err := os.WriteFile(exe, append(shell, "evil"...), 0o755); err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(append(shell, "evil"...))
			counter, count := nodetest.Counter(t, cgroup)
			cmd := exec.Command(exe, "-c", "sleep 600 & echo ready; wait")
			cmd.Env = []string{"PATH=/usr/bin:/bin", "DB_PASSWORD=hunter2"}
			pid := begin(t, cmd, cgroup)
			if err := os.Remove(exe); err != nil {
				t.Fatal(err)
			}
			c := inCgroup(t, local, cgroup, pid)
			p, err := local.Process(pid, 0, c.ID)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if _, err := c.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := count()

			responder := capturer(t, evidence.Config{})
			began := time.Now()
			res, err := tryOn(t, responder, suspected(t, "s1", c, p))
			took := time.Since(began)
			if err != nil || res.Nothing || !strings.Contains(res.Reason, res.Found["evidence"]) || res.Found["processes"] != "3" && res.Found["processes"] != "4" {
				t.Fatalf("%+v, %v", res, err)
			}
			if res.Found["exeSHA256"] != hex.EncodeToString(sum[:]) || res.Found["exe"] != strconv.Itoa(pid)+".exe" {
				t.Errorf("found %v, the executable's SHA-256 is %x", res.Found, sum)
			}
			if frozen, err := c.Frozen(); err != nil || !frozen || count() != before {
				t.Errorf("frozen: %t, %v", frozen, err)
			}
			if wrong, err := responder.store.Verify(t.Context(), "s1"); err != nil || len(wrong) > 0 {
				t.Errorf("verify: %q, %v", wrong, err)
			}
			alert, err := os.ReadFile(filepath.Join(res.Found["evidence"], "alert.json"))
			if want := suspected(t, "s1", c, p).Step.Alert; err != nil || string(alert) != string(want) {
				t.Errorf("the alert is kept as %q (%v), want %q", alert, err, want)
			}
			b, err := os.ReadFile(filepath.Join(res.Found["evidence"], "manifest.json"))
			if err != nil {
				t.Fatal(err)
			}
			if s := sha256.Sum256(b); res.Found["manifestSHA256"] != hex.EncodeToString(s[:]) {
				t.Error("the outcome does not name the manifest's SHA-256")
			}
			if env := piece(t, responder.store, "s1", fmt.Sprintf("%d.environ", pid)); strings.Contains(env, "hunter2") || !strings.Contains(env, "DB_PASSWORD=<redacted, 7 bytes>") {
				t.Errorf("the environment is %q", env)
			}
			if line := piece(t, responder.store, "s1", fmt.Sprintf("%d.cmdline", counter.Process.Pid)); !strings.Contains(line, "while :; do") {
				t.Errorf("the command line of the other process is %q", line)
			}
			m, err := responder.store.Case("s1")
			if err != nil || m.Responder != "capture-proc" || m.Rule != "r" || m.Target != c.ID || m.Alert == "" {
				t.Errorf("the manifest is of %+v, %v", m.About, err)
			}
			t.Logf("it took %s: %s", took, res.Reason)

			// A second run of the step, which was killed before it was acknowledged.
			if again, err := tryOn(t, responder, suspected(t, "s1", c, p)); err != nil || !strings.Contains(again.Reason, "earlier run") || !strings.HasSuffix(again.Reason, res.Found["evidence"]) || again.Found["evidence"] != res.Found["evidence"] {
				t.Errorf("once more: %+v, %v", again, err)
			}
		})
	}
}

func TestCaptureProcOfAHostProcess(t *testing.T) {
	nodetest.Root(t)
	cmd := exec.Command("/bin/sh", "-c", "sleep 600 & echo ready; wait")
	pid := begin(t, cmd, "")
	p := hostProcess(t, pid)
	responder := capturer(t, evidence.Config{PerTarget: 1})
	res, err := tryOn(t, responder, suspected(t, "s1", nil, p))
	if err != nil || res.Found["processes"] != "2" {
		t.Errorf("%+v, %v", res, err)
	}
	// Once is enough of one process, and that stops no chain.
	res, err = tryOn(t, responder, suspected(t, "s2", nil, p))
	if err != nil || !res.Nothing || !strings.Contains(res.Reason, "the first 1 cases") {
		t.Errorf("one more: %+v, %v", res, err)
	}
	// Another one is another target.
	other := hostProcess(t, begin(t, exec.Command("/bin/sh", "-c", "echo ready; read line"), ""))
	if res, err := tryOn(t, responder, suspected(t, "s3", nil, other)); err != nil || res.Nothing {
		t.Errorf("another one: %+v, %v", res, err)
	}
	if res, err := tryOn(t, capturer(t, evidence.Config{Size: 4096}), suspected(t, "s4", nil, p)); err != nil || !res.Nothing || !strings.Contains(res.Reason, "full") {
		t.Errorf("a full store: %+v, %v", res, err)
	}
}

// hostProcess proves a process as an alert does.
func hostProcess(t testing.TB, pid int) *node.Process {
	t.Helper()
	started, ok := proc("/proc").started(fmt.Sprintf("/proc/%d", pid))
	if !ok {
		t.Fatalf("process %d has no start", pid)
	}
	p, err := node.New(node.Config{}).Process(pid, started.UnixNano(), "host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// A child that is killed leaves what it had said, and a manifest that says why
// there is no more; the chain goes on.
func TestCaptureProcWhoseChildHangs(t *testing.T) {
	cgroup, local := nodetest.CgroupV2(t), node.New(node.Config{})
	c := inCgroup(t, local, cgroup, nodetest.Shell(t, cgroup, "sleep 600").Process.Pid)
	responder := capturer(t, evidence.Config{})
	responder.children.Args = []string{"hanging-child"}
	req := suspected(t, "s1", c, nil)
	req.Step.Params = json.RawMessage(`{"timeout":"300ms"}`)
	began := time.Now()
	res, err := tryOn(t, responder, req)
	if err != nil || !strings.Contains(res.Reason, "in part") || !strings.Contains(res.Reason, res.Found["evidence"]) || !strings.Contains(res.Reason, "time was over") {
		t.Fatalf("%+v, %v", res, err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s", took)
	}
	m, err := responder.store.Case("s1")
	if err != nil || !m.Finished() || len(m.Notes) != 1 || !strings.Contains(m.Notes[0], "time was over") {
		t.Fatalf("manifest %+v, %v", m, err)
	}
	p, ok := m.Piece("1.maps")
	if !ok || p.Whole() || piece(t, responder.store, "s1", "1.maps") != "half of it" {
		t.Errorf("pieces %+v", m.Pieces)
	}
	if wrong, err := responder.store.Verify(t.Context(), "s1"); err != nil || len(wrong) > 0 {
		t.Errorf("verify: %q, %v", wrong, err)
	}
}

// Nothing is left of it: no case, and no fault.
func TestCaptureProcOfWhatIsGone(t *testing.T) {
	cgroup, local := nodetest.CgroupV2(t), node.New(node.Config{})
	cmd := nodetest.Shell(t, cgroup, "sleep 600")
	c := inCgroup(t, local, cgroup, cmd.Process.Pid)
	if _, err := c.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	responder := capturer(t, evidence.Config{})
	if res, err := tryOn(t, responder, suspected(t, "s1", c, nil)); !isGone(err) {
		t.Errorf("%+v, %v", res, err)
	}
	if cases, err := responder.store.Cases(); err != nil || len(cases) != 0 {
		t.Errorf("cases %+v, %v", cases, err)
	}
}

// A fork bomb is captured up to a number, and within maxSize.
func TestCaptureProcIsBounded(t *testing.T) {
	cgroup, local := nodetest.CgroupV2(t), node.New(node.Config{})
	cmd := nodetest.Shell(t, cgroup, "i=0; while [ $i -lt 40 ]; do sleep 600 & i=$((i+1)); done; wait")
	c := inCgroup(t, local, cgroup, cmd.Process.Pid)
	nodetest.Wait(t, "40 processes", func() bool { return len(nodetest.Pids(cgroup)) > 40 })
	responder := capturer(t, evidence.Config{})
	req := suspected(t, "s1", c, nil)
	req.Step.Params = json.RawMessage(`{"processes":5,"maxExe":"10KiB"}`)
	res, err := tryOn(t, responder, req)
	if err != nil || res.Found["processes"] != "5" || !strings.Contains(res.Reason, "36 more") {
		t.Errorf("%+v, %v", res, err)
	}
	req = suspected(t, "s2", c, nil)
	req.Step.Params = json.RawMessage(`{"maxSize":"100KiB"}`)
	began := time.Now()
	if _, err = tryOn(t, responder, req); err != nil {
		t.Fatal(err)
	}
	t.Logf("41 processes took %s", time.Since(began))
	m, err := responder.store.Case("s2")
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	cut := false
	for _, p := range m.Pieces {
		size += p.Size
		cut = cut || p.Cut
	}
	if size != 100<<10 || !cut {
		t.Errorf("%d bytes are kept, cut: %t", size, cut)
	}
}

func TestCaptureProcParameters(t *testing.T) {
	p := captureProcDefaults()
	if err := p.Validate(); err != nil {
		t.Error(err)
	}
	p.Redact = []string{"[a-"}
	if err := p.Validate(); err == nil {
		t.Error("a glob that is none passes")
	}
	req := suspected(t, "s1", nil, nil)
	if _, err := tryOn(t, capturer(t, evidence.Config{}), req); !as[*refusal](err) {
		t.Errorf("without container and process: %v", err)
	}
	if _, err := tryOn(t, &procCapturer{}, req); !as[*refusal](err) {
		t.Errorf("without a store: %v", err)
	}
}
