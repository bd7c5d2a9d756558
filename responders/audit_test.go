package responders_test

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"path"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/responders"
	"stoop/responders/conformance"
)

// answerer is a responder that answers audit events, and its cluster, in which
// stoop is security/stoop and kube-system is protected.
type answerer struct {
	t         testing.TB
	server    *conformance.Server
	admin     kubernetes.Interface
	entry     responders.Entry
	env       responders.Env
	responder responders.Responder
	evidence  string
	pod       *corev1.Pod
	intended  json.RawMessage
	// before is called with each request that stoop sends.
	before atomic.Pointer[func(*http.Request)]
	n      int
}

func newAnswerer(t testing.TB, responder string) *answerer {
	a := &answerer{t: t, server: conformance.NewServer(t), entry: entryOf(t, responder), evidence: filepath.Join(t.TempDir(), "evidence")}
	a.admin = a.server.Admin()
	config := a.server.Config()
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return tripper(func(r *http.Request) (*http.Response, error) {
			if f := a.before.Load(); f != nil {
				(*f)(r)
			}
			return next.RoundTrip(r)
		})
	})
	client, err := responders.NewKube(config)
	if err != nil {
		t.Fatal(err)
	}
	store, err := evidence.Open(evidence.Config{Dir: a.evidence, Size: 1 << 20, PerTarget: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	a.env = responders.Env{
		Kube: client, Node: testNode, Evidence: store,
		Self: responders.Self{Namespace: "security", User: "system:serviceaccount:security:stoop"},
		ProtectedNamespace: func(ns string) bool {
			ok, _ := path.Match("kube-*", ns)
			return ok
		},
	}
	a.responder = a.entry.New(a.env)
	a.pod, err = a.admin.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-0"}, Spec: corev1.PodSpec{NodeName: testNode, ServiceAccountName: "web"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// created are the fields of an event that says that something was made.
func created(resource, namespace, name string, more ...string) map[string]string {
	f := map[string]string{
		"ka.verb": "create", "ka.response.code": "201", "ka.user.name": "mallory",
		"ka.target.resource": resource, "ka.target.namespace": namespace, "ka.target.name": name,
	}
	for i := 0; i < len(more); i += 2 {
		f[more[i]] = more[i+1]
	}
	return f
}

// ask has an event answered that came when it says; empty fields are left out.
func (a *answerer) ask(params string, fields map[string]string, at time.Time) (responders.Result, error) {
	a.t.Helper()
	r := a.request(params, fields, at)
	// As the host does.
	if err := a.responder.(responders.Checker).Check(a.t.Context(), r); err != nil {
		return responders.Result{}, err
	}
	return a.responder.Act(a.t.Context(), r)
}

// request is a step about an event.
func (a *answerer) request(params string, fields map[string]string, at time.Time) *responders.Request {
	a.t.Helper()
	fields = maps.Clone(fields)
	maps.DeleteFunc(fields, func(_, v string) bool { return v == "" })
	line, err := json.Marshal(map[string]any{
		"hostname": testNode, "priority": "Critical", "rule": "Audit", "source": "k8s_audit", "output": "x",
		"time": at.UTC().Format(time.RFC3339Nano), "output_fields": fields,
	})
	if err != nil {
		a.t.Fatal(err)
	}
	al, err := alert.Parse(line)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	r := &responders.Request{
		Step:   &broker.Step{ID: "step" + string(rune('a'+a.n)), Rule: "r", Action: broker.Action{Responder: a.entry.Name, Params: checked(a.t, a.entry, params)}},
		Alert:  al,
		Target: al.Target(), Pod: a.pod, Intended: a.intended,
	}
	responders.OnIntend(r, func(undo json.RawMessage) { a.intended = undo })
	return r
}

// undo takes a step back.
func (a *answerer) undo(res responders.Result) (responders.Result, error) {
	return a.responder.(responders.Undoer).Undo(a.t.Context(), &responders.UndoRequest{ID: "x", Record: res.Undo})
}

// onRequest has f called once, before the first request of a method.
func (a *answerer) onRequest(method string, f func()) {
	var once atomic.Bool
	g := func(r *http.Request) {
		if r.Method == method && once.CompareAndSwap(false, true) {
			f()
		}
	}
	a.before.Store(&g)
}

func (a *answerer) configMap(namespace, name string, edit func(*corev1.ConfigMap)) {
	a.t.Helper()
	c := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"a": "b"}}
	if edit != nil {
		edit(c)
	}
	if _, err := a.admin.CoreV1().ConfigMaps(namespace).Create(a.t.Context(), c, metav1.CreateOptions{}); err != nil {
		a.t.Fatal(err)
	}
}

func (a *answerer) hasConfigMap(namespace, name string) bool {
	_, err := a.admin.CoreV1().ConfigMaps(namespace).Get(context.WithoutCancel(a.t.Context()), name, metav1.GetOptions{})
	return err == nil
}

// bind makes a RoleBinding, or with the namespace "" a ClusterRoleBinding.
func (a *answerer) bind(namespace, name, role string, subjects ...rbacv1.Subject) {
	a.t.Helper()
	ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role}
	meta := metav1.ObjectMeta{Name: name, Labels: map[string]string{"a": "b"}}
	var err error
	if namespace == "" {
		_, err = a.admin.RbacV1().ClusterRoleBindings().Create(a.t.Context(), &rbacv1.ClusterRoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
	} else {
		_, err = a.admin.RbacV1().RoleBindings(namespace).Create(a.t.Context(), &rbacv1.RoleBinding{ObjectMeta: meta, RoleRef: ref, Subjects: subjects}, metav1.CreateOptions{})
	}
	if err != nil {
		a.t.Fatal(err)
	}
}

// subjects are those that a binding has now; nil: there is no such binding.
func (a *answerer) subjects(namespace, name string) []rbacv1.Subject {
	a.t.Helper()
	if namespace == "" {
		b, err := a.admin.RbacV1().ClusterRoleBindings().Get(a.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return nil
		}
		return b.Subjects
	}
	b, err := a.admin.RbacV1().RoleBindings(namespace).Get(a.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	return b.Subjects
}
