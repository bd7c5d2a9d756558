// Package broker is the embedded NATS server and its streams: where an alert
// waits, safely on disk, between the pipe that read it and the responders that
// answer it.
//
// ALERTS and ALERTS_URGENT hold what Falco wrote, ACTIONS one message for each
// step that is to be done, OUTCOMES what became of it, and the bucket STATE
// what must outlive a restart. The package knows what the messages look like
// and how they are kept; what they mean is the business of its callers.
package broker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
)

// Config is how the broker is opened. The zero value of a limit is its default.
type Config struct {
	Dir        string        // the data folder; "" keeps everything in memory
	Memory     bool          // keep the streams in memory although there is a Dir (its disk is full)
	Journal    Head          // with Memory: where the journal on the disk ended
	ReadOnly   bool          // for reading a copy of a store: its limits stay as they are, and nothing may be stored
	Sync       time.Duration // how often the files are synced to disk; default 1 s
	SyncAlways bool          // after every message instead

	AlertsAge    time.Duration // default 24 h
	AlertsSize   int64         // bytes; default 256 MiB, a quarter of it for the urgent ones
	OutcomesAge  time.Duration // default 720 h
	OutcomesSize int64         // bytes; default 128 MiB
	MatchedAge   time.Duration // of the alerts that matched a rule; default 720 h
	MatchedSize  int64         // bytes; default 256 MiB, a quarter of it for the urgent ones. In memory none are kept

	// Unkept is called for each alert that matched a rule and could not be kept; nil:
	// nobody is told.
	Unkept func()

	Mirror []string // further subjects that every alert is published on
	Listen *Listen  // for NATS clients over the network; nil: nothing listens

	Log *slog.Logger
}

func (c *Config) setDefaults() {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set((*int64)(&c.Sync), int64(time.Second))
	set((*int64)(&c.AlertsAge), int64(24*time.Hour))
	set((*int64)(&c.OutcomesAge), int64(720*time.Hour))
	set(&c.AlertsSize, 256<<20)
	set(&c.OutcomesSize, 128<<20)
	set((*int64)(&c.MatchedAge), int64(720*time.Hour))
	set(&c.MatchedSize, 256<<20)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.memory() {
		// Memory is dearer than disk: what is kept there is the latest only.
		c.AlertsSize = min(c.AlertsSize, 32<<20)
		c.OutcomesSize = min(c.OutcomesSize, 16<<20)
	}
}

func (c *Config) memory() bool { return c.Dir == "" || c.Memory }

// Broker is a running embedded server.
type Broker struct {
	cfg    Config
	log    *slog.Logger
	srv    *server.Server
	lock   *os.File
	tmp    string // the server's scratch folder, when there is no data folder
	secret string // the password of the process's own connections
	guest  string // the password of clients on the local socket

	conn *nats.Conn // publishing
	js   jetstream.JetStream

	calls struct {
		mu    sync.Mutex
		conn  *nats.Conn // nil until it is needed
		inbox string
	}

	lanes   [2]*lane // urgent, other
	seen    map[string]struct{}
	queues  queues
	sound   context.Context // ends when the store has failed, its cause says why
	fail    context.CancelCauseFunc
	state   *State
	journal journal
	matched matched
	closed  sync.Once

	keeping     sync.WaitGroup
	stopKeeping context.CancelFunc
}

// Lock takes the data folder for this process, for as long as it lives, and
// makes it if it is missing. The broker's own lock is another: it goes with each
// broker. A folder that a newer stoop has written it leaves alone: [ErrNewer].
func Lock(dir string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder (set data, or --data): %w", err)
	}
	if err := checkFormat(dir); err != nil {
		return nil, err
	}
	f, err := flock(filepath.Join(dir, "run.lock"))
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// flock locks a file that it makes if it is missing.
func flock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", filepath.Dir(path), ErrLocked)
		}
		return nil, fmt.Errorf("lock the data folder %s: %w", filepath.Dir(path), err)
	}
	return f, nil
}

// ErrLocked says that another process works on the data folder.
var ErrLocked = errors.New("another stoop is running on this data folder")

// startTimeout bounds how long opening may take; reading a large store back
// from a slow disk is the long part.
const startTimeout = time.Minute

// Open starts the server, its streams and this process's connections to it.
func Open(ctx context.Context, cfg Config) (_ *Broker, err error) {
	cfg.setDefaults()
	b := &Broker{cfg: cfg, log: cfg.Log, secret: rand.Text(), guest: rand.Text()}
	b.sound, b.fail = context.WithCancelCause(context.Background())
	b.calls.inbox = newCallInbox()
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	if err := checkMirror(cfg.Mirror); err != nil {
		return nil, err
	}
	store, err := b.prepareDir()
	if err != nil {
		return nil, err
	}
	if err := b.startServer(store); err != nil {
		return nil, err
	}
	if b.conn, err = b.Connect("broker"); err != nil {
		return nil, err
	}
	if b.js, err = jetstream.New(b.conn, jetstream.WithPublishAsyncMaxPending(4096)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := b.createStreams(ctx); err != nil {
		return nil, err
	}
	if cfg.ReadOnly {
		return b, nil
	}
	if b.seen, err = b.lastStored(ctx); err != nil {
		return nil, err
	}
	if err := b.openJournal(ctx); err != nil {
		return nil, err
	}
	keeping, stop := context.WithCancel(context.Background())
	b.stopKeeping = stop
	b.keeping.Go(func() { b.journalLoop(keeping) })
	if !cfg.memory() {
		b.matched.ch = make(chan *nats.Msg, matchedWaiting)
		b.keeping.Go(func() { b.matchedLoop(keeping) })
	}
	if !cfg.memory() && !cfg.SyncAlways {
		b.keeping.Go(func() { b.syncLoop(keeping, store, cfg.Sync) })
	}
	return b, nil
}

// prepareDir makes and locks the data folder and returns the folder for the
// server's files.
func (b *Broker) prepareDir() (string, error) {
	if b.cfg.Dir == "" {
		tmp, err := os.MkdirTemp("", "stoop-")
		b.tmp = tmp
		return tmp, err
	}
	if err := os.MkdirAll(b.cfg.Dir, 0o700); err != nil {
		return "", fmt.Errorf("data folder: %w", err)
	}
	err := checkFormat(b.cfg.Dir)
	if err != nil {
		return "", err
	}
	if b.lock, err = flock(filepath.Join(b.cfg.Dir, "lock")); err != nil {
		return "", err
	}
	if !b.cfg.Memory { // the disk may refuse that too
		if err := markFormat(b.cfg.Dir); err != nil {
			return "", err
		}
	}
	// Both folders are made while there is room: the one for memory is needed
	// when there is none.
	for _, d := range []string{"store", "memory"} {
		if err := os.MkdirAll(filepath.Join(b.cfg.Dir, d), 0o700); err != nil {
			return "", fmt.Errorf("data folder: %w", err)
		}
	}
	if b.cfg.Memory {
		return filepath.Join(b.cfg.Dir, "memory"), nil
	}
	return filepath.Join(b.cfg.Dir, "store"), nil
}

// maxPayload is the largest message. An alert is at most 1 MiB; a step carries
// it and what the steps before found.
const maxPayload = 4 << 20

func (b *Broker) startServer(store string) error {
	opts := &server.Options{
		ServerName:      "stoop",
		DontListen:      true,
		NoSigs:          true,
		NoSystemAccount: true,
		JetStream:       true,
		StoreDir:        store,
		// Each stream has a bound of its own. One over all would keep the server
		// from opening what was stored with larger bounds, or by a stoop that has
		// more streams.
		JetStreamMaxStore:  math.MaxInt64,
		JetStreamMaxMemory: b.cfg.AlertsSize + b.cfg.OutcomesSize + actionsSize + stateSize,
		SyncInterval:       serverSync,
		SyncAlways:         b.cfg.SyncAlways,
		MaxPayload:         maxPayload,
		MaxPending:         64 << 20,
		Users: []*server.User{
			{Username: userStoop, Password: b.secret},
			{Username: userAPI, Password: b.secret, Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: []string{"_INBOX.>"}},
				Subscribe: &server.SubjectPermission{Allow: []string{"stoop.api.>"}},
			}},
			{Username: userCall, Password: b.secret, Permissions: callPermissions(b.calls.inbox, b.cfg.Mirror)},
			{Username: userLocal, Password: b.guest, Permissions: clientPermissions(b.cfg.Mirror)},
		},
	}
	if err := b.cfg.Listen.apply(opts, b.cfg.Mirror); err != nil {
		return err
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("start the embedded NATS server: %w", err)
	}
	b.srv = srv
	l := &serverLog{log: b.log.With("component", "nats"), full: b.fail}
	srv.SetLoggerV2(l, false, false, false)
	srv.Start()
	if !srv.ReadyForConnections(startTimeout) || l.fatal() != nil || !srv.JetStreamEnabled() {
		if err := l.fatal(); err != nil {
			return fmt.Errorf("start the embedded NATS server in %s: %w", store, err)
		}
		return fmt.Errorf("start the embedded NATS server in %s: not ready after %s", store, startTimeout)
	}
	return nil
}

// The names that connections go by.
const (
	userStoop = "stoop" // this process: may do everything
	userLocal = "local" // a client on the local socket
	userCall  = "call"  // what asks programs of the user's: it may say nothing to stoop
	userAPI   = "api"   // what answers clients: it may say nothing but to them
)

// Connect opens a connection of this process's own to the server. Consumers
// each have one, so that none waits behind another's messages.
func (b *Broker) Connect(name string) (*nats.Conn, error) { return b.connect(name, userStoop) }

// ConnectAPI opens the connection that requests are answered on. Where an answer
// goes is the asker's to say, so this connection reaches no subject of stoop's.
func (b *Broker) ConnectAPI() (*nats.Conn, error) { return b.connect("api", userAPI) }

func (b *Broker) connect(name, user string) (*nats.Conn, error) {
	// Clients may read _INBOX.>; what the process asks itself is not theirs.
	return b.connectAs(name, user, "_STOOP."+rand.Text())
}

func (b *Broker) connectAs(name, user, inbox string) (*nats.Conn, error) {
	nc, err := nats.Connect("", nats.InProcessServer(b.srv), nats.Name(name),
		nats.UserInfo(user, b.secret), nats.CustomInboxPrefix(inbox),
		nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			b.log.Warn("connection to the embedded NATS server", "connection", name, "error", err)
		}))
	if err != nil {
		return nil, fmt.Errorf("connect to the embedded NATS server: %w", err)
	}
	return nc, nil
}

// InMemory reports whether the streams are lost with the process.
func (b *Broker) InMemory() bool { return b.cfg.memory() }

// State is the bucket STATE.
func (b *Broker) State() *State { return b.state }

// Conn is the connection that the broker publishes on; subscribe and answer
// requests on it, but nothing that blocks.
func (b *Broker) Conn() *nats.Conn { return b.conn }

// Close shuts the server down and gives the data folder back. Consumers must
// have returned before; what was stored stays stored.
func (b *Broker) Close() {
	b.closed.Do(func() {
		if b.stopKeeping != nil {
			b.stopKeeping()
			b.keeping.Wait()
		}
		b.calls.mu.Lock()
		if b.calls.conn != nil {
			b.calls.conn.Close()
		}
		b.calls.mu.Unlock()
		if b.conn != nil {
			b.conn.Close()
		}
		if b.srv != nil {
			b.srv.Shutdown()
			b.srv.WaitForShutdown()
		}
		if b.lock != nil {
			b.lock.Close()
		}
		if b.tmp != "" {
			os.RemoveAll(b.tmp)
		}
	})
}

// Failed is closed when the store has refused a write for a fault of its own (a
// full disk, an input or output error). It then refuses for good until it is
// opened again. [Broker.Err] says why.
func (b *Broker) Failed() <-chan struct{} { return b.sound.Done() }

// Err is why the store failed, or nil.
func (b *Broker) Err() error {
	if b.sound.Err() == nil {
		return nil
	}
	return context.Cause(b.sound)
}

// bound bounds a write: by its time, and by the store's health.
func (b *Broker) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout, errNoAnswer)
	stop := context.AfterFunc(b.sound, cancel)
	return ctx, func() { stop(); cancel() }
}

// errNoAnswer is why a write that bound has ended was not acknowledged: a store
// that takes so long is out of order.
var errNoAnswer = fmt.Errorf("the store did not answer within %s", publishTimeout)

// judge makes the store count as failed if the error of a write shows it to be.
// ctx is what bound returned.
func (b *Broker) judge(ctx context.Context, err error) {
	if IsStoreFault(err) || errors.Is(context.Cause(ctx), errNoAnswer) {
		b.fail(err)
	}
}

// publishAsync publishes without waiting for the acknowledgement. When too many
// are under way it waits for its turn, as long as the store is sound.
func (b *Broker) publishAsync(ctx context.Context, js jetstream.JetStream, m *nats.Msg) (jetstream.PubAckFuture, error) {
	for {
		ack, err := js.PublishMsgAsync(m)
		if !errors.Is(err, jetstream.ErrTooManyStalledMsgs) {
			return ack, err
		}
		if err := b.Err(); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// serverLog writes the server's log lines into slog, and keeps what the server
// thinks fatal: it would exit the process for it, and tells nobody else.
type serverLog struct {
	log  *slog.Logger
	full func(error) // called when the disk is full
	mu   sync.Mutex
	err  error
}

func (l *serverLog) fatal() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *serverLog) Fatalf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = fmt.Errorf(format, v...)
}
func (l *serverLog) Noticef(f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...)) }

// plaintext is what the server warns of for any password that is not hashed.
// Those of stoop's own connections are random and never leave the process, and
// hashing them would slow down each connection.
const plaintext = "Plaintext passwords detected"

func (l *serverLog) Warnf(f string, v ...any) {
	if !strings.HasPrefix(f, plaintext) {
		l.log.Warn(fmt.Sprintf(f, v...))
	}
}

// Errorf also hears of a full disk: the server answers no publish any more then,
// and to wait for that would cost seconds.
func (l *serverLog) Errorf(f string, v ...any) {
	line := fmt.Sprintf(f, v...)
	for _, fault := range []error{unix.ENOSPC, unix.EDQUOT, unix.EIO} {
		if strings.Contains(line, fault.Error()) {
			l.full(errors.New(line))
		}
	}
	l.log.Error(line)
}

func (l *serverLog) Debugf(f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...)) }
func (l *serverLog) Tracef(f string, v ...any) {}
