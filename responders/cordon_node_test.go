package responders_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

func TestCordonNode(t *testing.T) {
	f := newFleet(t, "a", "b")
	s := f.stoop("a", nil)
	s.edit(func(n *corev1.Node) {
		n.Labels, n.Annotations = map[string]string{"zone": "x"}, map[string]string{"team": "y"}
		n.Spec.Taints = []corev1.Taint{{Key: "gpu", Effect: corev1.TaintEffectNoSchedule}}
	})
	res := s.must("cordon-node", "s1", "ttl: 10m")
	now := s.now()
	if !now.Spec.Unschedulable || now.Labels["zone"] != "x" || now.Annotations["team"] != "y" || len(now.Spec.Taints) != 1 || res.TTL != 10*time.Minute {
		t.Errorf("the node is %+v, result %+v", now, res)
	}
	// Another step has nothing to do, and nothing to take back.
	if second := s.must("cordon-node", "s2", "ttl: 1h"); !second.Nothing || second.Undo != nil || second.TTL != 0 || !strings.Contains(second.Reason, "by step s1") {
		t.Errorf("the second step came to %+v", second)
	}
	s.undo("cordon-node", "s1", res)
	if now := s.now(); now.Spec.Unschedulable || len(now.Annotations) != 1 || len(now.Labels) != 1 || len(now.Spec.Taints) != 1 {
		t.Errorf("after undo: %+v", now)
	}
}

// What a person did is never taken back.
func TestCordonNodeLeavesWhatAPersonDid(t *testing.T) {
	f := newFleet(t, "a", "b")
	s := f.stoop("a", nil)
	t.Run("cordoned before", func(t *testing.T) {
		s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = true })
		if res := s.must("cordon-node", "s1", ""); !res.Nothing || res.Undo != nil || len(s.now().Annotations) > 0 || !strings.Contains(res.Reason, "not by stoop") {
			t.Errorf("result %+v", res)
		}
		s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false })
	})
	t.Run("cordoned in the very moment", func(t *testing.T) {
		once := false
		s := f.stoop("a", func(r *http.Request) {
			if r.Method == http.MethodPatch && !once {
				once = true
				s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = true })
			}
		})
		if res := s.must("cordon-node", "s1", ""); !res.Nothing || res.Undo != nil || len(s.now().Annotations) > 0 || !once {
			t.Errorf("result %+v", res)
		}
		s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false })
	})
	t.Run("uncordoned since", func(t *testing.T) {
		res := s.must("cordon-node", "s2", "")
		s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false })
		if u := s.undo("cordon-node", "s2", res); !u.Nothing || len(s.now().Annotations) > 0 {
			t.Errorf("undo: %+v", u)
		}
	})
	t.Run("uncordoned before a further try of the step", func(t *testing.T) {
		s.must("cordon-node", "s4", "")
		s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false })
		_, err := s.act(t.Context(), "cordon-node", "s4", "")
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || s.now().Spec.Unschedulable || len(s.now().Annotations) > 0 {
			t.Errorf("status %s (%s), the node is %+v", status, reason, s.now())
		}
	})
	t.Run("uncordoned and cordoned since, with the note taken off", func(t *testing.T) {
		res := s.must("cordon-node", "s3", "")
		s.edit(func(n *corev1.Node) { n.Annotations = nil })
		if u := s.undo("cordon-node", "s3", res); !u.Nothing || !s.now().Spec.Unschedulable {
			t.Errorf("undo: %+v", u)
		}
	})
}

// Others change the node all the time.
func TestCordonNodeWhileOthersChangeIt(t *testing.T) {
	f := newFleet(t, "a")
	changes := 0
	var s *nodeStoop
	s = f.stoop("a", func(r *http.Request) {
		if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/nodes/a") && changes < 4 {
			changes++
			s.edit(func(n *corev1.Node) { metav1.SetMetaDataLabel(&n.ObjectMeta, "other", strings.Repeat("x", changes)) })
		}
	})
	s.must("cordon-node", "s1", "")
	if now := s.now(); !now.Spec.Unschedulable || now.Labels["other"] != "xxxx" {
		t.Errorf("the node is %+v", now)
	}
}

// A node that two steps keep cordoned is uncordoned by the later undo.
func TestUncordonOfTwoSteps(t *testing.T) {
	for _, order := range [][]string{{"cordon-node", "drain-node"}, {"drain-node", "cordon-node"}} {
		f := newFleet(t, "a")
		f.kubelet("a")
		f.pod("a", "web-0", ofReplicaSet)
		s := f.stoop("a", nil)
		done := map[string]responders.Result{"cordon-node": s.must("cordon-node", "cordon-node", ""), "drain-node": s.must("drain-node", "drain-node", "")}
		if u := s.undo(order[0], order[0], done[order[0]]); !s.now().Spec.Unschedulable || !strings.Contains(u.Reason, "stays cordoned") || !strings.Contains(u.Reason, order[1]) {
			t.Errorf("undo of %s first: %+v", order[0], u)
		}
		if u := s.undo(order[1], order[1], done[order[1]]); s.now().Spec.Unschedulable || u.Nothing || len(s.now().Annotations) > 0 {
			t.Errorf("undo of %s then: %+v", order[1], u)
		}
	}
}

func TestUncordonOfAnotherNodeOfTheName(t *testing.T) {
	f := newFleet(t, "a")
	s := f.stoop("a", nil)
	res := s.must("cordon-node", "s1", "")
	next := s.now()
	if err := f.admin.CoreV1().Nodes().Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	next.ResourceVersion = ""
	if _, err := f.admin.CoreV1().Nodes().Create(t.Context(), next, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := s.responder("cordon-node").(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: res.Undo})
	if !errors.Is(err, responders.ErrGone) || !s.now().Spec.Unschedulable {
		t.Errorf("error %v", err)
	}
}
