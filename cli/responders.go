package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"stoop/node"
	"stoop/responders"
)

// defaultMost is how long a default may be to have its place in the column.
const defaultMost = 20

func (p *program) respondersCommand() *cobra.Command {
	var output, config string
	cmd := &cobra.Command{
		Use:     "responders [NAME]",
		Short:   "List what stoop can do, with parameters",
		Long:    "Lists the responders that rules can name, with their parameters, their defaults\nand the permissions that they need. Of those that act on the node itself it says\nwhat is missing where it is run: run it as stoop runs.",
		Example: "  stoop responders\n  stoop responders isolate-pod",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE` (default "+defaultConfig+", if it is there)")
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
		c, err := loadConfig(config)
		if err != nil {
			return wrong(err)
		}
		here := node.New(node.Config{Cgroup: c.Host.Cgroup})
		if output == "json" {
			return p.respondersJSON(entries, here)
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
				doc := f.Doc
				if len(def) > defaultMost {
					doc, def = doc+" Default: "+def+".", "(below)"
				}
				t.add("  "+f.Name, typ, def, doc)
			}
			t.print(p.stdout, w)
			for _, r := range e.RBAC {
				fmt.Fprintf(p.stdout, "  needs %s on %s\n", strings.Join(r.Verbs, ", "), strings.Join(r.Resources, ", "))
			}
			if len(e.Needs) == 0 {
				continue
			}
			missing := here.Missing(e.Needs...)
			if len(missing) == 0 {
				fmt.Fprintln(p.stdout, "  needs nothing that is not granted here")
			}
			for _, m := range missing {
				for i, l := range wrap("missing here: "+m, w-4) {
					fmt.Fprintln(p.stdout, "  "+strings.Repeat("  ", min(i, 1))+l)
				}
			}
		}
		return nil
	}
	return cmd
}

func (p *program) respondersJSON(entries []responders.Entry, here *node.Node) error {
	type param struct {
		Name     string   `json:"name"`
		Type     string   `json:"type"`
		Default  string   `json:"default,omitempty"`
		Required bool     `json:"required,omitempty"`
		OneOf    []string `json:"oneOf,omitempty"`
		Doc      string   `json:"doc"`
	}
	type responder struct {
		Name    string      `json:"name"`
		Doc     string      `json:"doc"`
		Params  []param     `json:"params,omitempty"`
		RBAC    any         `json:"rbac,omitempty"`
		Needs   []node.Need `json:"needs,omitempty"`
		Missing []string    `json:"missing,omitempty"` // of the needs, here
	}
	enc := json.NewEncoder(p.stdout)
	for _, e := range entries {
		r := responder{Name: e.Name, Doc: e.Doc, Needs: e.Needs}
		if len(e.Needs) > 0 {
			r.Missing = here.Missing(e.Needs...)
		}
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
