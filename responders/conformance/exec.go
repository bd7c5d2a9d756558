package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"testing"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
)

// Command is what pods/exec was asked to run.
type Command struct {
	Namespace, Pod, Container string
	Argv                      []string
}

// OnExec says what becomes of the commands that [Server] is to execute in pods: run
// writes their output and returns their exit status. Without it each says "ok". There
// is no container in which they could really run; the protocol is the API server's,
// version 5 over a WebSocket.
func (s *Server) OnExec(_ testing.TB, run func(c Command, stdout, stderr io.Writer) int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onExec = run
}

// OnUpgrade has another answer what is to be executed by another way than a WebSocket.
func (s *Server) OnUpgrade(_ testing.TB, answer http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onUpgrade = answer
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request, c call) {
	s.mu.Lock()
	run, upgrade := s.onExec, s.onUpgrade
	pod := s.objects["pods"][c.namespace+"/"+c.name]
	s.mu.Unlock()
	switch {
	case pod == nil:
		reply(w, http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("pods %q not found", c.name)))
		return
	case !websocket.IsWebSocketUpgrade(r) && upgrade != nil:
		upgrade(w, r)
		return
	case !websocket.IsWebSocketUpgrade(r):
		reply(w, http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, "Upgrade request required"))
		return
	case run == nil:
		run = func(_ Command, stdout, _ io.Writer) int { fmt.Fprintln(stdout, "ok"); return 0 }
	}
	up := websocket.Upgrader{Subprotocols: []string{remotecommand.StreamProtocolV5Name}}
	conn, err := up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer conn.Close()
	q := r.URL.Query()
	code := run(Command{c.namespace, c.name, q.Get("container"), q["command"]},
		stream{conn, remotecommand.StreamStdOut}, stream{conn, remotecommand.StreamStdErr})
	st := metav1.Status{Status: metav1.StatusSuccess}
	if code != 0 {
		st = status(0, remotecommand.NonZeroExitCodeReason, fmt.Sprintf("command terminated with non-zero exit code: %d", code))
		st.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: remotecommand.ExitCodeCauseType, Message: strconv.Itoa(code)}}}
	}
	b, err := json.Marshal(st)
	if err != nil {
		panic(err)
	}
	_, _ = stream{conn, remotecommand.StreamErr}.Write(b)
	_ = conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
	// Until the other side has read it all and hangs up.
	for {
		if _, _, err := conn.NextReader(); err != nil {
			return
		}
	}
}

// stream is one channel of the connection.
type stream struct {
	conn *websocket.Conn
	id   byte
}

func (s stream) Write(b []byte) (int, error) {
	if err := s.conn.WriteMessage(websocket.BinaryMessage, append([]byte{s.id}, b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// executes reports whether a call runs a command in a pod: that is a GET, and no look.
func (c call) executes() bool { return c.resource == "pods" && c.subresource == "exec" }

// proxies reports whether a call is for a node's kubelet. All that it is asked for here
// is a checkpoint.
func (c call) proxies() bool {
	return c.resource == "nodes" && c.subresource == "proxy" && c.verb == "create"
}
