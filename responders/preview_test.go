package responders

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// previewer is a stub that tells what it would change.
type previewer struct {
	*stub
	res Result
	err error
}

func (p *previewer) Preview(context.Context, *Request) (Result, error) { return p.res, p.err }

// Who is asked is told what would change. Nobody is asked about what would change
// nothing, or can't be done.
func TestWhoApprovesIsToldWhatWouldChange(t *testing.T) {
	for _, c := range []struct {
		name   string
		res    Result
		err    error
		status broker.Status
		says   string
	}{
		{"changes", Result{Reason: "would revoke: this and that"}, nil, broker.AwaitingApproval, "would revoke: this and that"},
		{"much", Result{Reason: strings.Repeat("x", changesMost+1)}, nil, broker.AwaitingApproval, strings.Repeat("x", changesMost) + "…"},
		{"nothing", Result{Nothing: true, Reason: "it has none"}, nil, broker.Nothing, "it has none"},
		{"refused", Result{}, Refuse("it is the cluster's own"), broker.Refused, "it is the cluster's own"},
		{"gone", Result{}, ErrGone, broker.Nothing, ""},
		{"away", Result{}, Retry(errors.New("the API server is away"), 0), broker.AwaitingApproval, "not known: the API server is away"},
	} {
		t.Run(c.name, func(t *testing.T) {
			act := &previewer{&stub{}, c.res, c.err}
			store := brokertest.New(t)
			b := newBench(t, store, entry("one", Harm, act))
			b.start()
			s := b.asking("one")
			b.publish(s)
			if c.status != broker.AwaitingApproval {
				if o := b.outcomes(1)[0]; o.Status != c.status || !strings.Contains(o.Reason, c.says) {
					t.Errorf("%s: %s", o.Status, o.Reason)
				}
				if waits := b.host.Approvals(); len(waits) > 0 {
					t.Errorf("waits: %+v", waits)
				}
				if err := store.State().Each(t.Context(), "approval.*", func(key string, _ []byte, _ time.Time) error { return errors.New(key + " is stored") }); err != nil {
					t.Error(err)
				}
			} else {
				if a := b.waits(s.ID); !strings.HasSuffix(a.Changes, c.says) {
					t.Errorf("%+v", a)
				}
				if o := b.outcomes(1)[0]; o.Found["changes"] == "" || len([]rune(o.Found["changes"])) > 501 {
					t.Errorf("%+v", o.Found)
				}
				b.stop()
				b.start()
				if a := b.waits(s.ID); !strings.HasSuffix(a.Changes, c.says) {
					t.Errorf("after a restart: %+v", a)
				}
			}
			if act.calls() != 0 {
				t.Error("it acted")
			}
		})
	}
}
