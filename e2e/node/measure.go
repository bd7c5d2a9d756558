package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/program"
	"stoop/evidence"
)

// bare is how many samples there are of what the API alone comes to: each takes
// seconds, and they are seconds.
const bare = 3

// soon bounds what takes milliseconds on a quiet machine.
const soon = 20 * time.Second

// measuring is one run.
type measuring struct {
	*rig
	rows  []row
	notes []string
	took  map[string][]time.Duration // step → arrival to done, by stoop's own account

	mu   sync.Mutex
	gone map[types.UID]time.Time // when the pod's object went
}

// all takes the samples.
func (m *measuring) all() {
	m.took = map[string][]time.Duration{}
	m.watchGone()
	if !m.Bare {
		one := m.suspect()
		m.freeze(one)
		m.outlive(one)
		m.cut(one)
		m.killProcess(one)
		m.inPod(one)
		one.remove()
		m.killContainer()
		m.chain()
		m.stoop.Stop()
	}
	m.api(0)
	m.api(1)
}

// watchGone notes when pods go.
func (m *measuring) watchGone() {
	m.Helper()
	m.gone = map[types.UID]time.Time{}
	w, err := m.cluster.Client.CoreV1().Pods(namespace).Watch(m.Context(), metav1.ListOptions{})
	if err != nil {
		m.Fatalf("watch the pods: %v", err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for event := range w.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok && event.Type == watch.Deleted {
				now := time.Now()
				m.mu.Lock()
				m.gone[pod.UID] = now
				m.mu.Unlock()
			}
		}
	})
	m.Cleanup(func() { w.Stop(); work.Wait() })
}

func (m *measuring) goneAt(pod *corev1.Pod) (when time.Time) {
	m.Helper()
	harness.Eventually(m, 60*time.Second, 10*time.Millisecond, func() (ok bool, what string) {
		m.mu.Lock()
		defer m.mu.Unlock()
		when, ok = m.gone[pod.UID]
		return ok, "the end of the pod's object"
	})
	return when
}

// suspect makes a pod and leaves the machine alone for a little: the kubelet and
// containerd are busy for a while after a container's start or end, and each
// figure is to be of one thing.
func (m *measuring) suspect() *suspect {
	m.Helper()
	s := m.newSuspect()
	time.Sleep(1500 * time.Millisecond)
	return s
}

// send writes an alert about the suspect, and returns its id and from when its
// time counts.
func (m *measuring) send(s *suspect, rule string) (id string, began time.Time) {
	m.Helper()
	return m.say(s.alert(rule))
}

// say writes an alert.
func (m *measuring) say(a program.Alert) (id string, began time.Time) {
	m.Helper()
	line := a.Line()
	began = time.Now()
	m.stoop.Write(line)
	return program.ID(line), began
}

// done waits for the step, which must have been done.
func (m *measuring) done(id, responder string) broker.Outcome {
	m.Helper()
	o := m.stoop.WaitOutcome(id, responder, soon)
	if o.Status != broker.Done {
		m.Fatalf("%s: the outcome is %s (%s), want %s", responder, o.Status, o.Reason, broker.Done)
	}
	if o.Took.Done == 0 {
		m.Fatalf("%s: the outcome does not say how long it took", responder)
	}
	step := "`" + responder + "`"
	if o.Rule == chainRule {
		step += " in the chain"
	}
	m.took[step] = append(m.took[step], time.Duration(o.Took.Done)*time.Microsecond)
	return o
}

// undo takes a step back.
func (m *measuring) undo(id string, o broker.Outcome) {
	m.Helper()
	m.stoop.Run("undo", o.ID)
	m.stoop.WaitStatus(id, o.Responder, broker.Undone, soon)
}

func (m *measuring) freeze(s *suspect) {
	var times []time.Duration
	for range m.Repeat {
		s.shell.waitAlive(m, "the shell", 20)
		watch := s.watchFrozen()
		id, began := m.send(s, "E2E freeze")
		times = append(times, at(m, "the freeze", watch).Sub(began))
		o := m.done(id, "freeze-container")
		if s.counts() {
			m.Fatalf("frozen, as the kernel says, but the suspect still counts")
		}
		if _, last := s.shell.answered(); time.Since(last) < 150*time.Millisecond {
			m.Fatalf("frozen, as the kernel says, but the shell still answers")
		}
		m.undo(id, o)
		if !s.counts() {
			m.Fatalf("thawed, but the suspect does not go on")
		}
		s.shell.waitAlive(m, "the thawed shell", 20)
	}
	m.add(row{"every process of the container frozen", "`freeze-container`", times, fast})
}

// outlive has stoop killed after it froze a container: the freeze is not
// forgotten.
func (m *measuring) outlive(s *suspect) {
	s.shell.waitAlive(m, "the shell", 20)
	id, _ := m.send(s, "E2E freeze")
	o := m.done(id, "freeze-container")
	m.stoop.CloseFIFO()
	m.stoop.Kill()
	m.stoop.Start()
	if s.counts() {
		m.Fatalf("stoop was killed and started again, and what it had frozen goes on")
	}
	m.stoop.Run("undo", "--all")
	m.stoop.WaitStatus(id, o.Responder, broker.Undone, soon)
	if !s.counts() {
		m.Fatalf("thawed by undo --all, but the suspect does not go on")
	}
	s.shell.waitAlive(m, "the thawed shell", 20)
	m.note("A frozen container stayed so when stoop was killed and started again, and `stoop undo --all` thawed it.")
}

func (m *measuring) cut(s *suspect) {
	var times []time.Duration
	for range m.Repeat {
		pings := ping(m, s.pod.Status.PodIP)
		pings.waitAlive(m, "the pod's network", 20)
		s.shell.waitAlive(m, "the shell", 20)
		id, began := m.send(s, "E2E cut")
		silent := s.shell.silent(m, "the shell")
		if network := pings.silent(m, "the pod's network"); network.After(silent) {
			silent = network
		}
		times = append(times, silent.Sub(began))
		o := m.done(id, "cut-network")
		s.shell.say("echo in >/tmp/in")
		before, _ := s.shell.answered()
		if !s.counts() {
			m.Fatalf("cut off, and the suspect does not count any more: that is not what cut-network is for")
		}
		if after, _ := s.shell.answered(); after != before {
			m.Fatalf("after the cut, the open connection brought %d more answers", after-before)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/in", s.pid)); err == nil {
			m.Fatalf("after the cut, a command still came in")
		}
		m.undo(id, o)
		pings.waitAlive(m, "the pod's network after the undo", 20)
		s.shell.waitAlive(m, "the shell, on the same connection after the undo", 20)
		pings.end()
		harness.Eventually(m, soon, 10*time.Millisecond, func() (bool, string) {
			err := os.Remove(fmt.Sprintf("/proc/%d/root/tmp/in", s.pid))
			return err == nil, "what was said during the cut to arrive after it"
		})
	}
	m.add(row{"the open connection silent, and the pod's network", "`cut-network`", times, fast})
}

func (m *measuring) killProcess(s *suspect) {
	var times []time.Duration
	for range m.Repeat {
		s.shell.waitAlive(m, "the shell", 20)
		watch := watchDead(m, s.pid)
		id, began := m.send(s, "E2E kill process")
		times = append(times, at(m, "the shell's end", watch).Sub(began))
		m.done(id, "kill-process")
		s.shell.hangUp()
		s.answerCall() // so the container lives, and the next shell is another process
		if !s.counts() {
			m.Fatalf("the shell was to be killed, but the container does not go on")
		}
	}
	m.add(row{"the suspect's process dead", "`kill-process`", times, fast})
}

func (m *measuring) killContainer() {
	var stopped, gone []time.Duration
	for range m.Repeat {
		s := m.suspect()
		s.shell.waitAlive(m, "the shell", 20)
		pids := containerPids(m, s.id)
		exit, end := watchExiting(slices.Clone(pids)...), watchDead(m, pids...)
		id, began := m.send(s, "E2E kill container")
		stopped = append(stopped, at(m, "the container's end", exit).Sub(began))
		gone = append(gone, at(m, "the container's end", end).Sub(began))
		m.done(id, "kill-container")
		if left := slices.DeleteFunc(containerPids(m, s.id), exiting); len(left) > 0 {
			m.Fatalf("after kill-container, processes %v of the container are left", left)
		}
		s.remove()
	}
	m.add(row{"every process of the container killed: none runs any more", "`kill-container`", stopped, fast})
	m.add(row{"the last of them gone, with the container's mounts", "`kill-container`", gone, nil})
}

func (m *measuring) chain() {
	var froze, kept, cut, dead, gone []time.Duration
	var files int
	for range m.Repeat {
		s := m.suspect()
		pings := ping(m, s.pod.Status.PodIP)
		pings.waitAlive(m, "the pod's network", 20)
		s.shell.waitAlive(m, "the shell", 20)
		freeze, end := s.watchFrozen(), watchDead(m, containerPids(m, s.id)...)
		id, began := m.send(s, "E2E chain")
		froze = append(froze, at(m, "the freeze", freeze).Sub(began))
		silent := pings.silent(m, "the pod's network")
		cut = append(cut, silent.Sub(began))
		dead = append(dead, at(m, "the container's end", end).Sub(began))
		gone = append(gone, m.goneAt(s.pod).Sub(began))
		pings.end()
		s.shell.hangUp()

		m.done(id, "freeze-container")
		o := m.done(id, "capture-proc")
		m.done(id, "cut-network")
		m.done(id, "delete-pod")
		kept = append(kept, time.Duration(o.Took.Done)*time.Microsecond)
		files = m.readEvidence(s, o)
	}
	m.add(row{"every process of the container frozen", "the chain, 1st: `freeze-container`", froze, fast})
	m.add(row{"the evidence on the disk (by stoop's account)", "the chain, 2nd: `capture-proc`", kept, nil})
	m.add(row{"the pod's network silent", "the chain, 3rd: `cut-network`", cut, nil})
	m.add(row{"every process of the container dead", "the chain, 4th: `delete-pod`, grace 1 s", dead, nil})
	m.add(row{"the pod's object gone", "the chain", gone, nil})
	m.note("The chain's evidence was read back each time: %d files, every hash right, among them the shell's program, which its owner had deleted from the disk (SHA-256 as of the program that was put there).", files)
}

// readEvidence reads what was kept back from the disk, checks every hash, and
// looks for the shell's program.
func (m *measuring) readEvidence(s *suspect, o broker.Outcome) (files int) {
	m.Helper()
	dir, manifest := filepath.Join(m.stoop.Data, "evidence", o.ID), m.manifest(o)
	want, found := busyboxSHA256(m), ""
	environ := false
	for _, p := range manifest.Pieces {
		if p.SHA256 == "" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, p.Name))
		if err != nil {
			m.Fatalf("read the evidence: %v", err)
		}
		files++
		sum := sha256.Sum256(content)
		if got := hex.EncodeToString(sum[:]); got != p.SHA256 {
			m.Fatalf("the evidence's manifest says that %s has SHA-256 %s; it has %s", p.Name, p.SHA256, got)
		}
		if p.SHA256 == want && p.Whole() {
			found = p.Name
		}
		environ = environ || strings.Contains(string(content), attackerIP)
	}
	if found == "" {
		m.Fatalf("no file of the evidence is the shell's program, SHA-256 %s: %+v", want, manifest)
	}
	if !environ {
		m.Fatalf("nothing of the evidence names the attacker's address: %+v", manifest)
	}
	return files
}

// manifest is that of the step's evidence, which has to be finished.
func (m *measuring) manifest(o broker.Outcome) (manifest evidence.Manifest) {
	m.Helper()
	b, err := os.ReadFile(filepath.Join(m.stoop.Data, "evidence", o.ID, "manifest.json"))
	if err != nil {
		m.Fatalf("read the evidence: %v", err)
	}
	if err := json.Unmarshal(b, &manifest); err != nil {
		m.Fatalf("read the evidence's manifest: %v", err)
	}
	if !manifest.Finished() || manifest.Step != o.ID || manifest.Alert != o.Alert {
		m.Fatalf("the evidence's manifest is not of this step, or not finished: %s", b)
	}
	return manifest
}

// api is what deleting the pod comes to when nothing acts on the node.
func (m *measuring) api(grace int64) {
	var gone, dead, silent []time.Duration
	for range bare {
		s := m.suspect()
		s.shell.waitAlive(m, "the shell", 20)
		end := watchDead(m, s.pid)
		began := time.Now()
		err := m.cluster.Client.CoreV1().Pods(namespace).Delete(m.Context(), s.pod.Name, metav1.DeleteOptions{
			GracePeriodSeconds: &grace, Preconditions: &metav1.Preconditions{UID: &s.pod.UID},
		})
		if err != nil {
			m.Fatalf("delete the pod: %v", err)
		}
		silent = append(silent, s.shell.silent(m, "the shell").Sub(began))
		dead = append(dead, at(m, "the shell's end", end).Sub(began))
		gone = append(gone, m.goneAt(s.pod).Sub(began))
		s.shell.hangUp()
	}
	by := fmt.Sprintf("only a DELETE, grace %d s", grace)
	m.add(row{"the pod's object gone", by, gone, nil})
	m.add(row{"the attacker's shell silent", by, silent, nil})
	m.add(row{"the suspect's process dead", by, dead, nil})
}
