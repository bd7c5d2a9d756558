package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/alert"
	"stoop/broker"
	"stoop/pipe"
	"stoop/responders"
)

// The requests of stoop.api.>, which the commands make, and any NATS client
// that is let in may.
const (
	apiPause   = "stoop.api.pause"
	apiPaused  = "stoop.api.paused"
	apiResume  = "stoop.api.resume"
	apiUndo    = "stoop.api.undo"
	apiApprove = "stoop.api.approve"
	apiDeny    = "stoop.api.deny"
	apiWaiting = "stoop.api.approvals"
	apiHistory = "stoop.api.history"
	apiVerify  = "stoop.api.verify"
	apiAlerts  = "stoop.api.alerts"
	apiPublish = "stoop.api.publish"
	apiWatch   = "stoop.api.watch"
	apiStatus  = "stoop.api.status"
)

// headerMore is on every answer to a history request but the last.
const headerMore = "Stoop-More"

// The headers of an answer with alerts: where the next page begins, 0 if there is
// none, and how many alerts follow.
const (
	headerNext = "Stoop-Next"
	headerLeft = "Stoop-Left"
)

// alertsRequest asks for a page of a stream of alerts, from a sequence or a time on.
type alertsRequest struct {
	Stream string    `json:"stream"`
	From   uint64    `json:"from,omitempty"`
	Since  time.Time `json:"since,omitzero"`
}

type undoRequest struct {
	ID  string `json:"id,omitempty"`
	All bool   `json:"all,omitempty"`
	// With All: only the steps of this rule, and those done since then.
	Rule  string    `json:"rule,omitempty"`
	Since time.Time `json:"since,omitzero"`
}

// decision names the step that is approved or denied.
type decision struct {
	ID string `json:"id"`
}

// undoneAll answers a request to take everything back.
type undoneAll struct {
	Outcomes []broker.Outcome `json:"outcomes"`
	More     int              `json:"more,omitempty"` // outcomes that did not fit in here
}

// undoneMost is how many outcomes one answer holds.
const undoneMost = 200

type historyRequest struct {
	Since time.Time `json:"since,omitzero"`
}

type publishAnswer struct {
	Stored int      `json:"stored"`
	Bad    []string `json:"bad,omitempty"` // why lines are no alerts
}

const (
	// apiTimeout bounds a request, apiMost how many are answered at once.
	apiTimeout = time.Minute
	apiMost    = 16
	// historyTimeout and historyMost are the same for reading the history, which
	// takes long: the asker waits no longer either.
	historyTimeout = askTimeout
	historyMost    = 4
	// alertsMost is how many pages of alerts are read at once: each is held in memory.
	alertsMost = 2
	// watchFor is how long verdicts are published after somebody asked.
	watchFor = 30 * time.Second
	// historyPage is how many outcomes one answer holds.
	historyPage = 200
)

// api answers requests.
type api struct {
	engine *engine
	broker *broker.Broker
	host   *responders.Host
	intake pipe.Store
}

// answer is a request's answer: a value, or an error.
type answer func(ctx context.Context, m *nats.Msg, actor string) (any, error)

// desk answers some of the requests, so many at a time. One that comes when it is
// busy is told so at once.
type desk struct {
	answers map[string]answer // by subject
	most    int
	timeout time.Duration
	busy    string
}

// desks are apart so that who reads much keeps nobody from publishing, and nobody
// keeps anybody from stopping stoop.
func (a *api) desks() []desk {
	busy := fmt.Sprintf("%d requests are being answered: ask again later", apiMost)
	return []desk{
		{map[string]answer{apiPause: a.pause, apiPaused: a.paused, apiResume: a.resume, apiUndo: a.undo, apiApprove: a.approve, apiDeny: a.deny, apiWaiting: a.waiting, apiStatus: a.status}, apiMost, apiTimeout, busy},
		{map[string]answer{apiPublish: a.publish, apiWatch: a.watch}, apiMost, apiTimeout, busy},
		{
			map[string]answer{apiHistory: a.history, apiVerify: a.verify},
			historyMost, historyTimeout,
			fmt.Sprintf("the history is being read %d times already: ask again in some seconds", historyMost),
		},
		{
			map[string]answer{apiAlerts: a.alerts},
			alertsMost, apiTimeout,
			fmt.Sprintf("alerts are being read %d times already: ask again later", alertsMost),
		},
	}
}

// serveAPI answers until stop is called, which waits for the requests that are
// being answered.
func serveAPI(ctx context.Context, e *engine, b *broker.Broker, h *responders.Host) (stop func(), err error) {
	a := &api{engine: e, broker: b, host: h, intake: e.store}
	return serveDesks(ctx, b, a.desks(), func(m *nats.Msg) string {
		if actor := e.local.Actor(m); actor != "" {
			return actor
		}
		return "a NATS client"
	})
}

func serveDesks(ctx context.Context, b *broker.Broker, desks []desk, actor func(*nats.Msg) string) (stop func(), err error) {
	nc, err := b.ConnectAPI()
	if err != nil {
		return nil, err
	}
	var running sync.WaitGroup
	for _, d := range desks {
		slots := make(chan struct{}, d.most)
		for subject, f := range d.answers {
			_, err := nc.Subscribe(subject, func(m *nats.Msg) {
				select {
				case slots <- struct{}{}:
				default:
					respond(m, nil, errors.New(d.busy))
					return
				}
				running.Go(func() {
					defer func() { <-slots }()
					ctx, cancel := context.WithTimeout(ctx, d.timeout)
					defer cancel()
					v, err := f(ctx, m, actor(m))
					respond(m, v, err)
				})
			})
			if err != nil {
				nc.Close()
				return nil, fmt.Errorf("answer %s: %w", subject, err)
			}
		}
	}
	if err := nc.Flush(); err != nil {
		nc.Close()
		return nil, fmt.Errorf("answer stoop.api: %w", err)
	}
	return func() {
		running.Wait()
		_ = nc.FlushTimeout(time.Second)
		nc.Close()
	}, nil
}

func respond(m *nats.Msg, v any, err error) {
	if m.Reply == "" {
		return
	}
	out := nats.NewMsg(m.Reply)
	if page, ok := v.(broker.KeptPage); ok && err == nil {
		out.Data = page.Append(nil)
		out.Header.Set(headerNext, strconv.FormatUint(page.Next, 10))
		out.Header.Set(headerLeft, strconv.FormatUint(page.Left, 10))
	} else if err == nil {
		out.Data, err = json.Marshal(v)
	}
	if err != nil {
		out.Header.Set(broker.HeaderError, err.Error())
	}
	_ = m.RespondMsg(out)
}

// pauses are this node's own pause, and the one of the whole cluster.
type pauses struct {
	responders.Pause
	Cluster *responders.PausedCluster `json:"cluster,omitempty"` // nil without a cluster
}

func (a *api) pause(ctx context.Context, _ *nats.Msg, actor string) (any, error) {
	p, err := a.host.SetPause(ctx, true, actor)
	return pauses{p, a.host.PausedCluster()}, err
}

func (a *api) paused(context.Context, *nats.Msg, string) (any, error) {
	return pauses{a.host.Paused(), a.host.PausedCluster()}, nil
}

func (a *api) resume(ctx context.Context, _ *nats.Msg, actor string) (any, error) {
	p, err := a.host.SetPause(ctx, false, actor)
	return pauses{p, a.host.PausedCluster()}, err
}

func (a *api) undo(ctx context.Context, m *nats.Msg, actor string) (any, error) {
	var r undoRequest
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return nil, fmt.Errorf("undo: %w", err)
	}
	if !r.All {
		return a.host.Undo(ctx, r.ID, actor)
	}
	all, err := a.host.UndoAll(ctx, r.Rule, r.Since, actor)
	n := min(len(all), undoneMost)
	return undoneAll{all[:n], len(all) - n}, err
}

func (a *api) approve(ctx context.Context, m *nats.Msg, actor string) (any, error) {
	return decide(ctx, m, actor, a.host.Approve)
}

func (a *api) deny(ctx context.Context, m *nats.Msg, actor string) (any, error) {
	return decide(ctx, m, actor, a.host.Deny)
}

func decide(ctx context.Context, m *nats.Msg, actor string, f func(ctx context.Context, id, actor string) (broker.Outcome, error)) (any, error) {
	var d decision
	if err := json.Unmarshal(m.Data, &d); err != nil {
		return nil, fmt.Errorf("the request is {\"id\": the step's}: %w", err)
	}
	return f(ctx, d.ID, actor)
}

// waitingMost is how many approvals one answer holds, and waitingBytes their size.
const (
	waitingMost  = 100
	waitingBytes = 512 << 10
)

// waiting answers which steps wait for approval.
func (a *api) waiting(context.Context, *nats.Msg, string) (any, error) {
	all := a.host.Approvals()
	out := waitingAnswer{}
	size := 0
	for i, w := range all {
		if size += len(w.Alert); i >= waitingMost || size > waitingBytes {
			out.More = len(all) - i
			break
		}
		out.Approvals = append(out.Approvals, w)
	}
	return out, nil
}

// waitingAnswer holds the steps that wait for approval, the oldest first.
type waitingAnswer struct {
	Approvals []responders.Approval `json:"approvals"`
	More      int                   `json:"more,omitempty"` // that did not fit in here
}

func (a *api) watch(context.Context, *nats.Msg, string) (any, error) {
	a.engine.router.Watch(watchFor)
	return struct{}{}, nil
}

// publish takes lines of alerts. From the network they count as HTTP without
// authentication does: a client may tell stoop what it saw, not make it act.
func (a *api) publish(ctx context.Context, m *nats.Msg, _ string) (any, error) {
	origin := broker.OriginOpenHTTP
	if a.engine.local.Actor(m) != "" {
		origin = broker.OriginLocal
	}
	var out publishAnswer
	var batch []broker.Arrival
	now := time.Now()
	for line := range bytes.Lines(m.Data) {
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		arrival := broker.Arrival{Received: now, Origin: origin}
		al, err := alert.Parse(line)
		if err != nil {
			out.Bad = append(out.Bad, err.Error())
			arrival.Unparsed = bytes.Clone(line[:min(len(line), pipe.MaxUnparsed)])
		}
		arrival.Alert = al
		batch = append(batch, arrival)
	}
	n, err := a.intake.Store(ctx, batch)
	if err != nil {
		return nil, fmt.Errorf("%d of %d alerts are stored: %w", n, len(batch), err)
	}
	out.Stored = n - len(out.Bad)
	return out, nil
}

// verify answers what verifying the journal came to.
func (a *api) verify(ctx context.Context, m *nats.Msg, _ string) (any, error) {
	var want broker.Head
	if len(m.Data) > 0 {
		if err := json.Unmarshal(m.Data, &want); err != nil {
			return nil, fmt.Errorf("the request is {}, or {\"n\": NUMBER, \"hash\": HASH} of a head that is to be contained: %w", err)
		}
	}
	return a.broker.Verify(ctx, want)
}

// alerts answers with a page of alerts.
func (a *api) alerts(ctx context.Context, m *nats.Msg, _ string) (any, error) {
	var r alertsRequest
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return nil, fmt.Errorf("alerts: %w", err)
	}
	page, err := a.broker.Kept(ctx, r.Stream, r.From, r.Since)
	if err != nil {
		return nil, err
	}
	return page, nil
}

// history answers in pages.
func (a *api) history(ctx context.Context, m *nats.Msg, _ string) (any, error) {
	var r historyRequest
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	var page []broker.Outcome
	err := a.broker.Outcomes(ctx, r.Since, func(o broker.Outcome) error {
		if page = append(page, o); len(page) < historyPage {
			return nil
		}
		data, err := json.Marshal(page)
		if err != nil {
			return err
		}
		page = page[:0]
		return m.RespondMsg(&nats.Msg{Subject: m.Reply, Data: data, Header: nats.Header{headerMore: {"1"}}})
	})
	return page, err
}

// askHistory asks a running stoop for its outcomes.
func askHistory(ctx context.Context, c *broker.Client, since time.Time, each func(broker.Outcome) error) error {
	sub, err := c.SubscribeSync(nats.NewInbox())
	if err != nil {
		return err
	}
	defer func() { _ = sub.Unsubscribe() }()
	data, err := json.Marshal(historyRequest{since})
	if err != nil {
		return err
	}
	if err := c.PublishMsg(&nats.Msg{Subject: apiHistory, Reply: sub.Subject, Data: data, Header: nats.Header{broker.HeaderSession: {c.Session}}}); err != nil {
		return fmt.Errorf("ask the running stoop: %w", err)
	}
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return fmt.Errorf("ask the running stoop: %w", err)
		}
		if e := m.Header.Get(broker.HeaderError); e != "" {
			return errors.New(e)
		}
		var page []broker.Outcome
		if err := json.Unmarshal(m.Data, &page); err != nil {
			return fmt.Errorf("answer of the running stoop: %w", err)
		}
		for _, o := range page {
			if err := each(o); err != nil {
				return err
			}
		}
		if m.Header.Get(headerMore) == "" {
			return nil
		}
	}
}

// watchTail keeps the running stoop publishing verdicts while ctx lasts.
func watchTail(ctx context.Context, c *broker.Client) error {
	tick := time.NewTicker(watchFor / 3)
	defer tick.Stop()
	for {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := c.Ask(ask, apiWatch, struct{}{}, nil)
		cancel()
		if err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
