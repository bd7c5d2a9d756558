package responders

import (
	"context"
	"fmt"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
)

const leaseGroup = "coordination.k8s.io"

// lease is a Lease by which stoops agree whose turn it is.
//
// It is not client-go's leaderelection: that links the clientset, which costs 10 MB
// of program file and 9 MB of memory on each node (see [Kube]).
type lease struct {
	kube            *Kube
	namespace, name string
	holder          string // what this process calls itself in it
}

func (c lease) String() string { return c.namespace + "/" + c.name }

// leaseRBAC is what having one needs.
func leaseRBAC(name string) []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{leaseGroup}, Resources: []string{"leases"}, Verbs: []string{"get", "update"}, ResourceNames: []string{name}},
		// RBAC can't name what is not there yet.
		{APIGroups: []string{leaseGroup}, Resources: []string{"leases"}, Verbs: []string{"create"}},
	}
}

// leaseHeld is the Lease as it was read or written last.
type leaseHeld struct {
	object *unstructured.Unstructured
	spec   leaseSpec
	at     time.Time // when this process last wrote it: before the request was sent
}

// leaseSpec is that of a coordination.k8s.io/v1 Lease.
type leaseSpec struct {
	HolderIdentity       string            `json:"holderIdentity,omitempty"`
	LeaseDurationSeconds int32             `json:"leaseDurationSeconds,omitempty"`
	AcquireTime          *metav1.MicroTime `json:"acquireTime,omitempty"`
	RenewTime            *metav1.MicroTime `json:"renewTime,omitempty"`
	LeaseTransitions     int32             `json:"leaseTransitions,omitempty"`
}

func (c lease) client() dynamic.ResourceInterface {
	return c.kube.Dynamic().Resource(schema.GroupVersionResource{Group: leaseGroup, Version: "v1", Resource: "leases"}).Namespace(c.namespace)
}

// read reads the Lease, which is made where it is missing.
func (c lease) read(ctx context.Context) (*leaseHeld, error) {
	object, err := c.client().Get(ctx, c.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		// Held by nobody at first: so a right that is missing is found out before
		// anything is done.
		object, err = c.client().Create(ctx, &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": leaseGroup + "/v1", "kind": "Lease",
			"metadata": map[string]any{"name": c.name, "labels": map[string]any{labelManagedBy: managedBy}},
			"spec":     map[string]any{},
		}}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			object, err = c.client().Get(ctx, c.name, metav1.GetOptions{})
		}
	}
	if err != nil {
		return nil, err
	}
	l := &leaseHeld{object: object}
	spec, _, err := unstructured.NestedMap(object.Object, "spec")
	if err == nil {
		err = runtime.DefaultUnstructuredConverter.FromUnstructured(spec, &l.spec)
	}
	if err != nil {
		return nil, fmt.Errorf("read it: %w", err)
	}
	return l, nil
}

// take makes this process the holder, in what is to be written.
func (c lease) take(l *leaseHeld, lasts time.Duration) {
	if l.spec.HolderIdentity != c.holder {
		now := metav1.NowMicro()
		l.spec.LeaseTransitions++
		l.spec.AcquireTime = &now
	}
	l.spec.HolderIdentity, l.spec.LeaseDurationSeconds = c.holder, max(1, int32(lasts/time.Second))
}

// give makes nobody the holder.
func (c lease) give(l *leaseHeld) { l.spec.HolderIdentity, l.spec.LeaseDurationSeconds = "", 1 }

// write writes the Lease, if nobody else has since it was read.
func (c lease) write(ctx context.Context, l *leaseHeld) error {
	at := time.Now()
	l.spec.RenewTime = &metav1.MicroTime{Time: at}
	spec, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&l.spec)
	if err != nil {
		return err
	}
	object := l.object.DeepCopy()
	object.Object["spec"] = spec
	written, err := c.client().Update(ctx, object, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) {
		// It may have been this process: a write whose answer was lost.
		now, again := c.client().Get(ctx, c.name, metav1.GetOptions{})
		if again != nil {
			return again
		}
		if holder, _, _ := unstructured.NestedString(now.Object, "spec", "holderIdentity"); holder != c.holder {
			return err
		}
		object.SetResourceVersion(now.GetResourceVersion())
		written, err = c.client().Update(ctx, object, metav1.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	l.object, l.at = written, at
	return nil
}
