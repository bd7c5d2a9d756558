package responders

import (
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/param"
)

func labelNode() Entry {
	return Entry{
		Name: "label-node",
		Doc:  "Sets labels on the node that the alert came from, or takes them off.",
		Notes: `Labels decide what runs on a node. Setting one may start DaemonSets' pods there and
draw others to it; taking one off that a DaemonSet selects ends its pod on this node
(also Falco's, and stoop's own), while other pods that run there stay. A label that
an autoscaler or a cloud's controller reads may make it act on the node.

Keys under stoop.dev/, kubernetes.io/ and k8s.io/ and under names below these are
refused: the roles, the topology, the architecture and what node-restriction.kubernetes.io/
guards are not for rules to set. Allowed are app.kubernetes.io/ and
node.kubernetes.io/exclude-from-external-load-balancers, which takes the node out of
the cloud's load balancers. Undo puts back what was there before, where the label
still is what stoop made of it.

Whoever has the credentials of the node's kubelet, as an attacker has who has taken the
node over, can take such a label off again: nothing that must hold should hang on it.

In the cluster the node has the name that stoop was given: node: in stoop.yaml, --node
or NODE_NAME. RBAC can't say "this node only"; the request does.`,
		Params: param.Describe(labelNodeParams{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "patch"}},
		},
		Kind:     Harm,
		Object:   NodeObject,
		Deadline: 10 * time.Second,
		New: func(env Env) Responder {
			return &metadataSetter{kube: env.Kube, field: labelsField, on: NodeObject, node: env.Node, params: func() metadataParams { return &labelNodeParams{} }}
		},
	}
}

type labelNodeParams struct {
	Labels map[string]string `param:"labels" required:"true" doc:"The labels by name; an empty value takes the label off."`
	TTL    param.Duration    `param:"ttl" doc:"After how long the labels are put back by themselves; 0 is never."`
}

// Validate refuses what the API server would, and what is others' to set.
func (p labelNodeParams) Validate() error {
	return checkLabels(p.Labels, func(name string) bool {
		return reservedName(name) && name != "node.kubernetes.io/exclude-from-external-load-balancers"
	})
}

func (p labelNodeParams) values() (map[string]string, time.Duration) {
	return p.Labels, time.Duration(p.TTL)
}
