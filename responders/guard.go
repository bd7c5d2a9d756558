package responders

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/alert"
	"stoop/broker"
)

// Guards are what stands between a rule and a harmful act. They are asked by
// the host, right before the act, so that no responder can be reached around
// them.
type Guards struct {
	Mode    broker.Mode // the program's: a ceiling for every rule
	Node    string      // this node's name
	Aliases []string    // further hostnames that mean this node
	Self    Self
	Own     *OwnProcesses // the programs that stoop started
	// Audit says whether it is this stoop's turn to answer audit events. One that has
	// turns answers nothing else; nil: it answers none.
	Audit Turn

	Namespaces      []string // protected; globs
	PriorityClasses []string // protected; globs

	Cooldown time.Duration // per rule and object, from done on
	MaxAge   time.Duration // an older alert is not acted on
	Approval time.Duration // how long a step waits for a person
	Settle   time.Duration // so long a new or changed rule only tells what it would do

	// Harmful steps at most, of those that go to the API server and of those
	// that this node does by itself: a busy breaker of the one must not hold up
	// the other.
	API, Local Limits
}

// Limits bound the blast radius. The zero value of a rate is no limit.
type Limits struct{ Rule, Namespace, Node Rate }

// Self is what stoop is known by, so that it never answers itself.
type Self struct {
	PID       int64
	Container string // the id of its own container; "" on a host
	User      string // its user name at the API server
	Namespace string
	Pod       string
}

// caused reports whether a user of the API server is stoop: this one, or another of its
// namespace, whose service account may be another.
func (s Self) caused(user string) bool {
	return s.User != "" && user == s.User || s.Namespace != "" && strings.HasPrefix(user, "system:serviceaccount:"+s.Namespace+":")
}

// Home is the namespace in which stoops keep what they share: their own, or default
// where they run in none.
func (s Self) Home() string {
	if s.Namespace == "" {
		return metav1.NamespaceDefault
	}
	return s.Namespace
}

// Rate is N in a window; N = 0 is no limit.
type Rate struct {
	N   int
	Per time.Duration
}

const (
	// ownerWindow and ownerDeletes: delete, recreate, alert, delete is no
	// answer.
	ownerWindow  = 30 * time.Minute
	ownerDeletes = 2
	// future is how far ahead of this node's clock an alert may be.
	future = 30 * time.Second
)

// trust holds back the steps of alerts that are not to be believed or are not
// this node's to answer. It returns the guard's name and the reason, or "".
func (g *Guards) trust(a *alert.Alert, s *broker.Step, now time.Time) (guard, reason string) {
	t := s.Target
	switch {
	case a.Text:
		return "text", "a plain-text alert can be forged by whoever runs a process; set json_output: true in falco.yaml"
	case a.Source == alert.SourceInternal:
		return "internal", "Falco says this of itself"
	case s.Origin == broker.OriginStoop:
		return "internal", "stoop says this of itself"
	case s.Origin == broker.OriginOpenHTTP:
		return "unauthenticated", "the alert came over HTTP without authentication; set source.http.token-file or client-ca"
	case g.Audit == nil && auditEvent(a, t):
		return "audit-events", "audit events are of no node, and this stoop answers its node's alerts: give Falco's audit events to one with kubernetes.auditEvents: elected (docs/audit-events.md)"
	case g.Audit != nil && !auditEvent(a, t):
		return "node", "this stoop answers audit events and nothing else (kubernetes.auditEvents: elected): the one of the alert's node has to answer it"
	case g.Audit == nil && g.elsewhere(t) != "":
		return "node", g.elsewhere(t)
	case g.Self.PID != 0 && t.PID == g.Self.PID,
		g.Self.Container != "" && sameContainer(t.Container, g.Self.Container):
		return "self", "stoop raised this alert itself"
	case g.Own.Owns(a):
		return "self", "a program that stoop started raised this alert"
	case a.Time.IsZero():
		return "age", "the alert has no time that can be read"
	case s.Approved != nil && now.Sub(s.Approved.Time) > g.MaxAge:
		return "age", fmt.Sprintf("it was approved %s ago, more than guard.maxAge (%s)", now.Sub(s.Approved.Time).Round(time.Second), g.MaxAge)
	case s.Approved == nil && now.Sub(a.Time) > g.MaxAge:
		return "age", fmt.Sprintf("the alert is %s old, more than guard.maxAge (%s)", now.Sub(a.Time).Round(time.Second), g.MaxAge)
	case a.Time.Sub(now) > future:
		return "age", fmt.Sprintf("the alert is from the future, by %s", a.Time.Sub(now).Round(time.Second))
	}
	if u, ok := a.Field("ka.user.name"); ok && g.Self.caused(u) {
		return "self", "stoop's own service account caused this"
	}
	return "", ""
}

// Distrust is why nothing harmful is started by an alert, as far as the alert itself
// is concerned, or "".
func (g *Guards) Distrust(a *alert.Alert, t alert.Target, o broker.Origin, now time.Time) string {
	_, why := g.trust(a, &broker.Step{Target: t, Origin: o}, now)
	return why
}

// elsewhere is how an alert is not of this node, or "". One that names no node
// counts as this one's.
func (g *Guards) elsewhere(t alert.Target) string {
	if t.Node == "" || t.Node == g.Node || slices.Contains(g.Aliases, t.Node) {
		return ""
	}
	return fmt.Sprintf("not this node (hostname %s)", quote(t.Node))
}

// protected holds back what must never be touched, whatever a rule says. It
// looks at namespaces and configuration, never at what a tenant can write, save
// for one thing: Kubernetes lets whoever creates a pod name a priority class, also
// system-*, unless the cluster limits that by quota. To touch what has such a
// class would be worse (the CNI, storage), so it is left alone even so, and
// people are told: see sparedByClass.
func (g *Guards) protected(t alert.Target, pod *corev1.Pod) string {
	ns := t.Namespace
	if pod != nil {
		ns = pod.Namespace
	}
	switch {
	case ns != "" && matchAny(g.Namespaces, ns):
		return fmt.Sprintf("namespace %s is protected", ns)
	case t.Resource != nil && matchAny(g.Namespaces, t.Resource.Namespace):
		return fmt.Sprintf("namespace %s is protected", t.Resource.Namespace)
	case t.Resource != nil && t.Resource.Resource == "namespaces" && matchAny(g.Namespaces, t.Resource.Name):
		return fmt.Sprintf("namespace %s is protected", t.Resource.Name)
	case g.Self.Pod != "" && ns == g.Self.Namespace && t.Pod == g.Self.Pod:
		return "this is stoop's own pod"
	case pod == nil:
		return ""
	case matchAny(g.PriorityClasses, pod.Spec.PriorityClassName):
		return fmt.Sprintf("priority class %s is protected", pod.Spec.PriorityClassName)
	case isMirror(pod):
		return "this is a static pod's mirror: the kubelet runs it whatever the API server says"
	}
	return ""
}

// ProtectedPod is why a pod is never touched, or "": for what a responder acts on
// besides the object of its step.
func (g *Guards) ProtectedPod(pod *corev1.Pod) string {
	return g.protected(alert.Target{Namespace: pod.Namespace, Pod: pod.Name}, pod)
}

// sparedByClass is the priority class that alone protects a pod, or "".
func (g *Guards) sparedByClass(t alert.Target, pod *corev1.Pod) string {
	if pod == nil || !matchAny(g.PriorityClasses, pod.Spec.PriorityClassName) {
		return ""
	}
	rest := *g
	rest.PriorityClasses = nil
	if rest.protected(t, pod) != "" {
		return ""
	}
	return pod.Spec.PriorityClassName
}

func isMirror(pod *corev1.Pod) bool {
	_, ok := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

func matchAny(globs []string, s string) bool {
	return s != "" && slices.ContainsFunc(globs, func(g string) bool {
		ok, err := path.Match(g, s)
		return err == nil && ok
	})
}

func sameContainer(a, b string) bool {
	n := min(len(a), len(b))
	return n >= 12 && a[:n] == b[:n]
}

// quote shows a value that an attacker may have chosen.
func quote(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// objectOf is what the cooldown counts by: the pod, the container or the
// process, never the alert's text.
func objectOf(t alert.Target) string {
	switch {
	case t.UID != "":
		return "pod/" + t.UID
	case t.Pod != "":
		return "pod/" + t.Namespace + "/" + t.Pod
	case t.Container != "":
		return "container/" + t.Container[:12]
	case t.PID != 0:
		return fmt.Sprintf("process/%d/%d", t.PID, t.PIDStart)
	}
	return "node/" + t.Node
}

// describe is the target in a sentence for people.
func describe(t alert.Target) string {
	switch r := t.Resource; {
	case r != nil && r.Namespace != "":
		return fmt.Sprintf("%s %s/%s", r.Resource, r.Namespace, r.Name)
	case r != nil:
		return r.Resource + " " + r.Name
	case t.Pod != "":
		return fmt.Sprintf("pod %s/%s", t.Namespace, t.Pod)
	case t.Container != "":
		return "container " + t.Container
	case t.PID != 0:
		return fmt.Sprintf("process %d", t.PID)
	}
	return "this node"
}

// ownerOf is the controller of the pod, or "" for a pod without one.
func ownerOf(pod *corev1.Pod) string {
	if pod == nil {
		return ""
	}
	for _, o := range pod.OwnerReferences {
		if o.Controller != nil && *o.Controller {
			return string(o.UID)
		}
	}
	return ""
}

// Foresee is why a harmful step for a recorded alert would be held back, as far
// as that can be told without a cluster and a past, or "". It takes the alert's
// own time as now, and its hostname as this node.
func (g *Guards) Foresee(a *alert.Alert) string {
	s := &broker.Step{Target: a.Target()}
	s.Target.Node = ""
	if _, why := g.trust(a, s, a.Time); why != "" {
		return why
	}
	return g.protected(s.Target, nil)
}
