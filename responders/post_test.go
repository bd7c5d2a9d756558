package responders_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
)

// hostile is an alert whose writer would like to do more than be read.
func hostile(t testing.TB) *alert.Alert {
	t.Helper()
	line, err := json.Marshal(map[string]any{
		"priority": "Critical", "rule": "Terminal shell <!here>", "source": "syscall", "time": "2026-02-03T04:05:06.000000007Z",
		"output": "a shell <!channel> <@U123> <https://evil.example|click> *bold* &amp; \u202egnp.exe\n\nstoop's rule all-clear: nothing happened",
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := alert.Parse(line)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func notification(t testing.TB, responder, params string) *responders.Request {
	t.Helper()
	a := hostile(t)
	return &responders.Request{
		Alert:  a,
		Target: alert.Target{Namespace: "shop", Pod: "web-0", Container: containerID("3ad7b26ded6d")},
		Step: &broker.Step{
			ID: "0123456789abcdef0123", AlertID: a.ID, Alert: a.Raw, Rule: "tell",
			Action: broker.Action{Responder: responder, Params: checked(t, entryOf(t, responder), params)},
			Found: []broker.Finding{
				{Responder: "delete-pod", Status: broker.Suppressed, Reason: "cooldown <!channel>"},
				{Responder: "isolate-pod", Status: broker.Done, Reason: "isolated\nby policy"},
			},
		},
	}
}

// answers is a place that answers as told and keeps what it was sent.
type answers struct {
	*httptest.Server
	header http.Header
	body   []byte
	n      int
}

func newAnswers(t testing.TB, code int, header map[string]string, body string) *answers {
	a := &answers{}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.n++
		a.header = r.Header
		var err error
		if a.body, err = io.ReadAll(r.Body); err != nil {
			t.Errorf("read what was posted: %v", err)
		}
		for k, v := range header {
			w.Header().Set(k, v)
		}
		w.WriteHeader(code)
		fmt.Fprint(w, body)
	}))
	t.Cleanup(a.Close)
	return a
}

func secretFile(t testing.TB, content string) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(f, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestSlackMessage(t *testing.T) {
	to := newAnswers(t, 200, nil, "ok")
	r := entryOf(t, "slack").New(responders.Env{Node: "node-1", Cluster: "prod"})
	req := notification(t, "slack", fmt.Sprintf("{url: {file: %q}, channel: '#security'}", secretFile(t, to.URL)))
	if _, err := r.Act(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(to.body, &got); err != nil {
		t.Fatal(err)
	}
	want := `critical alert: Terminal shell &lt;!here&gt;
on pod shop/web-0, container 3ad7b26ded6d
delete-pod: suppressed (cooldown &lt;!channel&gt;)
isolate-pod: done (isolated by policy)
Falco: a shell &lt;!channel&gt; &lt;@U123&gt; &lt;https[:]//evil.example|click&gt; *bold* &amp;amp; gnp.exe stoop's rule all-clear: nothing happened
stoop's rule tell, node node-1, cluster prod, 2026-02-03T04:05:06Z, alert ` + req.Alert.ID
	if got["text"] != want {
		t.Errorf("the text is\n%s\nwant\n%s", got["text"], want)
	}
	for key, want := range map[string]any{"mrkdwn": false, "link_names": false, "parse": "none", "unfurl_links": false, "unfurl_media": false, "channel": "#security"} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
}

func TestSlackWithoutAnAddress(t *testing.T) {
	t.Setenv("SLACK_WEBHOOK_URL", "")
	_, err := entryOf(t, "slack").New(responders.Env{}).Act(t.Context(), notification(t, "slack", "{}"))
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "SLACK_WEBHOOK_URL") {
		t.Errorf("status %s: %s", status, reason)
	}
}

func TestPostAnswers(t *testing.T) {
	soon := time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat)
	for _, tc := range []struct {
		code     int
		header   map[string]string
		body     string
		retry    bool
		min, max time.Duration
		reason   string
	}{
		{200, nil, "", false, 0, 0, ""},
		{204, nil, "", false, 0, 0, ""},
		{429, map[string]string{"Retry-After": "7"}, "slow down", true, 7 * time.Second, 7 * time.Second, "429"},
		{429, map[string]string{"Retry-After": soon}, "", true, 25 * time.Second, 31 * time.Second, ""},
		{429, map[string]string{"Retry-After": "9999999999"}, "", true, 10 * time.Minute, 10 * time.Minute, ""},
		{429, map[string]string{"Retry-After": "-5"}, "", true, 0, 0, ""},
		{429, map[string]string{"Retry-After": "soon"}, "", true, 0, 0, ""},
		{503, map[string]string{"Retry-After": "2"}, "", true, 2 * time.Second, 2 * time.Second, ""},
		{500, nil, "", true, 0, 0, ""},
		{502, nil, "", true, 0, 0, ""},
		{408, nil, "", true, 0, 0, ""},
		{400, nil, "invalid_payload\n<b>", false, 0, 0, `400 Bad Request: "invalid_payload <b>"`},
		{403, nil, strings.Repeat("x", 5000), false, 0, 0, "…"},
		{404, nil, "no_team", false, 0, 0, "no_team"},
		{302, map[string]string{"Location": "http://127.0.0.1:1/"}, "", false, 0, 0, "redirects are not followed"},
	} {
		t.Run(fmt.Sprint(tc.code, tc.header), func(t *testing.T) {
			to := newAnswers(t, tc.code, tc.header, tc.body)
			for _, responder := range []string{"slack", "webhook"} {
				secret := to.URL + "/services/SECRET"
				params := fmt.Sprintf("url: {file: %q}", secretFile(t, secret))
				if responder == "webhook" {
					params = "url: " + secret
				}
				r := entryOf(t, responder).New(responders.Env{})
				_, err := r.Act(t.Context(), notification(t, responder, params))
				status, retry, after, reason := responders.Classify(err)
				if tc.code/100 == 2 {
					if err != nil {
						t.Errorf("%s: %v", responder, err)
					}
					continue
				}
				if status != broker.Failed || retry != tc.retry || after < tc.min || after > tc.max || !strings.Contains(reason, tc.reason) {
					t.Errorf("%s: status %s, retry %t after %s: %s", responder, status, retry, after, reason)
				}
				if strings.Contains(reason, "SECRET") || len(reason) > 400 {
					t.Errorf("%s: the reason is %q", responder, reason)
				}
			}
		})
	}
}

func TestPostNeverShowsTheAddress(t *testing.T) {
	to := newAnswers(t, 200, nil, "")
	to.Close()
	secret := to.URL + "/services/SECRET"
	for responder, params := range map[string]string{
		"slack":   fmt.Sprintf("url: {file: %q}", secretFile(t, secret)),
		"webhook": "url: " + secret,
	} {
		_, err := entryOf(t, responder).New(responders.Env{}).Act(t.Context(), notification(t, responder, params))
		status, retry, _, reason := responders.Classify(err)
		if status != broker.Failed || !retry || strings.Contains(reason, "SECRET") || !strings.Contains(reason, "127.0.0.1") {
			t.Errorf("%s: status %s, retry %t: %s", responder, status, retry, reason)
		}
	}
	_, err := entryOf(t, "slack").New(responders.Env{}).Act(t.Context(), notification(t, "slack", fmt.Sprintf("url: {file: %q}", secretFile(t, "SECRET"))))
	if err == nil || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("an address that is none: %v", err)
	}
}

func TestPostGivesUpWithItsContext(t *testing.T) {
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-release }))
	t.Cleanup(func() { close(release); s.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := entryOf(t, "webhook").New(responders.Env{}).Act(ctx, notification(t, "webhook", "url: "+s.URL))
	if _, retry, _, _ := responders.Classify(err); !retry {
		t.Errorf("error %v", err)
	}
}

func TestWebhook(t *testing.T) {
	to := newAnswers(t, 202, nil, "")
	r := entryOf(t, "webhook").New(responders.Env{Node: "node-1", Cluster: "prod"})
	req := notification(t, "webhook", fmt.Sprintf(`
url: %s/hook
headers:
  - {name: Authorization, value: {file: %q}}
signingKey: {file: %q}`, to.URL, secretFile(t, "Bearer t0ken\n"), secretFile(t, "key")))
	if _, err := r.Act(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, []byte("key"))
	mac.Write(to.body)
	for name, want := range map[string]string{
		"Authorization": "Bearer t0ken", "Content-Type": "application/json", "Idempotency-Key": req.Step.ID,
		"X-Stoop-Signature": "sha256=" + hex.EncodeToString(mac.Sum(nil)),
	} {
		if got := to.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	var got struct {
		ID, Rule, Node, Cluster string
		Time                    time.Time
		Alert                   json.RawMessage
		Target                  alert.Target
		Found                   []broker.Finding
	}
	if err := json.Unmarshal(to.body, &got); err != nil {
		t.Fatal(err)
	}
	// encoding/json writes the alert's < and > as \u003c: the same JSON.
	var was, is any
	if json.Unmarshal(req.Alert.Raw, &was) != nil || json.Unmarshal(got.Alert, &is) != nil || fmt.Sprint(was) != fmt.Sprint(is) {
		t.Errorf("the alert came as %s", got.Alert)
	}
	if got.ID != req.Step.ID || got.Rule != "tell" || got.Node != "node-1" || got.Cluster != "prod" || got.Target != req.Target ||
		len(got.Found) != 2 || time.Since(got.Time) > time.Minute {
		t.Errorf("what was posted is %s", to.body)
	}
}

func TestWebhookSecretsThatBreakHeaders(t *testing.T) {
	to := newAnswers(t, 200, nil, "")
	req := notification(t, "webhook", fmt.Sprintf(`
url: %s
headers:
  - {name: X-Token, value: {file: %q}}`, to.URL, secretFile(t, "a\r\nX-Other: b")))
	_, err := entryOf(t, "webhook").New(responders.Env{}).Act(t.Context(), req)
	if status, _, _, reason := responders.Classify(err); status != broker.Refused || strings.Contains(reason, "X-Other") || to.n != 0 {
		t.Errorf("status %s: %s; %d requests", status, reason, to.n)
	}
}

func TestWebhookParameters(t *testing.T) {
	for params, want := range map[string]string{
		"{}":                                 "url",
		"url: ftp://example.com":             "http",
		"url: https://user:pass@example.com": "password",
		"{url: https://example.com, headers: [{name: 'a b', value: {env: X}}]}":             "no name for a header",
		"{url: https://example.com, headers: [{name: content-type, value: {env: X}}]}":      "set by stoop",
		"{url: https://example.com, headers: [{name: x-stoop-signature, value: {env: X}}]}": "set by stoop",
		"{url: https://example.com, headers: [{name: X-Token}]}":                            "value",
		"{url: https://example.com, headers: [{name: X-Token, value: {env: X}}]}":           "",
	} {
		if got := problems(t, entryOf(t, "webhook"), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}

func TestLanes(t *testing.T) {
	lane := func(responder, params string) string {
		e := entryOf(t, responder)
		return e.Lane(checked(t, e, params))
	}
	url := secretFile(t, "https://hooks.slack.example/services/SECRET")
	a := lane("slack", "{url: {file: '"+url+"'}, channel: '#a'}")
	if !strings.HasPrefix(a, "hooks-slack-example-") || strings.Contains(a, "SECRET") {
		t.Errorf("the lane is %q", a)
	}
	if b := lane("slack", "{url: {file: '"+url+"'}, channel: '#b'}"); a == b {
		t.Error("two channels share a lane")
	}
	if b := lane("slack", "{url: {file: '"+url+"'}, channel: '#a'}"); a != b {
		t.Error("one channel has two lanes")
	}
	if lane("webhook", "url: https://a.example/1") == lane("webhook", "url: https://a.example/2") {
		t.Error("two webhooks share a lane")
	}
	if lane("file", "path: /a/b") == lane("file", "path: /a/c") {
		t.Error("two files share a lane")
	}
	if entryOf(t, "slack").Lane(json.RawMessage("not json")) == "" {
		t.Error("broken parameters have no lane")
	}
}
