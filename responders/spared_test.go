package responders

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// A pod of a protected priority class is left alone; where nothing but that class
// protects it, which a tenant may have chosen, people are told, once.
func TestASparedPodIsTold(t *testing.T) {
	kube, err := NewKube(&rest.Config{Host: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	s := &stub{}
	e := entry("one", Harm, s)
	e.Object = PodObject
	b := newBench(t, brokertest.New(t), e)
	b.config.Env.Kube = kube
	b.config.Pods = NewPods(kube, "n1", b.config.Log)
	var mu sync.Mutex
	var details []string
	b.config.Tell = func(title, detail string) {
		mu.Lock()
		defer mu.Unlock()
		details = append(details, title+": "+detail)
	}
	add := func(n int, namespace, class string) {
		(*podStore)(b.config.Pods).put(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("p", n), UID: types.UID(fmt.Sprint("u", n))},
			Spec:       corev1.PodSpec{NodeName: "n1", PriorityClassName: class},
			Status:     corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{ContainerID: fmt.Sprintf("containerd://%012x%052d", n, 0)}}},
		})
	}
	// The bench's n-th alert is of the container n.
	add(1, "shop", "system-node-critical")
	add(2, "shop", "system-node-critical")
	add(3, "kube-system", "system-node-critical") // its namespace protects it
	add(4, "shop", "")
	close(b.config.Pods.synced)
	b.start()
	for range 4 {
		b.publish(b.step("one"))
	}
	done := 0
	for _, o := range b.outcomes(4) {
		switch {
		case o.Target.Pod == "p4" && o.Status == broker.Done:
			done++
		case o.Target.Pod != "p4" && o.Status == broker.Suppressed:
		default:
			t.Errorf("pod %s: %s (%s)", o.Target.Pod, o.Status, o.Reason)
		}
	}
	b.stop()
	if done != 1 || s.calls() != 1 {
		t.Errorf("the pod that nothing protects: %d times done, %d calls", done, s.calls())
	}
	if len(details) != 1 || !strings.Contains(details[0], "system-node-critical") || !strings.Contains(details[0], "pod shop/p") {
		t.Errorf("people were told %q", details)
	}
}
