package responders_test

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

const restartedAt = "kubectl.kubernetes.io/restartedAt"

func (m *member) deploymentNow() *appsv1.Deployment {
	m.t.Helper()
	d, err := m.admin.AppsV1().Deployments("shop").Get(m.t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return d
}

func (m *member) changeDeployment(change func(*appsv1.Deployment)) {
	m.t.Helper()
	d := m.deploymentNow()
	change(d)
	if _, err := m.admin.AppsV1().Deployments("shop").Update(m.t.Context(), d, metav1.UpdateOptions{}); err != nil {
		m.t.Fatal(err)
	}
}

// changePod changes the pod as whoever may write pods could, and its time.
func (m *member) changePod(change func(*corev1.Pod)) {
	m.t.Helper()
	pod := m.now().DeepCopy()
	change(pod)
	pod, err := m.admin.CoreV1().Pods("shop").Update(m.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	m.pod = pod
}

func TestRestartWorkload(t *testing.T) {
	t.Run("the deployment and nothing else", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		conformance.MakeDeployment(t, m.admin, "shop", "other", 3)
		m.changeDeployment(func(d *appsv1.Deployment) { d.Spec.Template.Annotations = map[string]string{"a": "b"} })
		before := m.deploymentNow()
		res := m.act("s1", "")
		m.wantWrites("PATCH deployments/web ")
		d := m.deploymentNow()
		at := d.Spec.Template.Annotations[restartedAt]
		when, err := time.Parse(time.RFC3339, at)
		if err != nil || time.Since(when) > time.Minute || time.Until(when) > 0 {
			t.Errorf("restarted at %q (%v)", at, err)
		}
		if want := map[string]string{"a": "b", restartedAt: at}; !maps.Equal(d.Spec.Template.Annotations, want) {
			t.Errorf("the template's annotations are %v", d.Spec.Template.Annotations)
		}
		if d.Annotations["stoop.dev/step"] != "s1" || *d.Spec.Replicas != 3 || d.UID != before.UID {
			t.Errorf("the deployment is %+v", d)
		}
		if res.Nothing || res.Undo != nil || res.Found["workload"] != "Deployment shop/web" || res.Found["restartedAt"] != at {
			t.Errorf("%+v", res)
		}
	})
	t.Run("by their owner", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		sts, err := m.admin.AppsV1().StatefulSets("shop").Create(t.Context(), &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ds, err := m.admin.AppsV1().DaemonSets("shop").Create(t.Context(), &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = conformance.Control(t, m.admin, m.pod, sts, "StatefulSet")
		m.writes = nil
		m.act("s1", "")
		m.wantWrites("PATCH statefulsets/web ")
		m.pod = conformance.Control(t, m.admin, m.now(), ds, "DaemonSet")
		m.writes = nil
		m.act("s2", "")
		m.wantWrites("PATCH daemonsets/web ")
	})
	t.Run("a pod from before is being replaced", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.act("s1", "")
		m.writes = nil
		if res := m.act("s2", ""); !res.Nothing || !strings.Contains(res.Reason, "from before") {
			t.Errorf("%+v", res)
		}
		// And as the same step once more.
		if res := m.act("s1", ""); res.Nothing {
			t.Errorf("the step itself: %+v", res)
		}
		m.wantWrites()
	})
	t.Run("the next pod raises the alert too", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.act("s1", "")
		at := m.deploymentNow().Spec.Template.Annotations[restartedAt]
		m.changePod(func(p *corev1.Pod) { p.Annotations = map[string]string{restartedAt: at} })
		if res := m.act("s2", ""); res.Nothing || m.deploymentNow().Spec.Template.Annotations[restartedAt] == at {
			t.Errorf("%+v", res)
		}
	})
	// A pod that says it is older, and a template that says it is from tomorrow.
	t.Run("what an attacker may write", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.act("s1", "")
		at := m.deploymentNow().Spec.Template.Annotations[restartedAt]
		m.changePod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{restartedAt: "long ago"}
			p.CreationTimestamp = metav1.NewTime(time.Now().Add(2 * time.Second)) // which only the API server sets
		})
		if res := m.act("s2", ""); res.Nothing || m.deploymentNow().Spec.Template.Annotations[restartedAt] == at {
			t.Errorf("an annotation on the pod: %+v", res)
		}
		for _, value := range []string{"2999-01-01T00:00:00Z", "soon"} {
			m.changeDeployment(func(d *appsv1.Deployment) { d.Spec.Template.Annotations[restartedAt] = value })
			if res := m.act("s3-"+value, ""); res.Nothing || m.deploymentNow().Spec.Template.Annotations[restartedAt] == value {
				t.Errorf("%s: %+v", value, res)
			}
		}
	})
	t.Run("changed in between", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.before = func(*http.Request) { m.setReplicas(7) }
		_, err := m.Act(t.Context(), m.request("s1", ""))
		if status, retry, _, reason := responders.Classify(err); status != broker.Failed || !retry || m.deploymentNow().Spec.Template.Annotations != nil {
			t.Errorf("status %s, retry %t (%s)", status, retry, reason)
		}
	})
	t.Run("replaced in between", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.before = func(*http.Request) {
			d := m.deploymentNow()
			if err := m.admin.AppsV1().Deployments("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
			d.UID, d.ResourceVersion = "", ""
			if _, err := m.admin.AppsV1().Deployments("shop").Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
				t.Error(err)
			}
		}
		_, err := m.Act(t.Context(), m.request("s1", ""))
		if err == nil || m.deploymentNow().Spec.Template.Annotations != nil {
			t.Errorf("error %v, the deployment is %+v", err, m.deploymentNow())
		}
	})
	t.Run("an operator above", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.changeDeployment(func(d *appsv1.Deployment) {
			d.OwnerReferences = []metav1.OwnerReference{{APIVersion: "example.com/v1", Kind: "Shop", Name: "web", UID: "1", Controller: new(true)}}
		})
		if res := m.act("s1", ""); res.Found["controller"] != `"Shop web"` || !strings.Contains(res.Reason, "may take that back") {
			t.Errorf("%+v", res)
		}
		// One that could be read is not: it takes no permission.
		m.changeDeployment(func(d *appsv1.Deployment) {
			d.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "web", UID: "1", Controller: new(true)}}
			d.Spec.Template.Annotations = nil
		})
		if res := m.act("s2", ""); res.Found["controller"] != `"ConfigMap web"` {
			t.Errorf("%+v", res)
		}
	})
}

func TestRestartWorkloadRefuses(t *testing.T) {
	t.Run("a paused deployment", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		m.deployment(3)
		m.changeDeployment(func(d *appsv1.Deployment) { d.Spec.Paused = true })
		m.wantNot("paused", broker.Refused)
	})
	t.Run("a replica set of a kind of somebody else's", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		_, rs := m.deployment(3)
		rs.OwnerReferences = []metav1.OwnerReference{{APIVersion: "argoproj.io/v1alpha1", Kind: "Rollout", Name: "web", UID: "1", Controller: new(true)}}
		if _, err := m.admin.AppsV1().ReplicaSets("shop").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.wantNot(`"Rollout web", which`, broker.Refused)
		rs, err := m.admin.AppsV1().ReplicaSets("shop").Get(t.Context(), rs.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		rs.OwnerReferences[0].APIVersion, rs.OwnerReferences[0].Kind = "v1", "ConfigMap" // which is served, and not read
		if _, err := m.admin.AppsV1().ReplicaSets("shop").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.wantNot(`"ConfigMap web", which`, broker.Refused)
	})
	t.Run("a replica set alone", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		_, rs := m.deployment(3)
		rs.OwnerReferences = nil
		if _, err := m.admin.AppsV1().ReplicaSets("shop").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.wantNot(fmt.Sprintf(`"ReplicaSet %s", which`, rs.Name), broker.Refused)
	})
	t.Run("OnDelete", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		ds, err := m.admin.AppsV1().DaemonSets("shop").Create(t.Context(), &appsv1.DaemonSet{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec:       appsv1.DaemonSetSpec{UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = conformance.Control(t, m.admin, m.pod, ds, "DaemonSet")
		m.wantNot("OnDelete", broker.Refused)
	})
	t.Run("below the partition", func(t *testing.T) {
		m := newMember(t, "restart-workload")
		sts, err := m.admin.AppsV1().StatefulSets("shop").Create(t.Context(), &appsv1.StatefulSet{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: appsv1.StatefulSetSpec{UpdateStrategy: appsv1.StatefulSetUpdateStrategy{
				Type: appsv1.RollingUpdateStatefulSetStrategyType, RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: new(int32(1))},
			}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = conformance.Control(t, m.admin, m.pod, sts, "StatefulSet") // web-0
		m.wantNot("partition", broker.Refused)
		m.pod = conformance.Control(t, m.admin, m.newPod("web-1"), sts, "StatefulSet")
		m.writes = nil
		m.act("s1", "")
		m.wantWrites("PATCH statefulsets/web ")
	})
}
