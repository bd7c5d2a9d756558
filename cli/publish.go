package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

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

// publishWait is how long publish waits for a stoop that is away: an upgrade takes
// a second or two, an orderly stop ten at most.
const publishWait = 15 * time.Second

func (p *program) publishCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Hand alerts on standard input to a running stoop",
		Long: `Reads alerts on standard input and hands them to the stoop that runs on the data
folder. It ends with its input, when all of it is stored. It is for Falco's
program_output; where there is the choice, a FIFO (file_output) is better.

While stoop restarts it waits, 15 s at most (--wait). What could not be handed
over by then is lost, which is said; it goes on with what comes next, and ends
with 1.`,
		Example: "  # falco.yaml\n  program_output:\n    enabled: true\n    keep_alive: true\n    program: exec stoop publish",
		Args:    cobra.NoArgs,
	}
	data := dataFlag(cmd)
	wait := cmd.Flags().Duration("wait", publishWait, "`DURATION` to wait for a stoop that is away")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		h := &handover{data: *data, wait: *wait, stderr: p.stderr}
		defer h.close()
		return p.publish(cmd.Context(), h)
	}
	return cmd
}

// publishChunk is how much one request carries.
const publishChunk = 1 << 20

// handover hands alerts to the stoop that runs on a data folder, also to the one
// after it.
type handover struct {
	data   string
	wait   time.Duration
	stderr io.Writer

	client *broker.Client
	away   bool // nobody was there all the time: the next is tried once only
	bad    int  // lines that are no alert
	lost   int  // bytes that nobody took
}

func (h *handover) close() {
	if h.client != nil {
		h.client.Close()
		h.client = nil
	}
}

// send hands lines over. When stoop goes away in the middle they may be handed
// over twice, and are one: an alert is known by its bytes.
func (h *handover) send(ctx context.Context, lines []byte) {
	end := time.Now().Add(h.wait)
	for {
		err := h.try(ctx, lines)
		if err == nil {
			h.away = false
			return
		}
		h.close()
		if h.away || !time.Now().Before(end) || ctx.Err() != nil {
			if !h.away { // said once, and not for each
				fmt.Fprintf(h.stderr, "stoop: alerts are lost: %v\n", err)
			}
			h.away = true
			h.lost += len(lines)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (h *handover) try(ctx context.Context, lines []byte) (err error) {
	if h.client == nil {
		if h.client, err = broker.Dial(h.data); err != nil {
			h.client = nil
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	m, err := h.client.RequestMsgWithContext(ctx, &nats.Msg{Subject: apiPublish, Data: lines, Header: nats.Header{broker.HeaderSession: {h.client.Session}}})
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
		fmt.Fprintln(h.stderr, "stoop:", why)
	}
	h.bad += len(a.Bad)
	return nil
}

func (p *program) publish(ctx context.Context, h *handover) error {
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
			h.send(ctx, chunk)
			chunk = chunk[:0]
		}
		if end || ctx.Err() != nil {
			break
		}
	}
	if h.lost > 0 {
		return fmt.Errorf("%d bytes of alerts were lost: no stoop took them within %s", h.lost, h.wait)
	}
	if h.bad > 0 {
		return errSilent
	}
	return nil
}
