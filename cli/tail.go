package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"stoop/alert"
	"stoop/broker"
	"stoop/router"
)

func (p *program) tailCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "tail [alerts|outcomes]",
		Short: "Follow alerts and outcomes as they come",
		Long: `Shows each alert as it comes, which rules it matched and which steps follow, or
why nothing does, and each step's outcome. It ends with Ctrl-C.`,
		Example:   "  stoop tail\n  stoop tail outcomes -o json",
		ValidArgs: []string{"alerts", "outcomes"},
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
	}
	data := dataFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		c, err := broker.Dial(*data)
		if err != nil {
			return err
		}
		defer c.Close()
		what := ""
		if len(args) == 1 {
			what = args[0]
		}
		return p.tail(cmd.Context(), c, what, output == "json")
	}
	return cmd
}

func (p *program) tail(ctx context.Context, c *broker.Client, what string, asJSON bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.SetClosedHandler(func(*nats.Conn) { cancel(errors.New("the running stoop has stopped")) })
	msgs := make(chan *nats.Msg, 4096)
	for _, s := range []struct{ subject, kind string }{
		{router.SubjectTail, "alerts"}, {alert.UnparsedSubject, "alerts"}, {"stoop.outcomes.>", "outcomes"},
	} {
		if what != "" && what != s.kind {
			continue
		}
		if _, err := c.ChanSubscribe(s.subject, msgs); err != nil {
			return fmt.Errorf("follow %s: %w", s.kind, err)
		}
	}
	watching := make(chan error, 1)
	go func() { watching <- watchTail(ctx, c) }()
	if !asJSON {
		fmt.Fprintln(p.stderr, "following; Ctrl-C ends it")
	}
	for {
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		case err := <-watching:
			if err != nil {
				return err
			}
		case m := <-msgs:
			switch {
			case m.Subject == alert.UnparsedSubject:
				if !asJSON {
					p.showUnparsed(m.Data)
				}
			case asJSON:
				fmt.Fprintf(p.stdout, "%s\n", bytes.TrimSpace(m.Data))
			case m.Subject == router.SubjectTail:
				p.showVerdict(m.Data)
			default:
				p.showOutcome(m.Data)
			}
		}
	}
}

func (p *program) showVerdict(data []byte) {
	var v router.Verdict
	if json.Unmarshal(data, &v) != nil {
		return
	}
	rule := v.Rule
	if rule == "" {
		rule = cut(v.Output, 200)
	}
	what := clean(rule)
	if v.Pod != "" && v.Pod != "/" {
		what += "  " + clean(v.Pod)
	}
	p.entry(fmt.Sprintf("%s  alert    %-9s ", v.Time.Local().Format("15:04:05.000"), cut(v.Priority, 9)), what)
	for _, m := range v.Matched {
		p.entry("              steps    ", fmt.Sprintf("%s: %s (%s)", m.Rule, strings.Join(m.Steps, ", "), m.Mode))
	}
	for _, w := range v.Waits {
		p.entry("              waits    ", w.Rule+": "+clean(w.Why))
	}
	if len(v.Matched) == 0 && len(v.Waits) == 0 {
		p.entry("              nothing  ", clean(v.Why))
	}
}

func (p *program) showUnparsed(line []byte) {
	p.entry(time.Now().Format("15:04:05.000")+"  no alert ", clean(string(line[:min(len(line), 200)])))
}

// entry prints an entry of tail. A text that does not fit the terminal goes on
// below its own beginning.
func (p *program) entry(head, text string) {
	under := strings.Repeat(" ", utf8.RuneCountInString(head))
	for _, part := range wrap(text, width(p.stdout)-len(under)) {
		fmt.Fprintln(p.stdout, head+part)
		head = under
	}
}

func (p *program) showOutcome(data []byte) {
	var o broker.Outcome
	if json.Unmarshal(data, &o) != nil {
		return
	}
	what := fmt.Sprintf("%s: %s", o.Responder, o.Status)
	if t := targetText(o); t != "" {
		what += "  " + t
	}
	if o.Took.Done > 0 {
		what += "  " + tookText(o)
	}
	head := o.Time.Local().Format("15:04:05.000") + "  outcome  "
	p.entry(head, what)
	if o.Reason != "" {
		p.entry(strings.Repeat(" ", len(head)), clean(o.Reason))
	}
}

func targetText(o broker.Outcome) string {
	t := o.Target
	switch {
	case t.Pod != "" && t.Namespace != "":
		return clean(t.Namespace + "/" + t.Pod)
	case t.Pod != "":
		return clean(t.Pod)
	case t.Container != "":
		return "container " + clean(t.Container[:min(12, len(t.Container))])
	case t.Resource != nil:
		return clean(strings.Trim(t.Resource.Resource+" "+t.Resource.Namespace+"/"+t.Resource.Name, "/"))
	case t.Host:
		return "the host"
	}
	return ""
}

// tookText is how long a step took from the alert's arrival.
func tookText(o broker.Outcome) string {
	d := time.Duration(o.Took.Done) * time.Microsecond
	switch {
	case d == 0:
		return ""
	case d < 10*time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(100 * time.Millisecond).String()
}
