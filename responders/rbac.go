package responders

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
)

// Planned is a step that rules may cause.
type Planned struct {
	Responder string
	Params    json.RawMessage
	// Namespaces are those that its rule is limited to; nil: any. None but nil: the
	// step can act nowhere.
	Namespaces []string
}

// Account is a service account.
type Account struct {
	Namespace, Name string
	AuditEvents     bool // of the stoops that answer audit events, and nothing else
}

// actsOn reports whether its stoops do steps on such an object: what a node's stoop acts
// on, the one that answers audit events never does, and the other way round.
func (a Account) actsOn(o Object) bool {
	return o == NoObject || a.AuditEvents == (o == ResourceObject)
}

// user is what the API server calls it.
func (a Account) user() string { return "system:serviceaccount:" + a.Namespace + ":" + a.Name }

// objects is the name of what is made for it.
func (a Account) objects() string {
	if a.Namespace == a.Name {
		return a.Name
	}
	return a.Namespace + "-" + a.Name
}

// NamespaceField is the field of an alert that names the namespace of what a step
// with these parameters acts on; "": none does.
func (e *Entry) NamespaceField(params json.RawMessage) string {
	switch e.objectOf(params) {
	case PodObject:
		return "k8s.ns.name"
	case ResourceObject:
		return "ka.target.namespace"
	}
	return ""
}

// Permissions are the least that steps need, by where they need it.
type Permissions struct {
	account    Account
	cluster    grants
	namespaces map[string]grants
	own        grants // in stoop's own namespace
	// What the token's node can be tied to, and what can't.
	onNode grants
}

// grants are permissions, and who needs them.
type grants map[grant]map[string]bool

// grant is one verb on one resource. names are the objects' that it is limited to,
// separated by spaces, which no name holds.
type grant struct{ group, resource, names, verb string }

func (g grants) add(rules []rbacv1.PolicyRule, by string) {
	for _, r := range rules {
		names := slices.Clone(r.ResourceNames)
		slices.Sort(names)
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				for _, verb := range r.Verbs {
					k := grant{group, resource, strings.Join(names, " "), verb}
					if g[k] == nil {
						g[k] = map[string]bool{}
					}
					g[k][by] = true
				}
			}
		}
	}
}

// without leaves out what others grant already.
func (g grants) without(others ...grants) grants {
	out := maps.Clone(g)
	maps.DeleteFunc(out, func(k grant, _ map[string]bool) bool {
		all := k
		all.names = ""
		return slices.ContainsFunc(others, func(o grants) bool { return o[k] != nil || o[all] != nil }) || all != k && g[all] != nil
	})
	return out
}

func (g grants) has(resource string, verbs ...string) bool {
	for k := range g {
		if k.group == "" && k.resource == resource && (len(verbs) == 0 || slices.Contains(verbs, k.verb)) {
			return true
		}
	}
	return false
}

// role is a rule of a role, as it is printed.
type role struct {
	rbacv1.PolicyRule
	by []string
}

// roles are the fewest rules that say the same, in a fixed order.
func (g grants) roles() []role {
	type of struct{ group, resource, names string }
	verbs := map[of][]string{}
	for k := range g {
		o := of{k.group, k.resource, k.names}
		verbs[o] = append(verbs[o], k.verb)
	}
	type alike struct{ group, names, verbs string }
	rules := map[alike]*role{}
	for o, v := range verbs {
		slices.Sort(v)
		a := alike{o.group, o.names, strings.Join(v, " ")}
		r := rules[a]
		if r == nil {
			r = &role{PolicyRule: rbacv1.PolicyRule{APIGroups: []string{o.group}, Verbs: v}}
			if o.names != "" {
				r.ResourceNames = strings.Fields(o.names)
			}
			rules[a] = r
		}
		r.Resources = append(r.Resources, o.resource)
		for _, verb := range v {
			r.by = slices.AppendSeq(r.by, maps.Keys(g[grant{o.group, o.resource, o.names, verb}]))
		}
	}
	out := make([]role, 0, len(rules))
	for _, r := range rules {
		slices.Sort(r.Resources)
		slices.Sort(r.by)
		r.by = slices.Compact(r.by)
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b role) int {
		return cmp.Or(slices.Compare(a.APIGroups, b.APIGroups), slices.Compare(a.Resources, b.Resources), slices.Compare(a.ResourceNames, b.ResourceNames))
	})
	return out
}

// Permit is what an account needs for the steps. Each of them is one of the entries.
func Permit(entries []Entry, a Account, steps []Planned) (*Permissions, error) {
	p := &Permissions{account: a, cluster: grants{}, namespaces: map[string]grants{}, own: grants{}, onNode: grants{}}
	p.cluster.add(PauseRBAC(a.Namespace), "stoop itself")
	p.own.add(OwnRBAC(), "stoop itself")
	if a.AuditEvents {
		p.own.add(ElectionRBAC(), "stoop itself")
	} else {
		p.cluster.add(BaseRBAC(), "stoop itself")
	}
	for _, s := range steps {
		if err := p.plan(entries, s); err != nil {
			return nil, err
		}
	}
	for _, g := range p.namespaces {
		maps.DeleteFunc(g, func(k grant, _ map[string]bool) bool { return g.without(p.cluster)[k] == nil })
	}
	return p, nil
}

func (p *Permissions) plan(entries []Entry, s Planned) error {
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Name == s.Responder })
	if i < 0 {
		return fmt.Errorf("there is no responder %q", s.Responder)
	}
	e := &entries[i]
	object := e.objectOf(s.Params)
	if !p.account.actsOn(object) {
		return nil
	}
	if s.Namespaces != nil && len(s.Namespaces) == 0 && e.NamespaceField(s.Params) != "" {
		return nil
	}
	everywhere := s.Namespaces == nil || e.NamespaceField(s.Params) == "" || e.with(e.Everywhere, s.Params)
	for _, r := range split(e.PermissionsFor(s.Params)) {
		one := []rbacv1.PolicyRule{r}
		scoped := clusterScoped(r.APIGroups[0], r.Resources[0])
		switch {
		case ofOwnNamespace(r):
			p.own.add(one, e.Name)
			continue
		case everywhere, scoped && object == PodObject:
			p.cluster.add(one, e.Name)
		case scoped && r.Resources[0] != "namespaces" && !slices.Contains(r.Verbs, "bind"):
			// What has a namespace is none of these.
		default:
			for _, ns := range s.Namespaces {
				if p.namespaces[ns] == nil {
					p.namespaces[ns] = grants{}
				}
				p.namespaces[ns].add(one, e.Name)
			}
		}
		if !p.account.AuditEvents {
			p.onNode.add(one, e.Name)
		}
	}
	if e.Instead != "" {
		return p.plan(entries, Planned{Responder: e.Instead, Namespaces: s.Namespaces})
	}
	return nil
}

// split is the rules with one group and one resource each.
func split(rules []rbacv1.PolicyRule) []rbacv1.PolicyRule {
	var out []rbacv1.PolicyRule
	for _, r := range rules {
		for _, g := range r.APIGroups {
			for _, resource := range r.Resources {
				out = append(out, rbacv1.PolicyRule{APIGroups: []string{g}, Resources: []string{resource}, Verbs: r.Verbs, ResourceNames: r.ResourceNames})
			}
		}
	}
	return out
}

// ofOwnNamespace reports whether a responder needs something in stoop's own
// namespace alone: the Leases by which stoops agree, which are nobody else's.
func ofOwnNamespace(r rbacv1.PolicyRule) bool {
	return r.APIGroups[0] == "coordination.k8s.io" && r.Resources[0] == "leases"
}

// clusterScoped reports whether objects of a resource are in no namespace. What it
// does not know it takes for namespaced.
func clusterScoped(group, resource string) bool {
	resource, _, _ = strings.Cut(resource, "/")
	return slices.Contains(clusterScopedResources()[group], resource)
}

func clusterScopedResources() map[string][]string {
	return map[string][]string{
		"":                             {"nodes", "namespaces", "persistentvolumes"},
		"admissionregistration.k8s.io": {"mutatingadmissionpolicies", "mutatingadmissionpolicybindings", "mutatingwebhookconfigurations", "validatingadmissionpolicies", "validatingadmissionpolicybindings", "validatingwebhookconfigurations"},
		"apiextensions.k8s.io":         {"customresourcedefinitions"},
		"apiregistration.k8s.io":       {"apiservices"},
		"certificates.k8s.io":          {"certificatesigningrequests", "clustertrustbundles"},
		"cilium.io":                    {"ciliumclusterwidenetworkpolicies"},
		"crd.projectcalico.org":        {"globalnetworkpolicies", "globalnetworksets", "tiers"},
		"projectcalico.org":            {"globalnetworkpolicies", "globalnetworksets", "tier.globalnetworkpolicies", "tiers"},
		"flowcontrol.apiserver.k8s.io": {"flowschemas", "prioritylevelconfigurations"},
		"networking.k8s.io":            {"ingressclasses"},
		"node.k8s.io":                  {"runtimeclasses"},
		"policy.networking.k8s.io":     {"adminnetworkpolicies", "baselineadminnetworkpolicies", "clusternetworkpolicies"},
		rbacv1.GroupName:               {"clusterroles", "clusterrolebindings"},
		"scheduling.k8s.io":            {"priorityclasses"},
		"storage.k8s.io":               {"csidrivers", "csinodes", "storageclasses", "volumeattachments"},
	}
}

// Write prints the roles, their bindings, and the policies that tie the account to
// its own node, as YAML that kubectl apply takes. The same permissions are always
// printed alike.
func (p *Permissions) Write(w io.Writer) error {
	var b strings.Builder
	a := p.account
	p.writeRole(&b, a, "ClusterRole", "", p.cluster, "In the whole cluster.")
	for _, ns := range slices.Sorted(maps.Keys(p.namespaces)) {
		p.writeRole(&b, a, "Role", ns, p.namespaces[ns].without(p.cluster), "In a namespace that rules are limited to.")
	}
	p.writeRole(&b, a, "Role", a.Namespace, p.own.without(p.cluster), "In stoop's own namespace.")
	p.writePolicies(&b, a)
	_, err := io.WriteString(w, strings.TrimPrefix(b.String(), "---\n"))
	return err
}

func (p *Permissions) writeRole(b *strings.Builder, a Account, kind, namespace string, g grants, what string) {
	if len(g) == 0 {
		return
	}
	meta := func(kind string) {
		fmt.Fprintf(b, "apiVersion: rbac.authorization.k8s.io/v1\nkind: %s\nmetadata:\n  name: %q\n", kind, a.objects())
		if namespace != "" {
			fmt.Fprintf(b, "  namespace: %q\n", namespace)
		}
		b.WriteString(ownLabels)
	}
	fmt.Fprintf(b, "---\n# %s\n", what)
	meta(kind)
	b.WriteString("rules:\n")
	for _, r := range g.roles() {
		for _, line := range strings.Split(fill("For "+strings.Join(r.by, ", ")+"."), "\n") {
			fmt.Fprintf(b, "  # %s\n", line)
		}
		fmt.Fprintf(b, "  - apiGroups: %s\n    resources: %s\n", yamlList(r.APIGroups), yamlList(r.Resources))
		if len(r.ResourceNames) > 0 {
			fmt.Fprintf(b, "    resourceNames: %s\n", yamlList(r.ResourceNames))
		}
		fmt.Fprintf(b, "    verbs: %s\n", yamlList(r.Verbs))
	}
	b.WriteString("---\n")
	meta(kind + "Binding")
	fmt.Fprintf(b, "roleRef:\n  apiGroup: rbac.authorization.k8s.io\n  kind: %s\n  name: %q\nsubjects:\n  - kind: ServiceAccount\n    name: %q\n    namespace: %q\n",
		kind, a.objects(), a.Name, a.Namespace)
}

const ownLabels = "  labels:\n    app.kubernetes.io/name: stoop\n    app.kubernetes.io/component: permissions\n"

// yamlList is a list in YAML, of which JSON's is one.
func yamlList(s []string) string {
	q := make([]string, len(s))
	for i := range s {
		q[i] = fmt.Sprintf("%q", s[i])
	}
	return "[" + strings.Join(q, ", ") + "]"
}

// ownNode is in the name of a policy, between the account's and what it ties.
const ownNode = "-own-node-"

// writePolicies prints what RBAC can't say: of the token's own node only.
func (p *Permissions) writePolicies(b *strings.Builder, a Account) {
	type tied struct{ what, does, resources, operations, own, says string }
	var policies []tied
	var loose []string
	change := []string{"patch", "update"}
	var resources, operations []string
	if p.onNode.has("pods", "delete", "deletecollection") {
		operations = append(operations, "DELETE")
	}
	if p.onNode.has("pods", change...) {
		operations = append(operations, "UPDATE")
	}
	if len(operations) > 0 {
		resources = append(resources, "pods")
	}
	if p.onNode.has("pods/ephemeralcontainers", change...) {
		resources = append(resources, "pods/ephemeralcontainers")
		operations = append(operations, "UPDATE")
	}
	if slices.Sort(operations); len(resources) > 0 {
		policies = append(policies, tied{
			"pods", "delete or change pods", yamlList(resources), yamlList(slices.Compact(operations)),
			"oldObject.?spec.?nodeName.orValue('')", "this pod does not run on the node that stoop's token is of",
		})
	}
	if p.onNode.has("nodes", change...) {
		policies = append(policies, tied{"nodes", "change the Node", `["nodes"]`, `["UPDATE"]`, "request.name", "this is not the node that stoop's token is of"})
	}
	if len(policies) == 0 {
		return
	}
	if p.onNode.has("pods/eviction") {
		loose = append(loose, "evictions (pods/eviction)")
	}
	if p.onNode.has("pods/exec") || p.onNode.has("pods/attach") {
		loose = append(loose, "commands in containers (pods/exec)")
	}
	if p.onNode.has("pods/log") {
		loose = append(loose, "reading logs (pods/log)")
	}
	loose = append(loose, "reading pods, and objects of other kinds")
	for _, t := range policies {
		name := a.objects() + ownNode + t.what
		about := "Ties stoop's token, which is bound to a pod, to that pod's node: a token that is stolen from one node can't " + t.does + " of another. Needs Kubernetes 1.32."
		if t.what == "pods" {
			about += " What admission does not tell the node of can't be tied: " + strings.Join(loose, "; ") + "."
		}
		b.WriteString("---\n")
		for _, line := range strings.Split(fill(about), "\n") {
			fmt.Fprintf(b, "# %s\n", line)
		}
		fmt.Fprintf(b, `apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: %[1]q
%[2]sspec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
      - apiGroups: [""]
        apiVersions: ["v1"]
        operations: %[3]s
        resources: %[4]s
  matchConditions:
    - name: stoop
      expression: request.userInfo.username == '%[5]s'
  variables:
    - name: node
      expression: request.userInfo.extra[?'authentication.kubernetes.io/node-name'][0].orValue('')
  validations:
    - expression: variables.node != '' && variables.node == %[6]s
      message: %[7]q
      reason: Forbidden
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: %[1]q
%[2]sspec:
  policyName: %[1]q
  validationActions: ["Deny"]
`, name, ownLabels, t.operations, t.resources, a.user(), t.own, t.says)
	}
}
