// Command falco stands in for Falco in the tests of the chart: it takes Falco's
// arguments and reads Falco's configuration, and writes numbered alerts to the FIFO
// that this names, as Falco does, with one write for each and no end.
//
// At SIGTERM it ends, and its last alert says how many it wrote.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "falco:", err)
		os.Exit(1)
	}
}

func run() error {
	config := flag.String("c", "", "falco.yaml")
	rate := flag.Int("rate", 500, "alerts a second")
	flag.Parse()
	path, err := fifo(*config)
	if err != nil {
		return err
	}
	// Its parents live longer than the FIFO's reader; it must not die of it.
	signal.Ignore(syscall.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	out, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	writer := fmt.Sprint(time.Now().UnixNano())
	began, n := time.Now(), 0
	for {
		select {
		case <-stop:
			fmt.Fprintln(os.Stderr, "wrote", n)
			return write(out, writer, "E2E last", n)
		case <-time.After(time.Millisecond):
		}
		for due := int(time.Since(began).Seconds() * float64(*rate)); n < due; n++ {
			if err := write(out, writer, "E2E numbered", n); err != nil {
				return fmt.Errorf("alert %d: %w", n, err)
			}
		}
	}
}

// fifo is the file that a falco.yaml has alerts written to. The chart writes it with
// sorted keys, one a line.
func fifo(config string) (string, error) {
	b, err := os.ReadFile(config)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "filename: "); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s has no file_output.filename", config)
}

func write(out *os.File, writer, rule string, n int) error {
	now := time.Now().UTC()
	b, err := json.Marshal(map[string]any{
		"hostname": os.Getenv("FALCO_HOSTNAME"), "output": strings.Repeat("x", 300), "priority": "Notice", "rule": rule, "source": "syscall",
		"time":          now.Format("2006-01-02T15:04:05.000000000Z"),
		"output_fields": map[string]any{"container.id": "host", "evt.time": now.UnixNano(), "e2e.writer": writer, "e2e.number": n},
	})
	if err != nil {
		return err
	}
	if _, err := out.Write(append(b, '\n')); err != nil {
		return err
	}
	return nil
}
