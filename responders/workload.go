package responders

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// workload is an object that makes pods, or that makes what makes them.
type workload struct {
	Served
	*unstructured.Unstructured
}

func (w *workload) String() string {
	return fmt.Sprintf("%s %s/%s", w.Kind, w.GetNamespace(), w.GetName())
}

// Kind is as the API server calls it: what an object says of itself is no better.
func (w *workload) is(group, kind string) bool { return w.Group == group && w.Served.Kind == kind }

func (w *workload) client(kube *Kube) dynamic.ResourceInterface {
	return kube.Dynamic().Resource(w.GroupVersionResource).Namespace(w.GetNamespace())
}

// controllerName is what a reference names. Whoever may make pods chooses it.
func controllerName(ref *metav1.OwnerReference) string { return quote(ref.Kind + " " + ref.Name) }

// controlling is the object that a controller reference names, in the namespace
// of what it controls, and proved by its UID: another one that has taken the name
// is [ErrGone]. An owner of no namespace is no workload: a refusal.
func controlling(ctx context.Context, kube *Kube, namespace string, ref *metav1.OwnerReference) (*workload, error) {
	as, err := kube.OfKind(ctx, ref.APIVersion, ref.Kind)
	if err != nil {
		return nil, err
	}
	if !as.Namespaced {
		return nil, Refuse("%s is in no namespace, and so no workload", controllerName(ref))
	}
	// The client refuses a name that would lead out of the namespace.
	o, err := kube.Dynamic().Resource(as.GroupVersionResource).Namespace(namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get %s in namespace %s, which controls it: %w", controllerName(ref), namespace, err)
	}
	if o.GetUID() != ref.UID {
		return nil, fmt.Errorf("%s in namespace %s, which controls it, was replaced by another of that name: %w", controllerName(ref), namespace, ErrGone)
	}
	return &workload{as, o}, nil
}

// maxChain bounds how far up controllers are followed: references could go round.
const maxChain = 8

// climb follows the controller references up from a pod, until enough says that a
// workload is the one that is looked for, and returns all that it came by, the
// nearest first. above is what controls the last of them (or the pod) and could not
// be looked at.
func climb(ctx context.Context, kube *Kube, pod *corev1.Pod, enough func(*workload) bool) (chain []*workload, above string, err error) {
	ref := metav1.GetControllerOf(pod)
	for ref != nil && len(chain) < maxChain {
		w, err := controlling(ctx, kube, pod.Namespace, ref)
		if err != nil {
			if passable(ctx, kube, ref, err) {
				return chain, controllerName(ref), nil
			}
			return nil, "", err
		}
		chain = append(chain, w)
		if enough(w) {
			break
		}
		ref = metav1.GetControllerOf(w)
	}
	return chain, "", nil
}

// passable reports whether what is above a workload can be left alone when it
// could not be read: it has no scale, so nothing would be done to it, and only
// what might be above it is not found.
func passable(ctx context.Context, kube *Kube, ref *metav1.OwnerReference, err error) bool {
	var unknown *ErrNotServed
	if errors.As(err, &unknown) || as[*refusal](err) {
		return true
	}
	s, discovered := kube.OfKind(ctx, ref.APIVersion, ref.Kind)
	return discovered == nil && !s.Scale && apierrors.IsForbidden(err)
}

// knownWorkloads remembers for a while which workload the pods of a controller
// belong to, so that of a storm of alerts about its pods not each asks the API
// server. Only the cooldown counts by it; what is acted on is proved anew.
type knownWorkloads struct {
	mu sync.Mutex
	of map[types.UID]knownWorkload
}

type knownWorkload struct {
	uid types.UID
	at  time.Time
}

const (
	workloadKnownFor = time.Minute
	workloadsMax     = 1000
)

func (k *knownWorkloads) get(controller types.UID) (types.UID, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	w, ok := k.of[controller]
	return w.uid, ok && time.Since(w.at) < workloadKnownFor
}

func (k *knownWorkloads) put(controller, uid types.UID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil || len(k.of) >= workloadsMax {
		k.of = map[types.UID]knownWorkload{}
	}
	k.of[controller] = knownWorkload{uid, time.Now()}
}

// workloadActor is what the responders have in common that act on the workload of
// a pod: the cooldown and the owner's limit count by that workload, whichever of
// its pods raised the alert.
type workloadActor struct {
	kube  *Kube
	known knownWorkloads
	// find is the workload that the step is about.
	find func(ctx context.Context, pod *corev1.Pod) (w *workload, above string, err error)
}

// Check finds out which workload it is, so that [workloadActor.Object] can say it.
func (a *workloadActor) Check(ctx context.Context, r *Request) error {
	ref := metav1.GetControllerOf(r.Pod)
	if ref == nil {
		return Refuse("pod %s/%s has no controller: there is no workload to act on", r.Pod.Namespace, r.Pod.Name)
	}
	if _, ok := a.known.get(ref.UID); ok {
		return nil
	}
	w, _, err := a.find(ctx, r.Pod)
	if err != nil {
		return fmt.Errorf("find the workload of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	a.known.put(ref.UID, w.GetUID())
	return nil
}

// Object is the workload.
func (a *workloadActor) Object(r *Request) string {
	controller := types.UID(ownerOf(r.Pod))
	if uid, ok := a.known.get(controller); ok {
		return "workload/" + string(uid)
	}
	return "controller/" + string(controller)
}

// of is the workload of the pod as both are now.
func (a *workloadActor) of(ctx context.Context, r *Request) (pod *corev1.Pod, w *workload, above string, err error) {
	if pod, err = sameNow(ctx, a.kube, r.Pod); err != nil {
		return nil, nil, "", err
	}
	if metav1.GetControllerOf(pod) == nil {
		return nil, nil, "", Refuse("pod %s/%s has no controller: there is no workload to act on", pod.Namespace, pod.Name)
	}
	w, above, err = a.find(ctx, pod)
	return pod, w, above, err
}
