//go:build unix

// Package namedpipe makes the FIFO that Falco writes to, and keeps it open. It
// is where an alert waits while nobody reads.
//
// It imports nothing of stoop's: what keeps the FIFO open has to be small, and
// to outlive all the rest.
package namedpipe

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Open opens the FIFO at path, which it creates with mode 0600 if nothing
// is there. It is opened for reading and writing: so opening never waits for
// the other end, reading never ends, and Falco's opening never waits for us.
//
// fifo(7): "Under Linux, opening a FIFO for read and write will succeed both in
// blocking and nonblocking mode. POSIX leaves this behavior undefined."
func Open(path string) (*os.File, error) {
	for try := 0; ; try++ {
		err := unix.Mkfifo(path, 0o600)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			hint := ""
			if errors.Is(err, fs.ErrNotExist) {
				hint = "; create its folder first"
			}
			return nil, fmt.Errorf("creating the FIFO %s: %w%s", path, err, hint)
		}
		// Looked at before it is opened: to open a device can do something.
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) && try < 3 {
			continue // removed in between; or a symbolic link to nothing, which stays so
		}
		if err != nil {
			return nil, fmt.Errorf("looking at the FIFO %s: %w", path, err)
		}
		if err := Check(path, info); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrNotExist) && try < 3 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("opening the FIFO: %w", err)
		}
		if info, err = f.Stat(); err == nil {
			err = Check(path, info)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		return f, nil
	}
}

// Check says what stands at path where a FIFO should be, and what to do about it.
func Check(path string, info os.FileInfo) error {
	switch mode := info.Mode(); {
	case mode&fs.ModeNamedPipe != 0:
		return nil
	case mode.IsRegular():
		return fmt.Errorf("%s is a regular file of %d bytes, last written %s, and no FIFO: Falco creates one when it comes before stoop, and writes its alerts there; "+
			"stop Falco, then `mv %s %s.alerts`, start stoop, start Falco (to answer the alerts in it as well: `stoop run --stdin < %s.alerts`)",
			path, info.Size(), info.ModTime().UTC().Format(time.RFC3339), path, path, path)
	default:
		kind := "a device"
		switch {
		case mode.IsDir():
			kind = "a folder"
		case mode&fs.ModeSocket != 0:
			kind = "a socket"
		}
		return fmt.Errorf("%s is %s and no FIFO: name another path, or remove it and let stoop create the FIFO (mkfifo -m 600 %s)", path, kind, path)
	}
}
