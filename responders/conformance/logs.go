package conformance

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Log is a log that was asked for with pods/log.
type Log struct {
	Namespace, Pod, Container string
	UID                       string // of the pod that has the name when it is asked
	Previous                  bool
	Query                     url.Values
}

// OnLog says what [Server] answers when it is asked for a container's log: write
// writes it. Without it each is one line with the pod's UID. There is no kubelet that
// would have one; it is asked as the API server asks it.
func (s *Server) OnLog(_ testing.TB, write func(l Log, w io.Writer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onLog = write
}

func (s *Server) log(w http.ResponseWriter, r *http.Request, c call) {
	s.mu.Lock()
	write := s.onLog
	pod := s.objects["pods"][c.namespace+"/"+c.name]
	l := Log{Namespace: c.namespace, Pod: c.name, Query: r.URL.Query(), UID: text(meta(pod), "uid")}
	named, before := hasRun(pod, l.Query.Get("container"))
	s.mu.Unlock()
	l.Container, l.Previous = l.Query.Get("container"), l.Query.Get("previous") == "true"
	bad := func(message string) {
		reply(w, http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, message))
	}
	switch {
	case pod == nil:
		reply(w, http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("pods %q not found", c.name)))
		return
	case !named:
		bad(fmt.Sprintf("container %s is not valid for pod %s", l.Container, c.name))
		return
	case l.Previous && !before:
		bad(fmt.Sprintf("previous terminated container %q in pod %q not found", l.Container, c.name))
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	w.WriteHeader(http.StatusOK)
	if write == nil {
		write = func(l Log, w io.Writer) { fmt.Fprintf(w, "2026-01-02T03:04:05.000000006Z pod %s\n", l.UID) }
	}
	write(l, w)
}

// hasRun says whether a pod has a container of the name, and whether that ran before.
func hasRun(pod object, container string) (named, before bool) {
	status, _ := pod["status"].(object)
	for _, list := range []string{"containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"} {
		all, _ := status[list].([]any)
		for _, c := range all {
			c, _ := c.(object)
			if text(c, "name") != container {
				continue
			}
			last, _ := c["lastState"].(object)
			return true, last["terminated"] != nil
		}
	}
	return false, false
}
