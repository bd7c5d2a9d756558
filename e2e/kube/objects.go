package kube

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"stoop/e2e/harness"
)

// Name is a name of Kubernetes' kind that begins with prefix and that no other
// call returns.
func Name(prefix string) string { return prefix + "-" + strings.ToLower(rand.Text()[:8]) }

// Namespace makes a namespace, with the default service account that the
// controller manager would give it and without which no pod gets in.
func (c *Cluster) Namespace(t harness.T, name string) string {
	t.Helper()
	_, err := c.Client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("make the namespace %s: %v", name, err)
	}
	_, err = c.Client.CoreV1().ServiceAccounts(name).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("make the default service account of %s: %v", name, err)
	}
	return name
}

// Node makes a Node object of a name that no other test has.
func (c *Cluster) Node(t harness.T) string {
	t.Helper()
	name := Name("node")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
	if _, err := c.Client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatalf("make the node %s: %v", name, err)
	}
	return name
}

// Pod makes a pod that counts as running: on its node, with one container that
// has an id. change, if not nil, changes it before it is made.
func (c *Cluster) Pod(t harness.T, namespace, name, node string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	pod, err := c.pod(t, namespace, name, node, change)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return pod
}

// Pods makes n pods at once, named prefix-0 and so on.
func (c *Cluster) Pods(t harness.T, namespace, prefix, node string, n int) []*corev1.Pod {
	t.Helper()
	pods, errs := make([]*corev1.Pod, n), make([]error, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i := range n {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			pods[i], errs[i] = c.pod(t, namespace, fmt.Sprintf("%s-%d", prefix, i), node, nil)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatalf("%v", err)
		}
	}
	return pods
}

func (c *Cluster) pod(t harness.T, namespace, name, node string, change func(*corev1.Pod)) (*corev1.Pod, error) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{"app": "e2e"}},
		Spec: corev1.PodSpec{
			NodeName:   node,
			Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/e2e:1"}},
		},
	}
	if change != nil {
		change(pod)
	}
	pods := c.Client.CoreV1().Pods(namespace)
	made, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("make the pod %s/%s: %w", namespace, name, err)
	}
	now := metav1.Now()
	made.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, StartTime: &now, HostIP: "127.0.0.1",
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: "main", Image: made.Spec.Containers[0].Image, Ready: true,
			ContainerID: "containerd://" + containerID(),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		}},
	}
	if made, err = pods.UpdateStatus(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		return nil, fmt.Errorf("set the status of the pod %s/%s: %w", namespace, name, err)
	}
	return made, nil
}

func containerID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// ContainerID is the id of the pod's container, all 64 characters of it.
func ContainerID(pod *corev1.Pod) string {
	_, id, _ := strings.Cut(pod.Status.ContainerStatuses[0].ContainerID, "://")
	return id
}

// Deployment makes a Deployment with its ReplicaSet and replicas pods of it on
// the node, each owned by the next, as the controllers would.
func (c *Cluster) Deployment(t harness.T, namespace, name, node string, replicas int) []*corev1.Pod {
	t.Helper()
	n := int32(replicas)
	labels := map[string]string{"app": name}
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: labels},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/e2e:1"}}},
	}
	selector := &metav1.LabelSelector{MatchLabels: labels}
	d, err := c.Client.AppsV1().Deployments(namespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       appsv1.DeploymentSpec{Replicas: &n, Selector: selector, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("make the deployment %s/%s: %v", namespace, name, err)
	}
	rs, err := c.Client.AppsV1().ReplicaSets(namespace).Create(t.Context(), &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Name:            Name(name),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: &n, Selector: selector, Template: template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("make the replica set of %s/%s: %v", namespace, name, err)
	}
	var pods []*corev1.Pod
	for range replicas {
		pods = append(pods, c.Pod(t, namespace, Name(rs.Name), node, func(p *corev1.Pod) {
			p.Labels = labels
			p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(rs, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
		}))
	}
	return pods
}

// Get is the pod of that name as it is now, or nil.
func (c *Cluster) Get(t harness.T, namespace, name string) *corev1.Pod {
	t.Helper()
	pod, err := c.Client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatalf("get the pod %s/%s: %v", namespace, name, err)
	}
	return pod
}

// Alive reports whether the very pod with this UID is there and not being
// deleted.
func (c *Cluster) Alive(t harness.T, pod *corev1.Pod) bool {
	t.Helper()
	now := c.Get(t, pod.Namespace, pod.Name)
	return now != nil && now.UID == pod.UID && now.DeletionTimestamp == nil
}

// WaitGone waits until the very pod with this UID is gone.
func (c *Cluster) WaitGone(t harness.T, pod *corev1.Pod, within time.Duration) {
	t.Helper()
	harness.Eventually(t, within, 5*time.Millisecond, func() (bool, string) {
		now := c.Get(t, pod.Namespace, pod.Name)
		return now == nil || now.UID != pod.UID, "the end of the pod " + pod.Namespace + "/" + pod.Name
	})
}

// Remove deletes a pod at once, as the administrator.
func (c *Cluster) Remove(t harness.T, pod *corev1.Pod) {
	t.Helper()
	if err := c.Client.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, deleteNow(pod.UID)); err != nil && !apierrors.IsNotFound(err) {
		t.Fatalf("delete the pod %s/%s: %v", pod.Namespace, pod.Name, err)
	}
}

// ShortID is the 12 characters of a container's id that Falco writes.
func ShortID(pod *corev1.Pod) string { return ContainerID(pod)[:12] }

// NoUID is a UID that no pod has.
const NoUID = types.UID("00000000-0000-0000-0000-000000000000")
