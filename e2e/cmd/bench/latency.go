package main

import (
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"stoop/broker"
	"stoop/e2e/figures"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// stage is a node with a stoop on it, and a watch that notes when pods go.
type stage struct {
	*bench
	node, ns string
	stoop    *program.Stoop

	mu   sync.Mutex
	gone map[types.UID]time.Time
}

func (b *bench) stage(rules string) *stage { return b.stageOn(b.cluster.Node(b), rules) }

func (b *bench) stageOn(node, rules string) *stage {
	s := &stage{bench: b, node: node, ns: b.cluster.Namespace(b, kube.Name("bench")), gone: map[types.UID]time.Time{}}
	w, err := b.account.Client.CoreV1().Pods(s.ns).Watch(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatalf("watch the pods: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for event := range w.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok && event.Type == watch.Deleted {
				now := time.Now()
				s.mu.Lock()
				s.gone[pod.UID] = now
				s.mu.Unlock()
			}
		}
	}()
	b.Cleanup(func() { w.Stop(); <-done })
	s.stoop = program.Start(b, b.options(s.node, rules))
	return s
}

// send is a way to have a pod deleted.
type send func(*corev1.Pod) error

func (s *stage) byAlert(pod *corev1.Pod) error {
	return s.stoop.TryWrite(program.Critical("Test critical", pod).Line())
}

func (s *stage) byRequest(pod *corev1.Pod) error {
	return s.account.Client.CoreV1().Pods(pod.Namespace).Delete(s.Context(), pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &s.grace, Preconditions: &metav1.Preconditions{UID: &pod.UID},
	})
}

// measure has n pods deleted at rate a second and returns how long each took
// from the send until the watch saw the pod gone.
func (s *stage) measure(send send, n int, rate float64) []time.Duration {
	pods := s.cluster.Pods(s, s.ns, kube.Name("pod"), s.node, n)
	began := make([]time.Time, n)
	errs := make([]error, n)
	var sent sync.WaitGroup
	// Room for what the pods' making left behind: stoop's view of them, and
	// the API server's own work.
	time.Sleep(300 * time.Millisecond)
	start := time.Now()
	for i, pod := range pods {
		time.Sleep(time.Until(start.Add(time.Duration(float64(i) / rate * float64(time.Second)))))
		began[i] = time.Now()
		sent.Go(func() { errs[i] = send(pod) })
	}
	sent.Wait()
	for _, err := range errs {
		if err != nil {
			s.Fatalf("%v", err)
		}
	}
	took := make([]time.Duration, n)
	harness.Eventually(s, 30*time.Second, 10*time.Millisecond, func() (bool, string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		missing := 0
		for i, pod := range pods {
			if at, ok := s.gone[pod.UID]; ok {
				took[i] = at.Sub(began[i])
			} else {
				missing++
			}
		}
		return missing == 0, fmt.Sprintf("the end of %d of %d pods", missing, n)
	})
	return took
}

// compare measures both ways in turns, n pods of each in blocks, so that what
// else the machine does hits both alike.
func (s *stage) compare(n, block int, rate float64) (stoop, bare []time.Duration) {
	for len(stoop) < n {
		stoop = append(stoop, s.measure(s.byAlert, block, rate)...)
		bare = append(bare, s.measure(s.byRequest, block, rate)...)
	}
	return stoop, bare
}

// latency is FIFO → pod seen gone, over a bare DELETE.
func (b *bench) latency() {
	s := b.stage(b.deleteRules())
	s.measure(s.byAlert, 20, 20) // connections, caches
	s.measure(s.byRequest, 20, 20)
	for _, r := range []struct {
		rate     float64
		n, block int
	}{{1, 100, 10}, {20, 600, 20}, {200, 2000, 200}} {
		if b.quick {
			r.block = max(r.block/10, 2)
		}
		stoop, bare := s.compare(b.samples(r.n), r.block, r.rate)
		p50, p99 := figures.Quantile(stoop, .5), figures.Quantile(stoop, .99)
		bare50, bare99 := figures.Quantile(bare, .5), figures.Quantile(bare, .99)
		b.add(row{
			what:  fmt.Sprintf("alert written to the FIFO → pod seen gone, %g a second, p50 (%d each)", r.rate, len(stoop)),
			stoop: figures.MS(p50), bare: figures.MS(bare50) + " (a bare DELETE)",
			ratio: fmt.Sprintf("%s, %s", more(p50-bare50), over(float64(p50), float64(bare50))),
			aim:   "at most 1 ms more", held: p50-bare50 <= time.Millisecond,
		})
		b.add(row{
			what:  fmt.Sprintf("the same, %g a second, p99", r.rate),
			stoop: figures.MS(p99), bare: figures.MS(bare99),
			ratio: fmt.Sprintf("%s, %s", more(p99-bare99), over(float64(p99), float64(bare99))),
			aim:   "at most 3 ms more", held: p99-bare99 <= 3*time.Millisecond,
		})
	}
	s.noteTook(time.Time{})
	s.stoop.Stop()
}

// noteTook says where the time of the steps since then went, by stoop's own
// account.
func (s *stage) noteTook(since time.Time) {
	var stored, matched, requested, done []time.Duration
	var slowest broker.Took
	for _, o := range s.stoop.History() {
		if o.Status != broker.Done || o.Time.Before(since) {
			continue
		}
		for of, took := range map[*[]time.Duration]broker.Micros{&stored: o.Took.Stored, &matched: o.Took.Matched, &requested: o.Took.Requested, &done: o.Took.Done} {
			*of = append(*of, micros(took))
		}
		if o.Took.Done > slowest.Done {
			slowest = o.Took
		}
	}
	s.note("By stoop's own account, from the alert's arrival, at p50 and p99: stored after %s and %s, matched after %s and %s, requested after %s and %s, answered by the API server after %s and %s; the slowest of %d steps after %s, %s, %s, %s.",
		figures.MS(figures.Quantile(stored, .5)), figures.MS(figures.Quantile(stored, .99)), figures.MS(figures.Quantile(matched, .5)), figures.MS(figures.Quantile(matched, .99)),
		figures.MS(figures.Quantile(requested, .5)), figures.MS(figures.Quantile(requested, .99)), figures.MS(figures.Quantile(done, .5)), figures.MS(figures.Quantile(done, .99)), len(done),
		figures.MS(micros(slowest.Stored)), figures.MS(micros(slowest.Matched)), figures.MS(micros(slowest.Requested)), figures.MS(micros(slowest.Done)))
}

func micros(m broker.Micros) time.Duration { return time.Duration(m) * time.Microsecond }
