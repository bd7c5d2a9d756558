// Stoop answers Falco's alerts: it deletes or isolates the pod that raised one,
// keeps a record and tells people. The commands and the wiring are in package
// cli.
package main

import (
	"os"

	"stoop/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
