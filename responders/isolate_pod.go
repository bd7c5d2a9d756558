package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"stoop/param"
)

// Labels and annotations of stoop's own.
const (
	ownPrefix      = "stoop.dev/"
	labelIsolated  = ownPrefix + "isolated" // on the pod; its value is the pod's own UID
	labelPodUID    = ownPrefix + "pod-uid"  // on the policy
	annotationStep = ownPrefix + "step"     // on the policy: the step that last changed it
	labelManagedBy = "app.kubernetes.io/managed-by"
	managedBy      = "stoop"
)

func isolatePod() Entry {
	return Entry{
		Name: "isolate-pod",
		Doc:  "Cuts the pod that raised the alert, and no other, off the network.",
		Notes: `First a NetworkPolicy of stoop's own is made, named stoop-isolate- and the pod's
UID, owned by the pod so that it goes with it; then the pod gets the label
stoop.dev/isolated, which the policy selects. Both carry the pod's UID, so neither
its siblings nor its replacement are touched, and a policy that stoop did not make
never is. The pod runs on and can be looked into.

A NetworkPolicy is only a wish: the cluster's network plugin has to enforce it,
and most leave connections that are open already as they are. Policies add up:
another one that selects the pod and allows traffic still allows it, and the
outcome names such policies in its reason and under found.otherPolicies. (Those of
Cilium's or Calico's own kinds are not looked at.) Whoever may change the labels
of pods in the namespace can take the label off. Probes of the kubelet are let
through by most plugins even so.

Pods in the host's network are refused: no NetworkPolicy reaches them.

Isolating a pod again never lets anything through that was cut off before: the
directions add up, and allowed is only what both steps allow. The later step then
is the one that undoes both; a step that changes nothing leaves undo and ttl with
the step before.

strength: strongest adds a policy of a kind that denies, which no other policy can
outvote, if the cluster serves one: that of cilium-isolate, else that of
calico-isolate (in the tier default), else that of cluster-isolate, with their traps.
The NetworkPolicy stands beside it. Cilium's can't make exceptions, and so is passed
over with allowCIDRs or allowDNS. The outcome says under found.strength which it was;
where none can be had the pod is isolated by the NetworkPolicy alone, and the reason
says why.

allowDNS lets the pod ask the cluster's DNS server (pods labelled k8s-app=kube-dns
in kube-system, port 53), not every server on port 53, through which much leaks.
A node-local cache, or the DNS of a distribution that is labelled otherwise, has to
be given by its address in allowCIDRs.`,
		Params:   param.Describe(isolatePodDefaults()),
		RBAC:     rulesOf(isolatePodGrants()),
		Grants:   isolatePodGrants(),
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 15 * time.Second,
		New:      func(env Env) Responder { return &podIsolator{env.Kube} },
	}
}

// isolatePodGrants is what isolating needs, with the kinds that deny where it is to
// be the strongest.
func isolatePodGrants() []Grant {
	grants := always(
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "patch"}},
		rbacv1.PolicyRule{
			APIGroups: []string{networkingv1.GroupName}, Resources: []string{"networkpolicies"},
			Verbs: []string{"get", "list", "create", "update", "delete"},
		},
	)
	for _, k := range denyKinds() {
		for _, r := range k.rbac() {
			grants = append(grants, Grant{Rule: r, When: When{"strength": strongest}})
		}
	}
	return grants
}

type isolatePodParams struct {
	Direction  string         `param:"direction" oneof:"ingress egress both" doc:"What is cut off: what comes in, what goes out, or both."`
	AllowCIDRs []param.CIDR   `param:"allowCIDRs" doc:"Addresses that the pod may still talk to, in the directions that are cut off."`
	AllowDNS   bool           `param:"allowDNS" doc:"Whether the pod may still ask the cluster's DNS server. Has no meaning for the direction ingress."`
	Strength   string         `param:"strength" oneof:"standard strongest" doc:"standard: a NetworkPolicy. strongest: beside it a policy that denies and can't be outvoted, of the strongest kind that the cluster serves."`
	TTL        param.Duration `param:"ttl" doc:"After how long the pod is let back by itself; 0 is never."`
}

const strongest = "strongest"

func isolatePodDefaults() isolatePodParams {
	return isolatePodParams{Direction: "both", Strength: "standard"}
}

type podIsolator struct{ kube *Kube }

// Check refuses pods that a NetworkPolicy does not reach.
func (i *podIsolator) Check(_ context.Context, r *Request) error {
	return refuseHostNetwork(r.Pod)
}

// isolation is the undo record. It is all that Undo believes.
type isolation struct {
	Namespace string    `json:"namespace"`
	Pod       string    `json:"pod"`
	UID       types.UID `json:"uid"`
	Label     string    `json:"label"`
	Policy    string    `json:"policy"`
	PolicyUID types.UID `json:"policyUID"`
	Step      string    `json:"step"`
}

func (i *podIsolator) Act(ctx context.Context, r *Request) (Result, error) {
	params := isolatePodDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := i.Check(ctx, r); err != nil {
		return Result{}, err
	}
	result, err := i.isolate(ctx, r, params)
	if err != nil || params.Strength != strongest {
		return result, err
	}
	return i.strengthen(ctx, r, params, result)
}

// isolate does it by a NetworkPolicy.
func (i *podIsolator) isolate(ctx context.Context, r *Request, params isolatePodParams) (Result, error) {
	pod := r.Pod
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("isolate pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if r.Resumed {
		now, err := sameNow(ctx, i.kube, pod)
		if err != nil {
			return fail(err)
		}
		pod = now
	}
	policy, change, err := i.ensurePolicy(ctx, isolationPolicy(pod, params, r.Step.ID), r.Resumed)
	if err != nil {
		return fail(err)
	}
	if change == policyKept && !r.Resumed {
		// The policy was there: the label may be as well, or have been lost.
		now, err := sameNow(ctx, i.kube, pod)
		if err != nil {
			return fail(err)
		}
		pod = now
	}
	labelled := pod.Labels[labelIsolated] == string(pod.UID)
	if !labelled {
		if err := labelIsolation(ctx, i.kube, pod, labelIsolated); err != nil {
			if change == policyMade && isGone(err) {
				// The garbage collector would find it too, where one runs.
				_ = i.kube.NetworkPolicies(pod.Namespace).Delete(ctx, policy.Name, metav1.DeleteOptions{
					Preconditions: metav1.NewUIDPreconditions(string(policy.UID)),
				})
			}
			return fail(err)
		}
	}

	result := Result{Found: map[string]string{"policy": policy.Name}, TTL: time.Duration(params.TTL)}
	by := policy.Annotations[annotationStep]
	if change == policyKept && labelled && by != r.Step.ID {
		result.Nothing, result.TTL = true, 0
		result.Reason = fmt.Sprintf("the pod is isolated already, by policy %s of step %s", policy.Name, by)
	} else {
		// Also where an earlier try of this very step did it all, and only its
		// answer was lost: it is this step that undo takes back.
		what := map[policyChange]string{policyMade: "new", policyWidened: "which was there and now cuts off more", policyKept: "which was there"}[change]
		result.Reason = fmt.Sprintf("isolated (%s) by policy %s, %s", params.Direction, policy.Name, what)
		result.Undo, err = json.Marshal(isolation{
			Namespace: pod.Namespace, Pod: pod.Name, UID: pod.UID, Label: labelIsolated,
			Policy: policy.Name, PolicyUID: policy.UID, Step: by,
		})
		if err != nil {
			return fail(err)
		}
	}
	i.tellOthers(ctx, pod, policy, &result)
	return result, nil
}

// isolationPolicy is the policy that isolates one pod as the parameters say.
func isolationPolicy(pod *corev1.Pod, params isolatePodParams, step string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:   pod.Namespace,
			Name:        "stoop-isolate-" + string(pod.UID),
			Labels:      map[string]string{labelManagedBy: managedBy, labelPodUID: string(pod.UID)},
			Annotations: map[string]string{annotationStep: step},
			// No blockOwnerDeletion: it would need the right to change the
			// pod's finalizers.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}},
		},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{labelIsolated: string(pod.UID)}},
		},
	}
	// One rule a range: so two policies' rules can be compared one by one.
	peer := func(c param.CIDR) []networkingv1.NetworkPolicyPeer {
		return []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: c.String()}}}
	}
	if params.Direction != "egress" {
		p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		for _, c := range params.AllowCIDRs {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peer(c)})
		}
	}
	if params.Direction != "ingress" {
		p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		for _, c := range params.AllowCIDRs {
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peer(c)})
		}
		if params.AllowDNS {
			p.Spec.Egress = append(p.Spec.Egress, dnsRule())
		}
	}
	return p
}

func dnsRule() networkingv1.NetworkPolicyEgressRule {
	return networkingv1.NetworkPolicyEgressRule{
		To: []networkingv1.NetworkPolicyPeer{{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "kube-system"}},
			PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"k8s-app": "kube-dns"}},
		}},
		Ports: []networkingv1.NetworkPolicyPort{
			{Protocol: new(corev1.ProtocolUDP), Port: new(intstr.FromInt32(53))},
			{Protocol: new(corev1.ProtocolTCP), Port: new(intstr.FromInt32(53))},
		},
	}
}

type policyChange int

const (
	policyMade policyChange = iota
	policyWidened
	policyKept
)

// ensurePolicy makes the policy, or makes ours that is there cut off at least
// as much. look first asks whether there is one.
func (i *podIsolator) ensurePolicy(ctx context.Context, want *networkingv1.NetworkPolicy, look bool) (*networkingv1.NetworkPolicy, policyChange, error) {
	policies := i.kube.NetworkPolicies(want.Namespace)
	if !look {
		made, err := policies.Create(ctx, want, metav1.CreateOptions{})
		if err == nil {
			return made, policyMade, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return nil, 0, fmt.Errorf("create network policy %s: %w", want.Name, err)
		}
	}
	have, err := policies.Get(ctx, want.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) && look:
		return i.ensurePolicy(ctx, want, false)
	case apierrors.IsNotFound(err):
		// It went between the two requests, with its pod or by an undo.
		return nil, 0, Retry(fmt.Errorf("get network policy %s: %w", want.Name, err), 0)
	case err != nil:
		return nil, 0, fmt.Errorf("get network policy %s: %w", want.Name, err)
	}
	if why := foreign(have, want); why != "" {
		return nil, 0, Refuse("network policy %s/%s was not made by stoop for this pod (%s); it is left alone, and the pod is not isolated",
			want.Namespace, want.Name, why)
	}
	spec := widened(have.Spec, want.Spec)
	if equality.Semantic.DeepEqual(spec, have.Spec) {
		return have, policyKept, nil
	}
	have = have.DeepCopy()
	have.Spec = spec
	have.Annotations = maps.Clone(have.Annotations)
	if have.Annotations == nil {
		have.Annotations = map[string]string{}
	}
	have.Annotations[annotationStep] = want.Annotations[annotationStep]
	// The resource version that was read goes with it: a change in between is
	// a conflict, and tried again.
	updated, err := policies.Update(ctx, have, metav1.UpdateOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, 0, Retry(fmt.Errorf("update network policy %s: %w", want.Name, err), 0)
	case err != nil:
		return nil, 0, fmt.Errorf("update network policy %s: %w", want.Name, err)
	}
	return updated, policyWidened, nil
}

// foreign says why a policy of the name that ours has is not ours; "" if it is.
func foreign(have, want *networkingv1.NetworkPolicy) string {
	if have.Labels[labelManagedBy] != managedBy || have.Labels[labelPodUID] != want.Labels[labelPodUID] {
		return "it lacks stoop's labels"
	}
	owner := want.OwnerReferences[0]
	if !slices.ContainsFunc(have.OwnerReferences, func(o metav1.OwnerReference) bool { return o.Kind == owner.Kind && o.UID == owner.UID }) {
		return "the pod does not own it"
	}
	if !equality.Semantic.DeepEqual(have.Spec.PodSelector, want.Spec.PodSelector) {
		return "it selects something else"
	}
	return ""
}

// widened cuts off what have or want cuts off: the directions of both, and in
// one that both have only what both allow.
func widened(have, want networkingv1.NetworkPolicySpec) networkingv1.NetworkPolicySpec {
	w := *want.DeepCopy()
	w.PolicyTypes = nil
	for _, t := range []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress} {
		h := slices.Contains(have.PolicyTypes, t)
		if h || slices.Contains(want.PolicyTypes, t) {
			w.PolicyTypes = append(w.PolicyTypes, t)
		}
	}
	w.Ingress = allowedByBoth(have.PolicyTypes, want.PolicyTypes, networkingv1.PolicyTypeIngress, have.Ingress, want.Ingress)
	w.Egress = allowedByBoth(have.PolicyTypes, want.PolicyTypes, networkingv1.PolicyTypeEgress, have.Egress, want.Egress)
	return w
}

func allowedByBoth[R any](haveTypes, wantTypes []networkingv1.PolicyType, direction networkingv1.PolicyType, have, want []R) []R {
	switch {
	case !slices.Contains(wantTypes, direction):
		return have
	case !slices.Contains(haveTypes, direction):
		return want
	}
	var both []R
	for _, r := range have {
		if slices.ContainsFunc(want, func(w R) bool { return equality.Semantic.DeepEqual(r, w) }) {
			both = append(both, r)
		}
	}
	return both
}

// tellOthers names the policies that still allow what ours cuts off. That it
// can't is no failure: the pod is isolated.
func (i *podIsolator) tellOthers(ctx context.Context, pod *corev1.Pod, ours *networkingv1.NetworkPolicy, result *Result) {
	var names []string
	err := i.kube.eachPolicy(ctx, pod.Namespace, func(other *networkingv1.NetworkPolicy) {
		if other.Name != ours.Name && stillAllows(other, pod, ours.Spec.PolicyTypes) {
			names = append(names, other.Name)
		}
	})
	if err != nil {
		_, _, _, reason := classify(err)
		result.Reason += "; whether other policies still allow traffic is not known: " + reason
		return
	}
	if len(names) == 0 {
		return
	}
	joined := briefly(names)
	result.Found["otherPolicies"] = joined
	result.Reason += "; policies add up, and these select the pod too and still allow some traffic: " + joined
}

// stillAllows reports whether a policy selects the pod and allows anything in
// one of the directions.
func stillAllows(p *networkingv1.NetworkPolicy, pod *corev1.Pod, directions []networkingv1.PolicyType) bool {
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil || !selector.Matches(labels.Set(pod.Labels)) {
		return false
	}
	for _, d := range directions {
		switch {
		case len(p.Spec.PolicyTypes) > 0 && !slices.Contains(p.Spec.PolicyTypes, d):
		case d == networkingv1.PolicyTypeIngress && len(p.Spec.Ingress) > 0,
			d == networkingv1.PolicyTypeEgress && len(p.Spec.Egress) > 0:
			return true
		}
	}
	return false
}

// Undo takes the label off, then the policy away.
func (i *podIsolator) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var both strengthened
	if err := json.Unmarshal(u.Record, &both); err == nil && both.Denial != nil {
		return i.undoBoth(ctx, u, both)
	}
	var rec isolation
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Policy == "" || rec.Pod == "" || rec.UID == "" || rec.PolicyUID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("let pod %s/%s back: %w", rec.Namespace, rec.Pod, err)
	}
	policies := i.kube.NetworkPolicies(rec.Namespace)
	policy, err := policies.Get(ctx, rec.Policy, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		policy = nil
	case err != nil:
		return fail(fmt.Errorf("get network policy %s: %w", rec.Policy, err))
	case policy.UID != rec.PolicyUID:
		// The pod was let back and isolated again.
		return Result{Nothing: true, Reason: fmt.Sprintf("policy %s is another one by now, of step %s", rec.Policy, policy.Annotations[annotationStep])}, nil
	case policy.Annotations[annotationStep] != rec.Step:
		return Result{Nothing: true, Reason: fmt.Sprintf("step %s isolated the pod further; undo that one", policy.Annotations[annotationStep])}, nil
	}

	unlabelled, err := unlabelIsolation(ctx, i.kube, rec.Namespace, rec.Pod, rec.UID, rec.Label)
	if err != nil {
		return fail(err)
	}
	if policy != nil {
		err := policies.Delete(ctx, rec.Policy, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(rec.PolicyUID))})
		if err != nil && !isGone(err) {
			return fail(fmt.Errorf("delete network policy %s: %w", rec.Policy, err))
		}
	}
	if policy == nil && !unlabelled {
		return Result{Nothing: true, Reason: "the pod is not isolated any more"}, nil
	}
	return Result{Reason: fmt.Sprintf("let back: policy %s deleted", rec.Policy)}, nil
}

// labelIsolation puts a label with the pod's own UID on the pod, which the policy for
// it selects.
func labelIsolation(ctx context.Context, kube *Kube, pod *corev1.Pod, label string) error {
	patch, err := labelPatch(pod.UID, "", map[string]*string{label: new(string(pod.UID))})
	if err != nil {
		return err
	}
	if _, err := kube.Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("patch the pod's label: %w", err)
	}
	return nil
}

// unlabelIsolation takes it off if it is still that pod and ours.
func unlabelIsolation(ctx context.Context, kube *Kube, namespace, name string, uid types.UID, label string) (bool, error) {
	pod, err := podNow(ctx, kube, namespace, name, uid)
	if err != nil || pod == nil || pod.Labels[label] != string(uid) {
		return false, err
	}
	patch, err := labelPatch(pod.UID, "", map[string]*string{label: nil})
	if err != nil {
		return false, err
	}
	_, err = kube.Pods(namespace).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if isGone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("patch the pod's label: %w", err)
	}
	return true, nil
}

// labelPatch is a merge patch that sets labels (nil: takes them off) on the
// pod with this UID and no other: with another UID the API server answers 422.
// With a resource version it holds only for the pod as it was read.
func labelPatch(uid types.UID, resourceVersion string, set map[string]*string) ([]byte, error) {
	if uid == "" {
		return nil, errors.New("the pod has no UID")
	}
	meta := map[string]any{"uid": uid, "labels": set}
	if resourceVersion != "" {
		meta["resourceVersion"] = resourceVersion
	}
	return json.Marshal(map[string]any{"metadata": meta})
}
