package responders_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/rest"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/responders"
	"stoop/responders/conformance"
)

// inPod is a pod on the suite's API server, and what acts on it.
type inPod struct {
	t      *testing.T
	server *conformance.Server
	store  *evidence.Store
	own    *responders.OwnProcesses
	env    responders.Env
	pod    *corev1.Pod

	mu  sync.Mutex
	ran []conformance.Command
}

const podContainer = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// newInPod also takes what wraps each connection to the API server; nil: nothing.
func newInPod(t *testing.T, wrap func(http.RoundTripper) http.RoundTripper) *inPod {
	t.Helper()
	p := &inPod{t: t, server: conformance.NewServer(t), own: &responders.OwnProcesses{}}
	config := p.server.Config()
	if wrap != nil {
		config = rest.CopyConfig(config)
		config.Wrap(wrap)
	}
	kube, err := responders.NewKube(config)
	if err != nil {
		t.Fatal(err)
	}
	if p.store, err = evidence.Open(evidence.Config{Dir: filepath.Join(t.TempDir(), "evidence"), PerTarget: 10}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.store.Close() })
	p.env = responders.Env{Kube: kube, Evidence: p.store, Own: p.own, Node: "n1"}
	pods := p.server.Admin().CoreV1().Pods("shop")
	if p.pod, err = pods.Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-0"},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "side"}, {Name: "main"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	p.setContainer(podContainer)
	p.onExec(func(_ conformance.Command, stdout, _ io.Writer) int {
		fmt.Fprintln(stdout, "ok")
		return 0
	})
	return p
}

// setContainer is the kubelet's word that the suspect container has another id. What
// acts knows the pod as it was.
func (p *inPod) setContainer(id string) {
	p.t.Helper()
	pod := p.pod.DeepCopy()
	pod.ResourceVersion = ""
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
		{Name: "side", ContainerID: "containerd://" + strings.Repeat("5", 64), State: running},
		{Name: "main", ContainerID: "containerd://" + id, State: running},
	}}
	now, err := p.server.Admin().CoreV1().Pods("shop").UpdateStatus(p.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	if len(p.pod.Status.ContainerStatuses) == 0 {
		p.pod = now
	}
}

func (p *inPod) onExec(run func(c conformance.Command, stdout, stderr io.Writer) int) {
	p.server.OnExec(p.t, func(c conformance.Command, stdout, stderr io.Writer) int {
		p.mu.Lock()
		p.ran = append(p.ran, c)
		p.mu.Unlock()
		return run(c, stdout, stderr)
	})
}

func (p *inPod) commands() []conformance.Command {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.ran)
}

func (p *inPod) responder(name string) responders.Responder {
	i := slices.IndexFunc(responders.All(), func(e responders.Entry) bool { return e.Name == name })
	return responders.All()[i].New(p.env)
}

func (p *inPod) request(responder, id, params string, fields map[string]any) *responders.Request {
	p.t.Helper()
	line, err := json.Marshal(map[string]any{"rule": "R", "priority": "Critical", "time": time.Now().UTC().Format(time.RFC3339Nano), "output_fields": fields})
	if err != nil {
		p.t.Fatal(err)
	}
	a, err := alert.Parse(line)
	if err != nil {
		p.t.Fatal(err)
	}
	s := &broker.Step{ID: id, AlertID: a.ID, Rule: "r", Action: broker.Action{Responder: responder, Params: json.RawMessage(params)}}
	return &responders.Request{
		Step: s, Alert: a, Pod: p.pod,
		Target: alert.Target{Namespace: "shop", Pod: "web-0", UID: string(p.pod.UID), Container: podContainer},
	}
}

func (p *inPod) exec(id, params string, fields map[string]any) (responders.Result, error) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	return p.responder("exec-in-pod").Act(ctx, p.request("exec-in-pod", id, params, fields))
}

func (p *inPod) kept(step, name string) string {
	p.t.Helper()
	r, _, err := p.store.Read(step, name)
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// failsFor reports whether an error ends its step, and is not tried again.
func failsFor(t *testing.T, err error, say string) {
	t.Helper()
	status, retry, _, reason := responders.Classify(err)
	if err == nil || status != broker.Failed || retry || !strings.Contains(reason, say) {
		t.Errorf("%v: status %s, retry %t; want a failure that says %q", err, status, retry, say)
	}
}

func TestExecInPod(t *testing.T) {
	p := newInPod(t, nil)
	p.onExec(func(_ conformance.Command, stdout, stderr io.Writer) int {
		fmt.Fprint(stdout, "out 1\n")
		fmt.Fprint(stderr, "err 1\n")
		fmt.Fprint(stdout, "out 2\n")
		return 0
	})
	res, err := p.exec("s1", `{"command":["ps","aux","$(id); `+"`id`"+` && 'x' \n {{.}}"]}`, nil)
	if err != nil || res.Found["exit"] != "0" || !strings.Contains(res.Reason, res.Found["evidence"]) {
		t.Fatalf("%+v, %v", res, err)
	}
	want := []conformance.Command{{Namespace: "shop", Pod: "web-0", Container: "main", Argv: []string{"ps", "aux", "$(id); `id` && 'x' \n {{.}}"}}}
	if got := p.commands(); fmt.Sprint(got) != fmt.Sprint(want) || len(got[0].Argv) != 3 {
		t.Errorf("executed %q, want %q", got, want)
	}
	if out, errs := p.kept("s1", "stdout"), p.kept("s1", "stderr"); out != "out 1\nout 2\n" || errs != "err 1\n" {
		t.Errorf("kept %q and %q", out, errs)
	}
	if wrong, err := p.store.Verify(t.Context(), "s1"); err != nil || len(wrong) > 0 {
		t.Errorf("verify: %q, %v", wrong, err)
	}
}

// Values of the alert are variables, each one element of the command, whatever is
// in it.
func TestExecInPodEnvironment(t *testing.T) {
	p := newInPod(t, nil)
	evil := "'; rm -rf / #\"$(id)`id`\n\r\t$HOME=x -i --split-string=evil {{.}} %s \x1b[2J \u202e"
	long := strings.Repeat("x", 8<<10)
	fields := map[string]any{"proc.cmdline": evil, "fd.name": long, "proc.pid": 7}
	params := `{"command":["script","--all"],"environment":{"CMDLINE":"proc.cmdline","FD":"fd.name","PID":"proc.pid","NONE":"proc.name"}}`
	if _, err := p.exec("s1", params, fields); err != nil {
		t.Fatal(err)
	}
	want := []string{"env", "CMDLINE=" + evil, "FD=" + long, "PID=7", "script", "--all"}
	if got := p.commands(); len(got) != 1 || !slices.Equal(got[0].Argv, want) {
		t.Errorf("executed %.200q, want %.200q", got, want)
	}
	for name, bad := range map[string]string{"a NUL byte": "a\x00b", "more than 8 KiB": long + "x"} {
		req := p.request("exec-in-pod", "s2", params, map[string]any{"proc.cmdline": bad})
		r := p.responder("exec-in-pod")
		_, err := r.Act(t.Context(), req)
		if status, _, _, _ := responders.Classify(err); status != broker.Refused {
			t.Errorf("a value with %s: %v, want a refusal", name, err)
		}
		if err := r.(responders.Checker).Check(t.Context(), req); err == nil {
			t.Errorf("a value with %s is no reason for Check", name)
		}
	}
	if got := p.commands(); len(got) != 1 {
		t.Errorf("what was refused was run: %.300q", got[1:])
	}
	for _, bad := range []string{
		`{"command":[]}`, `{}`, `{"command":[""]}`, `{"command":["a\u0000b"]}`,
		`{"command":["A=b"],"environment":{"X":"y"}}`, `{"command":["-i"],"environment":{"X":"y"}}`,
		`{"command":["a"],"environment":{"X=1":"y"}}`, `{"command":["a"],"environment":{"-u":"y"}}`, `{"command":["a"],"environment":{"X":""}}`,
	} {
		if _, err := p.exec("bad", bad, nil); err == nil {
			t.Errorf("parameters %s are taken", bad)
		}
	}
}

func TestExecInPodEnds(t *testing.T) {
	p := newInPod(t, nil)
	p.onExec(func(_ conformance.Command, _, stderr io.Writer) int {
		fmt.Fprint(stderr, "first\nno such thing \"quoted\"\n")
		return 3
	})
	res, err := p.exec("exit", `{"command":["false"]}`, nil)
	failsFor(t, err, `ended with status 3: "no such thing \"quoted\""`)
	if res.Found["exit"] != "3" || p.kept("exit", "stderr") == "" {
		t.Errorf("found %v", res.Found)
	}

	for _, where := range []string{"stdout", "stderr"} {
		p.onExec(func(_ conformance.Command, stdout, stderr io.Writer) int {
			to := map[string]io.Writer{"stdout": stdout, "stderr": stderr}[where]
			for {
				if _, err := to.Write(make([]byte, 1000)); err != nil {
					return 0
				}
			}
		})
		began := time.Now()
		_, err = p.exec("flood-"+where, `{"command":["yes"],"output":"64KiB"}`, nil)
		failsFor(t, err, "said more than is kept (64KiB)")
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s without an end held the step for %s", where, took)
		}
		if got := len(p.kept("flood-"+where, where)); got != 64<<10 {
			t.Errorf("of %s without an end %d bytes are kept", where, got)
		}
	}

	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	p.onExec(func(_ conformance.Command, stdout, _ io.Writer) int {
		fmt.Fprintln(stdout, "begun")
		<-hang
		return 0
	})
	began := time.Now()
	_, err = p.exec("hang", `{"command":["sleep","1d"],"timeout":"200ms"}`, nil)
	failsFor(t, err, "did not end within its timeout")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a command that hangs held the step for %s", took)
	}
	if got := p.kept("hang", "stdout"); got != "begun\n" {
		t.Errorf("kept %q", got)
	}
}

// The container is known by its id, before the command and after it.
func TestExecInPodInAnotherContainer(t *testing.T) {
	other := strings.Repeat("f", 64)
	p := newInPod(t, nil)
	p.setContainer(other)
	_, err := p.exec("before", `{"command":["ps"]}`, nil)
	if status, _, _, _ := responders.Classify(err); status != broker.Nothing || len(p.commands()) > 0 {
		t.Errorf("in the replacement of the alert's container: %v, executed %q", err, p.commands())
	}
	if _, err := p.store.Case("before"); !errors.Is(err, evidence.ErrNoCase) {
		t.Errorf("there is a case of what was not run: %v", err)
	}

	p.setContainer(podContainer)
	p.onExec(func(conformance.Command, io.Writer, io.Writer) int {
		p.setContainer(other)
		return 0
	})
	_, err = p.exec("meanwhile", `{"command":["ps"]}`, nil)
	failsFor(t, err, "container main was restarted meanwhile")

	p.setContainer(podContainer)
	pod := p.pod.DeepCopy()
	pod.ResourceVersion = ""
	pod.Status.ContainerStatuses[1].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
	if _, err = p.server.Admin().CoreV1().Pods("shop").UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	ran := len(p.commands())
	_, err = p.exec("ended", `{"command":["ps"]}`, nil)
	if status, _, _, _ := responders.Classify(err); status != broker.Nothing || len(p.commands()) != ran {
		t.Errorf("in a container that has ended: %v, executed %q", err, p.commands())
	}
}

// A command that may have begun is not run again.
func TestExecInPodOnce(t *testing.T) {
	p := newInPod(t, nil)
	req := p.request("exec-in-pod", "cut-off", `{"command":["ps"]}`, nil)
	c, err := p.store.Begin(t.Context(), evidence.About{Step: "cut-off", Alert: req.Step.AlertID, Rule: "r", Responder: "exec-in-pod", Target: podContainer + " r"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Add(t.Context(), "command.json", strings.NewReader("{}"), -1); err != nil {
		t.Fatal(err)
	}
	// The process is killed here: another one opens the store.
	dir := filepath.Dir(c.Path())
	if p.env.Evidence, err = evidence.Open(evidence.Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	p.store = p.env.Evidence
	_, err = p.responder("exec-in-pod").Act(t.Context(), req)
	failsFor(t, err, "it is not run again")
	if got := p.commands(); len(got) != 0 {
		t.Errorf("it was run again: %q", got)
	}
}

// What could not be kept is not run.
func TestExecInPodWithoutRoom(t *testing.T) {
	p := newInPod(t, nil)
	var err error
	if p.env.Evidence, err = evidence.Open(evidence.Config{Dir: filepath.Join(t.TempDir(), "evidence"), Size: 4096}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.env.Evidence.Close() })
	_, err = p.exec("s1", `{"command":["ps"]}`, nil)
	if status, _, _, _ := responders.Classify(err); status != broker.Refused || len(p.commands()) > 0 {
		t.Errorf("without room for evidence: %v, executed %q", err, p.commands())
	}
	p.env.Evidence = p.store
	for i := range 10 {
		if _, err := p.exec(fmt.Sprintf("s%d", i), `{"command":["ps"]}`, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err = p.exec("more", `{"command":["ps"]}`, nil)
	if status, _, _, _ := responders.Classify(err); status != broker.Refused || len(p.commands()) != 10 {
		t.Errorf("with evidence.perTarget: 10, the eleventh: %v, executed %d", err, len(p.commands()))
	}
}

// execAnswering stands in front of the API server and answers what executes in its place.
type execAnswering struct {
	next   http.RoundTripper
	answer func(req *http.Request, next http.RoundTripper) (*http.Response, error)
}

func (a execAnswering) RoundTrip(req *http.Request) (*http.Response, error) {
	if strings.HasSuffix(req.URL.Path, "/exec") {
		return a.answer(req, a.next)
	}
	return a.next.RoundTrip(req)
}

// What the API server did not begin is tried again; what it may have begun is not.
func TestExecInPodThatBreaks(t *testing.T) {
	refused := func(code int) func(*http.Request, http.RoundTripper) (*http.Response, error) {
		return func(*http.Request, http.RoundTripper) (*http.Response, error) {
			return nil, &httpstream.UpgradeFailureError{Cause: apiError(code)}
		}
	}
	for name, c := range map[string]struct {
		answer func(*http.Request, http.RoundTripper) (*http.Response, error)
		retry  bool
		kept   bool
	}{
		"503": {refused(http.StatusServiceUnavailable), true, false},
		"429": {refused(http.StatusTooManyRequests), true, false},
		"403": {refused(http.StatusForbidden), false, false},
		"answer lost": {func(req *http.Request, next http.RoundTripper) (*http.Response, error) {
			resp, err := next.RoundTrip(req)
			if err != nil {
				return nil, err
			}
			resp.Body.Close()
			return nil, io.ErrUnexpectedEOF
		}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newInPod(t, func(next http.RoundTripper) http.RoundTripper { return execAnswering{next, c.answer} })
			_, err := p.exec("s1", `{"command":["ps"]}`, nil)
			if _, retry, _, reason := responders.Classify(err); err == nil || retry != c.retry {
				t.Errorf("%v (%s): retry %t, want %t", err, reason, retry, c.retry)
			}
			if _, err := p.store.Case("s1"); (err == nil) != c.kept {
				t.Errorf("the case: %v, want one: %t", err, c.kept)
			}
		})
	}
}

// Where no WebSocket gets through, SPDY does.
func TestExecInPodOverSPDY(t *testing.T) {
	sockets := 0
	wrap := func(next http.RoundTripper) http.RoundTripper {
		return execAnswering{next, func(req *http.Request, next http.RoundTripper) (*http.Response, error) {
			if req.Method == http.MethodGet {
				sockets++
				return nil, &httpstream.UpgradeFailureError{Cause: websocket.ErrBadHandshake}
			}
			return next.RoundTrip(req)
		}}
	}
	p := newInPod(t, wrap)
	p.server.OnUpgrade(t, func(w http.ResponseWriter, r *http.Request) { spdyExec(t, w, r) })
	res, err := p.exec("s1", `{"command":["ps","aux"]}`, nil)
	if err != nil || res.Found["exit"] != "0" || p.kept("s1", "stdout") != "ps aux over SPDY" || sockets != 1 {
		t.Errorf("%+v, %v, %d WebSockets", res, err, sockets)
	}
}

// spdyExec is the API server's end of version 4 over SPDY.
func spdyExec(t *testing.T, w http.ResponseWriter, r *http.Request) {
	if _, err := httpstream.Handshake(r, w, []string{remotecommand.StreamProtocolV4Name}); err != nil {
		t.Error(err)
		return
	}
	streams := make(chan httpstream.Stream, 3)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, _ <-chan struct{}) error {
		streams <- s
		return nil
	})
	if conn == nil {
		t.Error("no upgrade")
		return
	}
	defer conn.Close()
	byType := map[string]httpstream.Stream{}
	for range 3 {
		s := <-streams
		byType[s.Headers().Get(corev1.StreamType)] = s
	}
	fmt.Fprintf(byType[corev1.StreamTypeStdout], "%s over SPDY", strings.Join(r.URL.Query()["command"], " "))
	fmt.Fprint(byType[corev1.StreamTypeError], `{"status":"Success"}`)
	for _, s := range byType {
		s.Close()
	}
	<-conn.CloseChan()
}

func apiError(code int) error {
	return apierrors.NewGenericServerResponse(code, "get", corev1.Resource("pods/exec"), "web-0", "no", 0, true)
}
