package responders

import (
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/param"
)

func annotatePod() Entry {
	return Entry{
		Name: "annotate-pod",
		Doc:  "Sets annotations on the pod that raised the alert, or takes them off.",
		Notes: `A note on the pod for people and for programs that look at it. Kubernetes itself
selects nothing by annotations, but what runs in the cluster may: a service mesh, an
ingress, a backup or a scraper can be switched on and off by one.

Keys under stoop.dev/, kubernetes.io/ and k8s.io/ and under names below these are
refused, save app.kubernetes.io/. The values are those in the rule, never the
alert's. Undo puts back what was there before, where the annotation still is what
stoop made of it. The pod's template, and so its replacement, are not annotated.
Whoever may change pods in the namespace can change the annotations too: nothing that
must hold should hang on them.`,
		Params: param.Describe(annotatePodParams{}),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "patch"}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		New: func(env Env) Responder {
			return &metadataSetter{kube: env.Kube, field: annotationsField, on: PodObject, params: func() metadataParams { return &annotatePodParams{} }}
		},
	}
}

type annotatePodParams struct {
	Annotations map[string]string `param:"annotations" required:"true" doc:"The annotations by name; an empty value takes the annotation off."`
	TTL         param.Duration    `param:"ttl" doc:"After how long the annotations are put back by themselves; 0 is never."`
}

// Validate refuses what the API server would, and what is others' to set.
func (p annotatePodParams) Validate() error {
	return checkNames(annotationsField, p.Annotations, reservedName)
}

func (p annotatePodParams) values() (map[string]string, time.Duration) {
	return p.Annotations, time.Duration(p.TTL)
}
