// Command servers builds etcd and kube-apiserver for the end-to-end tests and
// keeps them in the user's cache folder, whose path it prints. The tests do the
// same by themselves; run apart, it shows what it is busy with, and no test's
// time limit ends a cold build.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"stoop/e2e/kube"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := kube.Binaries(ctx, func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "servers:", err)
		os.Exit(1)
	}
	fmt.Println(dir)
}
