package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// chart is what stoop is installed with, as the chart does it.
type chart struct {
	Helm  string // the program
	Chart string // its folder
	Image string // the archive that make image makes
	Falco string // what stands in for Falco
}

const (
	chartNamespace = "stoop"
	chartVersion   = "0.1.0"
	nextVersion    = "0.2.0" // the same image by another name
	stoopImage     = "localhost/stoop"
	falcoImage     = "stoop.invalid/falco"
	// apiServiceIP is what pods reach the API server by.
	apiServiceIP = "10.96.0.1"
	alertRate    = 500 // a second
)

// buildChart builds what there is network for only outside.
func buildChart(t harness.T) *chart {
	t.Helper()
	if _, err := kube.Binaries(t.Context(), t.Logf, kube.Kubelet, kube.ControllerManager); err != nil {
		t.Fatalf("%v", err)
	}
	helm, err := kube.Helm(t.Context())
	if err != nil {
		t.Fatalf("%v", err)
	}
	dir := t.TempDir()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatalf("%v", err)
	}
	c := &chart{
		Helm: helm, Chart: filepath.Join(root, "charts", "stoop"),
		Image: filepath.Join(dir, "stoop_"+chartVersion+"_image.tar"), Falco: filepath.Join(dir, "falco"),
	}
	for _, b := range []struct {
		in   string
		args []string
	}{
		{filepath.Join(root, "tools"), []string{"run", "./release", "-version", chartVersion, "-arch", "amd64", "-out", dir, "image"}},
		{filepath.Join(root, "e2e"), []string{"build", "-o", c.Falco, "./cmd/falco"}},
	} {
		cmd := exec.CommandContext(t.Context(), "go", b.args...)
		cmd.Dir = b.in
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(b.args, " "), err, out)
		}
	}
	return c
}

// chartRules contain a suspect, and only freeze another.
const chartRules = `
mode: enforce
enforce: [contain, freeze]
rules:
  - name: contain
    match: {rule: E2E chain}
    actions:
      - freeze-container
      - cut-network
      - delete-pod: {gracePeriod: 1s, force: true}
  - name: freeze
    match: {rule: E2E freeze}
    actions: [freeze-container]
`

// installed installs stoop by the chart, with what stands in for Falco; has it contain
// suspects; kills it, and upgrades it, while alerts come, and counts them.
func (r *rig) installed() {
	r.Helper()
	r.reachable()
	r.controllers()
	r.images()
	values := r.write("values.yaml", chartRules+fmt.Sprintf(`
image: {repository: %s, pullPolicy: Never}
node: {responders: true}
data: {path: %s}
priorityClassName: system-node-critical
falco:
  image: {repository: %s, tag: %q, pullPolicy: Never}
  capabilities: [DAC_OVERRIDE] # what Falco itself needs besides, not every machine may grant
  args: [-rate, "%d"]
  resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
`, stoopImage, r.path("data"), falcoImage, chartVersion, alertRate))
	r.helm("install", "stoop", r.Chart.Chart, "--values", values, "--set", "image.tag="+chartVersion)
	began := time.Now()
	pod := r.ready("")
	r.Logf("the DaemonSet's pod is ready %s after helm install", time.Since(began).Round(10*time.Millisecond))
	r.processes()
	r.contained(pod)

	for n := range 10 {
		r.killStoop()
		time.Sleep(time.Duration(200+100*n) * time.Millisecond) // some of them early
	}
	harness.Eventually(r, 60*time.Second, 100*time.Millisecond, func() (bool, string) {
		return isReady(r.pod(pod.Name)), "stoop to be ready after it was killed ten times"
	})
	r.helm("upgrade", "stoop", r.Chart.Chart, "--values", values, "--set", "image.tag="+nextVersion)
	next := r.ready(pod.Name)
	if got := container(next, "stoop").Image; got != stoopImage+":"+nextVersion {
		r.Fatalf("after the upgrade stoop is %s", got)
	}
	time.Sleep(2 * time.Second)
	r.helm("uninstall", "stoop")
	harness.Eventually(r, 60*time.Second, 100*time.Millisecond, func() (bool, string) {
		return r.pod(next.Name) == nil, "the pod to be gone after helm uninstall"
	})
	r.counted()
}

// reachable lets pods reach the API server, which is on the node's loopback, by its
// Service's address: no kube-proxy runs here.
func (r *rig) reachable() {
	r.Helper()
	if err := r.tool("ip", "addr", "add", apiServiceIP+"/32", "dev", "node0"); err != nil {
		r.Fatalf("%v", err)
	}
	u, err := url.Parse(r.cluster.URL())
	if err != nil {
		r.Fatalf("%v", err)
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(apiServiceIP, "443"))
	if err != nil {
		r.Fatalf("%v", err)
	}
	r.Cleanup(func() { ln.Close() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", u.Host)
				if err != nil {
					return
				}
				defer out.Close()
				go func() { _, _ = io.Copy(out, in); out.Close() }()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
}

// controllers are those that make a DaemonSet's pods and the namespaces' certificates.
// What binds pods to the only node is here.
func (r *rig) controllers() {
	r.Helper()
	bin, err := kube.Binaries(r.Context(), r.Logf, kube.Kubelet, kube.ControllerManager)
	if err != nil {
		r.Fatalf("%v", err)
	}
	kubeconfig := r.cluster.AdminKubeconfig(r)
	r.start(filepath.Join(bin, kube.ControllerManager),
		"--kubeconfig="+kubeconfig, "--authentication-kubeconfig="+kubeconfig, "--authorization-kubeconfig="+kubeconfig,
		"--bind-address=127.0.0.1", "--leader-elect=false", "--root-ca-file="+r.cluster.CA(), "--cert-dir="+r.path("kcm-pki"),
		"--controllers=daemonset-controller,root-ca-certificate-publisher-controller,serviceaccount-controller,garbage-collector-controller")
	r.cluster.Namespace(r, chartNamespace)
	go func() {
		pods := r.cluster.Client.CoreV1().Pods(chartNamespace)
		for r.Context().Err() == nil {
			time.Sleep(50 * time.Millisecond)
			list, err := pods.List(r.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName="})
			if err != nil {
				continue
			}
			for _, p := range list.Items {
				_ = pods.Bind(r.Context(), &corev1.Binding{ // tried again, if it has to be
					ObjectMeta: metav1.ObjectMeta{Name: p.Name, UID: p.UID}, Target: corev1.ObjectReference{Kind: "Node", Name: nodeName},
				}, metav1.CreateOptions{})
			}
		}
	}()
}

// images imports stoop's, as make image makes it, by two names, and what stands in
// for Falco's.
func (r *rig) images() {
	r.Helper()
	ctr := func(args ...string) {
		if err := r.tool("ctr", append([]string{"-a", containerd, "-n", "k8s.io", "images"}, args...)...); err != nil {
			r.Fatalf("%v", err)
		}
	}
	ctr("import", r.Chart.Image)
	ctr("tag", stoopImage+":"+chartVersion, stoopImage+":"+nextVersion)
	archive := r.path("falco.tar")
	if err := writeImageOf(archive, falcoImage+":"+chartVersion, "usr/bin/falco", r.Chart.Falco, nil); err != nil {
		r.Fatalf("%v", err)
	}
	ctr("import", archive)
}

func (r *rig) helm(args ...string) {
	r.Helper()
	cmd := exec.CommandContext(r.Context(), r.Chart.Helm, append(args, "--namespace", chartNamespace, "--kubeconfig", r.cluster.AdminKubeconfig(r))...)
	home := r.path("helm/home")
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	if out, err := cmd.CombinedOutput(); err != nil {
		r.Fatalf("helm %s: %v\n%s", args[0], err, out)
	}
}

func (r *rig) pod(name string) *corev1.Pod {
	r.Helper()
	return r.cluster.Get(r, chartNamespace, name)
}

func isReady(pod *corev1.Pod) bool {
	return pod != nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// ready waits for the DaemonSet's pod to be ready, another than the one named.
func (r *rig) ready(not string) *corev1.Pod {
	r.Helper()
	var found *corev1.Pod
	harness.Eventually(r, 2*time.Minute, 50*time.Millisecond, func() (bool, string) {
		list, err := r.cluster.Client.CoreV1().Pods(chartNamespace).List(r.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=stoop"})
		if err != nil {
			return false, err.Error()
		}
		says := "there is none"
		for i := range list.Items {
			p := &list.Items[i]
			if p.Name == not || p.DeletionTimestamp != nil {
				continue
			}
			if isReady(p) {
				found = p
				return true, ""
			}
			b, err := json.Marshal(p.Status)
			says = fmt.Sprint(string(b), err)
		}
		return false, "the DaemonSet's pod to be ready: " + says
	})
	return found
}

func container(pod *corev1.Pod, name string) *corev1.Container {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return &corev1.Container{}
}

// stoopPID is the process that runs stoop in the pod; 0: there is none now.
func stoopPID(command string) int {
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0
	}
	for _, path := range found {
		b, err := os.ReadFile(path)
		if err == nil && strings.HasPrefix(strings.ReplaceAll(string(b), "\x00", " "), command) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err == nil {
				return pid
			}
		}
	}
	return 0
}

const (
	runs  = "/usr/bin/stoop run "
	holds = "/usr/bin/stoop-hold "
)

// processes says what the pod's processes take.
func (r *rig) processes() {
	r.Helper()
	hold, err := harness.Resident(stoopPID(holds))
	if err != nil {
		r.Fatalf("what holds the FIFO: %v", err)
	}
	if hold > 8<<20 {
		r.Fatalf("what holds the FIFO takes %d bytes", hold)
	}
	stoop, err := harness.Resident(stoopPID(runs))
	if err != nil {
		r.Fatalf("stoop: %v", err)
	}
	r.Logf("resident in the pod: stoop %.1f MiB, what holds the FIFO %.1f MiB", float64(stoop)/(1<<20), float64(hold)/(1<<20))
}

// killStoop kills it, and waits until the kubelet has started it again.
func (r *rig) killStoop() {
	r.Helper()
	pid := stoopPID(runs)
	if pid == 0 {
		r.Fatalf("stoop does not run")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		r.Fatalf("kill stoop: %v", err)
	}
	harness.Eventually(r, 60*time.Second, 20*time.Millisecond, func() (bool, string) {
		now := stoopPID(runs)
		return now != 0 && now != pid, "the kubelet to start stoop again"
	})
}

// contained has one suspect frozen, and another frozen, cut off and deleted, by alerts
// written into the pod's FIFO.
func (r *rig) contained(pod *corev1.Pod) {
	r.Helper()
	fifo := r.path(fmt.Sprintf("kubelet/pods/%s/volumes/kubernetes.io~empty-dir/pipe/falco.pipe", pod.UID))
	say := func(a program.Alert) {
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		if err != nil {
			r.Fatalf("open the pod's FIFO: %v", err)
		}
		defer f.Close()
		if _, err := f.Write(a.Line()); err != nil {
			r.Fatalf("write an alert: %v", err)
		}
	}
	one := r.newSuspect()
	say(one.alert("E2E freeze"))
	harness.Eventually(r, soon, 10*time.Millisecond, func() (bool, string) {
		before := one.count()
		time.Sleep(300 * time.Millisecond)
		return one.count() == before, "the suspect to be frozen by the pod's stoop"
	})
	two := r.newSuspect()
	say(two.alert("E2E chain"))
	r.cluster.WaitGone(r, two.pod, 60*time.Second)
	out, err := exec.CommandContext(r.Context(), r.Stoop, "history", "-o", "json", "--data", r.path("data")).Output()
	if err != nil {
		r.Fatalf("stoop history: %v", err)
	}
	done := map[string]bool{}
	for lines := json.NewDecoder(strings.NewReader(string(out))); ; {
		var o broker.Outcome
		if err := lines.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			r.Fatalf("stoop history: %v", err)
		}
		if o.Status == broker.Done {
			done[o.Rule+" "+o.Responder] = true
		}
	}
	for _, want := range []string{"freeze freeze-container", "contain freeze-container", "contain cut-network", "contain delete-pod"} {
		if !done[want] {
			r.Fatalf("%s was not done:\n%s", want, out)
		}
	}
	r.Logf("one suspect was frozen, another frozen, cut off and deleted, by the stoop of the pod")
}

// counted compares the alerts that are stored with those that were written.
func (r *rig) counted() {
	r.Helper()
	b, err := broker.Open(r.Context(), broker.Config{Dir: r.path("data"), ReadOnly: true})
	if err != nil {
		r.Fatalf("open the store: %v", err)
	}
	defer b.Close()
	conn, err := b.Connect("e2e")
	if err != nil {
		r.Fatalf("%v", err)
	}
	js, err := jetstream.New(conn)
	if err != nil {
		r.Fatalf("%v", err)
	}
	stream, err := js.Stream(r.Context(), broker.StreamAlerts)
	if err != nil {
		r.Fatalf("%v", err)
	}
	info, err := stream.Info(r.Context())
	if err != nil {
		r.Fatalf("%v", err)
	}
	consumer, err := stream.OrderedConsumer(r.Context(), jetstream.OrderedConsumerConfig{})
	if err != nil {
		r.Fatalf("%v", err)
	}
	seen, last := map[string]map[int]bool{}, map[string]int{}
	twice := 0
	for n := uint64(0); n < info.State.Msgs; n++ {
		m, err := consumer.Next(jetstream.FetchMaxWait(10 * time.Second))
		if err != nil {
			r.Fatalf("read the stored alerts: %v after %d of %d", err, n, info.State.Msgs)
		}
		var a struct {
			Rule   string `json:"rule"`
			Fields struct {
				Writer string `json:"e2e.writer"`
				Number int    `json:"e2e.number"`
			} `json:"output_fields"`
		}
		if err := json.Unmarshal(m.Data(), &a); err != nil {
			r.Fatalf("a stored alert: %v", err)
		}
		switch w := a.Fields.Writer; a.Rule {
		case "E2E last":
			last[w] = a.Fields.Number
		case "E2E numbered":
			if seen[w] == nil {
				seen[w] = map[int]bool{}
			}
			if seen[w][a.Fields.Number] {
				twice++
			}
			seen[w][a.Fields.Number] = true
		}
	}
	if len(last) != 2 || len(seen) != 2 {
		r.Fatalf("there were %d writers, of which %d said how many they wrote, want 2", len(seen), len(last))
	}
	all := 0
	for w, total := range last {
		all += total
		if len(seen[w]) != total {
			r.Fatalf("of %d alerts that %s wrote %d are stored", total, w, len(seen[w]))
		}
	}
	r.Logf("all of %d alerts at %d a second are stored, %d of them twice, over ten kills and an upgrade", all, alertRate, twice)
}
