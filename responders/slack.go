package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"stoop/alert"
	"stoop/param"
)

func slack() Entry {
	return Entry{
		Name: "slack",
		Doc:  "Tells people in Slack, by an incoming webhook, what happened and what was done.",
		Notes: `The webhook's address is a secret: give it by file or environment, never in
rules.yaml. By default it is read from SLACK_WEBHOOK_URL. Put the step behind those
that it should tell of: it says what the steps before it came to.

Only webhooks of the old kind heed channel; those of a Slack app are bound to one
channel, and it is then only a note. Attackers write parts of an alert: its text is
sent as plain text on one line, its &, < and > escaped, so that it mentions nobody,
and its addresses broken so that they are no links.

On 429 stoop waits as long as Slack asks; on 5xx and timeouts it tries again, so
that people may be told twice; any other answer fails at once.`,
		Params:   param.Describe(slackDefaults()),
		Kind:     Notification,
		Object:   NoObject,
		Deadline: 10 * time.Second,
		Lane:     slackLane,
		New: func(env Env) Responder {
			return &slackPoster{post: newPoster(env.HTTP), node: env.Node, cluster: env.Cluster}
		},
	}
}

type slackParams struct {
	URL     param.Secret `param:"url" doc:"Where the webhook's address is read."`
	Channel string       `param:"channel" doc:"The channel, such as #security, for webhooks that can choose it."`
}

func slackDefaults() slackParams {
	return slackParams{URL: param.Secret{Env: "SLACK_WEBHOOK_URL"}}
}

func slackLane(raw json.RawMessage) string {
	p := slackDefaults()
	_ = param.Decode(raw, &p) // Act says what is wrong with them
	address, err := p.URL.Resolve()
	if err != nil {
		address = ""
	}
	return lane(address, p.URL.String(), p.Channel)
}

type slackPoster struct {
	post          *poster
	node, cluster string
}

func (s *slackPoster) Act(ctx context.Context, r *Request) (Result, error) {
	params := slackDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	address, err := params.URL.Resolve()
	if err != nil {
		return Result{}, Refuse("no webhook address: %v", err)
	}
	body, err := json.Marshal(slackMessage{
		Text:    escapeSlack(s.text(r)),
		Channel: params.Channel,
		Parse:   "none",
	})
	if err != nil {
		return Result{}, err
	}
	if err := s.post.post(ctx, address, nil, body); err != nil {
		return Result{}, err
	}
	return Result{Reason: "told"}, nil
}

// slackMessage leaves nothing in a text for Slack to make something of.
type slackMessage struct {
	Text        string `json:"text"`
	Channel     string `json:"channel,omitempty"`
	Markdown    bool   `json:"mrkdwn"`
	LinkNames   bool   `json:"link_names"`
	Parse       string `json:"parse"`
	UnfurlLinks bool   `json:"unfurl_links"`
	UnfurlMedia bool   `json:"unfurl_media"`
}

// text is the message, a line for each thing: what, where, what was done, the
// alert's own words, and from whom.
func (s *slackPoster) text(r *Request) string {
	var b strings.Builder
	rule := r.Alert.Rule
	if rule == "" {
		rule = "an alert without a rule's name"
	}
	fmt.Fprintf(&b, "%s alert: %s\n", r.Alert.Priority, oneLine(rule, 200))
	fmt.Fprintf(&b, "on %s\n", oneLine(where(r.Target, s.node), 600))
	const most = 20
	for i, f := range r.Step.Found {
		if i == most {
			fmt.Fprintf(&b, "… and %d more\n", len(r.Step.Found)-most)
			break
		}
		fmt.Fprintf(&b, "%s: %s", f.Responder, f.Status)
		if f.Reason != "" {
			fmt.Fprintf(&b, " (%s)", oneLine(f.Reason, 300))
		}
		b.WriteByte('\n')
	}
	if r.Alert.Output != "" {
		fmt.Fprintf(&b, "Falco: %s\n", oneLine(r.Alert.Output, 1500))
	}
	fmt.Fprintf(&b, "stoop's rule %s, node %s", oneLine(r.Step.Rule, 100), s.node)
	if s.cluster != "" {
		fmt.Fprintf(&b, ", cluster %s", s.cluster)
	}
	if t := r.Alert.Time; !t.IsZero() {
		fmt.Fprintf(&b, ", %s", t.UTC().Format(time.RFC3339))
	}
	fmt.Fprintf(&b, ", alert %s", r.Step.AlertID)
	return b.String()
}

// where is a target in words.
func where(t alert.Target, node string) string {
	var parts []string
	switch {
	case t.Pod != "" && t.Namespace != "":
		parts = append(parts, "pod "+t.Namespace+"/"+t.Pod)
	case t.Pod != "":
		parts = append(parts, "pod "+t.Pod)
	case t.Host:
		parts = append(parts, "the host "+node)
	}
	if t.Container != "" {
		id := t.Container
		if len(id) > shortID {
			id = id[:shortID]
		}
		parts = append(parts, "container "+id)
	}
	if t.PID != 0 {
		parts = append(parts, fmt.Sprintf("process %d", t.PID))
	}
	if r := t.Resource; r != nil {
		name := r.Name
		if r.Namespace != "" {
			name = r.Namespace + "/" + name
		}
		parts = append(parts, r.Resource+" "+name)
	}
	if len(parts) == 0 {
		return "node " + node
	}
	return strings.Join(parts, ", ")
}

// escapeSlack escapes the three characters that Slack gives a meaning, and
// breaks what its programs make links of even so.
func escapeSlack(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "://", "[:]//").Replace(s)
}
