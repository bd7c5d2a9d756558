package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"stoop/broker"
	"stoop/responders"
)

// dataFlag is the data folder that a command means.
func dataFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("data", defaults().Data, "the data `FOLDER` of the running stoop")
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
