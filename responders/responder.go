// Package responders is what stoop can do about an alert: one file a responder,
// all of them in [All], and the host that runs them.
//
// It is the last stop on an alert's way. The host takes steps from the stream
// ACTIONS, finds the pod that is meant, asks the guards, lets the responder
// act, publishes the next step of the chain, records the outcome, and only then
// acknowledges. So a responder knows of none of this: it does one thing, once
// or twice, and says what came of it.
package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/node"
	"stoop/param"
)

// Responder does one kind of step.
//
// Act does what the request asks. It may run twice for one step (after a crash,
// or when the first try failed half-way) and must not harm the second time;
// what was so already is the status nothing, not an error. It honours the
// context's deadline. Its errors:
//
//   - [Refuse]: it won't, whatever the number of tries.
//   - [Spare]: it won't do this to this object; what [Entry.Instead] names is done
//     instead, and people are told.
//   - [Retry]: the fault may pass; it is tried again with growing delays.
//   - [ErrGone]: the target is not there any more; the outcome is nothing.
//   - anything else: failed, and not tried again. Kubernetes' own errors may be
//     returned as they are: the host knows which of them pass.
//
// A step that failed after a part of it was done returns both: the error, and
// with [Result.Undo] how that part is taken back.
type Responder interface {
	Act(ctx context.Context, r *Request) (Result, error)
}

// Checker is a Responder that can tell beforehand, without touching anything,
// that it won't act. It is asked in audit mode too.
type Checker interface {
	Check(ctx context.Context, r *Request) error
}

// Foreseer is a Responder that finds out only at the act, by asking the API server,
// whether it does it. In audit mode Foresee is asked in its place, and so it is before
// a person is; its errors are those of Act.
type Foreseer interface {
	Foresee(ctx context.Context, r *Request) error
}

// Previewer is a Responder whose target says too little of what a step of it changes.
// Who is asked to approve the step is shown the reason that Preview returns: what would
// change, as things are now. When nothing would, or it refuses, nobody is asked. Like
// Check it touches nothing.
type Previewer interface {
	Preview(ctx context.Context, r *Request) (Result, error)
}

// Particular is a Responder that acts on less than the [Object] of its entry: one
// file, one address. The cooldown counts by what it returns, which an attacker
// may have chosen.
type Particular interface {
	Object(r *Request) string
}

// Undoer is a Responder whose steps can be taken back. It trusts only the undo
// record that its own Act returned, and taking back what is back already is the
// status nothing.
type Undoer interface {
	Undo(ctx context.Context, u *UndoRequest) (Result, error)
}

// Entry is a responder in the registry: all that the rules, the
// documentation, the chart and the host need to know of it.
type Entry struct {
	Name   string
	Doc    string              // one sentence: what it does
	Notes  string              // what to mind; for the documentation
	Params *param.Description  // with the defaults that are used
	RBAC   []rbacv1.PolicyRule // with any parameters
	Needs  []node.Need         // of the machine, where it acts on the node itself
	Kind   Kind
	Object Object // what a step of it acts on
	// Deadline bounds one try of a step.
	Deadline time.Duration
	// Instead names the responder that takes the step's place when the
	// owner's limit holds it back, or it spares what it was to act on.
	Instead string
	// Approve reports whether a step with these parameters waits until a person
	// approves it, where its rule does not say; nil: none does.
	Approve func(params json.RawMessage) bool
	// Grants are the permissions that a step needs, where its parameters decide;
	// nil: they are RBAC, whatever the parameters.
	Grants []Grant
	// PodWhen are the parameters with which a step acts on the pod instead of
	// Object; nil: none.
	PodWhen When
	// Everywhere are the parameters with which a step needs its permissions in all
	// namespaces, also where its rule is limited to some; nil: none.
	Everywhere When
	// Lane names the destination that a step goes to, so that a hanging one
	// holds up no other; nil means that all steps share one.
	Lane func(params json.RawMessage) string
	New  func(Env) Responder
}

// Kind is what a responder does to the world, and so which guards are asked.
type Kind int

// Harm is asked of every guard, evidence and notifications of none: they are
// never suppressed.
const (
	Harm Kind = iota
	Evidence
	Notification
)

// Object is what a step acts on.
type Object int

// A step that acts on a pod gets it resolved and proved before its responder
// is called.
const (
	NoObject Object = iota
	PodObject
	// ContainerObject is the alert's container on this node, found in its
	// cgroup and proved to be in no protected namespace; no API server is asked.
	ContainerObject
	// ProcessObject is the alert's process on this node, held by a pidfd.
	ProcessObject
	// SuspectObject is the alert's container, its process, or both: what there
	// is to look at.
	SuspectObject
	// HostObject is something of the host itself: only alerts of the host
	// (container.id: host) have one.
	HostObject
	// NodeObject is the Kubernetes node that stoop runs on and the alert came
	// from, [Env.Node].
	NodeObject
	// ResourceObject is what a Kubernetes audit event is about.
	ResourceObject
)

// String is the object as it stands in a sentence.
func (o Object) String() string {
	switch o {
	case PodObject:
		return "the pod"
	case ContainerObject:
		return "the container"
	case ProcessObject:
		return "the process"
	case SuspectObject:
		return "the suspect"
	case HostObject:
		return "the host"
	case NodeObject:
		return "the node"
	case ResourceObject:
		return "the object"
	}
	return "nothing"
}

// Env is what responders are built with.
type Env struct {
	Kube    *Kube // nil without a cluster; the host then never calls a responder that needs one
	HTTP    *http.Client
	Node    string
	Cluster string
	Data    string // the data folder
	// Local is this machine; nil where stoop has nothing to do with the node
	// that the alerts come from (a laptop).
	Local    *node.Node
	Evidence *evidence.Store
	Self     Self          // what stoop is known by
	Own      *OwnProcesses // what stoop has started itself; nil remembers nothing
	Caller   Caller        // asks programs of the user's; the host gives its broker
	Log      *slog.Logger
	// ProtectedNamespace reports whether the configuration protects one: for what a
	// responder touches besides the object of its step. The host gives its guards'.
	ProtectedNamespace func(namespace string) bool
	// ProtectedPod is why the guards leave a pod alone, or "".
	ProtectedPod func(*corev1.Pod) string
}

// Request is one step for a responder.
type Request struct {
	Step      *broker.Step
	Alert     *alert.Alert
	Target    alert.Target    // resolved: what the alert left out is filled in
	Pod       *corev1.Pod     // proved to be the one that raised the alert; for [PodObject]. Shared: not to be changed
	Container *node.Container // for [ContainerObject]; for [ProcessObject] the one it runs in, if any
	Process   *node.Process   // for [ProcessObject]; the host closes it
	// Resumed says that an earlier run of this very step was cut off after it
	// was about to act: look at the world before acting, so that nothing is
	// asked for twice.
	Resumed bool
	// Intended is what that run, or an earlier try, gave to [Request.Intend].
	Intended json.RawMessage
	intend   func(undo json.RawMessage, ttl time.Duration)
	paused   func() string
}

// Paused is why nothing may be done any more, or "": for an act that takes so long
// that a person may pause stoop in the middle.
func (r *Request) Paused() string {
	if r.paused == nil {
		return ""
	}
	return r.paused()
}

// Intend stores what taking the step back will need before it is done. It is for
// a responder that can't tell afterwards, should the process be killed right
// after the act: what was there before is gone then. What Act returns replaces
// it, and a step that ended with nothing done forgets it.
func (r *Request) Intend(undo json.RawMessage, ttl time.Duration) {
	if r.intend != nil {
		r.intend(undo, ttl)
	}
}

// local reports whether its steps act on this node, without the API server, and
// so have a budget of their own.
func (e *Entry) local() bool { return !e.cluster() }

// cluster reports whether its steps act on an object of the API server's.
func (e *Entry) cluster() bool {
	return e.Object == PodObject || e.Object == NodeObject || e.Object == ResourceObject
}

// objectOf is what a step with these parameters acts on.
func (e *Entry) objectOf(params json.RawMessage) Object {
	if e.with(e.PodWhen, params) {
		return PodObject
	}
	return e.Object
}

// Decode reads the step's parameters over the defaults in params.
func (r *Request) Decode(params any) error { return param.Decode(r.Step.Params, params) }

// Keeper is an Undoer whose steps live in this machine's kernel, and so don't
// outlive a reboot, a container that is made anew, or somebody who lifts them by
// hand. Keep is asked at the start about every one that was not taken back: it
// makes sure that it still holds, and puts it in force again where something of
// it is missing. [ErrGone] says that it can't hold any more, and why.
type Keeper interface {
	Keep(ctx context.Context, u *UndoRequest) (Result, error)
}

// UndoRequest asks to take a step back.
type UndoRequest struct {
	ID     string // the step's
	Target alert.Target
	Record json.RawMessage // what Act returned as [Result.Undo]
	Actor  string          // who asks: a user, or "ttl"
}

// Result is what an act that did not fail came to.
type Result struct {
	Nothing bool              // it was so already
	Reason  string            // a sentence for people; also what they should mind
	Found   map[string]string // for the outcome and the later steps
	// Undo is all that taking the step back will need; nil: it can't be, or
	// nothing was done.
	Undo json.RawMessage
	// TTL is after how long the step is taken back by itself; 0: never.
	TTL time.Duration
}

// ErrGone says that the target is not there any more.
var ErrGone = errors.New("the target is gone")

type refusal struct{ reason string }

func (e *refusal) Error() string { return e.reason }

// Refuse is the error of a responder that won't act, and why.
func Refuse(format string, args ...any) error {
	return &refusal{fmt.Sprintf(format, args...)}
}

// spareError says that something gentler is to be done.
type spareError struct{ kind, reason string }

func (e *spareError) Error() string { return e.reason }

// Spare is the error of a responder that leaves its object to a gentler one, and why.
// Of each kind people are told once in a while: it holds nothing out of an alert.
func Spare(kind, format string, args ...any) error {
	return &spareError{kind, fmt.Sprintf(format, args...)}
}

type retryable struct {
	err   error
	after time.Duration
}

func (e *retryable) Error() string { return e.err.Error() }
func (e *retryable) Unwrap() error { return e.err }

// Retry marks a fault that may pass. after is how long the other side asks to
// be left alone; 0: as long as the host thinks fit.
func Retry(err error, after time.Duration) error { return &retryable{err, after} }
