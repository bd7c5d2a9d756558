// Package conformance is what every responder has to pass: one suite, through
// the host that runs them for real, against any API server. It is no part of an
// alert's way.
//
// A responder's test calls [Run] with a [Case]; with [NewServer] behind it that
// needs only Go, and in e2e the same suite runs against a real API server.
package conformance

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/evidence"
	nodes "stoop/node"
	"stoop/responders"
)

// World is a cluster for one test.
type World interface {
	// Config is how stoop reaches it: with the permissions that the registry
	// declares.
	Config() *rest.Config
	// Admin may do everything.
	Admin() kubernetes.Interface
	// Forbid takes a permission from stoop until the test ends; group is the
	// API group of the resource.
	Forbid(t testing.TB, verb, group, resource string)
}

// Placed is a World whose stoop has a service account, and on each node a token of
// its own.
type Placed interface {
	// On says on which node stoop runs, before Config is called, and returns what it
	// is known by.
	On(t testing.TB, node string) responders.Self
}

// Case is a responder with parameters that make it act.
type Case struct {
	Responder string
	// Name is what it is called in the tests; "" is Responder.
	Name string
	// Object is in place of the registry's, where that hangs on the parameters.
	Object responders.Object
	// Serial has the parts of the suite run one after the other: for what may
	// happen only once at a time in a cluster.
	Serial bool
	// New is in place of the registry's, for what a test must not do to the
	// machine that it runs on.
	New func(responders.Env) responders.Responder
	// World makes one anew for each part of the suite; in a shared cluster
	// each must have a Namespace of its own.
	World func(t testing.TB) World
	// Namespace is an existing one; "" is "shop".
	Namespace func(t testing.TB, w World) string
	// Params are the step's, and effects tells how often it acted. Of a pod's
	// responder effects may be nil: then what it wrote to the API server is
	// counted, and of one that keeps evidence its cases.
	Params func(t testing.TB) (params string, effects func() int)
	// Prepare makes what the step is about besides the pod, and returns further
	// fields of the alert; for what acts on the cluster. The kind of alert is
	// Kubernetes' audit log's where it names a ka.target.resource.
	Prepare func(t testing.TB, w World, pod *corev1.Pod) map[string]any
	// Done fails the test unless the pod is as a step that was done leaves it.
	Done func(t testing.TB, w World, pod *corev1.Pod)
	// Undone fails the test unless it is as before. For what can be undone.
	Undone func(t testing.TB, w World, pod *corev1.Pod)
	// Serve answers what the step asks by NATS, on the server that a part of the
	// suite runs, and returns how often it was asked.
	Serve func(t testing.TB, b *broker.Broker) (effects func() int)
	// Suspect makes what a responder of the node itself acts on, anew for each
	// part of the suite.
	Suspect func(t testing.TB) *Suspect
}

// Suspect is a container or a process on this very machine.
type Suspect struct {
	Container string         // its whole id; "" for a process of the host
	PID       int            // 0: the alert names none
	Start     int64          // of the process, as Falco writes it
	Fields    map[string]any // further ones of the alert
	// New is in place of the case's.
	New func(responders.Env) responders.Responder
	// Remove ends it, so that nothing of it is left; nil: it can't go.
	Remove func()
	// Effects is 0 as long as nothing was done to it; nil: the cases in the
	// evidence store are counted.
	Effects func() int
	Done    func() // fails the test unless the step was done
	Undone  func() // fails the test unless it is as before; for what can be undone
}

const node = "conformance-node"

// deadline bounds every wait of the suite.
const deadline = 20 * time.Second

// Run runs the suite.
func Run(t *testing.T, c Case) {
	i := slices.IndexFunc(responders.All(), func(e responders.Entry) bool { return e.Name == c.Responder })
	if i < 0 {
		t.Fatalf("there is no responder %q in the registry", c.Responder)
	}
	entry := responders.All()[i]
	if c.New != nil {
		entry.New = c.New
	}
	if c.Object != responders.NoObject {
		entry.Object = c.Object
	}
	pod := entry.Object == responders.PodObject
	cluster := pod || entry.Object == responders.NodeObject || entry.Object == responders.ResourceObject
	harm := entry.Kind == responders.Harm
	partOf := func(t *testing.T, name string, f func(t *testing.T, r *rig)) {
		t.Run(name, func(t *testing.T) {
			if !c.Serial {
				t.Parallel()
			}
			f(t, newRig(t, c, entry))
		})
	}

	part := func(name string, f func(t *testing.T, r *rig)) { partOf(t, name, f) }

	part("done", func(t *testing.T, r *rig) {
		r.start()
		r.want(r.step(), broker.Done)
		r.done()
	})
	part("idempotent", func(t *testing.T, r *rig) {
		r.start()
		s := r.step()
		r.want(s, broker.Done)
		effects := r.effects()
		if _, err := r.act(t.Context(), s, true); err != nil && !gone(err) {
			t.Errorf("a second run of the step, as after a crash: %v", err)
		}
		// People may be told twice after a crash, since nobody can know.
		if got := r.effects(); got != effects && entry.Kind != responders.Notification {
			t.Errorf("a second run of the step, as after a crash, acted again: %d times in all, %d before; %v", got, effects, r.net.writes())
		}
		r.done()
		if (cluster || c.Suspect != nil) && harm {
			// And as a further try in the same process, which looks at what
			// it knew before.
			if _, err := r.act(t.Context(), s, false); err != nil && !gone(err) {
				t.Errorf("a second try of the step: %v", err)
			}
			r.done()
		}
	})
	part("cancelled", func(t *testing.T, r *rig) {
		r.start()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.act(ctx, r.step(), false); !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that is over: error %v, want one that wraps context.Canceled", err)
		}
		if n := r.effects(); n != 0 {
			t.Errorf("with a context that is over it acted %d times: %v", n, r.net.writes())
		}
	})
	if cluster || entry.Kind == responders.Notification {
		part("hanging", func(t *testing.T, r *rig) {
			r.entry.Deadline = 100 * time.Millisecond
			r.start()
			r.net.hang(true)
			s := r.step()
			r.publish(s)
			r.outcome(s, func(o broker.Outcome) bool { return o.Status == broker.Retrying }, "retrying")
			r.net.hang(false)
			r.outcome(s, func(o broker.Outcome) bool { return o.Status != broker.Retrying && o.Status == broker.Done }, "done")
			r.done()
		})
	}
	part("audit", func(t *testing.T, r *rig) {
		r.guards.Mode = broker.Audit
		r.start()
		r.want(r.step(), broker.Audited)
		r.nothingDone()
	})
	part("rule in audit", func(t *testing.T, r *rig) {
		r.start()
		s := r.step()
		s.Mode = broker.Audit
		r.want(s, broker.Audited)
		r.nothingDone()
	})
	if harm {
		if entry.Object != responders.HostObject { // the host is in no namespace
			part("protected", func(t *testing.T, r *rig) {
				r.guards.Namespaces = []string{r.namespace}
				r.start()
				r.want(r.step(), broker.Suppressed)
				r.nothingDone()
			})
		}
		part("paused", func(t *testing.T, r *rig) {
			h := r.start()
			if _, err := h.SetPause(t.Context(), true, "test"); err != nil {
				t.Fatal(err)
			}
			s := r.step()
			r.want(s, broker.Suppressed)
			r.nothingDone()
		})
	}
	if c.Suspect != nil && entry.Object != responders.HostObject {
		part("suspect gone", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.suspect.Remove()
			r.want(s, broker.Nothing)
		})
		part("suspect replaced", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.suspect.Remove()
			next := c.Suspect(t)
			r.want(s, broker.Nothing)
			r.spared(next)
		})
	}
	if pod {
		part("gone", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.remove(r.pod)
			r.seenGone(s)
			r.want(s, broker.Nothing)
			r.nothingDone()
		})
		part("gone unseen", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.stopWatching()
			r.remove(r.pod)
			r.want(s, broker.Nothing)
		})
		part("replaced", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.remove(r.pod)
			r.seenGone(s)
			next := r.newPod(r.pod.Name)
			r.want(s, broker.Nothing, broker.Refused)
			r.nothingDone()
			r.untouched(next)
		})
		part("replaced unseen", func(t *testing.T, r *rig) {
			r.start()
			s := r.step()
			r.stopWatching()
			r.remove(r.pod)
			next := r.newPod(r.pod.Name)
			r.want(s, broker.Nothing)
			r.untouched(next)
		})
	}
	if cluster {
		t.Run("forbidden", func(t *testing.T) {
			if !c.Serial {
				t.Parallel()
			}
			var written, asked []write
			var namespace string
			t.Run("find out", func(t *testing.T) {
				r := newRig(t, c, entry)
				r.start()
				r.want(r.step(), broker.Done)
				written, asked, namespace = r.net.writes(), r.net.reads(), r.namespace
			})
			seen := map[string]bool{}
			if entry.Kind == responders.Evidence {
				// It reads. What it may not is its failure, or missing in what is kept.
				for _, w := range asked {
					name := w.verb + " " + w.resource
					if seen[name] {
						continue
					}
					seen[name] = true
					partOf(t, name, func(t *testing.T, r *rig) {
						r.start()
						r.world.Forbid(t, w.verb, w.group, w.resource)
						s := r.step()
						said := r.want(s, broker.Failed, broker.Done).Reason
						if m, err := os.ReadFile(filepath.Join(r.evidence, s.ID, "manifest.json")); err == nil {
							said += string(m)
						}
						for _, word := range []string{"missing permission", w.verb, w.resource} {
							if !strings.Contains(said, word) {
								t.Errorf("neither the reason nor the manifest names %q: %s", word, said)
							}
						}
					})
				}
				if len(seen) == 0 {
					t.Error("the step asked the API server for nothing")
				}
				return
			}
			for _, w := range written {
				name := w.verb + " " + w.resource
				if seen[name] {
					continue
				}
				seen[name] = true
				partOf(t, name, func(t *testing.T, r *rig) {
					r.start()
					r.world.Forbid(t, w.verb, w.group, w.resource)
					o := r.want(r.step(), broker.Failed)
					where := w.namespace
					switch w.namespace {
					case "":
						where = "whole cluster"
					case namespace:
						where = r.namespace // which is another one than then
					}
					for _, word := range []string{w.verb, w.resource, where} {
						if !strings.Contains(o.Reason, word) {
							t.Errorf("the reason does not name %q: %s", word, o.Reason)
						}
					}
				})
			}
			if len(seen) == 0 {
				t.Error("the step wrote nothing to the API server")
			}
		})
	}
	if _, ok := entry.New(responders.Env{Log: slog.New(slog.DiscardHandler)}).(responders.Undoer); ok {
		part("undo", func(t *testing.T, r *rig) {
			h := r.start()
			s := r.step()
			r.want(s, broker.Done)
			if !h.Undoable(s.ID) {
				t.Error("what it was done with may be taken away: the step does not count as one that can be undone")
			}
			o, err := h.Undo(t.Context(), s.ID, "test")
			if err != nil || o.Status != broker.Undone {
				t.Fatalf("undo: status %s (%s), error %v", o.Status, o.Reason, err)
			}
			if h.Undoable(s.ID) {
				t.Error("after it was undone, the step counts as one that can be")
			}
			r.undone()
			if o, err = h.Undo(t.Context(), s.ID, "test"); err != nil || o.Status != broker.Nothing {
				t.Errorf("undo once more: status %s (%s), error %v, want nothing", o.Status, o.Reason, err)
			}
			r.undone()
		})
		if cluster {
			part("undo of a step whose answers were lost", func(t *testing.T, r *rig) {
				h := r.start()
				s := r.step()
				r.net.loseAnswers(true)
				r.publish(s)
				o := r.outcome(s, func(o broker.Outcome) bool { return o.Status != broker.Retrying }, "its end")
				if o.Status != broker.Done || !o.Undo {
					t.Fatalf("status %s (%s), undo %t; want a step that is done and can be taken back", o.Status, o.Reason, o.Undo)
				}
				r.done()
				r.net.loseAnswers(false)
				if o, err := h.Undo(t.Context(), s.ID, "test"); err != nil || o.Status != broker.Undone {
					t.Fatalf("undo: status %s (%s), error %v", o.Status, o.Reason, err)
				}
				c.Undone(t, r.world, r.pod)
			})
		}
		if entry.Object == responders.HostObject {
			return
		}
		if c.Suspect != nil {
			part("undo of a suspect that is gone", func(t *testing.T, r *rig) {
				h := r.start()
				s := r.step()
				r.want(s, broker.Done)
				r.suspect.Remove()
				next := c.Suspect(t)
				if o, err := h.Undo(t.Context(), s.ID, "test"); err != nil || o.Status == broker.Failed {
					t.Errorf("undo: status %s (%s), error %v", o.Status, o.Reason, err)
				}
				r.spared(next)
			})
			return
		}
		if !pod {
			return
		}
		part("undo of a pod that was replaced", func(t *testing.T, r *rig) {
			h := r.start()
			s := r.step()
			r.want(s, broker.Done)
			r.remove(r.pod)
			next := r.newPod(r.pod.Name)
			if o, err := h.Undo(t.Context(), s.ID, "test"); err != nil {
				t.Errorf("undo: status %s (%s), error %v", o.Status, o.Reason, err)
			}
			r.untouched(next)
		})
	}
}

// rig is one stoop, as far as a step sees it, and its world.
type rig struct {
	t         *testing.T
	c         Case
	entry     responders.Entry
	world     World
	namespace string
	node      string
	fields    map[string]any
	pod       *corev1.Pod
	suspect   *Suspect
	params    string
	counted   func() int
	guards    responders.Guards
	net       *network
	kube      *responders.Kube
	pods      *responders.Pods
	watching  context.CancelFunc
	watched   chan struct{}
	broker    *broker.Broker
	responder responders.Responder
	local     *nodes.Node
	evidence  string

	mu       sync.Mutex
	outcomes []broker.Outcome
	news     chan struct{}
}

func newRig(t *testing.T, c Case, entry responders.Entry) *rig {
	r := &rig{
		t: t, c: c, entry: entry, world: c.World(t), namespace: "shop", node: node, news: make(chan struct{}),
		net: &network{},
	}
	if entry.Object == responders.NodeObject {
		r.node = "node-" + strings.ToLower(rand.Text()[:8])
		if _, err := r.world.Admin().CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: r.node}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), deadline)
			defer cancel()
			if err := r.world.Admin().CoreV1().Nodes().Delete(ctx, r.node, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				t.Error(err)
			}
		})
	}
	r.guards = responders.Guards{Mode: broker.Enforce, Node: r.node, MaxAge: 10 * time.Minute, Approval: time.Hour}
	if entry.Object == responders.ResourceObject {
		r.guards.Audit = responders.Alone{}
	}
	if p, ok := r.world.(Placed); ok {
		r.guards.Self = p.On(t, r.node)
	}
	if c.Namespace != nil {
		r.namespace = c.Namespace(t, r.world)
	}
	if c.Params != nil {
		r.params, r.counted = c.Params(t)
	}
	config := rest.CopyConfig(r.world.Config())
	config.QPS, config.Timeout = -1, 5*time.Second
	config.Wrap(r.net.wrap)
	var err error
	if r.kube, err = responders.NewKube(config); err != nil {
		t.Fatal(err)
	}
	if c.Suspect != nil {
		r.suspect = c.Suspect(t)
		r.counted = r.suspect.Effects
		if r.counted == nil {
			r.counted = r.cases
		}
		if r.suspect.New != nil {
			r.entry.New = r.suspect.New
		}
	}
	if r.counted == nil && entry.Kind == responders.Evidence {
		r.counted = r.cases
	}
	r.pod = r.newPod("web-0")
	if c.Prepare != nil {
		r.fields = c.Prepare(t, r.world, r.pod)
		now, err := r.world.Admin().CoreV1().Pods(r.namespace).Get(t.Context(), r.pod.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		r.pod = now
	}
	return r
}

// start starts the host and waits until it knows the node's pods.
func (r *rig) start() *responders.Host {
	t := r.t
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	// The pods are watched over a client of their own, which never hangs.
	watcher, err := responders.NewKube(r.world.Config())
	if err != nil {
		t.Fatal(err)
	}
	watching, stopWatching := context.WithCancel(ctx)
	r.watching, r.watched = stopWatching, make(chan struct{})
	if r.guards.Audit == nil {
		r.pods = responders.NewPods(watcher, r.node, log)
	}
	go func() {
		defer close(r.watched)
		if r.pods != nil {
			r.pods.Run(watching)
		}
	}()
	r.broker = brokertest.New(t)
	if r.c.Serve != nil {
		r.counted = r.c.Serve(t, r.broker)
	}
	r.evidence = filepath.Join(t.TempDir(), "evidence")
	store, err := evidence.Open(evidence.Config{Dir: r.evidence, Size: 64 << 20, PerTarget: 3, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	r.local = nodes.New(nodes.Config{Log: log})
	env := responders.Env{
		Local: r.local, Evidence: store,
		Kube: r.kube, HTTP: &http.Client{Transport: r.net.wrap(http.DefaultTransport)},
		Node: r.node, Cluster: "test", Data: t.TempDir(), Caller: r.broker, Log: log,
		Self: r.guards.Self, ProtectedPod: r.guards.ProtectedPod,
	}
	r.responder = r.entry.New(env)
	h, err := responders.NewHost(ctx, responders.Config{
		Broker: r.broker, Entries: []responders.Entry{r.entry}, Env: env, Pods: r.pods, Guards: r.guards, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.SetRules(ctx, map[string]broker.Mode{"conformance": broker.Enforce}); err != nil {
		t.Fatal(err)
	}
	sub, err := r.broker.Conn().Subscribe("stoop.outcomes.>", r.note)
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-r.watched
		if err := <-ran; err != nil {
			t.Errorf("the host: %v", err)
		}
		_ = sub.Unsubscribe()
		store.Close()
	})
	until(t, "the node's pods are known", func() bool { return r.pods == nil || r.pods.Synced() })
	return h
}

func (r *rig) stopWatching() {
	r.watching()
	<-r.watched
}

// seenGone waits until stoop's watch has told of the removal.
func (r *rig) seenGone(s *broker.Step) {
	r.t.Helper()
	until(r.t, "the watch tells that the pod is gone", func() bool {
		_, _, err := r.pods.Resolve(r.t.Context(), s.Target)
		return err != nil
	})
}

func (r *rig) note(m *nats.Msg) {
	var o broker.Outcome
	if err := json.Unmarshal(m.Data, &o); err != nil {
		r.t.Errorf("an outcome that is no JSON: %v", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.outcomes = append(r.outcomes, o)
	close(r.news)
	r.news = make(chan struct{})
}

// step is one of a Critical alert that the pod raised just now.
func (r *rig) step() *broker.Step {
	r.t.Helper()
	_, id, _ := strings.Cut(r.pod.Status.ContainerStatuses[0].ContainerID, "://")
	now := time.Now().UTC()
	fields := map[string]any{"container.id": id[:12], "k8s.ns.name": r.pod.Namespace, "k8s.pod.name": r.pod.Name}
	if r.suspect != nil {
		if r.suspect.Container == "" {
			fields = map[string]any{"container.id": "host"}
		}
		maps.Copy(fields, r.suspect.Fields)
		if r.suspect.PID != 0 {
			fields["proc.pid"], fields["proc.pid.ts"] = r.suspect.PID, r.suspect.Start
		}
	}
	source := "syscall"
	if r.fields["ka.target.resource"] != nil {
		source, fields = "k8s_audit", map[string]any{}
	}
	maps.Copy(fields, r.fields)
	line, err := json.Marshal(map[string]any{
		"hostname": r.node, "priority": "Critical", "rule": "Conformance", "source": source,
		"time": now.Format(time.RFC3339Nano), "output": "<!channel> see https://example.com/ \"`$(id)`",
		"output_fields": fields,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	s := &broker.Step{
		AlertID: string(uuid.NewUUID()), Alert: line, Received: now, Origin: broker.OriginFIFO,
		Rule: "conformance", Mode: broker.Enforce,
		// The suite's concern is the act: that a person is asked has a test of its own.
		Action: broker.Action{Responder: r.entry.Name, Approve: new(false)},
	}
	if r.params != "" {
		s.Params = json.RawMessage(r.params)
	}
	s.ID = broker.StepID(s.AlertID, s.Rule, 0, "")
	a, err := alert.Parse(line)
	if err != nil {
		r.t.Fatal(err)
	}
	s.Target = a.Target()
	return s
}

func (r *rig) publish(s *broker.Step) {
	r.t.Helper()
	if stored, err := r.broker.PublishStep(r.t.Context(), s); err != nil || !stored {
		r.t.Fatalf("publish the step: stored %t, error %v", stored, err)
	}
}

// want publishes a step and waits until it ends in one of the statuses. It
// must do so at the first try.
func (r *rig) want(s *broker.Step, statuses ...broker.Status) broker.Outcome {
	r.t.Helper()
	r.publish(s)
	o := r.outcome(s, func(broker.Outcome) bool { return true }, "an outcome")
	if !slices.Contains(statuses, o.Status) {
		r.t.Fatalf("status %s (%s), want %v", o.Status, o.Reason, statuses)
	}
	return o
}

// outcome waits for one of a step.
func (r *rig) outcome(s *broker.Step, is func(broker.Outcome) bool, what string) broker.Outcome {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), deadline)
	defer cancel()
	for {
		r.mu.Lock()
		news := r.news
		i := slices.IndexFunc(r.outcomes, func(o broker.Outcome) bool { return o.ID == s.ID && is(o) })
		var o broker.Outcome
		if i >= 0 {
			o = r.outcomes[i]
		}
		all := fmt.Sprint(r.outcomes)
		r.mu.Unlock()
		if i >= 0 {
			return o
		}
		select {
		case <-news:
		case <-ctx.Done():
			r.t.Fatalf("step %s: waited in vain for %s; there were %s", s.ID, what, all)
		}
	}
}

// act runs the responder past the host, with the pod as it was made.
func (r *rig) act(ctx context.Context, s *broker.Step, resumed bool) (responders.Result, error) {
	a, err := alert.Parse(s.Alert)
	if err != nil {
		r.t.Fatal(err)
	}
	req := &responders.Request{Step: s, Alert: a, Target: s.Target, Resumed: resumed}
	if r.entry.Object == responders.PodObject {
		req.Pod = r.pod
		req.Target.UID = string(r.pod.UID)
	}
	if r.suspect != nil {
		if r.suspect.PID != 0 {
			p, err := r.local.Process(r.suspect.PID, r.suspect.Start, r.suspect.Container)
			if err != nil {
				return responders.Result{}, err
			}
			defer p.Close()
			req.Process = p
		}
		if r.suspect.Container != "" {
			if req.Container, err = r.local.Container(context.WithoutCancel(ctx), r.suspect.Container, r.suspect.PID); err != nil {
				return responders.Result{}, err
			}
			req.Target.Container = r.suspect.Container
		}
	}
	return r.responder.Act(ctx, req)
}

// cases are those of the evidence store.
func (r *rig) cases() int {
	if r.evidence == "" {
		return 0
	}
	found, err := filepath.Glob(filepath.Join(r.evidence, "*", "manifest.json"))
	if err != nil {
		r.t.Error(err)
	}
	return len(found)
}

// spared fails the test if a suspect was acted on.
func (r *rig) spared(s *Suspect) {
	r.t.Helper()
	effects := s.Effects
	if effects == nil {
		effects = r.cases
	}
	if n := effects(); n != 0 {
		r.t.Errorf("another one was acted on in its place, %d times", n)
	}
}

// effects is how often the responder acted.
func (r *rig) effects() int {
	if r.counted != nil {
		return r.counted()
	}
	return len(r.net.writes())
}

func (r *rig) done() {
	r.t.Helper()
	if r.effects() == 0 {
		r.t.Error("nothing was done")
	}
	if r.c.Done != nil {
		r.c.Done(r.t, r.world, r.pod)
	}
	if r.suspect != nil && r.suspect.Done != nil {
		r.suspect.Done()
	}
}

func (r *rig) undone() {
	r.t.Helper()
	if r.suspect != nil {
		r.suspect.Undone()
	} else {
		r.c.Undone(r.t, r.world, r.pod)
	}
}

func (r *rig) nothingDone() {
	r.t.Helper()
	if n := r.effects(); n != 0 {
		r.t.Errorf("it acted %d times: %v", n, r.net.writes())
	}
}

// newPod is one that runs on the node, with a container.
func (r *rig) newPod(name string) *corev1.Pod {
	r.t.Helper()
	ctx, pods := r.t.Context(), r.world.Admin().CoreV1().Pods(r.namespace)
	pod, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "web"}},
		Spec: corev1.PodSpec{
			NodeName:   r.node,
			Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		r.t.Fatalf("create pod %s: %v", name, err)
	}
	id := strings.ReplaceAll(string(uuid.NewUUID())+string(uuid.NewUUID()), "-", "")
	if r.suspect != nil && r.suspect.Container != "" && r.pod == nil {
		id = r.suspect.Container
	}
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
		Name: "main", ContainerID: "containerd://" + id, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
	}}}
	if pod, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		r.t.Fatalf("update status of pod %s: %v", name, err)
	}
	return pod
}

func (r *rig) remove(pod *corev1.Pod) {
	r.t.Helper()
	err := r.world.Admin().CoreV1().Pods(pod.Namespace).Delete(r.t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil {
		r.t.Fatalf("delete pod %s: %v", pod.Name, err)
	}
}

// untouched fails the test unless a pod is as it was.
func (r *rig) untouched(pod *corev1.Pod) {
	r.t.Helper()
	now, err := r.world.Admin().CoreV1().Pods(pod.Namespace).Get(r.t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil {
		r.t.Fatalf("the pod that took the name: %v", err)
	}
	if now.UID != pod.UID || now.ResourceVersion != pod.ResourceVersion {
		r.t.Errorf("the pod that took the name was touched: it is now %+v", now.ObjectMeta)
	}
}

func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !is(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// write is a request, mostly one that changes something.
type write struct{ verb, group, resource, namespace, name string }

// network stands between a responder and everything else: it notes what is
// written and can stop answering.
type network struct {
	mu      sync.Mutex
	written []write
	asked   []write
	hanging chan struct{} // closed when it goes on; nil when it does not hang
	lose    bool          // the answer to the first request of each kind that writes
	lost    map[string]bool
}

type tripper struct {
	n    *network
	next http.RoundTripper
}

func (n *network) wrap(next http.RoundTripper) http.RoundTripper { return &tripper{n, next} }

func (n *network) hang(on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if on {
		n.hanging = make(chan struct{})
	} else {
		close(n.hanging)
		n.hanging = nil
	}
}

// loseAnswers has the connection break down after a request was carried out: once
// for each kind of request that changes something.
func (n *network) loseAnswers(on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lose, n.lost = on, map[string]bool{}
}

func (n *network) loses(w write) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	kind := w.verb + " " + w.resource
	if !n.lose || n.lost[kind] {
		return false
	}
	n.lost[kind] = true
	return true
}

func (n *network) writes() []write {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.written)
}

// reads are what was asked for.
func (n *network) reads() []write {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.asked)
}

func (p *tripper) RoundTrip(req *http.Request) (*http.Response, error) {
	p.n.mu.Lock()
	hanging := p.n.hanging
	p.n.mu.Unlock()
	if hanging != nil {
		select {
		case <-hanging:
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	if c, ok := read(req); ok && (req.Method != http.MethodGet || c.executes()) {
		p.n.mu.Lock()
		w := write{c.verb, c.group, c.permission(), c.namespace, c.name}
		p.n.written = append(p.n.written, w)
		p.n.mu.Unlock()
		if p.n.loses(w) {
			resp, err := p.next.RoundTrip(req)
			if err != nil {
				return nil, err
			}
			resp.Body.Close()
			return nil, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
		}
	}
	if c, ok := read(req); ok && req.Method == http.MethodGet {
		p.n.mu.Lock()
		p.n.asked = append(p.n.asked, write{c.verb, c.group, c.permission(), c.namespace, c.name})
		p.n.mu.Unlock()
	}
	return p.next.RoundTrip(req)
}

// gone reports whether an error says that there is nothing to act on any more.
func gone(err error) bool {
	return errors.Is(err, responders.ErrGone) || errors.Is(err, nodes.ErrGone) || errors.Is(err, nodes.ErrNotSame) || apierrors.IsNotFound(err)
}
