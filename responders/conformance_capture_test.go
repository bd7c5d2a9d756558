package responders_test

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"stoop/responders/conformance"
)

// captureCases are those of what keeps what the API server tells of a pod.
func captureCases() []conformance.Case {
	return []conformance.Case{
		{Responder: "capture-logs"},
		{Responder: "capture-manifest", Prepare: owned},
		{
			Responder: "capture-events",
			Prepare: func(t testing.TB, w conformance.World, pod *corev1.Pod) map[string]any {
				newEvent(t, w, pod, "first")
				return nil
			},
		},
	}
}

// owned gives the pod a ReplicaSet of a Deployment.
func owned(t testing.TB, w conformance.World, pod *corev1.Pod) map[string]any {
	t.Helper()
	apps := w.Admin().AppsV1()
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: pod.Spec.Containers},
	}
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	d, err := apps.Deployments(pod.Namespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.DeploymentSpec{Selector: selector, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rs, err := apps.ReplicaSets(pod.Namespace).Create(t.Context(), &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Name: "web-1", OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "apps/v1", Kind: "Deployment", Name: d.Name, UID: d.UID, Controller: new(true)},
		}},
		Spec: appsv1.ReplicaSetSpec{Selector: selector, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own(t, w, pod, metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: rs.Name, UID: rs.UID, Controller: new(true)})
	return nil
}

// own sets the pod's owners.
func own(t testing.TB, w conformance.World, pod *corev1.Pod, owners ...metav1.OwnerReference) {
	t.Helper()
	now := conformance.PodNow(t, w, pod)
	now.OwnerReferences = owners
	if _, err := w.Admin().CoreV1().Pods(pod.Namespace).Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func newEvent(t testing.TB, w conformance.World, pod *corev1.Pod, name string) {
	t.Helper()
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: name},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: types.UID(pod.UID)},
		Reason:         "Testing", Message: "of " + name, Type: corev1.EventTypeNormal,
	}
	if _, err := w.Admin().CoreV1().Events(pod.Namespace).Create(t.Context(), event, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}
