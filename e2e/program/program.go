// Package program runs the real stoop as its users do: a process with flags and
// a configuration file, alerts on its FIFO, its other commands for the rest.
//
// It is the near end of an alert's way: it writes what Falco writes.
package program

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"stoop/broker"
	"stoop/e2e/harness"
)

// NoLimits is configuration that takes away the limits of the guards and of the
// API server's client, for what is not about them.
const NoLimits = `
kubernetes: {qps: 5000, burst: 5000}
guard:
  cooldown: 0s
  limits: {rule: 0, namespace: 0, node: 0, cluster: 0}
  localLimits: {rule: 0, namespace: 0, node: 0}
`

const (
	readyWithin = 30 * time.Second
	// stopWithin is a little more than the 10 s in which SIGTERM must end it.
	stopWithin = 12 * time.Second
	// commandWithin bounds every other command.
	commandWithin = 30 * time.Second
	// writeWithin is how long a writer waits for room in the FIFO.
	writeWithin = 60 * time.Second
)

// Options say how stoop runs.
type Options struct {
	Bin        string // from [Build]
	Node       string
	Kubeconfig string // "": without a cluster
	Mode       string // "": what the configuration says
	Rules      string // the text of rules.yaml
	// Config is YAML that stands in stoop.yaml besides the HTTP side, which
	// the harness needs itself.
	Config string
}

// Stoop is one installation of stoop: its data folder, its FIFO and its
// configuration stay while the process comes and goes.
type Stoop struct {
	Data, Pipe string
	HTTP       string        // address of its HTTP side
	Ready      time.Duration // how long the last start took until /readyz said yes

	t       harness.T
	options Options
	dir     string
	process *harness.Process
	holder  *harness.Process

	mu   sync.Mutex // held while writing: a line is never torn by another
	fifo *os.File
}

// New prepares an installation and starts nothing.
func New(t harness.T, o Options) *Stoop {
	t.Helper()
	dir := t.TempDir()
	s := &Stoop{
		t: t, options: o, dir: dir,
		Data: filepath.Join(dir, "data"), Pipe: filepath.Join(dir, "falco.pipe"),
		HTTP: harness.Loopback(harness.FreePort(t)),
	}
	if err := os.Mkdir(s.Data, 0o700); err != nil {
		t.Fatalf("make the data folder: %v", err)
	}
	s.write("stoop.yaml", "http: {listen: "+s.HTTP+"}\n"+o.Config)
	s.SetRules(o.Rules)
	t.Cleanup(func() {
		s.end()
		if t.Failed() {
			t.Logf("the last lines of stoop's log:\n%s", s.LogTail(25))
		}
	})
	return s
}

// Start is [New] and [Stoop.Start].
func Start(t harness.T, o Options) *Stoop {
	t.Helper()
	s := New(t, o)
	s.Start()
	return s
}

func (s *Stoop) write(name, content string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		s.t.Fatalf("write %s: %v", name, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatalf("write %s: %v", name, err)
	}
}

// SetRules replaces rules.yaml in one step.
func (s *Stoop) SetRules(rules string) { s.t.Helper(); s.write("rules.yaml", rules) }

// SetMode changes the mode of the next start.
func (s *Stoop) SetMode(mode string) { s.options.Mode = mode }

// Spawn starts the process and does not wait until it is ready. env is added
// to its environment.
func (s *Stoop) Spawn(env ...string) {
	s.t.Helper()
	args := []string{
		"run", "--config", filepath.Join(s.dir, "stoop.yaml"), "--rules", filepath.Join(s.dir, "rules.yaml"),
		"--data", s.Data, "--pipe", s.Pipe, "--node", s.options.Node,
	}
	if s.options.Kubeconfig != "" {
		args = append(args, "--kubeconfig", s.options.Kubeconfig)
	}
	if s.options.Mode != "" {
		args = append(args, "--mode", s.options.Mode)
	}
	var err error
	if s.process, err = s.spawn(env, args...); err != nil {
		s.t.Fatalf("%v", err)
	}
}

func (s *Stoop) spawn(env []string, args ...string) (*harness.Process, error) {
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open stoop's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(s.options.Bin, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST=", "KUBECONFIG=")
	cmd.Env = append(cmd.Env, env...)
	return harness.Spawn(cmd)
}

// Start starts the process and waits until it says that it is ready. env is
// added to its environment.
func (s *Stoop) Start(env ...string) {
	s.t.Helper()
	began := time.Now()
	s.Spawn(env...)
	harness.Eventually(s.t, readyWithin, time.Millisecond, func() (bool, string) {
		if !s.process.Running() {
			s.t.Fatalf("stoop ended before it was ready: %v\n%s", s.process.Wait(0), s.LogTail(25))
		}
		status, body := s.get("/readyz")
		return status == http.StatusOK, fmt.Sprintf("stoop to be ready; /readyz says %d %s", status, body)
	})
	s.Ready = time.Since(began)
}

func (s *Stoop) get(path string) (status int, body string) {
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get("http://" + s.HTTP + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, strings.TrimSpace(string(b))
}

// Readyz is whether it says that it is ready, and what it says.
func (s *Stoop) Readyz() (ready bool, says string) {
	status, body := s.get("/readyz")
	return status == http.StatusOK, body
}

// Metric is the sum of all samples of a metric, or 0 when there is none.
func (s *Stoop) Metric(name string) float64 {
	s.t.Helper()
	status, body := s.get("/metrics")
	if status != http.StatusOK {
		s.t.Fatalf("get /metrics: %d %s", status, body)
	}
	var sum float64
	for line := range strings.Lines(body) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		fields := strings.Fields(line)
		if v, err := strconv.ParseFloat(fields[len(fields)-1], 64); err == nil {
			sum += v
		}
	}
	return sum
}

// Process is the running process.
func (s *Stoop) Process() *harness.Process { return s.process }

// Kill ends the process with SIGKILL.
func (s *Stoop) Kill() {
	s.t.Helper()
	if err := s.process.Kill(); err != nil {
		s.t.Fatalf("kill stoop: %v", err)
	}
}

// Stop ends the process with SIGTERM and fails the test when it does not end
// in order and in time.
func (s *Stoop) Stop() {
	s.t.Helper()
	if err := s.process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatalf("stop stoop: %v", err)
	}
	if err := s.process.Wait(stopWithin); err != nil {
		s.t.Fatalf("stoop did not end well on SIGTERM: %v\n%s", err, s.LogTail(25))
	}
}

// Hold starts stoop hold on the FIFO, and waits until the FIFO is there.
func (s *Stoop) Hold() {
	s.t.Helper()
	var err error
	if s.holder, err = s.spawn(nil, "hold", s.Pipe); err != nil {
		s.t.Fatalf("%v", err)
	}
	harness.Eventually(s.t, 10*time.Second, time.Millisecond, func() (bool, string) {
		// Opening it for writing succeeds only once the holder has it open.
		f, err := os.OpenFile(s.Pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return false, "stoop hold: " + err.Error()
		}
		f.Close()
		return true, ""
	})
}

func (s *Stoop) end() {
	if s.fifo != nil {
		s.fifo.Close()
	}
	for _, p := range []*harness.Process{s.process, s.holder} {
		if p != nil && p.Running() {
			if err := p.Kill(); err != nil {
				s.t.Logf("%v", err)
			}
		}
	}
}

// Write writes to the FIFO as Falco does, and keeps it open. It waits for room
// when the FIFO is full.
func (s *Stoop) Write(lines ...[]byte) {
	s.t.Helper()
	if err := s.TryWrite(lines...); err != nil {
		s.t.Fatalf("%v", err)
	}
}

// TryWrite is [Stoop.Write] for other goroutines than the test's.
func (s *Stoop) TryWrite(lines ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fifo == nil {
		f, err := os.OpenFile(s.Pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open the FIFO for writing: %w", err)
		}
		s.fifo = f
	}
	if err := s.fifo.SetWriteDeadline(time.Now().Add(writeWithin)); err != nil {
		return fmt.Errorf("write to the FIFO: %w", err)
	}
	if _, err := s.fifo.Write(bytes.Join(lines, nil)); err != nil {
		return fmt.Errorf("write to the FIFO: %w", err)
	}
	return nil
}

// CloseFIFO closes the writer's end, as a Falco does that dies.
func (s *Stoop) CloseFIFO() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.fifo.Close(); err != nil {
		s.t.Fatalf("close the FIFO: %v", err)
	}
	s.fifo = nil
}

// Command runs one of stoop's other commands on this installation's data
// folder, and returns what it prints and its exit code.
func (s *Stoop) Command(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := exec.Command(s.options.Bin, append(args, "--data", s.Data)...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, &out, &errs
	p, err := harness.Spawn(cmd)
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	err = p.Wait(commandWithin)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		killErr := p.Kill()
		s.t.Fatalf("stoop %s: %v", args[0], errors.Join(err, killErr))
	}
	return out.String(), errs.String(), code
}

// Run is [Stoop.Command] for a command that must succeed.
func (s *Stoop) Run(args ...string) string {
	s.t.Helper()
	stdout, stderr, code := s.Command(args...)
	if code != 0 {
		s.t.Fatalf("stoop %s: exit %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// History is what stoop history tells, the oldest outcome first.
func (s *Stoop) History() []broker.Outcome {
	s.t.Helper()
	var out []broker.Outcome
	lines := json.NewDecoder(strings.NewReader(s.Run("history", "-o", "json")))
	for {
		var o broker.Outcome
		err := lines.Decode(&o)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			s.t.Fatalf("read stoop history -o json: %v", err)
		}
		out = append(out, o)
	}
}

// Outcomes are the outcomes of one alert, the oldest first.
func (s *Stoop) Outcomes(alertID string) []broker.Outcome {
	s.t.Helper()
	var out []broker.Outcome
	for _, o := range s.History() {
		if o.Alert == alertID {
			out = append(out, o)
		}
	}
	return out
}

// Final reports whether a status is the last word on a step's doing: not that
// it is being tried, nor that it was taken back later.
func Final(status broker.Status) bool {
	switch status {
	case broker.Retrying, broker.AwaitingApproval, broker.Undone, broker.Expired:
		return false
	}
	return true
}

// WaitOutcome waits for the final outcome of the alert's step by that
// responder.
func (s *Stoop) WaitOutcome(alertID, responder string, within time.Duration) broker.Outcome {
	s.t.Helper()
	return s.WaitOutcomeThat(alertID, responder, within, "final", func(o broker.Outcome) bool { return Final(o.Status) })
}

// WaitStatus waits until the alert's step by that responder has an outcome
// with that status.
func (s *Stoop) WaitStatus(alertID, responder string, status broker.Status, within time.Duration) broker.Outcome {
	s.t.Helper()
	return s.WaitOutcomeThat(alertID, responder, within, string(status), func(o broker.Outcome) bool { return o.Status == status })
}

// WaitOutcomeThat waits for an outcome that is as it should be, which
// description says in a word.
func (s *Stoop) WaitOutcomeThat(alertID, responder string, within time.Duration, description string, ok func(broker.Outcome) bool) broker.Outcome {
	s.t.Helper()
	var found broker.Outcome
	harness.Eventually(s.t, within, 20*time.Millisecond, func() (bool, string) {
		outcomes := s.Outcomes(alertID)
		for _, o := range outcomes {
			if o.Responder == responder && ok(o) {
				found = o
				return true, ""
			}
		}
		return false, fmt.Sprintf("the outcome (%s) of %s for the alert %s; so far: %s", description, responder, alertID, Show(outcomes))
	})
	return found
}

// Show is outcomes as a person reads them.
func Show(outcomes []broker.Outcome) string {
	if len(outcomes) == 0 {
		return "none"
	}
	var b strings.Builder
	for _, o := range outcomes {
		fmt.Fprintf(&b, "\n  %s %s %s: %s", o.Rule, o.Responder, o.Status, o.Reason)
	}
	return b.String()
}

func (s *Stoop) logPath() string { return filepath.Join(s.dir, "stoop.log") }

// Log is everything that stoop has written to stdout and stderr.
func (s *Stoop) Log() string {
	b, err := os.ReadFile(s.logPath())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// LogTail is the end of [Stoop.Log].
func (s *Stoop) LogTail(lines int) string {
	all := strings.Split(strings.TrimSpace(s.Log()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Resident is the memory that the process holds, in bytes.
func (s *Stoop) Resident() int64 {
	s.t.Helper()
	rss, err := harness.Resident(s.process.PID)
	if err != nil {
		s.t.Fatalf("%v", err)
	}
	return rss
}

// Peak is the most memory that the process was seen to hold, in bytes, looked
// at every 50 ms until stop is closed.
func (s *Stoop) Peak(stop <-chan struct{}) int64 {
	var peak int64
	for {
		if rss, err := harness.Resident(s.process.PID); err == nil {
			peak = max(peak, rss)
		}
		select {
		case <-stop:
			return peak
		case <-time.After(50 * time.Millisecond):
		}
	}
}
