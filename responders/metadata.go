package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/param"
)

// metadataSetter is the responder that sets labels or annotations of a pod or of
// this node, and puts back what was there before.
type metadataSetter struct {
	kube   *Kube
	field  metadataField
	on     Object // [PodObject] or [NodeObject]
	node   string // this one's name
	params func() metadataParams
}

// metadataField is where the values stand in an object's metadata.
type metadataField string

const (
	labelsField      metadataField = "labels"
	annotationsField metadataField = "annotations"
)

// metadataParams are the parameters of such a responder.
type metadataParams interface {
	param.Validator
	values() (set map[string]string, ttl time.Duration)
}

// checkNames refuses the names of labels or annotations that the API server
// would, and those that are others' to set.
func checkNames(field metadataField, set map[string]string, reserved func(name string) bool) error {
	if len(set) == 0 {
		return fmt.Errorf("%s: there is none", field)
	}
	one := map[metadataField]string{labelsField: "a label", annotationsField: "an annotation"}[field]
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if msgs := validation.IsQualifiedName(name); len(msgs) > 0 {
			return fmt.Errorf("%s: %s is no name for %s: %s", field, param.Cut(name), one, msgs[0])
		}
		if reserved(name) {
			prefix, _, _ := strings.Cut(name, "/")
			return fmt.Errorf("%s: names under %s/ are not for rules to set", field, prefix)
		}
	}
	return nil
}

// checkLabels is checkNames with what the API server would refuse of labels.
func checkLabels(set map[string]string, reserved func(name string) bool) error {
	if err := checkNames(labelsField, set, reserved); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if msgs := validation.IsValidLabelValue(set[name]); len(msgs) > 0 {
			return fmt.Errorf("labels: %s is no value for the label %s: %s", param.Cut(set[name]), name, msgs[0])
		}
	}
	return nil
}

// reservedName reports whether a label or annotation has a meaning for
// Kubernetes or for stoop itself.
func reservedName(name string) bool {
	return under(name, "kubernetes.io") && !strings.HasPrefix(name, "app.kubernetes.io/") || under(name, "k8s.io") || ownName(name)
}

func ownName(name string) bool { return under(name, strings.TrimSuffix(ownPrefix, "/")) }

// under reports whether a name has the domain as its prefix, or one below it.
func under(name, domain string) bool {
	prefix, _, ok := strings.Cut(name, "/")
	return ok && (prefix == domain || strings.HasSuffix(prefix, "."+domain))
}

// metadataOf names one object, and no other that takes its name.
type metadataOf struct {
	Namespace string    `json:"namespace,omitempty"`
	Pod       string    `json:"pod,omitempty"`
	Node      string    `json:"node,omitempty"`
	UID       types.UID `json:"uid"`
}

func (o metadataOf) String() string {
	if o.Node != "" {
		return "node " + o.Node
	}
	return "pod " + o.Namespace + "/" + o.Pod
}

// metadataSet is the undo record.
type metadataSet struct {
	metadataOf
	Changes map[string]metadataChange `json:"changes"`
}

// metadataChange is what a value was and what it was made; nil is absent.
type metadataChange struct {
	From *string `json:"from"`
	To   *string `json:"to"`
}

func (m *metadataSetter) Act(ctx context.Context, r *Request) (Result, error) {
	params := m.params()
	if err := r.Decode(params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	wanted, ttl := params.values()
	of := metadataOf{Node: m.node}
	if m.on == PodObject {
		of = metadataOf{Namespace: r.Pod.Namespace, Pod: r.Pod.Name, UID: r.Pod.UID}
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("set %s of %s: %w", m.field, of, err)
	}
	// Asked anew: what undo puts back has to be what really was there.
	now, err := m.now(ctx, of)
	switch {
	case err != nil:
		return fail(err)
	case now == nil && m.on == NodeObject:
		return Result{}, noSuchNode(of.Node)
	case now == nil:
		return fail(ErrGone)
	}
	of.UID = now.UID
	rec := metadataSet{metadataOf: of, Changes: map[string]metadataChange{}}
	before := intended(r, of)
	have, set := m.values(now), map[string]*string{}
	for name, value := range wanted {
		from, to := valueOf(have, name), (*string)(nil)
		if value != "" {
			to = &value
		}
		if c, ok := before.Changes[name]; ok && sameValue(from, to) && sameValue(c.To, to) {
			rec.Changes[name] = c // by an earlier try of this very step
		} else if !sameValue(from, to) {
			set[name], rec.Changes[name] = to, metadataChange{from, to}
		}
	}
	if len(rec.Changes) == 0 {
		return Result{Nothing: true, Reason: fmt.Sprintf("the %s are so already", m.field)}, nil
	}
	undo, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	if len(set) > 0 {
		// Afterwards the object does not tell what was there before.
		r.Intend(undo, ttl)
		if err := m.patch(ctx, of, now.ResourceVersion, set); err != nil {
			return fail(err)
		}
	}
	return Result{Reason: fmt.Sprintf("%s changed: %s", m.field, names(rec.Changes)), Undo: undo, TTL: ttl}, nil
}

// intended is what an earlier try of this step was about to change, if it was cut
// off and may have done so.
func intended(r *Request, of metadataOf) metadataSet {
	var rec metadataSet
	if json.Unmarshal(r.Intended, &rec) != nil || rec.UID != of.UID {
		return metadataSet{}
	}
	return rec
}

// Undo puts back those values that still are what Act made of them.
func (m *metadataSetter) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec metadataSet
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Pod == "" && rec.Node == "" || rec.UID == "" {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("put back %s of %s: %w", m.field, rec.metadataOf, err)
	}
	now, err := m.now(ctx, rec.metadataOf)
	if err != nil {
		return fail(err)
	}
	if now == nil {
		return fail(ErrGone)
	}
	have, set, left := m.values(now), map[string]*string{}, map[string]*string{}
	for name, c := range rec.Changes {
		now := valueOf(have, name)
		switch {
		case sameValue(now, c.From):
		case sameValue(now, c.To):
			set[name] = c.From
		default:
			left[name] = now
		}
	}
	var note string
	if len(left) > 0 {
		note = "; changed by others meanwhile and left: " + names(left)
	}
	if len(set) == 0 {
		return Result{Nothing: true, Reason: "there is nothing to put back" + note}, nil
	}
	if err := m.patch(ctx, rec.metadataOf, now.ResourceVersion, set); err != nil {
		return fail(err)
	}
	return Result{Reason: fmt.Sprintf("%s put back: %s%s", m.field, names(set), note)}, nil
}

// now is the object's metadata as it is now; nil if it went or another has its
// name. A node without a UID is whichever has the name.
func (m *metadataSetter) now(ctx context.Context, of metadataOf) (*metav1.ObjectMeta, error) {
	var now *metav1.ObjectMeta
	if of.Node == "" {
		pod, err := podNow(ctx, m.kube, of.Namespace, of.Pod, of.UID)
		if err != nil || pod == nil {
			return nil, err
		}
		return &pod.ObjectMeta, nil
	}
	node, err := m.kube.Nodes().Get(ctx, of.Node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if now = &node.ObjectMeta; of.UID != "" && now.UID != of.UID {
		return nil, nil
	}
	return now, nil
}

func (m *metadataSetter) values(of *metav1.ObjectMeta) map[string]string {
	if m.field == labelsField {
		return of.Labels
	}
	return of.Annotations
}

// patch holds only for the object as it was read; a change in between is a
// conflict, and tried again.
func (m *metadataSetter) patch(ctx context.Context, of metadataOf, resourceVersion string, set map[string]*string) error {
	patch, err := metadataPatch(m.field, of.UID, resourceVersion, set)
	if err != nil {
		return err
	}
	if of.Node != "" {
		_, err = m.kube.Nodes().Patch(ctx, of.Node, types.MergePatchType, patch, metav1.PatchOptions{})
	} else {
		_, err = m.kube.Pods(of.Namespace).Patch(ctx, of.Pod, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	return err
}

// metadataPatch is a merge patch that sets labels or annotations (nil: takes them
// off) on the object with this UID and no other: with another UID the API server
// answers 422. With a resource version it holds only for the object as it was
// read.
func metadataPatch(field metadataField, uid types.UID, resourceVersion string, set map[string]*string) ([]byte, error) {
	if uid == "" {
		return nil, errors.New("the object has no UID")
	}
	meta := map[string]any{"uid": uid, string(field): set}
	if resourceVersion != "" {
		meta["resourceVersion"] = resourceVersion
	}
	return json.Marshal(map[string]any{"metadata": meta})
}

func valueOf(set map[string]string, name string) *string {
	if v, ok := set[name]; ok {
		return &v
	}
	return nil
}

func sameValue(a, b *string) bool {
	return a == nil && b == nil || a != nil && b != nil && *a == *b
}

func names[V any](set map[string]V) string {
	return strings.Join(slices.Sorted(maps.Keys(set)), ", ")
}
