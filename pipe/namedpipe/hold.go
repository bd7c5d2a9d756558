//go:build unix

package namedpipe

import (
	"context"
	"log/slog"
)

// Hold creates the FIFO at path if nothing is there, and holds it open until
// ctx ends. While it does, a reader may come and go and Falco notices nothing:
// without it, Falco's first write after the last reader went would fail, and
// Falco would drop every later alert in silence. It reads nothing.
func Hold(ctx context.Context, path string, log *slog.Logger) error {
	f, err := Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	log.Info("holding the FIFO open", "path", path)
	<-ctx.Done()
	return nil
}
