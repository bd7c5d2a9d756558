package responders_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"stoop/alert"
	"stoop/broker"
	"stoop/broker/brokertest"
	"stoop/responders"
)

// answering is a broker with a program on functions.it, and what a call of it came
// to.
func answering(t *testing.T, f nats.MsgHandler) func(params string) (responders.Result, error) {
	t.Helper()
	b := brokertest.New(t)
	nc, err := b.Connect("function")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	if f != nil {
		if _, err := nc.Subscribe("functions.it", f); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	r := entryOf(t, "call").New(responders.Env{Node: "node-1", Cluster: "prod", Caller: b})
	return func(params string) (responders.Result, error) {
		return r.Act(t.Context(), notification(t, "call", params))
	}
}

func TestCallSendsAll(t *testing.T) {
	var body []byte
	act := answering(t, func(m *nats.Msg) { body = m.Data; _ = m.Respond([]byte(`{"reason":"locked","found":{"user":"u"}}`)) })
	res, err := act("subject: functions.it")
	if err != nil || res.Reason != "locked" || !maps.Equal(res.Found, map[string]string{"user": "u"}) || res.Nothing {
		t.Errorf("%+v, %v", res, err)
	}
	req := notification(t, "call", "subject: functions.it")
	var got struct {
		ID, Rule, Node, Cluster string
		Time                    time.Time
		Alert                   json.RawMessage
		Target                  alert.Target
		Found                   []broker.Finding
		Resumed                 *bool
	}
	if err := json.Unmarshal(body, &got); err != nil {
		t.Fatal(err)
	}
	var was, is any
	if json.Unmarshal(req.Alert.Raw, &was) != nil || json.Unmarshal(got.Alert, &is) != nil || fmt.Sprint(was) != fmt.Sprint(is) {
		t.Errorf("the alert came as %s", got.Alert)
	}
	if got.ID != req.Step.ID || got.Rule != "tell" || got.Node != "node-1" || got.Cluster != "prod" || got.Target != req.Target ||
		len(got.Found) != 2 || time.Since(got.Time) > time.Minute || got.Resumed != nil {
		t.Errorf("what was asked is %s", body)
	}
}

// What functions answer, by both ways.
func TestAnswers(t *testing.T) {
	many := map[string]string{}
	for i := range 65 {
		many[fmt.Sprint("k", i)] = "v"
	}
	tooMany, err := json.Marshal(map[string]any{"found": many})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		answer string
		status broker.Status
		reason string // a part of it
		found  map[string]string
	}{
		{``, broker.Done, "", nil},
		{" \n", broker.Done, "", nil},
		{`{}`, broker.Done, "", nil},
		{`{"status":"done","reason":"it is"}` + "\n", broker.Done, "it is", nil},
		{`{"status":"nothing","reason":"was so"}`, broker.Nothing, "was so", nil},
		{`{"status":"refused","reason":"not him","found":{"a.b/c:d-e_1":"x"}}`, broker.Refused, "refused: not him", map[string]string{"a.b/c:d-e_1": "x"}},
		{`{"status":"refused"}`, broker.Refused, "does not say why", nil},
		{`{"status":"failed","reason":"no such host","found":{"host":"h"}}`, broker.Failed, "failed: no such host", map[string]string{"host": "h"}},
		{`{"status":"failed"}`, broker.Failed, "does not say why", nil},
		{`{"reason":"two\nlines\u001b[2J and \u202eback"}`, broker.Done, "two lines [2J and back", nil},
		{`{"reason":"` + strings.Repeat("r", 10_000) + `"}`, broker.Done, "…", nil},
		// Nonsense, which must not count as a success.
		{`OK`, broker.Failed, `no JSON object: "OK"`, nil},
		{`"done"`, broker.Failed, "no JSON object", nil},
		{`[]`, broker.Failed, "no JSON object", nil},
		{`null`, broker.Failed, "no JSON object", nil},
		{`{`, broker.Failed, "unexpected EOF", nil},
		{`{} {}`, broker.Failed, "more behind", nil},
		{`{}x`, broker.Failed, "more behind", nil},
		{`{"error":"forbidden"}`, broker.Failed, `unknown field "error"`, nil},
		{`{"status":"undone"}`, broker.Failed, `"undone"`, nil},
		{`{"status":"retrying"}`, broker.Failed, `"retrying"`, nil},
		{`{"status":7}`, broker.Failed, "status", nil},
		{`{"found":{"n":7}}`, broker.Failed, "found", nil},
		{`{"found":["a"]}`, broker.Failed, "found", nil},
		{`{"found":{"a b":"x"}}`, broker.Failed, `the key "a b"`, nil},
		{`{"found":{"":"x"}}`, broker.Failed, `the key ""`, nil},
		{`{"found":{"` + strings.Repeat("k", 65) + `":"x"}}`, broker.Failed, "the key", nil},
		{string(tooMany), broker.Failed, "more than 64 entries", nil},
		{`{"found":{"a":"` + strings.Repeat("x", 64<<10) + `"}}`, broker.Failed, "more than 64KiB", nil},
		{"{}" + strings.Repeat(" ", 64<<10), broker.Failed, "more than 64KiB", nil},
	} {
		name := tc.answer
		if len(name) > 60 {
			name = name[:60]
		}
		t.Run(name, func(t *testing.T) {
			byNATS := answering(t, func(m *nats.Msg) { _ = m.Respond([]byte(tc.answer)) })
			to := newAnswers(t, 200, nil, tc.answer)
			byHTTP := entryOf(t, "webhook-call").New(responders.Env{})
			for way, act := range map[string]func() (responders.Result, error){
				"call": func() (responders.Result, error) { return byNATS("subject: functions.it") },
				"webhook-call": func() (responders.Result, error) {
					return byHTTP.Act(t.Context(), notification(t, "webhook-call", "url: "+to.URL))
				},
			} {
				res, err := act()
				status, retry, _, reason := responders.Classify(err)
				if err == nil {
					reason = res.Reason
				}
				if res.Nothing {
					status = broker.Nothing
				}
				if status != tc.status || retry || !strings.Contains(reason, tc.reason) || !maps.Equal(res.Found, tc.found) {
					t.Errorf("%s: status %s, retry %t, found %v: %s", way, status, retry, res.Found, reason)
				}
				if len(reason) > 1000 || strings.ContainsAny(reason, "\n\x1b\u202e") {
					t.Errorf("%s: the reason is %q", way, reason)
				}
			}
		})
	}
}

func TestCallsThatMayWorkLater(t *testing.T) {
	silent := func(*nats.Msg) {}
	for name, c := range map[string]struct {
		f    nats.MsgHandler
		want string
	}{
		"nobody is there": {nil, "nobody answers there"},
		"no answer":       {silent, "no answer in time"},
	} {
		began := time.Now()
		_, err := answering(t, c.f)("{subject: functions.it, timeout: 200ms}")
		status, retry, _, reason := responders.Classify(err)
		if status != broker.Failed || !retry || !strings.Contains(reason, c.want) || !strings.Contains(reason, "functions.it") || time.Since(began) > 5*time.Second {
			t.Errorf("%s: status %s, retry %t after %s: %s", name, status, retry, time.Since(began), reason)
		}
	}
	_, err := answering(t, func(m *nats.Msg) {
		_ = m.RespondMsg(&nats.Msg{Header: nats.Header{"Nats-Service-Error": {"out of \x1b[2J order"}, "Nats-Service-Error-Code": {"500"}}})
	})("subject: functions.it")
	if status, retry, _, reason := responders.Classify(err); status != broker.Failed || retry || !strings.Contains(reason, "out of") || strings.Contains(reason, "\x1b") {
		t.Errorf("a service's error: status %s, retry %t: %s", status, retry, reason)
	}
	_, err = entryOf(t, "call").New(responders.Env{}).Act(t.Context(), notification(t, "call", "subject: functions.it"))
	if status, _, _, reason := responders.Classify(err); status != broker.Refused {
		t.Errorf("without a server: status %s: %s", status, reason)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = entryOf(t, "call").New(responders.Env{Caller: brokertest.New(t)}).Act(ctx, notification(t, "call", "subject: functions.it"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
}

func TestCallParameters(t *testing.T) {
	for params, want := range map[string]string{
		"{}":                                   "subject",
		"subject: ''":                          "subject",
		"subject: falco.critical.forged":       "are taken",
		"subject: stoop.api.pause":             "are taken",
		"subject: $KV.STATE.pause":             "are taken",
		"subject: _INBOX.x":                    "are taken",
		"subject: functions.*":                 "wildcard",
		"subject: functions.>":                 "wildcard",
		"subject: a b":                         "is no subject",
		"{subject: functions.a, timeout: 1ms}": "at least",
		"{subject: functions.a, timeout: 1m}":  "at most",
		"subject: functions.a":                 "",
	} {
		if got := problems(t, entryOf(t, "call"), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
	e := entryOf(t, "call")
	lane := func(params string) string { return e.Lane(checked(t, e, params)) }
	if lane("subject: functions.a") == lane("subject: functions.b") || lane("subject: functions.a") != lane("{subject: functions.a, timeout: 1s}") {
		t.Error("a lane is not a subject's")
	}
}
