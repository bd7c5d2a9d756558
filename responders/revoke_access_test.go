package responders_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

func subject(kind, name string) rbacv1.Subject {
	if namespace, account, ok := strings.Cut(name, "/"); ok && kind == "ServiceAccount" {
		return rbacv1.Subject{Kind: kind, Namespace: namespace, Name: account}
	}
	return rbacv1.Subject{Kind: kind, APIGroup: rbacv1.GroupName, Name: name}
}

var mallory = subject("User", "mallory")

// Of a binding that an alert names those subjects go that are nobody's but a
// tenant's, or anybody's.
func TestRevokeAccessOfTheAlert(t *testing.T) {
	for _, tt := range []struct {
		name     string
		subject  rbacv1.Subject
		protects bool
	}{
		{"a user", mallory, false},
		{"anonymous", subject("User", "system:anonymous"), false},
		{"everybody", subject("Group", "system:authenticated"), false},
		{"everybody else", subject("Group", "system:unauthenticated"), false},
		{"all accounts", subject("Group", "system:serviceaccounts"), false},
		{"a group", subject("Group", "devs"), false},
		{"an account", subject("ServiceAccount", "shop/web"), false},
		{"an account as a user", subject("User", "system:serviceaccount:shop:web"), false},
		{"the accounts of a namespace", subject("Group", "system:serviceaccounts:shop"), false},
		{"the scheduler", subject("User", "system:kube-scheduler"), true},
		{"nodes", subject("Group", "system:nodes"), true},
		{"the administrators", subject("Group", "system:masters"), true},
		{"an account of a protected namespace", subject("ServiceAccount", "kube-system/dns"), true},
		{"the same as a user", subject("User", "system:serviceaccount:kube-system:dns"), true},
		{"the accounts of a protected namespace", subject("Group", "system:serviceaccounts:kube-system"), true},
		{"stoop", subject("ServiceAccount", "security/stoop"), true},
		{"stoop as a user", subject("User", "system:serviceaccount:security:stoop"), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAnswerer(t, "revoke-access")
			fields := created("clusterrolebindings", "", "evil")
			a.bind("", "evil", "cluster-admin", tt.subject)
			a.bind("", "good", "view", tt.subject)
			res, err := a.ask("", fields, time.Now())
			status, _, _, reason := responders.Classify(err)
			if tt.protects {
				if status != broker.Refused || !slices.Contains(a.subjects("", "evil"), tt.subject) {
					t.Fatalf("%s (%s)", status, reason)
				}
			} else if err != nil || a.subjects("", "evil") != nil || a.subjects("", "good") == nil {
				t.Fatalf("%+v, %s", res, reason)
			}

			// A protected one beside it spares nobody else.
			a = newAnswerer(t, "revoke-access")
			other := subject("User", "system:kube-controller-manager")
			if tt.protects {
				other = mallory
			}
			a.bind("", "evil", "cluster-admin", tt.subject, other)
			if res, err = a.ask("", fields, time.Now()); err != nil {
				t.Fatal(err)
			}
			left := map[bool]rbacv1.Subject{true: tt.subject, false: other}[tt.protects]
			if got := a.subjects("", "evil"); !slices.Equal(got, []rbacv1.Subject{left}) {
				t.Errorf("left are %v, want %v; %+v", got, left, res)
			}
			if _, err := a.undo(res); err != nil || len(a.subjects("", "evil")) != 2 {
				t.Errorf("after undo %v, error %v", a.subjects("", "evil"), err)
			}
		})
	}
}

func TestRevokeAccessRefuses(t *testing.T) {
	const changes = `{verbs: [create, update, patch]}`
	for _, tt := range []struct {
		name, params, resource, namespace, binding string
		more                                       []string
		after                                      time.Duration
		says                                       string // "": it is revoked
	}{
		{"what is no binding", "", "roles", "shop", "evil", nil, 0, "not about rolebindings"},
		{"stoop's own namespace", "", "rolebindings", "security", "evil", nil, 0, "stoop's own"},
		{"a request that was refused", "", "rolebindings", "shop", "evil", []string{"ka.response.code", "403"}, 0, "did not do what was asked"},
		{"a part", changes, "rolebindings", "shop", "evil", []string{"ka.target.subresource", "status"}, 0, "not about the object itself"},
		{"a change that is not listed", "", "rolebindings", "shop", "evil", []string{"ka.verb", "patch"}, 0, "the request was a"},
		{"one that is listed", changes, "rolebindings", "shop", "evil", []string{"ka.verb", "patch"}, time.Hour, ""},
		{"a binding that is older than its making", "", "rolebindings", "shop", "evil", nil, time.Hour, "long before"},
		{"the cluster's own", changes, "clusterrolebindings", "", "system:node", []string{"ka.verb", "patch"}, 0, "cluster's own"},
		{"one that the API server makes", "", "clusterrolebindings", "", "system:new", []string{"ka.user.name", "system:apiserver"}, 0, "cluster's own"},
		// Or an attacker's would only have to be called so.
		{"one that calls itself the cluster's", "", "clusterrolebindings", "", "system:evil", nil, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAnswerer(t, "revoke-access")
			a.bind(tt.namespace, tt.binding, "view", mallory)
			res, err := a.ask(tt.params, created(tt.resource, tt.namespace, tt.binding, tt.more...), time.Now().Add(tt.after))
			status, _, _, reason := responders.Classify(err)
			gone := a.subjects(tt.namespace, tt.binding) == nil
			switch {
			case tt.says == "" && (err != nil || !gone):
				t.Errorf("%+v, %s", res, reason)
			case tt.says != "" && (status != broker.Refused || gone || !strings.Contains(reason, tt.says)):
				t.Errorf("%s (%s), want refused (%s)", status, reason, tt.says)
			}
		})
	}
}

// The rights of a pod's account go, nobody else's.
func TestRevokeAccessOfThePod(t *testing.T) {
	web, asUser := subject("ServiceAccount", "shop/web"), subject("User", "system:serviceaccount:shop:web")
	namesake, other := subject("ServiceAccount", "other/web"), subject("ServiceAccount", "shop/other")
	a := newAnswerer(t, "revoke-access")
	a.bind("shop", "alone", "edit", web)
	a.bind("shop", "as-user", "edit", asUser)
	a.bind("shop", "shared", "edit", other, web)
	a.bind("shop", "others", "edit", namesake, other)
	a.bind("elsewhere", "abroad", "edit", web)
	a.bind("", "cluster", "cluster-admin", web)
	a.bind("", "system:one", "view", web)
	a.bind("kube-system", "reader", "view", web)
	a.bind("", "by-group", "view", subject("Group", "system:serviceaccounts:shop"))
	res, err := a.ask("{from: pod, bind: [ClusterRole/edit]}", map[string]string{"container.id": "0123456789ab"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, gone := range [][2]string{{"shop", "alone"}, {"shop", "as-user"}, {"elsewhere", "abroad"}, {"", "cluster"}} {
		if got := a.subjects(gone[0], gone[1]); got != nil {
			t.Errorf("%v binds %v still", gone, got)
		}
	}
	for at, want := range map[[2]string][]rbacv1.Subject{
		{"shop", "shared"}: {other}, {"shop", "others"}: {namesake, other}, {"", "system:one"}: {web}, {"kube-system", "reader"}: {web},
	} {
		if got := a.subjects(at[0], at[1]); !slices.Equal(got, want) {
			t.Errorf("%v binds %v, want %v", at, got, want)
		}
	}
	for _, says := range []string{
		"clusterrolebinding system:one is the cluster's own", "rolebinding kube-system/reader is in a protected namespace",
		"clusterrolebinding by-group, by its group system:serviceaccounts:shop", "rolebinding elsewhere/abroad", a.evidence,
	} {
		if !strings.Contains(res.Reason, says) {
			t.Errorf("the reason does not say %q: %s", says, res.Reason)
		}
	}

	// Somebody gave one of them back by hand, and another in another way.
	a.bind("shop", "alone", "edit", web)
	a.bind("elsewhere", "abroad", "view", mallory)
	u, err := a.undo(res)
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[[2]string][]rbacv1.Subject{
		{"shop", "alone"}: {web}, {"shop", "as-user"}: {asUser}, {"shop", "shared"}: {other, web}, {"", "cluster"}: {web}, {"elsewhere", "abroad"}: {mallory},
	} {
		if got := a.subjects(at[0], at[1]); !slices.Equal(got, want) {
			t.Errorf("after undo %v binds %v, want %v", at, got, want)
		}
	}
	if !strings.Contains(u.Reason, "rolebinding shop/alone is there again") || !strings.Contains(u.Reason, "elsewhere/abroad is another one by now") {
		t.Errorf("undo: %s", u.Reason)
	}
	if b, err := a.admin.RbacV1().ClusterRoleBindings().Get(t.Context(), "cluster", metav1.GetOptions{}); err != nil || b.RoleRef.Name != "cluster-admin" || b.Labels["a"] != "b" {
		t.Errorf("%+v, %v", b, err)
	}
	if u, err = a.undo(res); err != nil || !u.Nothing {
		t.Errorf("undo once more: %+v, %v", u, err)
	}
}

func TestRevokeAccessOfThePodInItsNamespaceAlone(t *testing.T) {
	web := subject("ServiceAccount", "shop/web")
	a := newAnswerer(t, "revoke-access")
	a.bind("shop", "here", "edit", web)
	a.bind("elsewhere", "abroad", "edit", web)
	if _, err := a.ask("{from: pod, namespaces: own}", nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	if a.subjects("shop", "here") != nil || a.subjects("elsewhere", "abroad") == nil {
		t.Error("it is the other one")
	}
	if res, err := a.ask("{from: pod, namespaces: own}", nil, time.Now()); err != nil || !res.Nothing && len(res.Undo) == 0 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestRevokeAccessOfNoBinding(t *testing.T) {
	a := newAnswerer(t, "revoke-access")
	a.bind("", "others", "edit", mallory)
	if res, err := a.ask("{from: pod}", nil, time.Now()); err != nil || !res.Nothing || res.Undo != nil {
		t.Errorf("%+v, %v", res, err)
	}
	a.pod.Namespace, a.pod.Spec.ServiceAccountName = "security", "stoop"
	_, err := a.ask("{from: pod}", nil, time.Now())
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "stoop's own") {
		t.Errorf("of stoop itself: %s (%s)", status, reason)
	}
}

// What can't be done is no reason to leave the rest, and what was done can be taken
// back.
func TestRevokeAccessInPart(t *testing.T) {
	web := subject("ServiceAccount", "shop/web")
	a := newAnswerer(t, "revoke-access")
	a.bind("", "shared", "edit", mallory, web)
	a.bind("shop", "alone", "edit", web)
	a.server.Forbid(t, "patch", rbacv1.GroupName, "clusterrolebindings")
	res, err := a.ask("{from: pod}", nil, time.Now())
	if status, again, _, reason := responders.Classify(err); status != broker.Failed || again || !strings.Contains(reason, "patch") {
		t.Errorf("%s (%s), tried again: %t", status, reason, again)
	}
	if a.subjects("shop", "alone") != nil || len(a.subjects("", "shared")) != 2 {
		t.Error("the one that can be revoked is there still, or the other is not")
	}
	if _, err := a.undo(res); err != nil || !slices.Equal(a.subjects("shop", "alone"), []rbacv1.Subject{web}) {
		t.Errorf("undo: %v, %v", a.subjects("shop", "alone"), err)
	}
}

// A try that was not answered is taken up where it was.
func TestRevokeAccessIsTakenUp(t *testing.T) {
	web := subject("ServiceAccount", "shop/web")
	a := newAnswerer(t, "revoke-access")
	a.bind("shop", "one", "edit", web)
	a.bind("shop", "two", "edit", web)
	// The first is changed by somebody right before it is deleted.
	a.onRequest("DELETE", func() {
		b, err := a.admin.RbacV1().RoleBindings("shop").Get(t.Context(), "two", metav1.GetOptions{})
		if err == nil {
			b.Labels["a"] = "c"
			_, err = a.admin.RbacV1().RoleBindings("shop").Update(t.Context(), b, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Error(err)
		}
	})
	_, err := a.ask("{from: pod}", nil, time.Now())
	if _, again, _, reason := responders.Classify(err); !again || a.intended == nil {
		t.Fatalf("%s, tried again: %t", reason, again)
	}
	if a.subjects("shop", "one") != nil || a.subjects("shop", "two") == nil {
		t.Fatal("the test has to delete one of two")
	}
	res, err := a.ask("{from: pod}", nil, time.Now())
	if err != nil || a.subjects("shop", "two") != nil {
		t.Fatalf("%+v, %v", res, err)
	}
	if _, err := a.undo(res); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one", "two"} {
		if a.subjects("shop", name) == nil {
			t.Errorf("%s is not given back: %s", name, res.Undo)
		}
	}
}

// An attacker can't make a binding too large to be revoked.
func TestRevokeAccessOfALargeBinding(t *testing.T) {
	a := newAnswerer(t, "revoke-access")
	var many []rbacv1.Subject
	for i := range 8000 {
		many = append(many, subject("User", fmt.Sprintf("mallory-%060d", i)))
	}
	a.bind("", "evil", "cluster-admin", many...)
	res, err := a.ask("", created("clusterrolebindings", "", "evil"), time.Now())
	if err != nil || a.subjects("", "evil") != nil || res.Undo != nil || a.intended != nil || !strings.Contains(res.Reason, "too large") {
		t.Errorf("%s, undo of %d bytes, %v", res.Reason, len(res.Undo), err)
	}
}

func TestRevokeAccessParameters(t *testing.T) {
	for params, want := range map[string]string{
		`{from: elsewhere}`:         "unknown from",
		`{bind: [view]}`:            "neither ClusterRole/NAME",
		`{bind: ["ClusterRole/*"]}`: "neither ClusterRole/NAME",
		`{bind: [ClusterRole/]}`:    "neither ClusterRole/NAME",
		`{ttl: 1h}`:                 "without bind",
		`{verbs: [get]}`:            "none of create",
		`{ttl: 1h, bind: [Role/a, ClusterRole/system:b]}`: "",
	} {
		if got := problems(t, entryOf(t, "revoke-access"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}

// Whoever may make bindings somewhere makes very many for the suspect's account: its own
// and the cluster's go all the same, and the step says that others stand.
func TestRevokeAccessAmongVeryManyBindings(t *testing.T) {
	web := subject("ServiceAccount", "shop/web")
	a := newAnswerer(t, "revoke-access")
	for n := range 150 { // in a namespace that comes first in a list
		a.bind("a-tenant", fmt.Sprintf("decoy-%d", n), "view", web)
	}
	a.bind("shop", "real", "edit", web)
	a.bind("", "cluster", "cluster-admin", web)
	res, err := a.ask("{from: pod}", nil, time.Now())
	if status, again, _, reason := responders.Classify(err); status != broker.Failed || again || !strings.Contains(reason, "52 more bindings") {
		t.Errorf("%s (%s), tried again: %t", status, reason, again)
	}
	if a.subjects("shop", "real") != nil || a.subjects("", "cluster") != nil {
		t.Error("what counts is there still")
	}
	if len(res.Undo) == 0 {
		t.Error("it can't be taken back")
	}
}

// Who is asked is told which bindings would go, and nothing goes by that.
func TestRevokeAccessIsPreviewed(t *testing.T) {
	web := subject("ServiceAccount", "shop/web")
	a := newAnswerer(t, "revoke-access")
	pod := map[string]string{"container.id": "0123456789ab"}
	preview := func(params string, fields map[string]string) (responders.Result, error) {
		t.Helper()
		return a.responder.(responders.Previewer).Preview(t.Context(), a.request(params, fields, time.Now()))
	}
	if res, err := preview("{from: pod}", pod); err != nil || !res.Nothing || !strings.Contains(res.Reason, "has no binding") {
		t.Errorf("of nothing: %+v, %v", res, err)
	}
	a.bind("shop", "alone\x1b[31m\nnot", "edit", web)
	a.bind("shop", "shared", "view", mallory, web)
	a.bind("", "system:one", "view", web)
	res, err := preview("{from: pod}", pod)
	if err != nil || res.Nothing {
		t.Fatalf("%+v, %v", res, err)
	}
	for _, says := range []string{
		"rolebinding shop/alone [31m not (ClusterRole edit) from ServiceAccount shop/web", "rolebinding shop/shared (ClusterRole view) from ServiceAccount shop/web, 1 others keep it",
		"clusterrolebinding system:one is the cluster's own",
	} {
		if !strings.Contains(res.Reason, says) {
			t.Errorf("it is not said that %q: %s", says, res.Reason)
		}
	}
	if len(a.subjects("shop", "shared")) != 2 || a.intended != nil {
		t.Errorf("the preview did something: %s", a.intended)
	}
	for i := range 30 {
		a.bind("shop", fmt.Sprintf("more-%02d", i), "edit", web)
	}
	if res, err = preview("{from: pod}", pod); err != nil || !strings.Contains(res.Reason, "; 12 more") || strings.Contains(res.Reason, "more-29") {
		t.Errorf("of many: %+v, %v", res, err)
	}

	a.bind("", "evil", "cluster-admin", mallory, subject("User", "x\n\x1b[31mapprove"))
	res, err = preview("", created("clusterrolebindings", "", "evil"))
	if err != nil || res.Reason != "would revoke: clusterrolebinding evil (ClusterRole cluster-admin) from User mallory, User x [31mapprove" {
		t.Errorf("of the alert's: %+v, %v", res, err)
	}
	a.bind("", "ours", "view", subject("ServiceAccount", "security/stoop"))
	for _, name := range []string{"ours", "gone"} {
		if res, err = preview("", created("clusterrolebindings", "", name)); err == nil {
			t.Errorf("of %s: %+v", name, res)
		}
	}
}
