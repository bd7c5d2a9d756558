package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"

	"stoop/evidence"
	"stoop/param"
)

func execInPod() Entry {
	return Entry{
		Name: "exec-in-pod",
		Doc:  "Runs a command in the suspect container and keeps its output as evidence.",
		Notes: `The command is a list: the container's own program and its arguments, fixed in the rule.
stoop puts no shell in between and nothing of an alert into an argument. A command that
needs a value of the alert gets it as an environment variable: Kubernetes has no
variables for this, so with the parameter environment the command is run by the
container's env (env NAME=value … command), each value one element of the list, whatever
is in it. The image must have env then. A value with a NUL byte or of more than 8 KiB is
refused, a field that the alert does not have sets no variable. Where your command is a
script, it must not put such a variable where the shell reads code. Attackers write
these values, and the API server's audit log shows them.

The container is the attacker's: what runs there may be a program of his in the place of
yours, may say what he likes, and can see that it was run. Ask the kernel from outside
where you can (capture-proc, capture-files). An image without the program, such as a
distroless one, answers that it is not found.

The alert's container has to be the pod's container of its name, running, before the
command and after it: if it was restarted meanwhile, the step fails, since the command
may have run in its replacement. A command runs once: if stoop is killed, or the
connection breaks, after the command may have begun, the step fails and says so.
Behind freeze-container it waits until timeout, for a frozen container runs nothing, and
runs, unheard, when the container is thawed: put it before.

Output is kept up to output bytes each of standard output and standard error; beyond
that, and after timeout, stoop hangs up. Kubernetes has no way to end the command then:
it may go on, and what it does from then on counts as the container's own. Exit status
0 is done, any other failed. Where there is no room for evidence (evidence.size, and
evidence.perTarget by container and rule) nothing is run.

What the command does starts no harmful step. It is known in Falco's alerts by the
container, by proc.cmdline (of its children by proc.pcmdline, proc.acmdline[2] and so on)
being exactly the command, by the time, and, as far as it is to be seen, by a parent
that is outside the container; in audit events by stoop's user. Whoever is in the
container and knows the command can hide behind it while it runs, and by replacing the
program can have it run until timeout: keep that short.

pods/exec in every namespace is as much as root in every pod: of stoop's permissions
this is the one to think about. The API server wants get, with newer versions also create
(for WebSockets; create alone serves where only SPDY gets through a proxy).`,
		Params: param.Describe(execInPodDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"pods/exec"}, Verbs: []string{"get", "create"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 6 * time.Minute,
		New: func(env Env) Responder {
			return &podExecer{kube: env.Kube, store: env.Evidence, own: env.Own}
		},
	}
}

type execInPodParams struct {
	Command     []string          `param:"command" required:"true" doc:"The program, as the container finds it, and its arguments."`
	Environment map[string]string `param:"environment" doc:"Variables by name, each with the field of the alert that is its value."`
	Timeout     param.Duration    `param:"timeout" min:"100ms" max:"5m" doc:"How long stoop waits for it to end."`
	Output      param.Size        `param:"output" min:"1B" max:"16MiB" doc:"How much of its standard output, and of its standard error, is kept."`
}

func execInPodDefaults() execInPodParams {
	return execInPodParams{Timeout: param.Duration(30 * time.Second), Output: 1 << 20}
}

const (
	// execValueMost is how long a value of an alert may be, execVariablesMost how
	// many there may be: all of them are in one URL.
	execValueMost     = 8 << 10
	execVariablesMost = 16
)

// Validate refuses what would not run as it reads.
func (p execInPodParams) Validate() error {
	if len(p.Command) == 0 || p.Command[0] == "" {
		return errors.New("command: there is none")
	}
	for _, arg := range p.Command {
		if strings.Contains(arg, "\x00") {
			return errors.New("command: an argument holds a NUL byte")
		}
	}
	if len(p.Environment) == 0 {
		return nil
	}
	if len(p.Environment) > execVariablesMost {
		return fmt.Errorf("environment: at most %d variables", execVariablesMost)
	}
	if first := p.Command[0]; strings.HasPrefix(first, "-") || strings.Contains(first, "=") {
		return fmt.Errorf("command: env would not take %s for a program", param.Cut(first))
	}
	for _, name := range slices.Sorted(maps.Keys(p.Environment)) {
		if !variableName.MatchString(name) {
			return fmt.Errorf("environment: %s is no name for a variable", param.Cut(name))
		}
		if p.Environment[name] == "" {
			return fmt.Errorf("environment: %s has no field", name)
		}
	}
	return nil
}

// argv is the command with its variables.
func (p execInPodParams) argv(r *Request) ([]string, error) {
	var set []string
	for _, name := range slices.Sorted(maps.Keys(p.Environment)) {
		value, ok := r.Alert.Field(p.Environment[name])
		switch {
		case !ok:
			continue
		case strings.Contains(value, "\x00"):
			return nil, Refuse("the alert's %s, for %s, holds a NUL byte", p.Environment[name], name)
		case len(value) > execValueMost:
			return nil, Refuse("the alert's %s, for %s, has %d bytes, and at most %d are passed on", p.Environment[name], name, len(value), execValueMost)
		}
		set = append(set, name+"="+value)
	}
	if len(set) == 0 {
		return p.Command, nil
	}
	return slices.Concat([]string{"env"}, set, p.Command), nil
}

type podExecer struct {
	kube  *Kube
	store *evidence.Store
	own   *OwnProcesses
}

// Check refuses what can't be run. Whether the container has the program is seen by
// Act.
func (e *podExecer) Check(_ context.Context, r *Request) error {
	_, _, err := e.params(r)
	return err
}

func (e *podExecer) params(r *Request) (execInPodParams, []string, error) {
	params := execInPodDefaults()
	if err := r.Decode(&params); err != nil {
		return params, nil, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, nil, Refuse("%v", err)
	}
	if e.store == nil {
		return params, nil, Refuse("there is no evidence store, so the output could not be kept")
	}
	argv, err := params.argv(r)
	return params, argv, err
}

// suspectContainer finds the alert's container in a pod as the API server has it
// now: its name and its whole id. It has to run.
func suspectContainer(pod *corev1.Pod, id string) (name, whole string, err error) {
	if len(id) < shortID {
		return "", "", Refuse("the alert names no container of the pod: let Falco's append_output add container.id (docs/falco.md)")
	}
	for _, c := range allStatuses(pod) {
		_, bare, _ := strings.Cut(c.ContainerID, "://")
		switch {
		case !strings.HasPrefix(bare, id):
		case name != "":
			return "", "", Refuse("container %s may be %s or %s of the pod", id, name, c.Name)
		case c.State.Running == nil:
			return "", "", fmt.Errorf("container %s does not run any more: %w", c.Name, ErrGone)
		default:
			name, whole = c.Name, bare
		}
	}
	if name == "" {
		return "", "", fmt.Errorf("container %s is none of the pod's any more, it was restarted: %w", id, ErrGone)
	}
	return name, whole, nil
}

// The pieces of a case of a command.
const (
	pieceCommand = "command.json" // begins it, so that a second run knows of the first
	pieceStdout  = "stdout"
	pieceStderr  = "stderr"
)

// executedCommand is what command.json says.
type executedCommand struct {
	Namespace string   `json:"namespace"`
	Pod       string   `json:"pod"`
	Container string   `json:"container"`
	ID        string   `json:"id"`
	Command   []string `json:"command"`
}

func (e *podExecer) Act(ctx context.Context, r *Request) (Result, error) {
	params, argv, err := e.params(r)
	if err != nil {
		return Result{}, err
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("run %s in pod %s/%s: %w", param.Cut(params.Command[0]), r.Pod.Namespace, r.Pod.Name, err)
	}
	kept, err := e.store.Begin(ctx, evidence.About{
		Step: r.Step.ID, Alert: r.Step.AlertID, Rule: r.Step.Rule, Responder: r.Step.Responder,
		Target: r.Target.Container + " " + r.Step.Rule,
	})
	switch {
	case errors.Is(err, evidence.ErrFull), errors.Is(err, evidence.ErrEnough):
		return Result{}, Refuse("nothing is run, since its output could not be kept: %v", err)
	case err != nil:
		return fail(err)
	case kept.WasFinished():
		if err := kept.Close(); err != nil {
			return fail(err)
		}
		return Result{Reason: "done by an earlier run of this step, whose output is in " + kept.Path(), Found: foundEvidence(kept)}, nil
	}
	if _, begun := kept.Manifest().Piece(pieceCommand); begun {
		if err := kept.Close(); err != nil {
			return fail(err)
		}
		return Result{Found: foundEvidence(kept)}, errors.New("an earlier run of this step was cut off when the command may have begun: it is not run again")
	}
	drop := func(err error) (Result, error) {
		if derr := kept.Discard(); derr != nil {
			err = errors.Join(err, derr)
		}
		return fail(err)
	}
	pod, err := sameNow(ctx, e.kube, r.Pod)
	if err != nil {
		return drop(err)
	}
	name, id, err := suspectContainer(pod, r.Target.Container)
	if err != nil {
		return drop(err)
	}
	about, err := json.Marshal(executedCommand{pod.Namespace, pod.Name, name, id, argv})
	if err != nil {
		return drop(err)
	}
	if p, err := kept.Add(ctx, pieceCommand, bytes.NewReader(about), -1); err != nil || !p.Whole() {
		return drop(errors.Join(err, Refuse("nothing is run, since its output could not be kept: %s", p.Error)))
	}
	x := &execution{kept: kept, max: int(params.Output), timeout: time.Duration(params.Timeout)}
	ended := e.own.Executing(id, argv, params.Command)
	err = x.run(ctx, func(ctx context.Context, stdout, stderr io.Writer) error {
		return e.kube.exec(ctx, pod, name, argv, stdout, stderr)
	})
	ended()
	if cause, no := notBegun(err); no {
		return drop(cause)
	}
	err = errors.Join(x.ended(params, err), sameAfter(ctx, e.kube, pod, name, id))
	if err != nil {
		kept.Note("%v", err)
	}
	if cerr := kept.Close(); cerr != nil {
		return Result{}, errors.Join(err, cerr)
	}
	res := Result{Found: foundEvidence(kept)}
	if x.exit >= 0 {
		res.Found["exit"] = strconv.Itoa(x.exit)
	}
	if err != nil {
		_, err := fail(fmt.Errorf("%w; what it said is in %s", err, kept.Path()))
		return res, err
	}
	res.Reason = fmt.Sprintf("%s in container %s ended with status 0; what it said is in %s", param.Cut(params.Command[0]), name, kept.Path())
	return res, nil
}

// sameAfter makes sure that what was done to a container by its name was done to the
// alert's.
func sameAfter(ctx context.Context, kube *Kube, pod *corev1.Pod, name, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	now, err := podNow(ctx, kube, pod.Namespace, pod.Name, pod.UID)
	if err != nil {
		return fmt.Errorf("whether it was the alert's container is not known: %v", err)
	}
	if now == nil {
		return nil // it went meanwhile: there is no replacement under its UID
	}
	for _, c := range allStatuses(now) {
		if _, bare, _ := strings.Cut(c.ContainerID, "://"); c.Name == name && bare == id {
			return nil
		}
	}
	return fmt.Errorf("container %s was restarted meanwhile: it may have been the replacement", name)
}

func allStatuses(pod *corev1.Pod) []corev1.ContainerStatus {
	return slices.Concat(pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses)
}

// notBegun reports whether an error of an execution says that the command was never
// asked for, and is then what it says.
func notBegun(err error) (error, bool) {
	var up *httpstream.UpgradeFailureError
	var op *net.OpError
	switch {
	case errors.As(err, &up):
		return up.Cause, true
	case as[*apierrors.StatusError](err):
		return err, true
	case errors.As(err, &op) && op.Op == "dial":
		return Retry(err, 0), true
	}
	return err, false
}

// execution is a command at work.
type execution struct {
	kept    *evidence.Case
	max     int // bytes of each of its outputs
	timeout time.Duration
	exit    int // its status; -1: it did not end, as far as is known

	mu     sync.Mutex
	stderr output
}

// errOutput says that a command said more than is kept.
var errOutput = errors.New("it said more than is kept")

// run has the command executed and keeps what it says.
func (x *execution) run(ctx context.Context, do func(ctx context.Context, stdout, stderr io.Writer) error) error {
	ctx, cancel := context.WithTimeout(ctx, x.timeout)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	x.stderr.max = x.max
	r, w := io.Pipe()
	stderr := writerFunc(func(b []byte) {
		x.mu.Lock()
		defer x.mu.Unlock()
		if _, _ = x.stderr.Write(b); len(x.stderr.head) > x.max {
			stop(errOutput)
		}
	})
	done := make(chan error, 1)
	go func() {
		err := do(ctx, writerFunc(func(b []byte) { _, _ = w.Write(b) }), stderr)
		w.Close()
		done <- err
	}()
	// What it said is kept also when time is over.
	keep := context.WithoutCancel(ctx)
	p, kerr := x.kept.Add(keep, pieceStdout, r, int64(x.max))
	if r.Close(); p.Cut || kerr != nil {
		stop(errOutput)
	}
	err := <-done
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if _, no := notBegun(err); no {
		return err
	}
	x.mu.Lock()
	head := slices.Clone(x.stderr.head)
	x.mu.Unlock()
	_, serr := x.kept.Add(keep, pieceStderr, bytes.NewReader(head), int64(x.max))
	return errors.Join(err, kerr, serr)
}

// ended is what the end of a command makes of its step; nil: it is done.
func (x *execution) ended(params execInPodParams, err error) error {
	x.exit = -1
	var exit utilexec.CodeExitError
	switch {
	case err == nil:
		x.exit = 0
		return nil
	case errors.As(err, &exit):
		x.exit = exit.Code
		x.mu.Lock()
		line := x.stderr.lastLine()
		x.mu.Unlock()
		if line != "" {
			return fmt.Errorf("it ended with status %d: %q", exit.Code, line)
		}
		return fmt.Errorf("it ended with status %d", exit.Code)
	case errors.Is(err, errOutput):
		return fmt.Errorf("it said more than is kept (%s), and was hung up on", params.Output)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("it did not end within its timeout (%s), and may go on", params.Timeout)
	case errors.Is(err, context.Canceled):
		return errors.New("stoop was stopped while it ran, and it may go on")
	}
	return fmt.Errorf("%v; it may have run", err)
}

// writerFunc takes all that is written: an error would end the other streams of the
// command too.
type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// exec runs a command in a container, and returns when it has ended: with nil for
// status 0, a [utilexec.CodeExitError] for another.
func (k *Kube) exec(ctx context.Context, pod *corev1.Pod, container string, command []string, stdout, stderr io.Writer) error {
	u := k.core.Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, k.params).URL()
	socket, err := remotecommand.NewWebSocketExecutor(k.config, http.MethodGet, u.String())
	if err != nil {
		return err
	}
	spdy, err := remotecommand.NewSPDYExecutor(k.config, http.MethodPost, u)
	if err != nil {
		return err
	}
	e, err := remotecommand.NewFallbackExecutor(socket, spdy, func(err error) bool {
		// What the API server refuses as itself it refuses in either way.
		var up *httpstream.UpgradeFailureError
		return errors.As(err, &up) && !as[*apierrors.StatusError](up.Cause) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	// What goes wrong is in the error.
	ctx = klog.NewContext(ctx, logr.Discard())
	return e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
}
