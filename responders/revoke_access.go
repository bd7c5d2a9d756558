package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"stoop/evidence"
	"stoop/param"
)

func revokeAccess() Entry {
	return Entry{
		Name: "revoke-access",
		Doc:  "Takes rights away: deletes the RoleBinding or ClusterRoleBinding that a Kubernetes audit event names, or those of the service account of the pod that raised the alert.",
		Notes: `It waits for a person's approval unless the rule says approve: false. Who is asked is
shown the bindings that would go; what they are when it is approved is what goes.

With from: alert it is for alerts of the source k8s_audit on rolebindings and
clusterrolebindings. What proves that the binding is the one meant is the same as for
[delete-resource](#delete-resource), and the alert needs the same fields. With from: pod it
finds the bindings whose subject is the pod's service account. All pods of that account lose
their rights, and tokens that were stolen from it too. Rights that the account has by a
group (system:serviceaccounts, system:authenticated) stay; the reason names such bindings.
The pod has to be there still: put the step before one that deletes it.

Left alone: bindings named system: (save one that the very alert's request made, and not
the API server itself), bindings in protected namespaces and in stoop's own, and as subjects
stoop itself, service accounts of protected namespaces, and users and groups named system:
(save those that anybody may be: system:anonymous, system:authenticated,
system:unauthenticated, system:serviceaccounts). Where a binding has subjects that are left,
only the others are removed from it; with from: pod only the account is.

The API server lets nobody change or restore a binding who could not make it: so to remove
some subjects of a binding, and for any undo, stoop needs the verb bind on the binding's
role. It has it for what bind lists and for nothing else, since whoever holds stoop's token
may then bind these roles too. Without it such a binding is left, the step fails and says so,
and what was removed can be restored by hand: each binding is kept as evidence, N.again.json
as kubectl create takes it.`,
		Params:     param.Describe(revokeAccessDefaults()),
		Grants:     revokeAccessGrants(),
		Kind:       Harm,
		Object:     ResourceObject,
		PodWhen:    When{"from": "pod"},
		Everywhere: When{"from": "pod", "namespaces": "all"},
		Deadline:   30 * time.Second,
		Approve:    func(json.RawMessage) bool { return true },
		New: func(env Env) Responder {
			return &accessRevoker{kube: env.Kube, store: env.Evidence, self: env.Self, protected: env.ProtectedNamespace}
		},
	}
}

type revokeAccessParams struct {
	From       string         `param:"from" oneof:"alert pod" doc:"Whose rights are taken away: alert is the binding that the audit event names, pod the service account of the pod."`
	Namespaces string         `param:"namespaces" oneof:"own all" doc:"Whether RoleBindings in the pod's own namespace are looked for, or in all. Has no meaning for from alert."`
	Verbs      []string       `param:"verbs" doc:"The requests that it answers: create, update, patch. Has no meaning for from pod."`
	Bind       []string       `param:"bind" doc:"Roles that stoop may bind, so that undo and the removal of single subjects work for them: ClusterRole/view, Role/deployer."`
	TTL        param.Duration `param:"ttl" doc:"After how long the rights are given back by themselves; 0 is never. Needs bind."`
}

func revokeAccessDefaults() revokeAccessParams {
	return revokeAccessParams{From: "alert", Namespaces: "all", Verbs: []string{"create"}}
}

// Validate refuses roles that are none, and a ttl that could not be kept.
func (p revokeAccessParams) Validate() error {
	for _, b := range p.Bind {
		kind, name, _ := strings.Cut(b, "/")
		if kind != "Role" && kind != "ClusterRole" || name == "" || strings.ContainsAny(name, "/%*") {
			return fmt.Errorf("bind: %s is neither ClusterRole/NAME nor Role/NAME", param.Cut(b))
		}
	}
	if p.TTL > 0 && len(p.Bind) == 0 {
		return errors.New("ttl: nothing can be given back without bind, which lists the roles")
	}
	return checkVerbs(p.Verbs)
}

func revokeAccessGrants() []Grant {
	bindings := func(verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{rbacv1.GroupName}, Resources: []string{"rolebindings", "clusterrolebindings"}, Verbs: verbs}
	}
	grants := []Grant{
		{Rule: bindings("get", "delete")},
		{Rule: bindings("list"), When: When{"from": "pod"}},
		{Rule: rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}}, When: When{"from": "pod"}},
		{Rule: bindings("create", "patch"), Each: "bind"},
	}
	for _, kind := range []string{"Role", "ClusterRole"} {
		grants = append(grants, Grant{
			Rule: rbacv1.PolicyRule{
				APIGroups: []string{rbacv1.GroupName}, Resources: []string{strings.ToLower(kind) + "s"},
				Verbs: []string{"bind"}, ResourceNames: []string{"{tail}"},
			},
			Each: "bind", Cut: "/", Head: kind,
		})
	}
	return grants
}

// binding is a RoleBinding or a ClusterRoleBinding: they have the same fields.
type binding struct {
	resource string
	object   *unstructured.Unstructured
	rbacv1.ClusterRoleBinding
}

// String names the binding in a sentence.
func (b *binding) String() string {
	if b.Namespace == "" {
		return "clusterrolebinding " + b.Name
	}
	return "rolebinding " + b.Namespace + "/" + b.Name
}

func servedBinding(resource string) Served {
	return Served{
		GroupVersionResource: rbacv1.SchemeGroupVersion.WithResource(resource),
		Kind:                 map[string]string{"rolebindings": "RoleBinding", "clusterrolebindings": "ClusterRoleBinding"}[resource],
		Namespaced:           resource == "rolebindings",
	}
}

func readBinding(resource string, o *unstructured.Unstructured) (*binding, error) {
	b := &binding{resource: resource, object: o}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &b.ClusterRoleBinding); err != nil {
		return nil, fmt.Errorf("read %s %s/%s: %w", resource, o.GetNamespace(), o.GetName(), err)
	}
	return b, nil
}

// eachBinding calls f with every binding of a namespace ("" is all), a page at a
// time, until it returns an error.
func (k *Kube) eachBinding(ctx context.Context, resource, namespace string, f func(*binding) error) error {
	for options := (metav1.ListOptions{Limit: 500}); ; {
		list, err := namedClient(k, servedBinding(resource), namespace).List(ctx, options)
		if err != nil {
			return fmt.Errorf("list %s: %w", resource, err)
		}
		for i := range list.Items {
			b, err := readBinding(resource, &list.Items[i])
			if err == nil {
				err = f(b)
			}
			if err != nil {
				return err
			}
		}
		if options.Continue = list.GetContinue(); options.Continue == "" {
			return nil
		}
	}
}

type accessRevoker struct {
	kube      *Kube
	store     *evidence.Store
	self      Self
	protected func(namespace string) bool
}

// revocation is the undo record.
type revocation struct {
	Revoked  []revoked `json:"revoked"`
	Evidence string    `json:"evidence,omitempty"` // the folder
}

// revoked is one binding, as it was: deleted, or with the subjects that were taken
// out of it.
type revoked struct {
	Resource    string                  `json:"resource"`
	Namespace   string                  `json:"namespace,omitempty"`
	Name        string                  `json:"name"`
	UID         types.UID               `json:"uid"`
	Labels      map[string]string       `json:"labels,omitempty"`
	Annotations map[string]string       `json:"annotations,omitempty"`
	Owners      []metav1.OwnerReference `json:"owners,omitempty"`
	RoleRef     rbacv1.RoleRef          `json:"roleRef"`
	Subjects    []rbacv1.Subject        `json:"subjects"` // those that lost it
	Whole       bool                    `json:"whole"`    // the binding was deleted
}

func (v *revoked) same(o revoked) bool { return v.UID == o.UID }

// String names it in a sentence.
func (v *revoked) String() string {
	return (&binding{ClusterRoleBinding: rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: v.Namespace, Name: v.Name}}}).String()
}

const (
	// revokeMost is how many bindings one step revokes.
	revokeMost = 100
	// Of annotations and of records as much as STATE takes of one step.
	revokedNotesMost  = 16 << 10
	revokedRecordMost = 512 << 10
)

// revocable is a binding, and what of it goes and stays.
type revocable struct {
	*binding
	gone, stay []rbacv1.Subject
}

func (b *revocable) record() revoked {
	v := revoked{
		Resource: b.resource, Namespace: b.Namespace, Name: b.Name, UID: b.UID, Labels: b.Labels,
		Annotations: maps.Clone(b.Annotations), Owners: b.OwnerReferences, RoleRef: b.RoleRef, Subjects: b.gone, Whole: len(b.stay) == 0,
	}
	delete(v.Annotations, "kubectl.kubernetes.io/last-applied-configuration")
	size := 0
	for k, a := range v.Annotations {
		size += len(k) + len(a)
	}
	if size > revokedNotesMost {
		v.Annotations = nil // the evidence has them
	}
	return v
}

// Check refuses what the alert alone tells not to revoke.
func (a *accessRevoker) Check(_ context.Context, r *Request) error {
	_, _, err := a.wanted(r)
	return err
}

func (a *accessRevoker) wanted(r *Request) (params revokeAccessParams, made bool, err error) {
	params = revokeAccessDefaults()
	if err := r.Decode(&params); err != nil {
		return params, false, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, false, Refuse("%v", err)
	}
	if params.From == "pod" {
		if ns, name := a.self.account(); name != "" && r.Pod.Namespace == ns && accountOf(r) == name {
			return params, false, Refuse("service account %s/%s is stoop's own", ns, name)
		}
		return params, false, nil
	}
	t := r.Target.Resource
	switch {
	case t.Resource != "rolebindings" && t.Resource != "clusterrolebindings":
		return params, false, Refuse("the alert is about %s, not about rolebindings or clusterrolebindings", quote(t.Resource))
	case a.self.Namespace != "" && t.Namespace == a.self.Namespace:
		return params, false, Refuse("namespace %s is stoop's own", t.Namespace)
	}
	made, err = namedRequest(r.Alert, params.Verbs, false)
	if err != nil {
		return params, false, err
	}
	by, _ := r.Alert.Field("ka.user.name")
	if strings.HasPrefix(t.Name, "system:") && (!made || by == "system:apiserver") {
		return params, false, Refuse("%s %s is the cluster's own", t.Resource, quote(t.Name))
	}
	return params, made, nil
}

// accountOf is the name of the service account that the pod runs as.
func accountOf(r *Request) string {
	if n := r.Pod.Spec.ServiceAccountName; n != "" {
		return n
	}
	return "default"
}

// affected is whose access a step revokes, and by which bindings.
type affected struct {
	who    string
	list   []revocable
	notes  []string // what is left
	beyond int      // more bindings than one step revokes
}

// find looks for what is to be revoked, now.
func (a *accessRevoker) find(ctx context.Context, r *Request, params revokeAccessParams, made bool, before revocation) (f affected, err error) {
	if params.From == "pod" {
		f.who = fmt.Sprintf("service account %s/%s", r.Pod.Namespace, accountOf(r))
		f.list, f.notes, f.beyond, err = a.ofPod(ctx, r, params)
	} else {
		f.who = describe(r.Target)
		f.list, err = a.ofAlert(ctx, r, made, before)
		if isGone(err) && len(before.Revoked) > 0 {
			err = nil // by that try
		}
	}
	if err != nil {
		err = fmt.Errorf("revoke access, %s: %w", f.who, err)
	}
	return f, err
}

// nothing is the result where there is nothing to revoke.
func (f *affected) nothing() Result {
	return Result{Nothing: true, Reason: f.who + " has no binding that could be taken from it" + said(f.notes)}
}

// Preview names the bindings that would go.
func (a *accessRevoker) Preview(ctx context.Context, r *Request) (Result, error) {
	params, made, err := a.wanted(r)
	if err != nil {
		return Result{}, err
	}
	f, err := a.find(ctx, r, params, made, revocation{})
	if err != nil {
		return Result{}, err
	}
	if len(f.list) == 0 {
		return f.nothing(), nil
	}
	const most = 20
	var goes []string
	for i := range f.list {
		if i == most {
			goes = append(goes, fmt.Sprintf("%d more", len(f.list)-most+f.beyond))
			break
		}
		goes = append(goes, f.list[i].loses())
	}
	return Result{Reason: "would revoke: " + strings.Join(goes, "; ") + said(f.notes)}, nil
}

// loses says what becomes of a binding. Its names may hold what their maker liked.
func (b *revocable) loses() string {
	const most = 5
	var names []string
	for i, s := range b.gone {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(b.gone)-most))
			break
		}
		name := s.Name
		if s.Namespace != "" {
			name = s.Namespace + "/" + name
		}
		names = append(names, s.Kind+" "+oneLine(name, 100))
	}
	what := fmt.Sprintf("%s (%s %s)", oneLine(b.String(), 200), b.RoleRef.Kind, oneLine(b.RoleRef.Name, 100))
	if len(names) > 0 {
		what += " from " + strings.Join(names, ", ")
	}
	if n := len(b.stay); n > 0 {
		what += fmt.Sprintf(", %d others keep it", n)
	}
	return what
}

func (a *accessRevoker) Act(ctx context.Context, r *Request) (Result, error) {
	params, made, err := a.wanted(r)
	if err != nil {
		return Result{}, err
	}
	var before revocation // by an earlier try of this very step
	if json.Unmarshal(r.Intended, &before) != nil {
		before = revocation{}
	}
	f, err := a.find(ctx, r, params, made, before)
	if err != nil {
		return Result{}, err
	}
	done, again := a.before(before, f.list)
	if len(f.list) == 0 && len(done) == 0 {
		return f.nothing(), nil
	}
	res, err := a.revoke(ctx, r, params, f.list, revocation{done, before.Evidence}, again, f.notes)
	if f.beyond > 0 && err == nil {
		// Whoever may make bindings in a namespace of his could otherwise have none
		// of them revoked.
		err = fmt.Errorf("%d more bindings of it stand, since a step revokes at most %d; %s", f.beyond, revokeMost, res.Reason)
	}
	if err != nil {
		err = fmt.Errorf("revoke access, %s: %w", f.who, err)
	}
	return res, err
}

func said(notes []string) string {
	if len(notes) == 0 {
		return ""
	}
	const most = 10
	if n := len(notes); n > most {
		notes = append(slices.Clone(notes[:most]), fmt.Sprintf("%d more", n-most))
	}
	return "; left: " + strings.Join(notes, "; ")
}

// before splits what an earlier try was about to do into what it did, and what is
// to be done again.
func (a *accessRevoker) before(before revocation, list []revocable) (done, again []revoked) {
	for _, v := range before.Revoked {
		if slices.ContainsFunc(list, func(b revocable) bool { return b.UID == v.UID }) {
			again = append(again, v)
		} else {
			done = append(done, v)
		}
	}
	return done, again
}

// ofAlert is the binding that the alert names.
func (a *accessRevoker) ofAlert(ctx context.Context, r *Request, made bool, before revocation) ([]revocable, error) {
	t := r.Target.Resource
	o, err := namedObject(ctx, a.kube, servedBinding(t.Resource), t, r.Alert.Time, made)
	if err != nil {
		return nil, err
	}
	b, err := readBinding(t.Resource, o)
	if err != nil {
		return nil, err
	}
	v := revocable{binding: b}
	for _, s := range b.Subjects {
		if a.spared(s) {
			v.stay = append(v.stay, s)
		} else {
			v.gone = append(v.gone, s)
		}
	}
	switch {
	case len(v.gone) > 0 || len(v.stay) == 0:
	case slices.ContainsFunc(before.Revoked, func(o revoked) bool { return o.UID == b.UID }):
		return nil, nil // what went had gone already
	default:
		return nil, Refuse("all its subjects are the cluster's own, of protected namespaces, or stoop itself")
	}
	return []revocable{v}, nil
}

// spared reports whether a subject keeps its rights, whatever an alert names.
func (a *accessRevoker) spared(s rbacv1.Subject) bool {
	namespace := ""
	switch s.Kind {
	case rbacv1.ServiceAccountKind:
		namespace = s.Namespace
	case rbacv1.UserKind:
		rest, account := strings.CutPrefix(s.Name, "system:serviceaccount:")
		if !account {
			return strings.HasPrefix(s.Name, "system:") && s.Name != "system:anonymous"
		}
		namespace, _, _ = strings.Cut(rest, ":")
	case rbacv1.GroupKind:
		rest, accounts := strings.CutPrefix(s.Name, "system:serviceaccounts:")
		switch {
		case accounts:
			namespace = rest
		case s.Name == "system:authenticated", s.Name == "system:unauthenticated", s.Name == "system:serviceaccounts":
			return false
		default:
			return strings.HasPrefix(s.Name, "system:")
		}
	}
	return a.isProtected(namespace)
}

func (a *accessRevoker) isProtected(namespace string) bool {
	own, _ := a.self.account()
	return namespace != "" && (namespace == own || namespace == a.self.Namespace || a.protected != nil && a.protected(namespace))
}

// ofPod are the bindings of the pod's service account, those of the cluster and of its
// own namespace first, and what is left of its rights: with it how many are beyond what
// one step revokes.
func (a *accessRevoker) ofPod(ctx context.Context, r *Request, params revokeAccessParams) (list []revocable, notes []string, beyond int, err error) {
	pod, err := sameNow(ctx, a.kube, r.Pod)
	if err != nil {
		return nil, nil, 0, err
	}
	account := accountOf(r)
	var groups []string
	each := func(b *binding) error {
		v := revocable{binding: b}
		group := ""
		for _, s := range b.Subjects {
			switch {
			case isAccount(s, pod.Namespace, account):
				v.gone = append(v.gone, s)
			default:
				v.stay = append(v.stay, s)
				if s.Kind == rbacv1.GroupKind && slices.Contains([]string{"system:serviceaccounts", "system:serviceaccounts:" + pod.Namespace, "system:authenticated"}, s.Name) {
					group = s.Name
				}
			}
		}
		system := strings.HasPrefix(b.Name, "system:")
		switch {
		case len(v.gone) == 0 && group != "" && !system:
			groups = append(groups, fmt.Sprintf("%s, by its group %s", b, group))
		case len(v.gone) == 0:
		case system:
			notes = append(notes, fmt.Sprintf("%s is the cluster's own", b))
		case a.isProtected(b.Namespace):
			notes = append(notes, fmt.Sprintf("%s is in a protected namespace", b))
		case len(list) == revokeMost:
			beyond++
		default:
			list = append(list, v)
		}
		return nil
	}
	if err := a.kube.eachBinding(ctx, "clusterrolebindings", "", each); err != nil {
		return nil, nil, 0, err
	}
	if err := a.kube.eachBinding(ctx, "rolebindings", pod.Namespace, each); err != nil {
		return nil, nil, 0, err
	}
	if params.Namespaces != "own" {
		if err := a.kube.eachBinding(ctx, "rolebindings", "", func(b *binding) error {
			if b.Namespace == pod.Namespace {
				return nil
			}
			return each(b)
		}); err != nil {
			return nil, nil, 0, err
		}
	}
	return list, append(notes, groups...), beyond, nil
}

// revoke takes the bindings away. One that can't be is no reason to leave the others:
// then the step has failed, and what it did can be taken back.
func (a *accessRevoker) revoke(ctx context.Context, r *Request, params revokeAccessParams, list []revocable, rec revocation, again []revoked, notes []string) (Result, error) {
	done := slices.Clone(rec.Revoked)
	var objects []*unstructured.Unstructured
	for i := range list {
		rec.Revoked = append(rec.Revoked, list[i].record())
		objects = append(objects, list[i].object)
	}
	res := Result{Found: map[string]string{}, TTL: time.Duration(params.TTL)}
	if len(objects) > 0 {
		path, sum, err := keepManifests(ctx, a.store, r, a.about(list), objects)
		switch {
		case ctx.Err() != nil:
			return Result{}, fmt.Errorf("keep the bindings as evidence: %w", ctx.Err())
		case err != nil:
			notes = append(notes, "the bindings were not kept as evidence: "+err.Error())
		default:
			rec.Evidence, res.Found["manifestSHA256"] = path, sum
		}
	}
	if rec.Evidence != "" {
		res.Found["evidence"] = rec.Evidence
	}
	undo, err := json.Marshal(rec)
	if err != nil {
		return Result{}, err
	}
	small := len(undo) <= revokedRecordMost
	if small {
		// Afterwards nothing tells what was there before.
		r.Intend(undo, res.TTL)
	} else {
		notes = append(notes, "undo, since the bindings are too large to be remembered")
	}
	var failed []error
	for i := range list {
		switch err := a.revokeOne(ctx, &list[i]); {
		case err == nil:
			done = append(done, list[i].record())
		case isGone(err):
			// By itself, or by an earlier try that was not answered.
			if v := list[i].record(); slices.ContainsFunc(again, v.same) {
				done = append(done, v)
			}
		default:
			if _, retry, _, _ := classify(err); retry {
				return Result{}, err
			}
			failed = append(failed, err)
		}
	}
	if len(done) == 0 && len(failed) == 0 {
		return Result{}, fmt.Errorf("the bindings: %w", ErrGone)
	}
	var names []string
	for i := range done {
		names = append(names, done[i].String())
	}
	if len(done) > 0 && small {
		if res.Undo, err = json.Marshal(revocation{done, rec.Evidence}); err != nil {
			return Result{}, err
		}
	}
	res.Found["revoked"] = cutBytes(strings.Join(names, ", "), 1000)
	res.Reason = fmt.Sprintf("revoked: %s%s", res.Found["revoked"], said(notes))
	if rec.Evidence != "" {
		res.Reason += "; as they were they are in " + rec.Evidence
	}
	if len(failed) > 0 {
		err := errors.Join(failed...)
		if len(done) > 0 {
			err = fmt.Errorf("%w; %s", err, res.Reason)
		}
		return res, err
	}
	return res, nil
}

// about is what the evidence is of: the bindings, so that each is kept.
func (a *accessRevoker) about(list []revocable) string {
	var uids []string
	for i := range list {
		uids = append(uids, string(list[i].UID))
	}
	return strings.Join(uids, " ")
}

func (a *accessRevoker) revokeOne(ctx context.Context, b *revocable) error {
	client := namedClient(a.kube, servedBinding(b.resource), b.Namespace)
	if len(b.stay) == 0 {
		if err := client.Delete(ctx, b.Name, onlyThis(b.object)); err != nil {
			return fmt.Errorf("delete %s: %w", b, err)
		}
		return nil
	}
	if err := setSubjects(ctx, a.kube, b.binding, b.stay); err != nil {
		return fmt.Errorf("take the subject out of %s: %w", b, err)
	}
	return nil
}

// setSubjects holds only for the binding as it was read.
func setSubjects(ctx context.Context, kube *Kube, b *binding, subjects []rbacv1.Subject) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": b.UID, "resourceVersion": b.ResourceVersion},
		"subjects": subjects,
	})
	if err != nil {
		return err
	}
	_, err = namedClient(kube, servedBinding(b.resource), b.Namespace).Patch(ctx, b.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return mayBind(err, b.RoleRef)
}

// mayBind says what is missing where the API server keeps stoop from giving what
// it does not have. Nobody may change a binding, not even to take a subject out of
// it, without the right to make it.
func mayBind(err error, role rbacv1.RoleRef) error {
	if err == nil || !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "attempting to grant RBAC permissions") {
		return err
	}
	return fmt.Errorf("the API server lets nobody change who has %s %s without the verb bind (or escalate) on it: "+
		"list %[1]s/%[2]s in the step's parameter bind, give stoop's role what stoop rbac then prints, or do it by hand", role.Kind, role.Name)
}

// Undo gives the rights back, each where nobody else has done something about it
// meanwhile.
func (a *accessRevoker) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec revocation
	if err := json.Unmarshal(u.Record, &rec); err != nil || len(rec.Revoked) == 0 {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	var back, notes []string
	var failed []error
	for i := range rec.Revoked {
		v := &rec.Revoked[i]
		why, err := a.restore(ctx, v)
		switch {
		case err != nil:
			failed = append(failed, fmt.Errorf("give back %s: %w", v, err))
		case why != "":
			notes = append(notes, v.String()+" "+why)
		default:
			back = append(back, v.String())
		}
	}
	if len(failed) > 0 {
		return Result{}, errors.Join(failed...) // what was given back stays so when it is tried again
	}
	if len(back) == 0 {
		return Result{Nothing: true, Reason: "there is nothing to give back" + said(notes)}, nil
	}
	return Result{Reason: "given back: " + cutBytes(strings.Join(back, ", "), 1000) + said(notes)}, nil
}

// restore gives one binding back, or says why it is left as it is.
func (a *accessRevoker) restore(ctx context.Context, v *revoked) (left string, err error) {
	as := servedBinding(v.Resource)
	if as.Kind == "" || v.Name == "" || v.UID == "" {
		return "", Refuse("the undo record can't be read")
	}
	client := namedClient(a.kube, as, v.Namespace)
	o, err := client.Get(ctx, v.Name, metav1.GetOptions{})
	var now *binding
	switch {
	case err == nil:
		if now, err = readBinding(v.Resource, o); err != nil {
			return "", err
		}
	case !apierrors.IsNotFound(err):
		return "", fmt.Errorf("get it: %w", err)
	}
	switch {
	case now == nil && !v.Whole:
		return "is gone by now", nil
	case now == nil:
		return a.make(ctx, v)
	case v.Whole && equality.Semantic.DeepEqual(now.Subjects, v.Subjects) && now.RoleRef == v.RoleRef:
		return "is there again", nil
	case v.Whole, now.UID != v.UID:
		return "is another one by now", nil
	}
	subjects := slices.Clone(now.Subjects)
	for _, s := range v.Subjects {
		if !slices.Contains(subjects, s) {
			subjects = append(subjects, s)
		}
	}
	if len(subjects) == len(now.Subjects) {
		return "has its subject again", nil
	}
	return "", setSubjects(ctx, a.kube, now, subjects)
}

func (a *accessRevoker) make(ctx context.Context, v *revoked) (left string, err error) {
	as := servedBinding(v.Resource)
	b := rbacv1.ClusterRoleBinding{
		TypeMeta: metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: as.Kind},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: v.Namespace, Name: v.Name, Labels: v.Labels, Annotations: v.Annotations, OwnerReferences: v.Owners,
		},
		RoleRef: v.RoleRef, Subjects: v.Subjects,
	}
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&b)
	if err != nil {
		return "", err
	}
	o := &unstructured.Unstructured{Object: m}
	unstructured.RemoveNestedField(o.Object, "metadata", "creationTimestamp")
	_, err = namedClient(a.kube, as, v.Namespace).Create(ctx, o, metav1.CreateOptions{})
	switch {
	case apierrors.IsAlreadyExists(err):
		return "", Retry(errors.New("it came back this very moment"), 0)
	case isGone(err), apierrors.HasStatusCause(err, "NamespaceTerminating"):
		return "was in a namespace that is gone", nil
	}
	return "", mayBind(err, v.RoleRef)
}
