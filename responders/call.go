package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"stoop/broker"
	"stoop/param"
)

// Caller asks the program that answers on a NATS subject of the user's.
// [broker.ErrNobody] says that there is none.
type Caller interface {
	Call(ctx context.Context, subject string, data []byte) ([]byte, error)
}

func call() Entry {
	return Entry{
		Name: "call",
		Doc:  "Asks a program of yours, by a NATS request, to do something, and uses its answer.",
		Notes: `The program may be in any language and on any machine: it connects to stoop's NATS
server (broker.listen) as a user that is let answer on the subject, by serve in
broker.users, and on nothing else ([functions.md](functions.md) has examples). The
subject is one of your own, without wildcards; those that begin with falco, stoop, $ or
_ are taken.

It is sent one JSON object: id (the step's, the same in each try), time, rule (stoop's),
alert (as Falco wrote it), target, found (what the steps before came to), node, cluster,
and resumed: true when stoop was cut off in the middle of this step before. Attackers
write parts of the alert. It answers nothing, or a JSON object with status (done, the
default; nothing; refused; failed), reason (a sentence) and found (a map of texts, at
most 64, for the outcome and the later steps), in all at most 64 KiB. Any other answer
is a failed step that says so.

When nobody answers on the subject, or nobody does so within timeout, it is tried
again for a minute; what the program says itself is final. So it may be asked twice
for one step, also after a crash: let it go by id. Every program that subscribes is
asked, and the first answer counts; those that share the work join one queue group.
What it does with powers of its own stoop knows nothing of: no guard looks at it, but
those that were asked before the call, and stoop undo can't take it back.`,
		Params:   param.Describe(callDefaults()),
		Kind:     Harm,
		Object:   NoObject,
		Deadline: time.Minute,
		Lane: func(raw json.RawMessage) string {
			p := callDefaults()
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return lane("", string(p.Subject))
		},
		New: func(env Env) Responder {
			return &functionCaller{nats: env.Caller, node: env.Node, cluster: env.Cluster}
		},
	}
}

type callParams struct {
	Subject subject        `param:"subject" required:"true" doc:"Where the program answers, such as functions.block-user."`
	Timeout param.Duration `param:"timeout" min:"100ms" max:"50s" doc:"How long it has to answer."`
}

func callDefaults() callParams { return callParams{Timeout: param.Duration(10 * time.Second)} }

// subject is one of the user's own.
type subject string

// UnmarshalText refuses what a call would not get through to, or what would take
// it for something else.
func (s *subject) UnmarshalText(b []byte) error {
	if err := broker.CheckSubject(string(b)); err != nil {
		return err
	}
	*s = subject(b)
	return nil
}

type functionCaller struct {
	nats          Caller
	node, cluster string
}

func (c *functionCaller) Act(ctx context.Context, r *Request) (Result, error) {
	params := callDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if c.nats == nil {
		return Result{}, Refuse("there is no NATS server to ask on")
	}
	body, err := json.Marshal(newQuestion(r, c.node, c.cluster))
	if err != nil {
		return Result{}, Refuse("the alert is no JSON: %v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout))
	defer cancel()
	answer, err := c.nats.Call(ctx, string(params.Subject), body)
	switch {
	case err == nil:
	case errors.Is(err, broker.ErrNobody):
		return Result{}, Retry(fmt.Errorf("call %s: %w: is the program running, and let answer by serve in broker.users?", params.Subject, err), 0)
	case as[*broker.ServiceError](err):
		return Result{}, fmt.Errorf("call %s: %s", params.Subject, oneLine(err.Error(), maxAnswerReason))
	default:
		return Result{}, Retry(fmt.Errorf("call %s: %w", params.Subject, err), 0)
	}
	res, err := readAnswer(answer)
	if err != nil && !as[*refusal](err) {
		err = fmt.Errorf("call %s: %w", params.Subject, err)
	}
	return res, err
}

// newQuestion is what a function is asked.
func newQuestion(r *Request, node, cluster string) notice {
	n := newNotice(r, node, cluster)
	n.Time, n.Resumed = time.Now().UTC(), r.Resumed
	return n
}
