package responders_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

// ready is a pod that does its work.
func ready(pod *corev1.Pod) {
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
}

// pod makes one, ready, of a controller.
func (m *member) of(name string, owner metav1.Object, kind string, edit func(*corev1.Pod)) *corev1.Pod {
	m.t.Helper()
	pod := m.newPod(name)
	pod = conformance.Control(m.t, m.admin, pod, owner, kind)
	ready(pod)
	if edit != nil {
		edit(pod)
	}
	pod, err := m.admin.CoreV1().Pods("shop").Update(m.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return pod
}

func (m *member) try(params string) (broker.Status, string) {
	m.t.Helper()
	r := m.request("s1", params)
	r.Step.Received = time.Now()
	_, err := m.Act(m.t.Context(), r)
	status, _, _, reason := responders.Classify(err)
	return status, reason
}

// goes reports whether the pod is on its way, or gone.
func (m *member) goes(pod *corev1.Pod) bool {
	m.t.Helper()
	for _, p := range m.pods() {
		if p.UID == pod.UID {
			return p.DeletionTimestamp != nil
		}
	}
	return true
}

func (m *member) pods() []corev1.Pod {
	m.t.Helper()
	list, err := m.admin.CoreV1().Pods("shop").List(m.t.Context(), metav1.ListOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return list.Items
}

// wantSpared acts and expects that the pod stays, and why.
func (m *member) wantSpared(params string, words ...string) {
	m.t.Helper()
	m.writes = nil
	status, reason := m.try(params)
	if status != broker.Suppressed || m.goes(m.pod) {
		m.t.Errorf("%s: status %s (%s), the pod goes: %t", params, status, reason, m.goes(m.pod))
	}
	for _, w := range words {
		if !strings.Contains(reason, w) {
			m.t.Errorf("%s: the reason lacks %q: %s", params, w, reason)
		}
	}
	if slices.ContainsFunc(m.writes, func(w string) bool { return !strings.HasPrefix(w, "PATCH") }) {
		m.t.Errorf("it wrote %q", m.writes)
	}
}

func (m *member) wantGone(params string) {
	m.t.Helper()
	if status, reason := m.try(params); status != broker.Done || !m.goes(m.pod) {
		m.t.Errorf("%s: status %s (%s), the pod goes: %t", params, status, reason, m.goes(m.pod))
	}
}

// Which pods of a Deployment may go, by how many others are healthy.
func TestMaxUnavailable(t *testing.T) {
	for _, c := range []struct {
		params   string
		replicas int32
		others   int // healthy, besides the suspect
		goes     bool
		says     string
	}{
		{"", 1, 0, false, "last healthy pod of Deployment shop/web"},
		{"", 2, 1, true, ""},
		{"", 4, 1, true, ""},
		{"", 4, 0, false, "last healthy pod"},
		{"", 0, 0, true, ""}, // scaled to nothing
		{"maxUnavailable: 1", 4, 3, true, ""},
		{"maxUnavailable: 1", 4, 2, false, "2 of the 4 replicas"},
		{"maxUnavailable: 2", 4, 2, true, ""},
		{"maxUnavailable: 1", 2, 1, true, ""},
		{"maxUnavailable: 1", 1, 0, false, "last healthy"}, // a number does not say that
		{"maxUnavailable: 9", 4, 1, true, ""},
		{"maxUnavailable: 9", 4, 0, false, "last healthy"},
		{"maxUnavailable: 0", 4, 3, false, "which is 0"},
		{"maxUnavailable: 0", 4, 4, true, ""}, // one too many, in a rollout
		{"maxUnavailable: 0", 0, 0, true, ""},
		// Percentages are rounded down.
		{"maxUnavailable: 25%", 4, 3, true, ""},
		{"maxUnavailable: 25%", 4, 2, false, "which is 1"},
		{"maxUnavailable: 25%", 3, 2, false, "which is 0"},
		{"maxUnavailable: 33%", 3, 2, false, "which is 0"},
		{"maxUnavailable: 34%", 3, 2, true, ""},
		{"maxUnavailable: 50%", 3, 2, true, ""},
		{"maxUnavailable: 50%", 3, 1, false, "which is 1"},
		{"maxUnavailable: 67%", 3, 1, true, ""},
		{"maxUnavailable: 99%", 1, 0, false, "which is 0"},
		{"maxUnavailable: 99%", 100, 0, false, "last healthy"},
		{"maxUnavailable: 100%", 1, 0, true, ""},
		{"force: true", 1, 0, true, ""},
	} {
		for _, responder := range []string{"delete-pod", "evict-pod"} {
			t.Run(fmt.Sprintf("%s %s of %d with %d others", responder, c.params, c.replicas, c.others), func(t *testing.T) {
				t.Parallel()
				m := newMember(t, responder)
				_, rs := m.deployment(c.replicas)
				for i := range c.others {
					m.of(fmt.Sprintf("web-other-%d", i), rs, "ReplicaSet", nil)
				}
				if c.goes {
					m.wantGone(c.params)
				} else {
					m.wantSpared(c.params, c.says)
				}
			})
		}
	}
}

// What a pod has to be to count.
func TestHealthyPods(t *testing.T) {
	mark := func(at time.Time) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Annotations = map[string]string{"stoop.dev/leaving": at.UTC().Format(time.RFC3339)}
		}
	}
	for name, c := range map[string]struct {
		edit    func(*corev1.Pod)
		healthy bool
	}{
		"ready":                   {nil, true},
		"not ready":               {func(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }, false},
		"nothing is known":        {func(p *corev1.Pod) { p.Status.Conditions = nil }, false},
		"isolated":                {func(p *corev1.Pod) { p.Labels["stoop.dev/isolated"] = string(p.UID) }, false},
		"isolated by cilium":      {func(p *corev1.Pod) { p.Labels["stoop.dev/isolated-cilium"] = string(p.UID) }, false},
		"another's label":         {func(p *corev1.Pod) { p.Labels["stoop.dev/isolated"] = "x" }, true},
		"leaving":                 {mark(time.Now()), false},
		"not left":                {mark(time.Now().Add(-2 * time.Minute)), true},
		"nobody owns it":          {func(p *corev1.Pod) { p.OwnerReferences = nil }, false},
		"another's":               {func(p *corev1.Pod) { p.OwnerReferences[0].UID = "other" }, false},
		"owned, by no controller": {func(p *corev1.Pod) { p.OwnerReferences[0].Controller = nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMember(t, "delete-pod")
			_, rs := m.deployment(2)
			m.of("web-1", rs, "ReplicaSet", c.edit)
			if c.healthy {
				m.wantGone("")
			} else {
				m.wantSpared("", "last healthy pod")
			}
		})
	}
	t.Run("being deleted", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		_, rs := m.deployment(2)
		m.of("web-1", rs, "ReplicaSet", nil)
		if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-1", metav1.DeleteOptions{GracePeriodSeconds: new(int64(30))}); err != nil {
			t.Fatal(err)
		}
		m.wantSpared("", "last healthy pod")
	})
	t.Run("the suspect goes already", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		m.deployment(1)
		if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(30))}); err != nil {
			t.Fatal(err)
		}
		now, err := m.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = now
		if status, reason := m.try(""); status != broker.Done {
			t.Errorf("a shorter grace period: %s (%s)", status, reason)
		}
	})
}

// A pod that no other can stand in for.
func TestPodsThatNoneReplaces(t *testing.T) {
	claim := func(m *member, name string, modes ...corev1.PersistentVolumeAccessMode) {
		_, err := m.admin.CoreV1().PersistentVolumeClaims("shop").Create(m.t.Context(), &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeClaimSpec{AccessModes: modes},
		}, metav1.CreateOptions{})
		if err != nil {
			m.t.Fatal(err)
		}
	}
	ofClaim := func(name string) corev1.VolumeSource {
		return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}
	}
	ephemeral := func(mode corev1.PersistentVolumeAccessMode) corev1.VolumeSource {
		return corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{
			Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{mode}},
		}}}
	}
	for name, c := range map[string]struct {
		volumes []corev1.VolumeSource
		says    string // "": it goes
	}{
		"none":              {nil, ""},
		"many may write":    {[]corev1.VolumeSource{ofClaim("rwx")}, ""},
		"read only":         {[]corev1.VolumeSource{ofClaim("rox")}, ""},
		"either":            {[]corev1.VolumeSource{ofClaim("either")}, ""},
		"one node":          {[]corev1.VolumeSource{{EmptyDir: &corev1.EmptyDirVolumeSource{}}, ofClaim("rwx"), ofClaim("rwo")}, "ReadWriteOnce"},
		"one pod":           {[]corev1.VolumeSource{ofClaim("rwop")}, "ReadWriteOncePod"},
		"its own":           {[]corev1.VolumeSource{ephemeral(corev1.ReadWriteOnce)}, "ReadWriteOnce"},
		"its own, for many": {[]corev1.VolumeSource{ephemeral(corev1.ReadWriteMany)}, ""},
		"a claim that went": {[]corev1.VolumeSource{ofClaim("gone")}, "not known"},
		"a configmap's":     {[]corev1.VolumeSource{{ConfigMap: &corev1.ConfigMapVolumeSource{}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMember(t, "delete-pod")
			claim(m, "rwx", corev1.ReadWriteMany)
			claim(m, "rox", corev1.ReadOnlyMany)
			claim(m, "either", corev1.ReadWriteOnce, corev1.ReadWriteMany)
			claim(m, "rwo", corev1.ReadWriteOnce)
			claim(m, "rwop", corev1.ReadWriteOncePod)
			_, rs := m.deployment(2)
			m.of("web-1", rs, "ReplicaSet", nil)
			pod := m.pod.DeepCopy()
			for i, v := range c.volumes {
				pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: fmt.Sprint("v", i), VolumeSource: v})
			}
			m.pod = responders.SlimPod(pod) // as the watch has it
			if c.says == "" {
				m.wantGone("")
				return
			}
			m.wantSpared("", c.says)
			m.wantSpared("maxUnavailable: 100%", c.says)
			m.wantGone("force: true")
		})
	}
	t.Run("a StatefulSet's", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		set, err := m.admin.AppsV1().StatefulSets("shop").Create(t.Context(), &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = m.of("web-00", set, "StatefulSet", nil)
		m.of("web-01", set, "StatefulSet", nil)
		m.wantSpared("", `StatefulSet web`)
		m.wantSpared("maxUnavailable: 100%", `StatefulSet web`)
		m.wantGone("force: true")
	})
	t.Run("nobody's", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		m.wantSpared("", "no controller owns it")
		m.wantSpared("maxUnavailable: 100%", "no controller owns it")
		m.wantGone("force: true")
	})
	t.Run("let go meanwhile", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		_, rs := m.deployment(2)
		m.of("web-1", rs, "ReplicaSet", nil)
		now := m.pod.DeepCopy()
		now.OwnerReferences = nil
		if _, err := m.admin.CoreV1().Pods("shop").Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.wantSpared("", "let it go")
	})
}

// Pods of the same Deployment count whatever their ReplicaSet; others do not,
// whatever their labels.
func TestPodsOfAnotherReplicaSet(t *testing.T) {
	for _, own := range []bool{true, false} {
		m := newMember(t, "delete-pod")
		d, rs := m.deployment(2)
		other := rs.DeepCopy()
		other.ObjectMeta = metav1.ObjectMeta{Name: "web-8e5", OwnerReferences: rs.OwnerReferences}
		other.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web", "pod-template-hash": "8e5"}}
		if !own {
			ref := *metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))
			ref.UID = "another"
			other.OwnerReferences = []metav1.OwnerReference{ref}
		}
		other, err := m.admin.AppsV1().ReplicaSets("shop").Create(t.Context(), other, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.of("web-8e5-0", other, "ReplicaSet", nil)
		if own {
			m.wantSpared("maxUnavailable: 0", "1 of the 2 replicas")
			m.wantGone("maxUnavailable: 50%")
		} else {
			m.wantSpared("", "last healthy pod")
		}
	}
}

func TestMaxUnavailableOfOtherWorkloads(t *testing.T) {
	labels := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	t.Run("DaemonSet", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		set, err := m.admin.AppsV1().DaemonSets("shop").Create(t.Context(), &appsv1.DaemonSet{
			ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.DaemonSetSpec{Selector: labels},
			Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 4},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = m.of("web-00", set, "DaemonSet", func(p *corev1.Pod) { p.Labels["controller-revision-hash"] = "a" })
		m.wantSpared("", "last healthy pod of DaemonSet shop/web")
		for i := range 3 {
			m.of(fmt.Sprintf("web-1%d", i), set, "DaemonSet", func(p *corev1.Pod) { p.Labels["controller-revision-hash"] = "b" })
		}
		m.wantSpared("maxUnavailable: 24%", "3 of the 4 replicas")
		m.wantGone("maxUnavailable: 25%")
	})
	t.Run("Job", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		job, err := m.admin.BatchV1().Jobs("shop").Create(t.Context(), &batchv1.Job{
			ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: batchv1.JobSpec{Selector: labels, Parallelism: new(int32(2))},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.owned(*metav1.NewControllerRef(job, batchv1.SchemeGroupVersion.WithKind("Job")))
		m.wantSpared("", "last healthy pod of Job shop/web")
		first := m.pod
		m.pod = m.newPod("web-1")
		m.owned(first.OwnerReferences[0])
		ready(m.pod)
		if _, err := m.admin.CoreV1().Pods("shop").Update(t.Context(), m.pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.pod = first
		m.wantSpared("maxUnavailable: 0", "1 of the 2 replicas")
		m.wantGone("maxUnavailable: 1")
	})
	t.Run("of a kind that nobody serves", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		m.owned(metav1.OwnerReference{APIVersion: "example.com/v1", Kind: "Thing", Name: "web", UID: "u"})
		m.wantSpared("", "not known", "Thing web")
		// Those of the same controller are enough of a proof.
		first := m.pod
		m.pod = m.newPod("web-1")
		m.owned(first.OwnerReferences[0])
		ready(m.pod)
		if _, err := m.admin.CoreV1().Pods("shop").Update(t.Context(), m.pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.pod = first
		m.wantSpared("maxUnavailable: 1", "not known", "Thing web")
		m.wantGone("")
	})
}

// What can't be found out is tried again for a while; then the pod stays.
func TestWhatIsNotKnownSpares(t *testing.T) {
	t.Run("forbidden", func(t *testing.T) {
		for resource, c := range map[string]struct{ verb, params string }{
			"pods":                   {"list", ""},
			"replicasets":            {"get", "maxUnavailable: 1"},
			"deployments":            {"get", "maxUnavailable: 1"},
			"persistentvolumeclaims": {"get", ""},
		} {
			m := newMember(t, "delete-pod")
			_, rs := m.deployment(2)
			m.of("web-1", rs, "ReplicaSet", nil)
			pod := m.pod.DeepCopy()
			pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"},
			}}}
			if resource == "persistentvolumeclaims" {
				m.pod = pod
			}
			m.server.Forbid(t, c.verb, "", resource)
			m.wantSpared(c.params, "missing permission", c.verb, resource)
		}
	})
	t.Run("an owner that was replaced", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		d, _ := m.deployment(1)
		if err := m.admin.AppsV1().Deployments("shop").Delete(t.Context(), d.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		m.wantSpared("", "not known")
	})
	t.Run("away", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		m.deployment(2)
		m.refuse = func(req *http.Request) bool {
			return req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, "/pods")
		}
		for ago, want := range map[time.Duration]broker.Status{0: broker.Failed, 2 * time.Minute: broker.Suppressed} {
			r := m.request("s1", "")
			r.Step.Received = time.Now().Add(-ago)
			_, err := m.Act(t.Context(), r)
			status, retry, _, reason := responders.Classify(err)
			if status != want || retry != (want == broker.Failed) || m.goes(m.pod) {
				t.Errorf("after %s: status %s, retry %t: %s", ago, status, retry, reason)
			}
		}
	})
}

// A step that a person has approved is done.
func TestApprovedStepsTakeTheLastPod(t *testing.T) {
	m := newMember(t, "delete-pod")
	r := m.request("s1", "")
	r.Step.Approved = &broker.Approval{Actor: "ann", Time: time.Now()}
	if _, err := m.Act(t.Context(), r); err != nil || !m.goes(m.pod) {
		t.Errorf("error %v", err)
	}
}

// In audit mode only the question is asked.
func TestForeseeWritesNothing(t *testing.T) {
	for _, others := range []int{0, 1} {
		m := newMember(t, "delete-pod")
		_, rs := m.deployment(2)
		for i := range others {
			m.of(fmt.Sprint("web-1", i), rs, "ReplicaSet", func(p *corev1.Pod) { p.Spec.NodeName = "other" })
		}
		m.writes = nil
		err := m.Responder.(responders.Foreseer).Foresee(t.Context(), m.request("s1", ""))
		if status, _, _, reason := responders.Classify(err); (status == broker.Done) != (others > 0) {
			t.Errorf("with %d others: %s (%s)", others, status, reason)
		}
		m.wantWrites()
	}
}

// Of two pods, each the other's last one, never both go.
func TestTwoAtOnce(t *testing.T) {
	t.Run("on one node", func(t *testing.T) {
		for range 10 {
			m := newMember(t, "delete-pod")
			evict := entryOf(t, "evict-pod").New(m.env)
			_, rs := m.deployment(2)
			one := m.of("web-1", rs, "ReplicaSet", nil)
			two := m.of("web-2", rs, "ReplicaSet", nil)
			if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			var both sync.WaitGroup
			for r, pod := range map[responders.Responder]*corev1.Pod{m.Responder: one, evict: two} {
				req := m.request("s1", "")
				req.Pod, req.Step.Received = pod, time.Now()
				both.Go(func() { _, _ = r.Act(t.Context(), req) })
			}
			both.Wait()
			if a, b := m.goes(one), m.goes(two); a == b {
				t.Fatalf("the one goes: %t, the other: %t", a, b)
			}
		}
	})
	// A rollout: each is its ReplicaSet's only one.
	t.Run("of two ReplicaSets", func(t *testing.T) {
		for range 10 {
			m := newMember(t, "delete-pod")
			_, rs := m.deployment(2)
			next := rs.DeepCopy()
			next.ObjectMeta = metav1.ObjectMeta{Name: "web-8e5", OwnerReferences: rs.OwnerReferences}
			next.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web", "pod-template-hash": "8e5"}}
			next, err := m.admin.AppsV1().ReplicaSets("shop").Create(t.Context(), next, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			pods := []*corev1.Pod{m.of("web-1", rs, "ReplicaSet", nil), m.of("web-2", next, "ReplicaSet", nil)}
			if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			var both sync.WaitGroup
			for _, pod := range pods {
				req := m.request("s1", "")
				req.Pod, req.Step.Received = pod, time.Now()
				both.Go(func() { _, _ = m.Act(t.Context(), req) })
			}
			both.Wait()
			if a, b := m.goes(pods[0]), m.goes(pods[1]); a == b {
				t.Fatalf("the one goes: %t, the other: %t", a, b)
			}
		}
	})
	// The mark is for the very pod: one that went is gone, and its replacement is let be.
	t.Run("the pod went before it was marked", func(t *testing.T) {
		for _, replaced := range []bool{false, true} {
			m := newMember(t, "delete-pod")
			_, rs := m.deployment(2)
			m.of("web-1", rs, "ReplicaSet", func(p *corev1.Pod) { p.Spec.NodeName = "other" })
			m.before = func(req *http.Request) {
				if req.Method != http.MethodPatch {
					return
				}
				if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
					t.Error(err)
				}
				if replaced {
					m.newPod("web-0")
				}
			}
			if status, reason := m.try(""); status != broker.Nothing {
				t.Errorf("replaced %t: %s (%s)", replaced, status, reason)
			}
			for _, p := range m.pods() {
				if p.Name == "web-0" && (p.DeletionTimestamp != nil || len(p.Annotations) > 0) {
					t.Errorf("the replacement was touched: %+v", p.ObjectMeta)
				}
			}
		}
	})
	t.Run("no mark where nobody else counts", func(t *testing.T) {
		m := newMember(t, "delete-pod")
		_, rs := m.deployment(2)
		m.of("web-1", rs, "ReplicaSet", nil)
		m.writes = nil
		m.wantGone("")
		m.wantWrites("DELETE pods/web-0")
	})
	// The other node acts wholly while this one is between two requests.
	for _, when := range []string{"before the mark", "after the mark", "before the delete"} {
		t.Run("on two nodes, "+when, func(t *testing.T) {
			m := newMember(t, "delete-pod")
			_, rs := m.deployment(2)
			theirs := m.of("web-1", rs, "ReplicaSet", func(p *corev1.Pod) { p.Spec.NodeName = "other" })
			m.pod = m.of("web-2", rs, "ReplicaSet", nil)
			if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			client, err := responders.NewKube(m.server.Config())
			if err != nil {
				t.Fatal(err)
			}
			other := m.entry.New(responders.Env{Kube: client, Node: "other"})
			acted := 0
			meanwhile := func(req *http.Request) {
				acted++
				r := m.request("s2", "")
				r.Pod, r.Step.Received = theirs, time.Now()
				_, err := other.Act(t.Context(), r)
				if status, _, _, reason := responders.Classify(err); (status == broker.Done) != m.goes(theirs) {
					t.Errorf("the other's: %s (%s)", status, reason)
				}
			}
			at := func(method string) func(*http.Request) {
				return func(req *http.Request) {
					if req.Method == method {
						meanwhile(req)
					}
				}
			}
			switch when {
			case "before the mark":
				m.before = at(http.MethodPatch)
			case "after the mark":
				m.after = at(http.MethodPatch)
			case "before the delete":
				m.before = at(http.MethodDelete)
			}
			status, reason := m.try("")
			if acted != 1 {
				t.Fatalf("the other acted %d times", acted)
			}
			if m.goes(m.pod) == m.goes(theirs) {
				t.Errorf("this one goes: %t (%s, %s), the other: %t", m.goes(m.pod), status, reason, m.goes(theirs))
			}
		})
	}
}

// A workload of very many pods is read a page at a time, to the end if need be.
func TestManyPods(t *testing.T) {
	m := newMember(t, "delete-pod")
	_, rs := m.deployment(200)
	for i := range 120 {
		m.of(fmt.Sprintf("web-%03d", i), rs, "ReplicaSet", func(p *corev1.Pod) {
			if i < 118 {
				p.Status.Conditions = nil
			}
		})
	}
	m.wantSpared("maxUnavailable: 197", "2 of the 200 replicas")
	m.wantGone("maxUnavailable: 198")
}

func TestSparingParameters(t *testing.T) {
	for params, want := range map[string]string{
		"maxUnavailable: 1":                    "",
		"maxUnavailable: 25%":                  "",
		`maxUnavailable: "25%"`:                "",
		"maxUnavailable: 0":                    "",
		"maxUnavailable: 101%":                 "100% at most",
		"maxUnavailable: -1":                   "negative",
		"maxUnavailable: 0.5":                  "whole number",
		"maxUnavailable: all":                  "whole number",
		"maxUnavailable: +1":                   "whole number",
		`maxUnavailable: "%"`:                  "whole number",
		"maxUnavailable: 99999999999999999999": "whole number",
		"{maxUnavailable: 1, force: true}":     "exclude each other",
		"maxUnavailble: 1":                     "maxUnavailable",
	} {
		for _, responder := range []string{"delete-pod", "evict-pod"} {
			if got := problems(t, entryOf(t, responder), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(got[0], want) {
				t.Errorf("%s: %s: problems %q, want %q", responder, params, got, want)
			}
		}
	}
}
