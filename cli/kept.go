package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"stoop/broker"
)

// keptAlerts reads the alerts that are kept, from a running stoop or from a copy of
// the data folder.
type keptAlerts struct {
	page  func(ctx context.Context, stream string, from uint64, since time.Time) (broker.KeptPage, error)
	close func()
}

func openKept(ctx context.Context, data string) (*keptAlerts, error) {
	c, err := broker.Dial(data)
	if err == nil {
		var one sync.Mutex // a page at a time: there are others who ask
		return &keptAlerts{
			page: func(ctx context.Context, stream string, from uint64, since time.Time) (broker.KeptPage, error) {
				one.Lock()
				defer one.Unlock()
				return askAlerts(ctx, c, alertsRequest{Stream: stream, From: from, Since: since})
			},
			close: c.Close,
		}, nil
	}
	if !errors.Is(err, broker.ErrNotRunning) {
		return nil, err
	}
	b, done, err := openCopy(ctx, data, "history", broker.KeptStreams()...)
	if err != nil {
		return nil, err
	}
	return &keptAlerts{page: b.Kept, close: done}, nil
}

// askAlerts asks a running stoop for a page of alerts.
func askAlerts(ctx context.Context, c *broker.Client, r alertsRequest) (broker.KeptPage, error) {
	var p broker.KeptPage
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	m, err := c.Question(ctx, apiAlerts, r)
	if err != nil {
		return p, err
	}
	if p.Alerts, err = broker.ParseKept(m.Data); err != nil {
		return p, fmt.Errorf("answer of the running stoop: %w", err)
	}
	number := func(header string) uint64 {
		n, nerr := strconv.ParseUint(m.Header.Get(header), 10, 64)
		err = errors.Join(err, nerr)
		return n
	}
	p.Next, p.Left = number(headerNext), number(headerLeft)
	if err != nil {
		return p, fmt.Errorf("answer of the running stoop: %w", err)
	}
	return p, nil
}

// each hands every alert since a time to f once, in the order in which they arrived.
// all says that an alert is of the streams that hold every alert, and left how many
// are still to come, about.
func (k *keptAlerts) each(ctx context.Context, since time.Time, f func(a *broker.Kept, all bool, left uint64) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	streams := broker.KeptStreams()
	readers := make([]*keptReader, len(streams))
	for i, s := range streams {
		readers[i] = k.read(ctx, s, since)
	}
	defer func() {
		cancel()
		for _, r := range readers {
			for range r.pages { // until it has ended
			}
		}
	}()
	had := map[string]struct{}{}
	for {
		var next *keptReader
		var left uint64
		for _, r := range readers {
			a, err := r.peek()
			if err != nil {
				return err
			}
			if a == nil {
				continue
			}
			left += uint64(len(r.alerts)) + r.left
			if next == nil || a.Received.Before(next.alerts[0].Received) {
				next = r
			}
		}
		if next == nil {
			return nil
		}
		a := &next.alerts[0]
		next.alerts = next.alerts[1:]
		if _, twice := had[a.ID]; twice || a.Received.Before(since) {
			continue
		}
		had[a.ID] = struct{}{}
		if err := f(a, next.all, left); err != nil {
			return err
		}
	}
}

// keptReader reads one stream, a page ahead.
type keptReader struct {
	pages  chan keptRead
	alerts []broker.Kept
	left   uint64
	all    bool
}

type keptRead struct {
	broker.KeptPage
	err error
}

func (k *keptAlerts) read(ctx context.Context, stream string, since time.Time) *keptReader {
	r := &keptReader{pages: make(chan keptRead), all: stream == broker.StreamAlerts || stream == broker.StreamUrgent}
	go func() {
		defer close(r.pages)
		for from := uint64(0); ; {
			p, err := k.page(ctx, stream, from, since)
			select {
			case r.pages <- keptRead{p, err}:
			case <-ctx.Done():
				return
			}
			if from = p.Next; err != nil || from == 0 {
				return
			}
		}
	}()
	return r
}

// peek is the next alert, or nil when there is none.
func (r *keptReader) peek() (*broker.Kept, error) {
	for len(r.alerts) == 0 {
		p, ok := <-r.pages
		if !ok {
			return nil, nil
		}
		if p.err != nil {
			return nil, p.err
		}
		r.alerts, r.left = p.Alerts, p.Left
	}
	return &r.alerts[0], nil
}
