package conformance

import (
	"encoding/json"
	"net/http"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// about answers what asks of the server itself, and of who asks it; ok is false for
// everything else.
func (s *Server) about(r *http.Request, token string) (answer any, ok bool) {
	if token != stoopToken && token != adminToken {
		return nil, false
	}
	user := stoopUser
	if token == adminToken {
		user = "admin"
	}
	switch r.Method + " " + r.URL.Path {
	case "GET /version":
		return object{"major": "1", "minor": "36", "gitVersion": "v1.36.3"}, true
	case "GET /apis":
		list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, k := range kinds {
			if k.group == "" || s.removed[k.group] || slices.ContainsFunc(list.Groups, func(g metav1.APIGroup) bool { return g.Name == k.group }) {
				continue
			}
			v := metav1.GroupVersionForDiscovery{GroupVersion: apiVersion(k.group), Version: versionOf(k.group)}
			list.Groups = append(list.Groups, metav1.APIGroup{Name: k.group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v})
		}
		return list, true
	case "POST /apis/authentication.k8s.io/v1/selfsubjectreviews":
		return object{
			"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview",
			"status": object{"userInfo": object{"username": user}},
		}, true
	case "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
		var review struct {
			Spec struct {
				ResourceAttributes struct{ Verb, Resource, Subresource string }
			}
		}
		if json.NewDecoder(r.Body).Decode(&review) != nil {
			return nil, false
		}
		a := review.Spec.ResourceAttributes
		c := call{resource: a.Resource, subresource: a.Subresource, verb: a.Verb}
		s.mu.Lock()
		defer s.mu.Unlock()
		return object{
			"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
			"status": object{"allowed": token == adminToken || !s.forbidden[c.verb+" "+c.permission()]},
		}, true
	}
	return nil, false
}
