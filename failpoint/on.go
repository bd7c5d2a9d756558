//go:build failpoints

// Package failpoint marks the places around publish and acknowledge where a
// crash would hurt most, so that tests can have one right there.
package failpoint

import (
	"os"
	"syscall"
)

// Hit ends the process as kill -9 does, if STOOP_FAILPOINT names this place.
func Hit(name string) {
	if os.Getenv("STOOP_FAILPOINT") == name {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}
