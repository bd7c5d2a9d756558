package responders_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// taints are those of the node, as kubectl writes them.
func (s *nodeStoop) taints() []string {
	s.t.Helper()
	var out []string
	for _, taint := range s.now().Spec.Taints {
		out = append(out, taint.ToString())
	}
	slices.Sort(out)
	return out
}

func taint(key, value string, effect corev1.TaintEffect) corev1.Taint {
	return corev1.Taint{Key: key, Value: value, Effect: effect}
}

// The node's other taints stay, also those that come and go at the same time.
func TestTaintNodeKeepsTheOthers(t *testing.T) {
	f := newFleet(t, "a", "b")
	added := metav1.Now().Rfc3339Copy()
	patches := 0
	var s *nodeStoop
	s = f.stoop("a", func(r *http.Request) {
		if r.Method != http.MethodPatch || !strings.HasSuffix(r.URL.Path, "/nodes/a") {
			return
		}
		switch patches++; patches {
		case 1:
			s.edit(func(n *corev1.Node) {
				n.Spec.Taints = append(n.Spec.Taints, taint("late", "", corev1.TaintEffectNoSchedule))
			})
		case 2:
			s.edit(func(n *corev1.Node) {
				n.Spec.Taints = slices.DeleteFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "gone" })
			})
		case 4: // of undo
			s.edit(func(n *corev1.Node) {
				n.Spec.Taints = append(n.Spec.Taints, taint("later", "", corev1.TaintEffectNoExecute))
			})
		}
	})
	s.edit(func(n *corev1.Node) {
		unreachable := taint("node.kubernetes.io/unreachable", "", corev1.TaintEffectNoExecute)
		unreachable.TimeAdded = &added
		n.Spec.Taints = []corev1.Taint{taint("gpu", "yes", corev1.TaintEffectNoSchedule), taint("gone", "", corev1.TaintEffectNoSchedule), unreachable}
	})
	res := s.must("taint-node", "s1", `{key: example.com/bad, value: "1", effect: NoExecute}`)
	want := []string{"example.com/bad=1:NoExecute", "gpu=yes:NoSchedule", "late:NoSchedule", "node.kubernetes.io/unreachable:NoExecute"}
	if got := s.taints(); !slices.Equal(got, want) {
		t.Errorf("the taints are %v, want %v", got, want)
	}
	if second := s.must("taint-node", "s2", `{key: example.com/bad, value: "1", effect: NoExecute}`); !second.Nothing || second.Undo != nil || !strings.Contains(second.Reason, "by step s1") {
		t.Errorf("the second step came to %+v", second)
	}
	u := s.undo("taint-node", "s1", res)
	want = []string{"gpu=yes:NoSchedule", "late:NoSchedule", "later:NoExecute", "node.kubernetes.io/unreachable:NoExecute"}
	if got := s.taints(); !slices.Equal(got, want) || u.Nothing || len(s.now().Annotations) > 0 {
		t.Errorf("after undo %+v the taints are %v, want %v", u, got, want)
	}
	i := slices.IndexFunc(s.now().Spec.Taints, func(t corev1.Taint) bool { return t.TimeAdded != nil })
	if i < 0 || !s.now().Spec.Taints[i].TimeAdded.Equal(&added) || patches != 5 {
		t.Errorf("after %d patches the taints are %+v", patches, s.now().Spec.Taints)
	}
}

func TestTaintNodeOfTheSameKey(t *testing.T) {
	for _, tc := range []struct {
		name    string
		before  corev1.Taint
		refused bool
	}{
		{"another value", taint("stoop.dev/suspect", "other", corev1.TaintEffectNoSchedule), true},
		{"the same", taint("stoop.dev/suspect", "", corev1.TaintEffectNoSchedule), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFleet(t, "a")
			s := f.stoop("a", nil)
			s.edit(func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{tc.before} })
			res, err := s.act(t.Context(), "taint-node", "s1", "")
			if status, _, _, reason := responders.Classify(err); tc.refused && status != broker.Refused || !tc.refused && (!res.Nothing || res.Undo != nil) {
				t.Errorf("status %s (%s), result %+v", status, reason, res)
			}
			if got := s.taints(); !slices.Equal(got, []string{tc.before.ToString()}) || len(s.now().Annotations) > 0 {
				t.Errorf("the taints are %v", got)
			}
		})
	}
	t.Run("another effect", func(t *testing.T) {
		f := newFleet(t, "a")
		s := f.stoop("a", nil)
		s.edit(func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{taint("stoop.dev/suspect", "x", corev1.TaintEffectNoExecute)}
		})
		res := s.must("taint-node", "s1", "")
		if got := s.taints(); len(got) != 2 {
			t.Errorf("the taints are %v", got)
		}
		s.undo("taint-node", "s1", res)
		if got := s.taints(); !slices.Equal(got, []string{"stoop.dev/suspect=x:NoExecute"}) {
			t.Errorf("after undo the taints are %v", got)
		}
	})
}

func TestUntaintOfWhatOthersChanged(t *testing.T) {
	for name, change := range map[string]func(*corev1.Node){
		"taken off":            func(n *corev1.Node) { n.Spec.Taints = nil },
		"another value":        func(n *corev1.Node) { n.Spec.Taints[0].Value = "x" },
		"the note was removed": func(n *corev1.Node) { n.Annotations = nil },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, "a")
			s := f.stoop("a", nil)
			res := s.must("taint-node", "s1", "value: y")
			s.edit(change)
			before := s.taints()
			if u := s.undo("taint-node", "s1", res); !u.Nothing || !slices.Equal(s.taints(), before) || len(s.now().Annotations) > 0 {
				t.Errorf("undo: %+v, the taints are %v", u, s.taints())
			}
		})
	}
}

func TestTaintNodeThatWasTakenOff(t *testing.T) {
	f := newFleet(t, "a")
	s := f.stoop("a", nil)
	s.must("taint-node", "s1", "")
	s.edit(func(n *corev1.Node) { n.Spec.Taints = nil })
	_, err := s.act(t.Context(), "taint-node", "s1", "")
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || len(s.taints()) > 0 || len(s.now().Annotations) > 0 {
		t.Errorf("status %s (%s), the node is %+v", status, reason, s.now())
	}
}

// Stoop does not end itself: it could not take that back.
func TestTaintNodeSparesStoop(t *testing.T) {
	for _, tc := range []struct {
		name       string
		toleration *corev1.Toleration
		node       string
		params     string
		spared     bool
	}{
		{"without a toleration", nil, "a", "effect: NoExecute", true},
		{"for a while", &corev1.Toleration{Operator: corev1.TolerationOpExists, TolerationSeconds: new(int64(300))}, "a", "effect: NoExecute", true},
		{"of another effect", &corev1.Toleration{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}, "a", "effect: NoExecute", true},
		{"of all", &corev1.Toleration{Operator: corev1.TolerationOpExists}, "a", "effect: NoExecute", false},
		{"elsewhere", nil, "b", "effect: NoExecute", false},
		{"what ends nothing", nil, "a", "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFleet(t, "a", "b")
			f.pod(tc.node, "stoop-x", func(p *corev1.Pod) {
				p.Namespace = "stoop"
				if tc.toleration != nil {
					p.Spec.Tolerations = []corev1.Toleration{*tc.toleration}
				}
			})
			if _, err := f.admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "stoop"}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			s := f.stoop("a", nil)
			s.env.Self = responders.Self{Namespace: "stoop", Pod: "stoop-x"}
			_, err := s.act(t.Context(), "taint-node", "s1", tc.params)
			status, _, _, reason := responders.Classify(err)
			if tc.spared && (status != broker.Refused || !strings.Contains(reason, "stoop's own pod") || len(s.taints()) > 0) || !tc.spared && err != nil {
				t.Errorf("status %s (%s)", status, reason)
			}
		})
	}
}

func TestTaintNodeParameters(t *testing.T) {
	for params, want := range map[string]string{
		``:                           "",
		`{key: example.com/x}`:       "",
		`{key: x, value: a}`:         "",
		`{key: stoop.dev/suspicion}`: "",
		`{key: "a b"}`:               "no key for a taint",
		`{value: "a b"}`:             "no value for a taint",
		`{effect: NoWay}`:            "NoExecute",
		`{key: node.kubernetes.io/out-of-service, effect: NoExecute}`: "not for rules to set",
		`{key: kubernetes.io/x}`:     "not for rules to set",
		`{key: app.kubernetes.io/x}`: "",
		`{key: x.k8s.io/x}`:          "not for rules to set",
	} {
		if got := problems(t, entryOf(t, "taint-node"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
