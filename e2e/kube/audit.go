package kube

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"time"

	"stoop/e2e/harness"
)

// Request is a request that changed something, or tried to, from the API
// server's audit log.
type Request struct {
	User        string
	Verb        string // create, update, patch, delete or deletecollection
	Resource    string // with its subresource: "pods/eviction"
	Namespace   string
	Name        string
	UID         string // of a delete: the one that it required
	Code        int    // of the answer
	Body        json.RawMessage
	Time        time.Time // when it came in
	Interrupted bool      // the API server answered nobody: the client had gone
}

// event is the part of audit.k8s.io/v1 Event that the tests look at.
type event struct {
	Stage     string
	Verb      string
	User      struct{ Username string }
	ObjectRef struct{ Resource, Subresource, Namespace, Name, UID string }

	ResponseStatus           struct{ Code int }
	RequestObject            json.RawMessage
	RequestReceivedTimestamp time.Time
}

// Requests are the user's requests so far, in the order in which they were
// answered.
func (c *Cluster) Requests(t harness.T, user string) []Request {
	t.Helper()
	f, err := os.Open(c.path("audit.log"))
	if err != nil {
		t.Fatalf("open the audit log: %v", err)
	}
	defer f.Close()
	var out []Request
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return out // what has no newline yet is still being written
		}
		if err != nil {
			t.Fatalf("read the audit log: %v", err)
		}
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("read the audit log: %v\n%s", err, line)
		}
		if e.User.Username != user || e.Stage != "ResponseComplete" && e.Stage != "Panic" {
			continue
		}
		r := Request{
			User: e.User.Username, Verb: e.Verb, Resource: e.ObjectRef.Resource,
			Namespace: e.ObjectRef.Namespace, Name: e.ObjectRef.Name, UID: e.ObjectRef.UID,
			Code: e.ResponseStatus.Code, Body: e.RequestObject, Time: e.RequestReceivedTimestamp,
			Interrupted: e.Stage == "Panic",
		}
		if e.ObjectRef.Subresource != "" {
			r.Resource += "/" + e.ObjectRef.Subresource
		}
		var body struct{ Preconditions struct{ UID string } }
		if r.Verb == "delete" && json.Unmarshal(e.RequestObject, &body) == nil && body.Preconditions.UID != "" {
			r.UID = body.Preconditions.UID
		}
		out = append(out, r)
	}
}
