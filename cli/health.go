package cli

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/pipe"
	"stoop/responders"
	"stoop/rules"
)

// health says how stoop is doing.
type health struct {
	engine   *engine
	intake   *pipe.Intake
	pods     *responders.Pods
	election *responders.Election // nil where there is none
	source   bool
	rules    atomic.Pointer[rules.Set]
	rulesBad atomic.Bool
}

const (
	// oldestWaiting is how long an alert may wait before stoop is not ready.
	oldestWaiting = 5 * time.Second
	// probeTimeout bounds the readiness probe's write.
	probeTimeout = 2 * time.Second
)

// ready says why stoop does not do its work as it should, or nil: the store
// takes a real write on its disk, the pipe is drained, no alert waits long.
func (h *health) ready(ctx context.Context) error {
	g := h.engine.current.Load()
	if g == nil {
		return errors.New("starting")
	}
	var errs []error
	if g.broker.InMemory() && h.engine.cfg.Dir != "" {
		errs = append(errs, errors.New("store: the disk refuses, alerts are kept in memory only"))
	}
	probe, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if err := g.broker.State().Probe(probe); err != nil {
		errs = append(errs, fmt.Errorf("store: %w", err))
	}
	if alerts, _, oldest := h.intake.Backlog(); alerts > 0 && time.Since(oldest) > oldestWaiting {
		errs = append(errs, fmt.Errorf("pipe: %d alerts wait to be stored, the oldest for %s", alerts, time.Since(oldest).Round(time.Second)))
	}
	if h.pods != nil && !h.pods.Synced() {
		errs = append(errs, errors.New("cluster: this node's pods have not been read yet"))
	}
	if h.election != nil {
		// So that a Service leads Falco's audit events to the one that answers them.
		if term, why := h.election.Turn(); term == nil {
			errs = append(errs, fmt.Errorf("audit events: %s; this stoop stands by", why))
		}
	}
	return errors.Join(errs...)
}

// live says why stoop should be killed, or nil: only a deadlock is a reason.
func (h *health) live() error {
	got := make(chan struct{})
	go func() {
		h.intake.Backlog() // takes the lock that every alert passes
		if g := h.engine.current.Load(); g != nil {
			g.host.Paused()
			g.broker.Unrouted()
		}
		close(got)
	}()
	select {
	case <-got:
		return nil
	case <-time.After(5 * time.Second):
		return errors.New("the intake's lock has been held for 5 s")
	}
}

// register adds what only the whole knows to the metrics.
func (h *health) register(reg prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	truth := map[bool]float64{true: 1}
	gauge("stoop_alerts_unrouted", "Alerts that are stored and wait for the router.", func() float64 {
		if g := h.engine.current.Load(); g != nil {
			return float64(g.broker.Unrouted())
		}
		return 0
	})
	gauge("stoop_steps_waiting", "Steps that wait to be done, or are being done.", func() float64 {
		_, n := h.engine.idle()
		return float64(n)
	})
	gauge("stoop_store_in_memory", "1 while the disk refuses and alerts are kept in memory only.", func() float64 {
		g := h.engine.current.Load()
		return truth[g != nil && g.broker.InMemory()]
	})
	gauge("stoop_breakers_open", "Breakers that hold harmful steps back.", func() float64 {
		if g := h.engine.current.Load(); g != nil {
			return float64(g.host.OpenBreakers())
		}
		return 0
	})
	gauge("stoop_rules_error", "1 while the rules file is wrong and the last good rules are in force.", func() float64 {
		return truth[h.rulesBad.Load()]
	})
	reg.MustRegister(&pauseInfo{h, prometheus.NewDesc("stoop_paused", "1 while acting is paused: on this node by stoop pause, or in the whole cluster by the annotation of stoop's namespace.", []string{"source"}, nil)})
	reg.MustRegister(&rulesInfo{h, prometheus.NewDesc("stoop_rules_info", "The rules in force: their hash as a label, their number as the value.", []string{"hash"}, nil)})
}

// rulesInfo is a collector, because its label changes with the rules.
type rulesInfo struct {
	h    *health
	desc *prometheus.Desc
}

func (r *rulesInfo) Describe(ch chan<- *prometheus.Desc) { ch <- r.desc }

func (r *rulesInfo) Collect(ch chan<- prometheus.Metric) {
	s := r.h.rules.Load()
	if s == nil {
		return
	}
	ch <- prometheus.MustNewConstMetric(r.desc, prometheus.GaugeValue, float64(len(s.Rules)), s.Hash)
}

// pauseInfo is a collector, because only the host of the moment knows.
type pauseInfo struct {
	h    *health
	desc *prometheus.Desc
}

func (p *pauseInfo) Describe(ch chan<- *prometheus.Desc) { ch <- p.desc }

func (p *pauseInfo) Collect(ch chan<- prometheus.Metric) {
	var node, cluster float64
	if g := p.h.engine.current.Load(); g != nil {
		if g.host.Paused().Paused {
			node = 1
		}
		if c := g.host.PausedCluster(); c != nil && c.Paused {
			cluster = 1
		}
	}
	ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, node, "node")
	ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, cluster, "cluster")
}
