package cli

import (
	"io"

	"github.com/spf13/cobra"
)

// release is the version that this program was released as, such as v0.3.0. The
// linker sets it, and nothing else: -X stoop/cli.release=v0.3.0.
var release string

// Commands is the command line, for who writes its manual pages and its
// completions. It runs nothing.
func Commands() *cobra.Command {
	return (&program{stdout: io.Discard, stderr: io.Discard}).root()
}
