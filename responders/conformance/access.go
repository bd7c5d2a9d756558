package conformance

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/responders"
)

// Access are the cases of what audit events are answered with, and of the event.
func Access() []Case {
	const name = "suspicious"
	named := func(resource string, pod *corev1.Pod) map[string]any {
		return map[string]any{
			"ka.verb": "create", "ka.response.code": "201", "ka.user.name": "mallory",
			"ka.target.resource": resource, "ka.target.name": name, "ka.target.namespace": pod.Namespace,
		}
	}
	// The API server compares what is granted: "view" grants nothing here, where no
	// controller aggregates it.
	bind := func(t testing.TB, w World, pod *corev1.Pod, subjects ...rbacv1.Subject) {
		t.Helper()
		_, err := w.Admin().RbacV1().RoleBindings(pod.Namespace).Create(t.Context(), &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"a": "b"}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"}, Subjects: subjects,
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	mallory := rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: "User", Name: "mallory"}
	account := func(pod *corev1.Pod) rbacv1.Subject {
		return rbacv1.Subject{Kind: "ServiceAccount", Namespace: pod.Namespace, Name: "default"}
	}
	binding := func(t testing.TB, w World, pod *corev1.Pod) *rbacv1.RoleBinding {
		t.Helper()
		b, err := w.Admin().RbacV1().RoleBindings(pod.Namespace).Get(t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return []Case{
		{
			Responder: "event",
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				list, err := w.Admin().CoreV1().Events(pod.Namespace).List(t.Context(), metav1.ListOptions{})
				if err != nil || len(list.Items) != 1 {
					t.Fatalf("there are %d events, error %v", len(list.Items), err)
				}
				e := list.Items[0]
				if o := e.InvolvedObject; o.Kind != "Pod" || o.UID != pod.UID || o.Name != pod.Name || o.Namespace != pod.Namespace || e.Type != "Warning" || e.Reason != "StoopAlert" {
					t.Errorf("the event is %+v", e)
				}
			},
		},
		{
			Responder: "delete-resource",
			Params: func(testing.TB) (string, func() int) {
				return `{"kinds":["configmaps","deployments.apps"]}`, nil
			},
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				if _, err := w.Admin().CoreV1().ConfigMaps(pod.Namespace).Create(t.Context(), &corev1.ConfigMap{
					ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"a": "b"},
				}, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				return named("configmaps", pod)
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if _, err := w.Admin().CoreV1().ConfigMaps(pod.Namespace).Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
					t.Errorf("the config map is still there (%v)", err)
				}
			},
		},
		{
			Responder: "revoke-access", Name: "revoke-access of the alert",
			Params: func(testing.TB) (string, func() int) { return `{"bind":["ClusterRole/cluster-admin"]}`, nil },
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				bind(t, w, pod, mallory)
				return named("rolebindings", pod)
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if b := binding(t, w, pod); b != nil {
					t.Errorf("the binding is still there: %+v", b)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if b := binding(t, w, pod); b == nil || len(b.Subjects) != 1 || b.Subjects[0] != mallory || b.RoleRef.Name != "cluster-admin" || b.Labels["a"] != "b" {
					t.Errorf("the binding is %+v", b)
				}
			},
		},
		{
			Responder: "revoke-access", Name: "revoke-access of the pod", Object: responders.PodObject,
			Params: func(testing.TB) (string, func() int) {
				return `{"from":"pod","bind":["ClusterRole/cluster-admin"]}`, nil
			},
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				bind(t, w, pod, mallory, account(pod))
				return nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if b := binding(t, w, pod); b == nil || len(b.Subjects) != 1 || b.Subjects[0] != mallory {
					t.Errorf("the binding is %+v", b)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if b := binding(t, w, pod); b == nil || len(b.Subjects) != 2 || b.Subjects[1] != account(pod) {
					t.Errorf("the binding is %+v", b)
				}
			},
		},
	}
}
