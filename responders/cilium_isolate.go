package responders

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"stoop/param"
)

func ciliumIsolate() Entry {
	k := ciliumKind()
	return Entry{
		Name: "cilium-isolate",
		Doc:  "Cuts the pod that raised the alert, and no other, off the network by a CiliumNetworkPolicy that denies.",
		Notes: `As isolate-pod, but by Cilium's own kind: ingressDeny and egressDeny with the entity all.
In Cilium a denial wins over whatever any other policy allows, so none has to be looked
for that still lets traffic through. It takes away the traffic with the pod's own
node too, also the kubelet's probes where Cilium does not let the host through anyhow
(--allow-localhost). Connections that are open already are cut as well, as soon as
Cilium has made the policy its own.

The policy is named stoop-isolate- and the pod's UID, is owned by the pod, and selects the
label stoop.dev/isolated-cilium, which is put on the pod after it. Where Cilium was told
by its option labels to look at a few labels only, stoop.dev/ has to be among them: if
not, nothing is cut off, and Cilium says so nowhere. Whoever may change the labels of pods
in the namespace can take the label off, and whoever may change CiliumNetworkPolicies
there, the policy.

There are no exceptions (allowCIDRs, allowDNS): since a denial wins, they would have to be
left out of every denial, and Cilium knows peers inside the cluster by what they
are, not by their addresses. Take isolate-pod for these.

In a cluster that serves no CiliumNetworkPolicies the step is refused. That they are
taken by the API server is tested; that Cilium enforces them is not.`,
		Params:   param.Describe(ciliumIsolateDefaults()),
		RBAC:     k.denyRBAC(),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 15 * time.Second,
		New:      func(env Env) Responder { return &ciliumIsolator{denier{env.Kube, k}} },
	}
}

type ciliumIsolateParams struct {
	Direction string         `param:"direction" oneof:"ingress egress both" doc:"What is cut off: what comes in, what goes out, or both."`
	TTL       param.Duration `param:"ttl" doc:"After how long the pod is let back by itself; 0 is never."`
}

func ciliumIsolateDefaults() ciliumIsolateParams { return ciliumIsolateParams{Direction: "both"} }

func ciliumKind() denyKind {
	return denyKind{
		name: "cilium", product: "is Cilium installed?", kind: "CiliumNetworkPolicy", namespaced: true,
		resource: schema.GroupResource{Group: "cilium.io", Resource: "ciliumnetworkpolicies"},
		spec: func(pod *corev1.Pod, label string, d denial, _ string) map[string]any {
			all := func(key string) []any { return []any{map[string]any{key: []any{"all"}}} }
			spec := map[string]any{"endpointSelector": map[string]any{"matchLabels": map[string]any{label: string(pod.UID)}}}
			if d.Ingress != nil {
				spec["ingressDeny"] = all("fromEntities")
			}
			if d.Egress != nil {
				spec["egressDeny"] = all("toEntities")
			}
			return spec
		},
	}
}

type ciliumIsolator struct{ denier }

func (i *ciliumIsolator) Act(ctx context.Context, r *Request) (Result, error) {
	p := ciliumIsolateDefaults()
	if err := r.Decode(&p); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := i.Check(ctx, r); err != nil {
		return Result{}, err
	}
	return i.isolate(ctx, r, denialOf(p.Direction, nil, false), "", time.Duration(p.TTL))
}
