package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stoop/alert"
	"stoop/evidence"
	"stoop/param"
)

func run() Entry {
	return Entry{
		Name: "run",
		Doc:  "Runs a program of yours on this machine, with the alert on its standard input.",
		Notes: `The program is started by its path with just the arguments that the rule lists: no shell
is in between, and nothing of an alert gets into an argument or the environment. It gets
the alert on its standard input, as one line of JSON, just as Falco wrote it: an object
with rule, priority, time, source, hostname, tags, output and output_fields, of which
older or differently configured Falcos leave some out. Attackers write parts of it. A
program that is written in shell must not put a value of it where the shell reads code.

The environment is PATH (/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin),
what the parameter environment says, and STOOP_STEP (the step's id), STOOP_ALERT_ID,
STOOP_RULE (of rules.yaml), STOOP_NODE, and STOOP_RESUMED=1 when stoop was cut off in
the middle of this step before: then the program may have run, or have begun to,
already, and has to bear it. Its working directory is /, its umask 077, and it runs as
the user that stoop runs as. A secret belongs in a file that the program reads, not in
environment.

What it writes to standard output and standard error is kept as evidence, at most output
of each. It succeeds with exit status 0; any other is a failed step, which says the last
line of its standard error, and is not tried again. After timeout it and its children
get SIGTERM, and 2 s later SIGKILL. Children do not outlive it: what still runs when it
ends is killed. Where stoop can make a cgroup for it, below its own, that takes in every
child; elsewhere only those that stayed in its process group (found.contained says
cgroup or process group).

memory is the limit of each process's private memory, and of all together where stoop
can use a memory cgroup. Further limits are 1024 open files, files of 1 GiB, no core
dumps, and 256 processes where there is a cgroup for it, and the kernel takes it first
when memory is short.

A program that others than root and stoop's own user may write to, by its owner, its group
or its mode, is refused. The folders above it are yours to look after: whoever can
change the program is stoop's user.

What the program and its children do starts no harmful step, even if Falco raises an
alert about it: they are known by the process and its parents in the alert (proc.pid,
proc.ppid, proc.apid[2]), by /proc and by their cgroup. Not known is a child of a child
that has ended before its alert was looked at, if the alert names no parent of it: where
the program starts many, except its name in Falco's own rules.`,
		Params:   param.Describe(runDefaults()),
		Kind:     Harm,
		Object:   NoObject,
		Deadline: time.Minute,
		Lane: func(raw json.RawMessage) string {
			p := runDefaults()
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return lane("", strings.Join(p.Command[:min(1, len(p.Command))], ""))
		},
		New: func(env Env) Responder {
			log := env.Log
			if log == nil {
				log = slog.New(slog.DiscardHandler)
			}
			return &programRunner{
				node: env.Node, data: env.Data, evidence: env.Evidence, own: env.Own, log: log,
				// Not by its name: the file may be another version's by now.
				wrapper: []string{"/proc/self/exe", "child", "run"},
			}
		},
	}
}

type runParams struct {
	Command     []string          `param:"command" required:"true" doc:"The program's absolute path and its arguments."`
	Timeout     param.Duration    `param:"timeout" min:"100ms" max:"50s" doc:"How long it may run before it is ended."`
	Memory      param.Size        `param:"memory" min:"16MiB" doc:"How much memory it may use."`
	Output      param.Size        `param:"output" max:"16MiB" doc:"How much of its standard output, and of its standard error, is kept."`
	Environment map[string]string `param:"environment" doc:"Variables by name, fixed in the rule."`
}

func runDefaults() runParams {
	return runParams{Timeout: param.Duration(30 * time.Second), Memory: 256 << 20, Output: 1 << 20}
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// Validate refuses what can't be run, or not as it reads.
func (p runParams) Validate() error {
	if len(p.Command) == 0 {
		return errors.New("command: there is none")
	}
	if path := p.Command[0]; !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return fmt.Errorf("command: %s is no absolute path to a program in its shortest form; a shell's line does not work here, a list of arguments does", param.Cut(path))
	}
	for _, arg := range p.Command {
		if strings.Contains(arg, "\x00") {
			return errors.New("command: an argument holds a NUL byte")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.Environment)) {
		switch {
		case !variableName.MatchString(name):
			return fmt.Errorf("environment: %s is no name for a variable", param.Cut(name))
		case strings.HasPrefix(name, "STOOP_"):
			return fmt.Errorf("environment: %s: names that begin with STOOP_ are set by stoop", name)
		case strings.Contains(p.Environment[name], "\x00"):
			return fmt.Errorf("environment: %s holds a NUL byte", name)
		}
	}
	return nil
}

const (
	// runPath is where programs look for others.
	runPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// runTerm is how long a program has between SIGTERM and SIGKILL.
	runTerm = 2 * time.Second
	// runPipes is how long stoop waits for the output of a program that is
	// dead: only a child that got away holds it open then.
	runPipes = time.Second
)

type programRunner struct {
	node     string
	data     string
	evidence *evidence.Store
	own      *OwnProcesses
	log      *slog.Logger
	wrapper  []string // stoop itself as [RunChild]
}

// Check looks at the program without running it.
func (p *programRunner) Check(_ context.Context, r *Request) error {
	_, err := p.params(r)
	return err
}

func (p *programRunner) params(r *Request) (runParams, error) {
	params := runDefaults()
	if err := r.Decode(&params); err != nil {
		return params, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, Refuse("%v", err)
	}
	return params, runnable(params.Command[0])
}

// runnable refuses what is no program, or somebody else's to change: whoever may
// do that would be stoop.
func runnable(path string) error {
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return Refuse("%s is not there; in a pod it has to be in stoop's own image or a mount", path)
	case err != nil:
		return Refuse("look at %s: %v", path, err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return Refuse("%s is no file", path)
	case st.Mode&0o111 == 0:
		return Refuse("%s is not executable", path)
	case st.Mode&0o002 != 0:
		return Refuse("everybody may change %s: chmod o-w", path)
	case st.Mode&0o020 != 0 && st.Gid != 0:
		return Refuse("group %d may change %s: chmod g-w", st.Gid, path)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return Refuse("%s belongs to user %d, who could change it: chown it to root", path, st.Uid)
	}
	return nil
}

func (p *programRunner) Act(ctx context.Context, r *Request) (Result, error) {
	params, err := p.params(r)
	if err != nil {
		return Result{}, err
	}
	var stdin bytes.Buffer
	if err := json.Compact(&stdin, r.Step.Alert); err != nil {
		return Result{}, Refuse("the alert is no JSON: %v", err)
	}
	stdin.WriteByte('\n')
	job := &job{
		command: params.Command, env: p.environment(params, r), stdin: stdin.Bytes(),
		timeout: time.Duration(params.Timeout), memory: int64(params.Memory),
		stdout: output{max: int(params.Output)}, stderr: output{max: int(params.Output)},
		wrapper: p.wrapper, own: p.own,
	}
	job.group = newGroup("/proc", p.groupName(r), job.memory)
	err = job.run(ctx)
	if as[*groupError](err) {
		p.log.Debug("a program could not be put into a cgroup of its own", "step", r.Step.ID, "error", err)
		job.group.remove()
		job.group = nil
		err = job.run(ctx)
	}
	job.group.remove()
	if as[*startError](err) {
		return Result{}, fmt.Errorf("start %s: %w", params.Command[0], err)
	}

	found := map[string]string{"contained": "process group"}
	if job.group.kills() {
		found["contained"] = "cgroup"
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		found["exit"] = "0"
	case errors.As(err, &exit) && exit.Exited():
		found["exit"] = strconv.Itoa(exit.ExitCode())
	}
	note := p.keep(context.WithoutCancel(ctx), r, job, found)
	res := Result{Found: found}
	switch {
	case err == nil:
		res.Reason = params.Command[0] + " ended with status 0" + note
		return res, nil
	case errors.As(err, &exit):
		what := fmt.Sprintf("%s ended with %s", params.Command[0], exit.ProcessState)
		if line := job.stderr.lastLine(); line != "" {
			what += ": " + strconv.Quote(line)
		}
		return res, errors.New(what + note)
	}
	return res, fmt.Errorf("%s %w%s", params.Command[0], err, note)
}

// groupName is the same in each run of a step, so that what an earlier one left is
// found, and another for a stoop with another data folder.
func (p *programRunner) groupName(r *Request) string {
	return "stoop-run-" + alert.IDOf([]byte(p.data + "\x00" + r.Step.ID))[:20]
}

// environment is all that the program gets to see of stoop's.
func (p *programRunner) environment(params runParams, r *Request) []string {
	env := map[string]string{"PATH": runPath}
	maps.Copy(env, params.Environment)
	for name, value := range map[string]string{
		"STOOP_STEP": r.Step.ID, "STOOP_ALERT_ID": r.Step.AlertID, "STOOP_RULE": r.Step.Rule, "STOOP_NODE": p.node,
	} {
		env[name] = strings.ReplaceAll(value, "\x00", "")
	}
	if r.Resumed {
		env["STOOP_RESUMED"] = "1"
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, name+"="+env[name])
	}
	return list
}

// keep puts the output with the evidence, and says in words what of it could
// not be kept: that fails no step.
func (p *programRunner) keep(ctx context.Context, r *Request, j *job, found map[string]string) (note string) {
	if len(j.stdout.head) == 0 && len(j.stderr.head) == 0 {
		return ""
	}
	if p.evidence == nil {
		return "; its output is not kept: there is no store for evidence"
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := p.evidence.Begin(ctx, evidence.About{
		Step: r.Step.ID, Alert: r.Step.AlertID, Rule: r.Step.Rule, Responder: r.Step.Responder, Target: objectOf(r.Target),
	})
	if err != nil {
		return fmt.Sprintf("; its output is not kept: %v", err)
	}
	var errs []error
	for _, piece := range []struct {
		name string
		out  *output
	}{{"stdout", &j.stdout}, {"stderr", &j.stderr}} {
		if len(piece.out.head) > 0 {
			_, err := c.Add(ctx, piece.name, bytes.NewReader(piece.out.head), int64(piece.out.max))
			errs = append(errs, err)
		}
	}
	path := c.Path()
	errs = append(errs, c.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Sprintf("; its output is not all kept: %v", err)
	}
	found["evidence"] = path
	return ""
}

// output keeps the beginning of what a program writes, one byte more than it
// may so that it is seen that there was more, and the end, where a program says
// why it gave up.
type output struct {
	max  int
	head []byte
	tail []byte
}

// tailMost is how much of the end is kept.
const tailMost = 2048

// Write never fails: a program that is cut short by a full buffer would fail for
// no reason of its own.
func (o *output) Write(b []byte) (int, error) {
	o.head = append(o.head, b[:min(len(b), o.max+1-len(o.head))]...)
	if len(b) >= tailMost {
		o.tail = append(o.tail[:0], b[len(b)-tailMost:]...)
	} else {
		o.tail = append(o.tail, b...)
		o.tail = append(o.tail[:0], o.tail[max(0, len(o.tail)-tailMost):]...)
	}
	return len(b), nil
}

// lastLine is the last line that is not empty, of at most 200 bytes.
func (o *output) lastLine() string {
	const most = 200
	text := strings.TrimSpace(string(o.tail))
	line := strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:])
	if len(line) > most {
		line = strings.ToValidUTF8(line[:most], "") + "…"
	}
	return line
}

// job is one run of a program.
type job struct {
	command, env   []string
	stdin          []byte
	timeout        time.Duration
	memory         int64
	stdout, stderr output
	wrapper        []string
	own            *OwnProcesses
	group          *group // nil: only the process group holds it
}

// startError says that the program did not begin to run.
type startError struct{ error }

// groupError says that it did not because it could not be put into its cgroup.
type groupError struct{ error }

// run starts the program and returns when it and its children are gone. The
// error is an [exec.ExitError] if it ended badly by itself.
func (j *job) run(ctx context.Context) error {
	// The program is told to die when the thread that started it does (see
	// Pdeathsig), so that thread is kept.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	args := append(slices.Clone(j.wrapper), "--memory", strconv.FormatInt(j.memory, 10))
	for _, dir := range j.group.folders() {
		args = append(args, "--cgroup", dir)
	}
	args = append(append(args, "--"), j.command...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdin = j.env, "/", bytes.NewReader(j.stdin)
	cmd.Stdout, cmd.Stderr = &j.stdout, &j.stderr
	cmd.WaitDelay = runPipes
	// A session of its own: no terminal, and a process group to signal. If stoop
	// is killed, so is the program.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	said, tell, err := os.Pipe()
	if err != nil {
		return &startError{err}
	}
	defer said.Close()
	cmd.ExtraFiles = []*os.File{tell}
	err = cmd.Start()
	tell.Close()
	if err != nil {
		return &startError{err}
	}
	pid := cmd.Process.Pid
	ended := j.own.Started(pid, j.group.name())

	exited := make(chan struct{})
	go func() {
		defer close(exited)
		waitExit(pid)
	}()
	timer := time.NewTimer(j.timeout)
	defer timer.Stop()
	var why error
	select {
	case <-exited:
	case <-timer.C:
		why = fmt.Errorf("ran longer than its timeout (%s) and was ended", param.Duration(j.timeout))
	case <-ctx.Done():
		why = fmt.Errorf("was ended in the middle: %w", context.Cause(ctx))
	}
	if why != nil {
		_ = syscall.Kill(-pid, syscall.SIGTERM)
		timer.Reset(runTerm)
		select {
		case <-exited:
		case <-timer.C:
		}
	}
	// Not yet waited for, it keeps its number, and with it the process group's:
	// nobody else can be hit.
	_ = syscall.Kill(-pid, syscall.SIGKILL)
	j.group.kill()
	<-exited
	ended()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		exit.Stderr = nil
	} else if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it ended well; a child that got away held its output open
	}
	if b, rerr := io.ReadAll(io.LimitReader(said, 4096)); rerr == nil && len(b) > 0 {
		text := strings.TrimSpace(string(b))
		if reason, ok := strings.CutPrefix(text, groupTrouble); ok {
			return &groupError{errors.New(reason)}
		}
		return &startError{errors.New(text)}
	}
	if why != nil {
		return why
	}
	return err
}

// waitExit returns when the child has ended, and leaves it to be waited for.
func waitExit(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
