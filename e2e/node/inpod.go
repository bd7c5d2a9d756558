package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/program"
)

// inPodRules are those of what acts in the pod, or by its kubelet.
func (r *rig) inPodRules() string {
	return fmt.Sprintf(`
  - name: exec
    match: {rule: E2E exec}
    actions:
      - exec-in-pod:
          command: [sh, -c, 'echo "said $SAID"; echo "evil $EVIL"; echo wrong >&2']
          environment: {SAID: fd.name, EVIL: proc.args}
  - name: exec-sleep
    match: {rule: E2E exec sleep}
    actions: [{exec-in-pod: {command: [sleep, "5"]}}]
  - name: exec-wrong
    match: {rule: E2E exec wrong}
    actions: [{exec-in-pod: {command: [no-such-program]}}]
  - name: exec-long
    match: {rule: E2E exec long}
    actions: [{exec-in-pod: {command: [sleep, "100"], timeout: 1s}}]
  - name: exec-frozen
    match: {rule: E2E exec frozen}
    actions:
      - freeze-container
      - exec-in-pod: {command: [cat, /tmp/count], timeout: 2s}
      - capture-files: {paths: [/tmp/count]}
  - name: debug
    match: {rule: E2E debug}
    actions: [{debug-pod: {image: %q, command: [sleep, "1000"]}}]
  - name: files
    match: {rule: E2E files}
    actions: [{capture-files: {paths: [/tmp, '/bin/busybo?', /proc/1/environ], fields: [fs.path.name]}}]
  - name: packets
    match: {rule: E2E packets}
    actions: [{capture-packets: {duration: 1s}}]
  - name: checkpoint
    match: {rule: E2E checkpoint}
    actions: [{checkpoint-container: {ca: %q}}]
`, image, r.path("kubelet-pki/kubelet.crt"))
}

// inPodOnly has a suspect, and all that acts in its pod.
func (m *measuring) inPodOnly() {
	m.took = map[string][]time.Duration{}
	s := m.suspect()
	m.inPod(s)
	m.Logf("%s", m.account())
	s.remove()
	m.stoop.Stop()
}

// inPod has everything done that needs a pod's containers, or its kubelet.
func (m *measuring) inPod(s *suspect) {
	m.Helper()
	m.exec(s)
	m.ownExec(s)
	m.files(s)
	m.packets(s)
	m.checkpoint(s)
	m.debug(s)
	m.execFrozen(s)
	m.logs()
	m.note("In the suspect's container `exec-in-pod` ran a command with the alert's values as its variables, and what Falco would say of that command started nothing, while the same command by the attacker's shell did; `capture-files` read files and `capture-packets` recorded the shell's talk from the node; `debug-pod` added a container that sees the suspect's processes; the kubelet let stoop ask for a checkpoint, which this container runtime can't make.")
}

// failed waits for the step, which must have failed and say so.
func (m *measuring) failed(id, responder string, say ...string) broker.Outcome {
	m.Helper()
	o := m.stoop.WaitOutcome(id, responder, soon)
	if o.Status != broker.Failed {
		m.Fatalf("%s: the outcome is %s (%s), want %s", responder, o.Status, o.Reason, broker.Failed)
	}
	for _, word := range say {
		if !strings.Contains(o.Reason, word) {
			m.Fatalf("%s: the outcome does not say %q: %s", responder, word, o.Reason)
		}
	}
	return o
}

// piece is one of an outcome's evidence.
func (m *measuring) piece(o broker.Outcome, name string) []byte {
	m.Helper()
	b, err := os.ReadFile(filepath.Join(m.stoop.Data, "evidence", o.ID, name))
	if err != nil {
		m.Fatalf("read the evidence of %s: %v", o.Responder, err)
	}
	return b
}

func (m *measuring) exec(s *suspect) {
	evil := "'; echo x >/tmp/owned #\"$(echo x >/tmp/owned)`echo x >/tmp/owned`\n$HOME {{.}} -x"
	a := s.alert("E2E exec")
	a.Fields["proc.args"] = evil
	id, _ := m.say(a)
	o := m.done(id, "exec-in-pod")
	if got, want := string(m.piece(o, "stdout")), fmt.Sprintf("said %s\nevil %s\n", a.Fields["fd.name"], evil); got != want {
		m.Fatalf("exec-in-pod kept %q, want %q", got, want)
	}
	if got := string(m.piece(o, "stderr")); got != "wrong\n" || o.Found["exit"] != "0" {
		m.Fatalf("exec-in-pod kept %q of standard error, exit %q", got, o.Found["exit"])
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/owned", s.pid)); err == nil {
		m.Fatalf("a value of the alert was executed")
	}
	id, _ = m.send(s, "E2E exec wrong")
	m.failed(id, "exec-in-pod", "no-such-program")
	id, began := m.send(s, "E2E exec long")
	m.failed(id, "exec-in-pod", "did not end within its timeout (1s)")
	if took := time.Since(began); took > 5*time.Second {
		m.Fatalf("a command with a timeout of 1 s held its step for %s", took)
	}
}

// processOf is a process of the container with a command line and another parent than
// others have; 0: there is none.
func (s *suspect) processOf(cmdline string, not ...int) int {
	for _, pid := range containerPids(s, s.id) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && string(bytes.TrimSuffix(b, []byte{0})) == cmdline && !slices.Contains(not, pid) {
			return pid
		}
	}
	return 0
}

// alertOf is what Falco would say of a process of the suspect's.
func (s *suspect) alertOf(rule, cmdline string, pid int) program.Alert {
	s.Helper()
	a := s.alert(rule)
	fields, err := stat(pid)
	if err != nil {
		s.Fatalf("look at process %d: %v", pid, err)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		s.Fatalf("look at the parent of process %d: %v", pid, err)
	}
	a.Fields["proc.cmdline"], a.Fields["proc.name"] = cmdline, strings.Fields(cmdline)[0]
	a.Fields["proc.pid"], a.Fields["proc.pid.ts"], a.Fields["proc.ppid"] = pid, forkTime(s, pid), parent
	return a
}

// ownExec has Falco raise alerts of the command that stoop itself has executed, and of
// the same command by the attacker at the same time.
func (m *measuring) ownExec(s *suspect) {
	m.Helper()
	const line, cmdline = "sleep 5", "sleep\x005"
	id, _ := m.send(s, "E2E exec sleep")
	own, imitator := 0, 0
	harness.Eventually(m, soon, 5*time.Millisecond, func() (bool, string) {
		own = s.processOf(cmdline)
		return own != 0, "the command that stoop has executed"
	})
	s.shell.say("sleep 5 &")
	harness.Eventually(m, soon, 5*time.Millisecond, func() (bool, string) {
		imitator = s.processOf(cmdline, own)
		return imitator != 0, "the same command by the attacker"
	})
	of, by := s.alertOf("E2E kill process", line, own), s.alertOf("E2E kill process", line, imitator)
	mine, _ := m.say(of)
	o := m.stoop.WaitOutcome(mine, "kill-process", soon)
	if o.Status != broker.Suppressed && o.Status != broker.Refused || !strings.Contains(o.Reason, "stoop started") {
		m.Fatalf("an alert of the command that stoop has executed: the outcome is %s (%s)", o.Status, o.Reason)
	}
	if _, err := stat(own); err != nil {
		m.Fatalf("the command that stoop has executed was killed: %v", err)
	}
	theirs, _ := m.say(by)
	m.done(theirs, "kill-process")
	m.done(id, "exec-in-pod")
}

func (m *measuring) files(s *suspect) {
	m.Helper()
	s.shell.say("echo loot >/tmp/.hidden")
	harness.Eventually(m, soon, 5*time.Millisecond, func() (bool, string) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/tmp/.hidden", s.pid))
		return err == nil && string(b) == "loot\n", "the attacker's file"
	})
	a := s.alert("E2E files")
	a.Fields["fs.path.name"] = "/../../../../proc/1/root/etc/passwd" // the host's, if it were followed
	id, _ := m.say(a)
	o := m.done(id, "capture-files")
	list := string(m.piece(o, "files.jsonl"))
	for _, want := range []string{"/tmp/.hidden", "/tmp/count", "/bin/busybox", "/proc/1/environ"} {
		if !strings.Contains(list, `"path":"`+want+`"`) {
			m.Fatalf("capture-files did not find %s:\n%s", want, list)
		}
	}
	if strings.Contains(list, "passwd\",\"mode") {
		m.Fatalf("capture-files read what is not in the container:\n%s", list)
	}
	program, hidden := false, false
	want := busyboxSHA256(m)
	for _, p := range m.manifest(o).Pieces {
		program = program || p.SHA256 == want && p.Whole()
		hidden = hidden || p.Size == 5 && string(m.piece(o, p.Name)) == "loot\n"
	}
	if !program || !hidden {
		m.Fatalf("capture-files kept the program: %t, the attacker's file: %t", program, hidden)
	}
}

func (m *measuring) packets(s *suspect) {
	m.Helper()
	s.shell.waitAlive(m, "the shell", 20)
	id, _ := m.send(s, "E2E packets")
	o := m.done(id, "capture-packets")
	b := m.piece(o, "packets.pcap")
	// The attacker's end says "echo" and a number, the shell the number.
	if n := bytes.Count(b, []byte("\necho ")) + bytes.Count(b, []byte("echo ")); !bytes.HasPrefix(b, []byte{0xd4, 0xc3, 0xb2, 0xa1}) || n < 10 {
		m.Fatalf("capture-packets kept %d bytes, in which the attacker speaks %d times", len(b), n)
	}
}

// checkpoint is let through by the kubelet, which asks stoop's token for the permission;
// the container runtime here can't do it, and the outcome says that.
func (m *measuring) checkpoint(s *suspect) {
	m.Helper()
	id, _ := m.send(s, "E2E checkpoint")
	m.failed(id, "checkpoint-container", "the node's container runtime can't", "CheckpointContainer")
	resp, err := m.anonymous().Post(fmt.Sprintf("https://%s:10250/checkpoint/%s/%s/main", nodeIP, s.pod.Namespace, s.pod.Name), "", nil)
	if err != nil {
		m.Fatalf("ask the kubelet: %v", err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		m.Fatalf("the kubelet answers somebody without a token with %s: the test proves nothing of stoop's", resp.Status)
	}
}

func (m *measuring) debug(s *suspect) {
	m.Helper()
	id, _ := m.send(s, "E2E debug")
	o := m.done(id, "debug-pod")
	var debug string
	harness.Eventually(m, 30*time.Second, 50*time.Millisecond, func() (bool, string) {
		pod := m.cluster.Get(m, namespace, s.pod.Name)
		if pod == nil {
			return false, "the pod is gone"
		}
		i := slices.IndexFunc(pod.Status.EphemeralContainerStatuses, func(c corev1.ContainerStatus) bool {
			return c.Name == o.Found["container"] && c.State.Running != nil
		})
		if i >= 0 {
			_, debug, _ = strings.Cut(pod.Status.EphemeralContainerStatuses[i].ContainerID, "://")
		}
		return i >= 0, fmt.Sprintf("container %s to run: %+v", o.Found["container"], pod.Status.EphemeralContainerStatuses)
	})
	ns := func(pid int) string {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		if err != nil {
			m.Fatalf("look at process %d: %v", pid, err)
		}
		return link
	}
	pids := containerPids(m, debug)
	if len(pids) == 0 || ns(pids[0]) != ns(s.pid) {
		m.Fatalf("the container that was added has the processes %v, and does not see the suspect's", pids)
	}
}

// execFrozen has a command executed in a container that stands still: the step ends,
// the chain goes on, and files can be had even so.
func (m *measuring) execFrozen(s *suspect) {
	m.Helper()
	id, began := m.send(s, "E2E exec frozen")
	o := m.done(id, "freeze-container")
	e := m.failed(id, "exec-in-pod")
	m.Logf("exec in a frozen container, after %s: %s", time.Since(began).Round(time.Millisecond), e.Reason)
	m.done(id, "capture-files")
	m.undo(id, o)
	s.shell.waitAlive(m, "the thawed shell", 20)
}

// anonymous asks the kubelet as nobody.
func (m *measuring) anonymous() *http.Client {
	return &http.Client{Timeout: soon, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true,
	}}
}
