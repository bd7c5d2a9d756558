package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"stoop/broker"
	"stoop/pipe"
	"stoop/pipe/namedpipe"
)

func (p *program) holdCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hold PATH",
		Short: "Create the FIFO and keep it open",
		Long: `Creates the FIFO and keeps it open until it is told to stop, reading nothing. As
long as it does, stoop can restart and Falco notices nothing: what it writes
meanwhile waits in the pipe. Without anybody holding it, Falco's first write
would fail, and Falco would drop all later alerts in silence.`,
		Example: "  stoop hold /run/stoop/falco.pipe",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return namedpipe.Hold(cmd.Context(), args[0], p.logger(Log{}))
		},
	}
}

func (p *program) publishCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Hand alerts on standard input to a running stoop",
		Long: `Reads alerts on standard input and hands them to the stoop that runs on the data
folder. It ends with its input, when all of it is stored. It is for Falco's
program_output; where there is the choice, a FIFO (file_output) is better.`,
		Example: "  # falco.yaml\n  program_output:\n    enabled: true\n    keep_alive: false\n    program: stoop publish",
		Args:    cobra.NoArgs,
	}
	data := dataFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := broker.Dial(*data)
		if err != nil {
			return err
		}
		defer c.Close()
		return p.publish(cmd.Context(), c)
	}
	return cmd
}

// publishChunk is how much one request carries.
const publishChunk = 1 << 20

func (p *program) publish(ctx context.Context, c *broker.Client) error {
	bad := 0
	send := func(lines []byte) error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		m, err := c.RequestMsgWithContext(ctx, &nats.Msg{Subject: apiPublish, Data: lines, Header: nats.Header{broker.HeaderSession: {c.Session}}})
		if err != nil {
			return fmt.Errorf("hand alerts to the running stoop: %w", err)
		}
		if e := m.Header.Get(broker.HeaderError); e != "" {
			return fmt.Errorf("hand alerts to the running stoop: %s", e)
		}
		var a publishAnswer
		if err := json.Unmarshal(m.Data, &a); err != nil {
			return fmt.Errorf("answer of the running stoop: %w", err)
		}
		for _, why := range a.Bad {
			fmt.Fprintln(p.stderr, "stoop:", why)
		}
		bad += len(a.Bad)
		return nil
	}
	// What has come is sent at once: with keep_alive, the next alert may be
	// an hour away.
	r := bufio.NewReaderSize(p.stdin, 64<<10)
	var chunk []byte
	for {
		part, err := r.ReadSlice('\n')
		if chunk = append(chunk, part...); len(chunk) > 2*publishChunk {
			return fmt.Errorf("a line is longer than %d bytes", pipe.DefaultMaxLine)
		}
		end := errors.Is(err, io.EOF)
		if err != nil && !end && !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("read standard input: %w", err)
		}
		if whole := err == nil && (r.Buffered() == 0 || len(chunk) > publishChunk/2); whole || end && len(chunk) > 0 {
			if err := send(chunk); err != nil {
				return err
			}
			chunk = chunk[:0]
		}
		if end {
			break
		}
	}
	if bad > 0 {
		return errSilent
	}
	return nil
}
