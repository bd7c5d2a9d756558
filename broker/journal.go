package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// The headers that make OUTCOMES a journal: each outcome holds the hash of the one
// before it, so that none can be removed or changed without breaking the chain of
// all that follow.
const (
	// HeaderLink is "N PREV M N' PREV' ROOM": the outcome's number in the journal
	// and the hash of the one before; its number among those of its responder,
	// the journal's number and the hash of the one before of that responder; and
	// how many outcomes of one responder were kept when it was written. What is
	// not there is 0, and "-" as a hash.
	HeaderLink = "Stoop-Link"
	// HeaderLast is on every 64th: RESPONDER=N:HASH of the last outcome of each,
	// with a comma between.
	HeaderLast = "Stoop-Last"
	// HeaderWas is what link and hash were while the store was in memory, as the
	// disk was full: "LINK;LAST;HASH". Once for each time.
	HeaderWas = "Stoop-Was"
	// HeaderHash is the outcome's own hash: see [entry.sum].
	HeaderHash = "Stoop-Hash"
)

const (
	// lastEvery is how often an outcome names the last ones of all responders.
	lastEvery = 64
	// noteEvery is how often the journal's head is noted in STATE, if it moved,
	// and sayEvery how often it is logged.
	noteEvery = time.Second
	sayEvery  = 10 * time.Minute
	// keyJournal is the key of the head.
	keyJournal = "journal"
	// noHash stands where there is none before.
	noHash = "-"
)

// Head is a place in the journal, by number and hash. Who knows one, and keeps it
// elsewhere, sees whether the journal was cut or written anew before it.
type Head struct {
	N    uint64 `json:"n"`
	Hash string `json:"hash"` // SHA-256, in hexadecimal digits
}

func (h Head) String() string { return strconv.FormatUint(h.N, 10) + ":" + h.Hash }

// ParseHead reads what String wrote, or the hash alone: N is 0 then.
func ParseHead(s string) (Head, error) {
	var h Head
	n, hash, ok := strings.Cut(s, ":")
	if !ok {
		n, hash = "0", s
	}
	var err error
	if h.N, err = strconv.ParseUint(n, 10, 64); err == nil {
		_, err = hex.DecodeString(hash)
	}
	if h.Hash = strings.ToLower(hash); err != nil || len(h.Hash) != 2*sha256.Size || ok && h.N == 0 {
		return h, fmt.Errorf("%q is no head of a journal: it is NUMBER:HASH, or HASH, as stoop history --verify prints it", s)
	}
	return h, nil
}

// link is what ties an outcome to those before it.
type link struct {
	n    uint64 // in the journal, from 1
	prev string // the hash of the one before
	m    uint64 // among those of its responder, from 1
	own  Head   // the one before of its responder; N 0: none is known
	room int64  // how many of one responder are kept
}

func (l link) String() string {
	return fmt.Sprintf("%d %s %d %d %s %d", l.n, l.prev, l.m, l.own.N, l.own.Hash, l.room)
}

func parseLink(s string) (l link, err error) {
	f := strings.Fields(s)
	if len(f) != 6 {
		return l, fmt.Errorf("%q is no link", s)
	}
	number := func(s string) uint64 {
		n, e := strconv.ParseUint(s, 10, 63)
		err = errors.Join(err, e)
		return n
	}
	l = link{n: number(f[0]), prev: f[1], m: number(f[2]), own: Head{number(f[3]), f[4]}, room: int64(number(f[5]))}
	return l, err
}

// entry is an outcome as it stands in the journal.
type entry struct {
	subject string
	data    []byte
	link    string
	last    string
	was     []string
}

// sum is an entry's hash: of its link, its last, each was, its subject, each with a
// newline behind it, and its bytes.
func (e *entry) sum() string {
	h := sha256.New()
	for _, s := range [][]string{{e.link, e.last}, e.was, {e.subject}} {
		for _, s := range s {
			_, _ = io.WriteString(h, s+"\n")
		}
	}
	_, _ = h.Write(e.data)
	return hex.EncodeToString(h.Sum(nil))
}

func (e *entry) message(hash string, after uint64) *nats.Msg {
	m := &nats.Msg{Subject: e.subject, Data: e.data, Header: nats.Header{
		HeaderLink: {e.link}, HeaderHash: {hash},
		// Nobody else writes here, and what was refused is noticed at once.
		jetstream.ExpectedLastSeqHeader: {strconv.FormatUint(after, 10)},
	}}
	if e.last != "" {
		m.Header[HeaderLast] = []string{e.last}
	}
	if len(e.was) > 0 {
		m.Header[HeaderWas] = e.was
	}
	return m
}

// tip is the last outcome of a responder.
type tip struct {
	Head
	m uint64
}

// journal is where the chain goes on: the one place that appends to OUTCOMES, in
// the order of the stream.
type journal struct {
	mu    sync.Mutex
	seq   uint64         // the stream's last
	epoch int            // counts how often the stream was looked at anew
	head  Head           // of what was appended
	tips  map[string]tip // by subject
	room  int64

	stored Head // of what the store has acknowledged
	noted  Head // of what STATE has
	said   Head // of what was logged
}

// Record is an outcome on its way from one store to another.
type Record struct {
	Outcome Outcome
	data    []byte
	was     []string
}

// PublishOutcome stores an outcome, and returns when it is stored.
func (b *Broker) PublishOutcome(o Outcome) error { return b.Carry(Record{Outcome: o}) }

// Carry stores an outcome that another store held, and returns when it is stored.
func (b *Broker) Carry(r Record) error {
	e := entry{subject: OutcomeSubject(r.Outcome.Responder), data: r.data, was: r.was}
	var err error
	if e.data == nil {
		e.data, err = json.Marshal(r.Outcome)
	}
	// The store may refuse what is chained to one that it did not take.
	for try := 0; err == nil && try < 3; try++ {
		var ack jetstream.PubAckFuture
		var head Head
		var epoch int
		if ack, head, epoch, err = b.append(&e); err != nil {
			break
		}
		select {
		case <-ack.Ok():
			b.journal.acknowledged(head)
			return nil
		case err = <-ack.Err():
		case <-b.Failed():
			err = b.Err()
		}
		if isWrongLast(err) && try < 2 {
			ctx, cancel := b.bound(context.Background())
			err = b.journal.again(ctx, b, epoch)
			cancel()
		}
	}
	if IsStoreFault(err) || errors.Is(err, jetstream.ErrAsyncPublishTimeout) {
		b.fail(err)
	}
	return fmt.Errorf("store the outcome of step %s: %w", r.Outcome.ID, err)
}

func isWrongLast(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence
}

// append puts an entry at the end of the chain and sends it.
func (b *Broker) append(e *entry) (jetstream.PubAckFuture, Head, int, error) {
	j := &b.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	was := j.tips[e.subject]
	l := link{n: j.head.N + 1, prev: j.head.Hash, m: was.m + 1, own: was.Head, room: j.room}
	for _, h := range []*string{&l.prev, &l.own.Hash} {
		if *h == "" {
			*h = noHash
		}
	}
	e.link, e.last = l.String(), ""
	if l.n%min(lastEvery, uint64(max(1, j.room/2))) == 0 {
		e.last = j.lasts()
	}
	head := Head{l.n, e.sum()}
	ack, err := b.publishAsync(b.sound, b.js, e.message(head.Hash, j.seq))
	if err != nil {
		return nil, head, j.epoch, err
	}
	j.seq++
	j.head = head
	j.tips[e.subject] = tip{head, l.m}
	return ack, head, j.epoch, nil
}

func (j *journal) lasts() string {
	all := make([]string, 0, len(j.tips))
	for _, subject := range slices.Sorted(maps.Keys(j.tips)) {
		all = append(all, strings.TrimPrefix(subject, OutcomeSubject(""))+"="+j.tips[subject].String())
	}
	return strings.Join(all, ",")
}

func (j *journal) acknowledged(h Head) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if h.N > j.stored.N {
		j.stored = h
	}
}

// Journal is the head of what is stored.
func (b *Broker) Journal() Head {
	b.journal.mu.Lock()
	defer b.journal.mu.Unlock()
	return b.journal.stored
}

// again looks where the stream ends, for an append of that epoch was refused. All
// that were sent after it are refused as well.
func (j *journal) again(ctx context.Context, b *Broker, epoch int) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.epoch != epoch {
		return nil
	}
	return j.load(ctx, b)
}

// load reads where the stream ends. It is called with the lock held.
func (j *journal) load(ctx context.Context, b *Broker) error {
	s, err := b.js.Stream(ctx, StreamOutcomes)
	if err != nil {
		return fmt.Errorf("read the end of the journal: %w", err)
	}
	info := s.CachedInfo()
	j.seq, j.room = info.State.LastSeq, info.Config.MaxMsgsPerSubject
	j.epoch++
	j.head, j.tips = j.stored, map[string]tip{}
	if info.State.Msgs == 0 {
		return nil
	}
	c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy, HeadersOnly: true, InactiveThreshold: readerGone,
		FilterSubjects: []string{OutcomeSubject(">")},
	})
	if err == nil {
		err = b.drain(ctx, c, func(m jetstream.Msg) error {
			l, err := parseLink(m.Headers().Get(HeaderLink))
			if err != nil {
				return nil // from before there was a journal
			}
			h := Head{l.n, m.Headers().Get(HeaderHash)}
			j.tips[m.Subject()] = tip{h, l.m}
			if h.N > j.head.N {
				j.head = h
			}
			return nil
		})
	}
	if err != nil {
		return fmt.Errorf("read the end of the journal: %w", err)
	}
	return nil
}

// openJournal finds where the journal goes on: at the end of the stream, or where
// STATE says that it ended, so that what is missing in between stays missed.
func (b *Broker) openJournal(ctx context.Context) error {
	j := &b.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.load(ctx, b); err != nil {
		return err
	}
	var noted noted
	if _, err := b.state.Get(ctx, keyJournal, &noted); err != nil {
		return err
	}
	if noted.N > j.head.N || noted.N == j.head.N && noted.Head != j.head {
		if len(j.tips) > 0 || j.seq == 0 || time.Since(noted.Time) < b.cfg.OutcomesAge {
			b.log.Error("outcomes are missing at the end of the journal, or were changed: stoop history --verify", "head", noted.String(), "found", j.head.String())
		}
		j.head = noted.Head
	}
	if b.cfg.memory() && b.cfg.Journal.N > j.head.N {
		j.head = b.cfg.Journal
	}
	j.stored, j.noted, j.said = j.head, noted.Head, j.head
	return nil
}

// journalLoop notes and logs the journal's head every now and then, until ctx is
// done.
func (b *Broker) journalLoop(ctx context.Context) {
	note, say := time.NewTicker(noteEvery), time.NewTicker(sayEvery)
	defer note.Stop()
	defer say.Stop()
	for {
		select {
		case <-ctx.Done():
			b.noteJournal(context.WithoutCancel(ctx))
			b.sayJournal()
			return
		case <-note.C:
			b.noteJournal(ctx)
		case <-say.C:
			b.sayJournal()
		}
	}
}

func (b *Broker) noteJournal(ctx context.Context) {
	h := b.Journal()
	if h == b.journal.noted || b.Err() != nil {
		return
	}
	if err := b.state.Put(ctx, keyJournal, noted{h, time.Now().UTC()}, 0); err != nil {
		b.log.Warn("the journal's head could not be noted", "error", err)
		return
	}
	b.journal.noted = h
}

// sayJournal logs the head, for whoever collects logs elsewhere.
func (b *Broker) sayJournal() {
	if h := b.Journal(); h != b.journal.said {
		b.log.Info("the journal's head", "head", h.String())
		b.journal.said = h
	}
}

// entryOf reads a message of OUTCOMES; its hash is the one that it says of itself.
// link is "" if it has none.
func entryOf(m jetstream.Msg) (e entry, hash string) {
	h := m.Headers()
	return entry{subject: m.Subject(), data: m.Data(), link: h.Get(HeaderLink), last: h.Get(HeaderLast), was: h.Values(HeaderWas)}, h.Get(HeaderHash)
}

// Records are the outcomes of a store that is being left.
func (b *Broker) Records(ctx context.Context) ([]Record, error) {
	var all []Record
	err := b.outcomes(ctx, time.Time{}, func(m jetstream.Msg) error {
		r := Record{data: m.Data()}
		if err := json.Unmarshal(m.Data(), &r.Outcome); err != nil {
			return fmt.Errorf("read an outcome: %w", err)
		}
		e, hash := entryOf(m)
		r.was = append(e.was, strings.Join([]string{e.link, e.last, hash}, ";"))
		all = append(all, r)
		return nil
	})
	return all, err
}
