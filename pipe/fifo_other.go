//go:build !linux

package pipe

import (
	"context"
	"errors"
	"os"
)

// FIFO reads the named pipe that Falco's file_output writes to. Falco's nodes
// run Linux, and so does this; elsewhere alerts come by standard input, from a
// file or over HTTP.
type FIFO struct{}

var errLinux = errors.New("reading a FIFO needs Linux: use --stdin or --file")

// OpenFIFO is an error: see [FIFO].
func OpenFIFO(string) (*FIFO, error) { return nil, errLinux }

// HandedFIFO is none: there is no systemd.
func HandedFIFO() (*FIFO, error) { return nil, nil }

// FIFOFrom is an error: see [FIFO].
func FIFOFrom(*os.File) (*FIFO, error) { return nil, errLinux }

// Run is an error: see [FIFO].
func (*FIFO) Run(context.Context, *Intake) error { return errLinux }

// Close does nothing.
func (*FIFO) Close() error { return nil }
