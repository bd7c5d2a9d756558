package cli

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"stoop/alert"
	"stoop/broker"
	"stoop/pipe"
	"stoop/responders"
	"stoop/router"
	"stoop/rules"
)

// targetsMost bounds the targets that are told apart for one step of a rule:
// attackers name them.
const targetsMost = 10_000

// backtest tries rules on recorded alerts: what would have been done, to what, how
// often, and what the guards would have held back.
type backtest struct {
	set       *rules.Set
	rehearsal *responders.Rehearsal
	counts    *router.Counts // for the rules that wait for several alerts
	matched   int
	waiting   int // matches that waited for others that agree
	steps     map[stepKey]*stepTally
}

// stepKey is a step of a rule.
type stepKey struct {
	rule      string
	position  int
	responder string
}

// tally is how often something would have been done, held back, or asked for.
type tally struct {
	Would int `json:"would"`
	Held  int `json:"held,omitempty"`
	Asks  int `json:"asks,omitempty"` // a person would have been asked first
}

func (t *tally) plus(o tally) {
	t.Would += o.Would
	t.Held += o.Held
	t.Asks += o.Asks
}

type stepTally struct {
	tally
	mode    broker.Mode
	by      map[string]int // why it was held back: the guard, or the limit's key
	reasons map[string]string
	targets map[string]*tally
	more    tally // of targets past targetsMost
}

func newBacktest(set *rules.Set, entries []responders.Entry, g responders.Guards) *backtest {
	b := &backtest{set: set, rehearsal: responders.NewRehearsal(entries, g), steps: map[stepKey]*stepTally{}}
	g.Node = "" // any hostname is this node's
	b.counts = router.NewCounts(trustOf(entries, g), nil, nil)
	return b
}

// alert tries the rules on an alert at a time.
func (b *backtest) alert(a *alert.Alert, origin broker.Origin, now time.Time) {
	found := b.set.Match(a)
	if len(found) == 0 {
		return
	}
	b.matched++
	target := a.Target()
	var agreements []router.Agreement
	if router.Waiting(found) {
		anywhere := target
		anywhere.Node = ""
		agreements = b.counts.Add(router.Arrived{Alert: a, Target: anywhere, Origin: origin, Received: now, Now: now}, found)
	}
	for i, rule := range found {
		if rule.When != nil && !agreements[i].Reached {
			b.waiting++
			continue
		}
		b.chain(&broker.Step{
			ID: broker.StepID(a.ID, rule.Name, 0, ""), AlertID: a.ID, Received: now, Origin: origin,
			Rule: rule.Name, Mode: rule.Mode, Action: rule.Actions[0], Remaining: rule.Actions[1:], Target: target,
		}, a, now)
	}
}

// chain goes through the steps of a rule as the host would.
func (b *backtest) chain(s *broker.Step, a *alert.Alert, now time.Time) {
	waits := false
	stopped := ""
	for ; s != nil; s = s.Next() {
		r := responders.Rehearsed{Status: broker.AwaitingApproval}
		switch {
		case stopped != "":
			r = responders.Rehearsed{Status: broker.Suppressed, Guard: "onFailure", Reason: stopped}
		case !waits:
			r = b.rehearsal.Step(a, s, now)
		}
		b.count(s, r)
		switch r.Status {
		case broker.AwaitingApproval:
			waits = true // its chain waits with it
		case broker.Suppressed, broker.Refused:
			if s.OnFailure == broker.Stop && stopped == "" {
				stopped = s.Responder + " before it would not have been done, and its onFailure is stop"
			}
		}
	}
}

func (b *backtest) count(s *broker.Step, r responders.Rehearsed) {
	key := stepKey{s.Rule, s.Position, s.Responder}
	t := b.steps[key]
	if t == nil {
		t = &stepTally{mode: s.Mode, by: map[string]int{}, reasons: map[string]string{}, targets: map[string]*tally{}}
		b.steps[key] = t
	}
	var n tally
	switch r.Status {
	case broker.Done:
		n.Would = 1
	case broker.AwaitingApproval:
		n.Asks = 1
	default:
		n.Held = 1
		if t.by[r.Guard]++; t.by[r.Guard] == 1 {
			t.reasons[r.Guard] = r.Reason
		}
	}
	t.plus(n)
	name := targetName(s.Target)
	of := t.targets[name]
	switch {
	case of != nil:
	case len(t.targets) < targetsMost:
		of = &tally{}
		t.targets[name] = of
	default:
		of = &t.more
	}
	of.plus(n)
}

// targetName is what a step would have acted on, as far as the alert says.
func targetName(t alert.Target) string {
	switch {
	case t.Resource != nil:
		return strings.TrimPrefix(t.Resource.Namespace+"/", "/") + t.Resource.Resource + "/" + t.Resource.Name
	case t.Pod != "":
		return t.Namespace + "/" + t.Pod
	case t.Host:
		return "the host"
	case t.Container != "":
		return "container " + t.Container
	case t.PID != 0:
		return "process " + strconv.FormatInt(t.PID, 10)
	}
	return "nothing that the alert names"
}

// ordered are the steps in the order of the rules, then of each rule's actions.
func (b *backtest) ordered() []stepKey {
	place := map[string]int{}
	for i, r := range b.set.Rules {
		place[r.Name] = i
	}
	keys := slices.Collect(maps.Keys(b.steps))
	slices.SortFunc(keys, func(x, y stepKey) int {
		return cmp.Or(cmp.Compare(place[x.rule], place[y.rule]), cmp.Compare(x.position, y.position))
	})
	return keys
}

// replayed is what is said of a backtest, or of two.
type replayed struct {
	From      time.Time      `json:"from,omitzero"` // of the first alert
	To        time.Time      `json:"to,omitzero"`
	Alerts    int            `json:"alerts"`
	Bad       int            `json:"bad,omitempty"` // lines that are no alert
	Matched   int            `json:"matched"`
	Waiting   int            `json:"waiting,omitempty"` // matches of rules with a when that had not enough others
	All       time.Time      `json:"all,omitzero"`      // since when every alert is kept, and not only what matched
	Steps     []replayedStep `json:"steps,omitempty"`
	Changes   []change       `json:"changes,omitempty"` // with --diff
	Unchecked []string       `json:"unchecked"`
	diff      bool
	history   bool
}

// replayedStep is a step of a rule.
type replayedStep struct {
	Rule      string      `json:"rule"`
	Responder string      `json:"responder"`
	Mode      broker.Mode `json:"mode"`
	tally
	HeldBy  map[string]int    `json:"heldBy,omitempty"`
	Reasons map[string]string `json:"reasons,omitempty"` // the first by each
	Targets []replayedTarget  `json:"targets,omitempty"`
	More    *tally            `json:"more,omitempty"` // of further targets
}

type replayedTarget struct {
	Target string `json:"target"`
	tally
}

// change is what another file of rules changes for one target.
type change struct {
	Change    string `json:"change"` // appears, goes, differs
	Rule      string `json:"rule"`
	Responder string `json:"responder"`
	Target    string `json:"target"`
	Old       tally  `json:"old"`
	New       tally  `json:"new"`
	position  int
}

func (b *backtest) result() []replayedStep {
	var out []replayedStep
	for _, k := range b.ordered() {
		t := b.steps[k]
		s := replayedStep{Rule: k.rule, Responder: k.responder, Mode: t.mode, tally: t.tally, HeldBy: t.by, Reasons: t.reasons}
		for name, n := range t.targets {
			s.Targets = append(s.Targets, replayedTarget{name, *n})
		}
		slices.SortFunc(s.Targets, func(x, y replayedTarget) int {
			return cmp.Or(cmp.Compare(y.Would, x.Would), cmp.Compare(y.Asks, x.Asks), cmp.Compare(y.Held, x.Held), cmp.Compare(x.Target, y.Target))
		})
		if t.more != (tally{}) {
			s.More = &t.more
		}
		out = append(out, s)
	}
	return out
}

// changes are what b would do that old would not, and the other way round, by rule,
// step and target.
func (b *backtest) changes(old *backtest) []change {
	type place struct {
		rule, responder, target string
		nth                     int // of that responder in its rule
	}
	gather := func(b *backtest) map[place]*change {
		all := map[place]*change{}
		nth := map[[2]string]int{}
		for _, k := range b.ordered() {
			n := nth[[2]string{k.rule, k.responder}]
			nth[[2]string{k.rule, k.responder}]++
			t := b.steps[k]
			each := maps.Clone(t.targets)
			if t.more != (tally{}) {
				each["(further targets)"] = &t.more
			}
			for name, n2 := range each {
				all[place{k.rule, k.responder, name, n}] = &change{
					Rule: k.rule, Responder: k.responder, Target: name, New: *n2, position: k.position,
				}
			}
		}
		return all
	}
	was, is := gather(old), gather(b)
	var out []change
	for p, c := range is {
		if o := was[p]; o != nil {
			c.Old = o.New
		}
		out = append(out, *c)
	}
	for p, c := range was {
		if is[p] == nil {
			c.Old, c.New = c.New, tally{}
			out = append(out, *c)
		}
	}
	// That more or less is held back, and nothing else, is no change.
	out = slices.DeleteFunc(out, func(c change) bool { return c.Old.Would == c.New.Would && c.Old.Asks == c.New.Asks })
	for i := range out {
		switch c := &out[i]; {
		case c.Old.Would+c.Old.Asks == 0 && c.New.Would+c.New.Asks > 0:
			c.Change = "appears"
		case c.Old.Would+c.Old.Asks > 0 && c.New.Would+c.New.Asks == 0:
			c.Change = "goes"
		default:
			c.Change = "differs"
		}
	}
	slices.SortFunc(out, func(x, y change) int {
		return cmp.Or(cmp.Compare(x.Rule, y.Rule), cmp.Compare(x.position, y.position), cmp.Compare(x.Responder, y.Responder),
			cmp.Compare(x.Change, y.Change), cmp.Compare(x.Target, y.Target))
	})
	return out
}

// replay is a backtest of rules, and of others beside them.
type replay struct {
	tests []*backtest // the rules, and those of --diff
	out   replayed
	bar   *progress
}

func (p *program) newReplay(set, old *rules.Set, entries []responders.Entry, g responders.Guards) *replay {
	r := &replay{tests: []*backtest{newBacktest(set, entries, g)}, bar: newProgress(p.stderr)}
	r.out.Unchecked = responders.Unchecked()
	if old != nil {
		r.tests = append(r.tests, newBacktest(old, entries, g))
		r.out.diff = true
	}
	return r
}

func (r *replay) alert(a *alert.Alert, origin broker.Origin, now time.Time) {
	if r.out.Alerts++; r.out.From.IsZero() || now.Before(r.out.From) {
		r.out.From = now
	}
	if now.After(r.out.To) {
		r.out.To = now
	}
	for _, t := range r.tests {
		t.alert(a, origin, now)
	}
}

// history tries the rules on the alerts that are kept since a time.
func (r *replay) history(ctx context.Context, data string, since time.Time) error {
	r.out.history = true
	k, err := openKept(ctx, data)
	if err != nil {
		return err
	}
	defer k.close()
	return r.kept(ctx, k, since)
}

// keptAhead is how many alerts are handed over at a time, parsed.
const keptAhead = 256

// kept tries the rules on alerts while the next ones are read and parsed.
func (r *replay) kept(ctx context.Context, k *keptAlerts, since time.Time) error {
	defer r.bar.end()
	type parsed struct {
		*broker.Kept
		alert *alert.Alert // nil: it can't be read
		all   bool
		left  uint64
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	batches := make(chan []parsed, 2)
	done := make(chan error, 1)
	go func() {
		defer close(batches)
		batch := make([]parsed, 0, keptAhead)
		hand := func() error {
			select {
			case batches <- batch:
				batch = make([]parsed, 0, keptAhead)
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		err := k.each(ctx, since, func(kept *broker.Kept, all bool, left uint64) error {
			p := parsed{Kept: kept, all: all, left: left}
			if a, err := alert.Parse(kept.Data); err == nil {
				a.ID = kept.ID
				p.alert = a
			}
			if batch = append(batch, p); len(batch) == keptAhead {
				return hand()
			}
			return nil
		})
		if err == nil && len(batch) > 0 {
			err = hand()
		}
		done <- err
	}()
	for batch := range batches {
		for _, p := range batch {
			if p.all && (r.out.All.IsZero() || p.Received.Before(r.out.All)) {
				r.out.All = p.Received
			}
			if p.alert == nil {
				r.out.Bad++
				continue
			}
			r.alert(p.alert, p.Origin, p.Received)
			r.bar.say(r.out.Alerts, p.left)
		}
	}
	return <-done
}

// files tries the rules on recorded alerts; the time of each is now.
func (r *replay) files(p *program, paths []string) error {
	defer r.bar.end()
	var now time.Time
	for _, path := range paths {
		in := p.stdin
		if path != "-" {
			f, err := os.Open(path)
			if err != nil {
				return fmt.Errorf("read the alerts: %w", err)
			}
			defer f.Close()
			in = f
		}
		err := eachLine(in, func(_ int, line []byte) error {
			if len(line) > pipe.DefaultMaxLine {
				r.out.Bad++
				return nil
			}
			a, err := alert.Parse(line)
			if err != nil {
				r.out.Bad++
				return nil
			}
			if !a.Time.IsZero() {
				now = a.Time
			}
			r.alert(a, broker.OriginFile, now)
			r.bar.say(r.out.Alerts, 0)
			return nil
		})
		if err != nil {
			return fmt.Errorf("read the alerts in %s: %w", path, err)
		}
	}
	return nil
}

func (r *replay) print(p *program, asJSON bool) error {
	o := &r.out
	o.Matched, o.Waiting = r.tests[0].matched, r.tests[0].waiting
	if o.diff {
		o.Changes = r.tests[0].changes(r.tests[1])
	} else {
		o.Steps = r.tests[0].result()
	}
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		return enc.Encode(o)
	}
	columns := width(p.stdout)
	if o.diff {
		o.printChanges(out, columns)
	} else {
		o.printSteps(out, columns)
	}
	o.printNotes(out, columns)
	return nil
}

// shownTargets is how many are named in a table.
const shownTargets = 5

func (o *replayed) printSteps(w io.Writer, columns int) {
	if len(o.Steps) == 0 {
		fmt.Fprintln(w, "no step would have followed")
		return
	}
	t := &table{head: []string{"RULE", "STEP", "WOULD", "HELD", "TO WHAT, AND HELD BACK BY WHAT"}}
	for _, s := range o.Steps {
		var parts []string
		var names []string
		for _, of := range s.Targets[:min(len(s.Targets), shownTargets)] {
			names = append(names, fmt.Sprintf("%s (%s)", of.Target, of.text()))
		}
		if more := len(s.Targets) - shownTargets; more > 0 {
			names = append(names, fmt.Sprintf("and %d more", more))
		}
		parts = append(parts, strings.Join(names, ", "))
		if s.Asks > 0 {
			parts = append(parts, fmt.Sprintf("a person is asked: %d", s.Asks))
		}
		if s.Held > 0 {
			var by []string
			for _, g := range slices.SortedFunc(maps.Keys(s.HeldBy), func(x, y string) int {
				return cmp.Or(cmp.Compare(s.HeldBy[y], s.HeldBy[x]), cmp.Compare(x, y))
			}) {
				by = append(by, fmt.Sprintf("%s %d", g, s.HeldBy[g]))
			}
			parts = append(parts, "held back: "+strings.Join(by, ", "))
		}
		rule := s.Rule
		if s.Mode == broker.Audit {
			rule += " (audit)"
		}
		t.add(rule, s.Responder, strconv.Itoa(s.Would), strconv.Itoa(s.Held), strings.Join(parts, "; "))
	}
	t.print(w, columns)
}

// text is a tally in words.
func (t tally) text() string {
	var parts []string
	if t.Would > 0 {
		parts = append(parts, strconv.Itoa(t.Would))
	}
	if t.Asks > 0 {
		parts = append(parts, fmt.Sprintf("%d asked", t.Asks))
	}
	if t.Held > 0 {
		parts = append(parts, fmt.Sprintf("%d held", t.Held))
	}
	if len(parts) == 0 {
		return "0"
	}
	return strings.Join(parts, ", ")
}

// shownChanges is how many are listed in a table.
const shownChanges = 200

func (o *replayed) printChanges(w io.Writer, columns int) {
	if len(o.Changes) == 0 {
		fmt.Fprintln(w, "the same steps would have followed")
		return
	}
	sign := map[string]string{"appears": "+", "goes": "-", "differs": "~"}
	t := &table{head: []string{"", "RULE", "STEP", "OLD", "NEW", "TO WHAT"}}
	for _, c := range o.Changes[:min(len(o.Changes), shownChanges)] {
		t.add(sign[c.Change], c.Rule, c.Responder, c.Old.text(), c.New.text(), c.Target)
	}
	t.print(w, columns)
	if more := len(o.Changes) - shownChanges; more > 0 {
		fmt.Fprintf(w, "and %d more: -o json has all\n", more)
	}
}

func (o *replayed) printNotes(w io.Writer, columns int) {
	columns = cmp.Or(columns, 80)
	say := func(format string, args ...any) {
		for _, line := range wrap(fmt.Sprintf(format, args...), columns) {
			fmt.Fprintln(w, line)
		}
	}
	when := func(t time.Time) string { return t.Local().Format("2006-01-02 15:04") }
	fmt.Fprintln(w)
	bad := ""
	if o.Bad > 0 {
		bad = fmt.Sprintf(", %d more could not be read", o.Bad)
	}
	if o.Alerts == 0 {
		say("no alerts%s", bad)
	} else {
		say("%s from %s to %s: %d matched a rule%s", count(o.Alerts, "alert"), when(o.From), when(o.To), o.Matched, bad)
	}
	if o.history {
		all := "None is kept that did not."
		if !o.All.IsZero() {
			all = fmt.Sprintf("Since %s all are.", when(o.All))
		}
		say("Kept are the alerts that matched the rules of their time. %s So a rule that matches more than those did would have done more than it says here.", all)
	}
	say("Not checked: %s.", strings.Join(o.Unchecked, "; "))
}

// backtestFlags are those of stoop test that ask for a backtest.
type backtestFlags struct {
	history, diff string
	data          *string
}

func (f *backtestFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.history, "from-history", "", "try them on what was kept for `TIME` (30d)")
	cmd.Flags().StringVar(&f.diff, "diff", "", "what changes against the rules `FILE`")
	f.data = dataFlag(cmd)
}

func (f *backtestFlags) wanted() bool { return f.history != "" || f.diff != "" }

func (f *backtestFlags) check(args []string) error {
	switch {
	case f.history != "" && len(args) > 0:
		return usage("--from-history reads what stoop has kept: it takes no files of alerts")
	case f.history == "" && len(args) == 0:
		return usage("name files of alerts (- is standard input), or give --from-history 30d")
	case f.history != "":
		if _, err := days(f.history); err != nil {
			return usage("--from-history: %v", err)
		}
	}
	return nil
}

func (p *program) backtest(ctx context.Context, f *backtestFlags, set *rules.Set, entries []responders.Entry, g responders.Guards, files []string, asJSON bool) error {
	var old *rules.Set
	if f.diff != "" {
		var err error
		if old, err = rules.Load(f.diff, catalogOf(entries)); err != nil {
			return wrong(err)
		}
	}
	r := p.newReplay(set, old, entries, g)
	var err error
	if f.history == "" {
		err = r.files(p, files)
	} else {
		d, _ := days(f.history) // checked
		err = r.history(ctx, *f.data, time.Now().Add(-d))
	}
	if err != nil {
		return err
	}
	return r.print(p, asJSON)
}

// days reads a duration that may be in days: 30d.
func days(s string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		d, err := strconv.ParseUint(n, 10, 16)
		if err != nil || d == 0 {
			return 0, fmt.Errorf("%q is no duration, such as 30d or 12h", s)
		}
		return time.Duration(d) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is no duration, such as 30d or 12h", s)
	}
	return d, nil
}
