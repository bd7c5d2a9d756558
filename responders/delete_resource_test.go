package responders_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// What an alert says is somebody else's word: the object is deleted only where
// it is the one that the request was about.
func TestDeleteResourceBelievesNothing(t *testing.T) {
	const params = `{kinds: [configmaps]}`
	const changes = `{kinds: [configmaps], verbs: [create, update, patch]}`
	for _, tt := range []struct {
		name   string
		params string
		more   []string // fields
		after  time.Duration
		status broker.Status // "": it is deleted
		says   string
	}{
		{"it was made", params, nil, 0, "", ""},
		{"it was made, says its age", params, []string{"ka.verb", ""}, 0, "", ""},
		{"it was changed", changes, []string{"ka.verb", "patch", "ka.response.code", "200"}, time.Hour, "", ""},
		{"clocks differ a little", params, nil, -time.Second, "", ""},
		{"the answer took a while", params, nil, 50 * time.Second, "", ""},
		{"no code", params, []string{"ka.response.code", ""}, 0, broker.Refused, "ka.response.code"},
		{"forbidden", params, []string{"ka.response.code", "403"}, 0, broker.Refused, "did not do what was asked"},
		{"there already", params, []string{"ka.response.code", "409"}, 0, broker.Refused, "did not do what was asked"},
		{"a code that is none", params, []string{"ka.response.code", "2011"}, 0, broker.Refused, "did not do what was asked"},
		{"tried only", params, []string{"ka.uri.param[dryRun]", "All"}, 0, broker.Refused, "only tried"},
		{"a part of it", params, []string{"ka.target.subresource", "status"}, 0, broker.Refused, "not about the object itself"},
		{"a part of it that is wanted", `{kinds: [configmaps], subresources: true}`, []string{"ka.target.subresource", "status"}, 0, "", ""},
		{"it was read", params, []string{"ka.verb", "get", "ka.response.code", "200"}, 0, broker.Refused, "the request was a"},
		{"it was changed, which is not listed", params, []string{"ka.verb", "update", "ka.response.code", "200"}, 0, broker.Refused, "the request was a"},
		{"nobody says what was asked", `{kinds: [configmaps], verbs: [patch]}`, []string{"ka.verb", ""}, 0, broker.Refused, "ka.verb"},
		{"another kind", params, []string{"ka.target.resource", "secrets"}, 0, broker.Refused, "lists only configmaps"},
		{"no namespace", params, []string{"ka.target.namespace", ""}, 0, broker.Refused, "ka.target.namespace"},
		{"stoop's own namespace", params, []string{"ka.target.namespace", "security"}, 0, broker.Refused, "stoop's own"},
		{"made after the alert", params, nil, -4 * time.Second, broker.Nothing, "after the alert"},
		{"changed, and made after the alert", changes, []string{"ka.verb", "patch"}, -4 * time.Second, broker.Nothing, "after the alert"},
		{"made long before the request that made it", params, nil, 2 * time.Minute, broker.Refused, "long before"},
		{"the same, without a verb", params, []string{"ka.verb", ""}, 2 * time.Minute, broker.Refused, "long before"},
		{"another name", params, []string{"ka.target.name", "other"}, 0, broker.Nothing, "not found"},
		{"kinds that there are not", `{kinds: [widgets.example.com]}`, []string{"ka.target.resource", "widgets"}, 0, broker.Refused, "serves no widgets.example.com"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAnswerer(t, "delete-resource")
			for _, ns := range []string{"shop", "security"} {
				a.configMap(ns, "evil", nil)
			}
			res, err := a.ask(tt.params, created("configmaps", "shop", "evil", tt.more...), time.Now().Add(tt.after))
			status, _, _, reason := responders.Classify(err)
			if tt.status == "" {
				if err != nil || a.hasConfigMap("shop", "evil") || !a.hasConfigMap("security", "evil") {
					t.Fatalf("%+v, error %v", res, err)
				}
				return
			}
			if status != tt.status || !strings.Contains(reason, tt.says) {
				t.Errorf("%s (%s), want %s (%s)", status, reason, tt.status, tt.says)
			}
			if !a.hasConfigMap("shop", "evil") || !a.hasConfigMap("security", "evil") {
				t.Error("it was deleted")
			}
		})
	}
}

// What is changed or made anew right before the delete is not deleted.
func TestDeleteResourceDeletesNoOther(t *testing.T) {
	fields := created("configmaps", "shop", "evil")
	t.Run("changed", func(t *testing.T) {
		a := newAnswerer(t, "delete-resource")
		a.configMap("shop", "evil", nil)
		a.onRequest("DELETE", func() {
			c, err := a.admin.CoreV1().ConfigMaps("shop").Get(t.Context(), "evil", metav1.GetOptions{})
			if err == nil {
				c.Data["a"] = "c"
				_, err = a.admin.CoreV1().ConfigMaps("shop").Update(t.Context(), c, metav1.UpdateOptions{})
			}
			if err != nil {
				t.Error(err)
			}
		})
		_, err := a.ask(`{kinds: [configmaps]}`, fields, time.Now())
		if _, again, _, reason := responders.Classify(err); !again || !a.hasConfigMap("shop", "evil") {
			t.Errorf("%s, tried again: %t", reason, again)
		}
		if _, err = a.ask(`{kinds: [configmaps]}`, fields, time.Now()); err != nil || a.hasConfigMap("shop", "evil") {
			t.Errorf("the next try: %v", err)
		}
	})
	t.Run("another one", func(t *testing.T) {
		a := newAnswerer(t, "delete-resource")
		a.configMap("shop", "evil", nil)
		a.onRequest("DELETE", func() {
			if err := a.admin.CoreV1().ConfigMaps("shop").Delete(t.Context(), "evil", metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
			a.configMap("shop", "evil", nil)
		})
		_, err := a.ask(`{kinds: [configmaps]}`, fields, time.Now())
		if status, _, _, reason := responders.Classify(err); status != broker.Nothing || !a.hasConfigMap("shop", "evil") {
			t.Errorf("%s (%s)", status, reason)
		}
	})
	t.Run("being deleted", func(t *testing.T) {
		a := newAnswerer(t, "delete-resource")
		now := metav1.Now()
		a.configMap("shop", "evil", func(c *corev1.ConfigMap) { c.DeletionTimestamp = &now })
		_, err := a.ask(`{kinds: [configmaps]}`, fields, time.Now())
		if status, _, _, reason := responders.Classify(err); status != broker.Nothing || !a.hasConfigMap("shop", "evil") {
			t.Errorf("%s (%s)", status, reason)
		}
	})
}

// It is kept before it is deleted, so that a person can make it again.
func TestDeleteResourceKeepsIt(t *testing.T) {
	a := newAnswerer(t, "delete-resource")
	a.configMap("shop", "evil", func(c *corev1.ConfigMap) { c.Finalizers = []string{"example.com/hold"} })
	res, err := a.ask(`{kinds: [configmaps]}`, created("configmaps", "shop", "evil"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := res.Found["evidence"]
	if !strings.HasPrefix(dir, a.evidence) || !strings.Contains(res.Reason, dir) || !strings.Contains(res.Reason, "example.com/hold") || res.Undo != nil {
		t.Errorf("%+v", res)
	}
	for name, want := range map[string]bool{"0.object.json": true, "0.again.json": false} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		var c corev1.ConfigMap
		if err := json.Unmarshal(b, &c); err != nil || c.Kind != "ConfigMap" || c.Data["a"] != "b" || c.Name != "evil" {
			t.Errorf("%s: %s (%v)", name, b, err)
		}
		if has := c.UID != "" && c.ResourceVersion != "" && !c.CreationTimestamp.IsZero(); has != want || !want && (c.UID != "" || c.ResourceVersion != "") {
			t.Errorf("%s: %s", name, b)
		}
	}

	a.env.Evidence = nil
	a.responder = a.entry.New(a.env)
	a.configMap("shop", "more", nil)
	_, err = a.ask(`{kinds: [configmaps]}`, created("configmaps", "shop", "more"), time.Now())
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || !a.hasConfigMap("shop", "more") {
		t.Errorf("without a place to keep it: %s (%s)", status, reason)
	}
	if res, err = a.ask(`{kinds: [configmaps], manifestFirst: false}`, created("configmaps", "shop", "more"), time.Now()); err != nil || a.hasConfigMap("shop", "more") || !strings.Contains(res.Reason, "not kept") {
		t.Errorf("%+v, %v", res, err)
	}
}

// What stoop, or the cluster, needs is left, whatever is listed.
func TestDeleteResourceSpares(t *testing.T) {
	account := rbacv1.Subject{Kind: "ServiceAccount", Namespace: "security", Name: "stoop"}
	node := rbacv1.Subject{Kind: "ServiceAccount", Namespace: "security", Name: "node"}
	nodeUser := rbacv1.Subject{Kind: "User", APIGroup: rbacv1.GroupName, Name: "system:serviceaccount:security:node"}
	other := rbacv1.Subject{Kind: "ServiceAccount", Namespace: "shop", Name: "other"}
	group := rbacv1.Subject{Kind: "Group", APIGroup: rbacv1.GroupName, Name: "system:serviceaccounts:security"}
	user := rbacv1.Subject{Kind: "User", APIGroup: rbacv1.GroupName, Name: "system:serviceaccount:security:stoop"}
	role := func(a *answerer, namespace, name string) {
		var err error
		if meta := (metav1.ObjectMeta{Name: name}); namespace == "" {
			_, err = a.admin.RbacV1().ClusterRoles().Create(a.t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta}, metav1.CreateOptions{})
		} else {
			_, err = a.admin.RbacV1().Roles(namespace).Create(a.t.Context(), &rbacv1.Role{ObjectMeta: meta}, metav1.CreateOptions{})
		}
		if err != nil {
			a.t.Fatal(err)
		}
	}
	pod := func(edit func(*corev1.Pod)) func(*answerer) {
		return func(a *answerer) {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}}
			edit(p)
			if _, err := a.admin.CoreV1().Pods("shop").Create(a.t.Context(), p, metav1.CreateOptions{}); err != nil {
				a.t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name, resource, namespace string
		make                      func(*answerer)
		spared                    bool
	}{
		{"a binding of stoop's", "clusterrolebindings", "", func(a *answerer) { a.bind("", "x", "view", other, account) }, true},
		{"a binding of stoop's as a user", "rolebindings", "shop", func(a *answerer) { a.bind("shop", "x", "view", user) }, true},
		{"a binding of all accounts of stoop's namespace", "rolebindings", "shop", func(a *answerer) { a.bind("shop", "x", "view", group) }, true},
		{"a binding of the nodes' stoops", "clusterrolebindings", "", func(a *answerer) { a.bind("", "x", "view", node) }, true},
		{"a binding of theirs as a user", "clusterrolebindings", "", func(a *answerer) { a.bind("", "x", "view", nodeUser) }, true},
		{"a cluster role of theirs", "clusterroles", "", func(a *answerer) { role(a, "", "x"); a.bind("", "y", "x", node) }, true},
		{"a binding of another's", "rolebindings", "shop", func(a *answerer) { a.bind("shop", "x", "view", other) }, false},
		{"a cluster role of stoop's", "clusterroles", "", func(a *answerer) { role(a, "", "x"); a.bind("", "y", "x", account) }, true},
		{"a cluster role that stoop has in a namespace", "clusterroles", "", func(a *answerer) { role(a, "", "x"); a.bind("web", "y", "x", account) }, true},
		{"a cluster role of another's", "clusterroles", "", func(a *answerer) { role(a, "", "x"); a.bind("", "y", "x", other); a.bind("", "z", "view", account) }, false},
		{"a role that a cluster role's name is like", "roles", "shop", func(a *answerer) { role(a, "shop", "x"); a.bind("shop", "y", "x", account) }, false},
		{"a static pod's mirror", "pods", "shop", pod(func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }), true},
		{"a pod of the system's", "pods", "shop", pod(func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical" }), true},
		{"a pod", "pods", "shop", pod(func(*corev1.Pod) {}), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAnswerer(t, "delete-resource")
			tt.make(a)
			_, err := a.ask(`{kinds: [pods, roles.rbac.authorization.k8s.io, clusterroles.rbac.authorization.k8s.io, rolebindings.rbac.authorization.k8s.io, clusterrolebindings.rbac.authorization.k8s.io]}`,
				created(tt.resource, tt.namespace, "x"), time.Now())
			status, _, _, reason := responders.Classify(err)
			if want := map[bool]broker.Status{true: broker.Refused, false: broker.Done}[tt.spared]; status != want {
				t.Errorf("%s (%s), want %s", status, reason, want)
			}
		})
	}
	for name, spared := range map[string]bool{
		"security-stoop-own-node-pods": true, "security-node-own-node-nodes": true, "security-policy": false, "shop-stoop-own-node-pods": false,
	} {
		t.Run("the policy "+name, func(t *testing.T) {
			a := newAnswerer(t, "delete-resource")
			if _, err := a.admin.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.Context(), &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			_, err := a.ask(`{kinds: [validatingadmissionpolicies.admissionregistration.k8s.io]}`, created("validatingadmissionpolicies", "", name), time.Now())
			if status, _, _, reason := responders.Classify(err); status != map[bool]broker.Status{true: broker.Refused, false: broker.Done}[spared] {
				t.Errorf("%s (%s)", status, reason)
			}
		})
	}
	t.Run("stoop's own namespace", func(t *testing.T) {
		a := newAnswerer(t, "delete-resource")
		_, err := a.ask(`{kinds: [namespaces]}`, created("namespaces", "", "security"), time.Now())
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "own") {
			t.Errorf("%s (%s)", status, reason)
		}
	})
}

func TestDeleteResourceParameters(t *testing.T) {
	for params, want := range map[string]string{
		`{}`:                            "missing",
		`{kinds: []}`:                   "may not be empty",
		`{kinds: [Secret]}`:             "is no resource",
		`{kinds: [secrets, pods/exec]}`: "is no resource",
		`{kinds: ["secrets."]}`:         "is no resource",
		`{kinds: ["*"]}`:                "is no resource",
		`{kinds: [events, events.events.k8s.io]}`: "have one name",
		`{kinds: [secrets], verbs: [delete]}`:     "none of create",
		`{kinds: [secrets], verbs: []}`:           "there is none",
		`{kinds: [secrets, deployments.apps, certificates.cert-manager.io], verbs: [create, patch]}`: "",
	} {
		if got := problems(t, entryOf(t, "delete-resource"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
