package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	corev1 "k8s.io/api/core/v1"

	"stoop/evidence"
	"stoop/param"
)

func deleteResource() Entry {
	return Entry{
		Name: "delete-resource",
		Doc:  "Deletes the object that a Kubernetes audit event names, of the kinds that the rule lists.",
		Notes: `It is for alerts of the source k8s_audit, which only a stoop with auditEvents: elected
answers (docs/audit-events.md), and waits for a person's approval unless the rule says
approve: false. Who may send a request chooses the name in it, also where it is
refused. So these are refused: an alert that does not say that the request was carried out
(ka.response.code), one with another verb than those in verbs, one about a subresource.
Have Falco write the fields:

    append_output:
      - match: {source: k8s_audit}
        extra_fields: [ka.verb, ka.response.code, ka.target.resource, ka.target.name,
                       ka.target.namespace, ka.target.subresource, ka.resp.name]

An audit event names neither the object's API group nor its UID. The group is that of the
kind in the rule. The object is the one meant only if it is not younger than the alert
(2 s for differing clocks) and, where the request made it, at most a minute older; the
delete then carries its UID and resource version. Beside create, the verbs update and patch
can be listed: then whoever may change an object can have it deleted.

Before, the object is kept as evidence: N.object.json is as it was, N.again.json as kubectl
create takes it. Of a Secret that is the secret. It can't be undone by stoop. What the object
owns goes with it, and one with finalizers goes when these are done.

Never deleted, whatever is listed: what is in a protected namespace, or is one; what is in
stoop's own namespace; roles and bindings that a service account of that namespace has, and
the policies that stoop rbac prints for them; mirror pods and those of a priority class system-*.
For a pod that raised an alert itself use delete-pod.

It needs get and delete on the kinds listed, and to delete roles also list on the bindings.`,
		Params:   param.Describe(deleteResourceDefaults()),
		Grants:   deleteResourceGrants(),
		Kind:     Harm,
		Object:   ResourceObject,
		Deadline: 15 * time.Second,
		Approve:  func(json.RawMessage) bool { return true },
		New: func(env Env) Responder {
			return &resourceDeleter{kube: env.Kube, store: env.Evidence, self: env.Self}
		},
	}
}

type deleteResourceParams struct {
	Kinds         []string `param:"kinds" required:"true" doc:"What may be deleted, as RESOURCE.GROUP, as kubectl knows it: secrets, rolebindings.rbac.authorization.k8s.io."`
	Verbs         []string `param:"verbs" doc:"The requests that it answers: create, update, patch."`
	Subresources  bool     `param:"subresources" doc:"Whether a request about a part of the object, such as pods/exec, counts as one about it."`
	ManifestFirst bool     `param:"manifestFirst" doc:"Whether nothing is deleted that could not be kept as evidence first."`
}

func deleteResourceDefaults() deleteResourceParams {
	return deleteResourceParams{Verbs: []string{"create"}, ManifestFirst: true}
}

// Validate refuses kinds that are none, and two of one name: an audit event does
// not tell them apart.
func (p deleteResourceParams) Validate() error {
	if len(p.Kinds) == 0 {
		return errors.New("kinds: there is none")
	}
	seen := map[string]string{}
	for _, k := range p.Kinds {
		gr, err := groupResource(k)
		if err != nil {
			return fmt.Errorf("kinds: %s %w", param.Cut(k), err)
		}
		if other, twice := seen[gr.Resource]; twice {
			return fmt.Errorf("kinds: %s and %s have one name, and an audit event does not tell which is meant", other, k)
		}
		seen[gr.Resource] = k
	}
	return checkVerbs(p.Verbs)
}

func (p deleteResourceParams) kind(resource string) (schema.GroupResource, bool) {
	for _, k := range p.Kinds {
		if gr, err := groupResource(k); err == nil && gr.Resource == resource {
			return gr, true
		}
	}
	return schema.GroupResource{}, false
}

func deleteResourceGrants() []Grant {
	grants := []Grant{{
		Rule: rbacv1.PolicyRule{APIGroups: []string{"{tail}"}, Resources: []string{"{head}"}, Verbs: []string{"get", "delete"}},
		Each: "kinds",
	}}
	for _, role := range []string{"roles", "clusterroles"} {
		grants = append(grants, Grant{
			Rule: rbacv1.PolicyRule{
				APIGroups: []string{rbacv1.GroupName}, Verbs: []string{"list"},
				Resources: bindingsOf(schema.GroupResource{Group: rbacv1.GroupName, Resource: role}),
			},
			Each: "kinds", Head: role, Tail: rbacv1.GroupName,
		})
	}
	return grants
}

func isRole(gr schema.GroupResource) bool {
	return gr.Group == rbacv1.GroupName && (gr.Resource == "roles" || gr.Resource == "clusterroles")
}

// bindingsOf are the resources that may bind a role.
func bindingsOf(role schema.GroupResource) []string {
	if role.Resource == "roles" {
		return []string{"rolebindings"}
	}
	return []string{"clusterrolebindings", "rolebindings"}
}

type resourceDeleter struct {
	kube  *Kube
	store *evidence.Store
	self  Self
}

// Check refuses what the alert alone tells not to delete.
func (d *resourceDeleter) Check(_ context.Context, r *Request) error {
	_, _, _, err := d.wanted(r)
	return err
}

func (d *resourceDeleter) wanted(r *Request) (params deleteResourceParams, kind schema.GroupResource, made bool, err error) {
	params = deleteResourceDefaults()
	if err := r.Decode(&params); err != nil {
		return params, kind, false, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, kind, false, Refuse("%v", err)
	}
	t := r.Target.Resource
	kind, ok := params.kind(t.Resource)
	switch {
	case !ok:
		return params, kind, false, Refuse("the alert is about %s, and the rule lists only %s", quote(t.Resource), strings.Join(params.Kinds, ", "))
	case d.self.Namespace != "" && (t.Namespace == d.self.Namespace || t.Resource == "namespaces" && t.Name == d.self.Namespace):
		return params, kind, false, Refuse("namespace %s is stoop's own", d.self.Namespace)
	}
	made, err = namedRequest(r.Alert, params.Verbs, params.Subresources)
	return params, kind, made, err
}

func (d *resourceDeleter) Act(ctx context.Context, r *Request) (Result, error) {
	params, kind, made, err := d.wanted(r)
	if err != nil {
		return Result{}, err
	}
	t := r.Target.Resource
	what := describe(r.Target)
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("delete %s: %w", what, err)
	}
	as, err := d.kube.Resource(ctx, kind)
	var none *ErrNotServed
	switch {
	case errors.As(err, &none):
		return Result{}, Refuse("delete %s: %v", what, err)
	case err != nil:
		return fail(err)
	}
	o, err := namedObject(ctx, d.kube, as, t, r.Alert.Time, made)
	if err != nil {
		return fail(err)
	}
	if err := d.spare(ctx, kind, o); err != nil {
		return fail(err)
	}
	kept := "; it was not kept as evidence"
	found := map[string]string{"uid": string(o.GetUID())}
	path, sum, err := keepManifests(ctx, d.store, r, string(o.GetUID()), []*unstructured.Unstructured{o})
	switch {
	case err == nil:
		found["evidence"], found["manifestSHA256"] = path, sum
		kept = "; its manifest is in " + path
	case ctx.Err() != nil:
		return fail(err)
	case params.ManifestFirst:
		return fail(Refuse("it can't be kept as evidence first (%v); manifestFirst: false deletes it even so", err))
	default:
		kept += " (" + err.Error() + ")"
	}
	if err := namedClient(d.kube, as, o.GetNamespace()).Delete(ctx, o.GetName(), onlyThis(o)); err != nil {
		return fail(err)
	}
	reason := "deleted" + kept
	if f := o.GetFinalizers(); len(f) > 0 {
		reason = "its deletion was asked for; it goes when its finalizers are done: " + oneLine(strings.Join(f, ", "), 200) + kept
	}
	return Result{Reason: reason, Found: found}, nil
}

// spare refuses what keeps the cluster or stoop itself running.
func (d *resourceDeleter) spare(ctx context.Context, kind schema.GroupResource, o *unstructured.Unstructured) error {
	namespace, name := d.self.account()
	switch {
	case kind.Group == "" && kind.Resource == "pods":
		if _, mirror := o.GetAnnotations()[corev1.MirrorPodAnnotationKey]; mirror {
			return Refuse("it is a static pod's mirror: the kubelet runs it whatever the API server says")
		}
		if class, _, _ := unstructured.NestedString(o.Object, "spec", "priorityClassName"); strings.HasPrefix(class, "system-") {
			return Refuse("priority class %s is protected", class)
		}
	case name == "":
	case kind.Group == "admissionregistration.k8s.io" && strings.HasPrefix(o.GetName(), namespace+"-") && strings.Contains(o.GetName(), ownNode):
		return Refuse("stoop itself needs it: it ties its token to its node")
	case kind.Group != rbacv1.GroupName:
	case isRole(kind):
		return d.spareRole(ctx, kind, o)
	default:
		var b rbacv1.ClusterRoleBinding // a RoleBinding has the same fields
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &b); err != nil {
			return Refuse("it can't be read: %v", err)
		}
		if slices.ContainsFunc(b.Subjects, d.self.isSubject) {
			return Refuse("stoop itself needs it: it binds its service account")
		}
	}
	return nil
}

// spareRole refuses a role that is bound to stoop's own service account.
func (d *resourceDeleter) spareRole(ctx context.Context, kind schema.GroupResource, role *unstructured.Unstructured) error {
	for _, resource := range bindingsOf(kind) {
		err := d.kube.eachBinding(ctx, resource, role.GetNamespace(), func(b *binding) error {
			if b.RoleRef.Kind == role.GetKind() && b.RoleRef.Name == role.GetName() &&
				slices.ContainsFunc(b.Subjects, d.self.isSubject) {
				return Refuse("stoop itself needs it: %s binds it to stoop's service account", b)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
