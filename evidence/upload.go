package evidence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Bucket keeps copies of cases where this machine's root can't reach them.
type Bucket interface {
	// Put stores a file under a key, in the place of what is there. What it returns
	// may pass: it is tried again.
	Put(ctx context.Context, key string, o Object) error
	// String is where the bucket is. It holds no secret, and another one means
	// that everything has to be copied anew.
	String() string
}

// Object is a file for a [Bucket].
type Object struct {
	File   *os.File // at its beginning
	Size   int64
	SHA256 string // in hex
	JSON   bool
}

// upload is how far a case is that the bucket does not have.
type upload struct {
	tries  int
	first  time.Time // when it was tried first
	next   time.Time // it is not tried before
	gaveUp bool
}

const (
	// After a fault the next try is so long after, and twice as long each time.
	retryFirst = time.Second
	retryMost  = 5 * time.Minute
	// uploadFor is how long a case is tried for. The next start tries it again.
	uploadFor = 72 * time.Hour
	// retainEvery is how often it is looked for what is too old.
	retainEvery = 10 * time.Minute
	// A Put may take putLeast, and as long as its file takes at putRate bytes a
	// second.
	putLeast = time.Minute
	putRate  = 64 << 10
)

// errChanged says that a case is not as its manifest says: no bucket is to have it,
// as it would look whole there.
var errChanged = errors.New("it is not as its manifest says")

// Run copies finished cases to the bucket, one after the other, and takes away what
// is too old, until ctx is done. Nothing waits for it: what was not copied is found
// again in the folder, also by the next process.
func (s *Store) Run(ctx context.Context) {
	tick := time.NewTicker(retainEvery)
	defer tick.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var out outage
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		case <-tick.C:
		}
		s.retain(time.Now())
		if wait := s.uploadAll(ctx, &out); wait > 0 {
			timer.Reset(wait)
		}
	}
}

// outage is a time in which the bucket can't be reached.
type outage struct {
	tries  int
	next   time.Time
	gaveUp bool // it was said
}

// uploadAll tries what is due, and returns in how long the next will be; 0: there is
// none.
func (s *Store) uploadAll(ctx context.Context, out *outage) time.Duration {
	if s.cfg.Bucket == nil {
		return 0
	}
	for {
		if wait := time.Until(out.next); wait > 0 {
			return wait
		}
		step, u, wait := s.due()
		if u == nil {
			return wait
		}
		err := s.upload(ctx, step)
		if ctx.Err() != nil {
			return 0
		}
		s.settle(step, u, err, out)
	}
}

// due is the case to be uploaded now, the one that ended first, or in how long there
// is one.
func (s *Store) due() (step string, of *upload, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for id, u := range s.pending {
		switch {
		case u.gaveUp || s.open[id]:
		case u.next.After(now):
			if in := u.next.Sub(now); wait == 0 || in < wait {
				wait = in
			}
		case of == nil || s.ended[id].Before(s.ended[step]):
			step, of = id, u
		}
	}
	return step, of, wait
}

// settle notes what came of an upload.
func (s *Store) settle(step string, u *upload, err error, out *outage) {
	now := time.Now()
	s.mu.Lock()
	// Where it is another one, the case was changed or taken away meanwhile.
	same := s.pending[step] == u
	if same && err == nil {
		delete(s.pending, step)
	}
	waiting := len(s.pending)
	if err != nil {
		u.tries++
		if u.first.IsZero() {
			u.first = now
		}
		u.next = now.Add(s.backoff(u.tries))
		u.gaveUp = errors.Is(err, errChanged) || now.Sub(u.first) > uploadFor
	}
	s.mu.Unlock()
	switch {
	case err == nil:
		s.metrics.uploads.WithLabelValues("done").Inc()
		if out.tries > 0 {
			s.cfg.Log.Info("evidence is copied to the bucket again", "bucket", s.cfg.Bucket.String(), "waiting", waiting)
		}
		*out = outage{}
		return
	case !same:
		return
	case errors.Is(err, errChanged):
		s.metrics.uploads.WithLabelValues("given_up").Inc()
		s.cfg.Log.Error("evidence was changed since it was kept, and is not copied to the bucket", "step", step, "error", err)
		return
	case u.gaveUp:
		s.metrics.uploads.WithLabelValues("given_up").Inc()
		if !out.gaveUp {
			s.cfg.Log.Error("evidence could not be copied to the bucket for long: it stays on this disk, and the next start tries it again", "step", step, "tried", uploadFor.String())
		}
		out.gaveUp = true
	default:
		s.metrics.uploads.WithLabelValues("failed").Inc()
	}
	if out.tries++; out.tries == 1 {
		s.cfg.Log.Warn("evidence can't be copied to the bucket; trying on", "bucket", s.cfg.Bucket.String(), "step", step, "waiting", waiting, "error", err)
	}
	out.next = now.Add(s.backoff(out.tries))
}

func (s *Store) backoff(tries int) time.Duration {
	d := s.retryMost
	if tries < 20 {
		d = min(s.retryFirst<<(tries-1), s.retryMost)
	}
	return d - d/5 + rand.N(2*d/5+1)
}

// upload copies a case: the pieces, and after them the manifest, so that a case with
// a manifest is whole.
func (s *Store) upload(ctx context.Context, step string) error {
	m, err := s.manifest(step)
	if err != nil {
		return fmt.Errorf("%w: %w", errChanged, err)
	}
	for _, p := range m.Pieces {
		if p.SHA256 == "" {
			continue
		}
		if err := s.put(ctx, step, p.Name, p.SHA256); err != nil {
			return err
		}
	}
	_, sum, err := s.hash(ctx, step, manifestName)
	if err != nil {
		return fmt.Errorf("%w: %w", errChanged, err)
	}
	if err := s.put(ctx, step, manifestName, sum); err != nil {
		return err
	}
	if err := s.markUploaded(step, sum); err != nil {
		s.cfg.Log.Warn("that the bucket has a case could not be noted: the next start copies it again", "step", step, "error", err)
	}
	return nil
}

// put copies one file, which must have the hash.
func (s *Store) put(ctx context.Context, step, name, sum string) error {
	size, is, err := s.hash(ctx, step, name)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("%w: %w", errChanged, err)
	case is != sum:
		return fmt.Errorf("%w: %s has the SHA-256 %s, it had %s", errChanged, name, is, sum)
	}
	f, err := s.file(step, name)
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, putLeast+time.Duration(size/putRate)*time.Second)
	defer cancel()
	key := fileName(s.cfg.Node) + "/" + step + "/" + name
	if err := s.cfg.Bucket.Put(ctx, key, Object{File: f, Size: size, SHA256: sum, JSON: name == manifestName}); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	s.metrics.uploaded.Add(float64(size))
	return nil
}

// mark is what the file in a case says that the bucket has.
type mark struct {
	To       string    `json:"to"`
	Manifest string    `json:"manifestSHA256"`
	At       time.Time `json:"at"`
}

func (s *Store) markUploaded(step, sum string) error {
	b, err := json.Marshal(mark{s.cfg.Bucket.String(), sum, time.Now().UTC()})
	if err != nil {
		return err
	}
	had := s.marked(step)
	temp := path(step, partial+uploadedName)
	if err := s.root.WriteFile(temp, append(b, '\n'), 0o600); err != nil {
		return errors.Join(err, s.root.RemoveAll(temp))
	}
	if err := s.root.Rename(temp, path(step, uploadedName)); err != nil {
		return err
	}
	if !had {
		s.count(block)
	}
	return nil
}

func (s *Store) marked(step string) bool {
	_, err := s.root.Lstat(path(step, uploadedName))
	return err == nil
}

// uploaded reports whether this bucket has a case as it is now.
func (s *Store) uploaded(step string) bool {
	m, err := s.mark(step)
	return err == nil && m.To == s.cfg.Bucket.String() && s.Copied(step)
}

func (s *Store) mark(step string) (m mark, err error) {
	f, err := s.file(step, uploadedName)
	if err != nil {
		return m, err
	}
	defer f.Close()
	return m, json.NewDecoder(io.LimitReader(f, block)).Decode(&m)
}

// forgetUpload is for a case that is about to change.
func (s *Store) forgetUpload(step string) error {
	if !s.marked(step) {
		return nil
	}
	err := s.root.Remove(path(step, uploadedName))
	if err == nil {
		s.count(-block)
	}
	return err
}

// finished has a case uploaded, and taken away when it is old.
func (s *Store) finished(m Manifest) {
	s.mu.Lock()
	s.ended[m.Step] = m.Ended
	if s.cfg.Bucket != nil {
		s.pending[m.Step] = &upload{}
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// retain takes away the cases that are too old, save those that the bucket still has
// to get.
func (s *Store) retain(now time.Time) {
	if s.cfg.Age <= 0 {
		return
	}
	s.mu.Lock()
	var old []string
	for step, ended := range s.ended {
		if now.Sub(ended) > s.cfg.Age && s.pending[step] == nil && !s.open[step] {
			old = append(old, step)
		}
	}
	s.mu.Unlock()
	slices.Sort(old)
	removed := 0
	var errs []error
	for _, step := range old {
		if s.cfg.Needed != nil && s.cfg.Needed(step) {
			continue
		}
		if err := s.Remove(step); err != nil {
			errs = append(errs, err)
			continue
		}
		removed++
	}
	s.metrics.removed.Add(float64(removed))
	if removed > 0 {
		s.cfg.Log.Info("evidence that was too old was taken away", "cases", removed, "age", s.cfg.Age.String())
	}
	if err := errors.Join(errs...); err != nil {
		s.cfg.Log.Error("evidence that is too old could not be taken away", "cases", len(errs), "error", err)
	}
}

// metrics are what the store counts.
type metrics struct {
	uploads           *prometheus.CounterVec
	uploaded, removed prometheus.Counter
}

func newMetrics(s *Store, r prometheus.Registerer) *metrics {
	m := &metrics{
		uploads:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stoop_evidence_uploads_total", Help: "Tries to copy a case of evidence to the bucket, by result."}, []string{"result"}),
		uploaded: prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_evidence_uploaded_bytes_total", Help: "Bytes that were copied to the bucket."}),
		removed:  prometheus.NewCounter(prometheus.CounterOpts{Name: "stoop_evidence_removed_total", Help: "Cases of evidence that were taken away since they were too old."}),
	}
	if r == nil {
		return m
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return value()
		})
	}
	r.MustRegister(m.uploads, m.uploaded, m.removed,
		gauge("stoop_evidence_bytes", "What all evidence takes of the disk.", func() float64 { return float64(s.used) }),
		gauge("stoop_evidence_cases", "Cases of evidence on the disk.", func() float64 { return float64(len(s.cases)) }),
		gauge("stoop_evidence_pending", "Finished cases that the bucket does not have yet.", func() float64 { return float64(len(s.pending)) }),
	)
	return m
}
