package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"stoop/child"
	"stoop/evidence"
	"stoop/param"
)

func captureManifest() Entry {
	return Entry{
		Name: "capture-manifest",
		Doc:  "Keeps the pod as the API server has it, and what owns it.",
		Notes: `pod.json is the pod with its status, and owner-1-KIND.json and so on what owns it, up the
chain: the ReplicaSet, the Deployment, the custom resource. Who changed which field when
stands in their managedFields. An owner of a kind that stoop may not read, or that is
another object of that name by now, is named in the manifest and left out; add its kind
to stoop's role to have it kept. Secrets and ConfigMaps are never read, also when
somebody has made one a pod's owner.

The objects name Secrets, and hold none of their values. Values that were written into
them in the plain are left out where their names match redact, and logins in addresses;
so they are in the copy that kubectl apply leaves in an annotation. Command lines and
other annotations are kept as they are.`,
		Params: param.Describe(captureManifestDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods", "replicationcontrollers"}, Verbs: []string{"get"}},
			{APIGroups: []string{"apps"}, Resources: []string{"replicasets", "deployments", "statefulsets", "daemonsets"}, Verbs: []string{"get"}},
			{APIGroups: []string{"batch"}, Resources: []string{"jobs", "cronjobs"}, Verbs: []string{"get"}},
		},
		Kind:     Evidence,
		Object:   PodObject,
		Deadline: time.Minute,
		New:      func(env Env) Responder { return &manifestCapturer{env.Kube, env.Evidence} },
	}
}

type captureManifestParams struct {
	Owners  bool           `param:"owners" doc:"Also what owns the pod, up the chain."`
	Redact  []string       `param:"redact" doc:"Names of environment variables, and of other values, that are not kept; * and ? are globs, and the case of letters does not count."`
	MaxSize param.Size     `param:"maxSize" min:"1KiB" max:"1GiB" doc:"How much is kept in all."`
	Timeout param.Duration `param:"timeout" min:"100ms" max:"50s" doc:"How long it may take; what there is by then is kept."`
}

func captureManifestDefaults() captureManifestParams {
	return captureManifestParams{
		Owners: true, Redact: captureProcDefaults().Redact, MaxSize: 8 << 20, Timeout: param.Duration(20 * time.Second),
	}
}

// Validate refuses a glob that is none.
func (p captureManifestParams) Validate() error {
	for _, glob := range p.Redact {
		if _, err := path.Match(glob, ""); err != nil {
			return fmt.Errorf("redact: %s is no glob", param.Cut(glob))
		}
	}
	return nil
}

// ownersMost bounds how many owners are kept: whoever may create a pod may name as
// many as he likes.
const ownersMost = 10

type manifestCapturer struct {
	kube  *Kube
	store *evidence.Store
}

func (m *manifestCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := captureManifestDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if m.store == nil {
		return Result{}, Refuse("there is no evidence store")
	}
	reading, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	// Not as the typed client would have it: what that does not know would be lost.
	pod, err := m.kube.Dynamic().Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"}).
		Namespace(r.Pod.Namespace).Get(reading, r.Pod.Name, metav1.GetOptions{})
	if err == nil && pod.GetUID() != r.Pod.UID {
		err = ErrGone
	}
	if err != nil {
		return Result{}, fmt.Errorf("manifest of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	kept, ended, err := beginCapture(ctx, m.store, r, r.Pod)
	if err != nil {
		return Result{}, err
	}
	if ended != nil {
		return *ended, nil
	}
	room := int64(params.MaxSize)
	keep := func(name string, o *unstructured.Unstructured) error {
		redact(o.Object, params.Redact)
		var b bytes.Buffer
		out := json.NewEncoder(&b)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		if err := out.Encode(o.Object); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		p, err := kept.Add(context.WithoutCancel(ctx), name, &b, room)
		room -= p.Size
		return err
	}
	err = keep("pod.json", pod)
	if params.Owners {
		err = errors.Join(err, m.owners(reading, kept, pod, keep))
	}
	return endCapture(ctx, kept, r, err)
}

// owners keeps what owns the pod, its owners' owners, and so on. What can't be had
// is noted; the error is the store's.
func (m *manifestCapturer) owners(ctx context.Context, kept *evidence.Case, pod *unstructured.Unstructured, keep func(string, *unstructured.Unstructured) error) error {
	seen := map[types.UID]bool{pod.GetUID(): true}
	next := pod.GetOwnerReferences()
	var errs []error
	for n := 1; len(next) > 0; next = next[1:] {
		ref := next[0]
		if seen[ref.UID] {
			continue
		}
		if n > ownersMost {
			kept.Note("the owners beyond %d are not kept", ownersMost)
			break
		}
		seen[ref.UID] = true
		o, err := m.owner(ctx, pod.GetNamespace(), ref)
		if err != nil {
			_, _, _, reason := classify(err)
			kept.Note("the owner %s %s is not kept: %s", ref.Kind, ref.Name, reason)
			n++
			continue
		}
		next = append(next, o.GetOwnerReferences()...)
		errs = append(errs, keep(fmt.Sprintf("owner-%d-%s.json", n, strings.ToLower(ref.Kind)), o))
		n++
	}
	return errors.Join(errs...)
}

func (m *manifestCapturer) owner(ctx context.Context, namespace string, ref metav1.OwnerReference) (*unstructured.Unstructured, error) {
	s, err := m.kube.OfKind(ctx, ref.APIVersion, ref.Kind)
	if err != nil {
		return nil, err
	}
	if s.Group == "" && (s.Resource == "secrets" || s.Resource == "configmaps") {
		return nil, Refuse("what %s hold is not for a manifest", s.Resource)
	}
	if !s.Namespaced {
		namespace = ""
	}
	o, err := m.kube.Dynamic().Resource(s.GroupVersionResource).Namespace(namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err == nil && o.GetUID() != ref.UID {
		err = fmt.Errorf("it is another one of that name by now: %w", ErrGone)
	}
	return o, err
}

// lastApplied is where kubectl apply leaves a copy of what it was given.
const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"

// redact takes the secrets out of an object: values that have a name beside them,
// as those of environment variables and of HTTP headers, where the name matches;
// and logins in addresses.
func redact(v any, names []string) any {
	switch v := v.(type) {
	case map[string]any:
		name, named := v["name"].(string)
		for k, field := range v {
			text, is := field.(string)
			switch {
			case is && k == "value" && named:
				v[k] = child.Redacted(names, name, text)
			case is && k == lastApplied:
				v[k] = redactJSON(text, names)
			default:
				v[k] = redact(field, names)
			}
		}
	case []any:
		for i := range v {
			v[i] = redact(v[i], names)
		}
	case string:
		return child.Redacted(nil, "", v)
	}
	return v
}

// redactJSON does so in an object that was written into a string. One that can't be
// read is left out as a whole.
func redactJSON(text string, names []string) string {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return fmt.Sprintf("<redacted, %d bytes that are no JSON>", len(text))
	}
	b, err := json.Marshal(redact(v, names))
	if err != nil {
		return fmt.Sprintf("<redacted, %d bytes>", len(text))
	}
	return string(b)
}
