package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/e2e/figures"
	"stoop/e2e/harness"
	"stoop/e2e/program"
	"stoop/node"
	"stoop/node/nodetest"
)

const (
	containers = 200 // that run beside the suspect
	// settle is how long a new suspect is left alone: its last processes are
	// still becoming what they are.
	settle = 5 * time.Millisecond
)

const nodeRules = `
mode: enforce
rules:
  - {name: freeze, match: {rule: Bench freeze}, actions: [freeze-container]}
  - {name: cut, match: {rule: Bench cut}, actions: [cut-network]}
  - {name: kill, match: {rule: Bench kill}, actions: [kill-process]}
  - {name: kill-all, match: {rule: Bench kill all}, actions: [kill-container]}
`

// crowd is a node full of containers, with a stoop on it.
type crowd struct {
	*bench
	life  *os.File
	stoop *program.Stoop
	local *node.Node
	sent  int // alerts
}

// node is alert → frozen, cut, killed, without any cluster.
func (b *bench) node() {
	if os.Geteuid() != 0 {
		b.note("The section node was left out: it needs root, for the cgroups, namespaces and processes that it makes.")
		return
	}
	// In a run of its own, so that its containers are gone when it is over.
	err := harness.Outside(b.Context(), os.Stderr, func(t harness.T) {
		whole := b.T
		b.T = t
		defer func() { b.T = whole }()
		b.contain()
	})
	if err != nil {
		b.Fatalf("%v", err)
	}
}

func (b *bench) contain() {
	c := &crowd{bench: b, local: node.New(node.Config{})}
	life, hold, err := os.Pipe()
	if err != nil {
		b.Fatalf("%v", err)
	}
	c.life = life
	b.Cleanup(func() { life.Close(); hold.Close() })
	for range containers {
		contain(b, c.life, nil)
	}
	began := time.Now()
	c.stoop = program.Start(b, program.Options{Bin: b.bin, Node: "bench", Mode: "enforce", Rules: nodeRules, Config: program.NoLimits})

	n := max(b.samples(300), 30)
	stoop, bare := c.freeze(n)
	c.figure("every process of the container frozen", "freeze-container", "the freezer's file written by a bare program", stoop, bare)
	stoop, bare = c.kill(n)
	c.figure("the suspect's process dead, and the 9 that it started", "kill-process", "pidfd_send_signal to each", stoop, bare)
	stoop, bare = c.killAll(n)
	c.figure("every process of the container dead", "kill-container", "the cgroup's files and signals by a bare program", stoop, bare)
	stoop, bare = c.cut(n)
	c.figure("the container's network silent", "cut-network", "the same call of package node by a bare program", stoop, bare)
	c.note("Frozen, killed, cut: beside the suspect, %d containers with %d processes are on the machine (cgroup %s), and each suspect is a container of its own with %d; the cuts before it still stand.",
		containers, containers*processes, version(), processes)
	c.account(began, n)
	c.stoop.Stop()
}

func (c *crowd) figure(what, responder, how string, stoop, bare []time.Duration) {
	p50, p99, most := figures.Quantile(stoop, .5), figures.Quantile(stoop, .99), figures.Quantile(stoop, 1)
	bare50, bare99, bareMost := figures.Quantile(bare, .5), figures.Quantile(bare, .99), figures.Quantile(bare, 1)
	c.add(row{
		what:  fmt.Sprintf("alert written to the FIFO → %s (`%s`), p50 (%d each)", what, responder, len(stoop)),
		stoop: figures.MS(p50), bare: figures.MS(bare50) + " (" + how + ")",
		ratio: fmt.Sprintf("%s, %s", more(p50-bare50), over(float64(p50), float64(bare50))),
		aim:   "at most 3 ms", held: p50 <= 3*time.Millisecond,
	})
	c.add(row{
		what:  "the same, p99, and the slowest",
		stoop: figures.MS(p99) + ", " + figures.MS(most), bare: figures.MS(bare99) + ", " + figures.MS(bareMost),
		ratio: fmt.Sprintf("%s, %s", more(p99-bare99), over(float64(p99), float64(bare99))),
		aim:   "p99 at most 10 ms", held: p99 <= 10*time.Millisecond,
	})
}

// account says where the time went, by stoop's own account, and makes sure that
// each step was done.
func (c *crowd) account(since time.Time, n int) {
	type times struct{ stored, matched, requested, done []time.Duration }
	by := map[string]*times{}
	var undone []broker.Outcome
	for _, o := range c.stoop.History() {
		if o.Time.Before(since) || !program.Final(o.Status) {
			continue
		}
		if o.Status != broker.Done {
			undone = append(undone, o)
			continue
		}
		t := by[o.Responder]
		if t == nil {
			t = &times{}
			by[o.Responder] = t
		}
		t.stored, t.matched = append(t.stored, micros(o.Took.Stored)), append(t.matched, micros(o.Took.Matched))
		t.requested, t.done = append(t.requested, micros(o.Took.Requested)), append(t.done, micros(o.Took.Done))
	}
	if len(undone) > 0 {
		c.Fatalf("%d steps were not done:%s", len(undone), program.Show(undone[:min(len(undone), 5)]))
	}
	for _, responder := range []string{"freeze-container", "kill-process", "kill-container", "cut-network"} {
		t := by[responder]
		if t == nil || len(t.done) != n {
			c.Fatalf("stoop history does not tell of %d times %s", n, responder)
		}
		both := func(d []time.Duration) string {
			return figures.MS(figures.Quantile(d, .5)) + " and " + figures.MS(figures.Quantile(d, .99))
		}
		c.note("`%s` by stoop's own account, from the alert's arrival, p50 and p99: stored after %s, matched after %s, asked of the kernel after %s, done, found out and noted after %s.",
			responder, both(t.stored), both(t.matched), both(t.requested), both(t.done))
	}
}

// apart runs do with a [harness.T] of its own: what it makes is gone afterwards.
func (c *crowd) apart(do func(t harness.T)) {
	if err := harness.Outside(c.Context(), os.Stderr, do); err != nil {
		c.Fatalf("%v", err)
	}
	if err := c.Context().Err(); err != nil {
		c.Fatalf("interrupted: %v", err)
	}
}

func (c *crowd) suspect(t harness.T, network *nodetest.Network) *container {
	s := contain(t, c.life, network)
	time.Sleep(settle)
	return s
}

// took does the act and returns how long it took from before it until the
// observer saw its effect.
func (c *crowd) took(t harness.T, watch <-chan seen, act func() error) time.Duration {
	began := time.Now()
	if err := act(); err != nil {
		t.Fatalf("%v", err)
	}
	saw := <-watch
	if saw.err != nil {
		t.Fatalf("%v:%s", saw.err, program.Show(c.stoop.History()))
	}
	return saw.at.Sub(began)
}

// byAlert is took by an alert about the suspect, which is made beforehand. It
// returns when stoop has written down what it did.
func (c *crowd) byAlert(t harness.T, s *container, rule string, watch <-chan seen) time.Duration {
	line := s.alert(t, rule)
	c.sent++
	took := c.took(t, watch, func() error { return c.stoop.TryWrite(line) })
	harness.Eventually(t, soon, time.Millisecond, func() (bool, string) {
		return c.stoop.Metric("stoop_outcomes_total") >= float64(c.sent), "the step's outcome"
	})
	return took
}

func (c *crowd) freeze(n int) (stoop, bare []time.Duration) {
	for range n {
		c.apart(func(t harness.T) {
			s := c.suspect(t, nil)
			bare = append(bare, c.took(t, s.watchFrozen(), func() error { return s.ask(true) }))
			if err := s.ask(false); err != nil {
				t.Fatalf("%v", err)
			}
			time.Sleep(settle)
			stoop = append(stoop, c.byAlert(t, s, "Bench freeze", s.watchFrozen()))
		})
	}
	return stoop, bare
}

func (c *crowd) kill(n int) (stoop, bare []time.Duration) {
	for range n {
		c.apart(func(t harness.T) {
			s := c.suspect(t, nil)
			pids := nodetest.Pids(s.dir)
			bare = append(bare, c.took(t, watchDead(pids), func() error { return end(pids) }))
		})
		c.apart(func(t harness.T) {
			s := c.suspect(t, nil)
			stoop = append(stoop, c.byAlert(t, s, "Bench kill", watchDead(nodetest.Pids(s.dir))))
		})
	}
	return stoop, bare
}

// end kills processes one by one.
func end(pids []int) error {
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			_ = unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

func (c *crowd) killAll(n int) (stoop, bare []time.Duration) {
	for range n {
		c.apart(func(t harness.T) {
			s := c.suspect(t, nil)
			bare = append(bare, c.took(t, watchDead(nodetest.Pids(s.dir)), s.kill))
		})
		c.apart(func(t harness.T) {
			s := c.suspect(t, nil)
			stoop = append(stoop, c.byAlert(t, s, "Bench kill all", watchDead(nodetest.Pids(s.dir))))
		})
	}
	return stoop, bare
}

// kill ends all that runs in the container, which can't fork meanwhile.
func (s *container) kill() error {
	if !v1() {
		return s.write("cgroup.kill", "1")
	}
	if err := s.ask(true); err != nil {
		return err
	}
	if err := end(nodetest.Pids(s.dir)); err != nil {
		return err
	}
	return s.ask(false)
}

// cut gives each suspect a network of its own. All are made beforehand: a node
// has as many, and the kernel takes its time to take them away.
func (c *crowd) cut(n int) (stoop, bare []time.Duration) {
	c.apart(func(t harness.T) {
		t.Cleanup(func() {
			// The links are gone by now: what is left of their cuts may go.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), soon)
			defer cancel()
			if err := c.local.Sweep(ctx); err != nil {
				c.Logf("remove what is left of the cuts: %v", err)
			}
		})
		networks, talks := make([]*nodetest.Network, n), make([]*talk, n)
		for i := range n {
			networks[i] = nodetest.Netns(asTest{t: t})
			talks[i] = newTalk(t, networks[i], nodetest.Veth(asTest{t: t}, networks[i], "eth0"))
		}
		for i := range n {
			c.apart(func(t harness.T) {
				s := c.suspect(t, networks[i])
				of, err := c.local.Container(t.Context(), s.id, 0)
				if err != nil {
					t.Fatalf("%v", err)
				}
				var cut *node.Cut
				bare = append(bare, c.took(t, talks[i].watchSilent(), func() (err error) {
					cut, err = c.local.Cut(t.Context(), of, fmt.Sprintf("bench%d.%d", os.Getpid(), i), nil, nil)
					return err
				}))
				if _, err := c.local.Uncut(t.Context(), cut); err != nil {
					t.Fatalf("%v", err)
				}
				stoop = append(stoop, c.byAlert(t, s, "Bench cut", talks[i].watchSilent()))
			})
		}
	})
	return stoop, bare
}
