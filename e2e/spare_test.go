package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/alert"
	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

// spared sends an alert of the pod and expects that it is isolated instead, for a
// reason that has the words in it.
func (w *world) spared(t *testing.T, s *program.Stoop, responder string, pod *corev1.Pod, words ...string) (isolation broker.Outcome) {
	t.Helper()
	id := s.Send(program.Critical("Test critical", pod))
	o := s.WaitOutcome(id, responder, soon)
	wantStatus(t, o, broker.Suppressed)
	isolation = s.WaitOutcome(id, "isolate-pod", soon)
	wantStatus(t, isolation, broker.Done)
	for _, word := range append(words, "isolate-pod is done instead") {
		if !strings.Contains(o.Reason, word) {
			t.Errorf("the reason lacks %q: %s", word, o.Reason)
		}
	}
	if !strings.Contains(isolation.Reason, "in place of "+responder) {
		t.Errorf("the isolation does not say in whose place it was done: %s", isolation.Reason)
	}
	wantAlive(t, w.Cluster, pod)
	w.wantIsolated(t, pod)
	return isolation
}

func (w *world) unready(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	pod = pod.DeepCopy()
	pod.Status.Conditions[0].Status = corev1.ConditionFalse
	if _, err := w.Client.CoreV1().Pods(pod.Namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (w *world) claim(t *testing.T, name string, mode corev1.PersistentVolumeAccessMode) {
	t.Helper()
	_, err := w.Client.CoreV1().PersistentVolumeClaims(w.ns).Create(t.Context(), &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{mode},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// replicaSet makes a Deployment without pods, and returns its ReplicaSet.
func (w *world) replicaSet(t *testing.T, name string, replicas int) *appsv1.ReplicaSet {
	t.Helper()
	w.Deployment(t, w.ns, name, w.node, 0)
	d := w.deployment(t, name)
	d.Spec.Replicas = new(int32(replicas))
	if _, err := w.Client.AppsV1().Deployments(w.ns).Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	all, err := w.Client.AppsV1().ReplicaSets(w.ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all.Items, func(rs appsv1.ReplicaSet) bool { return metav1.IsControlledBy(&rs, d) })
	if i < 0 {
		t.Fatalf("the deployment %s has no replica set", name)
	}
	return &all.Items[i]
}

// A workload keeps its last healthy pod, and what no other can stand in for.
func TestAWorkloadKeepsItsLastHealthyPod(t *testing.T) {
	t.Parallel()
	for _, responder := range []string{"delete-pod", "evict-pod"} {
		t.Run(responder, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			s := w.stoop(t, answerWith(responder))

			t.Run("the only one, and undo", func(t *testing.T) {
				pod := w.Deployment(t, w.ns, "single", w.node, 1)[0]
				o := w.spared(t, s, responder, pod, "last healthy pod of Deployment "+w.ns+"/single")
				if !o.Undo {
					t.Error("it can't be undone")
				}
				s.Run("undo", o.ID)
				if p := w.policy(t, policyName(pod)); p != nil {
					t.Error("the policy is left")
				}
			})
			t.Run("the last of two", func(t *testing.T) {
				pods := w.Deployment(t, w.ns, "two", w.node, 2)
				wantStatus(t, stepOf(t, s, responder, pods[0]), broker.Done)
				w.spared(t, s, responder, pods[1], "last healthy pod")
			})
			t.Run("the others are not ready", func(t *testing.T) {
				pods := w.Deployment(t, w.ns, "failing", w.node, 3)
				w.unready(t, pods[1])
				w.unready(t, pods[2])
				w.spared(t, s, responder, pods[0], "last healthy pod")
			})
			t.Run("a StatefulSet's", func(t *testing.T) {
				set, err := w.Client.AppsV1().StatefulSets(w.ns).Create(t.Context(), &appsv1.StatefulSet{
					ObjectMeta: metav1.ObjectMeta{Name: "db"},
					Spec: appsv1.StatefulSetSpec{
						Replicas: new(int32(2)), ServiceName: "db", Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}},
						Template: corev1.PodTemplateSpec{
							ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "db"}},
							Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/e2e:1"}}},
						},
					},
				}, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				label := func(p *corev1.Pod) { p.Labels = map[string]string{"app": "db"} }
				pod := w.podOf(t, set, "StatefulSet", label)
				w.podOf(t, set, "StatefulSet", label)
				w.spared(t, s, responder, pod, "StatefulSet db")
			})
			t.Run("with a volume", func(t *testing.T) {
				rs := w.replicaSet(t, "disks", 4)
				with := func(claim string) func(*corev1.Pod) {
					return func(p *corev1.Pod) {
						p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
							PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
						}}}
					}
				}
				w.podOf(t, rs, "ReplicaSet", nil)
				w.claim(t, "one-node", corev1.ReadWriteOnce)
				w.claim(t, "one-pod", corev1.ReadWriteOncePod)
				w.claim(t, "shared", corev1.ReadWriteMany)
				w.spared(t, s, responder, w.podOf(t, rs, "ReplicaSet", with("one-node")), "ReadWriteOnce")
				w.spared(t, s, responder, w.podOf(t, rs, "ReplicaSet", with("one-pod")), "ReadWriteOncePod")
				wantStatus(t, stepOf(t, s, responder, w.podOf(t, rs, "ReplicaSet", with("shared"))), broker.Done)
			})
			t.Run("nobody's", func(t *testing.T) {
				w.spared(t, s, responder, w.pod(t, "alone"), "no controller owns it")
			})
		})
	}
	t.Run("maxUnavailable", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		for _, c := range []struct {
			max     string
			ready   int // of 4, the suspect among them
			deleted bool
		}{
			{"1", 4, true},
			{"1", 3, false},
			{"2", 3, true},
			{"25%", 4, true},
			{"25%", 3, false},
			{"49%", 3, false},
			{"50%", 3, true},
			{"100%", 1, true},
			{"99%", 1, false},
			{"4", 1, false},
		} {
			s := w.stoop(t, answerWith("delete-pod: {maxUnavailable: "+c.max+"}"))
			pods := w.Deployment(t, w.ns, kube.Name("web"), w.node, 4)
			for _, p := range pods[c.ready:] {
				w.unready(t, p)
			}
			if c.deleted {
				if o := stepOf(t, s, "delete-pod", pods[0]); o.Status != broker.Done {
					t.Errorf("%s, %d of 4 ready: %s (%s)", c.max, c.ready, o.Status, o.Reason)
				}
			} else {
				w.spared(t, s, "delete-pod", pods[0], "maxUnavailable: "+c.max)
			}
			s.Stop()
		}
	})
	t.Run("force", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		s := w.stoop(t, answerWith("delete-pod: {force: true}"))
		single := w.Deployment(t, w.ns, "single", w.node, 1)[0]
		for _, pod := range []*corev1.Pod{single, w.pod(t, "alone")} {
			wantStatus(t, stepOf(t, s, "delete-pod", pod), broker.Done)
		}
	})
	t.Run("audit", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		s := w.stoop(t, strings.Replace(answerWith("delete-pod"), "enforce", "audit", 1))
		pods := w.Deployment(t, w.ns, "two", w.node, 2)
		wantStatus(t, stepOf(t, s, "delete-pod", pods[0]), broker.Audited)
		w.Remove(t, pods[0])
		o := stepOf(t, s, "delete-pod", pods[1])
		wantStatus(t, o, broker.Suppressed)
		if !strings.Contains(o.Reason, "last healthy pod") || !strings.Contains(o.Reason, "isolate-pod would be done instead") {
			t.Errorf("the reason: %s", o.Reason)
		}
		w.wantNoRequests(t)
	})
}

// Two nodes, each with one of the last two pods, raise alerts in the same instant.
func TestTwoNodesNeverTakeTheLastTwoPods(t *testing.T) {
	t.Parallel()
	one := newWorld(t)
	two := *one
	two.node = one.Node(t)
	both := []*world{one, &two}
	var stoops []*program.Stoop
	for _, w := range both {
		stoops = append(stoops, w.stoop(t, answerWith("delete-pod")))
	}
	taken := 0
	for n := range 10 {
		rs := one.replicaSet(t, fmt.Sprint("web-", n), 2)
		var pods []*corev1.Pod
		for _, w := range both {
			pods = append(pods, w.podOf(t, rs, "ReplicaSet", nil))
		}
		ids := make([]string, len(both))
		var sent sync.WaitGroup
		for i, s := range stoops {
			sent.Go(func() { ids[i] = s.Send(program.Critical("Test critical", pods[i])) })
		}
		sent.Wait()
		left := 0
		for i, s := range stoops {
			switch o := s.WaitOutcome(ids[i], "delete-pod", soon); o.Status {
			case broker.Done:
				taken++
			case broker.Suppressed:
				left++
				wantAlive(t, one.Cluster, pods[i])
			default:
				t.Errorf("%s: %s", o.Status, o.Reason)
			}
		}
		if left == 0 {
			t.Errorf("both pods of web-%d were deleted", n)
		}
	}
	t.Logf("%d of 20 pods were deleted, never both of a workload", taken)
}

// What stoop rbac prints for a rule is enough to find out what it spares, also under
// the policies that tie a token to its node.
func TestSparingUnderItsOwnPermissions(t *testing.T) {
	t.Parallel()
	c := shared.cluster
	for _, responder := range []string{"delete-pod", "evict-pod"} {
		for _, params := range []string{"", `{"maxUnavailable":"50%"}`} {
			w := newWorld(t)
			account := accountFor(t, "rules:\n"+ruleOf(t, "sparing", responder, params), false)
			client, err := responders.NewKube(account.on(t, w.node))
			if err != nil {
				t.Fatal(err)
			}
			entries := responders.All()
			entry := entries[slices.IndexFunc(entries, func(e responders.Entry) bool { return e.Name == responder })]
			r := entry.New(responders.Env{Kube: client, Node: w.node})
			rs := w.replicaSet(t, "web", 2)
			w.claim(t, "shared", corev1.ReadWriteMany)
			here := w.podOf(t, rs, "ReplicaSet", func(p *corev1.Pod) {
				p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
					PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "shared"},
				}}}
			})
			elsewhere := *w
			elsewhere.node = c.Node(t)
			there := elsewhere.podOf(t, rs, "ReplicaSet", nil)
			act := func() error {
				_, err := r.Act(t.Context(), &responders.Request{
					Step:  &broker.Step{ID: "s", Received: time.Now(), Action: broker.Action{Responder: responder, Params: json.RawMessage(params)}},
					Alert: &alert.Alert{}, Pod: here,
				})
				return err
			}
			w.unready(t, there)
			if err := act(); err == nil || strings.Contains(err.Error(), "not known") || strings.Contains(err.Error(), "permission") || !c.Alive(t, here) {
				t.Errorf("%s %s: %v, want it spared", responder, params, err)
			}
			elsewhere.podOf(t, rs, "ReplicaSet", nil)
			if err := act(); err != nil || c.Alive(t, here) {
				t.Errorf("%s %s: %v, want it gone", responder, params, err)
			}
		}
	}
}
