package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"

	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

// answerWith is a rules file with one rule that answers every Critical alert with one step.
func answerWith(step string) string {
	return "mode: enforce\nrules:\n  - name: answer\n    match: {priority: critical}\n    actions:\n      - " + step + "\n"
}

// stepOf sends a Critical alert of the pod and waits for the outcome of its step.
func stepOf(t *testing.T, s *program.Stoop, responder string, pod *corev1.Pod) broker.Outcome {
	t.Helper()
	return s.WaitOutcome(s.Send(program.Critical("Test critical", pod)), responder, soon)
}

func (w *world) deployment(t *testing.T, name string) *appsv1.Deployment {
	t.Helper()
	d, err := w.Client.AppsV1().Deployments(w.ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get the deployment %s: %v", name, err)
	}
	return d
}

// asked are stoop's requests of this verb and resource that were granted, by name.
func (w *world) asked(t *testing.T, verb, resource string) map[string]int {
	t.Helper()
	asked := map[string]int{}
	for _, r := range w.requests(t) {
		if r.Verb == verb && r.Resource == resource && r.Code < 300 {
			asked[r.Name]++
		}
	}
	return asked
}

// A PodDisruptionBudget holds an eviction back until it allows one; nothing here
// counts healthy pods, so the test says what it allows.
func TestEvict(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, answerWith("evict-pod: {force: true}"))
	budgets := w.Client.PolicyV1().PodDisruptionBudgets(w.ns)
	allow := func(t *testing.T, name string, n int32) {
		t.Helper()
		b, err := budgets.Get(t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			b, err = budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
				ObjectMeta: metav1.ObjectMeta{Name: name},
				Spec: policyv1.PodDisruptionBudgetSpec{
					MinAvailable: new(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "e2e"}},
				},
			}, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatalf("the budget %s: %v", name, err)
		}
		b.Status = policyv1.PodDisruptionBudgetStatus{
			ObservedGeneration: b.Generation, DisruptionsAllowed: n, DesiredHealthy: 1, CurrentHealthy: 1 + n, ExpectedPods: 1 + n,
		}
		if _, err := budgets.UpdateStatus(t.Context(), b, metav1.UpdateOptions{}); err != nil {
			t.Fatalf("the budget's status: %v", err)
		}
	}

	t.Run("no budget", func(t *testing.T) {
		pod := w.pod(t, "free")
		wantStatus(t, stepOf(t, s, "evict-pod", pod), broker.Done)
		w.WaitGone(t, pod, soon)
	})
	t.Run("a budget that allows none, and then one", func(t *testing.T) {
		allow(t, "tight", 0)
		pod := w.pod(t, "held")
		id := s.Send(program.Critical("Test critical", pod))
		o := s.WaitStatus(id, "evict-pod", broker.Retrying, soon)
		if !strings.Contains(o.Reason, "The disruption budget tight needs 1 healthy pods and has 1 currently") {
			t.Errorf("the reason does not name the budget: %s", o.Reason)
		}
		wantAlive(t, w.Cluster, pod)
		allow(t, "tight", 1)
		s.WaitStatus(id, "evict-pod", broker.Done, soon)
		w.WaitGone(t, pod, soon)
	})
	t.Run("the budget allows none, and the pod is replaced", func(t *testing.T) {
		allow(t, "tight", 0)
		pod := w.pod(t, "replaced-0")
		id := s.Send(program.Critical("Test critical", pod))
		s.WaitStatus(id, "evict-pod", broker.Retrying, soon)
		w.Remove(t, pod)
		replacement := w.pod(t, "replaced-0")
		s.WaitStatus(id, "evict-pod", broker.Nothing, soon)
		allow(t, "tight", 1)
		wantAlive(t, w.Cluster, replacement)
	})
	t.Run("two budgets", func(t *testing.T) {
		allow(t, "tight", 1)
		allow(t, "second", 1)
		pod := w.pod(t, "twice")
		o := stepOf(t, s, "evict-pod", pod)
		wantStatus(t, o, broker.Refused)
		if !strings.Contains(o.Reason, "more than one PodDisruptionBudget") {
			t.Errorf("the reason: %s", o.Reason)
		}
		wantAlive(t, w.Cluster, pod)
	})
}

// installed is the configuration of the guards as they are installed, but for the
// limits.
const installed = `
kubernetes: {qps: 5000, burst: 5000}
guard:
  limits: {rule: 0, namespace: 0, node: 0}
`

// 200 alerts in a second about the pods of one Deployment: it is scaled, or
// restarted, once.
func TestBurstOnOneWorkload(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ step, verb, resource string }{
		{"scale-workload: {replicas: 1}", "update", "deployments/scale"},
		{"restart-workload", "patch", "deployments"},
	} {
		responder, _, _ := strings.Cut(c.step, ":")
		t.Run(responder, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			o := w.options(answerWith(c.step))
			o.Config = installed
			s := program.Start(t, o)
			pods := w.Deployment(t, w.ns, "shop", w.node, 10)
			other := w.Deployment(t, w.ns, "other", w.node, 2)
			before := w.deployment(t, "other")
			var ids []string
			var lines [][]byte
			for n := range 200 {
				a := program.Critical("Trap", pods[n%len(pods)])
				a.Fields["evt.time"] = time.Now().UnixNano() + int64(n)
				line := a.Line()
				ids, lines = append(ids, program.ID(line)), append(lines, line)
			}
			s.Write(slices.Concat(lines...))
			status := map[broker.Status]int{}
			for _, id := range ids {
				status[s.WaitOutcome(id, responder, 60*time.Second).Status]++
			}
			if status[broker.Done] != 1 || status[broker.Suppressed] != 199 {
				t.Errorf("outcomes %v, want one done and the others suppressed", status)
			}
			if got := w.asked(t, c.verb, c.resource); !maps.Equal(got, map[string]int{"shop": 1}) {
				t.Errorf("%s %s: %v, want one of shop", c.verb, c.resource, got)
			}
			for _, pod := range slices.Concat(pods, other) {
				w.wantUntouched(t, pod)
			}
			if now := w.deployment(t, "other"); now.ResourceVersion != before.ResourceVersion {
				t.Errorf("the other deployment was changed: %+v", now)
			}
			// A pod of the other is not held back by it.
			wantStatus(t, stepOf(t, s, responder, other[0]), broker.Done)
		})
	}
}

// rollOut is what the controllers make of a Deployment whose template was changed:
// another ReplicaSet, and pods of the new template in the place of the old ones.
func (w *world) rollOut(t *testing.T, name string, old *corev1.Pod) *corev1.Pod {
	t.Helper()
	d := w.deployment(t, name)
	rs, err := w.Client.AppsV1().ReplicaSets(w.ns).Create(t.Context(), &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Name:            kube.Name(name),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: d.Spec.Replicas, Selector: d.Spec.Selector, Template: d.Spec.Template},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("make the next replica set of %s: %v", name, err)
	}
	// Times in the API server are whole seconds.
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
	pod := w.podOf(t, rs, "ReplicaSet", func(p *corev1.Pod) { p.Annotations = d.Spec.Template.Annotations })
	w.Remove(t, old)
	return pod
}

// podOf is a pod of a controller of the group apps.
func (w *world) podOf(t *testing.T, owner metav1.Object, kind string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	return w.Pod(t, w.ns, kube.Name(owner.GetName()), w.node, func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(owner, appsv1.SchemeGroupVersion.WithKind(kind))}
		if rs, ok := owner.(*appsv1.ReplicaSet); ok {
			p.Labels = rs.Spec.Selector.MatchLabels
		}
		if change != nil {
			change(p)
		}
	})
}

// Each new pod raises the alert again. After the second answer stoop changes the
// workload no more, and isolates the pod.
func TestAnswersThatDoNotHelp(t *testing.T) {
	t.Parallel()
	t.Run("restart-workload", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		s := w.stoop(t, answerWith("restart-workload"))
		pod := w.Deployment(t, w.ns, "loop", w.node, 1)[0]
		for n := range 2 {
			wantStatus(t, stepOf(t, s, "restart-workload", pod), broker.Done)
			if n == 0 { // the old pod, which is still there, does not restart the new ones
				wantStatus(t, stepOf(t, s, "restart-workload", pod), broker.Nothing)
			}
			pod = w.rollOut(t, "loop", pod)
		}
		w.wantIsolatedInstead(t, s, "restart-workload", pod)
		if got := w.asked(t, "patch", "deployments"); !maps.Equal(got, map[string]int{"loop": 2}) {
			t.Errorf("restarts: %v, want 2", got)
		}
	})
	t.Run("scale-workload", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		s := w.stoop(t, answerWith("scale-workload"))
		pod := w.Deployment(t, w.ns, "loop", w.node, 2)[0]
		for range 2 {
			wantStatus(t, stepOf(t, s, "scale-workload", pod), broker.Done)
			d := w.deployment(t, "loop")
			if *d.Spec.Replicas != 0 {
				t.Fatalf("it has %d replicas", *d.Spec.Replicas)
			}
			d.Spec.Replicas = new(int32(2)) // somebody insists
			if _, err := w.Client.AppsV1().Deployments(w.ns).Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		w.wantIsolatedInstead(t, s, "scale-workload", pod)
		if n := *w.deployment(t, "loop").Spec.Replicas; n != 2 {
			t.Errorf("it has %d replicas", n)
		}
	})
	t.Run("quarantine-pod", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		s := w.stoop(t, answerWith("quarantine-pod"))
		pods := w.Deployment(t, w.ns, "loop", w.node, 3)
		for _, pod := range pods[:2] {
			wantStatus(t, stepOf(t, s, "quarantine-pod", pod), broker.Done)
		}
		w.wantIsolatedInstead(t, s, "quarantine-pod", pods[2])
		if now := w.Get(t, w.ns, pods[2].Name); now.Labels["app"] != "loop" {
			t.Errorf("its labels were taken off: %v", now.Labels)
		}
	})
}

// wantIsolatedInstead fails the test unless a further alert of a pod isolates it.
func (w *world) wantIsolatedInstead(t *testing.T, s *program.Stoop, responder string, pod *corev1.Pod) {
	t.Helper()
	id := s.Send(program.Critical("Test critical", pod))
	wantStatus(t, s.WaitOutcome(id, responder, soon), broker.Suppressed)
	wantStatus(t, s.WaitOutcome(id, "isolate-pod", soon), broker.Done)
	wantAlive(t, w.Cluster, pod)
	w.wantIsolated(t, pod)
}

func TestScale(t *testing.T) {
	t.Parallel()

	t.Run("an autoscaler is named, and undo sets back", func(t *testing.T) {
		w := newWorld(t)
		s := w.stoop(t, answerWith("scale-workload"))
		pod := w.Deployment(t, w.ns, "shop", w.node, 3)[0]
		_, err := w.Client.AutoscalingV2().HorizontalPodAutoscalers(w.ns).Create(t.Context(), &autoscalingv2.HorizontalPodAutoscaler{
			ObjectMeta: metav1.ObjectMeta{Name: "by-load"},
			Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
				ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "shop"}, MaxReplicas: 9,
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		id := s.Send(program.Critical("Test critical", pod))
		o := s.WaitOutcome(id, "scale-workload", soon)
		wantStatus(t, o, broker.Done)
		if o.Found["autoscalers"] != "by-load" || o.Found["workload"] != "Deployment "+w.ns+"/shop" {
			t.Errorf("found %v", o.Found)
		}
		s.Run("undo", o.ID)
		if n := *w.deployment(t, "shop").Spec.Replicas; n != 3 {
			t.Errorf("it has %d replicas after undo", n)
		}
	})
	t.Run("no way out of the namespace", func(t *testing.T) {
		w := newWorld(t)
		s := w.stoop(t, answerWith("scale-workload"))
		other := w.Namespace(t, kube.Name("ns"))
		w.Deployment(t, other, "victim", w.node, 2)
		victim, err := w.Client.AppsV1().Deployments(other).Get(t.Context(), "victim", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"victim", "../../" + other + "/deployments/victim"} {
			pod := w.podOf(t, victim, "Deployment", func(p *corev1.Pod) { p.OwnerReferences[0].Name = name })
			if o := stepOf(t, s, "scale-workload", pod); o.Status == broker.Done {
				t.Errorf("%s: done (%s)", name, o.Reason)
			}
		}
		w.wantNoRequests(t)
	})
	t.Run("what has no scale is refused, with no permission for it", func(t *testing.T) {
		w := newWorld(t)
		s := w.stoop(t, answerWith("scale-workload"))
		template := corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "job"}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/e2e:1"}}},
		}
		ds, err := w.Client.AppsV1().DaemonSets(w.ns).Create(t.Context(), &appsv1.DaemonSet{
			ObjectMeta: metav1.ObjectMeta{Name: "agent"},
			Spec:       appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: template.Labels}, Template: template},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		o := stepOf(t, s, "scale-workload", w.podOf(t, ds, "DaemonSet", nil))
		wantStatus(t, o, broker.Refused)
		if !strings.Contains(o.Reason, "no number of replicas") {
			t.Errorf("the reason: %s", o.Reason)
		}
		w.wantNoRequests(t)
	})
	t.Run("a kind of somebody else's", testScaleCustom)
}

// A custom kind with a scale controls the pod's ReplicaSet.
func testScaleCustom(t *testing.T) {
	group := strings.ReplaceAll(kube.Name("g"), "-", "") + ".example.com"
	entry := responders.All()[slices.IndexFunc(responders.All(), func(e responders.Entry) bool { return e.Name == "scale-workload" })]
	params := map[string]any{"resources": []string{"shops." + group}}
	raw, err := json.Marshal(params)
	if err != nil {
		t.Fatal(err)
	}
	define := func(body string) {
		t.Helper()
		err := shared.cluster.Client.RESTClient().Post().AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions").
			SetHeader("Content-Type", "application/json").Body([]byte(body)).Do(t.Context()).Error()
		if err != nil {
			t.Fatalf("define the kind Shop: %v", err)
		}
	}
	define(fmt.Sprintf(`{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"shops.%s"},
		"spec":{"group":%q,"scope":"Namespaced","names":{"plural":"shops","singular":"shop","kind":"Shop"},
		"versions":[{"name":"v1alpha1","served":true,"storage":true,
			"subresources":{"scale":{"specReplicasPath":".spec.size","statusReplicasPath":".status.size"}},
			"schema":{"openAPIV3Schema":{"type":"object","properties":{
				"spec":{"type":"object","properties":{"size":{"type":"integer"}}},
				"status":{"type":"object","properties":{"size":{"type":"integer"}}}}}}}]}}`, group, group))
	w := worldIn(t, shared.cluster, slices.Concat(responders.BaseRBAC(), entry.PermissionsFor(raw)))
	s := w.stoop(t, answerWith("scale-workload: {replicas: 1, resources: [shops."+group+"]}"))

	shops := func(name string) []string {
		return []string{"/apis", group, "v1alpha1", "namespaces", w.ns, "shops", name}
	}
	type shop struct {
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			Size int `json:"size"`
		} `json:"spec"`
	}
	get := func() (out shop) {
		t.Helper()
		body, err := w.Client.RESTClient().Get().AbsPath(shops("web")...).Do(t.Context()).Raw()
		if err != nil {
			t.Fatalf("get the shop: %v", err)
		}
		if err := json.Unmarshal(body, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	body := fmt.Sprintf(`{"apiVersion":"%s/v1alpha1","kind":"Shop","metadata":{"name":"web"},"spec":{"size":4}}`, group)
	for end := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) { // a new kind is served a moment later
		err := w.Client.RESTClient().Post().AbsPath(shops("")...).SetHeader("Content-Type", "application/json").Body([]byte(body)).Do(t.Context()).Error()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("make the shop: %v", err)
		}
	}
	made := get()
	pod := w.Deployment(t, w.ns, "web", w.node, 1)[0]
	rs, err := w.Client.AppsV1().ReplicaSets(w.ns).Get(t.Context(), pod.OwnerReferences[0].Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	kind := schema.GroupVersionKind{Group: group, Version: "v1alpha1", Kind: "Shop"}
	rs.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(&made, kind)}
	if _, err := w.Client.AppsV1().ReplicaSets(w.ns).Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}

	o := stepOf(t, s, "scale-workload", pod)
	wantStatus(t, o, broker.Done)
	if got := get(); got.Spec.Size != 1 {
		t.Errorf("its size is %d (%s)", got.Spec.Size, o.Reason)
	}
	if got := w.asked(t, "update", "replicasets/scale"); len(got) != 0 {
		t.Errorf("what it controls was scaled: %v", got)
	}
	s.Run("undo", o.ID)
	if got := get(); got.Spec.Size != 4 {
		t.Errorf("its size is %d after undo", got.Spec.Size)
	}
}

func TestQuarantine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, answerWith("quarantine-pod"))
	_, err := w.Client.CoreV1().Services(w.ns).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "shop"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "shop"}, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	protecting := w.createPolicy(t, "protecting", map[string]string{"app": "shop"})
	pods := w.Deployment(t, w.ns, "shop", w.node, 3)

	t.Run("one pod of three, and neither its siblings nor its replacement", func(t *testing.T) {
		id := s.Send(program.Critical("Test critical", pods[1]))
		o := s.WaitOutcome(id, "quarantine-pod", soon)
		wantStatus(t, o, broker.Done)
		w.wantIsolated(t, pods[1])
		now := w.Get(t, w.ns, pods[1].Name)
		if want := map[string]string{"stoop.dev/isolated": string(now.UID)}; !maps.Equal(now.Labels, want) {
			t.Errorf("its labels are %v, want %v", now.Labels, want)
		}
		if o.Found["policiesLost"] != protecting.Name {
			t.Errorf("found %v", o.Found)
		}
		// What a ReplicaSet does with a pod that it no longer selects.
		now.OwnerReferences = nil
		if _, err := w.Client.CoreV1().Pods(w.ns).Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		replacement := w.Pod(t, w.ns, kube.Name("shop"), w.node, func(p *corev1.Pod) {
			p.Labels, p.OwnerReferences = pods[0].Labels, pods[0].OwnerReferences
		})
		for _, pod := range []*corev1.Pod{pods[0], pods[2], replacement} {
			w.wantUntouched(t, pod)
			if got := w.selecting(t, pod); !slices.Equal(got, []string{protecting.Name}) {
				t.Errorf("pod %s is selected by %v", pod.Name, got)
			}
		}
		// The suspect goes on raising alerts.
		wantStatus(t, stepOf(t, s, "quarantine-pod", pods[1]), broker.Nothing)

		s.Run("undo", o.ID)
		if now := w.Get(t, w.ns, pods[1].Name); !maps.Equal(now.Labels, pods[1].Labels) {
			t.Errorf("its labels are %v after undo, were %v", now.Labels, pods[1].Labels)
		}
		if got := w.selecting(t, pods[1]); !slices.Equal(got, []string{protecting.Name}) {
			t.Errorf("the pod is selected by %v after undo", got)
		}
	})
	t.Run("a foreign policy of the name", func(t *testing.T) {
		foreign := w.createPolicy(t, policyName(pods[2]), map[string]string{"app": "something-else"})
		wantStatus(t, stepOf(t, s, "quarantine-pod", pods[2]), broker.Refused)
		w.wantUntouched(t, pods[2])
		if now := w.policy(t, foreign.Name); now == nil || now.ResourceVersion != foreign.ResourceVersion {
			t.Errorf("the policy is %+v", now)
		}
	})
	t.Run("order", func(t *testing.T) {
		isolated := map[string]bool{}
		for _, r := range w.requests(t) {
			switch {
			case r.Verb == "patch" && strings.Contains(string(r.Body), `"stoop.dev/isolated":"`):
				isolated[r.Name] = true
			case r.Verb == "patch" && !isolated[r.Name]:
				t.Errorf("%s was patched before it was isolated: %s", r.Name, r.Body)
			}
		}
		if len(isolated) == 0 {
			t.Error("no pod was isolated")
		}
	})
}
