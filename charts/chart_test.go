package charts

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	sigsyaml "sigs.k8s.io/yaml"
)

// Every values file of CI passes helm lint --strict, and what it renders is what
// Kubernetes, stoop and Falco take.
func TestValuesFiles(t *testing.T) {
	for _, file := range valuesFiles(t) {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			if _, err := command(t.Context(), "", programs.helm, "lint", "--strict", chart, "--values", file); err != nil {
				t.Error(err)
			}
			r := render(t, "--values", file)
			config, rules := r.files(t)
			if out, err := command(t.Context(), "", programs.stoop, "check", "--config", config, "--rules", rules); err != nil {
				t.Error(err)
			} else if strings.Contains(out, "warning:") && !strings.HasSuffix(file, "limited.yaml") {
				t.Errorf("stoop check: %s", out)
			}
			for _, d := range r.daemonsets {
				wellFormed(t, &d.Spec.Template.Spec)
			}
			for _, d := range r.deployment {
				if d.Namespace == "" { // the demo is no part of it
					wellFormed(t, &d.Spec.Template.Spec)
				}
			}
			if pod := r.falco(); pod != nil {
				falcoReads(t, r, pod)
			}
			for _, doc := range r.documents {
				if strings.Contains(doc, "subPath") {
					t.Errorf("subPath: what is mounted so is never read again:\n%s", doc)
				}
			}
		})
	}
}

// wellFormed checks what the types don't: names and volumes.
func wellFormed(t *testing.T, pod *corev1.PodSpec) {
	t.Helper()
	volumes := map[string]int{}
	for _, v := range pod.Volumes {
		if _, twice := volumes[v.Name]; twice {
			t.Errorf("the volume %s is there twice", v.Name)
		}
		volumes[v.Name] = 0
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, m := range c.VolumeMounts {
			if _, ok := volumes[m.Name]; !ok {
				t.Errorf("%s mounts the volume %s, which there is not", c.Name, m.Name)
			}
			volumes[m.Name]++
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s says not what it takes: %v", c.Name, c.Resources)
		}
	}
	for v, n := range volumes {
		if n == 0 {
			t.Errorf("nobody mounts the volume %s", v)
		}
	}
}

// falcoReads checks Falco's configuration: that it writes what stoop needs, and
// that its rules files are there.
func falcoReads(t *testing.T, r *rendered, pod *corev1.PodSpec) {
	t.Helper()
	data := r.data(t, pod, "falco")
	var config struct {
		falcoNeeds
		RulesFiles  []string `json:"rules_files"`
		ConfigFiles []string `json:"config_files"`
	}
	if err := sigsyaml.Unmarshal([]byte(data["falco.yaml"]), &config); err != nil {
		t.Fatal(err)
	}
	config.check(t, pipeOf(t, r))
	doctor(t, data["falco.yaml"], pipeOf(t, r))
	if config.FileOutput.Filename != container(pod, "hold").Args[0] {
		t.Errorf("Falco writes to %s, held is %s", config.FileOutput.Filename, container(pod, "hold").Args)
	}
	files := map[string]bool{}
	for _, f := range config.RulesFiles {
		name := strings.TrimPrefix(f, "/etc/stoop-falco/")
		files[name] = true
		if name == f {
			continue // the image's
		}
		var rules []map[string]any
		if err := sigsyaml.Unmarshal([]byte(data[name]), &rules); err != nil || len(rules) == 0 {
			t.Errorf("%s: %v, %v", f, rules, err)
		}
		for _, r := range rules {
			for _, key := range []string{"desc", "condition", "output", "priority"} {
				if r["rule"] != nil && r[key] == nil {
					t.Errorf("%s: the rule %v has no %s", f, r["rule"], key)
				}
			}
		}
	}
	for name := range data {
		if name != "falco.yaml" && !files[name] {
			t.Errorf("Falco does not read %s", name)
		}
	}
}

// doctor has stoop doctor look at a falco.yaml: nothing may be missing or doubtful.
func doctor(t *testing.T, falco, pipe string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "falco.yaml")
	if err := os.WriteFile(file, []byte(falco), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := command(t.Context(), "", programs.stoop, "doctor", "falco", "--falco", file, "--falco-version", "0.44.1", "--pipe", pipe, "--node", "a", "-o", "json")
	if err != nil || strings.Count(out, `"status":"ok"`) == 0 || strings.Contains(out, `"status":"warning"`) {
		t.Errorf("stoop doctor says %s, %v, of\n%s", out, err, falco)
	}
}

func pipeOf(t *testing.T, r *rendered) string {
	t.Helper()
	var config struct{ Source struct{ Pipe string } }
	if err := sigsyaml.Unmarshal([]byte(r.data(t, r.stoop(t), "config")["stoop.yaml"]), &config); err != nil {
		t.Fatal(err)
	}
	return config.Source.Pipe
}

// falcoNeeds is what of falco.yaml stoop cannot do without.
type falcoNeeds struct {
	JSON     bool  `json:"json_output"`
	Buffered *bool `json:"buffered_outputs"`
	Append   []struct {
		Match  map[string]string `json:"match"`
		Fields []string          `json:"extra_fields"`
	} `json:"append_output"`
	FileOutput struct {
		Enabled   bool   `json:"enabled"`
		KeepAlive bool   `json:"keep_alive"`
		Filename  string `json:"filename"`
	} `json:"file_output"`
	HTTPOutput struct {
		Enabled bool   `json:"enabled"`
		URL     string `json:"url"`
	} `json:"http_output"`
}

func (f *falcoNeeds) check(t *testing.T, pipe string) {
	t.Helper()
	if !f.JSON || f.Buffered == nil || *f.Buffered {
		t.Error("Falco does not write JSON, or not at once")
	}
	if pipe != "" && (!f.FileOutput.Enabled || !f.FileOutput.KeepAlive || f.FileOutput.Filename != pipe) {
		t.Errorf("Falco writes to %+v, stoop reads %s", f.FileOutput, pipe)
	}
	var fields []string
	for _, a := range f.Append {
		if a.Match["source"] == "syscall" {
			fields = append(fields, a.Fields...)
		}
	}
	// docs/falco.md says why each of them.
	doc, err := os.ReadFile("../docs/falco.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "## What else an alert should tell")
	_, rest, _ = strings.Cut(rest, "```yaml")
	example, _, _ := strings.Cut(rest, "```")
	var documented falcoNeeds
	if err := sigsyaml.Unmarshal([]byte(example), &documented); err != nil {
		t.Fatal(err)
	}
	want := documented.Append[len(documented.Append)-1].Fields
	if len(want) < 10 || !slices.Equal(fields, want) {
		t.Errorf("Falco adds the fields %q; docs/falco.md asks for %q", fields, want)
	}
}

// A misspelt value is refused, wherever it stands.
func TestMisspeltValues(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := sigsyaml.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	// Whose keys are the user's own.
	free := regexp.MustCompile(`^(affinity|falco\.config|nodeSelector|podLabels|podAnnotations|serviceAccount\.annotations|metrics\.\w+\.labels)$`)
	var walk func(at []string, m map[string]any)
	var paths []string
	walk = func(at []string, m map[string]any) {
		if free.MatchString(strings.Join(at, ".")) {
			return
		}
		paths = append(paths, strings.Join(append(slices.Clone(at), "misspelt"), "."))
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if sub, ok := m[key].(map[string]any); ok {
				walk(append(slices.Clone(at), key), sub)
			}
		}
	}
	walk(nil, all)
	if len(paths) < 25 {
		t.Fatalf("there is little to misspell: %q", paths)
	}
	for _, path := range paths {
		if _, err := template(t, "--set", path+"=x"); err == nil || !strings.Contains(err.Error(), "misspelt") {
			t.Errorf("%s is taken, or refused for something else: %v", path, err)
		}
	}
	for _, wrong := range []string{
		`rules: [{name: a, match: {priority: critical}, actions: [delete-pdo]}]`,
		`rules: [{name: a, match: {priority: critical}, actions: [{delete-pod: {gracePeroid: 1s}}]}]`,
		`rules: [{name: a, match: {priorty: critical}, actions: [delete-pod]}]`,
		`rules: [{name: a, match: {priority: critical}, actions: [{delete-pod: {}, onfailure: stop}]}]`,
		`rules: [{name: a, match: {priority: critical}, actions: [{isolate-pod: {strength: strong}}]}]`,
		`rules: [{name: a, match: {priority: critical}, actions: [{slack: {url: https://hooks.example/secret}}]}]`,
		`config: {guard: {limits: {rul: 5/1m}}}`,
		`config: {data: /elsewhere}`,
		`mode: Enforce`,
		`enforce: [delete-pod-on-critcal]`,
		`split: true` + "\n" + `falco: {enabled: false}`,
		`source: {type: http}` + "\n" + `falco: {enabled: false}`,
		`metrics: {podMonitor: {enabled: true}}`,
		`serviceAccount: {create: false}`,
		`node: {capabilities: [ALL]}`,
		`image: {digest: latest}`,
		`secrets: [{name: a, secret: b}]`,
	} {
		if _, err := template(t, values(t, wrong)); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
}

// enforce names the rules that act.
func TestEnforce(t *testing.T) {
	r := render(t, "--set", "mode=enforce", "--set", "enforce={label-visited-pod}")
	var rules struct {
		Mode  string
		Rules []struct{ Name, Mode string }
	}
	if err := sigsyaml.Unmarshal([]byte(r.data(t, r.stoop(t), "config")["rules.yaml"]), &rules); err != nil {
		t.Fatal(err)
	}
	for _, rule := range rules.Rules {
		if (rule.Mode == "enforce") != (rule.Name == "label-visited-pod") {
			t.Errorf("%s is in mode %q", rule.Name, rule.Mode)
		}
	}
	if rules.Mode != "audit" || len(rules.Rules) < 2 {
		t.Errorf("the rules are %+v", rules)
	}
	if got := r.data(t, r.stoop(t), "config")["stoop.yaml"]; !strings.Contains(got, "mode: enforce") {
		t.Errorf("stoop.yaml is %s", got)
	}
	// As it comes, nothing acts.
	r = render(t)
	if c := r.data(t, r.stoop(t), "config")["stoop.yaml"]; !strings.Contains(c, "mode: audit") || strings.Contains(r.data(t, r.stoop(t), "config")["rules.yaml"], "mode: enforce") {
		t.Error("a fresh install enforces")
	}
}

// Rules roll out by a name with their hash, unless they are to be read where stoop
// runs.
func TestRollout(t *testing.T) {
	changed := values(t, `rules: [{name: a, match: {priority: critical}, actions: [delete-pod]}]`)
	for _, tt := range []struct {
		rollout string
		rolls   bool
	}{{"pods", true}, {"reload", false}} {
		set := "rollout=" + tt.rollout
		before, again, after := render(t, "--set", set).stoop(t), render(t, "--set", set).stoop(t), render(t, "--set", set, changed).stoop(t)
		if !reflect.DeepEqual(before, again) {
			t.Errorf("%s: the same values make another pod", tt.rollout)
		}
		if rolls := !reflect.DeepEqual(before, after); rolls != tt.rolls {
			t.Errorf("%s: with other rules the pod is another: %t", tt.rollout, rolls)
		}
	}
	// Configuration is read at the start alone.
	if a, b := render(t, "--set", "rollout=reload").stoop(t), render(t, "--set", "rollout=reload", "--set", "mode=enforce").stoop(t); reflect.DeepEqual(a, b) {
		t.Error("another configuration leaves the pods as they are")
	}
}

// Who starts before whom, and stops after whom.
func TestOrder(t *testing.T) {
	names := func(list []corev1.Container) (out []string) {
		for _, c := range list {
			name := c.Name
			if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
				name += " (sidecar)"
			}
			out = append(out, name)
		}
		return out
	}
	for _, tt := range []struct {
		args        []string
		stoop       string
		init, after []string
	}{
		{nil, "stoop", []string{"prepare", "hold (sidecar)", "stoop (sidecar)"}, []string{"falco"}},
		{[]string{"--set", "node.responders=true"}, "stoop", []string{"hold (sidecar)", "stoop (sidecar)"}, []string{"falco"}},
		{[]string{"--set", "split=true"}, "stoop", []string{"prepare", "hold (sidecar)"}, []string{"stoop"}},
		{[]string{"--set", "split=true"}, "stoop-falco", []string{"hold (sidecar)"}, []string{"falco"}},
		{[]string{"--set", "falco.enabled=false"}, "stoop", []string{"prepare", "hold (sidecar)"}, []string{"stoop"}},
	} {
		pod := render(t, tt.args...).daemonsets[tt.stoop].Spec.Template.Spec
		if got := names(pod.InitContainers); !slices.Equal(got, tt.init) {
			t.Errorf("%q, %s: before come %q, want %q", tt.args, tt.stoop, got, tt.init)
		}
		if got := names(pod.Containers); !slices.Equal(got, tt.after) {
			t.Errorf("%q, %s: then %q, want %q", tt.args, tt.stoop, got, tt.after)
		}
	}
}

// With split a new stoop leaves Falco's pods alone, and a new Falco stoop's.
func TestSplitIsUpgradedApart(t *testing.T) {
	base := []string{"--set", "split=true", "--set", "hold.tag=0.1.0"}
	one := render(t, append(base, "--set", "image.tag=0.1.0")...)
	two := render(t, append(base, "--set", "image.tag=0.2.0")...)
	three := render(t, append(base, "--set", "image.tag=0.1.0", "--set", "falco.image.tag=0.45.0", "--set", "falco.config.priority=notice")...)
	same := func(a, b *rendered, name string) bool {
		return reflect.DeepEqual(a.daemonsets[name].Spec, b.daemonsets[name].Spec)
	}
	if !same(one, two, "stoop-falco") || same(one, two, "stoop") {
		t.Error("another stoop restarts Falco, or not itself")
	}
	if !same(one, three, "stoop") || same(one, three, "stoop-falco") {
		t.Error("another Falco restarts stoop, or not itself")
	}
}

// The token is for stoop's container alone, and nothing listens unless it is told to.
func TestTokenAndPorts(t *testing.T) {
	for _, file := range valuesFiles(t) {
		r := render(t, "--values", file)
		for name, d := range r.daemonsets {
			pod := &d.Spec.Template.Spec
			if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken || pod.HostNetwork {
				t.Errorf("%s, %s: every container gets a token, or the host's network", file, name)
			}
			for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
				for _, m := range c.VolumeMounts {
					if (m.Name == "token" || strings.HasPrefix(m.Name, "secret-")) && c.Name != "stoop" {
						t.Errorf("%s: %s has a token or a secret", file, c.Name)
					}
				}
				if len(c.Ports) > 0 && !strings.HasSuffix(file, "http.yaml") && !strings.HasSuffix(file, "monitoring.yaml") {
					t.Errorf("%s: %s listens", file, c.Name)
				}
			}
		}
		config := r.data(t, r.stoop(t), "config")["stoop.yaml"]
		if loopback := strings.Contains(config, "listen: 127.0.0.1:2802"); loopback == strings.HasSuffix(file, "monitoring.yaml") {
			t.Errorf("%s: %s", file, config)
		}
		for name, s := range r.services {
			if strings.HasSuffix(name, "-alerts") && (s.Spec.InternalTrafficPolicy == nil || *s.Spec.InternalTrafficPolicy != corev1.ServiceInternalTrafficPolicyLocal) {
				t.Errorf("%s: alerts of one node reach another's stoop", file)
			}
		}
	}
	for name, n := range render(t).networks {
		if len(n.Spec.Ingress) != 0 || len(n.Spec.PolicyTypes) != 2 {
			t.Errorf("%s lets in %v", name, n.Spec.Ingress)
		}
	}
}

// What people are told to do: the values of Falco's own chart, and the host's
// falco.yaml, are right.
func TestNotes(t *testing.T) {
	notes := func(args ...string) string {
		t.Helper()
		out, err := command(t.Context(), "", programs.helm, append([]string{"install", release, chart, "--namespace", namespace, "--dry-run=client"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		_, text, ok := strings.Cut(out, "\nNOTES:\n")
		if !ok {
			t.Fatalf("there are no notes:\n%s", out)
		}
		return text
	}
	between := func(text, begin, end string) []byte {
		t.Helper()
		_, rest, ok := strings.Cut(text, "# --- "+begin+"\n")
		block, _, ok2 := strings.Cut(rest, "# --- "+end)
		if !ok || !ok2 {
			t.Fatalf("there is no %q:\n%s", begin, text)
		}
		return []byte(block)
	}
	text := notes("--set", "falco.enabled=false", "--set", "source.hostPath=/run/elsewhere")
	var of struct {
		Falco  falcoNeeds `json:"falco"`
		Mounts struct {
			Volumes      []corev1.Volume      `json:"volumes"`
			VolumeMounts []corev1.VolumeMount `json:"volumeMounts"`
		} `json:"mounts"`
	}
	if err := sigsyaml.Unmarshal(between(text, "values of Falco's chart", "end of values"), &of); err != nil {
		t.Fatal(err)
	}
	of.Falco.check(t, "/run/stoop/falco.pipe")
	if m := of.Mounts; len(m.Volumes) != 1 || m.Volumes[0].HostPath.Path != "/run/elsewhere" || m.VolumeMounts[0].MountPath != "/run/stoop" {
		t.Errorf("Falco's chart mounts %+v", m)
	}
	var host falcoNeeds
	if err := sigsyaml.UnmarshalStrict(between(text, "falco.yaml on the host", "end of falco.yaml"), &map[string]any{}); err != nil {
		t.Fatal(err)
	}
	if err := sigsyaml.Unmarshal(between(text, "falco.yaml on the host", "end of falco.yaml"), &host); err != nil {
		t.Fatal(err)
	}
	host.check(t, "/run/elsewhere/falco.pipe")
	// As Falco's package has it beside.
	doctor(t, "load_plugins: [container]\nplugins: [{name: container, library_path: libcontainer.so}]\n"+string(between(text, "falco.yaml on the host", "end of falco.yaml")), "/run/elsewhere/falco.pipe")

	text = notes("--values", filepath.Join(chart, "ci", "http.yaml"))
	of.Falco = falcoNeeds{}
	if err := sigsyaml.Unmarshal(between(text, "values of Falco's chart", "end of values"), &of); err != nil {
		t.Fatal(err)
	}
	of.Falco.check(t, "")
	if want := fmt.Sprintf("https://falco:TOKEN@%s-alerts.%s.svc:2801/", release, namespace); of.Falco.HTTPOutput.URL != want || of.Falco.FileOutput.Enabled {
		t.Errorf("Falco posts to %s, want %s", of.Falco.HTTPOutput.URL, want)
	}

	text = notes()
	for _, want := range []string{"history --since 168h", "--set mode=enforce", "'enforce={delete-pod-on-critical}'", "in audit mode"} {
		if !strings.Contains(text, want) {
			t.Errorf("the notes don't say %q:\n%s", want, text)
		}
	}
	// The line that they give works.
	render(t, "--set", "mode=enforce", "--set", "enforce={delete-pod-on-critical}")
}

// Audit events have stoops of their own: elected, by HTTP, with an account of their
// own, behind a Service that leads to whoever is ready.
func TestAuditEvents(t *testing.T) {
	r := render(t, "--values", filepath.Join(chart, "ci", "audit.yaml"))
	d := r.deployment["stoop-audit"]
	if d == nil || *d.Spec.Replicas != 2 || d.Spec.Strategy.Type != "Recreate" {
		t.Fatalf("the Deployment is %+v", d)
	}
	pod := &d.Spec.Template.Spec
	if pod.ServiceAccountName != "stoop-audit" || r.stoop(t).ServiceAccountName != "stoop" || pod.HostPID {
		t.Errorf("it runs as %s", pod.ServiceAccountName)
	}
	if got := forbidden(t, *pod); len(got) > 0 {
		t.Errorf("restricted has against it %q", got)
	}
	data, ofNodes := r.data(t, pod, "config"), r.data(t, r.stoop(t), "config")
	if !strings.Contains(data["stoop.yaml"], "auditEvents: elected") || strings.Contains(ofNodes["stoop.yaml"], "elected") || data["rules.yaml"] != ofNodes["rules.yaml"] {
		t.Errorf("its configuration is %s", data["stoop.yaml"])
	}
	for name, selector := range map[string]map[string]string{"stoop": r.daemonsets["stoop"].Spec.Selector.MatchLabels, "stoop-audit": d.Spec.Selector.MatchLabels} {
		s := r.services["stoop-audit"].Spec.Selector
		if matches := reflect.DeepEqual(s, selector); matches != (name == "stoop-audit") {
			t.Errorf("the Service leads to %s: %t", name, matches)
		}
	}
	if r := render(t); len(r.deployment) > 0 || len(r.audit.roles) > 0 {
		t.Error("there is one without its being asked for")
	}
}
