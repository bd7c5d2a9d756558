package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stoop/broker"
)

func (p *program) historyCommand() *cobra.Command {
	var output, head string
	var since time.Duration
	var verify bool
	cmd := &cobra.Command{
		Use:   "history",
		Short: "Say what was done, to what, why, and how long it took",
		Long: `Lists the outcome of each step, oldest first. A step that was tried several
times, or waited for approval, is listed once, with how it ended. Without a
running stoop it reads a copy of the data folder.

Each outcome holds the hash of the one before. With --verify all of them are
held against that chain: one that was removed or changed is named. It prints
the journal's head; who keeps that elsewhere (stoop logs it too), and gives it
with --head later, sees also whether all was written anew.

Exits with 1 if --verify found the journal broken.`,
		Example: "  stoop history --since 1h\n  stoop history -o json | jq 'select(.status==\"done\")'\n  stoop history --verify --head \"$KEPT\"",
		Args:    cobra.NoArgs,
	}
	data := dataFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().DurationVar(&since, "since", 0, "only the last `DURATION`, such as 1h (default: all)")
	cmd.Flags().BoolVar(&verify, "verify", false, "hold every outcome against the journal's chain")
	cmd.Flags().StringVar(&head, "head", "", "with --verify: the `HEAD` that it has to contain")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		switch {
		case head != "" && !verify:
			return usage("--head goes with --verify")
		case verify && since > 0:
			return usage("--verify looks at all that is kept: it does not go with --since")
		case verify:
			var want broker.Head
			if head != "" {
				var err error
				if want, err = broker.ParseHead(head); err != nil {
					return usage("--head: %v", err)
				}
			}
			return p.verifyHistory(cmd.Context(), *data, want, output == "json")
		}
		var from time.Time
		if since > 0 {
			from = time.Now().Add(-since)
		}
		return p.history(cmd.Context(), *data, from, output == "json")
	}
	return cmd
}

func (p *program) history(ctx context.Context, data string, since time.Time, asJSON bool) error {
	var all []broker.Outcome
	at := map[string]int{} // where a step's outcome is in all
	each := func(o broker.Outcome) error {
		// One line a step: how it ended stands in the place of a try, or of that
		// it waits; that it was taken back is a line of its own.
		key := o.ID
		if i, ok := at[o.ID]; o.Actor != "" && !(ok && open(all[i].Status)) {
			key += "\x00" + o.Actor + string(o.Status)
		}
		if i, ok := at[key]; ok {
			all[i] = o
			return nil
		}
		at[key] = len(all)
		all = append(all, o)
		return nil
	}
	if err := readHistory(ctx, data, since, each); err != nil {
		return err
	}
	slices.SortStableFunc(all, func(x, y broker.Outcome) int { return x.Time.Compare(y.Time) })
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		for _, o := range all {
			if err := enc.Encode(o); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all) == 0 {
		fmt.Fprintln(out, "nothing was done, and nothing would have been")
		return nil
	}
	t := &table{head: []string{"TIME", "STATUS", "RESPONDER", "TARGET AND REASON"}}
	for _, o := range all {
		what := targetText(o)
		for _, part := range []string{tookText(o), "rule " + o.Rule, o.Reason} {
			if part != "" && part != "rule " {
				what = strings.TrimPrefix(what+"; "+part, "; ")
			}
		}
		if o.Actor != "" && o.Status != broker.Denied { // its reason says by whom
			what += "; by " + o.Actor
		}
		if o.Undo {
			what += "; undo: stoop undo " + o.ID
		}
		t.add(o.Time.Local().Format("01-02 15:04:05"), string(o.Status), o.Responder, what)
	}
	t.print(out, width(p.stdout))
	return nil
}

// open reports whether a step that has come so far has not ended.
func open(s broker.Status) bool { return s == broker.Retrying || s == broker.AwaitingApproval }

// readHistory asks the running stoop, or reads a copy of the data folder.
func readHistory(ctx context.Context, data string, since time.Time, each func(broker.Outcome) error) error {
	c, err := broker.Dial(data)
	if err == nil {
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		return askHistory(ctx, c, since, each)
	}
	if !errors.Is(err, broker.ErrNotRunning) {
		return err
	}
	b, done, err := openCopy(ctx, data, "history", broker.StreamOutcomes)
	if err != nil {
		return err
	}
	defer done()
	return b.Outcomes(ctx, since, each)
}

// openCopy opens a copy of some streams of a data folder, and of its STATE, for
// reading.
func openCopy(ctx context.Context, data, what string, streams ...string) (_ *broker.Broker, done func(), err error) {
	store := filepath.Join(data, "store")
	if _, err := os.Stat(store); err != nil {
		return nil, nil, fmt.Errorf("%s holds no %s: %w", data, what, err)
	}
	tmp, err := os.MkdirTemp("", "stoop-"+what+"-")
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	if err := broker.CopyStore(tmp, data, streams...); err != nil {
		return nil, nil, err
	}
	b, err := broker.Open(ctx, broker.Config{Dir: tmp, ReadOnly: true})
	if err != nil {
		return nil, nil, fmt.Errorf("read a copy of %s: %w", data, err)
	}
	return b, func() {
		b.Close()
		os.RemoveAll(tmp)
	}, nil
}
