package responders_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	corev1 "k8s.io/api/core/v1"

	"stoop/responders"
	"stoop/responders/conformance"
)

const (
	ciliumPath  = "/apis/cilium.io/v2/namespaces/shop/ciliumnetworkpolicies"
	calicoPath  = "/apis/projectcalico.org/v3/globalnetworkpolicies"
	clusterPath = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"
)

// newDenyActor is one in a cluster that lacks some API groups.
func newDenyActor(t testing.TB, responder string, edit func(*corev1.Pod), without ...string) (*actor, *conformance.Server) {
	s := conformance.NewServer(t)
	for _, group := range without {
		s.Remove(group)
	}
	client, err := responders.NewKube(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-0", Labels: map[string]string{"app": "web"}}, Spec: corev1.PodSpec{NodeName: testNode}}
	if edit != nil {
		edit(pod)
	}
	a := &actor{t: t, admin: s.Admin(), entry: entryOf(t, responder)}
	if a.pod, err = a.admin.CoreV1().Pods("shop").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	a.Responder = a.entry.New(responders.Env{Kube: client, Node: testNode})
	return a, s
}

// object is what stands at a path, or nil; "" is the pod's policy.
func (a *actor) object(path, name string) map[string]any {
	a.t.Helper()
	if name == "" {
		name = "stoop-isolate-" + string(a.pod.UID)
	}
	raw, err := a.admin.CoreV1().RESTClient().Get().AbsPath(path, name).Do(a.t.Context()).Raw()
	if apierrors.IsNotFound(err) {
		return nil
	}
	var o map[string]any
	if err == nil {
		err = json.Unmarshal(raw, &o)
	}
	if err != nil {
		a.t.Fatal(err)
	}
	return o
}

func (a *actor) put(verb, path string, o map[string]any) {
	a.t.Helper()
	body, err := json.Marshal(o)
	if err != nil {
		a.t.Fatal(err)
	}
	if err := a.admin.CoreV1().RESTClient().Verb(verb).AbsPath(path).SetHeader("Content-Type", "application/json").Body(body).Do(a.t.Context()).Error(); err != nil {
		a.t.Fatal(err)
	}
}

func at(t testing.TB, o any, keys ...any) any {
	t.Helper()
	for _, k := range keys {
		switch k := k.(type) {
		case string:
			m, _ := o.(map[string]any)
			o = m[k]
		case int:
			l, _ := o.([]any)
			if k >= len(l) {
				return nil
			}
			o = l[k]
		}
	}
	return o
}

func TestDenyAgain(t *testing.T) {
	t.Run("as before", func(t *testing.T) {
		a, _ := newDenyActor(t, "calico-isolate", nil)
		first := a.act("s1", "{ttl: 1h, allowCIDRs: [10.0.0.0/8]}")
		before := at(t, a.object(calicoPath, ""), "metadata", "resourceVersion")
		second := a.act("s2", "{ttl: 2h, allowCIDRs: [10.0.0.0/8]}")
		if first.Nothing || first.TTL != time.Hour || !second.Nothing || second.Undo != nil || second.TTL != 0 || !strings.Contains(second.Reason, "s1") {
			t.Errorf("results %+v and %+v", first, second)
		}
		if now := at(t, a.object(calicoPath, ""), "metadata", "resourceVersion"); now != before {
			t.Error("the policy was written again")
		}
	})
	t.Run("more", func(t *testing.T) {
		a, _ := newDenyActor(t, "calico-isolate", nil)
		first := a.act("s1", "{direction: egress, allowDNS: true, allowCIDRs: [10.0.0.0/8, 192.0.2.0/24]}")
		second := a.act("s2", "{allowCIDRs: [192.0.2.0/24, 198.51.100.0/24]}")
		spec := at(t, a.object(calicoPath, ""), "spec")
		want := []any{
			map[string]any{"action": "Allow", "destination": map[string]any{"nets": []any{"192.0.2.0/24"}}},
			map[string]any{"action": "Deny"},
		}
		if got := at(t, spec, "egress"); !reflect.DeepEqual(got, want) {
			t.Errorf("egress: %v", got)
		}
		if got := at(t, spec, "ingress", 1, "source", "nets", 0); got != "198.51.100.0/24" {
			t.Errorf("ingress: %v", at(t, spec, "ingress"))
		}
		// The first step's ttl must not let back what the second cut off.
		if u := a.undo("s1", first); !u.Nothing || !strings.Contains(u.Reason, "s2") || a.object(calicoPath, "") == nil {
			t.Errorf("undo of the first: %+v", u)
		}
		if u := a.undo("s2", second); u.Nothing || a.object(calicoPath, "") != nil || len(a.labels()) != 1 {
			t.Errorf("undo of the second: %+v, labels %v", u, a.labels())
		}
	})
	t.Run("less is no less", func(t *testing.T) {
		a, _ := newDenyActor(t, "cluster-isolate", nil)
		a.act("s1", "")
		if res := a.act("s2", "{direction: egress, allowCIDRs: [0.0.0.0/0], allowDNS: true}"); !res.Nothing {
			t.Errorf("result %+v", res)
		}
	})
	t.Run("somebody has changed it", func(t *testing.T) {
		for _, edit := range []func(o map[string]any){
			func(o map[string]any) { delete(o["spec"].(map[string]any), "egressDeny") },
			func(o map[string]any) {
				at(t, o, "spec", "egressDeny", 0).(map[string]any)["toPorts"] = []any{map[string]any{"ports": []any{map[string]any{"port": "1"}}}}
			},
			func(o map[string]any) {
				at(t, o, "metadata", "annotations").(map[string]any)["stoop.dev/denies"] = `{"ingress":{}}`
			},
		} {
			a, _ := newDenyActor(t, "cilium-isolate", nil)
			a.act("s1", "")
			whole := a.object(ciliumPath, "")["spec"]
			o := a.object(ciliumPath, "")
			edit(o)
			a.put("PUT", ciliumPath+"/stoop-isolate-"+string(a.pod.UID), o)
			if res := a.act("s2", ""); res.Nothing || res.Undo == nil {
				t.Errorf("result %+v", res)
			}
			if now := a.object(ciliumPath, "")["spec"]; !reflect.DeepEqual(now, whole) {
				t.Errorf("the policy is %v", now)
			}
		}
	})
}

func TestDenyIsNotServed(t *testing.T) {
	for name, group := range map[string]string{"cilium-isolate": "cilium.io", "calico-isolate": "projectcalico.org", "cluster-isolate": "policy.networking.k8s.io"} {
		a, _ := newDenyActor(t, name, nil, group)
		r := a.request("s1", "")
		_, err := a.Act(t.Context(), r)
		for _, err := range []error{err, a.Responder.(responders.Checker).Check(t.Context(), r)} {
			if status, retry, _, reason := responders.Classify(err); status != "refused" || retry || !strings.Contains(reason, "policies."+group) {
				t.Errorf("%s: %s, %s", name, status, reason)
			}
		}
		if len(a.labels()) != 1 {
			t.Errorf("%s: labels %v", name, a.labels())
		}
	}
}

func TestDenyForeignPolicy(t *testing.T) {
	a, _ := newDenyActor(t, "cluster-isolate", nil)
	a.put("POST", clusterPath, map[string]any{
		"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
		"metadata": map[string]any{"name": "stoop-isolate-" + string(a.pod.UID)}, "spec": map[string]any{"tier": "Admin"},
	})
	_, err := a.Act(t.Context(), a.request("s1", ""))
	if status, _, _, reason := responders.Classify(err); status != "refused" || !strings.Contains(reason, "not made by stoop") {
		t.Errorf("%s: %s", status, reason)
	}
	if o := a.object(clusterPath, ""); len(o["spec"].(map[string]any)) != 1 || len(a.labels()) != 1 {
		t.Errorf("it was touched: %v, labels %v", o, a.labels())
	}
}

// A policy in no namespace has no owner: stoop itself takes it away when there is no
// pod to label.
func TestDenyOfAPodThatIsGone(t *testing.T) {
	for _, how := range []string{"new", "further try", "resumed"} {
		t.Run(how, func(t *testing.T) {
			a, _ := newDenyActor(t, "calico-isolate", nil)
			if how != "new" { // a try of the step that got no further than this
				a.act("s1", "")
			}
			if err := a.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			r := a.request("s1", "")
			r.Resumed = how == "resumed"
			_, err := a.Act(t.Context(), r)
			if status, _, _, _ := responders.Classify(err); status != "nothing" {
				t.Errorf("error %v", err)
			}
			if o := a.object(calicoPath, ""); o != nil {
				t.Errorf("the policy is left: %v", o)
			}
		})
	}
	t.Run("at its end", func(t *testing.T) {
		a, _ := newDenyActor(t, "calico-isolate", nil)
		res := a.act("s1", "")
		if err := a.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
			t.Fatal(err)
		}
		if u := a.undo("s1", res); u.Nothing || a.object(calicoPath, "") != nil {
			t.Errorf("undo: %+v; the policy: %v", u, a.object(calicoPath, ""))
		}
	})
	t.Run("that may not be labelled", func(t *testing.T) {
		a, s := newDenyActor(t, "calico-isolate", nil)
		s.Forbid(t, "patch", "", "pods")
		if _, err := a.Act(t.Context(), a.request("s1", "")); err == nil {
			t.Error("no error")
		}
		if o := a.object(calicoPath, ""); o != nil {
			t.Errorf("the policy is left: %v", o)
		}
	})
}

func TestDenyUndoWithoutTheKind(t *testing.T) {
	a, s := newDenyActor(t, "cilium-isolate", nil)
	res := a.act("s1", "")
	s.Remove("cilium.io")
	kube, err := responders.NewKube(s.Config()) // that remembers nothing
	if err != nil {
		t.Fatal(err)
	}
	a.Responder = a.entry.New(responders.Env{Kube: kube, Node: testNode})
	if u := a.undo("s1", res); u.Nothing || len(a.labels()) != 1 {
		t.Errorf("undo: %+v, labels %v", u, a.labels())
	}
	for _, record := range []string{"", "{}", `{"namespace":"shop","pod":"web-0","uid":"x","policy":"p","policyUID":"y","kind":"other"}`} {
		_, err := a.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: json.RawMessage(record)})
		if status, _, _, _ := responders.Classify(err); status != "refused" {
			t.Errorf("record %q: %v", record, err)
		}
	}
}

func TestCalicoTier(t *testing.T) {
	a, _ := newDenyActor(t, "calico-isolate", nil)
	res := a.act("s1", "{tier: security, allowCIDRs: [10.0.0.0/8]}")
	o := a.object(calicoPath, "security.stoop-isolate-"+string(a.pod.UID))
	if at(t, o, "spec", "tier") != "security" || at(t, o, "spec", "egress", 0, "action") != "Pass" || at(t, o, "spec", "egress", 1, "action") != "Deny" {
		t.Errorf("the policy is %v", o)
	}
	a.undo("s1", res)
	if o := a.object(calicoPath, "security.stoop-isolate-"+string(a.pod.UID)); o != nil {
		t.Errorf("the policy is left: %v", o)
	}
	if bad := problems(t, a.entry, `tier: "a b"`); len(bad) == 0 {
		t.Error("a tier that is no name is taken")
	}
}

func TestClusterPolicyHoldsItsRules(t *testing.T) {
	a, _ := newDenyActor(t, "cluster-isolate", nil)
	var cidrs []string
	for i := range 60 {
		cidrs = append(cidrs, fmt.Sprintf("10.%d.0.0/16", i))
	}
	a.act("s1", "{direction: egress, allowCIDRs: ["+strings.Join(cidrs, ", ")+"]}")
	egress := at(t, a.object(clusterPath, ""), "spec", "egress").([]any)
	n := 0
	for _, rule := range egress[:len(egress)-1] {
		nets := at(t, rule, "to", 0, "networks").([]any)
		if n += len(nets); len(nets) > 25 {
			t.Errorf("a rule has %d networks, and the kind takes 25", len(nets))
		}
	}
	if n != 60 || at(t, egress, len(egress)-1, "action") != "Deny" {
		t.Errorf("%d networks: %v", n, egress)
	}
	if bad := problems(t, a.entry, "allowCIDRs: ["+strings.Repeat("10.0.0.0/8, ", 501)+"]"); !strings.Contains(strings.Join(bad, " "), "500") {
		t.Errorf("501 ranges: %q", bad)
	}
}

func TestStrongest(t *testing.T) {
	const cilium, calico, cluster = "cilium.io", "projectcalico.org", "policy.networking.k8s.io"
	for _, tc := range []struct {
		name, params string
		without      []string
		want, path   string
		says         string
	}{
		{"all", "", nil, "cilium", ciliumPath, "CiliumNetworkPolicy"},
		{"no Cilium", "", []string{cilium}, "calico", calicoPath, "GlobalNetworkPolicy"},
		{"Kubernetes' own", "", []string{cilium, calico}, "cluster", clusterPath, "ClusterNetworkPolicy"},
		{"none", "", []string{cilium, calico, cluster}, "standard", "", "serves no kind"},
		{"exceptions", ", allowDNS: true", nil, "calico", calicoPath, "GlobalNetworkPolicy"},
		{"exceptions, and only Cilium", ", allowCIDRs: [10.0.0.0/8]", []string{calico, cluster}, "standard", "", "can't make exceptions"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, _ := newDenyActor(t, "isolate-pod", nil, tc.without...)
			res := a.act("s1", "{strength: strongest, ttl: 1h"+tc.params+"}")
			if res.Nothing || res.Found["strength"] != tc.want || !strings.Contains(res.Reason, tc.says) || res.TTL != time.Hour {
				t.Errorf("result %+v", res)
			}
			if a.policy() == nil || a.labels()["stoop.dev/isolated"] != string(a.pod.UID) {
				t.Error("the pod is not isolated by a NetworkPolicy")
			}
			if tc.path != "" && (a.object(tc.path, "") == nil || a.labels()["stoop.dev/isolated-"+tc.want] != string(a.pod.UID)) {
				t.Errorf("there is no policy that denies, or no label: %v", a.labels())
			}
			if again := a.act("s2", "{strength: strongest"+tc.params+"}"); !again.Nothing || again.Undo != nil {
				t.Errorf("once more: %+v", again)
			}
			u := a.undo("s1", res)
			if u.Nothing || a.policy() != nil || len(a.labels()) != 1 || tc.path != "" && a.object(tc.path, "") != nil {
				t.Errorf("undo: %+v, labels %v", u, a.labels())
			}
			if u := a.undo("s1", res); !u.Nothing {
				t.Errorf("undo once more: %+v", u)
			}
		})
	}
	t.Run("on top of an isolation", func(t *testing.T) {
		a, _ := newDenyActor(t, "isolate-pod", nil)
		a.act("s1", "")
		res := a.act("s2", "strength: strongest")
		if res.Nothing || res.Undo == nil {
			t.Fatalf("result %+v", res)
		}
		a.undo("s2", res)
		if a.policy() == nil || a.labels()["stoop.dev/isolated"] == "" || a.object(ciliumPath, "") != nil {
			t.Errorf("the isolation of s1 is gone, or that of s2 stands: labels %v", a.labels())
		}
	})
	t.Run("it may not", func(t *testing.T) {
		a, s := newDenyActor(t, "isolate-pod", nil, calico, cluster)
		s.Forbid(t, "create", cilium, "ciliumnetworkpolicies")
		res := a.act("s1", "strength: strongest")
		if res.Found["strength"] != "standard" || !strings.Contains(res.Reason, "missing permission") || res.Undo == nil {
			t.Errorf("result %+v", res)
		}
	})
	t.Run("host network", func(t *testing.T) {
		a, _ := newDenyActor(t, "cilium-isolate", func(p *corev1.Pod) { p.Spec.HostNetwork = true })
		if _, err := a.Act(t.Context(), a.request("s1", "")); err == nil || !strings.Contains(err.Error(), "host's network") {
			t.Errorf("error %v", err)
		}
	})
}

func TestIsolateGrants(t *testing.T) {
	e := entryOf(t, "isolate-pod")
	has := func(params, group string) bool {
		for _, r := range e.PermissionsFor(checked(t, e, params)) {
			if r.APIGroups[0] == group {
				return true
			}
		}
		return false
	}
	for _, group := range []string{"cilium.io", "projectcalico.org", "policy.networking.k8s.io"} {
		if has("", group) || !has("strength: strongest", group) {
			t.Errorf("%s: %t without strength, %t with it", group, has("", group), has("strength: strongest", group))
		}
	}
}
