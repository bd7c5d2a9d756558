package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"stoop/convert"
	"stoop/responders"
)

func (p *program) convertCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "convert",
		Short:   "Make rules.yaml of another engine's rules",
		Long:    "Makes rules.yaml of the rules of another engine.",
		Example: "  stoop convert talon rules.yaml overrides.yaml -o stoop-rules.yaml",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(p.convertTalonCommand())
	return cmd
}

func (p *program) convertTalonCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "talon FILE...",
		Short: "Make rules.yaml of Falco Talon's rules",
		Long: `Reads Falco Talon's rules, of which later files override earlier ones, and
writes rules.yaml. Where a rule means something else in stoop, a comment says
what. What can't be said is refused, each with its file, line and column, and
then nothing is written. The rules are in audit mode.`,
		Example: "  stoop convert talon rules.yaml\n  stoop convert talon rules.yaml overrides.yaml -o stoop-rules.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("name at least one file of Talon's rules (stoop convert talon --help says more)")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			var files []convert.File
			for _, name := range args {
				src, err := os.ReadFile(name)
				if err != nil {
					return fmt.Errorf("read Talon's rules: %w", err)
				}
				files = append(files, convert.File{Name: name, Src: src})
			}
			text, err := convert.Talon(files, catalogOf(responders.All()))
			if err != nil {
				return wrong(err)
			}
			if out == "" {
				_, err := p.stdout.Write(text)
				return err
			}
			if err := writeNew(out, text); err != nil {
				return err
			}
			fmt.Fprintf(p.stdout, "%s: %s, in audit mode; read its comments, then try it with stoop test --rules %[1]s\n",
				out, count(bytes.Count(text, []byte("\n  - name: ")), "rule"))
			return nil
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "write to this new `FILE` instead of standard output")
	return cmd
}

// writeNew writes a file that is not there yet: one that is may be in force.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: name another file, or take it away", path)
	}
	if err != nil {
		return fmt.Errorf("write the rules: %w", err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the rules: %w", err)
	}
	return nil
}
