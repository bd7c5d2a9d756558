package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"stoop/node"
	"stoop/param"
	"stoop/responders"
)

// defaultMost is how long a default may be to have its place in the column.
const defaultMost = 20

func (p *program) respondersCommand() *cobra.Command {
	var output, config string
	cmd := &cobra.Command{
		Use:     "responders [NAME]",
		Short:   "List what stoop can do; of one, its parameters",
		Long:    "Lists the responders that rules can name. With a NAME it shows that one's\nparameters with their defaults, and the permissions that it needs. Of those that\nact on the node itself it says whether they can where it is run, and what is\nmissing: run it as stoop runs. With -o json it shows all of all.",
		Example: "  stoop responders\n  stoop responders isolate-pod",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE` (default "+defaultConfig+")")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		entries := responders.All()
		if len(args) == 1 {
			i := slices.IndexFunc(entries, func(e responders.Entry) bool { return e.Name == args[0] })
			if i < 0 {
				meant := ""
				if near := param.Nearest(args[0], responderNames(entries)); near != "" {
					meant = fmt.Sprintf("; did you mean %s?", near)
				}
				return usage("there is no responder %q%s (stoop responders lists them)", args[0], meant)
			}
			entries = entries[i : i+1]
		}
		c, err := loadConfig(config)
		if err != nil {
			return wrong(err)
		}
		here := node.New(node.Config{Cgroup: c.Host.Cgroup})
		w := width(p.stdout)
		if w == 0 {
			w = 80
		}
		switch {
		case output == "json":
			return p.respondersJSON(entries, here)
		case len(args) == 1:
			p.showResponder(entries[0], here, w)
		default:
			p.listResponders(entries, here, w)
		}
		return nil
	}
	return cmd
}

func responderNames(entries []responders.Entry) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	return names
}

// listResponders shows what there is, and what of it can't work on this machine.
func (p *program) listResponders(entries []responders.Entry, here *node.Node, w int) {
	t := &table{head: []string{"RESPONDER", "WHAT IT DOES"}}
	for _, e := range entries {
		doc := e.Doc
		if len(here.Missing(e.Needs...)) > 0 {
			doc += " (Not here.)"
		}
		t.add(e.Name, doc)
	}
	t.print(p.stdout, w)
	fmt.Fprintln(p.stdout, "\nstoop responders NAME shows the parameters of one, what it needs, and what of\nthat is missing here.")
}

// showResponder shows one responder in full.
func (p *program) showResponder(e responders.Entry, here *node.Node, w int) {
	lines := func(s string) {
		for i, l := range wrap(s, w-4) {
			fmt.Fprintln(p.stdout, "  "+strings.Repeat("  ", min(i, 1))+l)
		}
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
	if e.Approve != nil && e.Approve(json.RawMessage("{}")) {
		lines("waits until a person approves it, unless approve: false stands beside it")
	}
	if e.Grants != nil {
		lines("needs permissions that hang on its parameters: stoop rbac prints them")
	}
	for _, r := range e.RBAC {
		lines("needs " + strings.Join(r.Verbs, ", ") + " on " + strings.Join(r.Resources, ", "))
	}
	missing := here.Missing(e.Needs...)
	if len(e.Needs) > 0 && len(missing) == 0 {
		lines("everything that it needs is granted here")
	}
	for _, m := range missing {
		lines("missing here: " + m)
	}
}

func (p *program) respondersJSON(entries []responders.Entry, here *node.Node) error {
	type parameter struct {
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
		Params  []parameter `json:"params,omitempty"`
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
			r.Params = append(r.Params, parameter{f.Name, f.Type, f.Default, f.Required, f.OneOf, f.Doc})
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
		RunE: func(*cobra.Command, []string) error { return p.printVersion() },
	}
}

func (p *program) printVersion() error {
	_, err := fmt.Fprintf(p.stdout, "stoop %s\n", version())
	return err
}
