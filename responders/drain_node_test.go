package responders_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// budget has a PodDisruptionBudget of the pods labelled app=web allow so many
// disruptions.
func (f *fleet) budget(allowed int32) {
	f.t.Helper()
	budgets := f.admin.PolicyV1().PodDisruptionBudgets("shop")
	b, err := budgets.Get(f.t.Context(), "tight", metav1.GetOptions{})
	if err != nil {
		b, err = budgets.Create(f.t.Context(), &policyv1.PodDisruptionBudget{
			ObjectMeta: metav1.ObjectMeta{Name: "tight"},
			Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		f.t.Fatal(err)
	}
	b.Status = policyv1.PodDisruptionBudgetStatus{DisruptionsAllowed: allowed, DesiredHealthy: 1, CurrentHealthy: 1 + allowed}
	if _, err := budgets.UpdateStatus(f.t.Context(), b, metav1.UpdateOptions{}); err != nil {
		f.t.Fatal(err)
	}
}

// pod makes one that runs on a node.
func (f *fleet) pod(node, name string, edit func(*corev1.Pod)) *corev1.Pod {
	f.t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: node},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if edit != nil {
		edit(p)
	}
	p, err := f.admin.CoreV1().Pods(p.Namespace).Create(f.t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

// ends are the pods that are being deleted, or are gone, of those named.
func (f *fleet) ends(names ...string) []string {
	f.t.Helper()
	var out []string
	for _, name := range names {
		namespace, pod, ok := strings.Cut(name, "/")
		if !ok {
			namespace, pod = "shop", name
		}
		p, err := f.admin.CoreV1().Pods(namespace).Get(f.t.Context(), pod, metav1.GetOptions{})
		if err != nil || p.DeletionTimestamp != nil {
			out = append(out, name)
		}
	}
	return out
}

// kubelet ends the pods of a node that are being deleted, as long as the test
// lasts.
func (f *fleet) kubelet(node string) {
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(f.t.Context())
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			list, err := f.admin.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
			for i := 0; err == nil && i < len(list.Items); i++ {
				if p := &list.Items[i]; p.DeletionTimestamp != nil {
					_ = f.admin.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	f.t.Cleanup(func() { cancel(); <-done })
}

func ownedBy(apiVersion, kind string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: "x", UID: "x", Controller: new(true)}}
	}
}

var ofReplicaSet = ownedBy("apps/v1", "ReplicaSet")

func TestDrainNode(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.kubelet("a")
	f.pod("a", "web-0", ofReplicaSet)
	f.pod("a", "web-1", ownedBy("apps/v1", "StatefulSet"))
	f.pod("a", "agent", ownedBy("apps/v1", "DaemonSet"))
	f.pod("a", "not-so-daemon", ownedBy("example.com/v1", "DaemonSet"))
	f.pod("a", "finished", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
	f.pod("a", "failed", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	f.pod("a", "static-a", func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} })
	f.pod("a", "dns", func(p *corev1.Pod) { p.Namespace = "kube-system"; ofReplicaSet(p) })
	f.pod("a", "storage", func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical"; ofReplicaSet(p) })
	f.pod("a", "stoop-x", func(p *corev1.Pod) { p.Namespace = "stoop"; ofReplicaSet(p) })
	f.pod("b", "web-2", ofReplicaSet)
	s := f.stoop("a", nil)
	res := s.must("drain-node", "s1", "ttl: 1h")
	spared := []string{"agent", "finished", "failed", "static-a", "kube-system/dns", "storage", "stoop/stoop-x", "web-2"}
	if got := f.ends(spared...); len(got) > 0 {
		t.Errorf("these were to be left alone: %v", got)
	}
	if got := f.ends("web-0", "web-1", "not-so-daemon"); len(got) != 3 {
		t.Errorf("evicted were only %v", got)
	}
	const want = "node a cordoned; pods evicted: 3; left alone: 2 finished, 1 of DaemonSets, 3 protected, 1 static"
	if res.Reason != want || res.Found["evicted"] != "3" || res.Found["pods"] != "shop/not-so-daemon, shop/web-0, shop/web-1" || res.TTL != time.Hour || !s.now().Spec.Unschedulable {
		t.Errorf("result %+v, want %q", res, want)
	}
	if h := holder(f.lease()); h != "" {
		t.Errorf("%q holds the lease", h)
	}
	// Once more, by another step: there is nothing to do.
	if again := s.must("drain-node", "s2", ""); !again.Nothing || again.Undo != nil {
		t.Errorf("once more: %+v", again)
	}
	u := s.undo("drain-node", "s1", res)
	if now := s.now(); now.Spec.Unschedulable || len(now.Annotations) > 0 || !strings.Contains(u.Reason, "don't come back") {
		t.Errorf("undo: %+v, the node is %+v", u, now)
	}
}

// What the parameters don't allow holds back all of it: nothing is touched.
func TestDrainNodeThatWouldLoseSomething(t *testing.T) {
	t.Parallel()
	emptyDir := func(p *corev1.Pod) {
		ofReplicaSet(p)
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	}
	for _, tc := range []struct {
		name, refused, allowed string
		edit                   func(*corev1.Pod)
		params, also           string
	}{
		{"without a controller", "", "force: true", nil, "deleteEmptyDirData: true", "shop/web-0 has no controller"},
		{"an owner that is no controller", "", "force: true", func(p *corev1.Pod) { ofReplicaSet(p); p.OwnerReferences[0].Controller = nil }, "", "shop/web-0 has no controller"},
		{"emptyDir", "", "deleteEmptyDirData: true", emptyDir, "force: true", "shop/web-0 has an emptyDir volume"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, "a")
			f.kubelet("a")
			f.pod("a", "web-0", tc.edit)
			f.pod("a", "web-1", ofReplicaSet)
			s := f.stoop("a", nil)
			for _, params := range []string{"", tc.params} {
				_, err := s.act(t.Context(), "drain-node", "s1", "{"+params+"}")
				if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, tc.also) {
					t.Errorf("%q: status %s (%s)", params, status, reason)
				}
				if now := s.now(); now.Spec.Unschedulable || len(now.Annotations) > 0 || len(f.ends("web-0", "web-1")) > 0 {
					t.Errorf("%q: something was done", params)
				}
			}
			s.must("drain-node", "s1", "{"+tc.allowed+"}")
			if got := f.ends("web-0", "web-1"); len(got) != 2 {
				t.Errorf("evicted were only %v", got)
			}
		})
	}
}

// A pod that its budget keeps is asked for until the deadline.
func TestDrainNodeWithABudget(t *testing.T) {
	t.Parallel()
	t.Run("that stays", func(t *testing.T) {
		t.Parallel()
		f := newFleet(t, "a")
		f.kubelet("a")
		f.budget(0)
		f.pod("a", "web-0", ofReplicaSet)
		f.pod("a", "other", func(p *corev1.Pod) { ofReplicaSet(p); p.Labels = nil })
		s := f.stoop("a", nil)
		res, err := s.act(t.Context(), "drain-node", "s1", "deadline: 1s")
		status, retry, _, reason := responders.Classify(err)
		if status != broker.Failed || retry || !strings.Contains(reason, "pods evicted: 1; not evicted within 1s: 1:") || !strings.Contains(reason, "shop/web-0") || !strings.Contains(reason, "tight") {
			t.Errorf("status %s, retry %t (%s)", status, retry, reason)
		}
		if got := f.ends("web-0", "other"); !slices.Equal(got, []string{"other"}) || !s.now().Spec.Unschedulable {
			t.Errorf("evicted were %v", got)
		}
		// What was done of it can be taken back.
		if s.undo("drain-node", "s1", res); s.now().Spec.Unschedulable {
			t.Error("the node is cordoned")
		}
	})
	t.Run("that allows it later", func(t *testing.T) {
		t.Parallel()
		f := newFleet(t, "a")
		f.kubelet("a")
		f.budget(0)
		f.pod("a", "web-0", ofReplicaSet)
		var asked atomic.Int64
		s := f.stoop("a", func(r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/eviction") {
				asked.Add(1)
			}
		})
		ended := make(chan error, 1)
		go func() {
			_, err := responders.NewDrain(s.env, time.Second, 10*time.Second).Act(t.Context(), s.request("drain-node", "s1", "deadline: 30s"))
			ended <- err
		}()
		until(t, "it was asked for twice", func() bool { return asked.Load() > 1 })
		f.budget(1)
		if err := <-ended; err != nil || len(f.ends("web-0")) != 1 {
			t.Errorf("error %v", err)
		}
	})
	t.Run("that allows one at a time", func(t *testing.T) {
		t.Parallel()
		f := newFleet(t, "a")
		f.kubelet("a")
		f.budget(1)
		f.pod("a", "web-0", ofReplicaSet)
		f.pod("a", "web-1", ofReplicaSet)
		s, ended := f.stoop("a", nil), make(chan error, 1)
		go func() {
			_, err := responders.NewDrain(s.env, time.Second, 10*time.Second).Act(t.Context(), s.request("drain-node", "s1", "deadline: 30s"))
			ended <- err
		}()
		until(t, "one is evicted", func() bool { return len(f.ends("web-0", "web-1")) == 1 })
		f.budget(1)
		if err := <-ended; err != nil || len(f.ends("web-0", "web-1")) != 2 {
			t.Errorf("error %v, evicted were %v", err, f.ends("web-0", "web-1"))
		}
	})
}

func TestDrainNodeWhosePodsDontEnd(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	f.pod("a", "web-0", ofReplicaSet)
	s := f.stoop("a", nil)
	if res := s.must("drain-node", "s1", "deadline: 1s"); !strings.Contains(res.Reason, "pods evicted: 1; still ending: shop/web-0") || res.Undo == nil {
		t.Errorf("result %+v", res)
	}
}

// A pod of the same name that comes in between is another one.
func TestDrainNodeSparesAnotherPodOfTheName(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.kubelet("a")
	old := f.pod("a", "web-0", ofReplicaSet)
	replaced := false
	s := f.stoop("a", func(r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/eviction") && !replaced {
			replaced = true
			if err := f.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Error(err)
			}
			f.pod("b", "web-0", ofReplicaSet)
		}
	})
	s.must("drain-node", "s1", "")
	now, err := f.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
	if err != nil || now.UID == old.UID || now.DeletionTimestamp != nil || !replaced {
		t.Errorf("the next pod of the name is %+v (%v)", now, err)
	}
}

// A permission that is missing is said at once.
func TestDrainNodeThatMayNotEvict(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	for i := range 12 {
		f.pod("a", fmt.Sprint("web-", i), ofReplicaSet)
	}
	f.s.Forbid(t, "create", "", "pods/eviction")
	began := time.Now()
	res, err := f.stoop("a", nil).act(t.Context(), "drain-node", "s1", "deadline: 1h")
	if _, retry, _, reason := responders.Classify(err); retry || !strings.Contains(reason, "the verb create on pods/eviction") || res.Undo == nil {
		t.Errorf("retry %t (%s), result %+v", retry, reason, res)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

// A request that hangs is given up long before the step's deadline is over.
func TestDrainNodeWhoseRequestsHang(t *testing.T) {
	for _, path := range []string{"GET /api/v1/nodes/a", "GET /api/v1/pods", "GET /api/v1/nodes", "GET /apis/coordination.k8s.io/v1/namespaces/default/leases/stoop-node-acts", "PUT /apis/coordination.k8s.io/v1/namespaces/default/leases/stoop-node-acts", "PATCH /api/v1/nodes/a"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, "a")
			f.kubelet("a")
			f.pod("a", "web-0", ofReplicaSet)
			var hung atomic.Bool
			s := f.stoop("a", func(r *http.Request) {
				if r.Method+" "+r.URL.Path == path && hung.CompareAndSwap(false, true) {
					<-r.Context().Done()
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			drain, req := responders.NewDrain(s.env, time.Second, 100*time.Millisecond), s.request("drain-node", "s1", "deadline: 1h")
			_, err := drain.Act(ctx, req)
			if _, retry, _, reason := responders.Classify(err); !retry || !strings.Contains(reason, "deadline exceeded") || !hung.Load() {
				t.Errorf("retry %t (%s)", retry, reason)
			}
			if _, err := responders.NewDrain(s.env, time.Second, 10*time.Second).Act(ctx, req); err != nil {
				t.Error(err)
			}
		})
	}
}

// Stoop is stopped in the middle, and goes on after its start.
func TestDrainNodeCutOff(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.kubelet("a")
	f.budget(1)
	f.pod("a", "web-0", ofReplicaSet)
	f.pod("a", "web-1", ofReplicaSet)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, ended := f.stoop("a", nil), make(chan error, 1)
	go func() {
		_, err := s.act(ctx, "drain-node", "s1", "")
		ended <- err
	}()
	until(t, "one is evicted", func() bool { return len(f.ends("web-0", "web-1")) == 1 })
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if h := holder(f.lease()); h != "" {
		t.Errorf("%q holds the lease", h)
	}
	f.budget(1)
	// A pod has come meanwhile that the parameters don't allow.
	f.pod("a", "new", nil)
	s = f.stoop("a", nil)
	res, err := s.act(t.Context(), "drain-node", "s1", "deadline: 2s")
	if _, retry, _, reason := responders.Classify(err); retry || !strings.Contains(reason, "pods evicted: 1; not evicted within 2s: 1: shop/new has no controller") {
		t.Errorf("retry %t (%s)", retry, reason)
	}
	if got := f.ends("web-0", "web-1", "new"); !slices.Equal(got, []string{"web-0", "web-1"}) {
		t.Errorf("evicted were %v", got)
	}
	if s.undo("drain-node", "s1", res); s.now().Spec.Unschedulable {
		t.Error("the node is cordoned")
	}
}

// A person who puts the node back in service, or takes the step back, ends it.
func TestDrainNodeThatIsTakenBack(t *testing.T) {
	for name, back := range map[string]func(s *nodeStoop){
		"uncordoned": func(s *nodeStoop) { s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false }) },
		"undone, of a node that was cordoned": func(s *nodeStoop) {
			s.undo("drain-node", "s1", responders.Result{Undo: fmt.Appendf(nil, `{"node":"a","uid":%q,"step":"s1"}`, s.now().UID)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, "a")
			f.kubelet("a")
			f.budget(1)
			f.pod("a", "web-0", ofReplicaSet)
			f.pod("a", "web-1", ofReplicaSet)
			s, ended := f.stoop("a", nil), make(chan error, 1)
			if name != "uncordoned" {
				s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = true })
			}
			go func() {
				_, err := responders.NewDrain(s.env, time.Second, 10*time.Second).Act(t.Context(), s.request("drain-node", "s1", "deadline: 30s"))
				ended <- err
			}()
			until(t, "one is evicted", func() bool { return len(f.ends("web-0", "web-1")) == 1 })
			back(s)
			err := <-ended
			if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "somebody has uncordoned") {
				t.Errorf("status %s (%s)", status, reason)
			}
			if got := f.ends("web-0", "web-1"); len(got) != 1 || len(s.now().Annotations) > 0 || holder(f.lease()) != "" {
				t.Errorf("evicted were %v, the node is %+v", got, s.now())
			}
		})
	}
}

// Nor does a further try, after stoop was stopped, cordon it again.
func TestDrainNodeThatWasUncordonedMeanwhile(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	f.budget(0)
	f.pod("a", "web-0", ofReplicaSet)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, ended := f.stoop("a", nil), make(chan error, 1)
	go func() {
		_, err := s.act(ctx, "drain-node", "s1", "")
		ended <- err
	}()
	until(t, "it is cordoned", func() bool { return s.now().Spec.Unschedulable })
	cancel()
	<-ended
	s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = false })
	f.budget(1)
	_, err := s.act(t.Context(), "drain-node", "s1", "")
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || s.now().Spec.Unschedulable || len(s.now().Annotations) > 0 || len(f.ends("web-0")) > 0 {
		t.Errorf("status %s (%s), the node is %+v", status, reason, s.now())
	}
}

// An eviction that was done without an answer is seen, if only at the end.
func TestDrainNodeWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	f.pod("a", "web-0", ofReplicaSet)
	s := f.stoop("a", func(r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/eviction") {
			// Done by another hand in the same moment, while this request hangs.
			if err := f.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
			<-r.Context().Done()
		}
	})
	if res := s.must("drain-node", "s1", "deadline: 1s"); !strings.Contains(res.Reason, "still ending: shop/web-0") {
		t.Errorf("result %+v", res)
	}
}

// A pause of stoop ends it, and a later try goes on with it.
func TestDrainNodeThatIsPaused(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	f.kubelet("a")
	f.budget(1)
	f.pod("a", "web-0", ofReplicaSet)
	f.pod("a", "web-1", ofReplicaSet)
	s, ended := f.stoop("a", nil), make(chan error, 1)
	var paused atomic.Bool
	req := s.request("drain-node", "s1", "deadline: 30s")
	req.SetPaused(func() string {
		if paused.Load() {
			return "paused by somebody"
		}
		return ""
	})
	drain := responders.NewDrain(s.env, time.Second, 10*time.Second)
	go func() {
		_, err := drain.Act(t.Context(), req)
		ended <- err
	}()
	until(t, "one is evicted", func() bool { return len(f.ends("web-0", "web-1")) == 1 })
	paused.Store(true)
	if _, retry, _, reason := responders.Classify(<-ended); !retry || !strings.Contains(reason, "paused by somebody") || holder(f.lease()) != "" {
		t.Errorf("retry %t (%s)", retry, reason)
	}
	if got := f.ends("web-0", "web-1"); len(got) != 1 || !s.now().Spec.Unschedulable {
		t.Errorf("evicted were %v", got)
	}
	paused.Store(false)
	f.budget(1)
	if _, err := drain.Act(t.Context(), req); err != nil || len(f.ends("web-0", "web-1")) != 2 {
		t.Errorf("error %v, evicted were %v", err, f.ends("web-0", "web-1"))
	}
}

// What a person cordoned stays cordoned when the drain is taken back, and counts as
// drained by stoop until then.
func TestDrainNodeThatWasCordoned(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.kubelet("a")
	f.pod("a", "web-0", ofReplicaSet)
	s, other := f.stoop("a", nil), f.stoop("b", nil)
	s.edit(func(n *corev1.Node) { n.Spec.Unschedulable = true })
	res := s.must("drain-node", "s1", "")
	if _, err := other.act(t.Context(), "cordon-node", "s2", ""); err == nil {
		t.Error("another node was cordoned too")
	}
	u := s.undo("drain-node", "s1", res)
	if now := s.now(); !now.Spec.Unschedulable || len(now.Annotations) > 0 || !strings.Contains(u.Reason, "stays cordoned") {
		t.Errorf("undo: %+v, the node is %+v", u, now)
	}
	other.must("cordon-node", "s2", "")
}

// Nothing is drained by who can't tell what is protected.
func TestDrainNodeWithoutGuards(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a")
	f.pod("a", "web-0", ofReplicaSet)
	s := f.stoop("a", nil)
	s.env.ProtectedPod = nil
	_, err := s.act(t.Context(), "drain-node", "s1", "deadline: 1s")
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || s.now().Spec.Unschedulable || len(f.ends("web-0")) > 0 {
		t.Errorf("status %s (%s)", status, reason)
	}
}

func TestDrainNodeWaitsForAPerson(t *testing.T) {
	for name, params := range map[string]string{"drain-node": "", "taint-node": "effect: NoExecute"} {
		e := entryOf(t, name)
		if e.Approve == nil || !e.Approve(checked(t, e, params)) {
			t.Errorf("%s {%s} needs no approval", name, params)
		}
	}
	for name, params := range map[string]string{"cordon-node": "", "taint-node": "effect: NoSchedule", "label-node": "labels: {a: b}"} {
		if e := entryOf(t, name); e.Approve != nil && e.Approve(checked(t, e, params)) {
			t.Errorf("%s {%s} needs approval", name, params)
		}
	}
}
