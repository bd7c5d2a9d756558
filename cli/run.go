package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/node"
	"stoop/pipe"
	"stoop/responders"
	"stoop/router"
	"stoop/rules"
	"stoop/web"
)

// stopTimeout is how long an orderly stop waits for the store to take what was
// read; the steps under way then have five seconds more.
const stopTimeout = 4 * time.Second

// leaveAfter is how long a run whose input has ended waits for steps that are
// tried again and again; with a data folder they go on at the next start.
const leaveAfter = 30 * time.Second

func (p *program) runCommand() *cobra.Command {
	var f struct {
		config, rules, mode, pipe, file, node, data, kubeconfig string
		stdin                                                   bool
	}
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Read alerts and answer them",
		Long: `Reads Falco's alerts and answers them by the rules, until it is told to stop
(SIGTERM or Ctrl-C; a second one ends it at once). With --stdin it stops by
itself when the input ends and all of it is dealt with.

Rules are read again when their file changes. In audit mode, the default,
everything happens but the acts.`,
		Example: `  stoop run --rules rules.yaml --pipe /run/stoop/falco.pipe
  kubectl logs -f -n falco FALCO-POD |
    stoop run --stdin --node ITS-NODE --kubeconfig ~/.kube/config`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(f.config)
			if err != nil {
				return wrong(err)
			}
			set := func(v *string, flag string) {
				if flag != "" {
					*v = flag
				}
			}
			set(&c.Mode, f.mode)
			set(&c.Node, f.node)
			set(&c.Data, f.data)
			set(&c.Kubernetes.Kubeconfig, f.kubeconfig)
			named := 0
			for _, given := range []bool{f.pipe != "", f.file != "", f.stdin} {
				if given {
					named++
				}
			}
			if named > 1 {
				return usage("--pipe, --file and --stdin exclude each other; the configuration can name several sources")
			}
			if named == 1 {
				c.Source = Source{Pipe: f.pipe, File: f.file, Stdin: f.stdin}
			}
			if c.Mode != string(broker.Audit) && c.Mode != string(broker.Enforce) {
				return usage("--mode is %q: it is audit or enforce", c.Mode)
			}
			err = p.run(cmd.Context(), &c, f.rules)
			if err != nil {
				tellSystemd(statusLine(err.Error()))
			}
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.config, "config", "", "the configuration `FILE` (default "+defaultConfig+")")
	fl.StringVar(&f.rules, "rules", defaultRules, "the rules `FILE`")
	fl.StringVar(&f.mode, "mode", "", "audit or enforce (default: as configured, or audit)")
	fl.StringVar(&f.pipe, "pipe", "", "read the FIFO `PATH`; created if missing")
	fl.BoolVar(&f.stdin, "stdin", false, "read standard input, and stop at its end")
	fl.StringVar(&f.file, "file", "", "follow the file `PATH`")
	fl.StringVar(&f.node, "node", "", "this node's `NAME` (default NODE_NAME, or the host's)")
	fl.StringVar(&f.data, "data", "", "the data `FOLDER` (default /var/lib/stoop)")
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "a kubeconfig `FILE` (default in a pod: its account)")
	return cmd
}

// defaultRules is where the rules are when --rules is not given.
const defaultRules = "/etc/stoop/rules.yaml"

// memoryLimit is what the garbage collector keeps the heap under, in bytes, if
// GOMEMLIMIT does not say otherwise. In a storm the store's caches would grow
// far beyond it, for nothing.
const memoryLimit = 88 << 20

// run wires everything together and waits for the end. What opens is closed in
// the reverse order: sources, intake, engine, the rest.
func (p *program) run(ctx context.Context, c *Config, rulesPath string) (err error) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	log := p.logger(c.Log)
	nodeName, err := c.nodeName()
	if err != nil {
		return err
	}
	entries := responders.All()
	catalog := catalogOf(entries)
	set, err := rules.Load(rulesPath, catalog)
	if err != nil {
		return wrong(err)
	}
	for _, w := range set.Warnings {
		log.Warn("rules", "warning", w.String())
	}
	for _, w := range c.unserved(set) {
		log.Warn("rules", "warning", w)
	}
	bc, err := c.brokerConfig()
	if err != nil {
		return wrong(err)
	}
	bc.Log = log
	bucket, err := c.evidenceBucket()
	if err != nil {
		return wrong(err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	unkept := prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_matched_dropped_total", Help: "Alerts that matched a rule and were not kept for stoop test --from-history: too many at once, or no space."})
	reg.MustRegister(unkept)
	bc.Unkept = unkept.Inc

	kube, self, err := c.cluster(log)
	if err != nil {
		return wrong(err)
	}
	own := &responders.OwnProcesses{}
	var pods *responders.Pods
	var election *responders.Election
	guards := c.guards(nodeName, self, own)
	switch {
	case c.Kubernetes.AuditEvents == elected && kube == nil:
		return wrong(errors.New("kubernetes.auditEvents: elected needs a cluster: give --kubeconfig, or run in a pod with a service account"))
	case c.Kubernetes.AuditEvents == elected:
		name := self.Pod
		if name == "" {
			name = nodeName
		}
		election = responders.NewElection(responders.ElectionConfig{Kube: kube, Namespace: self.Home(), Name: name, Log: log, Registerer: reg})
		guards.Audit = election
	case kube != nil:
		pods = responders.NewPods(kube, nodeName, log)
	}
	release, err := broker.Lock(c.Data)
	if err != nil {
		return err
	}
	defer release()
	// The pipe first of all: Falco, which may be starting, would make a
	// regular file in its place.
	sources, err := c.sources(p)
	if err != nil {
		return wrong(err)
	}
	local, err := broker.ListenLocal(c.Data)
	if err != nil {
		return err
	}

	var e *engine
	store, err := evidence.Open(evidence.Config{
		Dir: evidenceDir(c.Data), Size: int64(c.Evidence.Size), PerTarget: c.Evidence.PerTarget,
		Age: time.Duration(c.Evidence.Age), Needed: func(step string) bool { return e.undoable(step) },
		Bucket: bucket, Node: nodeName, Log: log, Registerer: reg,
	})
	if err != nil {
		return err
	}
	defer store.Close()
	machine := node.New(node.Config{Cgroup: c.Host.Cgroup, Log: log})

	told := &teller{node: nodeName, log: log}
	fleet, err := c.fleet(kube, nodeName, self, told, log, reg)
	if err != nil {
		return wrong(err)
	}
	var cluster *responders.ClusterPause
	if kube != nil {
		if cluster, err = responders.NewClusterPause(responders.ClusterPauseConfig{Kube: kube, Namespace: self.Home(), Log: log, Registerer: reg}); err != nil {
			return wrong(err)
		}
	}
	r := router.New(log, reg, trustOf(entries, guards))
	r.SetRules(set)
	e = &engine{
		cfg: bc, router: r, local: local, store: newStoreSwitch(), log: log, ready: make(chan struct{}),
		host: responders.Config{
			Entries: entries, Pods: pods, Log: log, Metrics: responders.NewMetrics(reg), Ended: &responders.Ended{}, Fleet: fleet, Cluster: cluster, Tell: told.tell,
			Env: responders.Env{
				Kube: kube, Node: nodeName, Cluster: c.Cluster, Data: c.Data,
				Local: machine, Evidence: store, Self: self, Own: own, Log: log,
			},
			Guards: guards,
		},
	}
	intake := pipe.NewIntake(pipe.Options{
		Store: e.store, Log: log, Registerer: reg,
		OnShed: func(pr alert.Priority, n int) {
			told.tell("alerts shed", fmt.Sprintf("%d alerts of priority %s were shed: the store did not keep up", n, pr))
		},
	})
	told.intake = intake
	h := &health{engine: e, intake: intake, pods: pods, election: election, source: len(sources) > 0}
	e.health = h
	h.rules.Store(set)
	h.register(reg)

	// background lives until the very end, engine until the intake is empty.
	background, stopBackground := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stopBackground(nil)
	engineCtx, stopEngine := context.WithCancel(context.WithoutCancel(ctx))
	defer stopEngine()
	reading, stopReading := context.WithCancelCause(ctx)
	defer stopReading(nil)

	var bg, eng, src sync.WaitGroup
	var engineErr error
	bg.Go(func() { _ = local.Serve(background) })
	bg.Go(func() { store.Run(background) })
	if pods != nil {
		bg.Go(func() { pods.Run(background) })
	}
	if fleet != nil {
		bg.Go(func() { fleet.Run(background) })
	}
	if cluster != nil {
		bg.Go(func() { cluster.Run(background) })
	}
	if election != nil {
		bg.Go(func() { election.Run(background) })
	}
	bg.Go(func() {
		if err := machine.Run(background); err != nil {
			log.Error("the containers of this node are not followed: each is looked for when an alert names it", "error", err)
		}
	})
	eng.Go(func() {
		if engineErr = e.run(engineCtx); engineErr != nil {
			stopReading(engineErr)
		}
	})
	select {
	case <-e.ready:
	case <-reading.Done():
	}
	watcher := &rules.Watcher{
		Path: rulesPath, Catalog: catalog, Hash: set.Hash,
		OnChange: func(s *rules.Set) {
			e.setRules(background, s)
			h.rules.Store(s)
			h.rulesBad.Store(false)
			log.Info("rules read", "rules", len(s.Rules), "hash", s.Hash)
		},
		OnError: func(err error) {
			h.rulesBad.Store(true)
			var ps rules.Problems
			if errors.As(err, &ps) {
				log.Error("the rules are wrong: the last good ones stay in force", "error", ps.Summary(), "problems", len(ps), "do", "stoop check --rules "+rulesPath)
			} else {
				log.Error("the rules can't be read: the last good ones stay in force", "error", err)
			}
			told.tell("rules are wrong", "the rules file is wrong; the last good rules stay in force (run stoop check)")
		},
		OnRecovered: func() { h.rulesBad.Store(false) },
	}
	bg.Go(func() { watcher.Run(background) })
	if c.HTTP.Listen != "" {
		srv, err := web.Listen(c.HTTP.Listen, reg, h.ready, h.live, log)
		if err != nil {
			stopReading(err)
		} else {
			bg.Go(func() { srv.Run(background) })
		}
		if !isLoopback(c.HTTP.Listen) {
			log.Warn("metrics and health are served beyond this machine, without authentication", "listen", c.HTTP.Listen)
		}
	}

	log.Info("ready", "version", version(), "node", nodeName, "mode", c.Mode, "rules", len(set.Rules), "hash", set.Hash, "cluster", kube != nil)
	tellSystemd(daemon.SdNotifyReady)
	bg.Go(func() {
		notifySystemd(background, func() string { return h.status(c.Mode) }, h.live)
	})
	ended := make(chan struct{})
	for _, s := range sources {
		src.Go(func() {
			if err := s.Run(reading, intake); err != nil {
				stopReading(err)
			}
		})
	}
	go func() { src.Wait(); close(ended) }()

	select {
	case <-reading.Done(): // told to stop, or something is broken
	case <-ended: // the input is over: deal with all of it
		waitIdle(reading, intake, e)
	}
	cause := context.Cause(reading)
	tellSystemd(daemon.SdNotifyStopping)
	stopReading(nil)
	<-ended
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	closeErr := intake.Close(stopping)
	stopEngine()
	eng.Wait()
	stopBackground(nil)
	bg.Wait()
	if _, waiting := e.idle(); waiting > 0 {
		log.Warn("steps are left to be done at the next start", "steps", waiting)
	}
	log.Info("stopped")
	if errors.Is(cause, context.Canceled) {
		cause = nil
	}
	if engineErr != nil && !errors.Is(cause, engineErr) {
		cause = errors.Join(cause, engineErr)
	}
	return errors.Join(cause, closeErr)
}

// waitIdle waits until all that was read is dealt with.
func waitIdle(ctx context.Context, in *pipe.Intake, e *engine) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var patience time.Time
	quiet := 0
	for {
		alerts, _, _ := in.Backlog()
		done, _ := e.idle()
		if alerts == 0 && done {
			// The router's last steps may be on their way: look twice.
			if quiet++; quiet > 2 {
				return
			}
		} else {
			quiet = 0
		}
		if alerts == 0 && e.routed() {
			if patience.IsZero() {
				patience = time.Now()
			}
			if time.Since(patience) > leaveAfter {
				return
			}
		} else {
			patience = time.Time{}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// routed reports whether every stored alert has been held against the rules.
func (e *engine) routed() bool {
	g := e.current.Load()
	return g != nil && g.broker.Unrouted() == 0
}

// trustOf is which alerts count towards a rule's when.
func trustOf(entries []responders.Entry, g responders.Guards) router.Trust {
	harmful := map[string]bool{}
	for _, e := range entries {
		harmful[e.Name] = e.Kind == responders.Harm
	}
	return router.Trust{
		Harms:    func(responder string) bool { return harmful[responder] },
		Distrust: g.Distrust, MaxAge: g.MaxAge,
	}
}

func catalogOf(entries []responders.Entry) rules.Catalog {
	c := rules.Catalog{}
	for _, e := range entries {
		c[e.Name] = e.Params
	}
	return c
}

// sources opens every source that the configuration names.
func (c *Config) sources(p *program) ([]pipe.Source, error) {
	var out []pipe.Source
	fail := func(err error) ([]pipe.Source, error) { return nil, err }
	s := c.Source
	handed, err := pipe.HandedFIFO()
	if err != nil {
		return fail(err)
	}
	if handed != nil {
		out = append(out, handed)
	} else if s.Pipe == "" && s.File == "" && !s.Stdin && s.HTTP.Listen == "" {
		s.Pipe = defaultPipe
	}
	if s.Pipe != "" && handed == nil {
		f, err := pipe.OpenFIFO(s.Pipe)
		if err != nil {
			return fail(err)
		}
		out = append(out, f)
	}
	if s.File != "" {
		f, err := pipe.OpenFile(s.File, c.Data)
		if err != nil {
			return fail(err)
		}
		out = append(out, f)
	}
	if s.Stdin {
		f, ok := p.stdin.(*os.File)
		if !ok {
			return fail(errors.New("standard input is no file"))
		}
		out = append(out, pipe.NewStdin(f))
	}
	if s.HTTP.Listen != "" {
		h, err := pipe.ListenHTTP(pipe.HTTPConfig{
			Listen: s.HTTP.Listen, TokenFile: s.HTTP.TokenFile, Cert: s.HTTP.Cert, Key: s.HTTP.Key, ClientCA: s.HTTP.ClientCA,
		})
		if err != nil {
			return fail(err)
		}
		out = append(out, h)
	}
	return out, nil
}

// cluster is the client for the API server, nil when there is none, and what
// stoop is known by.
func (c *Config) cluster(log *slog.Logger) (*responders.Kube, responders.Self, error) {
	rc, self, err := c.reach()
	if rc == nil || err != nil {
		return nil, self, err
	}
	client, err := responders.NewKube(rc)
	if err != nil {
		return nil, self, fmt.Errorf("reach the API server: %w", err)
	}
	log.Debug("cluster", "server", rc.Host, "user", self.User)
	return client, self, nil
}

// reach is how the API server is reached, nil when there is none, and what stoop is
// known by.
func (c *Config) reach() (*rest.Config, responders.Self, error) {
	self := responders.Self{
		PID: int64(os.Getpid()), Container: ownContainer(),
		Namespace: os.Getenv("POD_NAMESPACE"), Pod: os.Getenv("POD_NAME"),
	}
	var rc *rest.Config
	var err error
	if c.Kubernetes.Kubeconfig != "" {
		rc, err = clientcmd.BuildConfigFromFlags("", c.Kubernetes.Kubeconfig)
	} else if rc, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) {
		return nil, self, nil
	} else if self.Namespace == "" {
		ns, rerr := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if rerr == nil {
			self.Namespace = strings.TrimSpace(string(ns))
		}
	}
	if err != nil {
		return nil, self, fmt.Errorf("reach the API server: %w", err)
	}
	self.User = tokenUser(rc)
	rc.QPS, rc.Burst = float32(c.Kubernetes.QPS), c.Kubernetes.Burst
	rc.UserAgent = "stoop/" + version()
	return rc, self, nil
}

// tokenUser is the service account that a token is of, or "". The token is
// not verified: it is our own.
func tokenUser(rc *rest.Config) string {
	token := rc.BearerToken
	if token == "" && rc.BearerTokenFile != "" {
		data, err := os.ReadFile(rc.BearerTokenFile)
		if err != nil {
			return ""
		}
		token = string(data)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	if json.Unmarshal(data, &claims) != nil {
		return ""
	}
	return claims.Subject
}

// containerInCgroup finds a container's id in a cgroup's path.
var containerInCgroup = regexp.MustCompile(`[0-9a-f]{64}`)

// ownContainer is the id of the container that stoop runs in, or "".
func ownContainer() string {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	return containerInCgroup.FindString(string(data))
}

func (c *Config) guards(name string, self responders.Self, own *responders.OwnProcesses) responders.Guards {
	g := responders.Guards{
		Mode: broker.Mode(c.Mode), Node: name, Aliases: c.Aliases, Self: self, Own: own,
		Namespaces: slices.Clone(c.Guard.Protect.Namespaces), PriorityClasses: c.Guard.Protect.PriorityClasses,
		Cooldown: time.Duration(c.Guard.Cooldown), MaxAge: time.Duration(c.Guard.MaxAge), Approval: time.Duration(c.Guard.Approval),
		Settle: time.Duration(c.Guard.Settle),
		API:    c.Guard.Limits.rates(), Local: c.Guard.LocalLimits.rates(),
	}
	if self.Namespace != "" {
		g.Namespaces = append(g.Namespaces, self.Namespace)
	}
	return g
}

// foreseen are the guards that say what would be held back, where nobody acts.
func (c *Config) foreseen() responders.Guards {
	g := c.guards("", responders.Self{}, nil)
	if c.Kubernetes.AuditEvents == elected {
		g.Audit = responders.Alone{}
	}
	return g
}

// fleet is this node's part in the budget of the whole cluster; nil without a
// cluster, and where it is off.
func (c *Config) fleet(kube *responders.Kube, name string, self responders.Self, told *teller, log *slog.Logger, reg prometheus.Registerer) (*responders.Fleet, error) {
	if kube == nil || c.Guard.Limits.Cluster.N == 0 {
		return nil, nil
	}
	return responders.NewFleet(responders.FleetConfig{
		Kube: kube, Namespace: self.Home(), Node: name, Limit: responders.Rate(c.Guard.Limits.Cluster),
		Log: log, Tell: told.tell, Registerer: reg,
	})
}

// teller tells people what no outcome says: as an alert of stoop's own, so that
// a rule with source: stoop can send it wherever they look.
type teller struct {
	node   string
	log    *slog.Logger
	intake *pipe.Intake
}

func (t *teller) tell(title, detail string) {
	t.log.Error(title, "detail", detail)
	line, err := json.Marshal(struct {
		Hostname string    `json:"hostname"`
		Output   string    `json:"output"`
		Priority string    `json:"priority"`
		Rule     string    `json:"rule"`
		Source   string    `json:"source"`
		Time     time.Time `json:"time"`
	}{t.node, detail, "Error", "stoop: " + title, "stoop", time.Now().UTC()})
	if err != nil {
		return
	}
	a, err := alert.Parse(line)
	if err != nil {
		return
	}
	t.intake.Put([]broker.Arrival{{Alert: a, Received: time.Now(), Origin: broker.OriginStoop}})
}
