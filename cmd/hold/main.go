// Command stoop-hold creates the FIFO that Falco writes to and keeps it open,
// as stoop hold does, in a few MiB: it is what stands beside Falco in a pod, and
// outlives both Falco and stoop.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"stoop/pipe/namedpipe"
)

func main() {
	if len(os.Args) != 2 || os.Args[1] == "" || os.Args[1][0] == '-' {
		fmt.Fprintln(os.Stderr, "usage: stoop-hold PATH\nCreates the FIFO at PATH and keeps it open until it is told to stop (SIGTERM).")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := namedpipe.Hold(ctx, os.Args[1], slog.New(slog.NewJSONHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintln(os.Stderr, "stoop-hold:", err)
		os.Exit(1)
	}
}
