package responders_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

// relabel gives the pod labels besides those it has.
func (m *member) relabel(set map[string]string) {
	m.t.Helper()
	m.changePod(func(p *corev1.Pod) { p.Labels = maps.Clone(p.Labels); maps.Copy(p.Labels, set) })
}

func (m *member) wantLabels(want map[string]string) {
	m.t.Helper()
	if got := m.labels(); !maps.Equal(got, want) {
		m.t.Errorf("the pod's labels are %v, want %v", got, want)
	}
}

// isolated is the label of the isolated pod with others.
func (m *member) isolated(set map[string]string) map[string]string {
	set = maps.Clone(set)
	if set == nil {
		set = map[string]string{}
	}
	set["stoop.dev/isolated"] = string(m.pod.UID)
	return set
}

func (m *member) policies() []string {
	m.t.Helper()
	list, err := m.admin.NetworkingV1().NetworkPolicies("shop").List(m.t.Context(), metav1.ListOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	var names []string
	for _, p := range list.Items {
		names = append(names, p.Name)
	}
	return names
}

func (m *member) makePolicy(name string, selector metav1.LabelSelector) {
	m.t.Helper()
	_, err := m.admin.NetworkingV1().NetworkPolicies("shop").Create(m.t.Context(), &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.NetworkPolicySpec{PodSelector: selector},
	}, metav1.CreateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
}

func TestQuarantinePod(t *testing.T) {
	t.Run("out of its services and its replica set", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3) // selected by app and pod-template-hash
		m.relabel(map[string]string{"role": "front", "tier": "gold"})
		makeService := func(name string, selector map[string]string) {
			conformance.MakeService(t, m.admin, "shop", name, selector)
		}
		makeService("web", map[string]string{"role": "front"})
		makeService("other", map[string]string{"tier": "silver"})
		makeService("headless", nil)
		conformance.MakeService(t, m.admin, "other", "web", map[string]string{"tier": "gold"})
		m.makePolicy("by-app", metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}})
		m.makePolicy("by-tier", metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}})
		m.makePolicy("all", metav1.LabelSelector{})
		before := m.labels()
		m.writes = nil

		res := m.act("s1", "")
		m.wantLabels(m.isolated(map[string]string{"tier": "gold"}))
		m.wantWrites("POST networkpolicies ", `PATCH pods/web-0 {"metadata":{"labels":{"stoop.dev/isolated"`, "PATCH pods/web-0 ")
		want := map[string]string{
			"policy": "stoop-isolate-" + string(m.pod.UID), "labels": "app, pod-template-hash, role",
			"selectedBy": `"ReplicaSet web-7d4", Service web`, "policiesLost": "by-app",
		}
		if res.Nothing || !reflect.DeepEqual(res.Found, want) || !strings.Contains(res.Reason, "no longer select the pod: by-app") {
			t.Errorf("%+v", res)
		}

		if u := m.undo("s1", res); u.Nothing || !strings.Contains(u.Reason, "perhaps this one") {
			t.Errorf("%+v", u)
		}
		m.wantLabels(before)
		if got := m.policies(); !slices.Equal(got, []string{"all", "by-app", "by-tier"}) {
			t.Errorf("policies %v", got)
		}
		if u := m.undo("s1", res); !u.Nothing {
			t.Errorf("again: %+v", u)
		}
		m.wantLabels(before)
	})
	t.Run("a daemon set", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		ds, err := m.admin.AppsV1().DaemonSets("shop").Create(t.Context(), &appsv1.DaemonSet{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
				{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"web", "web2"}},
				{Key: "tier", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"silver"}},
			}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.pod = conformance.Control(t, m.admin, m.pod, ds, "DaemonSet")
		m.relabel(map[string]string{"tier": "gold"})
		m.act("s1", "")
		m.wantLabels(m.isolated(map[string]string{"tier": "gold"}))
	})
	t.Run("isolated only", func(t *testing.T) {
		for _, c := range []struct{ apiVersion, kind, word string }{
			{"apps/v1", "StatefulSet", "can't replace the pod as long as it has its name"},
			{"batch/v1", "Job", "begin its work anew"},
			{"example.com/v1", "Shop", "is not known"},
		} {
			m := newMember(t, "quarantine-pod")
			conformance.MakeService(t, m.admin, "shop", "web", map[string]string{"app": "web"})
			m.owned(metav1.OwnerReference{APIVersion: c.apiVersion, Kind: c.kind, Name: "web", UID: "1"})
			res := m.act("s1", "")
			m.wantLabels(m.isolated(map[string]string{"app": "web"}))
			if res.Nothing || !strings.Contains(res.Reason, c.word) || !strings.Contains(res.Reason, `"`+c.kind+` web"`) {
				t.Errorf("%s: %+v", c.kind, res)
			}
			if u := m.undo("s1", res); u.Nothing {
				t.Errorf("%s: undo: %+v", c.kind, u)
			}
			m.wantLabels(map[string]string{"app": "web"})
		}
	})
	t.Run("neither controller nor service", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		res := m.act("s1", "")
		m.wantLabels(m.isolated(map[string]string{"app": "web"}))
		if res.Nothing || !strings.Contains(res.Reason, "keeps its labels") {
			t.Errorf("%+v", res)
		}
	})
	t.Run("a controller that went", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		conformance.MakeService(t, m.admin, "shop", "web", map[string]string{"app": "web"})
		m.owned(metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "1"})
		m.act("s1", "")
		m.wantLabels(m.isolated(nil))
	})
	t.Run("another controller of the name", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		_, rs := m.deployment(3)
		m.owned(metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: rs.Name, UID: "1"})
		m.act("s1", "")
		m.wantLabels(m.isolated(map[string]string{"app": "web", "pod-template-hash": "7d4"}))
	})
	t.Run("a controller that does not select it any more", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3)
		m.relabel(map[string]string{"pod-template-hash": "another"})
		m.act("s1", "")
		m.wantLabels(m.isolated(map[string]string{"app": "web", "pod-template-hash": "another"}))
	})
	// Whoever may make Services can't have the isolation taken off.
	t.Run("a service that selects stoop's label", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		conformance.MakeService(t, m.admin, "shop", "trap", map[string]string{"stoop.dev/isolated": string(m.pod.UID)})
		conformance.MakeService(t, m.admin, "shop", "web", map[string]string{"app": "web"})
		res := m.act("s1", "")
		m.wantLabels(m.isolated(nil))
		if !strings.Contains(res.Reason, "these select it even so: Service trap") {
			t.Errorf("%+v", res)
		}
	})
	t.Run("no label without isolation", func(t *testing.T) {
		for name, spoil := range map[string]func(m *member){
			"no policy can be made": func(m *member) { m.server.Forbid(t, "create", "networking.k8s.io", "networkpolicies") },
			"a foreign policy of the name": func(m *member) {
				m.makePolicy("stoop-isolate-"+string(m.pod.UID), metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}})
			},
			"the host's network": func(m *member) {
				m.changePod(func(p *corev1.Pod) { p.Spec.HostNetwork = true })
			},
			"the isolation is lifted at once": func(m *member) {
				m.after = func(req *http.Request) {
					if req.Method == http.MethodPatch {
						m.changePod(func(p *corev1.Pod) { delete(p.Labels, "stoop.dev/isolated") })
					}
				}
			},
			"another pod of the name": func(m *member) {
				m.before = func(req *http.Request) {
					if req.Method == http.MethodPatch {
						// The next pod of the name, which has no label.
						err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
						if err != nil {
							t.Error(err)
						}
						m.newPod("web-0")
					}
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				m := newMember(t, "quarantine-pod")
				conformance.MakeService(t, m.admin, "shop", "web", map[string]string{"app": "web"})
				spoil(m)
				if res, err := m.Act(t.Context(), m.request("s1", "")); err == nil {
					t.Errorf("no error: %+v", res)
				}
				m.wantLabels(map[string]string{"app": "web"})
			})
		}
	})
	t.Run("services that can't be read", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.server.Forbid(t, "list", "", "services")
		_, err := m.Act(t.Context(), m.request("s1", ""))
		if status, _, _, reason := responders.Classify(err); status != broker.Failed || !strings.Contains(reason, "list services") {
			t.Errorf("status %s: %s", status, reason)
		}
		m.wantLabels(m.isolated(map[string]string{"app": "web"}))
	})
	t.Run("changed in between", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3)
		patches := 0
		m.before = func(req *http.Request) {
			if req.Method == http.MethodPatch {
				if patches++; patches == 2 {
					m.relabel(map[string]string{"more": "x"})
				}
			}
		}
		r := m.request("s1", "")
		_, err := m.Act(t.Context(), r)
		if status, retry, _, reason := responders.Classify(err); status != broker.Failed || !retry {
			t.Errorf("status %s, retry %t: %s", status, retry, reason)
		}
		m.wantLabels(m.isolated(map[string]string{"app": "web", "pod-template-hash": "7d4", "more": "x"}))
	})
}

func TestQuarantinePodUndo(t *testing.T) {
	begin := func(t *testing.T) (*member, responders.Result) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3)
		conformance.MakeService(t, m.admin, "shop", "web", map[string]string{"app": "web"})
		return m, m.act("s1", "")
	}
	t.Run("what others changed is left", func(t *testing.T) {
		m, res := begin(t)
		m.relabel(map[string]string{"app": "forensics"})
		if u := m.undo("s1", res); u.Nothing || !strings.Contains(u.Reason, "left: app") {
			t.Errorf("%+v", u)
		}
		m.wantLabels(map[string]string{"app": "forensics", "pod-template-hash": "7d4"})
	})
	t.Run("labels first", func(t *testing.T) {
		m, res := begin(t)
		m.writes = nil
		m.undo("s1", res)
		m.wantWrites(`PATCH pods/web-0 {"metadata":{"labels":{"app":"web"`, `PATCH pods/web-0 {"metadata":{"labels":{"stoop.dev/isolated":null`, "DELETE networkpolicies/")
	})
	t.Run("the pod is gone, its policy is not", func(t *testing.T) {
		m, res := begin(t)
		if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
			t.Fatal(err)
		}
		next := m.newPod("web-0")
		if u := m.undo("s1", res); u.Nothing || len(m.policies()) != 0 {
			t.Errorf("%+v, policies %v", u, m.policies())
		}
		if now, err := m.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{}); err != nil || now.ResourceVersion != next.ResourceVersion {
			t.Errorf("the next pod was touched: %+v, %v", now, err)
		}
	})
	t.Run("isolated by another step before", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3)
		isolate := entryOf(t, "isolate-pod").New(m.env)
		first, err := isolate.Act(t.Context(), m.request("s0", ""))
		if err != nil {
			t.Fatal(err)
		}
		res := m.act("s1", "")
		if res.Nothing || res.Undo == nil {
			t.Fatalf("%+v", res)
		}
		m.wantLabels(m.isolated(nil))
		m.undo("s1", res)
		m.wantLabels(m.isolated(map[string]string{"app": "web", "pod-template-hash": "7d4"}))
		if u, err := isolate.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s0", Record: first.Undo}); err != nil || u.Nothing {
			t.Errorf("%+v, %v", u, err)
		}
		m.wantLabels(map[string]string{"app": "web", "pod-template-hash": "7d4"})
	})
	// Neither is lost what stands already when the rest fails, or its ttl would never
	// lift it.
	t.Run("isolated, and then it failed", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.server.Forbid(t, "list", "", "services")
		r := m.request("s1", "ttl: 1h")
		var intended json.RawMessage
		responders.OnIntend(r, func(undo json.RawMessage) { intended = undo })
		res, err := m.Act(t.Context(), r)
		if status, _, _, _ := responders.Classify(err); status != broker.Failed || res.Undo == nil || res.TTL != time.Hour {
			t.Fatalf("%+v, %v", res, err)
		}
		m.wantLabels(m.isolated(map[string]string{"app": "web"}))
		for name, record := range map[string]json.RawMessage{"intended": intended, "returned": res.Undo} {
			if _, err := m.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: record}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			m.wantLabels(map[string]string{"app": "web"})
		}
		if p := m.policies(); len(p) > 0 {
			t.Errorf("policies %v", p)
		}
	})
	t.Run("a selector that can't be read", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		_, rs := m.deployment(3)
		rs.Spec.Selector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "app", Operator: "Near"}}
		if _, err := m.admin.AppsV1().ReplicaSets("shop").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		res, err := m.Act(t.Context(), m.request("s1", ""))
		if status, _, _, _ := responders.Classify(err); status != broker.Failed || res.Undo == nil {
			t.Errorf("status %s: %+v, %v", status, res, err)
		}
	})
	t.Run("quarantined already", func(t *testing.T) {
		m, _ := begin(t)
		m.writes = nil
		if res := m.act("s2", ""); !res.Nothing || res.Undo != nil {
			t.Errorf("%+v", res)
		}
		m.wantLabels(m.isolated(nil))
	})
	// The first try took the labels off and its answer was lost; the controller has
	// let go of the pod since.
	t.Run("a second try knows what the first took off", func(t *testing.T) {
		m := newMember(t, "quarantine-pod")
		m.deployment(3)
		r := m.request("s1", "")
		var intended json.RawMessage
		responders.OnIntend(r, func(undo json.RawMessage) { intended = undo })
		if _, err := m.Act(t.Context(), r); err != nil || intended == nil {
			t.Fatalf("intended %s, error %v", intended, err)
		}
		m.changePod(func(p *corev1.Pod) { p.OwnerReferences = nil })
		r = m.request("s1", "")
		r.Resumed, r.Intended = true, intended
		res, err := m.Act(t.Context(), r)
		if err != nil || res.Nothing {
			t.Fatalf("%+v, %v", res, err)
		}
		m.undo("s1", res)
		m.wantLabels(map[string]string{"app": "web", "pod-template-hash": "7d4"})
	})
	t.Run("a record that can't be read", func(t *testing.T) {
		m, _ := begin(t)
		for _, record := range []string{`{}`, `[]`, ``, `{"labels":{}}`} {
			_, err := m.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: json.RawMessage(record)})
			if status, _, _, _ := responders.Classify(err); status != broker.Refused {
				t.Errorf("%s: status %s", record, status)
			}
		}
	})
}

// Whoever may make Services and policies decides how many there are: they are read a
// page at a time, all of them, and an outcome does not name them all.
func TestThousandsOfServices(t *testing.T) {
	m := newMember(t, "quarantine-pod")
	m.relabel(map[string]string{"last": "x"})
	for n := range 60 {
		conformance.MakeService(t, m.admin, "shop", fmt.Sprintf("web-%02d", n), map[string]string{"app": "web"})
		m.makePolicy(fmt.Sprintf("policy-%02d", n), metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}})
	}
	conformance.MakeService(t, m.admin, "shop", "zz-last", map[string]string{"last": "x"})
	config := m.server.Config()
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return trip(func(req *http.Request) (*http.Response, error) {
			what := path.Base(req.URL.Path)
			if req.Method == http.MethodGet && (what == "services" || what == "networkpolicies") && req.URL.Query().Get("limit") == "" {
				t.Errorf("all %s are asked for at once", what)
			}
			return next.RoundTrip(req)
		})
	})
	kube, err := responders.NewKube(config)
	if err != nil {
		t.Fatal(err)
	}
	res, err := m.entry.New(responders.Env{Kube: kube, Node: testNode}).Act(t.Context(), m.request("s1", ""))
	if err != nil {
		t.Fatal(err)
	}
	if by := res.Found["selectedBy"]; len(by) > 200 || !strings.Contains(by, "51 more") {
		t.Errorf("selected by %s", by)
	}
	if lost := res.Found["policiesLost"]; !strings.Contains(lost, "50 more") {
		t.Errorf("policies lost %s", lost)
	}
	m.wantLabels(m.isolated(nil))
}
