package broker_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"stoop/broker"
	"stoop/broker/brokertest"
)

func openStore(t *testing.T, c broker.Config) *broker.Broker {
	t.Helper()
	b, err := broker.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// say publishes an outcome of each of the responders.
func say(t *testing.T, b *broker.Broker, responders ...string) {
	t.Helper()
	for _, r := range responders {
		o := broker.Outcome{ID: r + fmt.Sprint(b.Journal().N+1), Time: time.Now().UTC(), Responder: r, Status: broker.Done, Actor: "somebody"}
		if err := b.PublishOutcome(o); err != nil {
			t.Fatal(err)
		}
	}
}

func verify(t *testing.T, b *broker.Broker, want broker.Head) broker.Verdict {
	t.Helper()
	v, err := b.Verify(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func whole(t *testing.T, b *broker.Broker, want broker.Head) broker.Verdict {
	t.Helper()
	v := verify(t, b, want)
	if v.Broken != nil {
		t.Errorf("%d breaks: %+v", v.Breaks, v.Broken)
	}
	return v
}

// verifyCopy verifies a store as stoop history does without a running stoop.
func verifyCopy(t *testing.T, dir string, want broker.Head) broker.Verdict {
	t.Helper()
	tmp := t.TempDir()
	if err := broker.CopyStore(tmp, dir, broker.StreamOutcomes); err != nil {
		t.Fatal(err)
	}
	b := openStore(t, broker.Config{Dir: tmp, ReadOnly: true})
	defer b.Close()
	return verify(t, b, want)
}

// rewrite replaces what the stream on a disk holds, past stoop.
func rewrite(t *testing.T, dir string, edit func([]*nats.Msg) []*nats.Msg) {
	t.Helper()
	b := openStore(t, broker.Config{Dir: dir, ReadOnly: true})
	defer b.Close()
	js, err := jetstream.New(b.Conn())
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), broker.StreamOutcomes)
	if err != nil {
		t.Fatal(err)
	}
	var all []*nats.Msg
	for seq := s.CachedInfo().State.FirstSeq; seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		m.Header.Del(jetstream.ExpectedLastSeqHeader)
		all = append(all, &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data})
	}
	if err := s.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, m := range edit(all) {
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
}

// rehash gives a message the hash that docs/journal.md says it has to have.
func rehash(m *nats.Msg) {
	lines := append([]string{m.Header.Get(broker.HeaderLink), m.Header.Get(broker.HeaderLast)}, m.Header.Values(broker.HeaderWas)...)
	text := strings.Join(append(lines, m.Subject), "\n") + "\n" + string(m.Data)
	m.Header.Set(broker.HeaderHash, fmt.Sprintf("%x", sha256.Sum256([]byte(text))))
}

// Outcomes published at once stand in one chain, in the order of the stream, which
// goes on over a restart.
func TestTheJournalIsOneChain(t *testing.T) {
	dir := t.TempDir()
	var kept []broker.Head
	for range 3 {
		b := openStore(t, broker.Config{Dir: dir})
		var all sync.WaitGroup
		for w := range 8 {
			all.Go(func() {
				for range 25 {
					say(t, b, fmt.Sprintf("responder-%d", w%3))
				}
			})
		}
		all.Wait()
		kept = append(kept, b.Journal())
		v := whole(t, b, broker.Head{})
		if v.Outcomes != 200*len(kept) || v.First.N != 1 || v.Head != b.Journal() || v.Head.N != uint64(v.Outcomes) {
			t.Errorf("%+v", v)
		}
		b.Close()
	}
	for _, h := range kept {
		if v := verifyCopy(t, dir, h); v.Broken != nil {
			t.Errorf("the head %s: %+v", h, v.Broken)
		}
		if v := verifyCopy(t, dir, broker.Head{Hash: h.Hash}); v.Broken != nil {
			t.Errorf("the hash %s: %+v", h, v.Broken)
		}
	}
	other := broker.Head{N: 100, Hash: kept[0].Hash}
	if v := verifyCopy(t, dir, other); v.Broken == nil || v.Broken.N != 100 {
		t.Errorf("a head that is not there: %+v", v.Broken)
	}
}

func TestABrokenJournalIsSeen(t *testing.T) {
	// Ten of each of the first two, and one of the third at the beginning.
	order := []string{"isolate-pod"}
	for range 10 {
		order = append(order, "delete-pod", "webhook")
	}
	change := func(m *nats.Msg) {
		m.Data = []byte(strings.Replace(string(m.Data), `"done"`, `"audit"`, 1))
	}
	for _, c := range []struct {
		name string
		edit func([]*nats.Msg) []*nats.Msg
		n    uint64 // of the first that is broken
		says string
	}{
		{"nothing", func(all []*nats.Msg) []*nats.Msg { return all }, 0, ""},
		{"remove one", func(all []*nats.Msg) []*nats.Msg { return slices.Delete(all, 6, 7) }, 7, "is missing"},
		{"remove some", func(all []*nats.Msg) []*nats.Msg { return slices.Delete(all, 6, 9) }, 7, "numbers 7 to 9 are missing"},
		{"change one", func(all []*nats.Msg) []*nats.Msg { change(all[6]); return all }, 7, "its hash is another"},
		{"change one and its hash", func(all []*nats.Msg) []*nats.Msg {
			change(all[6])
			all[6].Header.Set(broker.HeaderHash, strings.Repeat("ab", 32))
			return all
		}, 7, "not what it was"},
		{"swap two", func(all []*nats.Msg) []*nats.Msg { all[6], all[7] = all[7], all[6]; return all }, 7, ""},
		{"cut the end", func(all []*nats.Msg) []*nats.Msg { return all[:18] }, 19, "numbers 19 to 21 are missing at the end"},
		{"change the last", func(all []*nats.Msg) []*nats.Msg { change(all[20]); return all }, 21, "its hash is another"},
		{"remove all of a responder", func(all []*nats.Msg) []*nats.Msg { return slices.Delete(all, 0, 1) }, 0, ""}, // the beginning
		{"add one", func(all []*nats.Msg) []*nats.Msg {
			return slices.Insert(all, 6, &nats.Msg{Subject: all[6].Subject, Data: all[6].Data})
		}, 7, "no link"},
		{"repeat one", func(all []*nats.Msg) []*nats.Msg { return slices.Insert(all, 6, all[5]) }, 6, ""},
		{"another responder", func(all []*nats.Msg) []*nats.Msg { all[6].Subject = broker.OutcomeSubject("slack"); return all }, 5, ""},
		{"remove everything", func([]*nats.Msg) []*nats.Msg { return nil }, 1, "numbers 1 to 21 are missing at the end"},
		{"take the links from the beginning, and change it", func(all []*nats.Msg) []*nats.Msg {
			for _, m := range all[:5] {
				m.Header = nil
				change(m)
			}
			return all
		}, 1, "missing"},
		{"remove the beginning", func(all []*nats.Msg) []*nats.Msg { return all[5:] }, 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			b := openStore(t, broker.Config{Dir: dir})
			say(t, b, order...)
			head := b.Journal()
			b.Close()
			rewrite(t, dir, c.edit)
			v := verifyCopy(t, dir, broker.Head{})
			if c.n == 0 {
				if v.Broken != nil || v.Head != head {
					t.Errorf("%d breaks, the first %+v; the head is %s, was %s", v.Breaks, v.Broken, v.Head, head)
				}
				return
			}
			if v.Broken == nil {
				t.Fatalf("it is not seen: %+v", v)
			}
			if v.Broken.N != c.n || !strings.Contains(v.Broken.What, c.says) {
				t.Errorf("the first broken is %+v, want number %d, %q", v.Broken, c.n, c.says)
			}
			// What a restart appends does not hide it, nor what STATE holds then.
			b = openStore(t, broker.Config{Dir: dir})
			say(t, b, order...)
			b.Close()
			v = verifyCopy(t, dir, head)
			if c.name == "remove everything" { // the journal begins after it now
				if v.Broken != nil || v.First.N != 22 {
					t.Errorf("after a restart: %+v", v)
				}
				return
			}
			if v.Broken == nil {
				t.Errorf("after a restart it is not seen: %+v", v)
			}
		})
	}
}

// A byte that is changed in the files does not pass either.
func TestAChangedFileIsSeen(t *testing.T) {
	t.Parallel() // it waits for a store that gives nothing more
	dir := t.TempDir()
	b := openStore(t, broker.Config{Dir: dir})
	for range 20 {
		say(t, b, "delete-pod", "webhook")
	}
	b.Close()
	blocks, err := filepath.Glob(filepath.Join(dir, "store/jetstream/$G/streams", broker.StreamOutcomes, "msgs/*.blk"))
	if err != nil || len(blocks) != 1 {
		t.Fatal(blocks, err)
	}
	data, err := os.ReadFile(blocks[0])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(blocks[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	if v := verifyCopy(t, dir, broker.Head{}); v.Broken == nil {
		t.Errorf("%+v", v)
	}
}

// What went since so many of one responder followed is no break; what somebody took
// out amid it is.
func TestAJournalWithDroppedOutcomes(t *testing.T) {
	dir := t.TempDir()
	const size = 200 << 10 // 100 of each responder
	b := openStore(t, broker.Config{Dir: dir, OutcomesSize: size})
	for n := range 400 {
		if n%50 == 0 && n < 250 {
			say(t, b, "delete-pod")
		}
		if n == 120 {
			say(t, b, "isolate-pod")
		}
		say(t, b, "webhook")
	}
	v := whole(t, b, b.Journal())
	if v.First.N != 1 || v.Dropped != 300 || v.Outcomes != 106 {
		t.Errorf("%+v", v)
	}
	b.Close()
	t.Run("one of another is changed, with a hash that fits", func(t *testing.T) {
		copied := t.TempDir()
		if err := os.CopyFS(filepath.Join(copied, "store"), os.DirFS(filepath.Join(dir, "store"))); err != nil {
			t.Fatal(err)
		}
		rewrite(t, copied, func(all []*nats.Msg) []*nats.Msg {
			m := all[1] // what follows it in the journal is gone
			m.Data = []byte(strings.Replace(string(m.Data), `"done"`, `"audit"`, 1))
			rehash(m)
			return all
		})
		if v := verifyCopy(t, copied, broker.Head{}); v.Broken == nil || strings.Contains(v.Broken.What, "its hash is another") {
			t.Errorf("%+v", v.Broken)
		}
	})
	for _, c := range []struct {
		name   string
		remove func(i int, responder string) bool
	}{
		{"one of another", func(i int, _ string) bool { return i == 1 }},
		{"the oldest of another", func(i int, _ string) bool { return i == 0 }},
		{"the latest of another", func(_ int, r string) bool { return r == "delete-pod-last" }},
		{"the only one", func(_ int, r string) bool { return r == "isolate-pod" }},
		{"all of another", func(_ int, r string) bool { return strings.HasPrefix(r, "delete-pod") }},
		{"the oldest of the noisy one", func(i int, _ string) bool { return i == 6 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			copied := t.TempDir()
			if err := os.CopyFS(filepath.Join(copied, "store"), os.DirFS(filepath.Join(dir, "store"))); err != nil {
				t.Fatal(err)
			}
			rewrite(t, copied, func(all []*nats.Msg) []*nats.Msg {
				var out []*nats.Msg
				deletes := 0
				for i, m := range all {
					r := strings.TrimPrefix(m.Subject, broker.OutcomeSubject(""))
					if r == "delete-pod" {
						if deletes++; deletes == 5 {
							r += "-last"
						}
					}
					if !c.remove(i, r) {
						out = append(out, m)
					}
				}
				if len(out) == len(all) {
					t.Error("nothing is removed")
				}
				return out
			})
			if v := verifyCopy(t, copied, broker.Head{}); (v.Broken == nil) != (c.name == "the oldest of another") {
				t.Errorf("%+v, first %s", v.Broken, v.First)
			}
		})
	}
}

// The oldest go by their size: the journal then begins later, and says where.
func TestAJournalBeginsWhereItsLimitsSay(t *testing.T) {
	b := brokertest.Open(t, broker.Config{Dir: t.TempDir(), OutcomesSize: 200 << 10})
	var all []string
	for n := range 12 {
		all = append(all, fmt.Sprint("responder-", n))
	}
	for range 60 {
		say(t, b, all...)
	}
	v := whole(t, b, b.Journal())
	if v.First.N < 2 || v.Head.N != 720 || v.Dropped != 0 {
		t.Errorf("%+v", v)
	}
	if v := verify(t, b, broker.Head{N: 1, Hash: v.Head.Hash}); v.Broken == nil || !strings.Contains(v.Broken.What, "not in the journal any more") {
		t.Errorf("a head that is gone: %+v", v.Broken)
	}
}

// A store as a killed process leaves it: the journal goes on at its end.
func TestTheJournalOfAKilledProcess(t *testing.T) {
	dir, left := t.TempDir(), t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	say(t, b, "a", "b", "c")
	if err := os.CopyFS(filepath.Join(left, "store"), os.DirFS(filepath.Join(dir, "store"))); err != nil {
		t.Fatal(err)
	}
	again := brokertest.Open(t, broker.Config{Dir: left})
	say(t, again, "a", "d")
	if v := whole(t, again, b.Journal()); v.Outcomes != 5 || v.Head.N != 5 {
		t.Errorf("%+v", v)
	}
}

// What was written in memory, as the disk was full, is chained to what stood on the
// disk, and stays so when it is carried back.
func TestTheJournalOverAFullDisk(t *testing.T) {
	for _, moved := range []bool{false, true} {
		t.Run(fmt.Sprintf("moved=%t", moved), func(t *testing.T) {
			dir := t.TempDir()
			disk := openStore(t, broker.Config{Dir: dir})
			say(t, disk, "a", "b")
			head := disk.Journal()
			if moved { // the store took one that it did not acknowledge
				say(t, disk, "a")
			}
			disk.Close()

			memory := openStore(t, broker.Config{Dir: dir, Memory: true, Journal: head})
			say(t, memory, "a", "c", "a")
			if v := whole(t, memory, head); v.First.N != 3 || v.Head.N != 5 {
				t.Errorf("in memory: %+v", v)
			}
			between := memory.Journal()
			carried, err := memory.Records(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			memory.Close()

			disk = openStore(t, broker.Config{Dir: dir})
			for _, r := range carried {
				if err := disk.Carry(r); err != nil {
					t.Fatal(err)
				}
			}
			say(t, disk, "b")
			v := whole(t, disk, between)
			want := map[bool]int{false: 0, true: 1}[moved]
			if v.Carried != 3 || v.Seams != want || v.First.N != 1 || v.Outcomes != 6+want {
				t.Errorf("back on the disk: %+v", v)
			}
			disk.Close()
			rewrite(t, dir, func(all []*nats.Msg) []*nats.Msg {
				m := all[len(all)-2]
				m.Header.Set(broker.HeaderWas, strings.Replace(m.Header.Get(broker.HeaderWas), "5 ", "6 ", 1))
				rehash(m)
				return all
			})
			if v := verifyCopy(t, dir, broker.Head{}); v.Broken == nil || !strings.Contains(v.Broken.What, "is not what it was in memory") {
				t.Errorf("what it was is changed: %+v", v.Broken)
			}
		})
	}
}

// An append that the store refuses does not leave a hole: those after it are chained
// anew.
func TestARefusedAppendLeavesNoHole(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, broker.Config{Dir: dir})
	say(t, b, "a")
	js, err := jetstream.New(b.Conn())
	if err != nil {
		t.Fatal(err)
	}
	// One that the stream does not take, as a store may refuse one and take the next.
	s, err := js.Stream(t.Context(), broker.StreamOutcomes)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxMsgSize = 4096
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := b.PublishOutcome(broker.Outcome{ID: "x", Responder: "a", Reason: strings.Repeat("x", 5000)}); err == nil {
		t.Error("the stream took what is too large")
	}
	say(t, b, "a", "b")
	if v := whole(t, b, b.Journal()); v.Head.N != 3 {
		t.Errorf("%+v", v)
	}
	// Somebody else's messages: the sequences that were counted on are wrong.
	for range 30 {
		if _, err := js.Publish(t.Context(), broker.OutcomeSubject("b"), []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { say(t, b, "a") })
	}
	all.Wait()
	if v := verify(t, b, broker.Head{}); v.Head.N != 23 || v.Outcomes != 23 || v.Breaks != 1 {
		t.Errorf("%+v", v)
	}
	b.Close()
}

// A journal that begins after outcomes of an earlier version says how many those are.
func TestOutcomesFromBeforeTheJournal(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, broker.Config{Dir: dir})
	say(t, b, "a", "a", "a")
	b.Close()
	rewrite(t, dir, func(all []*nats.Msg) []*nats.Msg {
		for _, m := range all {
			m.Header = nil
		}
		return all
	})
	b = openStore(t, broker.Config{Dir: dir, ReadOnly: true})
	if err := b.State().Delete(context.Background(), "journal"); err != nil {
		t.Fatal(err)
	}
	b.Close()
	b = openStore(t, broker.Config{Dir: dir})
	say(t, b, "a", "a")
	if v := whole(t, b, b.Journal()); v.Unchained != 3 || v.Outcomes != 2 {
		t.Errorf("%+v", v)
	}
	b.Close()
}
