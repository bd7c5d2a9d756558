package responders

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/param"
)

// defaultTier is Calico's, which is always there.
const defaultTier = "default"

func calicoIsolate() Entry {
	k := calicoKind()
	return Entry{
		Name: "calico-isolate",
		Doc:  "Cuts the pod that raised the alert, and no other, off the network by a Calico GlobalNetworkPolicy that denies.",
		Notes: `As isolate-pod, but by Calico's own kind, of order 0 in the tier default, with the action
Deny: it comes before all NetworkPolicies, whose order is 1000, and before Calico's
own policies of a higher order. Those of the same tier with a lower order, or with order 0
and a name before stoop-isolate-, come first, and so does every tier before: what
they allow is allowed. tier: puts it in a tier of yours that comes before the others; it
has to be there.

It is in no namespace, so that nobody who may write policies in the pod's namespace can
change it. That also means that the pod can't own it: when the pod is gone the policy stays,
selecting nothing, until its ttl is over or the step is undone (stoop undo works without
the pod). Give a ttl. Its annotation stoop.dev/pod says whose it was.

The pod is selected by its namespace and the label stoop.dev/isolated-calico, which is put on
it after the policy. Whoever may change the labels of pods in the namespace can take it off.
Connections that are open already go on until their entry in the kernel's table of
connections is over, unless Calico runs its eBPF data plane.

What allowCIDRs and allowDNS let through is let through whatever other policies of the tier
say; in a tier of yours it goes on to the next tier instead, where it may be denied. allowDNS
means pods labelled k8s-app=kube-dns in kube-system, port 53.

It needs projectcalico.org/v3, by Calico's API server or as custom resources. In a cluster
that serves only crd.projectcalico.org, which Calico wants nobody to write to, the step
is refused. Calico's API server also asks whether stoop may get the tier, and use
tier.globalnetworkpolicies. That such objects are taken by the API server is tested;
that Calico enforces them is not.`,
		Params:   param.Describe(calicoIsolateDefaults()),
		RBAC:     k.denyRBAC(),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 15 * time.Second,
		New:      func(env Env) Responder { return &calicoIsolator{denier{env.Kube, k}} },
	}
}

type calicoIsolateParams struct {
	Direction  string         `param:"direction" oneof:"ingress egress both" doc:"What is cut off: what comes in, what goes out, or both."`
	AllowCIDRs []param.CIDR   `param:"allowCIDRs" doc:"Addresses that the pod may still talk to, in the directions that are cut off."`
	AllowDNS   bool           `param:"allowDNS" doc:"Whether the pod may still ask the cluster's DNS server. Has no meaning for the direction ingress."`
	Tier       string         `param:"tier" doc:"The tier that the policy is in."`
	TTL        param.Duration `param:"ttl" doc:"After how long the pod is let back by itself, and the policy deleted; 0 is never."`
}

func calicoIsolateDefaults() calicoIsolateParams {
	return calicoIsolateParams{Direction: "both", Tier: defaultTier}
}

// Validate says what the types can't.
func (p calicoIsolateParams) Validate() error {
	if msgs := validation.IsDNS1123Label(p.Tier); len(msgs) > 0 {
		return fmt.Errorf("tier %q: %s", p.Tier, msgs[0])
	}
	return nil
}

func calicoKind() denyKind {
	const group = "projectcalico.org"
	return denyKind{
		name: "calico", product: "is Calico installed, with its API server or native v3 resources?", kind: "GlobalNetworkPolicy", exceptions: true,
		resource: schema.GroupResource{Group: group, Resource: "globalnetworkpolicies"},
		more: []rbacv1.PolicyRule{
			{APIGroups: []string{group}, Resources: []string{"tiers"}, Verbs: []string{"get"}},
			{APIGroups: []string{group}, Resources: []string{"tier.globalnetworkpolicies"}, Verbs: []string{"get", "create", "update", "delete"}},
		},
		spec: calicoSpec,
	}
}

func calicoSpec(pod *corev1.Pod, label string, d denial, tier string) map[string]any {
	through := "Allow"
	if tier != defaultTier {
		through = "Pass" // to the next tier
	}
	rules := func(e *exceptions, peer string) []any {
		var out []any
		if e.DNS {
			for _, protocol := range []string{"UDP", "TCP"} {
				out = append(out, map[string]any{"action": through, "protocol": protocol, peer: map[string]any{
					"namespaceSelector": "projectcalico.org/name == 'kube-system'", "selector": "k8s-app == 'kube-dns'", "ports": []any{int64(53)},
				}})
			}
		}
		for _, c := range e.CIDRs {
			out = append(out, map[string]any{"action": through, peer: map[string]any{"nets": []any{c}}})
		}
		return append(out, map[string]any{"action": "Deny"})
	}
	var kinds []any
	spec := map[string]any{
		"tier": tier, "order": int64(0),
		// Neither holds a quotation mark.
		"selector": fmt.Sprintf("%s == '%s' && projectcalico.org/namespace == '%s'", label, pod.UID, pod.Namespace),
	}
	if d.Ingress != nil {
		kinds, spec["ingress"] = append(kinds, "Ingress"), rules(d.Ingress, "source")
	}
	if d.Egress != nil {
		kinds, spec["egress"] = append(kinds, "Egress"), rules(d.Egress, "destination")
	}
	spec["types"] = kinds
	return spec
}

type calicoIsolator struct{ denier }

func (i *calicoIsolator) Act(ctx context.Context, r *Request) (Result, error) {
	p := calicoIsolateDefaults()
	if err := r.Decode(&p); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := i.Check(ctx, r); err != nil {
		return Result{}, err
	}
	return i.isolate(ctx, r, denialOf(p.Direction, p.AllowCIDRs, p.AllowDNS), p.Tier, time.Duration(p.TTL))
}
