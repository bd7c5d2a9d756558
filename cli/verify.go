package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"stoop/broker"
)

// verifyHistory verifies the journal of a running stoop, or of a copy of the data
// folder.
func (p *program) verifyHistory(ctx context.Context, data string, want broker.Head, asJSON bool) error {
	v, err := verifyJournal(ctx, data, want)
	if err != nil {
		return err
	}
	if asJSON {
		if err := json.NewEncoder(p.stdout).Encode(v); err != nil {
			return err
		}
	} else {
		p.printVerdict(v, want)
	}
	if v.Broken != nil {
		return errSilent
	}
	return nil
}

func verifyJournal(ctx context.Context, data string, want broker.Head) (v broker.Verdict, err error) {
	c, err := broker.Dial(data)
	if err == nil {
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		err = c.Ask(ctx, apiVerify, want, &v)
		return v, err
	}
	if !errors.Is(err, broker.ErrNotRunning) {
		return v, err
	}
	b, done, err := openCopy(ctx, data, "history", broker.StreamOutcomes)
	if err != nil {
		return v, err
	}
	defer done()
	return b.Verify(ctx, want)
}

func (p *program) printVerdict(v broker.Verdict, want broker.Head) {
	say := func(format string, args ...any) { fmt.Fprintf(p.stdout, format+"\n", args...) }
	when := func(t time.Time) string { return t.Local().Format(time.DateTime) }
	if b := v.Broken; b != nil {
		say("BROKEN: %s", b.What)
		if b.ID != "" {
			say("  at the outcome of step %s, %s", b.ID, when(b.Time))
		}
		if v.Breaks > 1 {
			say("  and at %d more places", v.Breaks-1)
		}
	} else if v.Outcomes > 0 {
		say("whole: no outcome was removed or changed")
	}
	if v.Outcomes == 0 {
		say("the journal holds no outcomes")
	} else {
		say("outcomes %d, numbers %d to %d", v.Outcomes, v.First.N, v.Head.N)
		say("begins   at %d, %s%s", v.First.N, when(v.Since), map[bool]string{true: "; those before went by age or size"}[v.First.N > 1])
		say("ends     at %d, %s", v.Head.N, when(v.Until))
	}
	if v.Dropped > 0 {
		say("dropped  %d of responders that had the most they may have", v.Dropped)
	}
	if v.Unchained > 0 {
		say("before   %d outcomes of a version that kept no journal", v.Unchained)
	}
	if v.Carried > 0 {
		say("carried  %d were written in memory, as the disk was full", v.Carried)
	}
	if v.Seams > 0 {
		say("seams    %d: what was in memory does not join what was on the disk", v.Seams)
	}
	if !v.Noted {
		say("stoop had not noted the head yet: whether some are missing at the end is not known")
	}
	if v.Outcomes > 0 {
		say("head     %s", v.Head)
	}
	if want.Hash != "" && v.Broken == nil {
		say("contains %s", want)
	}
}
