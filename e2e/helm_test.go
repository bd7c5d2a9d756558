package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

const chart = "../charts/stoop"

// helm is Helm as people run it, on the real API server.
type helm struct {
	t               *testing.T
	bin, kubeconfig string
}

func newHelm(t *testing.T) helm {
	t.Helper()
	bin, err := kube.Helm(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return helm{t, bin, shared.cluster.AdminKubeconfig(t)}
}

func (h helm) run(args ...string) string {
	h.t.Helper()
	cmd := exec.CommandContext(h.t.Context(), h.bin, append(args, "--namespace", kube.AccountNamespace, "--kubeconfig", h.kubeconfig)...)
	home := h.t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		h.t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}

// objects are those of a manifest; namespaced ones without a namespace are in the
// release's.
func objects(t *testing.T, manifest string) []*unstructured.Unstructured {
	t.Helper()
	var out []*unstructured.Unstructured
	for docs := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(manifest))); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		var o unstructured.Unstructured
		if err := yaml.Unmarshal(doc, &o.Object); err != nil {
			t.Fatalf("%v:\n%s", err, doc)
		}
		if len(o.Object) == 0 {
			continue
		}
		clusterWide := strings.HasPrefix(o.GetKind(), "Cluster") || strings.HasPrefix(o.GetKind(), "ValidatingAdmission") || o.GetKind() == "Namespace"
		if o.GetNamespace() == "" && !clusterWide {
			o.SetNamespace(kube.AccountNamespace)
		}
		out = append(out, &o)
	}
}

// monitoringKinds teaches the API server the kinds of the Prometheus operator, as far
// as an object of them can be stored.
func monitoringKinds(t *testing.T) {
	t.Helper()
	for plural, kind := range map[string]string{"podmonitors": "PodMonitor", "prometheusrules": "PrometheusRule"} {
		var o unstructured.Unstructured
		err := yaml.Unmarshal(fmt.Appendf(nil, `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: %[1]s.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {plural: %[1]s, singular: %[2]s, kind: %[3]s}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, x-kubernetes-preserve-unknown-fields: true}}}}
`, plural, strings.ToLower(kind), kind), &o.Object)
		if err != nil {
			t.Fatal(err)
		}
		shared.cluster.Make(t, &o)
	}
}

// What the chart renders from every values file of CI passes all checks of the API
// server (Helm's own dry run lets much of it pass).
func TestChartIsValid(t *testing.T) {
	c, h := shared.cluster, newHelm(t)
	for _, ns := range []string{kube.AccountNamespace, "shop", "web", "stoop-demo"} {
		c.Namespace(t, ns)
	}
	monitoringKinds(t)
	files, err := filepath.Glob(filepath.Join(chart, "ci", "*.yaml"))
	if err != nil || len(files) < 5 {
		t.Fatalf("the values files are %q, %v", files, err)
	}
	for _, file := range files {
		all := objects(t, h.run("template", "stoop", chart, "--values", file))
		for _, o := range all {
			harness.Eventually(t, soon, 0, func() (bool, string) {
				err := c.Validate(t.Context(), o)
				// The API server takes a moment to serve a new kind.
				if apierrors.IsNotFound(err) && strings.Contains(o.GetAPIVersion(), "coreos.com") {
					return false, err.Error()
				}
				if err != nil {
					t.Errorf("%s: %v", file, err)
				}
				return true, ""
			})
		}
		if len(all) < 7 {
			t.Errorf("%s makes %d objects", file, len(all))
		}
	}
	// It would be told.
	wrong := objects(t, h.run("template", "stoop", chart, "--show-only", "templates/daemonset.yaml"))[0]
	if err := unstructured.SetNestedField(wrong.Object, "Never", "spec", "template", "spec", "restartPolicy"); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(t.Context(), wrong); err == nil {
		t.Error("a wrong DaemonSet passes: nothing is checked")
	}
}

// Installed, upgraded, rolled back and uninstalled by Helm; in between a stoop with
// the token of the chart's service account, its rules and its configuration does its
// job, and no more.
func TestHelm(t *testing.T) {
	c, h := shared.cluster, newHelm(t)
	c.Namespace(t, kube.AccountNamespace)
	ns, nodeA, nodeB := c.Namespace(t, kube.Name("ns")), c.Node(t), c.Node(t)
	const release = "stoop"

	h.run("install", release, chart, "--set", "mode=enforce", "--set", "enforce={delete-pod-on-critical}")
	first := objects(t, h.run("get", "manifest", release))
	allThere(t, first, true)
	pod := chartPod(t)
	if got := names(pod); !slices.Equal(got, []string{"prepare", "hold", "stoop", "falco"}) {
		t.Errorf("the pod's containers are %q", got)
	}
	// An API server that does not know sidecars drops what makes one.
	for _, init := range pod.InitContainers[1:] {
		if init.RestartPolicy == nil || *init.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			t.Errorf("%s is no sidecar", init.Name)
		}
	}

	ofA, ofB := c.OnNode(t, pod.ServiceAccountName, nodeA), c.OnNode(t, pod.ServiceAccountName, nodeB)
	onB := c.Pod(t, ns, "b", nodeB, nil)
	remove := func(dry ...string) error {
		return kube.ClientOf(t, ofA).CoreV1().Pods(ns).Delete(t.Context(), onB.Name, metav1.DeleteOptions{DryRun: dry, GracePeriodSeconds: new(int64(0))})
	}
	harness.Eventually(t, soon, 0, func() (bool, string) {
		err := remove(metav1.DryRunAll)
		other := kube.ClientOf(t, ofB).CoreV1().Pods(ns).Delete(t.Context(), onB.Name, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
		return apierrors.IsForbidden(err) && strings.Contains(err.Error(), "stoop's token is of") && other == nil,
			fmt.Sprintf("roles and policies to hold: %v; %v", err, other)
	})
	if err := remove(); !apierrors.IsForbidden(err) {
		t.Errorf("the token of one node deletes a pod of another: %v", err)
	}
	wantAlive(t, c, onB)

	rulesMap, rules := mounted(t, pod, "rules.yaml")
	_, config := mounted(t, pod, "stoop.yaml")
	s := program.New(t, program.Options{
		Bin: shared.bin, Node: nodeA, Kubeconfig: c.Kubeconfig(t, ofA), Mode: string(broker.Enforce),
		Rules: rules, Config: configuration(t, config),
	})
	s.Start("POD_NAMESPACE="+kube.AccountNamespace, "POD_NAME=stoop-a")
	onA := c.Deployment(t, ns, "shop", nodeA, 3)[0]
	id := s.Send(program.Critical("Something critical", onA))
	wantStatus(t, s.WaitOutcome(id, "delete-pod", soon), broker.Done)
	wantStatus(t, s.WaitOutcome(id, "capture-manifest", soon), broker.Done)
	c.WaitGone(t, onA, soon)
	// What is not named in enforce is only told.
	visited := c.Pod(t, ns, "visited", nodeA, nil)
	alert := program.Critical("Terminal shell in container", visited)
	alert.Priority = "Notice"
	wantStatus(t, s.WaitOutcome(s.Send(alert), "label-pod", soon), broker.Audited)
	s.Stop()

	// Rules that delete nothing: the pods get them by another name, and the right to
	// delete is gone.
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte("rules:\n  - name: mark\n    match: {priority: critical}\n    actions: [{label-pod: {labels: {a: b}}}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("upgrade", release, chart, "--set", "mode=enforce", "--values", values)
	second := objects(t, h.run("get", "manifest", release))
	allThere(t, second, true)
	if name, got := mounted(t, chartPod(t), "rules.yaml"); name == rulesMap || !strings.Contains(got, "name: mark") {
		t.Errorf("the changed rules, in %s after %s, are %s", name, rulesMap, got)
	}
	byB := func() error {
		return kube.ClientOf(t, ofB).CoreV1().Pods(ns).Delete(t.Context(), onB.Name, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
	}
	harness.Eventually(t, soon, 0, func() (bool, string) {
		err := byB()
		return apierrors.IsForbidden(err), fmt.Sprintf("the right to delete to be gone: %v", err)
	})

	h.run("rollback", release, "1")
	allThere(t, first, true)
	if name, _ := mounted(t, chartPod(t), "rules.yaml"); name != rulesMap {
		t.Errorf("rolled back, the rules are %s, before they were %s", name, rulesMap)
	}
	harness.Eventually(t, soon, 0, func() (bool, string) {
		err := byB()
		return err == nil, fmt.Sprintf("the right to delete to be back: %v", err)
	})

	h.run("uninstall", release)
	allThere(t, append(first, second...), false)
}

// allThere checks that each of the objects is in the API server, or is not.
func allThere(t *testing.T, objects []*unstructured.Unstructured, want bool) {
	t.Helper()
	for _, o := range objects {
		harness.Eventually(t, soon, 0, func() (bool, string) {
			got, err := shared.cluster.There(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			return (got != nil) == want, fmt.Sprintf("%s %s/%s to be there: %t", o.GetKind(), o.GetNamespace(), o.GetName(), want)
		})
	}
}

// chartPod is the pod of the DaemonSet that is installed.
func chartPod(t *testing.T) *corev1.PodSpec {
	t.Helper()
	d, err := shared.cluster.Client.AppsV1().DaemonSets(kube.AccountNamespace).Get(t.Context(), "stoop", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return &d.Spec.Template.Spec
}

func names(pod *corev1.PodSpec) (out []string) {
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		out = append(out, c.Name)
	}
	return out
}

// mounted is the ConfigMap that a file of the pod's configuration is of, and what the
// file holds.
func mounted(t *testing.T, pod *corev1.PodSpec, file string) (configMap, text string) {
	t.Helper()
	for _, v := range pod.Volumes {
		if v.Name != "config" {
			continue
		}
		for _, s := range v.Projected.Sources {
			m, err := shared.cluster.Client.CoreV1().ConfigMaps(kube.AccountNamespace).Get(t.Context(), s.ConfigMap.Name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if text, ok := m.Data[file]; ok {
				return m.Name, text
			}
		}
	}
	t.Fatalf("the pod does not mount %s", file)
	return "", ""
}

// configuration is the chart's stoop.yaml without what the harness says itself.
func configuration(t *testing.T, text string) string {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal([]byte(text), &config); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"http", "source", "mode"} {
		if config[key] == nil {
			t.Errorf("the chart's stoop.yaml has no %s", key)
		}
		delete(config, key)
	}
	var out strings.Builder
	for key, value := range config {
		b, err := json.Marshal(value) // which is YAML
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%s: %s\n", key, b)
	}
	return out.String()
}
