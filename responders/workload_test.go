package responders_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

// member is a responder and a pod of a workload to try it on, with what it asked
// the API server to change.
type member struct {
	*actor
	server *conformance.Server
	env    responders.Env
	mu     sync.Mutex
	writes []string                     // "PATCH pods/web-0 {…}"
	before func(req *http.Request)      // a request that changes something is sent
	after  func(req *http.Request)      // and answered
	refuse func(req *http.Request) bool // by an API server that is away
}

// newMember is one whose pod nothing controls yet.
func newMember(t testing.TB, responder string) *member {
	s := conformance.NewServer(t)
	m := &member{server: s, actor: &actor{t: t, admin: s.Admin(), entry: entryOf(t, responder)}}
	config := s.Config()
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return trip(func(req *http.Request) (*http.Response, error) { return m.trip(next, req) })
	})
	client, err := responders.NewKube(config)
	if err != nil {
		t.Fatal(err)
	}
	m.env = responders.Env{Kube: client, Node: testNode}
	m.Responder = m.entry.New(m.env)
	m.pod = m.newPod("web-0")
	return m
}

type trip func(*http.Request) (*http.Response, error)

func (f trip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

func (m *member) trip(next http.RoundTripper, req *http.Request) (*http.Response, error) {
	if m.refuse != nil && m.refuse(req) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	if req.Method != http.MethodGet {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return nil, err
		}
		req.Body = io.NopCloser(bytes.NewReader(body))
		_, what, _ := strings.Cut(req.URL.Path, "/namespaces/shop/")
		m.mu.Lock()
		m.writes = append(m.writes, req.Method+" "+what+" "+string(body))
		m.mu.Unlock()
		if m.before != nil {
			m.before(req)
		}
		if m.after != nil {
			defer m.after(req)
		}
	}
	return next.RoundTrip(req)
}

func (m *member) newPod(name string) *corev1.Pod {
	m.t.Helper()
	pod, err := m.admin.CoreV1().Pods("shop").Create(m.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: testNode},
	}, metav1.CreateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return pod
}

// deployment makes the pod one of a Deployment.
func (m *member) deployment(replicas int32) (*appsv1.Deployment, *appsv1.ReplicaSet) {
	m.t.Helper()
	d, rs := conformance.MakeDeployment(m.t, m.admin, "shop", "web", replicas)
	m.pod = conformance.Control(m.t, m.admin, m.pod, rs, "ReplicaSet")
	return d, rs
}

// owned makes the pod one of an object of this kind and name, which there is none
// of unless the test makes one.
func (m *member) owned(ref metav1.OwnerReference) {
	m.t.Helper()
	ref.Controller = new(true)
	pod := m.pod.DeepCopy()
	pod.OwnerReferences = []metav1.OwnerReference{ref}
	pod, err := m.admin.CoreV1().Pods("shop").Update(m.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	m.pod = pod
}

// wantNot acts and expects one of the statuses, a word in the reason, and that
// nothing was asked of the API server that changes anything.
func (m *member) wantNot(word string, statuses ...broker.Status) {
	m.t.Helper()
	m.writes = nil
	res, err := m.Act(m.t.Context(), m.request("refused", ""))
	status, retry, _, reason := responders.Classify(err)
	if err == nil && res.Nothing {
		status, reason = broker.Nothing, res.Reason
	}
	if retry || !slices.Contains(statuses, status) || !strings.Contains(reason, word) {
		m.t.Errorf("status %s, retry %t (%s); want %v and %q", status, retry, reason, statuses, word)
	}
	if len(m.writes) > 0 {
		m.t.Errorf("it wrote %q", m.writes)
	}
}

// What is the workload, for the responders that act on it.
func TestWorkload(t *testing.T) {
	for _, responder := range []string{"scale-workload", "restart-workload"} {
		t.Run(responder, func(t *testing.T) {
			t.Run("none", func(t *testing.T) {
				m := newMember(t, responder)
				m.wantNot("no controller", broker.Refused)
				if err := m.Responder.(responders.Checker).Check(t.Context(), m.request("s1", "")); err == nil {
					t.Error("Check lets it pass")
				}
			})
			t.Run("a job", func(t *testing.T) {
				m := newMember(t, responder)
				m.owned(metav1.OwnerReference{APIVersion: "batch/v1", Kind: "Job", Name: "web", UID: "1"})
				m.server.Forbid(t, "get", "batch", "jobs") // as the registry has it
				m.wantNot(`"Job web", which`, broker.Refused)
			})
			t.Run("not there any more", func(t *testing.T) {
				m := newMember(t, responder)
				m.owned(metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "1"})
				m.wantNot("", broker.Nothing)
			})
			t.Run("another of its name", func(t *testing.T) {
				m := newMember(t, responder)
				d, _ := m.deployment(3)
				if err := m.admin.AppsV1().Deployments("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
				d.UID, d.ResourceVersion = "", ""
				if _, err := m.admin.AppsV1().Deployments("shop").Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				m.wantNot("replaced by another", broker.Nothing)
			})
			t.Run("in another namespace", func(t *testing.T) {
				m := newMember(t, responder)
				d, _ := conformance.MakeDeployment(t, m.admin, "other", "web", 3)
				m.owned(metav1.OwnerReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "../../other/deployments/web", UID: d.UID})
				m.wantNot("../../other", broker.Refused, broker.Failed)
				m.owned(metav1.OwnerReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "web", UID: d.UID})
				m.wantNot("", broker.Nothing)
			})
			t.Run("of no namespace", func(t *testing.T) {
				m := newMember(t, responder)
				m.owned(metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: testNode, UID: "1"})
				m.wantNot("Node", broker.Refused)
			})
			t.Run("of a kind that is not served", func(t *testing.T) {
				m := newMember(t, responder)
				m.owned(metav1.OwnerReference{APIVersion: "example.com/v1", Kind: "Shop", Name: "web", UID: "1"})
				m.wantNot("Shop", broker.Refused)
			})
			t.Run("references that go round", func(t *testing.T) {
				m := newMember(t, responder)
				_, rs := m.deployment(3)
				rs.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(rs, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
				if _, err := m.admin.AppsV1().ReplicaSets("shop").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				if _, err := m.Act(t.Context(), m.request("s1", "")); err != nil && responder == "scale-workload" {
					t.Error(err)
				}
			})
			t.Run("a pod that was replaced", func(t *testing.T) {
				m := newMember(t, responder)
				m.deployment(3)
				pods := m.admin.CoreV1().Pods("shop")
				if err := pods.Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
					t.Fatal(err)
				}
				old := m.pod
				m.pod = m.newPod("web-0")
				m.deploymentOf(old)
				m.pod = old
				m.wantNot("gone", broker.Nothing)
			})
			// Two pods of one Deployment, of its old and its new ReplicaSet, and a pod
			// of another.
			t.Run("what the cooldown counts by", func(t *testing.T) {
				m := newMember(t, responder)
				d, rs := m.deployment(3)
				next := rs.DeepCopy()
				next.Name, next.UID, next.ResourceVersion = "web-next", "", ""
				next, err := m.admin.AppsV1().ReplicaSets("shop").Create(t.Context(), next, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
				_, other := conformance.MakeDeployment(t, m.admin, "shop", "other", 3)
				object := func(name string, of *appsv1.ReplicaSet) string {
					r := m.request("s1", "")
					r.Pod = conformance.Control(t, m.admin, m.newPod(name), of, "ReplicaSet")
					if err := m.Responder.(responders.Checker).Check(t.Context(), r); err != nil {
						t.Fatal(err)
					}
					return m.Responder.(responders.Particular).Object(r)
				}
				one, two, three := object("one", rs), object("two", next), object("three", other)
				if one != "workload/"+string(d.UID) || two != one || three == one {
					t.Errorf("objects %q, %q and %q", one, two, three)
				}
			})
			t.Run("forbidden", func(t *testing.T) {
				m := newMember(t, responder)
				m.deployment(3)
				m.server.Forbid(t, "get", "apps", "deployments")
				m.wantNot("get deployments.apps", broker.Failed)
				err := m.Responder.(responders.Checker).Check(t.Context(), m.request("s1", ""))
				if !apierrors.IsForbidden(err) {
					t.Errorf("Check: %v", err)
				}
			})
		})
	}
}

// deploymentOf gives the pod the references of another.
func (m *member) deploymentOf(of *corev1.Pod) {
	m.t.Helper()
	m.owned(of.OwnerReferences[0])
}

func (m *member) wantWrites(want ...string) {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	ok := len(m.writes) == len(want)
	for i := range min(len(want), len(m.writes)) {
		ok = ok && strings.HasPrefix(m.writes[i], want[i])
	}
	if !ok {
		m.t.Errorf("it wrote %s\nwant %s", fmt.Sprintf("%q", m.writes), fmt.Sprintf("%q", want))
	}
}
