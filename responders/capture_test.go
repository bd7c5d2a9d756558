package responders_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/responders"
	"stoop/responders/conformance"
)

// capturing is a responder that keeps evidence of a pod of a small API server.
type capturing struct {
	testing.TB
	name  string
	world *conformance.Server
	store *evidence.Store
	dir   string
	pod   *corev1.Pod
	steps int
}

func newCapturing(t testing.TB, name string, statuses ...corev1.ContainerStatus) *capturing {
	t.Helper()
	c := &capturing{TB: t, name: name, world: conformance.NewServer(t), dir: filepath.Join(t.TempDir(), "evidence")}
	var err error
	if c.store, err = evidence.Open(evidence.Config{Dir: c.dir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.store.Close() })
	c.pod = c.newPod(statuses)
	return c
}

func (c *capturing) newPod(statuses []corev1.ContainerStatus) *corev1.Pod {
	pods := c.world.Admin().CoreV1().Pods("shop")
	pod, err := pods.Create(c.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-0"}}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	pod.Status.ContainerStatuses = statuses
	if pod, err = pods.UpdateStatus(c.Context(), pod, metav1.UpdateOptions{}); err != nil {
		c.Fatal(err)
	}
	return pod
}

// replace puts another pod in its place, as a StatefulSet does.
func (c *capturing) replace() {
	c.remove()
	c.newPod(c.pod.Status.ContainerStatuses)
}

func (c *capturing) remove() {
	err := c.world.Admin().CoreV1().Pods("shop").Delete(context.Background(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil {
		c.Error(err)
	}
}

// act has the responder act for an alert of a container.
func (c *capturing) act(container, params string) (responders.Result, error) {
	c.Helper()
	kube, err := responders.NewKube(rest.CopyConfig(c.world.Config()))
	if err != nil {
		c.Fatal(err)
	}
	i := slices.IndexFunc(responders.All(), func(e responders.Entry) bool { return e.Name == c.name })
	r := responders.All()[i].New(responders.Env{Kube: kube, Evidence: c.store})
	line := []byte(`{"rule":"R","priority":"Critical","output":"<b>"}`)
	a, err := alert.Parse(line)
	if err != nil {
		c.Fatal(err)
	}
	c.steps++
	s := &broker.Step{ID: fmt.Sprintf("s%d", c.steps), AlertID: a.ID, Alert: line, Rule: "r", Action: broker.Action{Responder: c.name, Params: []byte(params)}}
	return r.Act(c.Context(), &responders.Request{
		Step: s, Alert: a, Pod: responders.SlimPod(c.pod),
		Target: alert.Target{Namespace: "shop", Pod: "web-0", UID: string(c.pod.UID), Container: container},
	})
}

// kept is the last step's case, which is as its manifest says.
func (c *capturing) kept() evidence.Manifest {
	c.Helper()
	step := fmt.Sprintf("s%d", c.steps)
	m, err := c.store.Case(step)
	if err != nil {
		c.Fatal(err)
	}
	if wrong, err := c.store.Verify(c.Context(), step); err != nil || len(wrong) > 0 {
		c.Errorf("verify: %q, %v", wrong, err)
	}
	if c.read("alert.json") != `{"rule":"R","priority":"Critical","output":"<b>"}` {
		c.Errorf("the alert is kept as %s", c.read("alert.json"))
	}
	if c.store.Used() != onDisk(c, c.dir) {
		c.Errorf("%d bytes are counted, %d are there", c.store.Used(), onDisk(c, c.dir))
	}
	return m
}

// onDisk is how many bytes files take, in blocks.
func onDisk(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += (info.Size() + 4095) / 4096 * 4096
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (c *capturing) read(name string) string {
	c.Helper()
	r, _, err := c.store.Read(fmt.Sprintf("s%d", c.steps), name)
	if err != nil {
		c.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		c.Fatal(err)
	}
	return string(b)
}

func pieces(m evidence.Manifest) string {
	var names []string
	for _, p := range m.Pieces {
		names = append(names, p.Name)
	}
	return strings.Join(names, " ")
}

// nothingKept fails the test if there is a case.
func (c *capturing) nothingKept() {
	c.Helper()
	if cases, err := c.store.Cases(); err != nil || len(cases) > 0 || c.store.Used() != 0 {
		c.Errorf("kept are %+v, %d bytes, %v", cases, c.store.Used(), err)
	}
}

func ran(name, id string, before string) corev1.ContainerStatus {
	s := corev1.ContainerStatus{Name: name, ContainerID: "containerd://" + id}
	if before != "" {
		s.RestartCount = 1
		s.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: "containerd://" + before}
	}
	return s
}

const (
	idMain = "aaaaaaaaaaaa1111"
	idWas  = "bbbbbbbbbbbb2222"
	idSide = "cccccccccccc3333"
)

func TestWhichLogsAreKept(t *testing.T) {
	for name, test := range map[string]struct {
		container, params, want string
		note                    string
	}{
		"the suspect's, and before its restart": {idMain, `{}`, "main.log main.previous.log alert.json", "main.log is of container containerd://" + idMain},
		"not before its restart":                {idMain[:12], `{"previous":false}`, "main.log alert.json", ""},
		"another's, which did not restart":      {idSide, `{}`, "side.log alert.json", ""},
		"all":                                   {idSide, `{"containers":"all"}`, "side.log main.log main.previous.log alert.json", ""},
		// The run before was the suspect: its log comes first, and also unasked.
		"the suspect before": {idWas, `{"previous":false}`, "main.previous.log main.log alert.json", "main.previous.log is of container containerd://" + idWas},
		"one that nobody knows any more": {
			"dddddddddddd4444", `{}`, "main.log main.previous.log side.log alert.json",
			"none that the pod tells of any more",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCapturing(t, "capture-logs", ran("main", idMain, idWas), ran("side", idSide, ""))
			c.world.OnLog(t, func(l conformance.Log, w io.Writer) {
				fmt.Fprintf(w, "%s previous %t of %s\n", l.Container, l.Previous, l.UID)
			})
			res, err := c.act(test.container, test.params)
			if err != nil || res.Nothing || strings.Contains(res.Reason, "whole") {
				t.Fatalf("%+v, %v", res, err)
			}
			m := c.kept()
			if pieces(m) != test.want || !strings.Contains(strings.Join(m.Notes, "\n"), test.note) {
				t.Errorf("kept are %s, notes %q", pieces(m), m.Notes)
			}
			for _, p := range m.Pieces[:len(m.Pieces)-1] {
				container, previous := strings.CutSuffix(strings.TrimSuffix(p.Name, ".log"), ".previous")
				if got, want := c.read(p.Name), fmt.Sprintf("%s previous %t of %s\n", container, previous, c.pod.UID); got != want || !p.Whole() {
					t.Errorf("%s is %q, want %q (%+v)", p.Name, got, want, p)
				}
			}
			if want := fmt.Sprintf("pod shop/web-0 uid %s", c.pod.UID); m.Target != want || m.Responder != "capture-logs" {
				t.Errorf("the case is about %q by %s", m.Target, m.Responder)
			}
		})
	}
}

// What a rule asks for reaches the kubelet.
func TestHowLogsAreAskedFor(t *testing.T) {
	for params, want := range map[string]string{
		`{}`:                         "container=main&limitBytes=16777217&tailLines=1000&timestamps=true",
		`{"tail":0,"since":"90m"}`:   "container=main&limitBytes=16777217&sinceSeconds=5400&timestamps=true",
		`{"tail":7,"since":"200ms"}`: "container=main&limitBytes=16777217&sinceSeconds=1&tailLines=7&timestamps=true",
	} {
		c := newCapturing(t, "capture-logs", ran("main", idMain, ""))
		asked := ""
		c.world.OnLog(t, func(l conformance.Log, _ io.Writer) { asked = l.Query.Encode() })
		if res, err := c.act(idMain, params); err != nil {
			t.Errorf("%+v, %v", res, err)
		}
		if asked != want {
			t.Errorf("%s: asked for %s, want %s", params, asked, want)
		}
		if got := c.read("main.log"); got != "" {
			t.Errorf("an empty log is kept as %q", got)
		}
	}
}

// While the log is read, the pod is deleted and another one of its name is made:
// the log may be that one's.
func TestTheLogOfAReplacementIsNotKept(t *testing.T) {
	c := newCapturing(t, "capture-logs", ran("main", idMain, ""))
	c.world.OnLog(t, func(_ conformance.Log, w io.Writer) {
		c.replace()
		fmt.Fprintln(w, "of the replacement")
	})
	res, err := c.act(idMain, `{"containers":"all"}`)
	if !errors.Is(err, responders.ErrGone) {
		t.Errorf("%+v, %v", res, err)
	}
	c.nothingKept()

	// What had been read before stays.
	c = newCapturing(t, "capture-logs", ran("main", idMain, idWas), ran("side", idSide, ""))
	asked := 0
	c.world.OnLog(t, func(l conformance.Log, w io.Writer) {
		if asked++; asked == 2 {
			c.replace()
		}
		fmt.Fprintln(w, "of", l.UID)
	})
	res, err = c.act(idMain, `{"containers":"all"}`)
	if err != nil || !strings.Contains(res.Reason, "not whole") || !strings.Contains(res.Reason, "replaced") {
		t.Errorf("%+v, %v", res, err)
	}
	m := c.kept()
	if pieces(m) != "main.log alert.json" || c.read("main.log") != fmt.Sprintln("of", c.pod.UID) || asked != 2 {
		t.Errorf("kept are %s after %d requests: %+v", pieces(m), asked, m)
	}
	if !strings.Contains(strings.Join(m.Notes, "\n"), "may be the replacement's") {
		t.Errorf("the notes are %q", m.Notes)
	}
}

func TestTheLogOfAPodThatWentMeanwhile(t *testing.T) {
	c := newCapturing(t, "capture-logs", ran("main", idMain, ""))
	c.world.OnLog(t, func(_ conformance.Log, w io.Writer) {
		c.remove()
		fmt.Fprintln(w, "its last words")
	})
	res, err := c.act(idMain, `{}`)
	if err != nil || !strings.Contains(res.Reason, "not proved") {
		t.Errorf("%+v, %v", res, err)
	}
	if p, ok := c.kept().Piece("main.log"); !ok || p.Whole() || !strings.Contains(p.Error, "not proved") || c.read("main.log") != "its last words\n" {
		t.Errorf("the piece is %+v", p)
	}
}

func TestLogsAreCut(t *testing.T) {
	c := newCapturing(t, "capture-logs", ran("main", idMain, idWas))
	line := strings.Repeat("x", 1023) + "\n"
	c.world.OnLog(t, func(_ conformance.Log, w io.Writer) {
		for range 40 << 10 { // 40 MiB
			if _, err := io.WriteString(w, line); err != nil {
				return
			}
		}
	})
	res, err := c.act(idMain, `{"maxSize":"1MiB"}`)
	if err != nil || !strings.Contains(res.Reason, "cut") {
		t.Errorf("%+v, %v", res, err)
	}
	m := c.kept()
	first, _ := m.Piece("main.log")
	second, _ := m.Piece("main.previous.log")
	if first.Size != 1<<20 || !first.Cut || second.Size != 0 || !second.Cut {
		t.Errorf("the pieces are %+v", m.Pieces)
	}
}

// A kubelet that says half and then nothing.
func TestALogThatHangs(t *testing.T) {
	c := newCapturing(t, "capture-logs", ran("main", idMain, ""))
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	c.world.OnLog(t, func(_ conformance.Log, w io.Writer) {
		fmt.Fprintln(w, "half")
		w.(interface{ Flush() }).Flush()
		<-release
	})
	began := time.Now()
	res, err := c.act(idMain, `{"timeout":"300ms"}`)
	if took := time.Since(began); err != nil || !strings.Contains(res.Reason, "deadline") || took > 10*time.Second {
		t.Errorf("%+v, %v after %s", res, err, took)
	}
	if p, _ := c.kept().Piece("main.log"); p.Whole() || c.read("main.log") != "half\n" {
		t.Errorf("the piece is %+v", p)
	}
}

// What the container's log can't be had for is said, and no case is made of it.
func TestNoLogToBeHad(t *testing.T) {
	c := newCapturing(t, "capture-logs")
	if res, err := c.act(idMain, `{}`); err == nil {
		t.Errorf("%+v", res)
	}
	c.nothingKept()
	// The kubelet has dropped the log of the run before.
	was := ran("main", idMain, "")
	was.RestartCount = 3
	c = newCapturing(t, "capture-logs", was)
	res, err := c.act(idMain, `{}`)
	if err != nil || !strings.Contains(res.Reason, "previous terminated container") {
		t.Errorf("%+v, %v", res, err)
	}
	if m := c.kept(); pieces(m) != "main.log alert.json" {
		t.Errorf("kept are %s", pieces(m))
	}
}

func TestEventsOfThePodAlone(t *testing.T) {
	c := newCapturing(t, "capture-events")
	if res, err := c.act("", `{}`); err != nil || !strings.Contains(res.Reason, "events: 0") || c.read("events.jsonl") != "" {
		t.Errorf("without any: %+v, %v", res, err)
	}
	for i := range 250 { // more than two pages
		newEvent(t, c.world, c.pod, fmt.Sprintf("e%d", i))
	}
	other := c.pod.DeepCopy()
	other.UID = "another"
	newEvent(t, c.world, other, "other")
	res, err := c.act("", `{}`)
	if err != nil || !strings.Contains(res.Reason, "events: 250") || strings.Contains(res.Reason, "whole") {
		t.Errorf("%+v, %v", res, err)
	}
	c.kept()
	got := c.read("events.jsonl")
	for i := range 250 {
		if !strings.Contains(got, fmt.Sprintf(`"message":"of e%d"`, i)) {
			t.Errorf("event %d is missing", i)
		}
	}
	if strings.Count(got, "\n") != 250 || strings.Contains(got, "another") {
		t.Errorf("%d lines are kept, another pod's event: %t", strings.Count(got, "\n"), strings.Contains(got, "another"))
	}
	res, err = c.act("", `{"maxSize":"1KiB"}`)
	if p, _ := c.kept().Piece("events.jsonl"); err != nil || !p.Cut || p.Size != 1024 || !strings.Contains(res.Reason, "cut") {
		t.Errorf("%+v, %v: %+v", res, err, p)
	}
}

func TestManifestWithoutSecrets(t *testing.T) {
	c := newCapturing(t, "capture-manifest")
	now := conformance.PodNow(t, c.world, c.pod)
	now.Annotations = map[string]string{
		"kubectl.kubernetes.io/last-applied-configuration": `{"spec":{"containers":[{"env":[{"name":"DB_PASSWORD","value":"hunter2"},{"name":"MODE","value":"fast"}]}]}}`,
		"note": "see https://bob:hunter2@example.com/x",
	}
	now.Spec.Containers = []corev1.Container{{
		Name: "main", Image: "example.com/main:1",
		Env: []corev1.EnvVar{
			{Name: "API_TOKEN", Value: "hunter2"},
			{Name: "MODE", Value: "slow"},
			{Name: "DB_DSN", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "db"}, Key: "password"}}},
			{Name: "URL", Value: "postgres://bob:hunter2@db/x"},
		},
		LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{HTTPHeaders: []corev1.HTTPHeader{{Name: "Authorization", Value: "Bearer hunter2"}}}}},
	}}
	owner, err := c.world.Admin().AppsV1().Deployments("shop").Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       appsv1.DeploymentSpec{Template: corev1.PodTemplateSpec{Spec: now.Spec}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "web", UID: owner.UID}}
	if _, err := c.world.Admin().CoreV1().Pods("shop").Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if res, err := c.act("", `{}`); err != nil {
		t.Fatalf("%+v, %v", res, err)
	}
	if m := c.kept(); pieces(m) != "pod.json owner-1-deployment.json alert.json" {
		t.Errorf("kept are %s", pieces(m))
	}
	for _, name := range []string{"pod.json", "owner-1-deployment.json"} {
		got := c.read(name)
		if strings.Contains(got, "hunter2") {
			t.Errorf("%s holds a secret: %s", name, got)
		}
		for _, want := range []string{`"<redacted, 7 bytes>"`, `"slow"`, `"postgres://<redacted>@db/x"`, `"key": "password"`, `"name": "db"`} {
			if !strings.Contains(got, want) {
				t.Errorf("%s does not hold %s: %s", name, want, got)
			}
		}
	}
	if got := c.read("pod.json"); !strings.Contains(got, "fast") {
		t.Errorf("what was applied is lost: %s", got)
	}
}

func TestOwnersUpTheChain(t *testing.T) {
	ref := func(apiVersion, kind, name string, uid types.UID) metav1.OwnerReference {
		return metav1.OwnerReference{APIVersion: apiVersion, Kind: kind, Name: name, UID: uid}
	}
	c := newCapturing(t, "capture-manifest")
	owned(t, c.world, c.pod)
	if _, err := c.act("", `{"owners":false}`); err != nil || pieces(c.kept()) != "pod.json alert.json" {
		t.Errorf("without owners: %s, %v", pieces(c.kept()), err)
	}
	if _, err := c.act("", `{}`); err != nil || pieces(c.kept()) != "pod.json owner-1-replicaset.json owner-2-deployment.json alert.json" {
		t.Errorf("kept are %s, %v", pieces(c.kept()), err)
	}
	secret, err := c.world.Admin().CoreV1().Secrets("shop").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"x": "hunter2"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	owners := []metav1.OwnerReference{
		ref("v1", "Secret", "s", secret.UID),
		ref("apps/v1", "Deployment", "web", "another"),
		ref("example.com/v1", "Thing", "x", "u3"),
		ref("apps/v1", "StatefulSet", "nothing", "u4"),
		ref("v1", "Pod", "web-0", c.pod.UID), // itself
	}
	for i := range 10 {
		owners = append(owners, ref("apps/v1", "StatefulSet", fmt.Sprint("n", i), types.UID(fmt.Sprint("n", i))))
	}
	own(t, c.world, c.pod, owners...)
	res, err := c.act("", `{}`)
	m := c.kept()
	if err != nil || pieces(m) != "pod.json alert.json" {
		t.Errorf("%+v, %v: kept are %s", res, err, pieces(m))
	}
	notes := strings.Join(m.Notes, "\n")
	for _, want := range []string{"Secret s is not kept: what secrets hold", "Deployment web is not kept: it is another one", "Thing x is not kept: the cluster serves no", "owners beyond 10"} {
		if !strings.Contains(notes, want) {
			t.Errorf("no note says %q: %q", want, m.Notes)
		}
	}
	if len(m.Notes) != 11 {
		t.Errorf("there are %d notes: %q", len(m.Notes), m.Notes)
	}
}
