package responders

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"stoop/param"
)

func clusterIsolate() Entry {
	k := clusterKind()
	return Entry{
		Name: "cluster-isolate",
		Doc:  "Cuts the pod that raised the alert, and no other, off the network by a ClusterNetworkPolicy that denies, in the Admin tier.",
		Notes: `As isolate-pod, but by Kubernetes' own kind for administrators (policy.networking.k8s.io), in
the tier Admin with priority 0: it comes before every NetworkPolicy, and none of them can
allow what it denies. Where another ClusterNetworkPolicy of that tier has priority 0 too and
matches the same traffic, which of the two holds is not defined: keep 0 free.

What comes in is denied from pods only, because the kind can name no other sources: what
comes from outside the cluster, from nodes and from pods in the host's network is not cut
off. isolate-pod with strength: strongest has a NetworkPolicy beside it, which does that
too. What goes out is denied to all addresses.

It is in no namespace, so that nobody who may write policies in the pod's namespace can
change it. That also means that the pod can't own it: when the pod is gone the policy stays,
selecting nothing, until its ttl is over or the step is undone (stoop undo works without
the pod). Give a ttl. Its annotation stoop.dev/pod says whose it was.

The pod is selected by its namespace and the label stoop.dev/isolated-cluster, which is put
on it after the policy. Whoever may change the labels of pods in the namespace can take it
off. What allowCIDRs and allowDNS name is passed on: whether it is let through is for the
NetworkPolicies and the tier Baseline to say. allowCIDRs holds for what goes out only;
allowDNS means pods labelled k8s-app=kube-dns in kube-system, port 53.

In a cluster that serves no ClusterNetworkPolicies the step is refused; they are of the
versions v1alpha2 and v1beta1, and no AdminNetworkPolicies. That they are taken by the API
server is tested; that a network plugin enforces them is not, and few do.`,
		Params:   param.Describe(clusterIsolateDefaults()),
		RBAC:     k.denyRBAC(),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 15 * time.Second,
		New:      func(env Env) Responder { return &clusterIsolator{denier{env.Kube, k}} },
	}
}

type clusterIsolateParams struct {
	Direction  string         `param:"direction" oneof:"ingress egress both" doc:"What is cut off: what comes in, what goes out, or both."`
	AllowCIDRs []param.CIDR   `param:"allowCIDRs" doc:"Addresses that the pod may still talk to, if no other policy denies it; 500 at most. Has no meaning for what comes in."`
	AllowDNS   bool           `param:"allowDNS" doc:"Whether the pod may still ask the cluster's DNS server, if no other policy denies it."`
	TTL        param.Duration `param:"ttl" doc:"After how long the pod is let back by itself, and the policy deleted; 0 is never."`
}

func clusterIsolateDefaults() clusterIsolateParams { return clusterIsolateParams{Direction: "both"} }

// Validate says what the types can't.
func (p clusterIsolateParams) Validate() error {
	if n := len(p.AllowCIDRs); n > clusterCIDRs {
		return fmt.Errorf("allowCIDRs has %d ranges, and a ClusterNetworkPolicy holds %d", n, clusterCIDRs)
	}
	return nil
}

const (
	// perRule is how many networks a rule holds, and how many rules a direction.
	perRule      = 25
	clusterCIDRs = 20 * perRule
)

func clusterKind() denyKind {
	return denyKind{
		name: "cluster", product: "does its network plugin bring ClusterNetworkPolicy?", kind: "ClusterNetworkPolicy", exceptions: true,
		resource: schema.GroupResource{Group: "policy.networking.k8s.io", Resource: "clusternetworkpolicies"},
		spec:     clusterSpec,
	}
}

func clusterSpec(pod *corev1.Pod, label string, d denial, _ string) map[string]any {
	of := func(label, value string) map[string]any {
		return map[string]any{"matchLabels": map[string]any{label: value}}
	}
	everyPod := map[string]any{"namespaces": map[string]any{}}
	spec := map[string]any{
		"tier": "Admin", "priority": int64(0),
		"subject": map[string]any{"pods": map[string]any{
			"namespaceSelector": of(corev1.LabelMetadataName, pod.Namespace), "podSelector": of(label, string(pod.UID)),
		}},
	}
	if d.Ingress != nil {
		spec["ingress"] = []any{map[string]any{"name": "stoop", "action": "Deny", "from": []any{everyPod}}}
	}
	if d.Egress == nil {
		return spec
	}
	var egress []any
	if d.Egress.DNS {
		port := map[string]any{"destinationPort": map[string]any{"number": int64(53)}}
		egress = append(egress, map[string]any{
			"name": "stoop-dns", "action": "Pass",
			"to": []any{map[string]any{"pods": map[string]any{
				"namespaceSelector": of(corev1.LabelMetadataName, "kube-system"), "podSelector": of("k8s-app", "kube-dns"),
			}}},
			"protocols": []any{map[string]any{"udp": port}, map[string]any{"tcp": port}},
		})
	}
	for some := range slices.Chunk(d.Egress.CIDRs, perRule) {
		var nets []any
		for _, c := range some {
			nets = append(nets, c)
		}
		egress = append(egress, map[string]any{"name": "stoop-allow", "action": "Pass", "to": []any{map[string]any{"networks": nets}}})
	}
	spec["egress"] = append(egress, map[string]any{
		"name": "stoop", "action": "Deny", "to": []any{everyPod, map[string]any{"networks": []any{"0.0.0.0/0", "::/0"}}},
	})
	return spec
}

type clusterIsolator struct{ denier }

func (i *clusterIsolator) Act(ctx context.Context, r *Request) (Result, error) {
	p := clusterIsolateDefaults()
	if err := r.Decode(&p); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := i.Check(ctx, r); err != nil {
		return Result{}, err
	}
	return i.isolate(ctx, r, denialOf(p.Direction, p.AllowCIDRs, p.AllowDNS), "", time.Duration(p.TTL))
}
