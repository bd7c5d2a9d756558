package evidence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// shelf is a bucket in memory; the real ones have tests in s3 and e2e.
type shelf struct {
	name string

	mu      sync.Mutex
	objects map[string]string
	order   []string
	fault   func(key string) error // asked before each Put
}

func (b *shelf) String() string { return b.name }

func (b *shelf) Put(ctx context.Context, key string, o Object) error {
	data, err := io.ReadAll(o.File)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fault != nil {
		if err := b.fault(key); err != nil {
			return err
		}
	}
	if int64(len(data)) != o.Size || sum(data) != o.SHA256 || o.JSON != strings.HasSuffix(key, "/"+manifestName) {
		return fmt.Errorf("%s: %d bytes came, %+v", key, len(data), o)
	}
	if b.objects == nil {
		b.objects = map[string]string{}
	}
	b.objects[key] = string(data)
	b.order = append(b.order, key)
	return ctx.Err()
}

func (b *shelf) keys() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.order)
}

func (b *shelf) fail(fault func(key string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault = fault
}

// running opens a store and has it run until it is stopped.
func running(t *testing.T, conf Config) (s *Store, stop func()) {
	t.Helper()
	s, err := Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	s.retryFirst = time.Millisecond
	s.retryMost = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() { defer close(ran); s.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-ran; s.Close() })
	t.Cleanup(stop)
	return s, stop
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// value is a metric's, its one label's value in braces.
func value(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range all {
		for _, m := range family.Metric {
			is := family.GetName()
			for _, l := range m.Label {
				is += "{" + l.GetValue() + "}"
			}
			if is == name {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return -1
}

func keep(t *testing.T, s *Store, step string, pieces ...string) Manifest {
	t.Helper()
	c := begin(t, s, about(step))
	for _, name := range pieces {
		add(t, c, name, "content of "+name)
	}
	finish(t, c)
	return c.Manifest()
}

func TestEveryFinishedCaseIsCopied(t *testing.T) {
	dir, b, reg := t.TempDir(), &shelf{name: "b"}, prometheus.NewPedanticRegistry()
	// One that was there before there was a bucket.
	before := open(t, Config{Dir: dir})
	keep(t, before, "s0", "x")
	before.Close()
	s, stop := running(t, Config{Dir: dir, Bucket: b, Node: "node/1", Registerer: reg})
	keep(t, s, "s1", "x", "y/z")
	begin(t, s, about("s2")) // never finished
	want := []string{"node%2F1/s0/x", "node%2F1/s0/manifest.json", "node%2F1/s1/x", "node%2F1/s1/y%2Fz", "node%2F1/s1/manifest.json"}
	eventually(t, "both are copied", func() bool { return s.Copied("s1") && s.Copied("s0") })
	if got := b.keys(); !slices.Equal(got, want) {
		t.Errorf("copied were %q", got)
	}
	m, err := os.ReadFile(filepath.Join(dir, "s1", "manifest.json"))
	if err != nil || b.objects["node%2F1/s1/manifest.json"] != string(m) {
		t.Errorf("the manifest is copied as %q, %v", b.objects["node%2F1/s1/manifest.json"], err)
	}
	verified(t, s, "s1")
	// Begun once more by its step, as after a crash, it is as it was.
	finish(t, begin(t, s, about("s1")))
	if s.Used() != onDisk(t, dir) {
		t.Errorf("%d bytes are counted, %d are there", s.Used(), onDisk(t, dir))
	}
	for name, want := range map[string]float64{
		"stoop_evidence_cases": 3, "stoop_evidence_pending": 0, "stoop_evidence_uploads_total{done}": 2,
		"stoop_evidence_bytes": float64(onDisk(t, dir)),
	} {
		if got := value(t, reg, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	stop()
	// What the bucket has is not copied again, unless it is another bucket.
	s, stop = running(t, Config{Dir: dir, Bucket: b, Node: "node/1"})
	keep(t, s, "s3", "x")
	eventually(t, "the new one is copied", func() bool { return s.Copied("s3") })
	if got := b.keys(); len(got) != len(want)+2 {
		t.Errorf("copied were %q", got)
	}
	stop()
	other := &shelf{name: "other"}
	running(t, Config{Dir: dir, Bucket: other, Node: "n"})
	eventually(t, "all are copied to the other", func() bool { return len(other.keys()) == 7 })
}

// The bucket is away: nothing is lost, one warning is said, and what was copied in
// part before is copied whole.
func TestTheBucketIsAwayForAWhile(t *testing.T) {
	dir, b := t.TempDir(), &shelf{}
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	tries := 0
	away := errors.New("connection refused")
	b.fail(func(key string) error {
		if strings.HasSuffix(key, "/s1/x") {
			return nil // the first piece came through
		}
		tries++
		return away
	})
	s, stop := running(t, Config{Dir: dir, Bucket: b, Node: "n", Log: log})
	for i := range 5 {
		keep(t, s, fmt.Sprintf("s%d", i+1), "x", "y")
	}
	eventually(t, "it was tried many times", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return tries > 20
	})
	for _, key := range b.keys() {
		if strings.HasSuffix(key, manifestName) {
			t.Errorf("there is a manifest without its pieces: %q", b.keys())
		}
	}
	b.fail(nil)
	eventually(t, "all are copied", func() bool {
		return s.Copied("s1") && s.Copied("s2") && s.Copied("s3") && s.Copied("s4") && s.Copied("s5")
	})
	stop()
	if n := strings.Count(said.String(), "can't be copied"); n != 1 || strings.Count(said.String(), "copied to the bucket again") != 1 {
		t.Errorf("said was %s", said.String())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.objects) != 15 {
		t.Errorf("the bucket has %q", slices.Sorted(maps.Keys(b.objects)))
	}
}

// Killed in the middle of a copy, or right after it: the next process copies it.
func TestACopyThatWasCutOff(t *testing.T) {
	dir, b := t.TempDir(), &shelf{}
	hanging := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	b.fail(func(key string) error {
		if strings.HasSuffix(key, "/y") {
			close(hanging)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	s, stop := running(t, Config{Dir: dir, Bucket: b, Node: "n"})
	keep(t, s, "s1", "x", "y")
	<-hanging
	cancel()
	stop()
	b.fail(nil)
	s, stop = running(t, Config{Dir: dir, Bucket: b, Node: "n"})
	eventually(t, "it is copied", func() bool { return s.Copied("s1") })
	stop()
	if err := os.Remove(filepath.Join(dir, "s1", uploadedName)); err != nil {
		t.Fatal(err)
	}
	b.objects = nil
	s, _ = running(t, Config{Dir: dir, Bucket: b, Node: "n"})
	eventually(t, "it is copied again", func() bool { return s.Copied("s1") })
	if len(b.objects) != 3 {
		t.Errorf("the bucket has %q", slices.Sorted(maps.Keys(b.objects)))
	}
}

// What somebody changed is not copied: its manifest would make it look whole.
func TestAChangedCaseIsNotCopied(t *testing.T) {
	dir, b := t.TempDir(), &shelf{}
	reg := prometheus.NewPedanticRegistry()
	s := open(t, Config{Dir: dir})
	keep(t, s, "s1", "x")
	keep(t, s, "s2", "x")
	if err := os.WriteFile(filepath.Join(dir, "s1", "x"), []byte("content of y"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s, stop := running(t, Config{Dir: dir, Bucket: b, Node: "n", Registerer: reg, Age: time.Hour})
	eventually(t, "the other is copied", func() bool { return s.Copied("s2") })
	eventually(t, "it was given up", func() bool { return value(t, reg, "stoop_evidence_uploads_total{given_up}") == 1 })
	// It is the only copy: it stays.
	s.retain(time.Now().Add(1000 * time.Hour))
	stop()
	for key := range b.objects {
		if strings.Contains(key, "/s1/") {
			t.Errorf("copied was %s", key)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "s1")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "s2")); !os.IsNotExist(err) {
		t.Errorf("the old one that was copied is there: %v", err)
	}
}

// A case that is changed after it was copied is copied again.
func TestACaseThatIsGoneOnWith(t *testing.T) {
	dir, b := t.TempDir(), &shelf{}
	s, _ := running(t, Config{Dir: dir, Bucket: b, Node: "n"})
	keep(t, s, "s1", "x")
	eventually(t, "it is copied", func() bool { return s.Copied("s1") })
	first := b.objects["n/s1/manifest.json"]
	keep(t, s, "s1", "more")
	eventually(t, "it is copied again", func() bool { return s.Copied("s1") && len(b.keys()) == 5 })
	if b.objects["n/s1/manifest.json"] == first || s.Used() != onDisk(t, dir) {
		t.Errorf("the manifest is %s; %d bytes are counted, %d are there", b.objects["n/s1/manifest.json"], s.Used(), onDisk(t, dir))
	}
}

func TestACopyIsGivenUpInTheEnd(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir(), Bucket: &shelf{}})
	keep(t, s, "s1", "x")
	step, u, _ := s.due()
	var out outage
	s.settle(step, u, errors.New("away"), &out)
	if u.gaveUp || u.next.IsZero() {
		t.Errorf("after one try: %+v", u)
	}
	u.first, u.next = u.first.Add(-uploadFor), time.Time{}
	s.settle(step, u, errors.New("away"), &out)
	if _, again, wait := s.due(); !u.gaveUp || again != nil || wait != 0 {
		t.Errorf("after all that time: %+v", u)
	}
	s.retain(time.Now().Add(10 * uploadFor))
	verified(t, s, "s1")
}

func TestWhatIsTooOldIsTakenAway(t *testing.T) {
	dir := t.TempDir()
	first := open(t, Config{Dir: dir})
	begin(t, first, about("unfinished"))
	first.Close()
	needed := "s2"
	s := open(t, Config{Dir: dir, Age: time.Hour, PerTarget: 4, Needed: func(step string) bool { return step == needed }})
	keep(t, s, "s1", "x")
	keep(t, s, "s2", "x")
	c := begin(t, s, about("open"))
	s.retain(time.Now().Add(59 * time.Minute))
	if cases, err := s.Cases(); err != nil || len(cases) != 4 {
		t.Errorf("kept are %+v, %v", cases, err)
	}
	s.retain(time.Now().Add(61 * time.Minute))
	verified(t, s, "s2") // to be undone, perhaps
	needed = ""
	s.retain(time.Now().Add(61 * time.Minute))
	cases, err := s.Cases()
	if err != nil || len(cases) != 1 || cases[0].Step != "open" || s.Used() != onDisk(t, dir) {
		t.Errorf("kept are %+v, %v; %d bytes counted, %d there", cases, err, s.Used(), onDisk(t, dir))
	}
	finish(t, c)
	// Their target has room again.
	for i := range 3 {
		keep(t, s, fmt.Sprintf("n%d", i), "x")
	}
	s.cfg.Age = 0
	s.retain(time.Now().Add(10000 * time.Hour))
	if cases, err := s.Cases(); err != nil || len(cases) != 4 {
		t.Errorf("without an age kept are %+v, %v", cases, err)
	}

	// With a bucket, only what it has.
	b := &shelf{}
	b.fail(func(string) error { return errors.New("away") })
	s, _ = running(t, Config{Dir: t.TempDir(), Age: time.Hour, Bucket: b, Node: "n"})
	keep(t, s, "s1", "x")
	s.retain(time.Now().Add(61 * time.Minute))
	verified(t, s, "s1")
	b.fail(nil)
	eventually(t, "it is copied", func() bool { return s.Copied("s1") })
	eventually(t, "it is taken away", func() bool {
		s.retain(time.Now().Add(61 * time.Minute))
		_, err := s.Case("s1")
		return errors.Is(err, ErrNoCase)
	})
}

func TestDropAndDoubt(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	c := begin(t, s, about("s1"))
	add(t, c, "x", strings.Repeat("x", 10_000))
	add(t, c, "y", "y")
	if err := c.Drop("x"); err != nil {
		t.Error(err)
	}
	if err := c.Drop("x"); err == nil {
		t.Error("what is not there was taken away")
	}
	c.Doubt("y", "one")
	c.Doubt("y", "two")
	finish(t, c)
	m := c.Manifest()
	if len(m.Pieces) != 1 || m.Pieces[0].Error != "one; two" || m.Pieces[0].Whole() || s.Used() != onDisk(t, dir) {
		t.Errorf("the pieces are %+v, %d bytes counted, %d there", m.Pieces, s.Used(), onDisk(t, dir))
	}
	verified(t, s, "s1")
}

func TestWhichStepsNameAFolder(t *testing.T) {
	for id, want := range map[string]bool{
		"4f1c0e": true, "A-b_9": true, strings.Repeat("x", 128): true,
		"": false, "-a": false, "_": false, ".": false, "..": false, "a/b": false, "a.b": false, "é": false, "a\x00": false, strings.Repeat("x", 129): false,
	} {
		if isStep(id) != want {
			t.Errorf("%q: %t", id, !want)
		}
	}
}
