package broker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
)

func arrival(t testing.TB, n int, priority string) broker.Arrival {
	t.Helper()
	a, err := alert.Parse(fmt.Appendf(nil, `{"priority":%q,"rule":"Shell in a pod","n":%d,"time":"2026-01-02T03:04:05Z"}`, priority, n))
	if err != nil {
		t.Fatal(err)
	}
	return broker.Arrival{Alert: a, Received: time.Now(), Origin: broker.OriginFIFO}
}

func store(t testing.TB, b *broker.Broker, batch ...broker.Arrival) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if n, err := b.Store(ctx, batch); n != len(batch) || err != nil {
		t.Fatalf("stored %d of %d: %v", n, len(batch), err)
	}
}

// eventually waits for a condition; it is the test's only way to wait.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 20 s: %s", what)
}

// ids collects what the router is handed.
type ids struct {
	mu  sync.Mutex
	got []string
}

func (c *ids) add(s *broker.Stored) []*broker.Step {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got = append(c.got, s.ID)
	return nil
}

func (c *ids) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.got)
}

// start runs f until the test ends.
func start(t testing.TB, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("stopped with: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Error("does not stop within 10 s")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func TestAlertsAreRoutedInOrderAndLanesApart(t *testing.T) {
	b := brokertest.New(t)
	var urgent, other ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, true, urgent.add, nil) })
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	var want []string
	for i := range 500 {
		a := arrival(t, i, "Warning")
		want = append(want, a.Alert.ID)
		store(t, b, a)
	}
	store(t, b, arrival(t, 1, "Critical"), broker.Arrival{Unparsed: []byte("garbage"), Received: time.Now()})
	eventually(t, "all routed", func() bool { return other.len() == 500 && urgent.len() == 1 && b.Unrouted() == 0 })
	for i, id := range other.got {
		if id != want[i] {
			t.Fatalf("alert %d is %s, want %s", i, id, want[i])
		}
	}
}

// A consumer was once seen to stand still amid many messages, when its pulls were
// bound by bytes.
func TestAFloodIsRoutedToItsEnd(t *testing.T) {
	b := brokertest.Open(t, broker.Config{Dir: t.TempDir()})
	var other ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	const n, chunk = 60_000, 500
	for i := 0; i < n; i += chunk {
		batch := make([]broker.Arrival, chunk)
		for j := range batch {
			batch[j] = arrival(t, i+j, "Debug")
		}
		store(t, b, batch...)
	}
	eventually(t, "all routed", func() bool { return other.len() == n && b.Unrouted() == 0 })
}

func TestWhatAKilledProcessStoredIsNotStoredAgain(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	one, two := arrival(t, 1, "Critical"), arrival(t, 2, "Debug")
	store(t, b, one, two)
	b.Close()

	b = brokertest.Open(t, broker.Config{Dir: dir})
	three := arrival(t, 3, "Critical")
	store(t, b, one, two, three)
	var urgent ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, true, urgent.add, nil) })
	eventually(t, "what was left is routed", func() bool { return urgent.len() >= 2 && b.Unrouted() <= 1 })
	if got := strings.Join(urgent.got, " "); got != one.Alert.ID+" "+three.Alert.ID {
		t.Errorf("routed %s", got)
	}
}

func TestAStepIsStoredOnce(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	ctx := t.Context()
	if err := b.OpenSteps(ctx, "delete-pod"); err != nil {
		t.Fatal(err)
	}
	step := &broker.Step{ID: broker.StepID("a", "r", 0, ""), Action: broker.Action{Responder: "delete-pod"}}
	for i, want := range []bool{true, false} {
		if stored, err := b.PublishStep(ctx, step); stored != want || err != nil {
			t.Fatalf("publish %d: stored %t, %v", i, stored, err)
		}
	}
	handled := make(chan *broker.Delivery, 10)
	stop := start(t, func(ctx context.Context) error {
		return b.ConsumeSteps(ctx, "delete-pod", 1, func(_ context.Context, d *broker.Delivery) {
			if err := d.Ack(); err != nil {
				t.Error(err)
			}
			handled <- d
		})
	})
	<-handled
	stop()
	// Acknowledged, and after a restart: still the same step.
	b.Close()
	b = brokertest.Open(t, broker.Config{Dir: dir})
	if err := b.OpenSteps(ctx, "delete-pod"); err != nil {
		t.Fatal(err)
	}
	if stored, err := b.PublishStep(ctx, step); stored || err != nil {
		t.Fatalf("after acknowledge and restart: stored %t, %v", stored, err)
	}
	if n := b.Waiting("delete-pod"); n != 0 {
		t.Errorf("%d steps wait", n)
	}
}

func TestAnUnacknowledgedStepComesAgainAtOnceAfterARestart(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	if err := b.OpenSteps(t.Context(), "file"); err != nil {
		t.Fatal(err)
	}
	step := &broker.Step{ID: "x", Action: broker.Action{Responder: "file"}}
	if _, err := b.PublishStep(t.Context(), step); err != nil {
		t.Fatal(err)
	}
	given := make(chan int, 10)
	take := func(_ context.Context, d *broker.Delivery) { given <- d.Attempt }
	stop := start(t, func(ctx context.Context) error { return b.ConsumeSteps(ctx, "file", 1, take) })
	<-given
	stop()
	b.Close()
	b = brokertest.Open(t, broker.Config{Dir: dir})
	if err := b.OpenSteps(t.Context(), "file"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	start(t, func(ctx context.Context) error { return b.ConsumeSteps(ctx, "file", 1, take) })
	select {
	case attempt := <-given:
		if attempt != 2 {
			t.Errorf("attempt %d", attempt)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("it came again only after %s", took)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it did not come again")
	}
}

func TestAFullQueueGivesTheLeastUrgentUp(t *testing.T) {
	b := brokertest.New(t)
	if err := b.OpenSteps(t.Context(), "slack"); err != nil {
		t.Fatal(err)
	}
	match := func(s *broker.Stored) []*broker.Step {
		return []*broker.Step{{ID: broker.StepID(s.ID, "r", 0, ""), AlertID: s.ID, Rule: "r", Action: broker.Action{Responder: "slack"}}}
	}
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, true, match, nil) })
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, match, nil) })
	const n = 5000 // more than may wait
	for i := 0; i < n; i += 500 {
		batch := make([]broker.Arrival, 500)
		for j := range batch {
			batch[j] = arrival(t, i+j, "Debug")
		}
		store(t, b, batch...)
	}
	eventually(t, "all routed", func() bool { return b.Unrouted() == 0 })
	store(t, b, arrival(t, 0, "Critical"))
	eventually(t, "the critical one is routed", func() bool { return b.Unrouted() == 0 })
	failed := 0
	if err := b.Outcomes(t.Context(), time.Time{}, func(o broker.Outcome) error {
		if o.Status != broker.Failed || !strings.Contains(o.Reason, broker.ErrQueueFull.Error()) {
			t.Errorf("outcome %+v", o)
		}
		failed++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	waiting := b.Waiting("slack")
	if waiting != 4097 || failed != n-4096 {
		t.Errorf("%d wait and %d were given up; want 4096 and the critical one, and the rest", waiting, failed)
	}
}

func TestASecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	brokertest.Open(t, broker.Config{Dir: dir})
	if _, err := broker.Open(t.Context(), broker.Config{Dir: dir}); !errors.Is(err, broker.ErrLocked) {
		t.Errorf("a second broker on the folder: %v", err)
	}
}

func TestABadStoreIsAnError(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/store", []byte("a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := broker.Open(t.Context(), broker.Config{Dir: dir}); err == nil {
		t.Error("opened on a file")
	}
}

// Whoever was let in hears the mirror too: it is there for programs that know
// no other subject.
func TestMirror(t *testing.T) {
	cert, key := certificate(t)
	b := brokertest.Open(t, broker.Config{Mirror: []string{"FALCO"}, Listen: &broker.Listen{
		Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: "old", Password: "secret"}},
	}})
	nc, err := nats.Connect("tls://"+b.Addr().String(), nats.RootCAs(cert), nats.UserInfo("old", "secret"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sub, err := nc.SubscribeSync("FALCO")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	a := arrival(t, 7, "Notice")
	store(t, b, a)
	m, err := sub.NextMsg(5 * time.Second)
	if err != nil || string(m.Data) != string(a.Alert.Raw) {
		t.Errorf("mirrored %v: %v", m, err)
	}
}

// An alert must not be mirrored to where it would be taken for something else.
func TestMirrorOntoSubjectsThatAreTaken(t *testing.T) {
	for _, subject := range []string{"", "a b", "a..b", ">", "alerts.*", "falco.all", "stoop.actions.delete-pod.x", "$KV.STATE.pause", "_INBOX.x"} {
		b, err := broker.Open(t.Context(), broker.Config{Mirror: []string{subject}})
		if err == nil {
			b.Close()
			t.Errorf("mirrored onto %q", subject)
		} else if !strings.Contains(err.Error(), "broker.mirror: ") {
			t.Errorf("%q: %v", subject, err)
		}
	}
}

func TestState(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	type record struct{ N int }
	ctx := t.Context()
	for key, ttl := range map[string]time.Duration{"act.a": 0, "act.b": time.Second, "pause": 0} {
		if err := b.State().Put(ctx, key, record{1}, ttl); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.State().Delete(ctx, "pause"); err != nil {
		t.Fatal(err)
	}
	b.Close()
	b = brokertest.Open(t, broker.Config{Dir: dir})
	var r record
	if ok, err := b.State().Get(ctx, "act.a", &r); !ok || err != nil || r.N != 1 {
		t.Errorf("act.a after a restart: %t %v %v", ok, err, r)
	}
	if ok, err := b.State().Get(ctx, "pause", &r); ok || err != nil {
		t.Errorf("pause after it was deleted: %t %v", ok, err)
	}
	eventually(t, "the ttl of act.b", func() bool {
		var keys []string
		err := b.State().Each(ctx, "act.*", func(k string, _ []byte, _ time.Time) error { keys = append(keys, k); return nil })
		return err == nil && strings.Join(keys, " ") == "act.a"
	})
}

// A disk that is full makes the store fail, and it works again when it is
// opened again with space.
func TestAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("needs to mount a tmpfs: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", dir).Run() })
	b := brokertest.Open(t, broker.Config{Dir: dir + "/data"})
	filler := strings.Repeat("x", 16<<10)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		a := arrival(t, i, "Critical")
		a.Alert.Raw = append([]byte(`{"filler":"`+filler+`",`), a.Alert.Raw[1:]...)
		_, err = b.Store(ctx, []broker.Arrival{a})
	}
	select {
	case <-b.Failed():
	default:
		t.Fatalf("16 MiB went onto a disk of 4 MiB: %v", err)
	}
	if b.Err() == nil {
		t.Error("no reason")
	}
	b.Close()

	// In memory it goes on, on the very same full folder.
	m := brokertest.Open(t, broker.Config{Dir: dir + "/data", Memory: true})
	store(t, m, arrival(t, 1, "Critical"))
	if err := m.State().Put(t.Context(), "pause", true, 0); err != nil {
		t.Error(err)
	}
	m.Close()
	if err := os.RemoveAll(dir + "/data/store"); err != nil {
		t.Fatal(err)
	}
	b = brokertest.Open(t, broker.Config{Dir: dir + "/data"})
	store(t, b, arrival(t, 2, "Critical"))
}

func TestNothingListensByDefault(t *testing.T) {
	b := brokertest.New(t)
	if b.Addr() != nil {
		t.Errorf("it listens on %s", b.Addr())
	}
}

func TestListenRefusesToBeOpen(t *testing.T) {
	cert, key := certificate(t)
	for name, c := range map[string]struct {
		l    broker.Listen
		want string
	}{
		"no TLS":                    {broker.Listen{Addr: "127.0.0.1:0"}, "needs TLS"},
		"no authentication":         {broker.Listen{Addr: "0.0.0.0:0", Cert: cert, Key: key}, "needs authentication"},
		"no authentication, empty":  {broker.Listen{Addr: ":0", Cert: cert, Key: key}, "needs authentication"},
		"stoop's own name":          {broker.Listen{Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: "stoop", Password: "x"}}}, "stoop's own"},
		"a user without a password": {broker.Listen{Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: "siem"}}}, "neither a password nor an nkey"},
		"no port":                   {broker.Listen{Addr: "127.0.0.1", Cert: cert, Key: key}, "missing port"},
	} {
		_, err := broker.Open(t.Context(), broker.Config{Listen: &c.l})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A client that was let in tries all that it must not.
func TestAHostileClient(t *testing.T) {
	cert, key := certificate(t)
	b := brokertest.Open(t, broker.Config{Listen: &broker.Listen{
		Addr: "127.0.0.1:0", Cert: cert, Key: key, Users: []broker.User{{Name: "siem", Password: "secret"}},
	}})
	if _, err := b.Conn().Subscribe("stoop.api.ping", func(m *nats.Msg) { _ = m.Respond([]byte("pong")) }); err != nil {
		t.Fatal(err)
	}
	url := "tls://" + b.Addr().String()
	for _, opt := range []nats.Option{nats.UserInfo("siem", "wrong"), nats.UserInfo("local", ""), nats.Name("nobody")} {
		if nc, err := nats.Connect(url, nats.RootCAs(cert), opt); err == nil {
			nc.Close()
			t.Error("let in without the right password")
		}
	}
	var mu sync.Mutex
	var denied []string
	nc, err := nats.Connect(url, nats.RootCAs(cert), nats.UserInfo("siem", "secret"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		mu.Lock()
		defer mu.Unlock()
		denied = append(denied, err.Error())
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	sub, err := nc.SubscribeSync("falco.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	a := arrival(t, 1, "Critical")
	store(t, b, a)
	if m, err := sub.NextMsg(5 * time.Second); err != nil || string(m.Data) != string(a.Alert.Raw) {
		t.Errorf("an alert for the client: %v", err)
	}
	if m, err := nc.Request("stoop.api.ping", nil, 5*time.Second); err != nil || string(m.Data) != "pong" {
		t.Errorf("the api for the client: %v", err)
	}

	// Answers go where the asker says: nothing of stoop's is to be reached so.
	api, err := b.ConnectAPI()
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	if _, err := api.Subscribe("stoop.api.watch", func(m *nats.Msg) { _ = m.Respond([]byte(`{"paused":true}`)) }); err != nil {
		t.Fatal(err)
	}
	if err := api.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, reply := range []string{"$KV.STATE.pause", "$JS.API.STREAM.DELETE.ACTIONS", "stoop.outcomes.delete-pod", "falco.critical.forged"} {
		if err := nc.PublishRequest("stoop.api.watch", reply, nil); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := nc.Request("stoop.api.watch", nil, 5*time.Second); err != nil || len(m.Data) == 0 {
		t.Errorf("an honest request: %v", err)
	}

	forbidden := []string{
		"falco.critical.forged", "falco.unparsed", "stoop.actions.delete-pod.x", "stoop.outcomes.delete-pod", "stoop.tail", "$KV.STATE.pause",
		"$JS.API.STREAM.DELETE.ALERTS", "$JS.API.STREAM.PURGE.ACTIONS", "$JS.API.INFO", "$JS.ACK.x", "$SYS.REQ.SERVER.PING",
	}
	for _, s := range forbidden {
		if err := nc.Publish(s, []byte(`{}`)); err != nil {
			t.Fatal(err)
		}
	}
	listening := []string{"stoop.actions.>", ">", "$KV.>", "_STOOP.>", "$JS.>"}
	for _, s := range listening {
		if _, err := nc.SubscribeSync(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "every attempt is denied", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(denied) == len(forbidden)+len(listening)
	})
	if ok, err := b.State().Get(t.Context(), "pause", new(any)); ok || err != nil {
		t.Errorf("the client wrote STATE: %t %v", ok, err)
	}
}

func TestStoppedWhileItBeginsIsNoFault(t *testing.T) {
	b := brokertest.New(t)
	if err := b.OpenSteps(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*100*time.Microsecond)
		if err := b.RouteAlerts(ctx, true, func(*broker.Stored) []*broker.Step { return nil }, nil); err != nil {
			t.Errorf("the router, stopped after %d µs: %v", i*100, err)
		}
		cancel()
		ctx, cancel = context.WithTimeout(t.Context(), time.Duration(i)*100*time.Microsecond)
		if err := b.ConsumeSteps(ctx, "one", 1, func(context.Context, *broker.Delivery) {}); err != nil {
			t.Errorf("a responder, stopped after %d µs: %v", i*100, err)
		}
		cancel()
	}
}

// The stream is what counts: also what this process never heard was stored is
// routed, in its place.
func TestWhatWasStoredWithoutAWordIsRouted(t *testing.T) {
	b := brokertest.New(t)
	var other ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	first, unheard, last := arrival(t, 1, "Warning"), arrival(t, 2, "Warning"), arrival(t, 3, "Warning")
	store(t, b, first)
	if err := b.Conn().PublishMsg(&nats.Msg{
		Subject: unheard.Alert.Subject(), Data: unheard.Alert.Raw, Header: nats.Header{broker.HeaderID: {unheard.Alert.ID}},
	}); err != nil {
		t.Fatal(err)
	}
	if err := b.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	store(t, b, last)
	eventually(t, "all routed", func() bool { return other.len() >= 3 && b.Unrouted() == 0 })
	if got, want := strings.Join(other.got, " "), first.Alert.ID+" "+unheard.Alert.ID+" "+last.Alert.ID; got != want {
		t.Errorf("routed %s, want %s", got, want)
	}
}

// More than is held in memory for a router that is slow is read from the stream.
func TestWhatIsNotHeldIsRead(t *testing.T) {
	b := brokertest.New(t)
	const n = 12_000
	want := make([]string, 0, n)
	for i := 0; i < n; i += 500 {
		batch := make([]broker.Arrival, 500)
		for j := range batch {
			batch[j] = arrival(t, i+j, "Debug")
			want = append(want, batch[j].Alert.ID)
		}
		store(t, b, batch...)
	}
	var other ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	eventually(t, "all routed", func() bool { return b.Unrouted() == 0 })
	if !slices.Equal(other.got, want) {
		t.Errorf("%d were routed, of %d, or in another order", len(other.got), n)
	}
}

// A stream that was made anew under the position of another loses none.
func TestAStreamThatWasMadeAnew(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	var other ids
	stop := start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	store(t, b, arrival(t, 1, "Warning"), arrival(t, 2, "Warning"))
	eventually(t, "all routed", func() bool { return b.Unrouted() == 0 })
	stop()
	b.Close()
	folders, err := filepath.Glob(dir + "/store/jetstream/*/streams/" + broker.StreamAlerts)
	if err != nil || len(folders) != 1 {
		t.Fatalf("the stream's folders are %v, error %v", folders, err)
	}
	if err := os.RemoveAll(folders[0]); err != nil {
		t.Fatal(err)
	}
	b = brokertest.Open(t, broker.Config{Dir: dir})
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	store(t, b, arrival(t, 3, "Warning"))
	eventually(t, "the new one is routed", func() bool { return other.len() == 3 && b.Unrouted() == 0 })
}

// unkept is a keeper whose store takes nothing more.
type unkept struct{ asked atomic.Int32 }

func (k *unkept) Keep(context.Context) error {
	k.asked.Add(1)
	return errors.New("maximum bytes exceeded")
}
func (k *unkept) Kept(*broker.Step) {}

// A STATE that is full must not end the program, and with it all answers: a step on
// which several alerts agree is stored all the same, and what comes after it.
func TestWhatAgreesIsRoutedAlthoughItCannotBeKept(t *testing.T) {
	b := brokertest.New(t)
	if err := b.OpenSteps(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	k := &unkept{}
	start(t, func(ctx context.Context) error {
		return b.RouteAlerts(ctx, false, func(s *broker.Stored) []*broker.Step {
			return []*broker.Step{{ID: s.ID, AlertID: s.ID, Agreed: []string{s.ID}, Action: broker.Action{Responder: "one"}}}
		}, k)
	})
	store(t, b, arrival(t, 1, "Warning"))
	store(t, b, arrival(t, 2, "Warning"))
	eventually(t, "both steps are stored", func() bool { return b.Waiting("one") == 2 && b.Unrouted() == 0 })
	if k.asked.Load() == 0 || b.Err() != nil {
		t.Errorf("asked %d times to keep, the store's error is %v", k.asked.Load(), b.Err())
	}
}

// slowly is a keeper that has much to store.
type slowly struct{ asked atomic.Int32 }

func (k *slowly) Keep(context.Context) error {
	k.asked.Add(1)
	time.Sleep(50 * time.Millisecond)
	return nil
}
func (k *slowly) Kept(*broker.Step) {}

// What is kept of a flood is much, and is stored as a whole each time: the store has
// something else to do besides.
func TestWhatIsMuchIsKeptSeldom(t *testing.T) {
	b := brokertest.New(t)
	var other ids
	k := &slowly{}
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, k) })
	n := 0
	for begin := time.Now(); time.Since(begin) < 1500*time.Millisecond; time.Sleep(5 * time.Millisecond) {
		n++
		store(t, b, arrival(t, n, "Warning"))
	}
	if asked := k.asked.Load(); asked == 0 || asked > 4 {
		t.Errorf("it was stored %d times in 1.5 s", asked)
	}
	eventually(t, "all routed", func() bool { return other.len() == n && b.Unrouted() == 0 })
}

// What an earlier process left counts among what waits: so long as the router is not
// through with it, no more comes in than the stream can keep.
func TestWhatWasLeftCounts(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	const lag = 20_000
	for i := 0; i < lag; i += 500 {
		batch := make([]broker.Arrival, 500)
		for j := range batch {
			batch[j] = arrival(t, i+j, "Debug")
		}
		store(t, b, batch...)
	}
	b.Close()
	b = brokertest.Open(t, broker.Config{Dir: dir})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if n, err := b.Store(ctx, []broker.Arrival{arrival(t, lag, "Debug")}); n != 0 || err == nil {
		t.Fatalf("%d were stored beyond what may wait: %v", n, err)
	}
	var other ids
	start(t, func(ctx context.Context) error { return b.RouteAlerts(ctx, false, other.add, nil) })
	store(t, b, arrival(t, lag, "Debug"))
	eventually(t, "all routed", func() bool { return other.len() == lag+1 && b.Unrouted() == 0 })
}
