package kube

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// kubelet does the one thing of a node's that the tests can't go without: a pod
// that is being deleted stays in Terminating until its node says that its
// containers have ended, by a delete with grace 0. Here no container runs, so
// it says so at once, for the pods of every node.
type kubelet struct {
	client *kubernetes.Clientset
	cancel context.CancelFunc
	work   sync.WaitGroup
}

const kubeletWorkers = 4

func startKubelet(ctx context.Context, config *rest.Config) (*kubelet, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make the kubelet's client: %w", err)
	}
	k := &kubelet{client: client}
	ctx, k.cancel = context.WithCancel(ctx)
	ended := make(chan *corev1.Pod, 1024)
	for range kubeletWorkers {
		k.work.Go(func() {
			for pod := range ended {
				k.remove(ctx, pod)
			}
		})
	}
	k.work.Go(func() {
		defer close(ended)
		for ctx.Err() == nil {
			k.watch(ctx, ended)
			select { // the API server may be away, on purpose
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	return k, nil
}

// watch hands on every pod that is being deleted, until the watch ends.
func (k *kubelet) watch(ctx context.Context, ended chan<- *corev1.Pod) {
	// From resource version "" the watch begins with what there is, so that
	// no pod is missed over a gap.
	w, err := k.client.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName!="})
	if err != nil {
		return
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		pod, ok := event.Object.(*corev1.Pod)
		if !ok || event.Type == watch.Deleted || pod.DeletionTimestamp == nil {
			continue
		}
		select {
		case ended <- pod:
		case <-ctx.Done():
			return
		}
	}
}

func (k *kubelet) remove(ctx context.Context, pod *corev1.Pod) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// An error needs no answer: the pod is gone already, or the API server is
	// away and the next watch begins with this pod again.
	_ = k.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, deleteNow(pod.UID))
}

func (k *kubelet) stop() {
	k.cancel()
	k.work.Wait()
}

func deleteNow(uid types.UID) metav1.DeleteOptions {
	return metav1.DeleteOptions{
		GracePeriodSeconds: new(int64),
		Preconditions:      &metav1.Preconditions{UID: &uid},
	}
}
