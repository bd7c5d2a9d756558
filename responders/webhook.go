package responders

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/textproto"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
)

// signatureHeader carries the HMAC of the body.
const signatureHeader = "X-Stoop-Signature"

func webhook() Entry {
	return Entry{
		Name: "webhook",
		Doc:  "Posts the alert, and what the steps before came to, as JSON to an address.",
		Notes: `The body is one JSON object: id (the step's, the same in each try, and in the header
Idempotency-Key too), time, rule (stoop's), alert (as Falco wrote it), target, found
(what the steps before came to), node, cluster. Attackers write parts of the alert:
whoever receives it must not trust it.

The address is fixed in the rule; nothing of an alert gets into it or into a header.
With signingKey the header X-Stoop-Signature is sha256= and the hexadecimal
HMAC-SHA256 of the body. Redirects are not followed. With http:// everybody on the
way can read the alert and the headers.

429 and 503 are tried again after what Retry-After asks (10 minutes at most), other
5xx and timeouts with growing delays; any other answer but 2xx fails at once.`,
		Params:   param.Describe(webhookParams{}),
		Kind:     Notification,
		Object:   NoObject,
		Deadline: 10 * time.Second,
		Lane: func(raw json.RawMessage) string {
			var p webhookParams
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return lane(string(p.URL))
		},
		New: func(env Env) Responder {
			return &webhookPoster{post: newPoster(env.HTTP), node: env.Node, cluster: env.Cluster}
		},
	}
}

type webhookParams struct {
	URL        param.URL       `param:"url" required:"true" doc:"The address, http or https."`
	Headers    []webhookHeader `param:"headers" doc:"Further headers, each as {name: NAME, value: {env: NAME}} or with {file: PATH}; their values are secrets."`
	SigningKey param.Secret    `param:"signingKey" doc:"Where the key is read that signs the body."`
}

type webhookHeader struct {
	Name  string       `param:"name" required:"true" doc:"The header's name."`
	Value param.Secret `param:"value" required:"true" doc:"Where its value is read."`
}

// Validate refuses headers that are none, or not the rule's to set.
func (p webhookParams) Validate() error {
	for _, h := range p.Headers {
		name := textproto.CanonicalMIMEHeaderKey(h.Name)
		switch {
		case !httpguts.ValidHeaderFieldName(h.Name):
			return fmt.Errorf("headers: %s is no name for a header", param.Cut(h.Name))
		case name == "Host", name == "Content-Type", name == "Content-Length", name == "Transfer-Encoding",
			name == "Connection", name == signatureHeader, name == "Idempotency-Key":
			return fmt.Errorf("headers: %s is set by stoop", name)
		}
	}
	return nil
}

// notice is what the webhook posts; file writes the same with a time of its own.
type notice struct {
	ID      string           `json:"id"`
	Time    time.Time        `json:"time,omitzero"`
	Rule    string           `json:"rule"`
	Alert   json.RawMessage  `json:"alert"`
	Target  alert.Target     `json:"target,omitzero"`
	Found   []broker.Finding `json:"found,omitempty"`
	Node    string           `json:"node,omitempty"`
	Cluster string           `json:"cluster,omitempty"`
	// Resumed says that an earlier run of the step was cut off, and may have asked.
	Resumed bool `json:"resumed,omitempty"`
}

func newNotice(r *Request, node, cluster string) notice {
	return notice{
		ID: r.Step.ID, Rule: r.Step.Rule, Alert: r.Step.Alert,
		Target: r.Target, Found: r.Step.Found, Node: node, Cluster: cluster,
	}
}

type webhookPoster struct {
	post          *poster
	node, cluster string
}

func (w *webhookPoster) Act(ctx context.Context, r *Request) (Result, error) {
	var params webhookParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	n := newNotice(r, w.node, w.cluster)
	n.Time = time.Now().UTC()
	body, err := json.Marshal(n)
	if err != nil {
		return Result{}, Refuse("the alert is no JSON: %v", err)
	}
	header, err := params.header(r)
	if err != nil {
		return Result{}, err
	}
	if params.SigningKey.IsSet() {
		key, err := params.SigningKey.Resolve()
		if err != nil {
			return Result{}, Refuse("signingKey: %v", err)
		}
		mac := hmac.New(sha256.New, []byte(key))
		mac.Write(body)
		header.Set(signatureHeader, "sha256="+hex.EncodeToString(mac.Sum(nil)))
	}
	if err := w.post.post(ctx, string(params.URL), header, body); err != nil {
		return Result{}, err
	}
	host, _ := hostOf(string(params.URL))
	return Result{Reason: "posted to " + strings.ToLower(host)}, nil
}
