package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/failpoint"
	"stoop/pipe"
	"stoop/responders"
	"stoop/router"
	"stoop/rules"
)

// engine is the part of a running stoop that stands on a store: router and
// host. When the disk is full it is stopped and started again on memory, and
// back on the disk when there is space, while the sources go on.
type engine struct {
	cfg     broker.Config
	router  *router.Router
	host    responders.Config // but for the broker
	local   *broker.Local
	health  *health // of the whole, for who asks
	store   *storeSwitch
	log     *slog.Logger
	current atomic.Pointer[generation]
	ready   chan struct{} // closed when the first generation runs
	once    sync.Once
}

// generation is an engine's time on one store.
type generation struct {
	broker *broker.Broker
	host   *responders.Host
}

// storeSwitch is the pipe's store: the broker that there is now.
type storeSwitch struct {
	mu      sync.Mutex
	broker  *broker.Broker
	changed chan struct{} // closed, and made anew, when broker changes
	storing sync.WaitGroup
	leave   context.CancelCauseFunc // ends what is being stored
	stay    context.Context
}

func newStoreSwitch() *storeSwitch { return &storeSwitch{changed: make(chan struct{})} }

// errSwitched is why a store that is being left takes no more.
var errSwitched = errors.New("this store is being left")

// use has b take what comes from now on; nil: nobody. Then what the one before was
// being handed is stored in it when use returns, or refused, and nothing comes after
// that: all that it has to hand on can be read from it.
func (s *storeSwitch) use(b *broker.Broker) {
	s.mu.Lock()
	s.broker = b
	if s.leave != nil {
		s.leave(errSwitched)
	}
	s.stay, s.leave = context.WithCancelCause(context.Background())
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	if b == nil {
		s.storing.Wait()
	}
}

// storeIn stores in b, until it is being left.
func (s *storeSwitch) storeIn(ctx context.Context, b *broker.Broker, stay context.Context, batch []pipe.Arrival) (int, error) {
	defer s.storing.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(stay, func() { cancel(errSwitched) })()
	return b.Store(ctx, batch)
}

// Store implements [pipe.Store]. While there is no broker it waits.
func (s *storeSwitch) Store(ctx context.Context, batch []pipe.Arrival) (int, error) {
	for {
		s.mu.Lock()
		b, changed, stay := s.broker, s.changed, s.stay
		if b != nil {
			s.storing.Add(1)
		}
		s.mu.Unlock()
		if b != nil {
			n, err := s.storeIn(ctx, b, stay, batch)
			failpoint.Hit("pipe.after-store")
			return n, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// snapshot is what is carried from one store to the next.
type snapshot struct {
	state    map[string][]byte
	alerts   []broker.Arrival
	steps    []*broker.Step
	outcomes []broker.Record
}

const (
	// spaceEvery is how often a full disk is looked at.
	spaceEvery = 2 * time.Second
	// carryTimeout bounds taking things from one store to another.
	carryTimeout = 10 * time.Second
	// spaceWanted is how much of the disk has to be free again, or a tenth of
	// a small one.
	spaceWanted = 64 << 20
)

// run works until ctx is done, on the disk where it can and in memory where it
// must.
func (e *engine) run(ctx context.Context) error {
	var carried snapshot
	memory := false
	var journal broker.Head
	for {
		cfg := e.cfg
		cfg.Memory, cfg.Journal = memory && cfg.Dir != "", journal
		b, err := broker.Open(ctx, cfg)
		if err != nil {
			if isDiskFault(err) && !memory {
				e.log.Error("the store can't be opened: going on in memory", "data", cfg.Dir, "error", err)
				memory = true
				continue
			}
			return err
		}
		next, err := e.runOn(ctx, b, &carried)
		b.Close()
		if err != nil || ctx.Err() != nil {
			return err
		}
		memory, journal = next, b.Journal()
	}
}

// isDiskFault reports whether the data folder is there and ours, but can't be
// written now.
func isDiskFault(err error) bool {
	if errors.Is(err, broker.ErrLocked) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOTDIR) {
		return false
	}
	var errno syscall.Errno
	return errors.As(err, &errno) && (errno == unix.ENOSPC || errno == unix.EDQUOT || errno == unix.EIO) || broker.IsStoreFault(err)
}

// runOn works on one store. It returns whether the next one is to be in
// memory.
func (e *engine) runOn(ctx context.Context, b *broker.Broker, carried *snapshot) (memory bool, err error) {
	// A disk that fills again at once sends everything back into memory.
	onDisk := !b.InMemory()
	if err := carried.restore(ctx, b); err != nil {
		if onDisk {
			e.log.Error("the store can't take what was under way: staying in memory", "error", err)
			return true, nil
		}
		e.log.Error("what was under way could not be taken along", "error", err)
	}
	hc := e.host
	hc.Broker = b
	host, err := responders.NewHost(ctx, hc)
	if err != nil {
		if onDisk && b.Err() != nil {
			return true, nil
		}
		return false, err
	}
	b.Expect(e.named(e.router.Rules())...)
	e.tellRules(ctx, host, e.router.Rules())

	runCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	run := func(f func(context.Context) error) {
		parts.Go(func() {
			if err := f(runCtx); err != nil && runCtx.Err() == nil {
				cancel(err)
			}
		})
	}
	api, err := serveAPI(runCtx, e, b, host)
	if err != nil {
		return false, err
	}
	run(host.Run)
	run(func(ctx context.Context) error { return e.router.Run(ctx, b) })
	// What this store did not take goes on to the next one.
	rest := *carried
	*carried = snapshot{}
	parts.Go(func() { rest.publish(runCtx, b, e.log) })
	e.current.Store(&generation{b, host})
	e.store.use(b)
	e.local.Use(b)
	e.once.Do(func() { close(e.ready) })

	back := make(<-chan time.Time)
	if b.InMemory() && e.cfg.Dir != "" {
		t := time.NewTicker(spaceEvery)
		defer t.Stop()
		back = t.C
	}
	stop := func() {
		e.store.use(nil)
		cancel(nil)
		parts.Wait()
		api()
		e.local.Use(nil)
	}
	for {
		select {
		case <-ctx.Done():
			stop()
			if b.InMemory() && e.cfg.Dir != "" {
				e.leave(e.take(b, host, &rest))
			}
			return false, nil
		case <-b.Failed():
			e.log.Error("the store refuses to write: going on in memory; free some space on its disk", "data", e.cfg.Dir, "error", b.Err())
			stop()
			*carried = e.take(b, host, &rest)
			return true, nil
		case <-runCtx.Done():
			select {
			case <-b.Failed():
				continue
			case <-time.After(100 * time.Millisecond): // the fault may be on its way
			}
			err := context.Cause(runCtx)
			stop()
			if b.Err() != nil {
				*carried = e.take(b, host, &rest)
				return true, nil
			}
			return false, err
		case <-back:
			if !hasSpace(e.cfg.Dir) {
				continue
			}
			e.log.Info("there is space on the disk again: going back to it", "data", e.cfg.Dir)
			stop()
			*carried = e.take(b, host, &rest)
			return false, nil
		}
	}
}

func hasSpace(dir string) bool {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return false
	}
	free, size := int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
	return free >= min(spaceWanted, size/10) && probeWrite(dir) == nil
}

// probeWrite writes a file and takes it away again.
func probeWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(make([]byte, 64<<10))
	return errors.Join(err, f.Sync(), f.Close())
}

// leave is the end of a stoop whose disk is full: what it has in memory goes with
// it, unless the disk takes it after all.
func (e *engine) leave(s snapshot) {
	ctx, cancel := context.WithTimeout(context.Background(), carryTimeout)
	defer cancel()
	lost := []any{"alerts", len(s.alerts), "steps", len(s.steps), "outcomes", len(s.outcomes)}
	cfg := e.cfg
	b, err := broker.Open(ctx, cfg)
	if err == nil {
		defer b.Close()
		if err = s.restore(ctx, b); err == nil {
			s.publish(ctx, b, e.log)
			err = b.Err()
		}
	}
	if err != nil {
		e.log.Error("the disk refuses still: what was in memory is lost", append(lost, "error", err)...)
	}
}

// take reads what a store that is being left still has to do: by what it holds,
// by what the host knows and could not store, and by what did not come this far.
func (e *engine) take(b *broker.Broker, h *responders.Host, rest *snapshot) snapshot {
	ctx, cancel := context.WithTimeout(context.Background(), carryTimeout)
	defer cancel()
	var s snapshot
	var errs [4]error
	s.state, errs[0] = b.State().Dump(ctx)
	s.alerts, errs[1] = b.UnroutedAlerts(ctx)
	s.steps, errs[2] = b.UnfinishedSteps(ctx)
	if b.InMemory() {
		s.outcomes, errs[3] = b.Records(ctx)
	}
	if s.state == nil {
		s.state = map[string][]byte{}
	}
	maps.Copy(s.state, h.Dump())
	for _, o := range h.Lost() {
		s.outcomes = append(s.outcomes, broker.Record{Outcome: o})
	}
	s.outcomes = append(s.outcomes, rest.outcomes...)
	s.alerts = append(s.alerts, rest.alerts...)
	s.steps = append(s.steps, rest.steps...)
	if err := errors.Join(errs[:]...); err != nil {
		e.log.Error("reading what the store left to be done", "error", err)
	}
	return s
}

// restore writes what must be there before a host reads it.
func (s *snapshot) restore(ctx context.Context, b *broker.Broker) error {
	ctx, cancel := context.WithTimeout(ctx, carryTimeout)
	defer cancel()
	if err := b.State().Restore(ctx, s.state); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// publish hands the rest over, while the router and the host are at work, and
// keeps what the store did not take. What comes twice by this is recognised:
// alerts by their id, steps by theirs.
func (s *snapshot) publish(ctx context.Context, b *broker.Broker, log *slog.Logger) {
	for len(s.steps) > 0 {
		_, err := b.PublishStep(ctx, s.steps[0])
		if err != nil && (ctx.Err() != nil || b.Err() != nil) {
			return
		}
		if err != nil {
			log.Error("a step could not be taken to the next store", "step", s.steps[0].ID, "rule", s.steps[0].Rule, "error", err)
		}
		s.steps = s.steps[1:]
	}
	for len(s.alerts) > 0 {
		n, err := b.Store(ctx, s.alerts[:min(len(s.alerts), carryChunk)])
		s.alerts = s.alerts[n:]
		if err != nil && (ctx.Err() != nil || b.Err() != nil) {
			return
		}
		if err != nil {
			log.Error("an alert could not be taken to the next store", "error", err)
			s.alerts = s.alerts[1:]
		}
	}
	for len(s.outcomes) > 0 {
		if err := b.Carry(s.outcomes[0]); err != nil {
			return
		}
		s.outcomes = s.outcomes[1:]
	}
}

// carryChunk is how many alerts are handed over at a time.
const carryChunk = 512

// tellRules says to a host which rules are in force.
func (e *engine) tellRules(ctx context.Context, h *responders.Host, s *rules.Set) {
	modes, hashes := map[string]broker.Mode{}, map[string]string{}
	for _, r := range s.Rules {
		modes[r.Name], hashes[r.Name] = r.Mode, r.Hash
	}
	if err := errors.Join(h.SettleRules(ctx, hashes), h.SetRules(ctx, modes)); err != nil {
		e.log.Error("since when rules enforce could not be stored", "error", err)
	}
}

// named are the responders that rules may need: those that they name, and those that
// take their place.
func (e *engine) named(s *rules.Set) []string {
	var names []string
	for _, r := range s.Rules {
		for _, a := range r.Actions {
			names = append(names, a.Responder)
		}
	}
	for _, entry := range e.host.Entries {
		if entry.Instead != "" && slices.Contains(names, entry.Name) {
			names = append(names, entry.Instead)
		}
	}
	return names
}

// setRules puts rules in force.
func (e *engine) setRules(ctx context.Context, s *rules.Set) {
	// First since when they enforce, then the rules: an alert that the new
	// rules match came after that.
	if g := e.current.Load(); g != nil {
		g.broker.Expect(e.named(s)...)
		e.tellRules(ctx, g.host, s)
	}
	e.router.SetRules(s)
}

// undoable reports whether a step could be taken back, or whether nobody knows just
// now.
func (e *engine) undoable(step string) bool {
	g := e.current.Load()
	return g == nil || g.host.Undoable(step)
}

// idle reports whether nothing is left to be done, and how many steps wait.
func (e *engine) idle() (bool, int64) {
	g := e.current.Load()
	if g == nil {
		return false, 0
	}
	if g.broker.Unrouted() > 0 {
		return false, 0
	}
	var waiting int64
	for _, entry := range e.host.Entries {
		waiting += max(0, g.broker.Waiting(entry.Name))
	}
	return waiting == 0, waiting
}
