// Package charts tests the Helm chart, with Helm itself and the program itself. It
// is a module of its own, so that neither Helm nor Prometheus is among what stoop is
// built from.
package charts

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

const (
	chart     = "stoop"
	namespace = "security"
	release   = "stoop"
)

// The programs that the tests run.
var programs struct{ helm, stoop string }

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "stoop-chart-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	// Minutes the first time, after which Go keeps the program.
	out, err := command(ctx, "", "go", "tool", "-n", "helm")
	if err != nil {
		return 0, err
	}
	programs.helm = strings.TrimSpace(out)
	programs.stoop = filepath.Join(dir, "stoop")
	if _, err := command(ctx, "..", "go", "build", "-o", programs.stoop, "."); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// command runs a program and returns what it prints.
func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "HELM_PLUGINS=/nowhere")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// rendered is what a chart makes of values.
type rendered struct {
	text       string
	daemonsets map[string]*appsv1.DaemonSet
	configs    map[string]*corev1.ConfigMap
	services   map[string]*corev1.Service
	networks   map[string]*networkingv1.NetworkPolicy
	roles      map[string][]rbacv1.PolicyRule // by kind and namespace
	bindings   map[string]rbacv1.RoleRef      // the same
	subjects   map[string][]rbacv1.Subject
	policies   map[string]*admissionv1.ValidatingAdmissionPolicy
	deployment map[string]*appsv1.Deployment
	audit      *rendered // roles, bindings and subjects of the account that answers audit events
	others     []unstructured.Unstructured
	documents  []string
}

// render is what helm template makes of the values in files, and of more arguments.
func render(t testing.TB, args ...string) *rendered {
	t.Helper()
	text, err := template(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, text)
}

func template(t testing.TB, args ...string) (string, error) {
	return command(t.Context(), "", programs.helm, append([]string{"template", release, chart, "--namespace", namespace}, args...)...)
}

// values is a file with values.
func values(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return "--values=" + file
}

// valuesFiles are those that CI renders.
func valuesFiles(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(chart, "ci", "*.yaml"))
	if err != nil || len(files) < 5 {
		t.Fatalf("the values files are %q, %v", files, err)
	}
	return files
}

// read reads every object as what it says it is; a field that there is not is an
// error.
func read(t testing.TB, text string) *rendered {
	t.Helper()
	r := &rendered{
		text: text, daemonsets: map[string]*appsv1.DaemonSet{}, configs: map[string]*corev1.ConfigMap{}, services: map[string]*corev1.Service{},
		networks: map[string]*networkingv1.NetworkPolicy{}, roles: map[string][]rbacv1.PolicyRule{}, bindings: map[string]rbacv1.RoleRef{},
		subjects: map[string][]rbacv1.Subject{}, policies: map[string]*admissionv1.ValidatingAdmissionPolicy{},
		deployment: map[string]*appsv1.Deployment{},
		audit:      &rendered{roles: map[string][]rbacv1.PolicyRule{}, bindings: map[string]rbacv1.RoleRef{}, subjects: map[string][]rbacv1.Subject{}},
	}
	for docs := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text))); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return r
		}
		if err != nil {
			t.Fatal(err)
		}
		var u unstructured.Unstructured
		if err := sigsyaml.Unmarshal(doc, &u.Object); err != nil {
			t.Fatalf("%v:\n%s", err, doc)
		}
		if len(u.Object) == 0 {
			continue
		}
		r.documents = append(r.documents, string(doc))
		strict := func(into any) {
			t.Helper()
			if err := sigsyaml.UnmarshalStrict(doc, into); err != nil {
				t.Fatalf("%s %s: %v:\n%s", u.GetKind(), u.GetName(), err, doc)
			}
		}
		of := r
		if strings.HasSuffix(u.GetName(), "-audit") {
			of = r.audit
		}
		switch u.GetKind() {
		case "DaemonSet":
			r.daemonsets[u.GetName()] = &appsv1.DaemonSet{}
			strict(r.daemonsets[u.GetName()])
		case "ConfigMap":
			r.configs[u.GetName()] = &corev1.ConfigMap{}
			strict(r.configs[u.GetName()])
		case "Service":
			r.services[u.GetName()] = &corev1.Service{}
			strict(r.services[u.GetName()])
		case "NetworkPolicy":
			r.networks[u.GetName()] = &networkingv1.NetworkPolicy{}
			strict(r.networks[u.GetName()])
		case "Role", "ClusterRole":
			var role rbacv1.Role // a ClusterRole has the same fields
			strict(&role)
			of.roles[role.Kind+" "+role.Namespace] = role.Rules
		case "RoleBinding", "ClusterRoleBinding":
			var b rbacv1.RoleBinding
			strict(&b)
			of.bindings[strings.TrimSuffix(b.Kind, "Binding")+" "+b.Namespace] = b.RoleRef
			of.subjects[strings.TrimSuffix(b.Kind, "Binding")+" "+b.Namespace] = b.Subjects
		case "ValidatingAdmissionPolicy":
			r.policies[u.GetName()] = &admissionv1.ValidatingAdmissionPolicy{}
			strict(r.policies[u.GetName()])
		case "ValidatingAdmissionPolicyBinding":
			strict(&admissionv1.ValidatingAdmissionPolicyBinding{})
			r.others = append(r.others, u)
		case "ServiceAccount":
			strict(&corev1.ServiceAccount{})
			r.others = append(r.others, u)
		case "Namespace":
			strict(&corev1.Namespace{})
		case "Deployment":
			r.deployment[u.GetName()] = &appsv1.Deployment{}
			strict(r.deployment[u.GetName()])
		case "PodMonitor", "PrometheusRule":
			r.others = append(r.others, u)
		default:
			t.Errorf("there is a %q", u.GetKind())
		}
	}
}

// data is the content of the ConfigMaps that a volume of the pod is of.
func (r *rendered) data(t testing.TB, pod *corev1.PodSpec, volume string) map[string]string {
	t.Helper()
	data := map[string]string{}
	for _, v := range pod.Volumes {
		var of []string
		switch {
		case v.Name != volume:
		case v.ConfigMap != nil:
			of = append(of, v.ConfigMap.Name)
		case v.Projected != nil:
			for _, s := range v.Projected.Sources {
				of = append(of, s.ConfigMap.Name)
			}
		}
		for _, name := range of {
			if r.configs[name] == nil {
				t.Fatalf("there is no ConfigMap %s", name)
			}
			maps.Copy(data, r.configs[name].Data)
		}
	}
	if len(data) == 0 {
		t.Fatalf("the volume %s is of no ConfigMap", volume)
	}
	return data
}

// stoop is the pod that stoop runs in.
func (r *rendered) stoop(t testing.TB) *corev1.PodSpec {
	t.Helper()
	for _, d := range r.daemonsets {
		if container(&d.Spec.Template.Spec, "stoop") != nil {
			return &d.Spec.Template.Spec
		}
	}
	t.Fatal("stoop is nowhere")
	return nil
}

// falco is the pod that Falco runs in, nil if none does.
func (r *rendered) falco() *corev1.PodSpec {
	for _, d := range r.daemonsets {
		if container(&d.Spec.Template.Spec, "falco") != nil {
			return &d.Spec.Template.Spec
		}
	}
	return nil
}

func container(pod *corev1.PodSpec, name string) *corev1.Container {
	for _, list := range [][]corev1.Container{pod.InitContainers, pod.Containers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// files writes stoop.yaml and rules.yaml as the pod has them.
func (r *rendered) files(t testing.TB) (config, rules string) {
	t.Helper()
	pod, dir := r.stoop(t), t.TempDir()
	config, rules = filepath.Join(dir, "stoop.yaml"), filepath.Join(dir, "rules.yaml")
	for file, text := range map[string]string{config: r.data(t, pod, "config")["stoop.yaml"], rules: r.data(t, pod, "config")["rules.yaml"]} {
		if text == "" {
			t.Fatalf("there is no %s", filepath.Base(file))
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return config, rules
}
