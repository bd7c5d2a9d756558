package responders

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The limit of an owner counts what acts on a workload by that, since a restart gives
// its pods another controller, and all else by the pod's controller.
func TestOwnersLimitCountsByTheWorkload(t *testing.T) {
	of := func(controller types.UID) *Request {
		return &Request{Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			OwnerReferences: []metav1.OwnerReference{{UID: controller, Controller: new(true)}},
		}}}
	}
	restarter := restartWorkload().New(Env{}).(*workloadRestarter)
	restarter.known.put("replicaset-1", "deployment")
	restarter.known.put("replicaset-2", "deployment")
	for _, c := range []struct {
		r    *running
		want [2]string
	}{
		{&running{Entry: restartWorkload(), act: restarter}, [2]string{"workload/deployment", "workload/deployment"}},
		{&running{Entry: deletePod(), act: deletePod().New(Env{})}, [2]string{"replicaset-1", "replicaset-2"}},
	} {
		if got := [2]string{owner(c.r, of("replicaset-1")), owner(c.r, of("replicaset-2"))}; got != c.want {
			t.Errorf("%s: owners %q, want %q", c.r.Name, got, c.want)
		}
	}
}
