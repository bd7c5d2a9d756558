package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"stoop/alert"
)

// lastMost is how many alerts are looked at from the end, for one that came from
// Falco.
const lastMost = 20

// LastAlert is the alert that was stored last, of those that stoop did not raise
// itself; nil: there is none, or not among the last.
func (b *Broker) LastAlert(ctx context.Context) (*Arrival, error) {
	var last *Arrival
	for _, l := range b.lanes {
		s, err := b.js.Stream(ctx, l.name)
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", l.name, err)
		}
		st := s.CachedInfo().State
		for seq, n := st.LastSeq, 0; seq >= st.FirstSeq && seq > 0 && n < lastMost; seq, n = seq-1, n+1 {
			m, err := s.GetMsg(ctx, seq)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read the last alert of %s: %w", l.name, err)
			}
			if m.Header.Get(HeaderID) == "" || Origin(m.Header.Get(HeaderOrigin)) == OriginStoop {
				continue
			}
			a, err := alert.Parse(m.Data)
			if err != nil {
				continue
			}
			got := receivedAt(m.Header, m.Time)
			if last == nil || got.After(last.Received) {
				last = &Arrival{Alert: a, Received: got, Origin: Origin(m.Header.Get(HeaderOrigin))}
			}
			break
		}
	}
	return last, nil
}
