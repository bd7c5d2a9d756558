package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"stoop/alert"
	"stoop/evidence"
)

// What an audit event names is a name and no more: who may send a request may
// choose it, also where the request was refused. So it is proved that the request
// was carried out, and that what has the name now is what the request was about.

const (
	// A clock at another API server may be that much ahead of the one that wrote
	// the alert's time. (Creation times are whole seconds.)
	namedClocks = 2 * time.Second
	// An object that a request made is not older than that before its alert's
	// time, which is when the API server had answered.
	namedMade = time.Minute
	// manifestMost is more than etcd takes of one object.
	manifestMost = 4 << 20
)

// The verbs of requests after which there is an object.
var namedVerbs = []string{"create", "update", "patch"}

// checkVerbs says what is wrong with the parameter verbs.
func checkVerbs(verbs []string) error {
	if len(verbs) == 0 {
		return errors.New("verbs: there is none")
	}
	for _, v := range verbs {
		if !slices.Contains(namedVerbs, v) {
			return fmt.Errorf("verbs: %q is none of %s", v, strings.Join(namedVerbs, ", "))
		}
	}
	return nil
}

// succeeded is what ka.response.code says of a request that was carried out.
var succeeded = regexp.MustCompile(`^2[0-9]{2}$`)

// namedRequest refuses an alert whose request was not carried out, is about a part
// of the object, or has another verb. made says that the request made the object.
func namedRequest(a *alert.Alert, verbs []string, subresources bool) (made bool, err error) {
	code, ok := a.Field("ka.response.code")
	switch {
	case !ok:
		return false, Refuse("the alert does not say whether the API server did what was asked (ka.response.code), and whoever is refused may name any object: add the field to Falco's append_output for the source k8s_audit")
	case !succeeded.MatchString(code):
		return false, Refuse("the API server did not do what was asked (ka.response.code %s), so the alert proves nothing of the object", quote(code))
	}
	if dry, ok := a.Field("ka.uri.param[dryRun]"); ok {
		return false, Refuse("the request was only tried (dryRun=%s)", quote(dry))
	}
	if sub, ok := a.Field("ka.target.subresource"); ok && !subresources {
		return false, Refuse("the request was about the subresource %s, not about the object itself", quote(sub))
	}
	verb, ok := a.Field("ka.verb")
	switch {
	case !ok && slices.Contains(verbs, "create"):
		// The object's age proves that it was made by a request at that time.
		return true, nil
	case !ok:
		return false, Refuse("the alert does not say what was asked for (ka.verb): add the field to Falco's append_output for the source k8s_audit")
	case !slices.Contains(verbs, verb):
		return false, Refuse("the request was a %s, and the rule is about %s", quote(verb), strings.Join(verbs, ", "))
	}
	return verb == "create", nil
}

// namedObject asks for the object that the alert names, and proves that it is that
// one: not younger than the alert, and where the alert's request made it, not older
// either.
func namedObject(ctx context.Context, kube *Kube, as Served, t *alert.Resource, at time.Time, made bool) (*unstructured.Unstructured, error) {
	namespace := t.Namespace
	if !as.Namespaced {
		namespace = ""
	} else if namespace == "" {
		return nil, Refuse("the alert does not say which namespace the object is in (ka.target.namespace)")
	}
	o, err := namedClient(kube, as, namespace).Get(ctx, t.Name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", describe(alert.Target{Resource: t}), err)
	}
	born := o.GetCreationTimestamp().Time
	switch {
	case o.GetUID() == "":
		return nil, Refuse("the object has no UID: nothing tells it from another of the name")
	case born.After(at.Add(namedClocks)):
		return nil, fmt.Errorf("what has the name now was made at %s, after the alert: %w", born.UTC().Format(time.RFC3339), ErrGone)
	case made && born.Before(at.Add(-namedMade)):
		return nil, Refuse("what has the name was made at %s, long before the request that is said to have made it", born.UTC().Format(time.RFC3339))
	case o.GetDeletionTimestamp() != nil:
		return nil, fmt.Errorf("it is being deleted already: %w", ErrGone)
	}
	return o, nil
}

func namedClient(kube *Kube, as Served, namespace string) dynamic.ResourceInterface {
	if namespace == "" {
		return kube.Dynamic().Resource(as.GroupVersionResource)
	}
	return kube.Dynamic().Resource(as.GroupVersionResource).Namespace(namespace)
}

// onlyThis are the preconditions that a delete holds for: this object, as it was
// read.
func onlyThis(o *unstructured.Unstructured) metav1.DeleteOptions {
	uid, version := o.GetUID(), o.GetResourceVersion()
	// What the object owns goes too: Jobs leave their pods behind otherwise.
	background := metav1.DeletePropagationBackground
	return metav1.DeleteOptions{
		Preconditions:     &metav1.Preconditions{UID: &uid, ResourceVersion: &version},
		PropagationPolicy: &background,
	}
}

// groupResource reads "secrets" or "rolebindings.rbac.authorization.k8s.io".
func groupResource(s string) (schema.GroupResource, error) {
	resource, group, _ := strings.Cut(s, ".")
	if !resourceForm.MatchString(resource) || group != "" && !groupForm.MatchString(group) || strings.HasSuffix(s, ".") {
		return schema.GroupResource{}, errors.New("is no resource as kubectl api-resources names them, such as secrets or deployments.apps")
	}
	return schema.GroupResource{Group: group, Resource: resource}, nil
}

var (
	resourceForm = regexp.MustCompile(`^[a-z][a-z0-9]{0,62}$`)
	groupForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// keepManifests keeps objects in the evidence store as they are, and as they can be
// made again. It returns the folder.
func keepManifests(ctx context.Context, store *evidence.Store, r *Request, target string, objects []*unstructured.Unstructured) (path, sum string, err error) {
	if store == nil {
		return "", "", errors.New("there is no evidence store")
	}
	c, err := store.Begin(ctx, evidence.About{
		Step: r.Step.ID, Alert: r.Step.AlertID, Rule: r.Step.Rule, Responder: r.Step.Responder, Target: target,
	})
	if err != nil {
		return "", "", err
	}
	keep := func(name string, o *unstructured.Unstructured) error {
		b, err := json.MarshalIndent(o, "", "  ")
		if err != nil {
			return err
		}
		p, err := c.Add(ctx, name, bytes.NewReader(append(b, '\n')), manifestMost)
		if err == nil && !p.Whole() {
			err = fmt.Errorf("%s could not be kept whole: %s", name, p.Error)
		}
		return err
	}
	// Also where an earlier try had kept it: the object may have changed since.
	for i, o := range objects {
		for name, o := range map[string]*unstructured.Unstructured{"object": o, "again": madeAgain(o)} {
			if err := keep(fmt.Sprintf("%d.%s.json", i, name), o); err != nil {
				return "", "", errors.Join(err, c.Discard())
			}
		}
	}
	err = c.Close()
	return c.Path(), c.Sum(), err
}

// madeAgain is an object as kubectl create takes it.
func madeAgain(o *unstructured.Unstructured) *unstructured.Unstructured {
	o = o.DeepCopy()
	for _, f := range []string{"uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"} {
		unstructured.RemoveNestedField(o.Object, "metadata", f)
	}
	unstructured.RemoveNestedField(o.Object, "status")
	return o
}

// account is stoop's own service account; "" where it has none.
func (s Self) account() (namespace, name string) {
	rest, ok := strings.CutPrefix(s.User, "system:serviceaccount:")
	if !ok {
		return "", ""
	}
	namespace, name, _ = strings.Cut(rest, ":")
	return namespace, name
}

// isAccount reports whether a subject of a binding is one service account.
func isAccount(s rbacv1.Subject, namespace, name string) bool {
	switch s.Kind {
	case rbacv1.ServiceAccountKind:
		return s.Namespace == namespace && s.Name == name
	case rbacv1.UserKind:
		return s.Name == "system:serviceaccount:"+namespace+":"+name
	}
	return false
}

// isSubject reports whether a subject of a binding is stoop itself: a service account
// of its namespace, which the stoops of nodes have another one of than the one that
// answers audit events, or all of them.
func (s Self) isSubject(b rbacv1.Subject) bool {
	namespace, name := s.account()
	switch {
	case name == "":
		return false
	case b.Kind == rbacv1.ServiceAccountKind:
		return b.Namespace == namespace
	case b.Kind == rbacv1.UserKind:
		return strings.HasPrefix(b.Name, "system:serviceaccount:"+namespace+":")
	}
	return b.Kind == rbacv1.GroupKind && b.Name == "system:serviceaccounts:"+namespace
}
