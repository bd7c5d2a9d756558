package responders_test

import (
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

func (m *member) replicas() int32 {
	m.t.Helper()
	return conformance.Replicas(m.t, m.admin, "shop", "web")
}

func (m *member) setReplicas(n int32) {
	m.t.Helper()
	d, err := m.admin.AppsV1().Deployments("shop").Get(m.t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	d.Spec.Replicas = &n
	if _, err := m.admin.AppsV1().Deployments("shop").Update(m.t.Context(), d, metav1.UpdateOptions{}); err != nil {
		m.t.Fatal(err)
	}
}

func (m *member) autoscaler(name, kind, target string, least *int32) {
	m.t.Helper()
	m.autoscalerOf(name, "apps/v1", kind, target, least)
}

func (m *member) autoscalerOf(name, apiVersion, kind, target string, least *int32) {
	m.t.Helper()
	_, err := m.admin.AutoscalingV2().HorizontalPodAutoscalers("shop").Create(m.t.Context(), &autoscalingv2.HorizontalPodAutoscaler{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: apiVersion, Kind: kind, Name: target},
			MinReplicas:    least, MaxReplicas: 9,
		},
	}, metav1.CreateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
}

func TestScaleWorkload(t *testing.T) {
	t.Run("the deployment and nothing else", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		conformance.MakeDeployment(t, m.admin, "shop", "other", 4)
		res := m.act("s1", "")
		if m.replicas() != 0 || conformance.Replicas(t, m.admin, "shop", "other") != 4 {
			t.Errorf("the workloads have %d and %d", m.replicas(), conformance.Replicas(t, m.admin, "shop", "other"))
		}
		m.wantWrites("PUT deployments/web/scale ")
		want := map[string]string{"workload": "Deployment shop/web", "replicas": "5"}
		if res.Reason != "Deployment shop/web scaled from 5 to 0 replicas" || !reflect.DeepEqual(res.Found, want) || res.Undo == nil {
			t.Errorf("%+v", res)
		}
		if res := m.act("s2", ""); !res.Nothing || res.Undo != nil {
			t.Errorf("again: %+v", res)
		}
		m.wantWrites("PUT deployments/web/scale ")
	})
	t.Run("to a number, and never up", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		m.act("s1", "replicas: 2")
		if m.replicas() != 2 {
			t.Errorf("it has %d", m.replicas())
		}
		m.setReplicas(1)
		if res := m.act("s2", "replicas: 2"); !res.Nothing || m.replicas() != 1 {
			t.Errorf("it has %d: %+v", m.replicas(), res)
		}
	})
	t.Run("a stateful set", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		sts, err := m.admin.AppsV1().StatefulSets("shop").Create(t.Context(), &appsv1.StatefulSet{
			ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.StatefulSetSpec{Replicas: new(int32(3))},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = conformance.Control(t, m.admin, m.pod, sts, "StatefulSet")
		m.act("s1", "")
		if sts, err = m.admin.AppsV1().StatefulSets("shop").Get(t.Context(), "web", metav1.GetOptions{}); err != nil || *sts.Spec.Replicas != 0 {
			t.Errorf("%+v, %v", sts, err)
		}
	})
	t.Run("what can't be scaled", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		ds, err := m.admin.AppsV1().DaemonSets("shop").Create(t.Context(), &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		// Its permissions are not for this kind.
		m.pod = conformance.Control(t, m.admin, m.pod, ds, "DaemonSet")
		m.wantNot(`"DaemonSet web", which has no number of replicas`, broker.Refused)
	})
	t.Run("autoscalers", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		m.autoscaler("hpa", "Deployment", "web", nil)
		m.autoscaler("of-another", "Deployment", "other", nil)
		m.autoscaler("of-another-kind", "ReplicaSet", "web", nil)
		m.autoscalerOf("of-another-group", "example.com/v1", "Deployment", "web", nil)
		res := m.act("s1", "replicas: 2")
		if res.Found["autoscalers"] != "hpa" || !strings.Contains(res.Reason, "hpa targets it and will set another number") {
			t.Errorf("%+v", res)
		}
		if res = m.act("s2", ""); !strings.Contains(res.Reason, "hpa targets it and leaves it alone as long as it has 0") {
			t.Errorf("%+v", res)
		}
		m.setReplicas(5)
		m.autoscaler("from-zero", "Deployment", "web", new(int32(0)))
		if res = m.act("s3", ""); res.Found["autoscalers"] != "from-zero, hpa" || !strings.Contains(res.Reason, "will set another number") {
			t.Errorf("%+v", res)
		}
	})
	t.Run("autoscalers that can't be read", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		m.server.Forbid(t, "list", "autoscaling", "horizontalpodautoscalers")
		if res := m.act("s1", ""); m.replicas() != 0 || !strings.Contains(res.Reason, "is not known") {
			t.Errorf("it has %d: %+v", m.replicas(), res)
		}
	})
	// An operator's object has no scale, so the Deployment it owns is scaled; that
	// it may not be read changes nothing.
	t.Run("an operator above", func(t *testing.T) {
		for _, forbidden := range []bool{false, true} {
			m := newMember(t, "scale-workload")
			d, _ := m.deployment(5)
			c, err := m.admin.CoreV1().ConfigMaps("shop").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "operator"}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			d.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(c, corev1.SchemeGroupVersion.WithKind("ConfigMap"))}
			if _, err := m.admin.AppsV1().Deployments("shop").Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			if forbidden {
				m.server.Forbid(t, "get", "", "configmaps")
			}
			res := m.act("s1", "")
			if m.replicas() != 0 || res.Found["controller"] != `"ConfigMap operator"` || !strings.Contains(res.Reason, "may set the number back") {
				t.Errorf("forbidden %t: it has %d: %+v", forbidden, m.replicas(), res)
			}
		}
	})
	t.Run("a second try knows how many there were", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		d, _ := m.deployment(5)
		r := m.request("s1", "")
		var intended json.RawMessage
		responders.OnIntend(r, func(undo json.RawMessage) { intended = undo })
		if _, err := m.Act(t.Context(), r); err != nil || intended == nil {
			t.Fatalf("intended %s, error %v", intended, err)
		}
		for record, known := range map[string]bool{
			string(intended): true,
			strings.Replace(string(intended), string(d.UID), "another", 1): false,
			strings.Replace(string(intended), `"to":0`, `"to":1`, 1):       false,
		} {
			r := m.request("s1", "")
			r.Resumed, r.Intended = true, json.RawMessage(record)
			if res, err := m.Act(t.Context(), r); err != nil || res.Nothing == known || known && string(res.Undo) != record {
				t.Errorf("with %s: %+v, %v", record, res, err)
			}
		}
	})
	t.Run("something above that is no workload", func(t *testing.T) {
		for _, ref := range []metav1.OwnerReference{
			{APIVersion: "example.com/v1", Kind: "Shop", Name: "web", UID: "1", Controller: new(true)}, // not served
			{APIVersion: "v1", Kind: "Node", Name: testNode, UID: "1", Controller: new(true)},          // in no namespace
		} {
			m := newMember(t, "scale-workload")
			m.deployment(5)
			m.changeDeployment(func(d *appsv1.Deployment) { d.OwnerReferences = []metav1.OwnerReference{ref} })
			res := m.act("s1", "")
			if m.replicas() != 0 || !strings.Contains(res.Found["controller"], ref.Kind) {
				t.Errorf("%s: it has %d: %+v", ref.Kind, m.replicas(), res)
			}
		}
	})
	t.Run("changed in between", func(t *testing.T) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		m.before = func(*http.Request) { m.setReplicas(7) }
		_, err := m.Act(t.Context(), m.request("s1", ""))
		if status, retry, _, reason := responders.Classify(err); status != broker.Failed || !retry || m.replicas() != 7 {
			t.Errorf("status %s, retry %t (%s), it has %d", status, retry, reason, m.replicas())
		}
	})
}

func TestScaleWorkloadUndo(t *testing.T) {
	begin := func(t *testing.T) (*member, responders.Result) {
		m := newMember(t, "scale-workload")
		m.deployment(5)
		return m, m.act("s1", "replicas: 1")
	}
	t.Run("set back, once", func(t *testing.T) {
		m, res := begin(t)
		if u := m.undo("s1", res); u.Nothing || m.replicas() != 5 {
			t.Errorf("it has %d: %+v", m.replicas(), u)
		}
		if u := m.undo("s1", res); !u.Nothing || m.replicas() != 5 || !strings.Contains(u.Reason, "already") {
			t.Errorf("again: it has %d: %+v", m.replicas(), u)
		}
	})
	t.Run("somebody else's number is left", func(t *testing.T) {
		m, res := begin(t)
		m.setReplicas(3)
		if u := m.undo("s1", res); !u.Nothing || m.replicas() != 3 || !strings.Contains(u.Reason, "it is left") {
			t.Errorf("it has %d: %+v", m.replicas(), u)
		}
	})
	t.Run("another deployment of the name", func(t *testing.T) {
		m, res := begin(t)
		deployments := m.admin.AppsV1().Deployments("shop")
		if err := deployments.Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := deployments.Create(t.Context(), &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.DeploymentSpec{Replicas: new(int32(1))}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := m.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: res.Undo})
		if status, _, _, reason := responders.Classify(err); status != broker.Nothing || m.replicas() != 1 {
			t.Errorf("status %s (%s), it has %d", status, reason, m.replicas())
		}
	})
	t.Run("changed in between, but not its number", func(t *testing.T) {
		m, res := begin(t)
		m.before = func(*http.Request) {
			m.before = nil
			d, err := m.admin.AppsV1().Deployments("shop").Get(t.Context(), "web", metav1.GetOptions{})
			if err != nil {
				t.Error(err)
			}
			d.Labels = map[string]string{"a": "b"}
			if _, err := m.admin.AppsV1().Deployments("shop").Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
				t.Error(err)
			}
		}
		if u := m.undo("s1", res); u.Nothing || m.replicas() != 5 {
			t.Errorf("it has %d: %+v", m.replicas(), u)
		}
	})
	t.Run("a record that can't be read", func(t *testing.T) {
		m, _ := begin(t)
		for _, record := range []string{`{}`, `[]`, ``, `{"name":"web"}`} {
			_, err := m.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: json.RawMessage(record)})
			if status, _, _, _ := responders.Classify(err); status != broker.Refused {
				t.Errorf("%s: status %s", record, status)
			}
		}
	})
}

func TestScaleWorkloadParams(t *testing.T) {
	entry := entryOf(t, "scale-workload")
	for params, want := range map[string]string{
		"replicas: -1":                               "0",
		"resources: [rollouts]":                      "NAME.GROUP",
		"resources: [Rollouts.argoproj.io]":          "NAME.GROUP",
		"resources: [../x.argoproj.io]":              "NAME.GROUP",
		"resources: [rollouts.argoproj.io]":          "",
		"{replicas: 2, ttl: 1h, resources: [a.b.c]}": "",
	} {
		if got := problems(t, entry, params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(got[0], want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
	plain, more := entry.PermissionsFor(nil), entry.PermissionsFor(json.RawMessage(`{"resources":["rollouts.argoproj.io"]}`))
	if !reflect.DeepEqual(plain, entry.RBAC) {
		t.Errorf("without parameters: %v", plain)
	}
	if len(more) != len(plain)+2 || more[len(plain)].Resources[0] != "rollouts" || more[len(plain)+1].Resources[0] != "rollouts/scale" ||
		!reflect.DeepEqual(more[len(plain)+1].Verbs, []string{"get", "update"}) || more[len(plain)].APIGroups[0] != "argoproj.io" {
		t.Errorf("with a resource: %v", more)
	}
}
