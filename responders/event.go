package responders

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"

	"stoop/param"
)

func event() Entry {
	return Entry{
		Name: "event",
		Doc:  "Writes a Kubernetes Event on the pod that raised the alert, where kubectl describe and kubectl get events show it.",
		Notes: `The Event is of the type Warning, in the pod's namespace, and carries the pod's UID: it
is not shown at another pod that takes the name. Its name comes from the step, so that a
step which is done again makes no second one. The message says what the steps before came
to, so put it behind them, and is at most 1 KiB.

Attackers write parts of an alert: its text comes last, on one line, without what moves a
terminal's cursor or turns the direction of writing. The API server keeps Events for an
hour, by default, and whoever may read Events in the namespace can read them there.

Events share the limit of all requests to the API server (kubernetes.qps). So a pod gets
10 of them and then one a minute, and the outcome of others is nothing; from all pods
together come 2 a second, and what is more waits.`,
		Params: param.Describe(eventDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create"}},
		},
		Kind:     Notification,
		Object:   PodObject,
		Deadline: 10 * time.Second,
		New: func(env Env) Responder {
			return &eventWriter{
				kube: env.Kube, node: env.Node,
				all: flowcontrol.NewTokenBucketRateLimiter(eventsPerSecond, eventsAtOnce), spent: map[types.UID]*eventBudget{},
			}
		},
	}
}

type eventParams struct {
	Reason string `param:"reason" doc:"The Event's reason, which tools filter by: letters and digits."`
}

func eventDefaults() eventParams { return eventParams{Reason: "StoopAlert"} }

var eventReason = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]{0,127}$`)

// Validate refuses what is no reason.
func (p eventParams) Validate() error {
	if !eventReason.MatchString(p.Reason) {
		return fmt.Errorf("reason: %s is none: up to 128 letters and digits, the first a letter, such as StoopAlert", param.Cut(p.Reason))
	}
	return nil
}

const (
	// eventMessageMost is what the API server's newer API of Events takes, in bytes.
	eventMessageMost = 1024
	// A pod's first events, and then how often one more.
	eventsOfPod     = 10
	eventOfPodAgain = time.Minute
	eventPodsMost   = 1024
	// Of all pods together: an Event is two requests, of 10 a second by default.
	eventsPerSecond = 2
	eventsAtOnce    = 10
)

type eventWriter struct {
	kube *Kube
	node string
	all  flowcontrol.RateLimiter

	mu    sync.Mutex
	spent map[types.UID]*eventBudget
}

// eventBudget is how many events a pod has left, as of a time.
type eventBudget struct {
	left float64
	at   time.Time
}

func (e *eventWriter) Act(ctx context.Context, r *Request) (Result, error) {
	params := eventDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	pod := r.Pod
	if !e.take(pod.UID, time.Now()) {
		return Result{Nothing: true, Reason: fmt.Sprintf("the pod has had %d Events: now it gets one a minute", eventsOfPod)}, nil
	}
	made, err := e.write(ctx, r, params)
	if err != nil {
		e.giveBack(pod.UID)
		return Result{}, fmt.Errorf("write an event on pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	name := eventName(r)
	if !made {
		return Result{Nothing: true, Reason: "Event " + name + " is there already"}, nil
	}
	return Result{Reason: "Event " + name + " written", Found: map[string]string{"event": name}}, nil
}

func eventName(r *Request) string { return "stoop-" + r.Step.ID }

// write makes the event; made is false where it is there already.
func (e *eventWriter) write(ctx context.Context, r *Request, params eventParams) (made bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if !e.all.TryAccept() {
		return false, Retry(fmt.Errorf("more than %d a second", eventsPerSecond), time.Second)
	}
	// The API server takes an event on anything: whether the pod is there, it
	// does not ask.
	pod, err := sameNow(ctx, e.kube, r.Pod)
	if err != nil {
		return false, err
	}
	at := metav1.NewTime(r.Step.Received)
	err = e.kube.core.Post().Namespace(pod.Namespace).Resource("events").Body(&corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: eventName(r), Namespace: pod.Namespace},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
		},
		Type: corev1.EventTypeWarning, Reason: params.Reason, Message: eventMessage(r),
		Source:         corev1.EventSource{Component: managedBy, Host: e.node},
		FirstTimestamp: at, LastTimestamp: at, Count: 1,
		ReportingController: managedBy, ReportingInstance: e.node,
	}).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	return err == nil, err
}

// eventMessage is what happened and what was done about it, and last what an
// attacker may have written.
func eventMessage(r *Request) string {
	var b strings.Builder
	rule := r.Alert.Rule
	if rule == "" {
		rule = "an alert without a rule's name"
	}
	fmt.Fprintf(&b, "%s: %s (stoop's rule %s)", r.Alert.Priority, oneLine(rule, 150), oneLine(r.Step.Rule, 100))
	const most = 8
	for i, f := range r.Step.Found {
		if i == most {
			fmt.Fprintf(&b, "; %d more steps", len(r.Step.Found)-most)
			break
		}
		fmt.Fprintf(&b, "; %s: %s", f.Responder, f.Status)
	}
	if r.Alert.Output != "" {
		b.WriteString(". Falco: " + oneLine(r.Alert.Output, eventMessageMost))
	}
	return cutBytes(b.String(), eventMessageMost)
}

// cutBytes is the beginning of a text that has at most n bytes.
func cutBytes(s string, n int) string {
	const dots = "…"
	if len(s) <= n {
		return s
	}
	n -= len(dots)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + dots
}

// take spends one of a pod's events, if there is one left.
func (e *eventWriter) take(pod types.UID, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	b := e.spent[pod]
	if b == nil {
		if len(e.spent) >= eventPodsMost {
			clear(e.spent)
		}
		b = &eventBudget{eventsOfPod, now}
		e.spent[pod] = b
	}
	b.left = min(eventsOfPod, b.left+float64(now.Sub(b.at))/float64(eventOfPodAgain))
	b.at = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

func (e *eventWriter) giveBack(pod types.UID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if b := e.spent[pod]; b != nil {
		b.left++
	}
}
