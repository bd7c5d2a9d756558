package responders_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
)

func TestWebhookCall(t *testing.T) {
	to := newAnswers(t, 200, nil, `{"reason":"done so"}`)
	r := entryOf(t, "webhook-call").New(responders.Env{Node: "node-1", Cluster: "prod"})
	req := notification(t, "webhook-call", fmt.Sprintf(`
url: %s/function
token: {file: %q}
headers: [{name: X-Api-Key, value: {file: %q}}]
signingKey: {file: %q}`, to.URL, secretFile(t, "t0ken\n"), secretFile(t, "api"), secretFile(t, "key")))
	req.Resumed = true
	res, err := r.Act(t.Context(), req)
	if err != nil || res.Reason != "done so" {
		t.Fatalf("%+v, %v", res, err)
	}
	for name, want := range map[string]string{
		"Authorization": "Bearer t0ken", "X-Api-Key": "api", "Content-Type": "application/json", "Idempotency-Key": req.Step.ID,
	} {
		if got := to.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	// As docs/functions.md says that it is checked.
	at, signature, ok := strings.Cut(strings.TrimPrefix(to.header.Get("X-Stoop-Signature"), "t="), ",v1=")
	seconds, err := strconv.ParseInt(at, 10, 64)
	mac := hmac.New(sha256.New, []byte("key"))
	mac.Write([]byte(at + "." + string(to.body)))
	if !ok || err != nil || time.Since(time.Unix(seconds, 0)).Abs() > time.Minute || signature != hex.EncodeToString(mac.Sum(nil)) {
		t.Errorf("the signature is %q", to.header.Get("X-Stoop-Signature"))
	}
	var got struct {
		ID, Rule, Node, Cluster string
		Target                  alert.Target
		Found                   []broker.Finding
		Resumed                 bool
	}
	if err := json.Unmarshal(to.body, &got); err != nil || got.ID != req.Step.ID || got.Rule != "tell" || got.Node != "node-1" ||
		got.Cluster != "prod" || got.Target != req.Target || len(got.Found) != 2 || !got.Resumed {
		t.Errorf("what was posted is %s (%v)", to.body, err)
	}
}

// Whatever an alert holds, it stays where the rule put it.
func TestWebhookCallBody(t *testing.T) {
	evil := `"}, "admin": true, "x": {"y": "${id} {{.ID}} $${rule}` + "\n\x00\u2028</script>"
	line, err := json.Marshal(map[string]any{
		"priority": "Critical", "rule": evil, "source": "syscall", "time": "2026-02-03T04:05:06.000000007Z", "output": "o",
		"tags":          []string{"a", evil},
		"output_fields": map[string]any{"proc.name": evil, "proc.aname[2]": "sh", "evt.time": json.Number("1770091506000000007"), "none": nil},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := alert.Parse(line)
	if err != nil {
		t.Fatal(err)
	}
	for body, want := range map[string]any{
		`{"a": "${alert.rule}", "b": 7, "c": [true, null, "text"]}`:                                               map[string]any{"a": evil, "b": json.Number("7"), "c": []any{true, nil, "text"}},
		`"rule ${rule} on ${node}: ${alert.rule}!"`:                                                               "rule tell on node-1: " + evil + "!",
		`{"n": "${fields.evt.time}", "t": "at ${fields.evt.time}"}`:                                               map[string]any{"n": json.Number("1770091506000000007"), "t": "at 1770091506000000007"},
		`["${fields.proc.aname[2]}", "${fields.proc.name}"]`:                                                      []any{"sh", evil},
		`["${fields.none}", "${fields.absent}", "${cluster}", "x${fields.none}${fields.absent}${alert.absent}y"]`: []any{nil, nil, nil, "xy"},
		`"${alert.tags}"`: []any{"a", evil},
		`"${target}"`:     map[string]any{"namespace": "shop", "pod": "web-0", "container": containerID("3ad7b26ded6d")},
		`["${target.namespace}", "${target.pid}", "${target.namespace}/${target.pod}"]`:                          []any{"shop", nil, "shop/web-0"},
		`["${found.capture-proc.evidence}", "${found.capture-proc.none}", "${found.freeze-container.evidence}"]`: []any{"/second", nil, nil},
		`"$${rule} costs $5 and $$${rule} or {rule} and $rule and {{.Rule}}"`:                                    "${rule} costs $5 and $${rule} or {rule} and $rule and {{.Rule}}",
	} {
		e := entryOf(t, "webhook-call")
		to := newAnswers(t, 200, nil, "")
		params, err := json.Marshal(map[string]string{"url": to.URL, "body": body})
		if err != nil {
			t.Fatal(err)
		}
		req := notification(t, "webhook-call", string(params))
		req.Alert, req.Step.Alert = a, a.Raw
		req.Step.Found = []broker.Finding{
			{Responder: "capture-proc", Found: map[string]string{"evidence": "/first"}},
			{Responder: "capture-proc", Found: map[string]string{"evidence": "/second"}},
		}
		if _, err := e.New(responders.Env{Node: "node-1"}).Act(t.Context(), req); err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		var got any
		d := json.NewDecoder(strings.NewReader(string(to.body)))
		d.UseNumber()
		if err := d.Decode(&got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s came out as %s (%v)", body, to.body, err)
		}
	}
}

// What Falco wrote need not be good JSON all through.
func TestWebhookCallBodyOfABadAlert(t *testing.T) {
	raw := []byte("{\"priority\":\"Critical\",\"rule\":\"r\",\"time\":\"2026-02-03T04:05:06Z\",\"output\":\"o\xff\",\"output_fields\":{\"a\":\"2\\ud800\"}}")
	a, err := alert.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	to := newAnswers(t, 200, nil, "")
	req := notification(t, "webhook-call", fmt.Sprintf(`{url: %q, body: '{"whole": "${alert}", "text": "${alert} ${fields.a}"}'}`, to.URL))
	req.Alert, req.Step.Alert = a, a.Raw
	if _, err := entryOf(t, "webhook-call").New(responders.Env{}).Act(t.Context(), req); err != nil || !json.Valid(to.body) {
		t.Errorf("%s: %v", to.body, err)
	}
}

func TestWebhookCallBodyThatGrows(t *testing.T) {
	line, err := json.Marshal(map[string]any{"priority": "Critical", "rule": "r", "time": "2026-02-03T04:05:06Z", "output": strings.Repeat("x", 100<<10)})
	if err != nil {
		t.Fatal(err)
	}
	a, err := alert.Parse(line)
	if err != nil {
		t.Fatal(err)
	}
	to := newAnswers(t, 200, nil, "")
	for _, body := range []string{
		`["` + strings.Repeat(`${alert}","`, 50) + `"]`,
		`"` + strings.Repeat(`${alert}`, 50) + `"`,
	} {
		req := notification(t, "webhook-call", fmt.Sprintf("{url: %q, body: %q}", to.URL, body))
		req.Alert, req.Step.Alert = a, a.Raw
		_, err := entryOf(t, "webhook-call").New(responders.Env{}).Act(t.Context(), req)
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "more than 4MiB") {
			t.Errorf("status %s: %s", status, reason)
		}
	}
	if to.n > 0 {
		t.Errorf("it was posted %d times", to.n)
	}
}

func TestWebhookCallParameters(t *testing.T) {
	const url = "url: https://example.com, "
	for params, want := range map[string]string{
		"{}":                       "url",
		"url: ftp://example.com":   "http",
		"{" + url + "method: GET}": "unknown parameter",
		"{" + url + "timeout: 2m}": "at most",
		"{" + url + "token: abc}":  "never written here",
		"{" + url + "token: {env: X}, headers: [{name: authorization, value: {env: X}}]}": "Authorization is what token sets",
		"{" + url + "headers: [{name: X-Stoop-Signature, value: {env: X}}]}":              "set by stoop",
		"{" + url + "body: 'x'}":                         "no JSON",
		"{" + url + "body: '{} {}'}":                     "one JSON value",
		"{" + url + "body: ' '}":                         "one JSON value",
		"{" + url + "body: '{\"a\": 1'}":                 "no JSON",
		"{" + url + "body: '{\"a\": 1, \"a\": 2}'}":      "no JSON",
		"{" + url + "body: '{\"${rule}\": 1}'}":          "the key",
		"{" + url + "body: '\"${rule\"'}":                "does not end",
		"{" + url + "body: '\"${}\"'}":                   "placeholder",
		"{" + url + "body: '\"${alrt.rule}\"'}":          `did you mean "alert"`,
		"{" + url + "body: '\"${rule.x}\"'}":             "no parts",
		"{" + url + "body: '\"${target.namspace}\"'}":    `did you mean "namespace"`,
		"{" + url + "body: '\"${fields}\"'}":             "name of a field",
		"{" + url + "body: '\"${found.capture-proc}\"'}": "a key of what it found",
		"{" + url + "body: '\"${alert.}\"'}":             "a key is missing",
		"{" + url + "body: '{\"a\": \"${alert}\", \"b\": [\"x ${fields.a.b[1]} ${found.run.x.y} $${z\"]}'}": "",
	} {
		if got := problems(t, entryOf(t, "webhook-call"), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}

// Redirects are not followed, a function that hangs is left, answers that may be
// others later are asked for again.
func TestWebhookCallAnswers(t *testing.T) {
	for code, again := range map[int]bool{302: false, 400: false, 401: false, 404: false, 408: true, 429: true, 500: true, 502: true, 503: true} {
		to := newAnswers(t, code, map[string]string{"Location": "http://127.0.0.1:1/"}, `{"status":"done"}`)
		_, err := entryOf(t, "webhook-call").New(responders.Env{}).Act(t.Context(), notification(t, "webhook-call", "url: "+to.URL+"/SECRET"))
		status, retry, _, reason := responders.Classify(err)
		if status != broker.Failed || retry != again || strings.Contains(reason, "SECRET") {
			t.Errorf("%d: status %s, retry %t: %s", code, status, retry, reason)
		}
	}
	release := make(chan struct{})
	for name, answer := range map[string]http.HandlerFunc{
		"before the answer": func(http.ResponseWriter, *http.Request) { <-release },
		"within the answer": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"status":`)
			w.(http.Flusher).Flush()
			<-release
		},
	} {
		s := httptest.NewServer(answer)
		began := time.Now()
		_, err := entryOf(t, "webhook-call").New(responders.Env{}).Act(t.Context(), notification(t, "webhook-call", "{url: "+s.URL+", timeout: 100ms}"))
		if _, retry, _, reason := responders.Classify(err); !retry || time.Since(began) > 5*time.Second {
			t.Errorf("%s: retry %t after %s: %s", name, retry, time.Since(began), reason)
		}
		t.Cleanup(s.Close)
	}
	close(release)
}

func FuzzTemplate(f *testing.F) {
	f.Add(`{"a": "${alert.rule} $${x} ${fields.a}"}`, `"}`)
	f.Add(`["${alert}", 1]`, "${rule}")
	f.Fuzz(func(t *testing.T, body, value string) {
		if responders.CheckBody(body) != nil {
			return
		}
		line, err := json.Marshal(map[string]any{
			"priority": "Critical", "rule": value, "time": "2026-02-03T04:05:06Z", "output": value, "output_fields": map[string]any{value: value, "a": value},
		})
		if err != nil {
			t.Fatal(err)
		}
		got, err := responders.Render(body, line)
		if err != nil {
			t.Fatalf("%q with %q: %v", body, value, err)
		}
		// Its shape is what the rule says, whatever the alert says.
		if plain, err := responders.Render(body, []byte(`{}`)); err != nil || !json.Valid(got) || !json.Valid(plain) || plain[0] != got[0] && !strings.Contains(body, "${") {
			t.Errorf("%q with %q came out as %q (%v)", body, value, got, err)
		}
	})
}
