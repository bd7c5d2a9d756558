package charts

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/param"
	"stoop/responders"
)

// flat are the permissions of a role, one verb on one resource each.
func flat(rules []rbacv1.PolicyRule) []string {
	out := map[string]bool{}
	for _, r := range rules {
		for _, g := range r.APIGroups {
			for _, resource := range r.Resources {
				for _, verb := range r.Verbs {
					names := slices.Sorted(slices.Values(r.ResourceNames))
					out[fmt.Sprintf("%s %s/%s %q", verb, g, resource, names)] = true
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(out))
}

// samePermissions compares what the chart renders with what stoop rbac prints for
// the same rules and configuration, and returns the latter.
func samePermissions(t *testing.T, r *rendered, account string) *rendered {
	t.Helper()
	config, rules := r.files(t)
	printed := func(account string, args ...string) *rendered {
		t.Helper()
		text, err := command(t.Context(), "", programs.stoop, append([]string{"rbac", "--config", config, "--rules", rules, "--namespace", namespace, "--service-account", account}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return read(t, text)
	}
	want := printed(account)
	same(t, r, want)
	if len(r.audit.roles) > 0 {
		same(t, r.audit, printed(account+"-audit", "--audit-events").audit)
	}
	return want
}

func same(t *testing.T, r, want *rendered) {
	t.Helper()
	if got, want := slices.Sorted(maps.Keys(r.roles)), slices.Sorted(maps.Keys(want.roles)); !slices.Equal(got, want) {
		t.Errorf("the chart has the roles %q, stoop rbac prints %q", got, want)
	}
	for role, rules := range want.roles {
		if got, want := flat(r.roles[role]), flat(rules); !slices.Equal(got, want) {
			t.Errorf("%s: the chart grants\n%s\nstoop rbac\n%s", role, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if r.bindings[role] != want.bindings[role] || !slices.Equal(r.subjects[role], want.subjects[role]) {
			t.Errorf("%s: the chart binds %v to %v, stoop rbac %v to %v", role, r.bindings[role], r.subjects[role], want.bindings[role], want.subjects[role])
		}
	}
}

func samePolicies(t *testing.T, got, want *rendered) {
	t.Helper()
	if len(got.policies) != len(want.policies) {
		t.Errorf("the chart has %d policies, stoop rbac prints %d", len(got.policies), len(want.policies))
	}
	bound := 0
	for _, o := range got.others {
		if o.GetKind() == "ValidatingAdmissionPolicyBinding" {
			bound++
		}
	}
	if bound != len(got.policies) {
		t.Errorf("of %d policies %d are bound", len(got.policies), bound)
	}
	for name, p := range want.policies {
		if got.policies[name] == nil {
			t.Errorf("the chart has no policy %s", name)
			continue
		}
		a, err := json.Marshal(got.policies[name].Spec)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(p.Spec)
		if err != nil {
			t.Fatal(err)
		}
		if string(a) != string(b) {
			t.Errorf("%s: the chart has\n%s\nstoop rbac\n%s", name, a, b)
		}
	}
}

// Every values file of CI gives exactly the rights that stoop rbac prints.
func TestPermissionsOfValuesFiles(t *testing.T) {
	for _, file := range valuesFiles(t) {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			r := render(t, "--values", file)
			account := r.stoop(t).ServiceAccountName
			want := samePermissions(t, r, account)
			if strings.HasSuffix(file, "http.yaml") { // rbac.ownNode: false
				want.policies = nil
			}
			samePolicies(t, r, want)
		})
	}
	old := render(t, "--kube-version", "1.31.0")
	if len(old.policies) != 0 {
		t.Error("a cluster whose tokens don't name their node gets policies: stoop could change nothing there")
	}
}

// variants are the parameters that decide which rights a responder needs, each
// value of each of them at least once.
func variants(t *testing.T, e *responders.Entry, d responders.DescribedResponder) []map[string]any {
	t.Helper()
	first := map[string]any{}
	for _, f := range e.Params.Fields {
		if f.Required {
			first[f.Name] = required(t, e.Name, f)
		}
	}
	if e.Name == "capture-files" { // one of two is required
		first["paths"] = []string{"/etc/hostname"}
	}
	out := []map[string]any{first}
	with := func(name string, value any) {
		for _, v := range slices.Clone(out) {
			v = maps.Clone(v)
			v[name] = value
			out = append(out, v)
		}
	}
	for name := range d.Defaults {
		for _, f := range e.Params.Fields {
			if f.Name == name {
				for _, value := range f.OneOf {
					if value != f.Default {
						with(name, value)
					}
				}
			}
		}
	}
	lists := map[string]bool{}
	for _, r := range d.Rules {
		if r.Each != "" && !lists[r.Each] {
			lists[r.Each] = true
			if r.Cut == "/" || r.Each == "bind" {
				with(r.Each, []string{"ClusterRole/view", "Role/deployer", "ClusterRole/edit"})
			} else {
				with(r.Each, []string{"widgets.example.com", "roles.rbac.authorization.k8s.io"})
				with(r.Each, []string{"clusterroles.rbac.authorization.k8s.io"})
			}
		}
	}
	return out
}

// required is a value for a parameter that has no default.
func required(t *testing.T, responder string, f param.Field) any {
	t.Helper()
	switch f.Name {
	case "labels", "annotations":
		return map[string]string{"example.com/a": "b"}
	case "kinds":
		return []string{"secrets", "pods"}
	case "command", "args":
		return []string{"/bin/true"}
	case "url":
		if f.Type == "secret" {
			return map[string]string{"file": "/x"}
		}
		return "https://example.com/"
	case "path", "program", "file":
		return "/x"
	case "paths", "files":
		return []string{"/etc/hostname"}
	case "subject":
		return "functions.x"
	case "key", "name":
		return "example.com/suspect"
	case "image":
		return "example.com/tools:1"
	case "message", "reason", "text", "body":
		return "x"
	case "replicas":
		return 0
	}
	t.Fatalf("%s: what would the parameter %s (%s) be?", responder, f.Name, f.Type)
	return nil
}

// For every responder there is, with every parameter that decides, everywhere and
// in one namespace, the chart gives exactly the rights that stoop rbac prints.
func TestPermissionsOfEveryResponder(t *testing.T) {
	all := responders.All()
	described := responders.Describe(all).Responders
	for i := range all {
		e := &all[i]
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			for _, params := range variants(t, e, described[e.Name]) {
				for _, fields := range []map[string]any{nil, {"k8s.ns.name": []string{"shop", "kube-system"}, "ka.target.namespace": "shop"}} {
					match := map[string]any{"priority": "critical"}
					if fields != nil {
						match["fields"] = fields
					}
					b, err := json.Marshal(map[string]any{"rules": []any{
						map[string]any{"name": "r", "match": match, "actions": []any{map[string]any{e.Name: params}}},
					}})
					if err != nil {
						t.Fatal(err)
					}
					r := render(t, values(t, string(b)), "--set", "auditEvents.enabled=true,auditEvents.http.tokenSecret=a,auditEvents.http.tlsSecret=b")
					samePolicies(t, r, samePermissions(t, r, "stoop"))
					if t.Failed() {
						t.Fatalf("with %s", b)
					}
				}
			}
		})
	}
}
