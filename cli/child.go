package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"stoop/child"
	"stoop/responders"
)

// childCommand is stoop as a process of its own: what runs a program of a rule's,
// and what looks at a suspect, is started by stoop itself, never by people.
func (p *program) childCommand() *cobra.Command {
	return &cobra.Command{
		Use: "child NAME", Hidden: true, DisableFlagParsing: true,
		Short: "What stoop starts itself",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("it is stoop's own: a running stoop starts it")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if args[0] == "run" {
				return wrong(responders.RunChild(args[1:])) // returns only if it could not become the program
			}
			if code := child.Main(args[0], p.stdin, p.stdout, p.stderr); code != 0 {
				return wrong(fmt.Errorf("child %s failed", args[0]))
			}
			return nil
		},
	}
}
