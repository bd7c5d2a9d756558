package conformance

import (
	"reflect"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Workloads are the cases of the responders that act on a pod's place in its
// workload.
func Workloads() []Case {
	template := func(t testing.TB, w World, pod *corev1.Pod) map[string]string {
		d, err := w.Admin().AppsV1().Deployments(pod.Namespace).Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return d.Spec.Template.Annotations
	}
	return []Case{
		{
			Responder: "evict-pod",
			Params:    func(testing.TB) (string, func() int) { return `{"force":true}`, nil }, // nothing owns the pod
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := PodNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
		{
			// With nothing said in the rule: another pod is healthy.
			Name: "delete-pod of a workload", Responder: "delete-pod",
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				_, rs := MakeDeployment(t, w.Admin(), pod.Namespace, "web", 2)
				Control(t, w.Admin(), pod, rs, "ReplicaSet")
				other, err := w.Admin().CoreV1().Pods(pod.Namespace).Create(t.Context(), &corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Name: "web-other"},
					Spec:       corev1.PodSpec{NodeName: pod.Spec.NodeName, Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}}},
				}, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				other = Control(t, w.Admin(), other, rs, "ReplicaSet")
				other.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
				if _, err := w.Admin().CoreV1().Pods(pod.Namespace).UpdateStatus(t.Context(), other, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				return nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := PodNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
				if other, err := w.Admin().CoreV1().Pods(pod.Namespace).Get(t.Context(), "web-other", metav1.GetOptions{}); err != nil || other.DeletionTimestamp != nil {
					t.Errorf("the other pod: %+v, %v", other, err)
				}
			},
		},
		{
			Responder: "quarantine-pod",
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				_, rs := MakeDeployment(t, w.Admin(), pod.Namespace, "web", 3)
				Control(t, w.Admin(), pod, rs, "ReplicaSet")
				MakeService(t, w.Admin(), pod.Namespace, "web", map[string]string{"app": "web"})
				return nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				want := map[string]string{"stoop.dev/isolated": string(pod.UID)}
				if now := PodNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, want) {
					t.Fatalf("the pod is gone or its labels are not %v: %+v", want, now)
				}
				if _, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).Get(t.Context(), "stoop-isolate-"+string(pod.UID), metav1.GetOptions{}); err != nil {
					t.Error(err)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := PodNow(t, w, pod); now == nil || !reflect.DeepEqual(now.Labels, pod.Labels) {
					t.Errorf("the pod is gone or its labels are not what they were: %+v", now)
				}
				list, err := w.Admin().NetworkingV1().NetworkPolicies(pod.Namespace).List(t.Context(), metav1.ListOptions{})
				if err != nil || len(list.Items) != 0 {
					t.Errorf("policies are left: %v, error %v", list.Items, err)
				}
			},
		},
		{
			Responder: "scale-workload",
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				_, rs := MakeDeployment(t, w.Admin(), pod.Namespace, "web", 3)
				Control(t, w.Admin(), pod, rs, "ReplicaSet")
				return nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if n := Replicas(t, w.Admin(), pod.Namespace, "web"); n != 0 {
					t.Errorf("the deployment has %d replicas", n)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if n := Replicas(t, w.Admin(), pod.Namespace, "web"); n != 3 {
					t.Errorf("the deployment has %d replicas", n)
				}
			},
		},
		{
			Responder: "restart-workload",
			Prepare: func(t testing.TB, w World, pod *corev1.Pod) map[string]any {
				_, rs := MakeDeployment(t, w.Admin(), pod.Namespace, "web", 3)
				Control(t, w.Admin(), pod, rs, "ReplicaSet")
				return nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if a := template(t, w, pod); a["kubectl.kubernetes.io/restartedAt"] == "" || len(a) != 1 {
					t.Errorf("the pod template's annotations are %v", a)
				}
			},
		},
	}
}

// MakeDeployment makes a Deployment and its ReplicaSet, as the controllers would.
func MakeDeployment(t testing.TB, admin kubernetes.Interface, namespace, name string, replicas int32) (*appsv1.Deployment, *appsv1.ReplicaSet) {
	t.Helper()
	set := map[string]string{"app": name}
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: set},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}}},
	}
	d, err := admin.AppsV1().Deployments(namespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: set}, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hashed := map[string]string{"app": name, "pod-template-hash": "7d4"}
	template.Labels = hashed
	rs, err := admin.AppsV1().ReplicaSets(namespace).Create(t.Context(), &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Name:            name + "-7d4",
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: hashed}, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return d, rs
}

// Control makes the pod one of a controller of the group apps, with its labels, and
// returns it as it is then.
func Control(t testing.TB, admin kubernetes.Interface, pod *corev1.Pod, owner metav1.Object, kind string) *corev1.Pod {
	t.Helper()
	pod = pod.DeepCopy()
	pod.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, appsv1.SchemeGroupVersion.WithKind(kind))}
	if rs, ok := owner.(*appsv1.ReplicaSet); ok {
		pod.Labels = rs.Spec.Selector.MatchLabels
	}
	pod, err := admin.CoreV1().Pods(pod.Namespace).Update(t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func MakeService(t testing.TB, admin kubernetes.Interface, namespace, name string, selector map[string]string) {
	t.Helper()
	_, err := admin.CoreV1().Services(namespace).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Selector: selector, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// PodNow is the very pod as the API server has it; nil when it is gone.
func PodNow(t testing.TB, w World, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	now, err := w.Admin().CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && now.UID != pod.UID {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// Replicas is how many a Deployment is to have.
func Replicas(t testing.TB, admin kubernetes.Interface, namespace, name string) int32 {
	t.Helper()
	d, err := admin.AppsV1().Deployments(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return *d.Spec.Replicas
}
