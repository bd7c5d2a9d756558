package responders

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/evidence"
	"stoop/param"
)

func captureLogs() Entry {
	return Entry{
		Name: "capture-logs",
		Doc:  "Keeps the logs of the suspect's container, also of its run before a restart.",
		Notes: `The logs are what the container wrote to its standard output and error, as the kubelet
still has them: it rotates them (by default at 10 MiB), and takes them away with the
pod. So keep them before a step that deletes or evicts. Whoever is in the container can
write there too: a log proves what was written, not by whom.

Each log is a file CONTAINER.log, and CONTAINER.previous.log for the run before the
container's last restart; the manifest says which container id each is of. If the
alert's container is none of the pod's present or last ones, the logs of all its
containers are kept, and the manifest says so. Beyond maxSize in all, or when timeout is
over, a log is cut at its end, and the manifest says that too. Logs may hold secrets.

Logs are asked for by the pod's name. So the pod's UID is looked at before and after
each: if the pod was replaced meanwhile, what was read is thrown away, since it may be
the replacement's; if that can't be told, because the pod is gone or the API server is
away, the file is marked in the manifest as not proved.`,
		Params: param.Describe(captureLogsDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"pods/log"}, Verbs: []string{"get"}},
		},
		Kind:     Evidence,
		Object:   PodObject,
		Deadline: time.Minute,
		New:      func(env Env) Responder { return &logCapturer{env.Kube, env.Evidence} },
	}
}

type captureLogsParams struct {
	Tail       int            `param:"tail" min:"0" max:"1000000" doc:"How many lines are kept of each log, the last ones; 0 is all there are."`
	Since      param.Duration `param:"since" doc:"How far back; 0 is as far as there is a log."`
	Previous   bool           `param:"previous" doc:"Also the log of the container before its last restart."`
	Containers string         `param:"containers" oneof:"suspect all" doc:"suspect: the container that raised the alert. all: also the pod's others, init and ephemeral ones too."`
	MaxSize    param.Size     `param:"maxSize" min:"1KiB" max:"4GiB" doc:"How much is kept in all."`
	Timeout    param.Duration `param:"timeout" min:"100ms" max:"50s" doc:"How long it may take; what there is by then is kept."`
}

func captureLogsDefaults() captureLogsParams {
	return captureLogsParams{Tail: 1000, Previous: true, Containers: "suspect", MaxSize: 16 << 20, Timeout: param.Duration(20 * time.Second)}
}

type logCapturer struct {
	kube  *Kube
	store *evidence.Store
}

// containerLog is one log that is to be had.
type containerLog struct {
	container string
	id        string // the container's, with the runtime's prefix
	previous  bool
}

func (l containerLog) name() string {
	if l.previous {
		return l.container + ".previous.log"
	}
	return l.container + ".log"
}

func (l *logCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := captureLogsDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if l.store == nil {
		return Result{}, Refuse("there is no evidence store")
	}
	fail := func(err error) error { return fmt.Errorf("logs of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err) }
	pod, err := sameNow(ctx, l.kube, r.Pod)
	if err != nil {
		return Result{}, fail(err)
	}
	logs, known := logsOf(pod, r.Target.Container, params)
	kept, ended, err := beginCapture(ctx, l.store, r, pod)
	if err != nil {
		return Result{}, err
	}
	if ended != nil {
		return *ended, nil
	}
	if !known {
		kept.Note("container %s is none that the pod tells of any more: the logs of all its containers are kept", r.Target.Container)
	}
	reading, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	room := int64(params.MaxSize)
	var errs []error
	for _, log := range logs {
		n, err := l.keep(reading, ctx, kept, pod, log, params, room)
		room -= n
		if err != nil {
			errs = append(errs, err)
			kept.Note("%v", err)
		}
		if isGone(err) {
			break // so are the others
		}
	}
	err = errors.Join(errs...)
	if err != nil {
		err = fail(err)
	}
	return endCapture(ctx, kept, r, err)
}

// logsOf are the logs to be kept, the suspect's first; known, whether the pod
// still tells of the suspect's container.
func logsOf(pod *corev1.Pod, suspect string, params captureLogsParams) (logs []containerLog, known bool) {
	var first, others []containerLog
	for _, list := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		for i := range list {
			c := &list[i]
			of := []containerLog{{container: c.Name, id: c.ContainerID}}
			before := c.LastTerminationState.Terminated
			if params.Previous && (before != nil || c.RestartCount > 0) {
				was := containerLog{container: c.Name, previous: true}
				if before != nil {
					was.id = before.ContainerID
				}
				of = append(of, was)
			}
			is := func(id string) bool {
				_, bare, _ := strings.Cut(id, "://")
				return suspect != "" && strings.HasPrefix(bare, suspect)
			}
			switch {
			case is(c.ContainerID):
				first, known = append(first, of...), true
			case before != nil && is(before.ContainerID):
				// It was the run before this one that raised the alert.
				if !params.Previous {
					of = append(of, containerLog{container: c.Name, id: before.ContainerID, previous: true})
				}
				slices.Reverse(of)
				first, known = append(first, of...), true
			default:
				others = append(others, of...)
			}
		}
	}
	if params.Containers == "all" || !known {
		first = append(first, others...)
	}
	return first, known || params.Containers == "all"
}

// keep reads one log into the case, and returns how much was kept. reading ends
// when the time for it is over; ctx is for the look afterwards.
func (l *logCapturer) keep(reading, ctx context.Context, kept *evidence.Case, pod *corev1.Pod, log containerLog, params captureLogsParams, room int64) (int64, error) {
	// One byte more than is kept tells that there was more.
	req := l.kube.core.Get().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("log").
		Param("container", log.container).Param("timestamps", "true").Param("limitBytes", strconv.FormatInt(max(room, 0)+1, 10))
	if log.previous {
		req.Param("previous", "true")
	}
	if params.Tail > 0 {
		req.Param("tailLines", strconv.Itoa(params.Tail))
	}
	if params.Since > 0 {
		req.Param("sinceSeconds", strconv.FormatInt(max(1, int64(time.Duration(params.Since).Seconds())), 10))
	}
	body, err := req.Stream(reading)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", log.name(), err)
	}
	p, err := kept.Add(context.WithoutCancel(reading), log.name(), io.Reader(body), max(room, 0))
	err = errors.Join(err, body.Close())
	if errors.Is(ctx.Err(), context.Canceled) {
		return p.Size, ctx.Err() // stoop is being stopped, and nothing can be asked
	}
	now, nerr := l.kube.Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	switch {
	case nerr == nil && now.UID != pod.UID:
		why := fmt.Errorf("the pod was replaced while %s was read, which may be the replacement's: it is not kept: %w", log.name(), ErrGone)
		return 0, errors.Join(err, why, kept.Drop(p.Name))
	case apierrors.IsNotFound(nerr):
		kept.Doubt(p.Name, "not proved to be the suspect's: the pod was gone when it had been read")
	case nerr != nil:
		kept.Doubt(p.Name, fmt.Sprintf("not proved to be the suspect's: the pod could not be looked at when it had been read: %v", nerr))
	default:
		note := "%s is of container %s"
		if is := idNow(now, log); is != log.id {
			note += ", or of " + is + ": the container was restarted while it was read"
		}
		if log.id != "" {
			kept.Note(note, p.Name, log.id)
		}
	}
	return p.Size, err
}

// idNow is the id of the container that a log would be of now.
func idNow(pod *corev1.Pod, log containerLog) string {
	for _, list := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		for i := range list {
			switch c := &list[i]; {
			case c.Name != log.container:
			case !log.previous:
				return c.ContainerID
			case c.LastTerminationState.Terminated != nil:
				return c.LastTerminationState.Terminated.ContainerID
			}
		}
	}
	return ""
}
