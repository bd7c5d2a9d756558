package responders

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

const (
	// pauseAnnotation pauses every stoop of a cluster while the namespace that they
	// run in has it, whatever its value: that says who did so and why. No tenant may
	// write that namespace's object, and it is always there.
	pauseAnnotation = ownPrefix + "pause"
	// pauseWords bounds what of the value is kept.
	pauseWords = 200

	// A watch tells of it within milliseconds. pauseResync is how long one lasts
	// before the namespace is read anew, and pauseLate how much longer it is waited
	// for: a connection that is broken without either end being told says nothing.
	pauseResync = 20 * time.Second
	pauseLate   = 3 * time.Second
	// pauseAnswer bounds one read.
	pauseAnswer = 5 * time.Second
	// pauseFirst is how long harmful steps wait after the start for the first
	// answer: the cluster may have been paused while this stoop was not there.
	pauseFirst = 2 * time.Second
	// Where it can't be read it is tried again after pauseAgain, growing to
	// pauseAgainMost, and after pauseRefused where a permission is missing.
	pauseAgain     = 200 * time.Millisecond
	pauseAgainMost = 5 * time.Second
	pauseRefused   = 15 * time.Second
	// pauseStore is when it is tried again to store what was seen.
	pauseStore = 2 * time.Second
)

// ClusterPauseConfig is what a [ClusterPause] is made of.
type ClusterPauseConfig struct {
	Kube       *Kube
	Namespace  string // [Self.Home]
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil registers nothing
}

// ClusterPause watches the one object by which every stoop of a cluster is paused
// at once: an annotation of the namespace that they run in. It knows nothing until
// [ClusterPause.Run] runs; what it saw last holds while the API server is away.
type ClusterPause struct {
	ClusterPauseConfig
	namespaces *gentype.ClientWithList[*corev1.Namespace, *corev1.NamespaceList]
	hangUp     func() // closes connections that nothing is under way on
	resync     time.Duration
	late       time.Duration
	answer     time.Duration
	began      time.Time

	mu      sync.Mutex
	known   bool // it was read once
	paused  bool
	why     string
	failed  error         // of the last read; nil when it is well
	changed chan struct{} // closed and made anew when one of the above changes
}

// PauseRBAC is what watching the annotation of stoop's own namespace needs. A list
// and a watch of one namespace are asked for in the whole cluster; the name binds
// them to it.
func PauseRBAC(namespace string) []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"namespaces"}, ResourceNames: []string{namespace}, Verbs: []string{"get", "list", "watch"}},
	}
}

// PauseCommand is what pauses every stoop of a cluster, or lifts that pause.
func PauseCommand(namespace string, paused bool) string {
	if paused {
		return fmt.Sprintf("kubectl annotate namespace %s %s='who and why'", namespace, pauseAnnotation)
	}
	return fmt.Sprintf("kubectl annotate namespace %s %s-", namespace, pauseAnnotation)
}

// NewClusterPause asks nothing before [ClusterPause.Run].
func NewClusterPause(c ClusterPauseConfig) (*ClusterPause, error) {
	p := &ClusterPause{ClusterPauseConfig: c, resync: pauseResync, late: pauseLate, answer: pauseAnswer, began: time.Now(), changed: make(chan struct{})}
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if c.Registerer != nil {
		c.Registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "stoop_cluster_pause_watched", Help: "1 while stoop can read the namespace whose annotation pauses every node.",
		}, func() float64 {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.known && p.failed == nil {
				return 1
			}
			return 0
		}))
	}
	rc := rest.CopyConfig(c.Kube.config)
	rc.GroupVersion, rc.APIPath = &corev1.SchemeGroupVersion, "/api"
	// A connection of its own, which HTTP/1.1 closes with the request that is given
	// up on it: with HTTP/2 the next one would be sent on the same broken one. And no
	// share in the limit on requests, which a storm of alerts may use up.
	rc.NextProtos = []string{"http/1.1"}
	rc.RateLimiter = flowcontrol.NewFakeAlwaysRateLimiter()
	http, err := rest.HTTPClientFor(rc)
	if err != nil {
		return nil, fmt.Errorf("client for the cluster's pause: %w", err)
	}
	p.hangUp = http.CloseIdleConnections
	client, err := rest.RESTClientForConfigAndClient(rc, http)
	if err != nil {
		return nil, fmt.Errorf("client for the cluster's pause: %w", err)
	}
	p.namespaces = gentype.NewClientWithList("namespaces", client, c.Kube.params, "",
		func() *corev1.Namespace { return &corev1.Namespace{} }, func() *corev1.NamespaceList { return &corev1.NamespaceList{} })
	return p, nil
}

// Run watches until ctx is done. An API server that is away, or refuses, is asked
// again and again.
func (p *ClusterPause) Run(ctx context.Context) {
	defer p.hangUp()
	failed := 0
	for ctx.Err() == nil {
		began := time.Now()
		err := p.look(ctx)
		if ctx.Err() != nil {
			return
		}
		wait := time.Duration(0)
		switch {
		case err == nil && time.Since(began) < pauseAgain: // it ends each watch at once
			wait = pauseAgain
		case err == nil:
		case apierrors.IsForbidden(err) || errors.Is(err, errNoNamespace):
			wait = pauseRefused - pauseRefused/5 + rand.N(2*pauseRefused/5)
		default:
			p.hangUp()
			wait = min(pauseAgain<<min(failed, 10), pauseAgainMost)
			wait = wait/2 + rand.N(wait/2)
		}
		if failed++; err == nil {
			failed = 0
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

var errNoNamespace = errors.New("there is no such namespace")

// look reads the namespace, and follows it for as long as one watch lasts.
func (p *ClusterPause) look(ctx context.Context) error {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, p.Namespace).String()}
	read, cancel := context.WithTimeout(ctx, p.answer)
	list, err := p.namespaces.List(read, options)
	cancel()
	if err == nil && (len(list.Items) != 1 || list.Items[0].Name != p.Namespace) {
		err = errNoNamespace
	}
	if err != nil {
		p.fail(ctx, err)
		return err
	}
	p.see(&list.Items[0])

	lasts := p.resync - p.resync/5 + rand.N(p.resync/5)
	options.ResourceVersion = list.ResourceVersion
	options.TimeoutSeconds = new(int64(max(1, lasts/time.Second)))
	following, cancel := context.WithTimeout(ctx, lasts+p.late)
	defer cancel()
	w, err := p.namespaces.Watch(following, options)
	if err != nil {
		p.fail(ctx, err)
		return err
	}
	defer w.Stop()
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok {
				return nil
			}
			ns, is := e.Object.(*corev1.Namespace)
			if (e.Type == watch.Added || e.Type == watch.Modified) && is && ns.Name == p.Namespace {
				p.see(ns)
				continue
			}
			return nil // the next read says what there is
		case <-following.Done():
			return nil
		}
	}
}

// see takes note of the namespace as it is.
func (p *ClusterPause) see(ns *corev1.Namespace) {
	value, paused := ns.Annotations[pauseAnnotation]
	why := printable(value)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failed != nil {
		p.Log.Info("the annotation that pauses every node is watched again", "namespace", p.Namespace)
	}
	if p.known && p.failed == nil && p.paused == paused && p.why == why {
		return
	}
	p.known, p.failed, p.paused, p.why = true, nil, paused, why
	p.tell()
}

// fail takes note that the namespace can't be read, and says so once.
func (p *ClusterPause) fail(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.failed
	p.failed = err
	if before != nil && lasting(before) == lasting(err) {
		return
	}
	if lasting(err) {
		p.Log.Error("the cluster can't be paused as a whole: what was seen last holds, and stoop pause works on each node", "namespace", p.Namespace, "error", p.reason(err))
	} else {
		p.Log.Warn("the annotation that pauses every node can't be read: what was seen last holds", "namespace", p.Namespace, "error", err)
	}
	p.tell()
}

// lasting reports whether an error stays until somebody does something.
func lasting(err error) bool { return apierrors.IsForbidden(err) || errors.Is(err, errNoNamespace) }

func (p *ClusterPause) reason(err error) string {
	if errors.Is(err, errNoNamespace) {
		return fmt.Sprintf("there is no namespace %s; outside of a pod, the environment's POD_NAMESPACE says which one it is", p.Namespace)
	}
	_, _, _, reason := classify(err)
	return reason
}

// tell wakes who waits for a change. The caller holds the lock.
func (p *ClusterPause) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// last is what was seen last, if anything was, and a channel that is closed when it
// changes.
func (p *ClusterPause) last() (paused bool, why string, known bool, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paused, p.why, p.known, p.changed
}

// pending reports whether there may still be a first answer in time.
func (p *ClusterPause) pending() bool {
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.known && !(p.failed != nil && lasting(p.failed)) && time.Since(p.began) < pauseFirst
}

// settle waits until nothing is pending any more.
func (p *ClusterPause) settle(ctx context.Context) {
	for p.pending() {
		_, _, _, changed := p.last()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-time.After(busyAgain):
		}
	}
}

// problem is why the annotation can't be read now, or "".
func (p *ClusterPause) problem() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.failed != nil:
		return p.reason(p.failed)
	case !p.known:
		return "it has not been read yet"
	}
	return ""
}

// printable is a value in one line, of a length that fits into a sentence.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	return cut(strings.TrimSpace(s), pauseWords)
}
