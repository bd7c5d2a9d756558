package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"stoop/broker"
	"stoop/responders"
)

// dataFlag is the data folder that a command means.
func dataFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("data", defaults().Data, "stoop's data `FOLDER`")
}

// askTimeout bounds a request to a running stoop.
const askTimeout = 30 * time.Second

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
	var all bool
	var rule string
	var since time.Duration
	cmd := &cobra.Command{
		Use:   "undo (ID | --all | --rule RULE)",
		Short: "Take a step back, or many",
		Long: "Takes a step back: the isolation, the label, the freeze. stoop history shows\nthe ids of the steps that can be. With --all it takes back every step that can\nbe, with --rule all those of a rule, the latest first; --since leaves the older\nones as they are. " +
			"It works while stoop is paused and, for what was done on the\nnode itself, without a cluster.",
		Example: "  stoop undo 4f1c0e6f6a4de1d0a2b7\n  stoop undo --rule isolate-on-drift --since 1h\n  stoop undo --all",
		Args: func(_ *cobra.Command, args []string) error {
			many := all || rule != ""
			switch {
			case len(args) > 1 || many == (len(args) == 1):
				return errors.New("it takes the ID of a step, or --all, or --rule RULE")
			case since > 0 && !many:
				return errors.New("--since goes with --all or --rule")
			}
			return nil
		},
	}
	data := dataFlag(cmd)
	cmd.Flags().BoolVar(&all, "all", false, "take back every step that can be, the latest first")
	cmd.Flags().StringVar(&rule, "rule", "", "take back the steps of this `RULE` of rules.yaml")
	cmd.Flags().DurationVar(&since, "since", 0, "only what was done in the last `DURATION`, such as 1h")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			var from time.Time
			if since > 0 {
				from = time.Now().Add(-since)
			}
			return undoHint(p.undoAll(cmd, *data, undoRequest{All: true, Rule: rule, Since: from}))
		}
		var o broker.Outcome
		if err := p.ask(cmd, *data, apiUndo, undoRequest{ID: args[0]}, &o); err != nil {
			return undoHint(err)
		}
		p.printUndone("", o)
		return nil
	}
	return cmd
}

func (p *program) undoAll(cmd *cobra.Command, data string, what undoRequest) error {
	var got undoneAll
	if err := p.ask(cmd, data, apiUndo, what, &got); err != nil {
		return err
	}
	failed := 0
	for _, o := range got.Outcomes {
		p.printUndone(o.ID+"  ", o)
		if o.Status != broker.Undone && o.Status != broker.Nothing {
			failed++
		}
	}
	switch {
	case failed > 0:
		return fmt.Errorf("%d of %d steps could not be taken back", failed, len(got.Outcomes)+got.More)
	case got.More > 0:
		fmt.Fprintf(p.stdout, "and %d more (stoop history)\n", got.More)
	case len(got.Outcomes) == 0:
		fmt.Fprintln(p.stdout, "there is nothing to take back")
	}
	return nil
}

// undoHint says what to do where nobody is there to take a step back.
func undoHint(err error) error {
	if !errors.Is(err, broker.ErrNotRunning) {
		return err
	}
	return fmt.Errorf(`%w
Only a running stoop takes steps back. Start it as it was started before, with
--mode audit if it should not act on anything meanwhile. By hand, a frozen
container is thawed in its cgroup: write 0 to cgroup.freeze (cgroup v2), or
THAWED to freezer.state (v1); docs/containment.md has the rest`, err)
}

func (p *program) printUndone(head string, o broker.Outcome) {
	what := fmt.Sprintf("%s: %s", o.Responder, o.Status)
	if t := targetText(o); t != "" {
		what += "  " + t
	}
	if o.Reason != "" {
		what += "  (" + clean(o.Reason) + ")"
	}
	p.entry(head, what)
}

func (p *program) pauseCommand() *cobra.Command {
	cmd := p.switchCommand("pause", apiPause, "Stop acting now", `Stops acting on this node at once; it holds over restarts. Alerts are read,
matched and recorded as before, but no harmful step is done for them, not even
after resume. Undo still works, and people are still told.

Every node of a cluster is paused by an annotation, whatever its value, of the
namespace that stoop runs in, and goes on when it is taken away:

  `+responders.PauseCommand("stoop", true)+`
  `+responders.PauseCommand("stoop", false)+`

With --show nothing is changed: it says which of the two holds.`)
	cmd.Example = "  stoop pause\n  stoop pause --show"
	show := cmd.Flags().Bool("show", false, "change nothing, and say what is paused")
	act := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !*show {
			return act(cmd, args)
		}
		data, err := cmd.Flags().GetString("data")
		if err != nil {
			return err
		}
		var s pauses
		if err := p.ask(cmd, data, apiPaused, struct{}{}, &s); err != nil {
			return err
		}
		p.printPauses(s)
		return nil
	}
	return cmd
}

func (p *program) resumeCommand() *cobra.Command {
	return p.switchCommand("resume", apiResume, "Act again",
		"Takes this node's pause back. Only alerts that come from now on are acted on. It\ndoes not lift a pause of the whole cluster; then it says what does, and fails.")
}

func (p *program) switchCommand(name, subject, short, long string) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Long: long, Example: "  stoop " + name, Args: cobra.NoArgs}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var s pauses
		if err := p.ask(cmd, *data, subject, struct{}{}, &s); err != nil {
			return err
		}
		p.printPauses(s)
		if subject == apiResume && s.Cluster != nil && s.Cluster.Paused {
			return fmt.Errorf("nothing is acted on while the cluster is paused; to lift that:\n%s", responders.PauseCommand(s.Cluster.Namespace, false))
		}
		return nil
	}
	return cmd
}

func (p *program) printPauses(s pauses) {
	if s.Paused {
		fmt.Fprintf(p.stdout, "paused by %s since %s\n", clean(s.Actor), s.Since.Local().Format(time.DateTime))
	}
	c := s.Cluster
	if c != nil && c.Paused {
		why := ""
		if c.Actor != "" {
			why = ": " + clean(c.Actor)
		}
		fmt.Fprintf(p.stdout, "every node of the cluster is paused since %s%s\n", c.Since.Local().Format(time.DateTime), why)
	}
	if !s.Paused && (c == nil || !c.Paused) {
		fmt.Fprintln(p.stdout, "acting")
	}
	if c != nil && c.Problem != "" {
		fmt.Fprintf(p.stdout, "whether the cluster is paused can't be seen: %s\n", clean(c.Problem))
	}
}
