package responders

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"stoop/param"
)

func webhookCall() Entry {
	return Entry{
		Name: "webhook-call",
		Doc:  "Asks a function of yours, by an HTTP POST, to do something, and uses its answer.",
		Notes: `It is for functions behind an address: Knative, OpenFaaS, AWS Lambda function URLs, or
any program that listens ([functions.md](functions.md) has examples). It is posted the
JSON object that [call](#call) sends, or what body makes of it: JSON in whose texts
placeholders stand for parts of the object: ${id}, ${time}, ${rule} (stoop's), ${alert},
${alert.KEY} such as ${alert.rule}, ${fields.FIELD} such as ${fields.proc.name},
${target}, ${target.namespace} and so on, ${found}, ${found.RESPONDER.KEY}, ${node},
${cluster}, ${resumed}. One that is all of a text becomes the value itself, a number or
an object; within a text its text is put in; what is not there is null, or nothing. $${
stands for ${ itself. The body is read as JSON before anything is put in, so an alert
can't change its shape, whatever attackers wrote into it. A body has at most 4 MiB.

With 2xx the answer is taken as call's is: nothing, or a JSON object with status, reason
and found, in all at most 64 KiB, and any other is a failed step. 429 and 503 are tried
again after what Retry-After asks, other 5xx and timeouts with growing delays, for a
minute; any other answer fails at once. Redirects are not followed. So the function may
be asked twice for one step: the header Idempotency-Key is the step's id, the same in
each try.

The address is fixed in the rule; nothing of an alert gets into it or into a header.
With signingKey the header X-Stoop-Signature is t=TIME,v1=SIGNATURE: the time of the try
in seconds since 1970, and the hexadecimal HMAC-SHA256 of TIME, a dot and the body.
Whoever checks it should refuse a time that is older than some minutes. With http://
everybody on the way can read the alert and the headers. What the function does with
powers of its own no guard looks at, and stoop undo can't take back.`,
		Params:   param.Describe(webhookCallDefaults()),
		Kind:     Harm,
		Object:   NoObject,
		Deadline: time.Minute,
		Lane: func(raw json.RawMessage) string {
			p := webhookCallDefaults()
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return lane(string(p.URL))
		},
		New: func(env Env) Responder {
			return &webhookCaller{post: newPoster(env.HTTP), node: env.Node, cluster: env.Cluster}
		},
	}
}

type webhookCallParams struct {
	webhookParams
	Token   param.Secret   `param:"token" doc:"Where a bearer token is read, for the header Authorization."`
	Body    template       `param:"body" doc:"What is posted: JSON with placeholders. All of it, if left out."`
	Timeout param.Duration `param:"timeout" min:"100ms" max:"50s" doc:"How long the function has to answer."`
}

func webhookCallDefaults() webhookCallParams {
	return webhookCallParams{Timeout: param.Duration(10 * time.Second)}
}

// Validate refuses headers that are none, or not the rule's to set.
func (p webhookCallParams) Validate() error {
	for _, h := range p.Headers {
		if p.Token.IsSet() && textproto.CanonicalMIMEHeaderKey(h.Name) == "Authorization" {
			return errors.New("headers: Authorization is what token sets: leave one of them out")
		}
	}
	return p.webhookParams.Validate()
}

type webhookCaller struct {
	post          *poster
	node, cluster string
}

func (w *webhookCaller) Act(ctx context.Context, r *Request) (Result, error) {
	params := webhookCallDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	question := newQuestion(r, w.node, w.cluster)
	body, err := json.Marshal(question)
	if err != nil {
		return Result{}, Refuse("the alert is no JSON: %v", err)
	}
	if params.Body != "" {
		if body, err = params.Body.render(question.lookup); err != nil {
			return Result{}, Refuse("body: %v", err)
		}
	}
	header, err := params.header(r)
	if err != nil {
		return Result{}, err
	}
	if params.Token.IsSet() {
		token, err := params.Token.Resolve()
		if err == nil && !httpguts.ValidHeaderFieldValue(token) {
			err = errors.New("the secret holds a character that no header may")
		}
		if err != nil {
			return Result{}, Refuse("token: %v", err)
		}
		header.Set("Authorization", "Bearer "+token)
	}
	if params.SigningKey.IsSet() {
		key, err := params.SigningKey.Resolve()
		if err != nil {
			return Result{}, Refuse("signingKey: %v", err)
		}
		header.Set(signatureHeader, timedSignature(key, question.Time, body))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	answer, err := w.post.ask(ctx, string(params.URL), header, body, maxAnswer)
	if err != nil {
		return Result{}, err
	}
	host, _ := hostOf(string(params.URL))
	res, err := readAnswer(answer)
	if err != nil && !as[*refusal](err) {
		err = fmt.Errorf("post to %s: %w", strings.ToLower(host), err)
	}
	return res, err
}

// timedSignature is a signature that nobody can use again later.
func timedSignature(key string, now time.Time, body []byte) string {
	t := strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

// header is what a rule wants sent besides the body.
func (p *webhookParams) header(r *Request) (http.Header, error) {
	header := http.Header{"Idempotency-Key": {r.Step.ID}}
	for _, h := range p.Headers {
		value, err := h.Value.Resolve()
		if err != nil {
			return nil, Refuse("header %s: %v", h.Name, err)
		}
		if !httpguts.ValidHeaderFieldValue(value) {
			return nil, Refuse("header %s: its secret holds a character that no header may", h.Name)
		}
		header.Add(h.Name, value)
	}
	return header, nil
}
