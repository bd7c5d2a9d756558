package conformance

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Server is a [World] that needs nothing but Go: a small API server on
// loopback, to which client-go talks as to a real one.
//
// client-go's fake clientset would not do. It takes a delete with the wrong
// UID, ignores grace periods and contexts, and never answers over a wire. What
// this one does was copied from what kube-apiserver 1.36.3 was seen to answer:
// 409 for a UID or resource version that is not the object's, 422 for a patch of
// another UID and for a failed JSON patch test, graceful deletion (a pod on a
// node without a kubelet stays Terminating), RBAC's 403, watches that begin
// with the initial events, evictions that ask the PodDisruptionBudgets, whose
// status the test has to write, and the subresource scale.
//
// It lies too: it validates nothing, has no admission, no defaults and no
// garbage collector, and takes any body as JSON. So the same suite runs against
// a real API server in e2e.
type Server struct {
	http *httptest.Server

	mu        sync.Mutex
	version   int64
	objects   map[string]map[string]object // by resource, then namespace/name
	events    []event
	changed   chan struct{}
	forbidden map[string]bool // "verb resource", for stoop
	removed   map[string]bool // groups that are not served
	finished  chan struct{}
	onExec    func(c Command, stdout, stderr io.Writer) int
	onUpgrade http.HandlerFunc
	onLog     func(l Log, w io.Writer)
}

type object = map[string]any

type event struct {
	resource string
	kind     string
	version  int64
	object   object
}

const (
	stoopToken = "stoop"
	adminToken = "admin"
	stoopUser  = "system:serviceaccount:stoop:stoop"
)

// NewServer is one that ends with the test.
func NewServer(t testing.TB) *Server {
	s := &Server{
		objects: map[string]map[string]object{}, changed: make(chan struct{}),
		forbidden: map[string]bool{}, removed: map[string]bool{}, finished: make(chan struct{}),
	}
	s.http = httptest.NewServer(s)
	t.Cleanup(func() {
		close(s.finished)
		s.http.Close()
	})
	return s
}

func (s *Server) config(token string) *rest.Config {
	c := &rest.Config{Host: s.http.URL, BearerToken: token, QPS: -1}
	c.ContentType = "application/json" // it knows no protobuf
	return c
}

// Config is how stoop reaches the server.
func (s *Server) Config() *rest.Config { return s.config(stoopToken) }

// Admin may do everything.
func (s *Server) Admin() kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(s.config(adminToken))
}

// Forbid takes a permission from stoop.
func (s *Server) Forbid(_ testing.TB, verb, _, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forbidden[verb+" "+resource] = true
}

// call is one request, read.
type call struct {
	group, resource, namespace, name, subresource, verb string
}

// permission is the resource as RBAC names it.
func (c call) permission() string {
	if c.subresource != "" {
		return c.resource + "/" + c.subresource
	}
	return c.resource
}

// kinds are the resources that the server knows the kind of, by what it is asked
// for; a name with a group behind it is that group's.
var kinds = []struct {
	group, resource, kind string
	cluster, scale        bool
}{
	{"", "pods", "Pod", false, false},
	{"", "nodes", "Node", true, false},
	{"", "namespaces", "Namespace", true, false},
	{"", "configmaps", "ConfigMap", false, false},
	{"", "services", "Service", false, false},
	{"", "secrets", "Secret", false, false},
	{"", "events", "Event", false, false},
	{"", "serviceaccounts", "ServiceAccount", false, false},
	{"", "persistentvolumeclaims", "PersistentVolumeClaim", false, false},
	{"networking.k8s.io", "networkpolicies", "NetworkPolicy", false, false},
	{"apps", "deployments", "Deployment", false, true},
	{"apps", "replicasets", "ReplicaSet", false, true},
	{"apps", "statefulsets", "StatefulSet", false, true},
	{"apps", "daemonsets", "DaemonSet", false, false},
	{"batch", "jobs", "Job", false, false},
	{"policy", "poddisruptionbudgets", "PodDisruptionBudget", false, false},
	{"coordination.k8s.io", "leases", "Lease", false, false},
	{"rbac.authorization.k8s.io", "roles", "Role", false, false},
	{"rbac.authorization.k8s.io", "rolebindings", "RoleBinding", false, false},
	{"rbac.authorization.k8s.io", "clusterroles", "ClusterRole", true, false},
	{"rbac.authorization.k8s.io", "clusterrolebindings", "ClusterRoleBinding", true, false},
	{"admissionregistration.k8s.io", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", true, false},
	{"autoscaling", "horizontalpodautoscalers", "HorizontalPodAutoscaler", false, false},
	{"cilium.io", "ciliumnetworkpolicies", "CiliumNetworkPolicy", false, false},
	{"projectcalico.org", "globalnetworkpolicies", "GlobalNetworkPolicy", true, false},
	{"policy.networking.k8s.io", "clusternetworkpolicies", "ClusterNetworkPolicy", true, false},
}

// versionOf is the version of a group, v1 if it is not another.
func versionOf(group string) string {
	return cmp.Or(map[string]string{"cilium.io": "v2", "projectcalico.org": "v3", "policy.networking.k8s.io": "v1alpha2"}[group], "v1")
}

// Remove has the server serve a group no more.
func (s *Server) Remove(group string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removed[group] = true
}

func kindOf(resource string) string {
	for _, k := range kinds {
		if k.resource == resource {
			return k.kind
		}
	}
	return ""
}

// discover answers what a group holds.
func discover(path string) (any, bool) {
	p := strings.Split(strings.Trim(path, "/"), "/")
	group := ""
	switch {
	case len(p) == 2 && p[0] == "api" && p[1] == "v1":
	case len(p) == 2 && p[0] == "apis", len(p) == 3 && p[0] == "apis" && p[2] == versionOf(p[1]):
		group = p[1]
	default:
		return nil, false
	}
	list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: apiVersion(group)}
	for _, k := range kinds {
		if k.group != group {
			continue
		}
		list.APIResources = append(list.APIResources, metav1.APIResource{Name: k.resource, Kind: k.kind, Namespaced: !k.cluster})
		if k.scale {
			list.APIResources = append(list.APIResources, metav1.APIResource{Name: k.resource + "/scale", Kind: "Scale", Namespaced: true})
		}
	}
	if list.APIResources == nil {
		return nil, false
	}
	if len(p) == 2 && p[0] == "apis" {
		v := metav1.GroupVersionForDiscovery{GroupVersion: apiVersion(group), Version: versionOf(group)}
		return metav1.APIGroup{
			TypeMeta: metav1.TypeMeta{Kind: "APIGroup", APIVersion: "v1"},
			Name:     group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v,
		}, true
	}
	return list, true
}

func read(r *http.Request) (call, bool) {
	var c call
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case len(p) > 2 && p[0] == "api" && p[1] == "v1":
		p = p[2:]
	case len(p) > 3 && p[0] == "apis":
		c.group, p = p[1], p[3:]
	default:
		return c, false
	}
	// A namespace's own subresources are not asked for.
	if len(p) > 2 && p[0] == "namespaces" {
		c.namespace, p = p[1], p[2:]
	}
	c.resource = p[0]
	if len(p) > 1 {
		c.name = p[1]
	}
	if len(p) > 2 {
		c.subresource = p[2]
	}
	switch r.Method {
	case http.MethodGet:
		c.verb = "get"
		if c.name == "" {
			c.verb = "list"
			if w := r.URL.Query().Get("watch"); w == "true" || w == "1" {
				c.verb = "watch"
			}
		}
	case http.MethodPost:
		c.verb = "create"
	case http.MethodPut:
		c.verb = "update"
	case http.MethodPatch:
		c.verb = "patch"
	case http.MethodDelete:
		c.verb = "delete"
	}
	return c, c.verb != ""
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	removed := len(p) > 1 && p[0] == "apis" && s.removed[p[1]]
	s.mu.Unlock()
	if removed {
		reply(w, http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, "the server could not find the requested resource"))
		return
	}
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if answer, ok := s.about(r, token); ok {
		reply(w, http.StatusOK, answer)
		return
	}
	if answer, ok := discover(r.URL.Path); ok {
		reply(w, http.StatusOK, answer)
		return
	}
	c, ok := read(r)
	if !ok {
		reply(w, http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, "there is no such path"))
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	forbidden := token == stoopToken && s.forbidden[c.verb+" "+c.permission()]
	s.mu.Unlock()
	switch {
	case token != stoopToken && token != adminToken:
		reply(w, http.StatusUnauthorized, status(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "Unauthorized"))
	case forbidden:
		where := "at the cluster scope"
		if c.namespace != "" {
			where = fmt.Sprintf("in the namespace %q", c.namespace)
		}
		st := status(http.StatusForbidden, metav1.StatusReasonForbidden, fmt.Sprintf("%s %q is forbidden: User %q cannot %s resource %q in API group %q %s",
			c.resource, c.name, stoopUser, c.verb, c.permission(), c.group, where))
		reply(w, http.StatusForbidden, st)
	case c.verb == "watch":
		s.watch(w, r, c)
	case c.executes():
		s.exec(w, r, c)
	case c.proxies():
		reply(w, http.StatusOK, object{"items": []string{"/var/lib/kubelet/checkpoints/checkpoint.tar"}})
	case c.verb == "get" && c.permission() == "pods/log":
		s.log(w, r, c)
	default:
		s.mu.Lock()
		code, answer := s.do(c, r, body)
		s.mu.Unlock()
		reply(w, code, answer)
	}
}

func reply(w http.ResponseWriter, code int, answer any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func status(code int, reason metav1.StatusReason, message string) metav1.Status {
	return metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message,
	}
}

func meta(o object) object {
	m, _ := o["metadata"].(object)
	return m
}

func text(m object, key string) string {
	v, _ := m[key].(string)
	return v
}

func clone(o object) object {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	var c object
	if err := json.Unmarshal(b, &c); err != nil {
		panic(err)
	}
	return c
}

// do answers a request. The caller holds the lock.
func (s *Server) do(c call, r *http.Request, body []byte) (int, any) {
	all := s.objects[c.resource]
	if all == nil {
		all = map[string]object{}
		s.objects[c.resource] = all
	}
	key := c.namespace + "/" + c.name
	if c.verb == "list" {
		var items []object
		for _, k := range slices.Sorted(maps.Keys(all)) {
			if matches(all[k], c, r) {
				items = append(items, all[k])
			}
		}
		about := object{"resourceVersion": strconv.FormatInt(s.version, 10)}
		// A page begins where the one before ended.
		from, _ := strconv.Atoi(r.URL.Query().Get("continue"))
		items = items[min(from, len(items)):]
		if limit, _ := strconv.Atoi(r.URL.Query().Get("limit")); limit > 0 && limit < len(items) {
			items = items[:limit]
			about["continue"] = strconv.Itoa(from + limit)
		}
		return http.StatusOK, object{
			"kind": kindOf(c.resource) + "List", "apiVersion": apiVersion(c.group), "items": items, "metadata": about,
		}
	}
	if c.subresource == "eviction" && c.verb == "create" {
		return s.evict(c, all, body)
	}
	if c.subresource == "scale" {
		return s.scale(c, all, body)
	}
	if c.verb == "create" {
		var o object
		if err := json.Unmarshal(body, &o); err != nil || meta(o) == nil {
			return http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the body is no object")
		}
		m := meta(o)
		c.name = text(m, "name")
		key = c.namespace + "/" + c.name
		if all[key] != nil {
			return http.StatusConflict, status(http.StatusConflict, metav1.StatusReasonAlreadyExists,
				fmt.Sprintf("%s %q already exists", c.resource, c.name))
		}
		if c.namespace != "" {
			m["namespace"] = c.namespace
		}
		m["uid"] = string(uuid.NewUUID())
		m["creationTimestamp"] = time.Now().UTC().Format(time.RFC3339)
		s.store(c, key, o, "ADDED")
		return http.StatusCreated, o
	}
	have := all[key]
	if have == nil {
		return http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("%s %q not found", c.resource, c.name))
	}
	uid, version := text(meta(have), "uid"), text(meta(have), "resourceVersion")
	switch c.verb {
	case "get":
		return http.StatusOK, have
	case "delete":
		var o metav1.DeleteOptions
		if len(body) > 0 {
			if err := json.Unmarshal(body, &o); err != nil {
				return http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
			}
		}
		return s.remove(c, have, o)
	}

	// update and patch
	now := clone(have)
	switch t := r.Header.Get("Content-Type"); {
	case c.verb == "update":
		now = nil
		if err := json.Unmarshal(body, &now); err != nil || meta(now) == nil {
			return http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the body is no object")
		}
		if text(meta(now), "uid") == "" {
			meta(now)["uid"] = uid
		}
		if c.subresource == "status" {
			whole := clone(have)
			whole["status"] = now["status"]
			now = whole
		}
	case strings.HasPrefix(t, "application/merge-patch+json"), strings.HasPrefix(t, "application/json-patch+json"):
		old, err := json.Marshal(have)
		if err != nil {
			panic(err)
		}
		var patched []byte
		if strings.HasPrefix(t, "application/merge") {
			patched, err = jsonpatch.MergePatch(old, body)
		} else {
			var p jsonpatch.Patch
			if p, err = jsonpatch.DecodePatch(body); err == nil {
				patched, err = p.Apply(old)
			}
		}
		now = nil
		if err == nil {
			err = json.Unmarshal(patched, &now)
		}
		if err != nil {
			return http.StatusUnprocessableEntity, status(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "the server rejected our request due to an error in our request")
		}
	default:
		return http.StatusUnsupportedMediaType, status(http.StatusUnsupportedMediaType, metav1.StatusReasonUnsupportedMediaType, "no patch of the kind "+t)
	}
	if v := text(meta(now), "resourceVersion"); v != "" && v != version {
		return conflict(c, "the object has been modified; please apply your changes to the latest version and try again")
	}
	if text(meta(now), "uid") != uid {
		st := status(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid,
			fmt.Sprintf("%s %q is invalid: metadata.uid: Invalid value: %q: field is immutable", c.resource, c.name, text(meta(now), "uid")))
		st.Details = &metav1.StatusDetails{Name: c.name, Causes: []metav1.StatusCause{{Type: metav1.CauseTypeFieldValueInvalid, Field: "metadata.uid"}}}
		return http.StatusUnprocessableEntity, st
	}
	s.store(c, key, now, "MODIFIED")
	return http.StatusOK, now
}

// conflict is a 409.
func conflict(c call, message string) (int, any) {
	return http.StatusConflict, status(http.StatusConflict, metav1.StatusReasonConflict,
		fmt.Sprintf("Operation cannot be fulfilled on %s %q: %s", c.resource, c.name, message))
}

// remove deletes an object.
func (s *Server) remove(c call, have object, o metav1.DeleteOptions) (int, any) {
	key := c.namespace + "/" + c.name
	if p := o.Preconditions; p != nil && p.UID != nil && string(*p.UID) != text(meta(have), "uid") {
		return conflict(c, fmt.Sprintf("the UID in the precondition (%s) does not match the UID in record (%s). The object might have been deleted and then recreated", *p.UID, text(meta(have), "uid")))
	}
	if p, version := o.Preconditions, text(meta(have), "resourceVersion"); p != nil && p.ResourceVersion != nil && *p.ResourceVersion != version {
		return conflict(c, fmt.Sprintf("the ResourceVersion in the precondition (%s) does not match the ResourceVersion in record (%s). The object might have been modified", *p.ResourceVersion, version))
	}
	if c.resource == "pods" {
		grace := int64(30)
		if o.GracePeriodSeconds != nil {
			grace = *o.GracePeriodSeconds
		}
		if grace > 0 {
			if left, ok := meta(have)["deletionGracePeriodSeconds"].(float64); ok && int64(left) <= grace {
				return http.StatusOK, have
			}
			now := clone(have)
			meta(now)["deletionTimestamp"] = time.Now().Add(time.Duration(grace) * time.Second).UTC().Format(time.RFC3339)
			meta(now)["deletionGracePeriodSeconds"] = float64(grace)
			s.store(c, key, now, "MODIFIED")
			return http.StatusOK, now
		}
	}
	delete(s.objects[c.resource], key)
	s.tell(c, clone(have), "DELETED")
	return http.StatusOK, object{"kind": "Status", "apiVersion": "v1", "status": "Success"}
}

// evict answers a pod's subresource eviction. The budget comes before the UID, as
// kube-apiserver has it.
func (s *Server) evict(c call, all map[string]object, body []byte) (int, any) {
	var e policyv1.Eviction
	if err := json.Unmarshal(body, &e); err != nil {
		return http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
	}
	pod := all[c.namespace+"/"+c.name]
	if pod == nil {
		return http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("pods %q not found", c.name))
	}
	var budgets []object
	phase, _ := pod["status"].(object)
	if p := text(phase, "phase"); (p == "Running" || p == "") && meta(pod)["deletionTimestamp"] == nil {
		for _, b := range s.objects["poddisruptionbudgets"] {
			if text(meta(b), "namespace") == c.namespace && selects(b, pod) {
				budgets = append(budgets, b)
			}
		}
	}
	if len(budgets) > 1 {
		// Not an error for HTTP.
		return http.StatusCreated, metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
			Status:   metav1.StatusFailure, Code: http.StatusInternalServerError,
			Message: "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
		}
	}
	if len(budgets) == 1 {
		now := clone(budgets[0])
		st, _ := now["status"].(object)
		allowed, _ := st["disruptionsAllowed"].(float64)
		if allowed == 0 {
			healthy, _ := st["currentHealthy"].(float64)
			desired, _ := st["desiredHealthy"].(float64)
			st := status(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "Cannot evict pod as it would violate the pod's disruption budget.")
			st.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{
				Type:    policyv1.DisruptionBudgetCause,
				Message: fmt.Sprintf("The disruption budget %s needs %g healthy pods and has %g currently", text(meta(now), "name"), desired, healthy),
			}}}
			return http.StatusTooManyRequests, st
		}
		st["disruptionsAllowed"] = allowed - 1
		name := text(meta(now), "name")
		s.store(call{group: policyv1.GroupName, resource: "poddisruptionbudgets", namespace: c.namespace, name: name}, c.namespace+"/"+name, now, "MODIFIED")
	}
	var o metav1.DeleteOptions
	if e.DeleteOptions != nil {
		o = *e.DeleteOptions
	}
	if code, answer := s.remove(c, pod, o); code != http.StatusOK {
		return code, answer
	}
	return http.StatusCreated, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusCreated}
}

// selects reports whether an object's spec.selector selects a pod.
func selects(o, pod object) bool {
	b, err := json.Marshal(o["spec"])
	if err != nil {
		return false
	}
	var spec struct {
		Selector *metav1.LabelSelector `json:"selector"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return false
	}
	selector, err := metav1.LabelSelectorAsSelector(spec.Selector)
	set := labels.Set{}
	all, _ := meta(pod)["labels"].(object)
	for k := range all {
		set[k] = text(all, k)
	}
	return err == nil && selector.Matches(set)
}

// scale answers the subresource scale: get and update.
func (s *Server) scale(c call, all map[string]object, body []byte) (int, any) {
	have := all[c.namespace+"/"+c.name]
	if have == nil {
		return http.StatusNotFound, status(http.StatusNotFound, metav1.StatusReasonNotFound, fmt.Sprintf("%s %q not found", c.resource, c.name))
	}
	now := clone(have)
	if c.verb == "update" {
		var to object
		if err := json.Unmarshal(body, &to); err != nil || meta(to) == nil {
			return http.StatusBadRequest, status(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the body is no object")
		}
		uid := text(meta(have), "uid")
		if u := text(meta(to), "uid"); u != "" && u != uid {
			return conflict(c, fmt.Sprintf("Precondition failed: UID in precondition: %s, UID in object meta: %s", u, uid))
		}
		if v := text(meta(to), "resourceVersion"); v != "" && v != text(meta(have), "resourceVersion") {
			return conflict(c, "the object has been modified; please apply your changes to the latest version and try again")
		}
		spec, _ := to["spec"].(object)
		n, _ := spec["replicas"].(float64)
		mine, _ := now["spec"].(object)
		if mine == nil {
			mine = object{}
			now["spec"] = mine
		}
		mine["replicas"] = n
		s.store(c, c.namespace+"/"+c.name, now, "MODIFIED")
	} else if c.verb != "get" {
		return http.StatusMethodNotAllowed, status(http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "the server does not allow this method on the requested resource")
	}
	m, spec := meta(now), object{}
	if mine, _ := now["spec"].(object); mine["replicas"] != nil && mine["replicas"] != 0.0 {
		spec["replicas"] = mine["replicas"] // which omits 0, as the real one does
	}
	return http.StatusOK, object{
		"kind": "Scale", "apiVersion": "autoscaling/v1", "spec": spec, "status": object{"replicas": 0},
		"metadata": object{"name": m["name"], "namespace": m["namespace"], "uid": m["uid"], "resourceVersion": m["resourceVersion"]},
	}
}

func apiVersion(group string) string {
	if group == "" {
		return "v1"
	}
	return group + "/" + versionOf(group)
}

func (s *Server) store(c call, key string, o object, kind string) {
	if text(o, "kind") == "" {
		o["kind"] = kindOf(c.resource)
		o["apiVersion"] = apiVersion(c.group)
	}
	s.tell(c, o, kind)
	s.objects[c.resource][key] = o
}

func (s *Server) tell(c call, o object, kind string) {
	s.version++
	meta(o)["resourceVersion"] = strconv.FormatInt(s.version, 10)
	s.events = append(s.events, event{c.resource, kind, s.version, clone(o)})
	close(s.changed)
	s.changed = make(chan struct{})
}

func matches(o object, c call, r *http.Request) bool {
	if c.namespace != "" && text(meta(o), "namespace") != c.namespace {
		return false
	}
	if q := r.URL.Query().Get("labelSelector"); q != "" {
		selector, err := labels.Parse(q)
		has, _ := meta(o)["labels"].(object)
		set := labels.Set{}
		for k := range has {
			set[k] = text(has, k)
		}
		if err != nil || !selector.Matches(set) {
			return false
		}
	}
	if node, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "spec.nodeName="); ok {
		spec, _ := o["spec"].(object)
		return text(spec, "nodeName") == node
	}
	if name, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name="); ok {
		return text(meta(o), "name") == name
	}
	if uid, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "involvedObject.uid="); ok {
		about, _ := o["involvedObject"].(object)
		return text(about, "uid") == uid
	}
	return true
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request, c call) {
	q := r.URL.Query()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := json.NewEncoder(w)
	send := func(kind string, o object) bool {
		err := out.Encode(object{"type": kind, "object": o})
		w.(http.Flusher).Flush()
		return err == nil
	}
	from, _ := strconv.ParseInt(q.Get("resourceVersion"), 10, 64)
	if q.Get("sendInitialEvents") == "true" {
		s.mu.Lock()
		from = s.version
		var first []object
		for _, o := range s.objects[c.resource] {
			if matches(o, c, r) {
				first = append(first, clone(o))
			}
		}
		s.mu.Unlock()
		for _, o := range first {
			if !send("ADDED", o) {
				return
			}
		}
		kind := kindOf(c.resource)
		if !send("BOOKMARK", object{"kind": kind, "apiVersion": apiVersion(c.group), "metadata": object{
			"resourceVersion": strconv.FormatInt(from, 10),
			"annotations":     object{metav1.InitialEventsAnnotationKey: "true"},
		}}) {
			return
		}
	}
	for {
		s.mu.Lock()
		changed := s.changed
		var news []event
		for _, e := range s.events {
			if e.version > from && e.resource == c.resource && matches(e.object, c, r) {
				news = append(news, e)
			}
		}
		from = s.version
		s.mu.Unlock()
		for _, e := range news {
			if !send(e.kind, e.object) {
				return
			}
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-s.finished:
			return
		}
	}
}
