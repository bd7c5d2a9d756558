package pipe

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/broker"
)

// metrics are what the pipe counts. Their labels have few values, and none
// that an alert chooses.
type metrics struct {
	alerts   *prometheus.CounterVec // origin, priority
	bad      *prometheus.CounterVec // origin, reason
	passed   *prometheus.CounterVec // origin
	overlong *prometheus.CounterVec // origin
	shed     [classes]prometheus.Counter

	mu    sync.RWMutex
	known map[broker.Origin]*[classes]prometheus.Counter // of alerts: looking them up by label takes longer than parsing a short alert
}

func newMetrics(r prometheus.Registerer, bytes func() float64) *metrics {
	m := &metrics{
		alerts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stoop_alerts_received_total",
			Help: "Alerts that came in, by the way they came and their priority; unparsed are lines that are no alerts.",
		}, []string{"origin", "priority"}),
		bad: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stoop_lines_bad_total",
			Help: "Lines that are no alert: json (broken, or not Falco's), text, torn (a piece of a line, before or behind a good alert).",
		}, []string{"origin", "reason"}),
		passed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stoop_lines_passed_over_total",
			Help: "Lines of statistics and logs that Falco writes beside its alerts.",
		}, []string{"origin"}),
		overlong: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "stoop_lines_overlong_total",
			Help: "Lines that were skipped because they are too long.",
		}, []string{"origin"}),
		known: map[broker.Origin]*[classes]prometheus.Counter{},
	}
	shed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "stoop_alerts_shed_total",
		Help: "Alerts that were lost because the store did not take them and the memory for them was full.",
	}, []string{"priority"})
	for class := range classes {
		m.shed[class] = shed.WithLabelValues(className(class))
	}
	if r != nil {
		r.MustRegister(m.alerts, m.bad, m.passed, m.overlong, shed,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "stoop_intake_bytes",
				Help: "Memory of the alerts that are not stored yet, in bytes.",
			}, bytes))
	}
	return m
}

func (m *metrics) received(a *Arrival) {
	m.mu.RLock()
	of := m.known[a.Origin]
	m.mu.RUnlock()
	if of == nil {
		of = &[classes]prometheus.Counter{}
		for class := range classes {
			of[class] = m.alerts.WithLabelValues(string(a.Origin), className(class))
		}
		m.mu.Lock()
		m.known[a.Origin] = of
		m.mu.Unlock()
	}
	of[classOf(a)].Inc()
}
