package alert

import (
	"regexp"
	"strconv"
)

// Target is what an alert points at. Every part may be missing ("" or 0), and
// none is proof: a responder makes sure that it has the right one before it
// harms.
type Target struct {
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	UID       string `json:"uid,omitempty"`       // of the pod
	Container string `json:"container,omitempty"` // its id: 12 characters, or all 64
	Node      string `json:"node,omitempty"`      // the hostname that Falco wrote
	PID       int64  `json:"pid,omitempty"`       // as the host counts
	PIDStart  int64  `json:"pidStart,omitempty"`  // when the process was forked, in nanoseconds since 1970
	Host      bool   `json:"host,omitempty"`      // raised by the host itself: there is no pod

	Resource *Resource `json:"resource,omitempty"` // of an audit event
}

// Resource is what a Kubernetes audit event is about.
type Resource struct {
	Resource    string `json:"resource"` // plural, as in a URL: "configmaps"
	Name        string `json:"name,omitempty"`
	Namespace   string `json:"namespace,omitempty"`
	Subresource string `json:"subresource,omitempty"`
}

// What these names may hold in Kubernetes and in a container runtime. A value
// outside it names nothing that exists, and is left out.
var (
	dnsName     = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	uidForm     = regexp.MustCompile(`^[0-9a-fA-F][0-9a-fA-F-]{0,63}$`)
	containerID = regexp.MustCompile(`^[0-9a-f]{12,64}$`)
	// Some resources have names that are any part of a path: "system:node".
	pathPart = regexp.MustCompile(`^[^/%?#[:cntrl:][:space:]]{1,253}$`)
)

// Target gathers what the alert's fields say of its target.
func (a *Alert) Target() Target {
	get := func(name string, form *regexp.Regexp) string {
		v, _ := a.Field(name)
		if !form.MatchString(v) {
			return ""
		}
		return v
	}
	t := Target{Node: a.Hostname}
	if t.Node == "" {
		t.Node, _ = a.Field("evt.hostname")
	}
	if a.Text {
		return t
	}
	t.Container = get("container.id", containerID)
	if full := get("container.full_id", containerID); len(full) > len(t.Container) {
		t.Container = full
	}
	id, _ := a.Field("container.id")
	if t.Host = id == "host"; t.Host {
		t.Container = ""
	} else {
		t.Namespace = get("k8s.ns.name", dnsName)
		t.Pod = get("k8s.pod.name", dnsName)
		t.UID = get("k8s.pod.uid", uidForm)
	}
	t.PID = a.number("proc.pid")
	t.PIDStart = a.number("proc.pid.ts")

	if resource := get("ka.target.resource", dnsName); resource != "" {
		t.Resource = &Resource{
			Resource:    resource,
			Name:        get("ka.target.name", pathPart),
			Namespace:   get("ka.target.namespace", dnsName),
			Subresource: get("ka.target.subresource", dnsName),
		}
		if _, named := a.Field("ka.target.name"); !named {
			t.Resource.Name = get("ka.resp.name", pathPart)
		}
	}
	return t
}

func (a *Alert) number(field string) int64 {
	s, _ := a.Field(field)
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}
