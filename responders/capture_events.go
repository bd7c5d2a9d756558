package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"stoop/evidence"
	"stoop/param"
)

func captureEvents() Entry {
	return Entry{
		Name: "capture-events",
		Doc:  "Keeps what the cluster's Events tell of the pod that raised the alert.",
		Notes: `Kubernetes keeps Events for an hour, unless the API server is told otherwise
(--event-ttl); afterwards nobody can tell any more when the pod was scheduled, pulled
its image, failed its probes or was killed. They are asked for by the pod's UID, so none
is of another pod of the same name, and stand in events.jsonl, one in a line, as the API
server has them. That there are none is kept too. Whoever may create Events in the
namespace can write what he likes into one.`,
		Params: param.Describe(captureEventsDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"list"}},
		},
		Kind:     Evidence,
		Object:   PodObject,
		Deadline: time.Minute,
		New:      func(env Env) Responder { return &eventCapturer{env.Kube, env.Evidence} },
	}
}

type captureEventsParams struct {
	MaxSize param.Size     `param:"maxSize" min:"1KiB" max:"1GiB" doc:"How much is kept."`
	Timeout param.Duration `param:"timeout" min:"100ms" max:"50s" doc:"How long it may take; what there is by then is kept."`
}

func captureEventsDefaults() captureEventsParams {
	return captureEventsParams{MaxSize: 4 << 20, Timeout: param.Duration(20 * time.Second)}
}

type eventCapturer struct {
	kube  *Kube
	store *evidence.Store
}

func (e *eventCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := captureEventsDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if e.store == nil {
		return Result{}, Refuse("there is no evidence store")
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("events of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	pod, err := sameNow(ctx, e.kube, r.Pod)
	if err != nil {
		return fail(err)
	}
	reading, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	events := &eventReader{ctx: reading, kube: e.kube, namespace: pod.Namespace, uid: string(pod.UID)}
	// What can't be had at all is an error, and no case.
	if err := events.page(); err != nil {
		return fail(err)
	}
	kept, ended, err := beginCapture(ctx, e.store, r, pod)
	if err != nil {
		return Result{}, err
	}
	if ended != nil {
		return *ended, nil
	}
	_, err = kept.Add(context.WithoutCancel(ctx), "events.jsonl", events, int64(params.MaxSize))
	res, err := endCapture(ctx, kept, r, err)
	if err == nil {
		res.Reason = fmt.Sprintf("events: %d; %s", events.read, res.Reason)
	}
	return res, err
}

// eventReader is the events of a pod, one JSON object a line, asked for a page at
// a time.
type eventReader struct {
	ctx            context.Context
	kube           *Kube
	namespace, uid string
	next           string // where the next page begins
	over           bool   // there is none
	read           int
	buf            bytes.Buffer
}

// eventsPage is how many events are asked for at a time.
const eventsPage = 100

func (e *eventReader) Read(b []byte) (int, error) {
	for e.buf.Len() == 0 {
		if e.over {
			return 0, io.EOF
		}
		if err := e.page(); err != nil {
			return 0, err
		}
	}
	return e.buf.Read(b)
}

func (e *eventReader) page() error {
	list, err := e.kube.Dynamic().Resource(schema.GroupVersionResource{Version: "v1", Resource: "events"}).Namespace(e.namespace).
		List(e.ctx, metav1.ListOptions{
			FieldSelector: fields.OneTermEqualSelector("involvedObject.uid", e.uid).String(),
			Limit:         eventsPage, Continue: e.next,
		})
	if err != nil {
		return err
	}
	e.next = list.GetContinue()
	e.over = e.next == ""
	out := json.NewEncoder(&e.buf)
	for i := range list.Items {
		if err := out.Encode(list.Items[i].Object); err != nil {
			return err
		}
		e.read++
	}
	return nil
}
