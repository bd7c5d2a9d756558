package responders

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"stoop/alert"
)

const (
	// podWait is how long [Pods.Resolve] waits for what an alert names to
	// appear: Falco sees a process long before the kubelet has told the API
	// server of its container.
	podWait = 200 * time.Millisecond
	// After that the step is given back, and asks again every now and then for
	// as long as podPatience: it holds no place meanwhile.
	podPatience = 30 * time.Second
	podBrief    = 2 * time.Second // where only the watch can be behind
	podAgain    = 500 * time.Millisecond
	// Pods that went are remembered for a while, so that an alert for one of
	// them is told that, and does not wait for it to appear.
	goneFor = 10 * time.Minute
	goneMax = 1024
	// So are containers that were waited for in vain: those that no pod owns
	// (of Docker, of a build) raise alerts too.
	vainFor = time.Minute
	vainMax = 1024
	// A container that restarts over and over leaves its ids behind in the
	// pod's status one by one; the last ones are kept.
	pastIDs = 32

	shortID = 12 // what Falco writes of a container's id
)

// Pods is the pods of one node, kept by a watch on exactly these.
//
// It is a reflector's store rather than a shared informer: one copy of each
// pod, cut down to what is used, and an alert that waits for a container is
// woken by the very event that brings it.
type Pods struct {
	node   string
	lw     cache.ListerWatcher
	log    *slog.Logger
	proc   proc
	wait   time.Duration
	longer time.Duration
	synced chan struct{} // closed by the first complete list

	mu      sync.Mutex
	pods    map[types.UID]*nodePod
	names   map[types.NamespacedName]types.UID
	short   map[string][]*nodePod // by the first 12 characters of a container's id
	gone    []gonePod             // oldest first
	vain    map[string]time.Time
	waited  map[string]time.Time // containers that are being waited for, and since when
	changed chan struct{}        // closed and made anew with every change
	failed  error                // of the last list or watch; nil when it is well
}

// nodePod is a pod and all container ids that it was seen to have.
type nodePod struct {
	*corev1.Pod
	ids []string
}

type gonePod struct {
	*nodePod
	at time.Time
}

// NewPods knows nothing until [Pods.Run] runs.
func NewPods(client *Kube, node string, log *slog.Logger) *Pods {
	p := &Pods{
		node:    node,
		log:     log,
		proc:    "/proc",
		wait:    podWait,
		longer:  podPatience,
		waited:  map[string]time.Time{},
		synced:  make(chan struct{}),
		pods:    map[types.UID]*nodePod{},
		names:   map[types.NamespacedName]types.UID{},
		short:   map[string][]*nodePod{},
		vain:    map[string]time.Time{},
		changed: make(chan struct{}),
	}
	ofNode := fields.OneTermEqualSelector("spec.nodeName", node).String()
	p.lw = cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = ofNode
			list, err := client.Pods(corev1.NamespaceAll).List(ctx, o)
			p.noteHealth(ctx, "list", err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = ofNode
			w, err := client.Pods(corev1.NamespaceAll).Watch(ctx, o)
			p.noteHealth(ctx, "watch", err)
			return w, err
		},
	}, client)
	return p
}

// Run keeps the pods until ctx is done. An API server that is away, or refuses,
// is asked again with growing delays of at most about 10 s; meanwhile the pods
// are as they were last seen.
func (p *Pods) Run(ctx context.Context) {
	// The reflector logs each failed try; noteHealth says what changed.
	quiet := logr.Discard()
	cache.NewReflectorWithOptions(p.lw, &corev1.Pod{}, (*podStore)(p), cache.ReflectorOptions{
		Name:    "pods of this node",
		Logger:  &quiet,
		Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 8, Cap: 5 * time.Second},
	}).RunWithContext(klog.NewContext(ctx, quiet))
}

// Synced reports whether the node's pods have been read once.
func (p *Pods) Synced() bool {
	select {
	case <-p.synced:
		return true
	default:
		return false
	}
}

// Len is how many pods there are on the node.
func (p *Pods) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pods)
}

// noteHealth says once that the API server fails, and once that it is back.
func (p *Pods) noteHealth(ctx context.Context, verb string, err error) {
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	before := p.failed
	p.failed = err
	p.mu.Unlock()
	switch {
	case err != nil && before == nil:
		_, _, _, reason := classify(err)
		p.log.Warn("the node's pods can't be read; trying on", "node", p.node, "verb", verb, "err", reason)
	case err == nil && before != nil:
		p.log.Info("the node's pods are read again", "node", p.node)
	}
}

// nameless says that nothing in an alert leads to a pod, or nil.
func nameless(t alert.Target) error {
	if t.Container == "" && t.Pod == "" && t.UID == "" && t.PID == 0 {
		return fmt.Errorf("the alert names neither pod nor container nor process: %w", errNoPod)
	}
	return nil
}

// Resolve finds the pod that raised an alert with the target t, and proves it:
// the alert's container is one of the pod's (running, last state, init or
// ephemeral), or the cgroup of the alert's process names the pod's UID (and the
// container's id, where the alert has one; else its start must be the alert's,
// for numbers of processes are used again). A pod's name alone proves nothing:
// a StatefulSet's next pod has the same.
//
// resolved is t with what it left out filled in; also, as far as it is known,
// with an error, and then without a pod: [ErrGone], errNoPod, errUnproved, or
// a [Retry] when the pods of the node have never been read.
//
// What is not there yet is waited for, 200 ms at the most and only as long as ctx
// lasts; after that the error is a [Retry], until it has been asked for in vain
// for 30 s (2 s where only the watch can be behind). The pod is shared, cut down to what stoop uses, and not to be changed.
func (p *Pods) Resolve(ctx context.Context, t alert.Target) (pod *corev1.Pod, resolved alert.Target, err error) {
	if t.Host {
		return nil, t, fmt.Errorf("the host itself raised the alert: %w", errNoPod)
	}
	if err := nameless(t); err != nil {
		return nil, t, err
	}
	// Most alerts are of a pod that is known: they need no clock.
	if p.Synced() {
		p.mu.Lock()
		found, _ := p.find(t, process{})
		p.mu.Unlock()
		if found.err == nil {
			return found.pod, found.target, nil
		}
	}
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, p.wait)
	defer cancel()
	select {
	case <-p.synced:
	case <-ctx.Done():
		p.mu.Lock()
		err := p.failed
		p.mu.Unlock()
		if err == nil {
			err = ctx.Err()
		}
		return nil, t, Retry(fmt.Errorf("the pods of node %s have not been read yet: %w", p.node, err), 0)
	}
	for of := p.proc.look(t); ; {
		p.mu.Lock()
		changed := p.changed
		found, patience := p.find(t, of)
		vain := p.waitedInVain(t)
		p.mu.Unlock()
		if found.err == nil || patience == 0 || vain {
			return found.pod, found.target, found.err
		}
		if !p.first(t) {
			return nil, found.target, p.later(t, patience, found.err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if whole.Err() != nil {
				return nil, found.target, found.err
			}
			return nil, found.target, p.later(t, patience, found.err)
		}
	}
}

// answer is what is known of a target at one moment.
type answer struct {
	pod    *corev1.Pod
	target alert.Target
	err    error
}

// find looks for the target, and says for how long waiting may bring another
// answer; 0: it won't.
func (p *Pods) find(t alert.Target, of process) (a answer, patience time.Duration) {
	live, id, err := p.proved(t, of)
	if err != nil {
		return answer{target: t, err: err}, 0
	}
	if live != nil {
		if what := differs(t, live.Pod); what != "" {
			return answer{target: t, err: fmt.Errorf("the alert names %s, but its container or process is one of pod %s: %w",
				what, key(live), errUnproved)}, 0
		}
		return answer{pod: live.Pod, target: filled(t, live, id)}, 0
	}
	named := p.named(t)
	if g := p.findGone(t, of, named != nil); g != nil {
		return answer{target: filled(t, g.nodePod, ""), err: fmt.Errorf("pod %s (uid %s) was deleted %s ago: %w",
			key(g.nodePod), g.UID, time.Since(g.at).Round(time.Millisecond), ErrGone)}, 0
	}
	switch {
	case named != nil && t.UID != "" && types.UID(t.UID) != named.UID:
		return answer{target: t, err: fmt.Errorf("the alert is of pod %s with uid %s, the one of that name has uid %s by now: %w",
			key(named), t.UID, named.UID, ErrGone)}, podBrief
	case named != nil && t.Container != "":
		return answer{target: t, err: fmt.Errorf("container %s is none of pod %s, which may be the one's replacement: %w",
			t.Container, key(named), errUnproved)}, podPatience
	case named != nil:
		return answer{target: t, err: fmt.Errorf("the alert names pod %s, but no container or process of it: %w", key(named), errUnproved)}, 0
	case t.Container == "" && t.Pod == "" && t.UID == "" && of == process{}:
		return answer{target: t, err: fmt.Errorf("process %d is not there any more, or in no pod: %w", t.PID, errNoPod)}, 0
	}
	what := "container " + t.Container
	switch {
	case t.Pod != "":
		what = "pod " + t.Namespace + "/" + t.Pod
		if t.Namespace == "" {
			what = "pod " + t.Pod
		}
	case t.Container == "" && t.UID != "":
		what = "pod with uid " + t.UID
	case t.Container == "":
		what = fmt.Sprintf("pod of process %d", t.PID)
	}
	return answer{target: t, err: fmt.Errorf("there is no %s on node %s: %w", what, p.node, ErrGone)}, podPatience
}

// proved is the pod that t's container or process proves, and the container's
// whole id where it is known.
func (p *Pods) proved(t alert.Target, of process) (*nodePod, string, error) {
	if len(t.Container) >= shortID {
		var found *nodePod
		var id string
		for _, c := range p.short[t.Container[:shortID]] {
			for _, full := range c.ids {
				if !strings.HasPrefix(full, t.Container) {
					continue
				}
				if found != nil && found.UID != c.UID {
					return nil, "", fmt.Errorf("container %s may be one of pod %s or of %s, their ids begin alike: %w",
						t.Container, key(found), key(c), errUnproved)
				}
				found, id = c, full
			}
		}
		if found != nil {
			return found, id, nil
		}
	}
	if of.pod != "" {
		if live := p.pods[of.pod]; live != nil {
			return live, of.container, nil
		}
	}
	return nil, "", nil
}

// differs says what of a target speaks against a pod.
func differs(t alert.Target, pod *corev1.Pod) string {
	switch {
	case t.Pod != "" && t.Pod != pod.Name:
		return "pod " + t.Pod
	case t.Namespace != "" && t.Namespace != pod.Namespace:
		return "namespace " + t.Namespace
	case t.UID != "" && types.UID(t.UID) != pod.UID:
		return "a pod with uid " + t.UID
	}
	return ""
}

func filled(t alert.Target, pod *nodePod, container string) alert.Target {
	t.Namespace, t.Pod, t.UID = pod.Namespace, pod.Name, string(pod.UID)
	if container != "" {
		t.Container = container
	}
	return t
}

// named is the pod that has the target's name, which proves nothing; nil too
// where the namespace is missing and several have it.
func (p *Pods) named(t alert.Target) *nodePod {
	if t.Pod == "" {
		return nil
	}
	if t.Namespace != "" {
		return p.pods[p.names[types.NamespacedName{Namespace: t.Namespace, Name: t.Pod}]]
	}
	var found *nodePod
	for name, uid := range p.names {
		if name.Name == t.Pod {
			if found != nil {
				return nil
			}
			found = p.pods[uid]
		}
	}
	return found
}

// findGone is the pod that the target was, if it went lately. replaced says
// that there is a pod of the target's name; then the name alone says nothing.
func (p *Pods) findGone(t alert.Target, of process, replaced bool) *gonePod {
	for i := len(p.gone) - 1; i >= 0; i-- {
		g := &p.gone[i]
		if time.Since(g.at) > goneFor {
			return nil
		}
		byName := t.Pod == g.Name && (t.Namespace == g.Namespace || t.Namespace == "") && !replaced && t.UID == ""
		switch {
		case t.Container != "" && slices.ContainsFunc(g.ids, func(id string) bool { return strings.HasPrefix(id, t.Container) }),
			t.UID != "" && types.UID(t.UID) == g.UID,
			of.pod != "" && of.pod == g.UID,
			byName:
			return g
		}
	}
	return nil
}

func (p *Pods) waitedInVain(t alert.Target) bool {
	at, ok := p.vain[t.Container]
	return ok && time.Since(at) < vainFor
}

// first reports whether nobody has waited for the target's container before: only
// the first who asks may hold its place while it waits.
func (p *Pods) first(t alert.Target) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	since, ok := p.waited[t.Container]
	return !ok || time.Since(since) < p.wait
}

// later is the error for a target that has not appeared: to be asked for again,
// or for good.
func (p *Pods) later(t alert.Target, patience time.Duration, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.Container == "" {
		return err
	}
	since, ok := p.waited[t.Container]
	if !ok {
		since = time.Now()
		if len(p.waited) >= vainMax {
			clear(p.waited)
		}
		p.waited[t.Container] = since
	}
	if time.Since(since) < min(patience, p.longer) {
		return Retry(err, podAgain)
	}
	delete(p.waited, t.Container)
	p.noteVain(t)
	return err
}

func (p *Pods) noteVain(t alert.Target) {
	if t.Container == "" {
		return
	}
	if len(p.vain) >= vainMax {
		clear(p.vain)
	}
	p.vain[t.Container] = time.Now()
}

func key(pod *nodePod) string { return pod.Namespace + "/" + pod.Name }

// podStore is Pods as its reflector sees it.
type podStore Pods

var errNotAPod = errors.New("the watch on pods brought something else")

func (s *podStore) Add(obj any) error { return s.Update(obj) }

func (s *podStore) Update(obj any) error {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return errNotAPod
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(pod)
	s.tell()
	return nil
}

func (s *podStore) Delete(obj any) error {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return errNotAPod
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(pod.UID)
	s.tell()
	return nil
}

func (s *podStore) Replace(list []any, _ string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := make(map[types.UID]bool, len(list))
	for _, obj := range list {
		pod, ok := obj.(*corev1.Pod)
		if !ok {
			return errNotAPod
		}
		there[pod.UID] = true
	}
	for uid := range s.pods {
		if !there[uid] {
			s.remove(uid)
		}
	}
	for _, obj := range list {
		s.put(obj.(*corev1.Pod))
	}
	select {
	case <-s.synced:
	default:
		close(s.synced)
	}
	s.tell()
	return nil
}

func (s *podStore) Resync() error { return nil }

// Transformer spares the whole pods while a list is streamed.
func (s *podStore) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if pod, ok := obj.(*corev1.Pod); ok {
			return slim(pod), nil
		}
		return obj, nil
	}
}

func (s *podStore) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *podStore) put(pod *corev1.Pod) {
	if pod.Spec.NodeName != s.node {
		s.remove(pod.UID)
		return
	}
	name := types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
	if uid, ok := s.names[name]; ok && uid != pod.UID {
		s.remove(uid) // its deletion was missed
	}
	n := &nodePod{Pod: slim(pod), ids: containerIDs(pod)}
	if before := s.pods[pod.UID]; before != nil {
		s.unindex(before)
		for _, id := range before.ids {
			if len(n.ids) < pastIDs+len(pod.Status.ContainerStatuses) && !slices.Contains(n.ids, id) {
				n.ids = append(n.ids, id)
			}
		}
	}
	s.pods[pod.UID] = n
	s.names[name] = pod.UID
	for _, id := range n.ids {
		short := id[:shortID]
		if !slices.Contains(s.short[short], n) {
			s.short[short] = append(s.short[short], n)
		}
	}
}

func (s *podStore) unindex(n *nodePod) {
	for _, id := range n.ids {
		short := id[:shortID]
		rest := slices.DeleteFunc(s.short[short], func(m *nodePod) bool { return m == n })
		if len(rest) == 0 {
			delete(s.short, short)
		} else {
			s.short[short] = rest
		}
	}
}

func (s *podStore) remove(uid types.UID) {
	n := s.pods[uid]
	if n == nil {
		return
	}
	s.unindex(n)
	delete(s.pods, uid)
	name := types.NamespacedName{Namespace: n.Namespace, Name: n.Name}
	if s.names[name] == uid {
		delete(s.names, name)
	}
	now := time.Now()
	old := 0
	for old < len(s.gone) && (now.Sub(s.gone[old].at) > goneFor || len(s.gone)-old >= goneMax) {
		old++
	}
	s.gone = append(slices.Delete(s.gone, 0, old), gonePod{n, now})
}

// containerIDs are the ids of all containers that a pod's status tells of,
// without the runtime's prefix ("containerd://").
func containerIDs(pod *corev1.Pod) []string {
	var ids []string
	add := func(id string) {
		if _, bare, ok := strings.Cut(id, "://"); ok {
			id = bare
		}
		if len(id) >= shortID && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	for _, list := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		for i := range list {
			c := &list[i]
			add(c.ContainerID)
			for _, state := range []corev1.ContainerState{c.State, c.LastTerminationState} {
				if state.Terminated != nil {
					add(state.Terminated.ContainerID)
				}
			}
		}
	}
	return ids
}

// slim is a pod without what stoop never looks at: a hundred pods with their
// managed fields, environments and volumes are megabytes.
func slim(pod *corev1.Pod) *corev1.Pod {
	s := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name:                       pod.Name,
			Namespace:                  pod.Namespace,
			UID:                        pod.UID,
			ResourceVersion:            pod.ResourceVersion,
			CreationTimestamp:          pod.CreationTimestamp,
			DeletionTimestamp:          pod.DeletionTimestamp,
			DeletionGracePeriodSeconds: pod.DeletionGracePeriodSeconds,
			Labels:                     pod.Labels,
			OwnerReferences:            pod.OwnerReferences,
		},
		Spec: corev1.PodSpec{
			NodeName:           pod.Spec.NodeName,
			HostNetwork:        pod.Spec.HostNetwork,
			HostPID:            pod.Spec.HostPID,
			Priority:           pod.Spec.Priority,
			PriorityClassName:  pod.Spec.PriorityClassName,
			ServiceAccountName: pod.Spec.ServiceAccountName,
			InitContainers:     slimContainers(pod.Spec.InitContainers),
			Containers:         slimContainers(pod.Spec.Containers),
			Volumes:            slimVolumes(pod.Spec.Volumes),
		},
		Status: corev1.PodStatus{
			Phase:                      pod.Status.Phase,
			PodIP:                      pod.Status.PodIP,
			PodIPs:                     pod.Status.PodIPs,
			QOSClass:                   pod.Status.QOSClass,
			ContainerStatuses:          slimStatuses(pod.Status.ContainerStatuses),
			InitContainerStatuses:      slimStatuses(pod.Status.InitContainerStatuses),
			EphemeralContainerStatuses: slimStatuses(pod.Status.EphemeralContainerStatuses),
		},
	}
	// What tells a static pod's mirror.
	for _, name := range []string{corev1.MirrorPodAnnotationKey, "kubernetes.io/config.source", "kubernetes.io/config.hash"} {
		if v, ok := pod.Annotations[name]; ok {
			if s.Annotations == nil {
				s.Annotations = map[string]string{}
			}
			s.Annotations[name] = v
		}
	}
	return s
}

func slimContainers(list []corev1.Container) []corev1.Container {
	var s []corev1.Container
	for i := range list {
		s = append(s, corev1.Container{Name: list[i].Name, Image: list[i].Image})
	}
	return s
}

// slimVolumes are those of claims: the others go with the pod, or are no part of it.
func slimVolumes(list []corev1.Volume) []corev1.Volume {
	var s []corev1.Volume
	for i := range list {
		v := corev1.Volume{Name: list[i].Name}
		switch c, e := list[i].PersistentVolumeClaim, list[i].Ephemeral; {
		case c != nil:
			v.PersistentVolumeClaim = c
		case e != nil && e.VolumeClaimTemplate != nil:
			v.Ephemeral = &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{
				Spec: corev1.PersistentVolumeClaimSpec{AccessModes: e.VolumeClaimTemplate.Spec.AccessModes},
			}}
		default:
			continue
		}
		s = append(s, v)
	}
	return s
}

func slimStatuses(list []corev1.ContainerStatus) []corev1.ContainerStatus {
	var s []corev1.ContainerStatus
	for i := range list {
		c := &list[i]
		status := corev1.ContainerStatus{Name: c.Name, ContainerID: c.ContainerID, State: c.State, RestartCount: c.RestartCount}
		if t := c.LastTerminationState.Terminated; t != nil {
			status.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: t.ContainerID}
		}
		if t := c.State.Terminated; t != nil {
			status.State.Terminated = &corev1.ContainerStateTerminated{ContainerID: t.ContainerID, ExitCode: t.ExitCode}
		}
		s = append(s, status)
	}
	return s
}
