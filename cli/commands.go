package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"stoop/alert"
	"stoop/broker"
	"stoop/pipe"
	"stoop/responders"
	"stoop/router"
)

// dataFlag is the data folder that a command means.
func dataFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("data", defaults().Data, "the data `FOLDER` of the running stoop")
}

// askTimeout bounds a request to a running stoop.
const askTimeout = 30 * time.Second

func (p *program) holdCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hold PATH",
		Short: "Create the FIFO and keep it open",
		Long: `Creates the FIFO and keeps it open until it is told to stop, reading nothing. As
long as it does, stoop can restart and Falco notices nothing: what it writes
meanwhile waits in the pipe. Without anybody holding it, Falco's first write
would fail, and Falco would drop all later alerts in silence.`,
		Example: "  stoop hold /run/stoop/falco.pipe",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return pipe.Hold(cmd.Context(), args[0], p.logger(Log{}))
		},
	}
}

func (p *program) publishCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Hand alerts on standard input to a running stoop",
		Long: `Reads alerts on standard input and hands them to the stoop that runs on the data
folder. It ends with its input, when all of it is stored. It is for Falco's
program_output; a FIFO (file_output) is the better way where there is the choice.`,
		Example: "  # falco.yaml\n  program_output:\n    enabled: true\n    keep_alive: false\n    program: stoop publish",
		Args:    cobra.NoArgs,
	}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := broker.Dial(*data)
		if err != nil {
			return err
		}
		defer c.Close()
		return p.publish(cmd.Context(), c)
	}
	return cmd
}

// publishChunk is how much one request carries.
const publishChunk = 1 << 20

func (p *program) publish(ctx context.Context, c *broker.Client) error {
	bad := 0
	send := func(lines []byte) error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		m, err := c.RequestMsgWithContext(ctx, &nats.Msg{Subject: apiPublish, Data: lines, Header: nats.Header{broker.HeaderSession: {c.Session}}})
		if err != nil {
			return fmt.Errorf("hand alerts to the running stoop: %w", err)
		}
		if e := m.Header.Get(broker.HeaderError); e != "" {
			return fmt.Errorf("hand alerts to the running stoop: %s", e)
		}
		var a publishAnswer
		if err := json.Unmarshal(m.Data, &a); err != nil {
			return fmt.Errorf("answer of the running stoop: %w", err)
		}
		for _, why := range a.Bad {
			fmt.Fprintln(p.stderr, "stoop:", why)
		}
		bad += len(a.Bad)
		return nil
	}
	// What has come is sent at once: with keep_alive, the next alert may be
	// an hour away.
	r := bufio.NewReaderSize(p.stdin, 64<<10)
	var chunk []byte
	for {
		part, err := r.ReadSlice('\n')
		if chunk = append(chunk, part...); len(chunk) > 2*publishChunk {
			return fmt.Errorf("a line is longer than %d bytes", pipe.DefaultMaxLine)
		}
		end := errors.Is(err, io.EOF)
		if err != nil && !end && !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("read standard input: %w", err)
		}
		if whole := err == nil && (r.Buffered() == 0 || len(chunk) > publishChunk/2); whole || end && len(chunk) > 0 {
			if err := send(chunk); err != nil {
				return err
			}
			chunk = chunk[:0]
		}
		if end {
			break
		}
	}
	if bad > 0 {
		return errSilent
	}
	return nil
}

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
		rule = v.Output
	}
	line := fmt.Sprintf("%s  alert    %-9s %s", v.Time.Local().Format("15:04:05.000"), cut(v.Priority, 9), clean(rule))
	if v.Pod != "" && v.Pod != "/" {
		line += "  " + clean(v.Pod)
	}
	fmt.Fprintln(p.stdout, fit(line, width(p.stdout)))
	for _, m := range v.Matched {
		fmt.Fprintln(p.stdout, fit(fmt.Sprintf("              steps    %s: %s (%s)", m.Rule, strings.Join(m.Steps, ", "), m.Mode), width(p.stdout)))
	}
	if len(v.Matched) == 0 {
		fmt.Fprintln(p.stdout, fit("              nothing  "+clean(v.Why), width(p.stdout)))
	}
}

func (p *program) showUnparsed(line []byte) {
	s := fmt.Sprintf("%s  no alert %s", time.Now().Format("15:04:05.000"), clean(string(line[:min(len(line), 200)])))
	fmt.Fprintln(p.stdout, fit(s, width(p.stdout)))
}

func fit(s string, n int) string {
	if n > 20 {
		return cut(s, n)
	}
	return s
}

func (p *program) showOutcome(data []byte) {
	var o broker.Outcome
	if json.Unmarshal(data, &o) != nil {
		return
	}
	line := fmt.Sprintf("%s  outcome  %s: %s", o.Time.Local().Format("15:04:05.000"), o.Responder, o.Status)
	if t := targetText(o); t != "" {
		line += "  " + t
	}
	if o.Took.Done > 0 {
		line += "  " + tookText(o)
	}
	fmt.Fprintln(p.stdout, fit(line, width(p.stdout)))
	if o.Reason != "" {
		for _, part := range wrap(clean(o.Reason), width(p.stdout)-23) {
			fmt.Fprintln(p.stdout, strings.Repeat(" ", 23)+part)
		}
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

func (p *program) historyCommand() *cobra.Command {
	var output string
	var since time.Duration
	cmd := &cobra.Command{
		Use:   "history",
		Short: "Say what was done, to what, why, and how long it took",
		Long: `Lists the outcome of each step, oldest first. A step that was tried several times
is listed once, with how it ended. Without a running stoop it reads a copy of
the data folder.`,
		Example: "  stoop history --since 1h\n  stoop history -o json | jq 'select(.status==\"done\")'",
		Args:    cobra.NoArgs,
	}
	data := dataFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().DurationVar(&since, "since", 0, "only the last `DURATION`, such as 1h (default: all that is kept)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		var from time.Time
		if since > 0 {
			from = time.Now().Add(-since)
		}
		return p.history(cmd.Context(), *data, from, output == "json")
	}
	return cmd
}

func (p *program) history(ctx context.Context, data string, since time.Time, asJSON bool) error {
	var all []broker.Outcome
	at := map[string]int{} // where a step's outcome is in all
	each := func(o broker.Outcome) error {
		// One line a step: how it ended stands in the place of a try; that it
		// was taken back is a line of its own.
		key := o.ID
		if o.Actor != "" {
			key += "\x00" + o.Actor + string(o.Status)
		}
		if i, ok := at[key]; ok {
			all[i] = o
			return nil
		}
		at[key] = len(all)
		all = append(all, o)
		return nil
	}
	if err := readHistory(ctx, data, since, each); err != nil {
		return err
	}
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		for _, o := range all {
			if err := enc.Encode(o); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all) == 0 {
		fmt.Fprintln(out, "nothing was done, and nothing would have been")
		return nil
	}
	t := &table{head: []string{"TIME", "STATUS", "RESPONDER", "TARGET AND REASON"}}
	for _, o := range all {
		what := targetText(o)
		for _, part := range []string{tookText(o), "rule " + o.Rule, o.Reason} {
			if part != "" && part != "rule " {
				what = strings.TrimPrefix(what+"; "+part, "; ")
			}
		}
		if o.Actor != "" {
			what += "; by " + o.Actor
		}
		if o.Undo {
			what += "; undo: stoop undo " + o.ID
		}
		t.add(o.Time.Local().Format("01-02 15:04:05"), string(o.Status), o.Responder, what)
	}
	t.print(out, width(p.stdout))
	return nil
}

// readHistory asks the running stoop, or reads a copy of the data folder.
func readHistory(ctx context.Context, data string, since time.Time, each func(broker.Outcome) error) error {
	c, err := broker.Dial(data)
	if err == nil {
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		return askHistory(ctx, c, since, each)
	}
	if !errors.Is(err, broker.ErrNotRunning) {
		return err
	}
	store := filepath.Join(data, "store")
	if _, err := os.Stat(store); err != nil {
		return fmt.Errorf("%s holds no history: %w", data, err)
	}
	tmp, err := os.MkdirTemp("", "stoop-history-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.CopyFS(filepath.Join(tmp, "store"), os.DirFS(store)); err != nil {
		return fmt.Errorf("copy the data folder: %w", err)
	}
	b, err := broker.Open(ctx, broker.Config{Dir: tmp})
	if err != nil {
		return fmt.Errorf("read a copy of %s: %w", data, err)
	}
	defer b.Close()
	return b.Outcomes(ctx, since, each)
}

// ask is a command that asks the running stoop one thing.
func (p *program) ask(cmd *cobra.Command, data, subject string, in, out any) error {
	c, err := broker.Dial(data)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), askTimeout)
	defer cancel()
	return c.Ask(ctx, subject, in, out)
}

func (p *program) undoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "undo ID",
		Short:   "Take a step back",
		Long:    "Takes a step back: the isolation, the label. stoop history shows the ids of the\nsteps that can be. It works while stoop is paused.",
		Example: "  stoop undo 4f1c0e6f6a4de1d0a2b7",
		Args:    cobra.ExactArgs(1),
	}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var o broker.Outcome
		if err := p.ask(cmd, *data, apiUndo, undoRequest{ID: args[0]}, &o); err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "%s: %s", o.Responder, o.Status)
		if t := targetText(o); t != "" {
			fmt.Fprintf(p.stdout, "  %s", t)
		}
		if o.Reason != "" {
			fmt.Fprintf(p.stdout, "  (%s)", clean(o.Reason))
		}
		fmt.Fprintln(p.stdout)
		return nil
	}
	return cmd
}

func (p *program) pauseCommand() *cobra.Command {
	return p.switchCommand("pause", apiPause, "Stop acting now",
		"Stops acting at once; it holds over restarts. Alerts are read, matched and\nrecorded as before, but no harmful step is done for them, not even after resume.\nUndo still works, and people are still told.")
}

func (p *program) resumeCommand() *cobra.Command {
	return p.switchCommand("resume", apiResume, "Act again",
		"Takes a pause back. Only alerts that come from now on are acted on.")
}

func (p *program) switchCommand(name, subject, short, long string) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Long: long, Example: "  stoop " + name, Args: cobra.NoArgs}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var s responders.Pause
		if err := p.ask(cmd, *data, subject, struct{}{}, &s); err != nil {
			return err
		}
		if s.Paused {
			fmt.Fprintf(p.stdout, "paused by %s since %s\n", s.Actor, s.Since.Local().Format(time.DateTime))
		} else {
			fmt.Fprintln(p.stdout, "acting")
		}
		return nil
	}
	return cmd
}

func (p *program) respondersCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "responders [NAME]",
		Short:   "List what stoop can do, with parameters",
		Long:    "Lists the responders that rules can name, with their parameters, their defaults\nand the permissions that they need.",
		Example: "  stoop responders\n  stoop responders isolate-pod",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		entries := responders.All()
		if len(args) == 1 {
			i := slices.IndexFunc(entries, func(e responders.Entry) bool { return e.Name == args[0] })
			if i < 0 {
				return usage("there is no responder %q (stoop responders lists them)", args[0])
			}
			entries = entries[i : i+1]
		}
		if output == "json" {
			return p.respondersJSON(entries)
		}
		w := width(p.stdout)
		if w == 0 {
			w = 80
		}
		for i, e := range entries {
			if i > 0 {
				fmt.Fprintln(p.stdout)
			}
			fmt.Fprintln(p.stdout, e.Name)
			for _, l := range wrap(e.Doc, w-2) {
				fmt.Fprintln(p.stdout, "  "+l)
			}
			t := &table{head: []string{"  parameter", "type", "default", "meaning"}}
			for _, f := range e.Params.Fields {
				def := f.Default
				if f.Required {
					def = "(required)"
				}
				typ := f.Type
				if len(f.OneOf) > 0 {
					typ = strings.Join(f.OneOf, "|")
				}
				t.add("  "+f.Name, typ, def, f.Doc)
			}
			t.print(p.stdout, w)
			for _, r := range e.RBAC {
				fmt.Fprintf(p.stdout, "  needs %s on %s\n", strings.Join(r.Verbs, ", "), strings.Join(r.Resources, ", "))
			}
		}
		return nil
	}
	return cmd
}

func (p *program) respondersJSON(entries []responders.Entry) error {
	type param struct {
		Name     string   `json:"name"`
		Type     string   `json:"type"`
		Default  string   `json:"default,omitempty"`
		Required bool     `json:"required,omitempty"`
		OneOf    []string `json:"oneOf,omitempty"`
		Doc      string   `json:"doc"`
	}
	type responder struct {
		Name   string  `json:"name"`
		Doc    string  `json:"doc"`
		Params []param `json:"params,omitempty"`
		RBAC   any     `json:"rbac,omitempty"`
	}
	enc := json.NewEncoder(p.stdout)
	for _, e := range entries {
		r := responder{Name: e.Name, Doc: e.Doc}
		if len(e.RBAC) > 0 {
			r.RBAC = e.RBAC
		}
		for _, f := range e.Params.Fields {
			r.Params = append(r.Params, param{f.Name, f.Type, f.Default, f.Required, f.OneOf, f.Doc})
		}
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Long: "Prints the version.", Example: "  stoop version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(p.stdout, "stoop %s\n", version())
			return err
		},
	}
}
