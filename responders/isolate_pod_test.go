package responders_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

func entryOf(t testing.TB, name string) responders.Entry {
	t.Helper()
	for _, e := range responders.All() {
		if e.Name == name {
			return e
		}
	}
	t.Fatalf("there is no responder %s", name)
	return responders.Entry{}
}

// actor is a responder, and a pod for it to act on.
type actor struct {
	t     testing.TB
	admin kubernetes.Interface
	responders.Responder
	entry responders.Entry
	pod   *corev1.Pod
}

func newActor(t testing.TB, responder string, edit func(*corev1.Pod)) *actor {
	s := conformance.NewServer(t)
	client, err := responders.NewKube(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-0", Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: testNode},
	}
	if edit != nil {
		edit(pod)
	}
	a := &actor{t: t, admin: s.Admin(), entry: entryOf(t, responder)}
	if a.pod, err = a.admin.CoreV1().Pods("shop").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	a.Responder = a.entry.New(responders.Env{Kube: client, Node: testNode})
	return a
}

// request is one with parameters as they are written in rules.yaml.
func (a *actor) request(step, params string) *responders.Request {
	a.t.Helper()
	return &responders.Request{
		Step:   &broker.Step{ID: step, Rule: "r", Action: broker.Action{Responder: a.entry.Name, Params: checked(a.t, a.entry, params)}},
		Alert:  &alert.Alert{Rule: "x"},
		Target: alert.Target{Namespace: a.pod.Namespace, Pod: a.pod.Name, UID: string(a.pod.UID)},
		Pod:    a.pod,
	}
}

func (a *actor) act(step, params string) responders.Result {
	a.t.Helper()
	res, err := a.Act(a.t.Context(), a.request(step, params))
	if err != nil {
		a.t.Fatal(err)
	}
	return res
}

func (a *actor) undo(step string, res responders.Result) responders.Result {
	a.t.Helper()
	u, err := a.Responder.(responders.Undoer).Undo(a.t.Context(), &responders.UndoRequest{ID: step, Record: res.Undo})
	if err != nil {
		a.t.Fatal(err)
	}
	return u
}

func (a *actor) labels() map[string]string {
	a.t.Helper()
	now, err := a.admin.CoreV1().Pods("shop").Get(a.t.Context(), a.pod.Name, metav1.GetOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	return now.Labels
}

func (a *actor) policy() *networkingv1.NetworkPolicy {
	a.t.Helper()
	p, err := a.admin.NetworkingV1().NetworkPolicies("shop").Get(a.t.Context(), "stoop-isolate-"+string(a.pod.UID), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		a.t.Fatal(err)
	}
	return p
}

func (a *actor) addPolicy(yml string) *networkingv1.NetworkPolicy {
	a.t.Helper()
	p := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(yml), p); err != nil {
		a.t.Fatal(err)
	}
	p, err := a.admin.NetworkingV1().NetworkPolicies("shop").Create(a.t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	return p
}

// spec reads what a policy should be.
func spec(t testing.TB, yml string) networkingv1.NetworkPolicySpec {
	t.Helper()
	var s networkingv1.NetworkPolicySpec
	if err := yaml.UnmarshalStrict([]byte(yml), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestIsolatePodPolicies(t *testing.T) {
	const dns = `
  - to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
      podSelector: {matchLabels: {k8s-app: kube-dns}}
    ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]`
	for _, tc := range []struct{ params, want string }{
		{"", "policyTypes: [Ingress, Egress]"},
		{"direction: ingress", "policyTypes: [Ingress]"},
		{"direction: egress", "policyTypes: [Egress]"},
		{"{direction: egress, allowDNS: true}", "policyTypes: [Egress]\negress:" + dns},
		{"{direction: ingress, allowDNS: true}", "policyTypes: [Ingress]"},
		{
			"{direction: both, allowDNS: true, allowCIDRs: [10.1.0.0/16, 2001:db8::/32]}", `policyTypes: [Ingress, Egress]
ingress:
  - from: [{ipBlock: {cidr: 10.1.0.0/16}}]
  - from: [{ipBlock: {cidr: "2001:db8::/32"}}]
egress:
  - to: [{ipBlock: {cidr: 10.1.0.0/16}}]
  - to: [{ipBlock: {cidr: "2001:db8::/32"}}]` + dns,
		},
	} {
		t.Run(tc.params, func(t *testing.T) {
			a := newActor(t, "isolate-pod", nil)
			res := a.act("s1", tc.params)
			want := spec(t, tc.want)
			want.PodSelector.MatchLabels = map[string]string{"stoop.dev/isolated": string(a.pod.UID)}
			got := a.policy()
			if !reflect.DeepEqual(got.Spec, want) {
				t.Errorf("the policy is\n%+v, want\n%+v", got.Spec, want)
			}
			if got.Labels["app.kubernetes.io/managed-by"] != "stoop" {
				t.Errorf("its labels are %v", got.Labels)
			}
			if res.Nothing || res.Undo == nil || res.TTL != 0 || res.Found["policy"] != got.Name {
				t.Errorf("the result is %+v", res)
			}
		})
	}
}

func TestIsolatePodAgain(t *testing.T) {
	t.Run("as before", func(t *testing.T) {
		a := newActor(t, "isolate-pod", nil)
		first := a.act("s1", "ttl: 1h")
		before := a.policy()
		second := a.act("s2", "ttl: 2h")
		if first.Nothing || first.TTL != time.Hour || !second.Nothing || second.Undo != nil || second.TTL != 0 || !strings.Contains(second.Reason, "s1") {
			t.Errorf("results %+v and %+v", first, second)
		}
		if a.policy().ResourceVersion != before.ResourceVersion {
			t.Error("the policy was written again")
		}
	})
	for _, tc := range []struct{ name, first, second, want string }{
		{"the other direction", "direction: ingress", "direction: egress", "policyTypes: [Ingress, Egress]"},
		{"both", "direction: ingress", "direction: both", "policyTypes: [Ingress, Egress]"},
		{"nothing allowed any more", "{direction: egress, allowDNS: true, allowCIDRs: [10.0.0.0/8]}", "direction: egress", "policyTypes: [Egress]"},
		{
			"only what both allow", "{direction: egress, allowCIDRs: [10.0.0.0/8, 192.0.2.0/24]}", "{direction: egress, allowCIDRs: [192.0.2.0/24, 198.51.100.0/24]}",
			"policyTypes: [Egress]\negress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}]}]",
		},
		{
			"the other direction keeps what it allowed", "{direction: egress, allowCIDRs: [10.0.0.0/8]}", "direction: ingress",
			"policyTypes: [Ingress, Egress]\negress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}]",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newActor(t, "isolate-pod", nil)
			first := a.act("s1", tc.first)
			second := a.act("s2", tc.second)
			want := spec(t, tc.want)
			want.PodSelector.MatchLabels = map[string]string{"stoop.dev/isolated": string(a.pod.UID)}
			if got := a.policy().Spec; !reflect.DeepEqual(got, want) {
				t.Errorf("the policy is\n%+v, want\n%+v", got, want)
			}
			if second.Nothing || second.Undo == nil {
				t.Errorf("the second step came to %+v", second)
			}
			// The first step's ttl must not let back what the second cut off.
			if u := a.undo("s1", first); !u.Nothing || !strings.Contains(u.Reason, "s2") || a.policy() == nil {
				t.Errorf("undo of the first: %+v, policy %v", u, a.policy())
			}
			if u := a.undo("s2", second); u.Nothing || a.policy() != nil || a.labels()["stoop.dev/isolated"] != "" {
				t.Errorf("undo of the second: %+v, policy %v, labels %v", u, a.policy(), a.labels())
			}
		})
	}
	t.Run("less is no less", func(t *testing.T) {
		a := newActor(t, "isolate-pod", nil)
		a.act("s1", "")
		if res := a.act("s2", "{direction: egress, allowCIDRs: [0.0.0.0/0]}"); !res.Nothing {
			t.Errorf("result %+v", res)
		}
		if s := a.policy().Spec; len(s.PolicyTypes) != 2 || s.Egress != nil {
			t.Errorf("the policy lets something through: %+v", s)
		}
	})
	t.Run("the label was taken off", func(t *testing.T) {
		a := newActor(t, "isolate-pod", nil)
		a.act("s1", "")
		now, err := a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		delete(now.Labels, "stoop.dev/isolated")
		if _, err := a.admin.CoreV1().Pods("shop").Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if res := a.act("s2", ""); res.Nothing || a.labels()["stoop.dev/isolated"] != string(a.pod.UID) {
			t.Errorf("result %+v, labels %v", res, a.labels())
		}
	})
	t.Run("by the same step, whose answer was lost", func(t *testing.T) {
		a := newActor(t, "isolate-pod", nil)
		a.act("s1", "ttl: 1h")
		if res := a.act("s1", "ttl: 1h"); res.Nothing || res.Undo == nil || res.TTL != time.Hour {
			t.Errorf("result %+v: its undo would be lost", res)
		}
	})
}

func TestIsolatePodLeavesOthersPoliciesAlone(t *testing.T) {
	for name, edit := range map[string]func(p *networkingv1.NetworkPolicy){
		"a tenant's":        func(p *networkingv1.NetworkPolicy) { p.Labels = nil },
		"of another tool":   func(p *networkingv1.NetworkPolicy) { p.Labels["app.kubernetes.io/managed-by"] = "Helm" },
		"of another pod":    func(p *networkingv1.NetworkPolicy) { p.Labels["stoop.dev/pod-uid"] = "other" },
		"without an owner":  func(p *networkingv1.NetworkPolicy) { p.OwnerReferences = nil },
		"of another owner":  func(p *networkingv1.NetworkPolicy) { p.OwnerReferences[0].UID = "other" },
		"selecting all":     func(p *networkingv1.NetworkPolicy) { p.Spec.PodSelector = metav1.LabelSelector{} },
		"selecting another": func(p *networkingv1.NetworkPolicy) { p.Spec.PodSelector.MatchLabels = map[string]string{"app": "web"} },
	} {
		t.Run(name, func(t *testing.T) {
			a := newActor(t, "isolate-pod", nil)
			uid := string(a.pod.UID)
			p := &networkingv1.NetworkPolicy{
				ObjectMeta: metav1.ObjectMeta{
					Name:            "stoop-isolate-" + uid,
					Labels:          map[string]string{"app.kubernetes.io/managed-by": "stoop", "stoop.dev/pod-uid": uid},
					OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "web-0", UID: a.pod.UID}},
				},
				Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"stoop.dev/isolated": uid}}},
			}
			edit(p)
			before, err := a.admin.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), p, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, resumed := range []bool{false, true} {
				r := a.request("s1", "")
				r.Resumed = resumed
				_, err = a.Act(t.Context(), r)
				if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "left alone") {
					t.Errorf("status %s: %s", status, reason)
				}
			}
			if after := a.policy(); after.ResourceVersion != before.ResourceVersion {
				t.Errorf("the policy was touched: %+v", after)
			}
			if a.labels()["stoop.dev/isolated"] != "" {
				t.Error("the pod was labelled for a policy that is not stoop's")
			}
		})
	}
}

func TestIsolatePodNamesPoliciesThatStillAllow(t *testing.T) {
	a := newActor(t, "isolate-pod", nil)
	for _, p := range []string{
		`{metadata: {name: open-egress}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{}]}}`,
		`{metadata: {name: by-expression}, spec: {podSelector: {matchExpressions: [{key: app, operator: In, values: [web, api]}]}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}}`,
		`{metadata: {name: all-pods}, spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}}`,
		`{metadata: {name: only-ingress}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{}]}}`,
		`{metadata: {name: deny}, spec: {podSelector: {}, policyTypes: [Egress]}}`,
		`{metadata: {name: another-app}, spec: {podSelector: {matchLabels: {app: api}}, policyTypes: [Egress], egress: [{}]}}`,
	} {
		a.addPolicy(p)
	}
	res := a.act("s1", "direction: egress")
	const want = "all-pods, by-expression, open-egress"
	if res.Found["otherPolicies"] != want || !strings.Contains(res.Reason, want) {
		t.Errorf("found %v, reason %q; want %s named", res.Found, res.Reason, want)
	}
	if res.Nothing {
		t.Error("the step says that nothing was done")
	}
}

func TestIsolatePodRefusesTheHostsNetwork(t *testing.T) {
	a := newActor(t, "isolate-pod", func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	r := a.request("s1", "")
	for name, err := range map[string]error{
		"check": a.Responder.(responders.Checker).Check(t.Context(), r),
		"act":   func() error { _, err := a.Act(t.Context(), r); return err }(),
	} {
		if status, _, _, _ := responders.Classify(err); status != broker.Refused {
			t.Errorf("%s: %v", name, err)
		}
	}
	if a.policy() != nil {
		t.Error("there is a policy")
	}
}

// The pod went between two requests: no policy may be left for it.
func TestIsolatePodCleansUpForAPodThatWent(t *testing.T) {
	a := newActor(t, "isolate-pod", nil)
	if err := a.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
		t.Fatal(err)
	}
	_, err := a.Act(t.Context(), a.request("s1", ""))
	if status, _, _, _ := responders.Classify(err); status != broker.Nothing {
		t.Errorf("error %v", err)
	}
	if a.policy() != nil {
		t.Error("the policy is left")
	}
}

func TestIsolatePodUndoBelievesOnlyItsRecord(t *testing.T) {
	a := newActor(t, "isolate-pod", nil)
	res := a.act("s1", "")
	for _, record := range []string{"", "{}", "[]", `{"policy":"x"}`, `{"namespace":"shop","pod":"web-0","policy":"x","uid":"1"}`} {
		_, err := a.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: json.RawMessage(record)})
		if status, _, _, _ := responders.Classify(err); status != broker.Refused {
			t.Errorf("record %q: error %v", record, err)
		}
	}
	// Someone else's policy that took the name.
	old := a.policy()
	if err := a.admin.NetworkingV1().NetworkPolicies("shop").Delete(t.Context(), old.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	theirs := a.addPolicy("{metadata: {name: " + old.Name + "}, spec: {podSelector: {}}}")
	if u := a.undo("s1", res); !u.Nothing {
		t.Errorf("undo came to %+v", u)
	}
	if p := a.policy(); p == nil || p.UID != theirs.UID {
		t.Error("another's policy was deleted")
	}
}
