package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"stoop/param"
)

// denyKind is a kind of policy that denies: other than a NetworkPolicy, it can't be
// outvoted by one that allows. They are made by the dynamic client, so that no
// network plugin's module is linked.
type denyKind struct {
	name       string // of the kind, in found.strength and in the pod's label
	product    string // that serves it
	resource   schema.GroupResource
	kind       string
	namespaced bool // so the pod can own it
	exceptions bool // it can let some traffic through
	spec       func(pod *corev1.Pod, label string, d denial, tier string) map[string]any
	more       []rbacv1.PolicyRule // besides its own resource
}

// denyKinds are all of them, the strongest first.
func denyKinds() []denyKind { return []denyKind{ciliumKind(), calicoKind(), clusterKind()} }

// label is on the pod. Each kind has one of its own, so that each can be undone by
// itself.
func (k denyKind) label() string { return labelIsolated + "-" + k.name }

func (k denyKind) rbac() []rbacv1.PolicyRule {
	return append([]rbacv1.PolicyRule{{
		APIGroups: []string{k.resource.Group}, Resources: []string{k.resource.Resource},
		Verbs: []string{"get", "create", "update", "delete"},
	}}, k.more...)
}

// denyRBAC is what the responder of a kind needs.
func (k denyKind) denyRBAC() []rbacv1.PolicyRule {
	return append([]rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "patch"}},
	}, k.rbac()...)
}

// annotationDenies is on the policy: what stoop made it to cut off.
const annotationDenies = ownPrefix + "denies"

// denial is what is cut off; a direction that is nil is not.
type denial struct {
	Ingress *exceptions `json:"ingress,omitempty"`
	Egress  *exceptions `json:"egress,omitempty"`
}

// exceptions are what is let through in a direction that is cut off.
type exceptions struct {
	CIDRs []string `json:"cidrs,omitempty"`
	DNS   bool     `json:"dns,omitempty"` // to the cluster's DNS server; for egress
}

func denialOf(direction string, cidrs []param.CIDR, dns bool) denial {
	var list []string
	for _, c := range cidrs {
		list = append(list, c.Masked().String())
	}
	var d denial
	if direction != "egress" {
		d.Ingress = &exceptions{CIDRs: list}
	}
	if direction != "ingress" {
		d.Egress = &exceptions{CIDRs: list, DNS: dns}
	}
	return d
}

// with cuts off what either does.
func (d denial) with(o denial) denial {
	return denial{Ingress: d.Ingress.and(o.Ingress), Egress: d.Egress.and(o.Egress)}
}

// and lets through what both do.
func (e *exceptions) and(o *exceptions) *exceptions {
	switch {
	case e == nil:
		return o
	case o == nil:
		return e
	}
	both := &exceptions{DNS: e.DNS && o.DNS}
	for _, c := range e.CIDRs {
		if slices.Contains(o.CIDRs, c) {
			both.CIDRs = append(both.CIDRs, c)
		}
	}
	return both
}

// denier isolates by one kind of policy.
type denier struct {
	kube *Kube
	kind denyKind
}

// Check refuses pods that no policy reaches, and clusters that have no such kind.
func (d *denier) Check(ctx context.Context, r *Request) error {
	if err := refuseHostNetwork(r.Pod); err != nil {
		return err
	}
	_, err := d.served(ctx)
	return err
}

func refuseHostNetwork(pod *corev1.Pod) error {
	if pod.Spec.HostNetwork {
		return Refuse("pod %s/%s is in the host's network, which no NetworkPolicy reaches", pod.Namespace, pod.Name)
	}
	return nil
}

// served says how the cluster serves the kind, or refuses.
func (d *denier) served(ctx context.Context) (Served, error) {
	s, err := d.kube.Resource(ctx, d.kind.resource)
	if as[*ErrNotServed](err) {
		return s, Refuse("the cluster serves no %s: %s", d.kind.resource, d.kind.product)
	}
	if err != nil {
		return s, fmt.Errorf("ask how %s are served: %w", d.kind.resource, err)
	}
	return s, nil
}

func (d *denier) policies(s Served, namespace string) dynamic.ResourceInterface {
	if d.kind.namespaced {
		return d.kube.Dynamic().Resource(s.GroupVersionResource).Namespace(namespace)
	}
	return d.kube.Dynamic().Resource(s.GroupVersionResource)
}

// denialRecord is the undo record. It is all that undo believes.
type denialRecord struct {
	Namespace string    `json:"namespace"` // of the pod
	Pod       string    `json:"pod"`
	UID       types.UID `json:"uid"`
	Policy    string    `json:"policy"`
	PolicyUID types.UID `json:"policyUID"`
	Kind      string    `json:"kind"` // the name of the [denyKind]
	Step      string    `json:"step"`
}

// isolate makes the policy and then labels the pod, which it selects.
func (d *denier) isolate(ctx context.Context, r *Request, cut denial, tier string, ttl time.Duration) (Result, error) {
	pod := r.Pod
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("isolate pod %s/%s by a %s: %w", pod.Namespace, pod.Name, d.kind.kind, err)
	}
	served, err := d.served(ctx)
	if err != nil {
		return fail(err)
	}
	if r.Resumed {
		now, err := sameNow(ctx, d.kube, pod)
		if err != nil {
			d.clean(ctx, served, pod, tier, err)
			return fail(err)
		}
		pod = now
	}
	policy, change, err := d.ensure(ctx, served, pod, cut, tier, r.Step.ID, r.Resumed)
	if err != nil {
		return fail(err)
	}
	if change == policyKept && !r.Resumed {
		// The policy was there: the label may be as well, or have been lost.
		now, err := sameNow(ctx, d.kube, pod)
		if err != nil {
			d.clean(ctx, served, pod, tier, err)
			return fail(err)
		}
		pod = now
	}
	label := d.kind.label()
	labelled := pod.Labels[label] == string(pod.UID)
	if !labelled {
		if err := labelIsolation(ctx, d.kube, pod, label); err != nil {
			if _, again, _, _ := classify(err); change == policyMade && !again {
				d.remove(ctx, served, pod, tier) // it may not label the pod
			}
			d.clean(ctx, served, pod, tier, err)
			return fail(err)
		}
	}
	result := Result{Found: map[string]string{"policy": policy.GetName(), "strength": d.kind.name}, TTL: ttl}
	by := policy.GetAnnotations()[annotationStep]
	if change == policyKept && labelled && by != r.Step.ID {
		result.Nothing, result.TTL = true, 0
		result.Reason = fmt.Sprintf("the pod is isolated already, by %s %s of step %s", d.kind.kind, policy.GetName(), by)
		return result, nil
	}
	what := map[policyChange]string{policyMade: "new", policyWidened: "which was there and has been changed", policyKept: "which was there"}[change]
	result.Reason = fmt.Sprintf("isolated by %s %s, %s", d.kind.kind, policy.GetName(), what)
	result.Undo, err = json.Marshal(denialRecord{
		Namespace: pod.Namespace, Pod: pod.Name, UID: pod.UID, Policy: policy.GetName(), PolicyUID: policy.GetUID(), Kind: d.kind.name, Step: by,
	})
	if err != nil {
		return fail(err)
	}
	return result, nil
}

// clean takes the policy away when an error says that the pod is gone. Where the pod
// owns it the garbage collector would find it too.
func (d *denier) clean(ctx context.Context, s Served, pod *corev1.Pod, tier string, err error) {
	if isGone(err) {
		d.remove(ctx, s, pod, tier)
	}
}

// remove takes the pod's policy away, if it is there and ours.
func (d *denier) remove(ctx context.Context, s Served, pod *corev1.Pod, tier string) {
	policies, name := d.policies(s, pod.Namespace), policyName(pod, tier)
	have, err := policies.Get(ctx, name, metav1.GetOptions{})
	if err == nil && d.foreign(have, pod) == "" {
		_ = policies.Delete(ctx, name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(have.GetUID()))})
	}
}

func policyName(pod *corev1.Pod, tier string) string {
	name := "stoop-isolate-" + string(pod.UID)
	if tier != "" && tier != defaultTier {
		name = tier + "." + name // so Calico wants it
	}
	return name
}

// policy is the one that isolates a pod.
func (d *denier) policy(s Served, pod *corev1.Pod, cut denial, tier, step string) (*unstructured.Unstructured, error) {
	denies, err := json.Marshal(cut)
	if err != nil {
		return nil, err
	}
	p := &unstructured.Unstructured{Object: map[string]any{"spec": d.kind.spec(pod, d.kind.label(), cut, tier)}}
	p.SetAPIVersion(s.GroupVersion().String())
	p.SetKind(s.Kind)
	p.SetName(policyName(pod, tier))
	p.SetLabels(map[string]string{labelManagedBy: managedBy, labelPodUID: string(pod.UID)})
	p.SetAnnotations(map[string]string{annotationStep: step, annotationDenies: string(denies), annotationPod: pod.Namespace + "/" + pod.Name})
	if d.kind.namespaced {
		p.SetNamespace(pod.Namespace)
		p.SetOwnerReferences([]metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}})
	}
	return p, nil
}

// annotationPod is on the policy, for people: one in no namespace outlives its pod.
const annotationPod = ownPrefix + "pod"

// foreign says why a policy of the name that ours has is not ours; "" if it is.
func (d *denier) foreign(have *unstructured.Unstructured, pod *corev1.Pod) string {
	l := have.GetLabels()
	if l[labelManagedBy] != managedBy || l[labelPodUID] != string(pod.UID) {
		return "it lacks stoop's labels"
	}
	if d.kind.namespaced && !slices.ContainsFunc(have.GetOwnerReferences(), func(o metav1.OwnerReference) bool { return o.Kind == "Pod" && o.UID == pod.UID }) {
		return "the pod does not own it"
	}
	return ""
}

// ensure makes the policy, or makes ours that is there cut off at least as much.
func (d *denier) ensure(ctx context.Context, s Served, pod *corev1.Pod, cut denial, tier, step string, look bool) (*unstructured.Unstructured, policyChange, error) {
	policies := d.policies(s, pod.Namespace)
	want, err := d.policy(s, pod, cut, tier, step)
	if err != nil {
		return nil, 0, err
	}
	name := want.GetName()
	if !look {
		made, err := policies.Create(ctx, want, metav1.CreateOptions{})
		if err == nil {
			return made, policyMade, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return nil, 0, fmt.Errorf("create %s %s: %w", d.kind.kind, name, err)
		}
	}
	have, err := policies.Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) && look:
		return d.ensure(ctx, s, pod, cut, tier, step, false)
	case apierrors.IsNotFound(err):
		return nil, 0, Retry(fmt.Errorf("get %s %s: %w", d.kind.kind, name, err), 0)
	case err != nil:
		return nil, 0, fmt.Errorf("get %s %s: %w", d.kind.kind, name, err)
	}
	if why := d.foreign(have, pod); why != "" {
		return nil, 0, Refuse("%s %s was not made by stoop for this pod (%s); it is left alone, and the pod is not isolated by it", d.kind.kind, name, why)
	}
	// What it cuts off is believed only where it is as stoop would have made it.
	var before denial
	if json.Unmarshal([]byte(have.GetAnnotations()[annotationDenies]), &before) == nil && sameSpec(have.Object["spec"], d.kind.spec(pod, d.kind.label(), before, tier)) {
		all := before.with(cut)
		if reflect.DeepEqual(all, before) {
			return have, policyKept, nil
		}
		if want, err = d.policy(s, pod, all, tier, step); err != nil {
			return nil, 0, err
		}
	}
	// A change in between is a conflict, and tried again.
	want.SetResourceVersion(have.GetResourceVersion())
	want.SetUID(have.GetUID())
	updated, err := policies.Update(ctx, want, metav1.UpdateOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, 0, Retry(fmt.Errorf("update %s %s: %w", d.kind.kind, name, err), 0)
	case err != nil:
		return nil, 0, fmt.Errorf("update %s %s: %w", d.kind.kind, name, err)
	}
	return updated, policyWidened, nil
}

// sameSpec compares what an API server holds to what it was given: it may have
// added empty parts, and its numbers are of another type.
func sameSpec(have, want any) bool {
	return reflect.DeepEqual(plain(have), plain(want))
}

// plain is a value as JSON has it, without its empty parts.
func plain(v any) any {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var out any
	if err := json.Unmarshal(data, &out); err != nil {
		return err
	}
	return withoutEmpty(out)
}

func withoutEmpty(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, e := range v {
			if e = withoutEmpty(e); e != nil {
				out[k] = e
			}
		}
		if len(out) > 0 {
			return out
		}
		return nil
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = withoutEmpty(v[i])
		}
		if len(out) > 0 {
			return out
		}
		return nil
	}
	return v
}

// Undo takes the label off, then the policy away.
func (d *denier) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec denialRecord
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Policy == "" || rec.Pod == "" || rec.UID == "" || rec.PolicyUID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if i := slices.IndexFunc(denyKinds(), func(k denyKind) bool { return k.name == rec.Kind }); i >= 0 {
		d = &denier{d.kube, denyKinds()[i]}
	} else {
		return Result{}, Refuse("the undo record of step %s is of a kind of policy %q that is not known", u.ID, rec.Kind)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("let pod %s/%s back: %w", rec.Namespace, rec.Pod, err)
	}
	var policy *unstructured.Unstructured
	var policies dynamic.ResourceInterface
	served, err := d.served(ctx)
	switch {
	case as[*refusal](err): // the policies have gone with their kind
	case err != nil:
		return fail(err)
	default:
		policies = d.policies(served, rec.Namespace)
		policy, err = policies.Get(ctx, rec.Policy, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			policy = nil
		case err != nil:
			return fail(fmt.Errorf("get %s %s: %w", d.kind.kind, rec.Policy, err))
		}
	}
	if policy != nil {
		switch by := policy.GetAnnotations()[annotationStep]; {
		case policy.GetUID() != rec.PolicyUID:
			return Result{Nothing: true, Reason: fmt.Sprintf("%s %s is another one by now, of step %s", d.kind.kind, rec.Policy, by)}, nil
		case by != rec.Step:
			return Result{Nothing: true, Reason: fmt.Sprintf("step %s isolated the pod further; undo that one", by)}, nil
		}
	}
	unlabelled, err := unlabelIsolation(ctx, d.kube, rec.Namespace, rec.Pod, rec.UID, d.kind.label())
	if err != nil {
		return fail(err)
	}
	if policy == nil && !unlabelled {
		return Result{Nothing: true, Reason: fmt.Sprintf("the pod is not isolated by a %s any more", d.kind.kind)}, nil
	}
	if policy != nil {
		err := policies.Delete(ctx, rec.Policy, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(rec.PolicyUID))})
		if err != nil && !isGone(err) {
			return fail(fmt.Errorf("delete %s %s: %w", d.kind.kind, rec.Policy, err))
		}
	}
	return Result{Reason: fmt.Sprintf("let back: %s %s deleted", d.kind.kind, rec.Policy)}, nil
}

// strengthened is the undo record of a step that made two policies.
type strengthened struct {
	Isolation json.RawMessage `json:"isolation,omitempty"` // if it is this step's
	Denial    json.RawMessage `json:"denial,omitempty"`
}

// strengthen adds the strongest policy that the cluster serves to an isolation that
// stands. That it can't is no failure: the pod is isolated.
func (i *podIsolator) strengthen(ctx context.Context, r *Request, params isolatePodParams, result Result) (Result, error) {
	cut := denialOf(params.Direction, params.AllowCIDRs, params.AllowDNS)
	var why []string
	for _, k := range denyKinds() {
		d := &denier{i.kube, k}
		_, err := d.served(ctx)
		switch {
		case as[*refusal](err):
			continue
		case err != nil:
			return Result{}, err
		case !k.exceptions && (len(params.AllowCIDRs) > 0 || params.AllowDNS):
			why = append(why, fmt.Sprintf("a %s can't make exceptions", k.kind))
			continue
		}
		res, err := d.isolate(ctx, r, cut, defaultTier, time.Duration(params.TTL))
		if err != nil {
			if _, again, _, reason := classify(err); again || isGone(err) {
				return Result{}, err
			} else {
				why = append(why, reason)
			}
			continue
		}
		result.Found["strength"], result.Found["denyPolicy"] = k.name, res.Found["policy"]
		result.Reason += "; and, so that no other policy outvotes it, " + res.Reason
		if res.Undo == nil {
			return result, nil
		}
		undo, err := json.Marshal(strengthened{Isolation: result.Undo, Denial: res.Undo})
		if err != nil {
			return Result{}, err
		}
		result.Nothing, result.TTL, result.Undo = false, time.Duration(params.TTL), undo
		return result, nil
	}
	result.Found["strength"] = "standard"
	if len(why) == 0 {
		why = []string{"the cluster serves no kind of policy that denies"}
	}
	result.Reason += "; by this policy alone: " + strings.Join(why, "; ")
	return result, nil
}

// undoBoth takes both policies back.
func (i *podIsolator) undoBoth(ctx context.Context, u *UndoRequest, both strengthened) (Result, error) {
	res, err := (&denier{kube: i.kube}).Undo(ctx, &UndoRequest{ID: u.ID, Target: u.Target, Record: both.Denial, Actor: u.Actor})
	if err != nil && !errors.Is(err, ErrGone) || both.Isolation == nil {
		return res, err
	}
	rest, err := i.Undo(ctx, &UndoRequest{ID: u.ID, Target: u.Target, Record: both.Isolation, Actor: u.Actor})
	if err != nil {
		return Result{}, err
	}
	return Result{Nothing: res.Nothing && rest.Nothing, Reason: res.Reason + "; " + rest.Reason}, nil
}
