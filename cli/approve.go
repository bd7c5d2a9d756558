package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
)

func (p *program) approveCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "approve [ID]",
		Short:   "Approve a step that waits for it, or list what waits",
		Long:    "Lets a step be done that waits for a person, because approve: true stands beside\nit in rules.yaml, or because its responder asks by default. Its target is proved\nanew, and what is gone or protected is left alone; limits, the cooldown and the\nalert's age don't hold an approved step back. Without an ID it lists what waits,\nwith all there is to decide by.",
		Example: "  stoop approve\n  stoop approve 4f1c0e6f6a4de1d0a2b7",
		Args:    cobra.MaximumNArgs(1),
	}
	data := dataFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "of the list: table or json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if len(args) == 1 {
			return p.decide(cmd, *data, apiApprove, args[0])
		}
		var got waitingAnswer
		if err := p.ask(cmd, *data, apiWaiting, struct{}{}, &got); err != nil {
			return err
		}
		return p.printWaiting(got, output == "json")
	}
	return cmd
}

func (p *program) denyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "deny ID",
		Short:   "Say no to a step that waits for approval",
		Long:    "Ends a step that waits for a person without doing it. Its chain goes on, or\nstops, as its onFailure says. stoop approve without an ID lists what waits.",
		Example: "  stoop deny 4f1c0e6f6a4de1d0a2b7",
		Args:    cobra.ExactArgs(1),
	}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return p.decide(cmd, *data, apiDeny, args[0]) }
	return cmd
}

func (p *program) decide(cmd *cobra.Command, data, subject, id string) error {
	var o broker.Outcome
	if err := p.ask(cmd, data, subject, decision{ID: id}, &o); err != nil {
		return err
	}
	what := o.Responder + ": approved"
	if o.Status == broker.Denied {
		what = o.Responder + ": denied"
	}
	if t := targetText(o); t != "" {
		what += "  " + t
	}
	if o.Status != broker.Denied {
		what += "  (see stoop history)"
	}
	p.entry("", what)
	return nil
}

// printWaiting shows what a person decides by. All of an alert in it was chosen by
// whoever raised it.
func (p *program) printWaiting(got waitingAnswer, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(p.stdout)
		enc.SetEscapeHTML(false)
		for _, a := range got.Approvals {
			if err := enc.Encode(a); err != nil {
				return err
			}
		}
		return nil
	}
	if len(got.Approvals) == 0 {
		fmt.Fprintln(p.stdout, "nothing waits for approval")
		return nil
	}
	w := width(p.stdout)
	if w == 0 {
		w = 80
	}
	for i, a := range got.Approvals {
		if i > 0 {
			fmt.Fprintln(p.stdout)
		}
		fmt.Fprintf(p.stdout, "%s  %s, for another %s\n", a.ID, a.Responder, time.Until(a.Expires).Round(time.Second))
		for _, line := range waitingLines(a) {
			for n, l := range wrap(clean(line), w-4) {
				fmt.Fprintln(p.stdout, "  "+strings.Repeat("  ", min(n, 1))+l)
			}
		}
	}
	if got.More > 0 {
		fmt.Fprintf(p.stdout, "\nand %d more\n", got.More)
	}
	return nil
}

func waitingLines(a responders.Approval) []string {
	lines := []string{"rule " + a.Rule + ", asked " + a.Asked.Local().Format(time.DateTime)}
	if a.Object != "" {
		lines = append(lines, "acts on: "+a.Object)
	}
	if a.Changes != "" {
		lines = append(lines, a.Changes)
	}
	if t := targetText(broker.Outcome{Target: a.Target}); t != "" {
		lines = append(lines, "target: "+t)
	}
	if len(a.Params) > 0 {
		lines = append(lines, "parameters: "+flow(a.Params))
	}
	if raised, err := alert.Parse(a.Alert); err == nil {
		lines = append(lines, fmt.Sprintf("alert: %s (%s): %s", raised.Rule, raised.Priority, cut(raised.Output, 501)))
	}
	for _, f := range a.Found {
		lines = append(lines, fmt.Sprintf("%s before it: %s %s", f.Responder, f.Status, f.Reason))
	}
	return append(lines, "stoop approve "+a.ID+", or stoop deny "+a.ID)
}

// flow is a step's parameters as they would stand in rules.yaml.
func flow(params json.RawMessage) string {
	var n yaml.Node
	if yaml.Unmarshal(params, &n) != nil || len(n.Content) != 1 {
		return string(params)
	}
	var plain func(*yaml.Node)
	plain = func(n *yaml.Node) {
		n.Style = yaml.FlowStyle // of a word: no quotes but where they are needed
		for _, c := range n.Content {
			plain(c)
		}
	}
	plain(n.Content[0])
	out, err := yaml.Marshal(n.Content[0])
	if err != nil {
		return string(params)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}
