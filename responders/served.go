package responders

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Served is how the API server serves a kind of object.
type Served struct {
	schema.GroupVersionResource
	Kind       string
	Namespaced bool
	Scale      bool // it has the subresource scale
}

// served remembers what the API server said of its groups, so that no step asks
// anew. client-go's discovery would do the same, and link OpenAPI for it.
type served struct {
	mu     sync.Mutex
	groups map[string]apiGroup // by name, or by name/version
}

type apiGroup struct {
	at      time.Time
	version string
	list    []metav1.APIResource
}

const (
	// servedFor is how long an answer is believed: a CRD may be installed.
	servedFor = 10 * time.Minute
	// groupsMax bounds how many groups are remembered.
	groupsMax = 100
)

// ErrNotServed says that the cluster knows no such kind of object.
type ErrNotServed struct{ What string }

func (e *ErrNotServed) Error() string {
	return fmt.Sprintf("the cluster serves no %s (is what defines it installed?)", e.What)
}

// Resource finds how a resource is served, "deployments" of the group "apps", in
// the version that the API server prefers.
func (k *Kube) Resource(ctx context.Context, r schema.GroupResource) (Served, error) {
	g, err := k.group(ctx, r.Group, "")
	if err != nil {
		return Served{}, notServed(err, r.String())
	}
	return g.find(r.Group, r.String(), func(a metav1.APIResource) bool { return a.Name == r.Resource })
}

// OfKind finds how the objects of an apiVersion and kind are served, as an owner
// reference names them.
func (k *Kube) OfKind(ctx context.Context, apiVersion, kind string) (Served, error) {
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		return Served{}, fmt.Errorf("%s %s: %w", apiVersion, kind, err)
	}
	what := apiVersion + " " + kind
	g, err := k.group(ctx, gv.Group, gv.Version)
	if err != nil {
		return Served{}, notServed(err, what)
	}
	return g.find(gv.Group, what, func(a metav1.APIResource) bool { return a.Kind == kind })
}

func notServed(err error, what string) error {
	if isGone(err) {
		return &ErrNotServed{what}
	}
	return err
}

func (g apiGroup) find(name, what string, is func(metav1.APIResource) bool) (Served, error) {
	for _, a := range g.list {
		if strings.Contains(a.Name, "/") || !is(a) {
			continue
		}
		s := Served{
			GroupVersionResource: schema.GroupVersionResource{Group: name, Version: g.version, Resource: a.Name},
			Kind:                 a.Kind, Namespaced: a.Namespaced,
		}
		for _, sub := range g.list {
			s.Scale = s.Scale || sub.Name == a.Name+"/scale"
		}
		return s, nil
	}
	return Served{}, &ErrNotServed{what}
}

// group asks what a group holds, in a version or in the one that is preferred.
func (k *Kube) group(ctx context.Context, name, version string) (apiGroup, error) {
	key := name + "/" + version
	k.served.mu.Lock()
	g, ok := k.served.groups[key]
	k.served.mu.Unlock()
	if ok && time.Since(g.at) < servedFor {
		return g, nil
	}
	path := "/api"
	if name == "" {
		version = "v1"
	} else {
		path = "/apis/" + name
	}
	if version == "" {
		var about metav1.APIGroup
		if err := k.core.Get().AbsPath(path).Do(ctx).Into(&about); err != nil {
			return g, fmt.Errorf("ask for the API group %s: %w", name, err)
		}
		version = about.PreferredVersion.Version
	}
	var list metav1.APIResourceList
	if err := k.core.Get().AbsPath(path, version).Do(ctx).Into(&list); err != nil {
		return g, fmt.Errorf("ask for the resources of %s/%s: %w", name, version, err)
	}
	g = apiGroup{time.Now(), version, list.APIResources}
	k.served.mu.Lock()
	defer k.served.mu.Unlock()
	if k.served.groups == nil || len(k.served.groups) >= groupsMax {
		k.served.groups = map[string]apiGroup{}
	}
	k.served.groups[key] = g
	return g, nil
}
