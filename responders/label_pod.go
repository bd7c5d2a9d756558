package responders

import (
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/param"
)

func labelPod() Entry {
	return Entry{
		Name: "label-pod",
		Doc:  "Sets labels on the pod that raised the alert, or takes them off.",
		Notes: `Labels are more than notes. Taking off a label that a Service selects takes the pod
out of the Service; taking off one that a ReplicaSet selects (or pod-template-hash)
makes the ReplicaSet start another pod and leaves this one running on its own, to be
looked into. Both may be what you want; setting one may also draw traffic or a
policy to the pod.

Keys under stoop.dev/, kubernetes.io/ and k8s.io/ and under names below these are
refused, save app.kubernetes.io/. Undo puts back what was there before, where the
label still is what stoop made of it. Whoever may change pods in the namespace can
change the labels too: nothing that must hold should hang on them.`,
		Params: param.Describe(labelPodParams{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "patch"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		New: func(env Env) Responder {
			return &metadataSetter{kube: env.Kube, field: labelsField, on: PodObject, params: func() metadataParams { return &labelPodParams{} }}
		},
	}
}

type labelPodParams struct {
	Labels map[string]string `param:"labels" required:"true" doc:"The labels by name; an empty value takes the label off."`
	TTL    param.Duration    `param:"ttl" doc:"After how long the labels are put back by themselves; 0 is never."`
}

// Validate refuses what the API server would, and what is others' to set.
func (p labelPodParams) Validate() error { return checkLabels(p.Labels, reservedName) }

func (p labelPodParams) values() (map[string]string, time.Duration) {
	return p.Labels, time.Duration(p.TTL)
}
