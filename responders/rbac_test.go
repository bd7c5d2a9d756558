package responders_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"

	"stoop/responders"
)

var (
	stoop = responders.Account{Namespace: "security", Name: "stoop"}
	audit = responders.Account{Namespace: "security", Name: "stoop-audit", AuditEvents: true}
)

func permit(t testing.TB, a responders.Account, steps ...responders.Planned) []byte {
	t.Helper()
	p, err := responders.Permit(responders.All(), a, steps)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := p.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func step(responder, params string, namespaces ...string) responders.Planned {
	s := responders.Planned{Responder: responder, Namespaces: namespaces}
	if params != "" {
		s.Params = json.RawMessage(params)
	}
	return s
}

// What is printed for some rules, whole: see testdata/rbac.yaml.
func TestDocsRBAC(t *testing.T) {
	steps := []responders.Planned{
		step("event", "", "shop", "web"),
		step("label-pod", `{"labels":{"suspect":"yes"}}`, "shop", "web"),
		step("delete-pod", "", "web", "shop"),
		step("evict-pod", ""),
		step("cordon-node", ""),
		step("file", `{"path":"x"}`),
		step("delete-resource", `{"kinds":["secrets","roles.rbac.authorization.k8s.io"]}`, "shop"),
		step("revoke-access", `{"bind":["ClusterRole/view"]}`, "shop"),
	}
	got := append(permit(t, stoop, steps...), "---\n# And of those that answer audit events.\n"...)
	got = append(got, permit(t, audit, steps...)...)
	const golden = "testdata/rbac.yaml"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("what is printed is not %s: go test ./responders -run Docs -update", golden)
	}
}

// rbacObjects are those that are printed, each read as what it says it is; a field
// that there is not is an error.
type rbacObjects struct {
	roles    map[string][]rbacv1.PolicyRule // by kind and namespace
	policies map[string]*admissionv1.ValidatingAdmissionPolicy
}

func readRBAC(t testing.TB, printed []byte, a responders.Account) rbacObjects {
	t.Helper()
	o := rbacObjects{map[string][]rbacv1.PolicyRule{}, map[string]*admissionv1.ValidatingAdmissionPolicy{}}
	bound := map[string]bool{}
	strict := func(doc []byte, into any) {
		t.Helper()
		if err := sigsyaml.UnmarshalStrict(doc, into); err != nil {
			t.Fatalf("%v:\n%s", err, doc)
		}
	}
	for docs := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(printed))); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var of struct{ Kind string }
		if err := sigsyaml.Unmarshal(doc, &of); err != nil {
			t.Fatalf("%v:\n%s", err, doc)
		}
		switch of.Kind {
		case "Role", "ClusterRole":
			var r rbacv1.Role // a ClusterRole has the same fields
			strict(doc, &r)
			o.roles[of.Kind+" "+r.Namespace] = r.Rules
		case "RoleBinding", "ClusterRoleBinding":
			var b rbacv1.RoleBinding
			strict(doc, &b)
			if s := b.Subjects; len(s) != 1 || s[0] != (rbacv1.Subject{Kind: "ServiceAccount", Namespace: a.Namespace, Name: a.Name}) {
				t.Errorf("%s binds to %v", of.Kind, s)
			}
			bound[b.RoleRef.Kind+" "+b.Namespace] = true
		case "ValidatingAdmissionPolicy":
			var p admissionv1.ValidatingAdmissionPolicy
			strict(doc, &p)
			o.policies[p.Name] = &p
		case "ValidatingAdmissionPolicyBinding":
			var b admissionv1.ValidatingAdmissionPolicyBinding
			strict(doc, &b)
			if len(b.Spec.ValidationActions) != 1 || b.Spec.ValidationActions[0] != admissionv1.Deny {
				t.Errorf("policy %s: the actions are %v", b.Spec.PolicyName, b.Spec.ValidationActions)
			}
			bound[b.Spec.PolicyName] = true
		default:
			t.Errorf("there is a %q", of.Kind)
		}
	}
	if len(bound) != len(o.roles)+len(o.policies) {
		t.Errorf("there are %d roles, %d policies and %d bindings", len(o.roles), len(o.policies), len(bound))
	}
	return o
}

func (o rbacObjects) grants(role, verb, group, resource string) bool {
	return slices.ContainsFunc(o.roles[role], func(r rbacv1.PolicyRule) bool {
		return slices.Contains(r.Verbs, verb) && slices.Contains(r.APIGroups, group) && slices.Contains(r.Resources, resource)
	})
}

// Each permission is only where it is needed.
func TestPermissionsAreWhereTheyAreNeeded(t *testing.T) {
	const cluster, core, network, rbac, leases = "ClusterRole ", "", "networking.k8s.io", rbacv1.GroupName, "coordination.k8s.io"
	type want struct {
		role, verb, group, resource string
		granted                     bool
	}
	for _, tt := range []struct {
		name  string
		audit bool
		steps []responders.Planned
		roles []string // besides the ClusterRole and that of stoop's own namespace
		want  []want
	}{
		{"nothing but telling", false, []responders.Planned{step("file", `{"path":"x"}`)}, nil, []want{
			{cluster, "watch", core, "pods", true}, {cluster, "delete", core, "pods", false},
		}},
		{"in two namespaces", false, []responders.Planned{step("delete-pod", "", "a", "b")}, []string{"Role a", "Role b"}, []want{
			{"Role a", "delete", core, "pods", true},
			{"Role b", "delete", core, "pods", true},
			{cluster, "delete", core, "pods", false},
			// The ClusterRole has it already.
			{"Role a", "get", core, "pods", false},
			// The responder that takes its place.
			{"Role a", "create", network, "networkpolicies", true},
			{cluster, "create", network, "networkpolicies", false},
		}},
		{"in one and in all", false, []responders.Planned{step("delete-pod", "", "a"), step("delete-pod", "")}, nil, []want{
			{cluster, "delete", core, "pods", true}, {cluster, "create", network, "networkpolicies", true},
		}},
		{"only in protected ones", false, []responders.Planned{{Responder: "delete-pod", Namespaces: []string{}}}, nil, []want{
			{cluster, "delete", core, "pods", false},
		}},
		{"a node is in no namespace", false, []responders.Planned{{Responder: "cordon-node", Namespaces: []string{"a"}}}, []string{"Role security"}, []want{
			{cluster, "patch", core, "nodes", true}, {"Role security", "update", "coordination.k8s.io", "leases", true}, {cluster, "update", "coordination.k8s.io", "leases", false},
		}},
		{"kinds of the parameters", true, []responders.Planned{step("delete-resource", `{"kinds":["secrets","deployments.apps"]}`)}, nil, []want{
			{cluster, "delete", core, "secrets", true}, {cluster, "delete", "apps", "deployments", true}, {cluster, "delete", core, "configmaps", false}, {cluster, "list", core, "secrets", false},
		}},
		{"an audit event of one namespace", true, []responders.Planned{step("delete-resource", `{"kinds":["secrets","clusterroles.rbac.authorization.k8s.io"]}`, "a")}, []string{"Role a"}, []want{
			{"Role a", "delete", core, "secrets", true},
			{cluster, "delete", core, "secrets", false},
			// What has a namespace is no ClusterRole.
			{cluster, "delete", rbac, "clusterroles", false},
			{"Role a", "delete", rbac, "clusterroles", false},
		}},
		{"revoke the rights that the alert names", true, []responders.Planned{step("revoke-access", "")}, nil, []want{
			{cluster, "delete", rbac, "clusterrolebindings", true},
			{cluster, "delete", rbac, "rolebindings", true},
			{cluster, "list", rbac, "rolebindings", false},
			{cluster, "create", rbac, "rolebindings", false},
			{cluster, "patch", rbac, "rolebindings", false},
			{cluster, "bind", rbac, "clusterroles", false},
		}},
		{"and give them back", true, []responders.Planned{step("revoke-access", `{"bind":["ClusterRole/view"]}`, "a")}, []string{"Role a"}, []want{
			{"Role a", "create", rbac, "rolebindings", true}, {"Role a", "bind", rbac, "clusterroles", true}, {cluster, "bind", rbac, "clusterroles", false},
		}},
		{"revoke a pod's rights", false, []responders.Planned{step("revoke-access", `{"from":"pod"}`, "a")}, nil, []want{
			// They may be in any namespace.
			{cluster, "list", rbac, "rolebindings", true}, {cluster, "delete", rbac, "clusterrolebindings", true},
		}},
		{"revoke a pod's rights in its namespace", false, []responders.Planned{step("revoke-access", `{"from":"pod","namespaces":"own"}`, "a")}, []string{"Role a"}, []want{
			{"Role a", "list", rbac, "rolebindings", true}, {cluster, "list", rbac, "rolebindings", false}, {cluster, "list", rbac, "clusterrolebindings", true},
		}},
		// What the one acts on, the other never does.
		{"an audit event on a node", false, []responders.Planned{step("delete-resource", `{"kinds":["secrets"]}`), step("revoke-access", ""), step("delete-pod", "")}, nil, []want{
			{cluster, "delete", core, "secrets", false},
			{cluster, "delete", rbac, "clusterrolebindings", false},
			{cluster, "delete", core, "pods", true},
			{"Role security", "update", leases, "leases", false},
		}},
		{"a node's alert beside audit events", true, []responders.Planned{step("delete-resource", `{"kinds":["secrets"]}`), step("delete-pod", ""), step("cordon-node", ""), step("capture-logs", "")}, nil, []want{
			{cluster, "delete", core, "secrets", true},
			{cluster, "delete", core, "pods", false},
			{cluster, "list", core, "pods", false},
			{cluster, "patch", core, "nodes", false},
			{cluster, "get", core, "pods/log", false},
			{cluster, "watch", core, "namespaces", true},
			{"Role security", "update", leases, "leases", true},
			{"Role security", "create", leases, "leases", true},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			account := stoop
			if tt.audit {
				account = audit
			}
			o := readRBAC(t, permit(t, account, tt.steps...), account)
			for _, w := range tt.want {
				if got := o.grants(w.role, w.verb, w.group, w.resource); got != w.granted {
					t.Errorf("%s, %s %s.%s: %t; the roles are %v", w.role, w.verb, w.resource, w.group, got, o.roles)
				}
			}
			for _, r := range tt.roles {
				if o.roles[r] == nil {
					t.Errorf("there is no %s", r)
				}
			}
			for r := range o.roles {
				if r != cluster && r != "Role security" && !slices.Contains(tt.roles, r) { // the last for what stoops agree by
					t.Errorf("there is a %s: %v", r, o.roles[r])
				}
			}
		})
	}
}

// The bind that lets stoop give roles is for those named alone.
func TestBindIsForTheRolesNamed(t *testing.T) {
	o := readRBAC(t, permit(t, audit, step("revoke-access", `{"bind":["ClusterRole/view","Role/deployer"]}`)), audit)
	n := 0
	for _, rules := range o.roles {
		for _, r := range rules {
			if slices.Contains(r.Verbs, "bind") {
				n++
				if len(r.ResourceNames) != 1 || len(r.Resources) != 1 || r.Resources[0]+"/"+r.ResourceNames[0] != "clusterroles/view" && r.Resources[0]+"/"+r.ResourceNames[0] != "roles/deployer" {
					t.Errorf("stoop may bind %v", r)
				}
			}
			if slices.Contains(r.Verbs, "escalate") || slices.Contains(r.Verbs, "*") || slices.Contains(r.Resources, "*") {
				t.Errorf("stoop may %v", r)
			}
		}
	}
	if n != 2 {
		t.Errorf("%d rules have the verb bind", n)
	}
}

func TestPoliciesTieWhatIsGranted(t *testing.T) {
	const pods, nodes = "security-stoop-own-node-pods", "security-stoop-own-node-nodes"
	for _, tt := range []struct {
		name       string
		steps      []responders.Planned
		policies   []string
		operations string
		resources  string
		says, not  string
	}{
		{"nothing is changed", []responders.Planned{step("event", "")}, nil, "", "", "", "Ties"},
		{"deletes", []responders.Planned{step("delete-pod", "", "a")}, []string{pods}, "DELETE,UPDATE", "pods", "", "evictions"}, // isolate-pod patches
		{"labels", []responders.Planned{step("label-pod", `{"labels":{"a":"b"}}`)}, []string{pods}, "UPDATE", "pods", "", ""},
		{"containers", []responders.Planned{step("debug-pod", `{"image":"a"}`)}, []string{pods}, "UPDATE", "pods/ephemeralcontainers", "", ""},
		{"nodes", []responders.Planned{step("label-node", `{"labels":{"a":"b"}}`)}, []string{nodes}, "", "", "", ""},
		{"what can't be tied is said", []responders.Planned{step("label-pod", `{"labels":{"a":"b"}}`), step("evict-pod", ""), step("exec-in-pod", `{"command":["id"]}`), step("capture-logs", "")}, []string{pods}, "UPDATE", "pods", "evictions (pods/eviction); commands in containers (pods/exec); reading logs", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			printed := permit(t, stoop, tt.steps...)
			o := readRBAC(t, printed, stoop)
			if len(o.policies) != len(tt.policies) {
				t.Errorf("the policies are %v", o.policies)
			}
			flat := strings.Join(strings.Fields(strings.ReplaceAll(string(printed), "\n#", "")), " ")
			if !strings.Contains(flat, tt.says) || tt.not != "" && strings.Contains(flat, tt.not) {
				t.Errorf("it does not say %q, or says %q:\n%s", tt.says, tt.not, printed)
			}
			for _, name := range tt.policies {
				p := o.policies[name]
				if p == nil {
					t.Fatalf("there is no policy %s", name)
				}
				if *p.Spec.FailurePolicy != admissionv1.Fail || p.Spec.MatchConditions[0].Expression != "request.userInfo.username == 'system:serviceaccount:security:stoop'" {
					t.Errorf("the policy is %+v", p.Spec)
				}
				if name != pods {
					continue
				}
				r := p.Spec.MatchConstraints.ResourceRules[0]
				var operations []string
				for _, op := range r.Operations {
					operations = append(operations, string(op))
				}
				if got := strings.Join(operations, ","); got != tt.operations || strings.Join(r.Resources, ",") != tt.resources {
					t.Errorf("it ties %s of %v", got, r.Resources)
				}
			}
		})
	}
}

// What audit events name runs on any node.
func TestNothingTiesAuditEvents(t *testing.T) {
	if o := readRBAC(t, permit(t, audit, step("delete-resource", `{"kinds":["pods"]}`), step("delete-pod", "")), audit); len(o.policies) > 0 {
		t.Errorf("the policies are %v", o.policies)
	}
}

// The same permissions are printed alike, in whatever order the rules have them.
func TestPermissionsArePrintedAlike(t *testing.T) {
	steps := []responders.Planned{
		step("delete-pod", "", "b", "a"), step("event", ""), step("isolate-pod", ""), step("cordon-node", ""),
		step("delete-resource", `{"kinds":["secrets","pods"]}`), step("revoke-access", `{"bind":["Role/a","ClusterRole/b"]}`),
	}
	first := permit(t, stoop, steps...)
	for range 20 {
		slices.Reverse(steps)
		if got := permit(t, stoop, steps...); !bytes.Equal(got, first) {
			t.Fatalf("first\n%s\nthen\n%s", first, got)
		}
	}
}

func TestAResponderThatIsNotThere(t *testing.T) {
	if _, err := responders.Permit(responders.All(), stoop, []responders.Planned{step("delete-pdo", "")}); err == nil {
		t.Error("it is taken")
	}
}

// Names are two stoops' own.
func TestNamesOfTwoStoops(t *testing.T) {
	one, two := permit(t, responders.Account{Namespace: "stoop", Name: "stoop"}), permit(t, responders.Account{Namespace: "stoop", Name: "audit"})
	if !bytes.Contains(one, []byte(`name: "stoop"`+"\n  labels")) || !bytes.Contains(two, []byte(`name: "stoop-audit"`+"\n  labels")) {
		t.Errorf("%s\n%s", one, two)
	}
}
