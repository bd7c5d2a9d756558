package cli

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

func (p *program) checkCommand() *cobra.Command {
	var config, file string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with rules and configuration",
		Long: `Reads the rules, and the configuration if one is given, and says everything that
is wrong with them, each with its file, line and column. Nothing is run. With a
configuration alone, the rules are not looked at.

Exits with 1 if anything is wrong. Warnings are printed and change nothing.`,
		Example: "  stoop check --rules rules.yaml\n  stoop check --config stoop.yaml --rules rules.yaml",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, cerr := loadConfig(config)
			var rerr error
			var set *rules.Set
			if file == "" && config == "" {
				file = defaultRules
			}
			if file != "" {
				set, rerr = rules.Load(file, catalogOf(responders.All()))
			}
			if cerr == nil && config != "" {
				if _, cerr = c.brokerConfig(); cerr == nil {
					_, cerr = c.evidenceBucket()
				}
			}
			for _, err := range []error{cerr, rerr} {
				if err != nil {
					fmt.Fprintln(p.stdout, err)
				}
			}
			if set != nil {
				for _, w := range set.Warnings {
					fmt.Fprintln(p.stdout, "warning:", w)
				}
				warnings := len(set.Warnings)
				if config != "" && cerr == nil {
					for _, w := range c.unserved(set) {
						fmt.Fprintln(p.stdout, "warning:", w)
						warnings++
					}
				}
				fmt.Fprintf(p.stdout, "%s: %s, in %s mode, %s\n", file, count(len(set.Rules), "rule"), set.Mode, count(warnings, "warning"))
			}
			if cerr != nil || rerr != nil {
				return errSilent
			}
			if config != "" {
				fmt.Fprintf(p.stdout, "%s: fine\n", config)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE`")
	cmd.Flags().StringVar(&file, "rules", "", "the rules `FILE` (default "+defaultRules+")")
	return cmd
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

// tested is a line of stoop test -o json.
type tested struct {
	Line       int            `json:"line"`
	Rule       string         `json:"rule,omitempty"`
	Priority   string         `json:"priority,omitempty"`
	Target     *alert.Target  `json:"target,omitempty"`
	Matches    []router.Match `json:"matches,omitempty"`
	Waits      []router.Wait  `json:"waits,omitempty"` // rules that matched and wait for others that agree
	Suppressed string         `json:"suppressed,omitempty"`
	Why        string         `json:"why,omitempty"` // no rule matched
	Error      string         `json:"error,omitempty"`
}

func (p *program) testCommand() *cobra.Command {
	var file, config, output string
	var f backtestFlags
	cmd := &cobra.Command{
		Use:   "test --rules FILE ALERTS...",
		Short: "Say which steps recorded alerts would cause",
		Long: `Holds recorded alerts (files of one alert a line; - is standard input) against
rules and says which would match, and which steps would follow. It takes each
alert's own time as now and any hostname as this node, and asks no cluster.
Nothing is done.

With --from-history it tries the rules on the alerts that stoop has kept, at
the times when they arrived: what would have been done, to what, how often, and
what the guards would have held back. With --diff it says what these rules would
do that those of another file would not, and the other way round.`,
		Example: "  stoop test --rules rules.yaml alerts.jsonl\n  stoop test --rules new.yaml --from-history 30d --diff rules.yaml\n  kubectl logs ds/falco -n falco | stoop test --rules rules.yaml -o json -",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cmp.Or(checkOutput(output), f.check(args)); err != nil {
				return err
			}
			entries := responders.All()
			c, set, err := loadBoth(config, file, entries)
			if err != nil {
				return wrong(err)
			}
			if f.wanted() {
				return p.backtest(cmd.Context(), &f, set, entries, c.foreseen(), args, output == "json")
			}
			t := newTester(set, entries, c.foreseen())
			return t.files(p, args, output == "json")
		},
	}
	cmd.Flags().StringVar(&file, "rules", defaultRules, "the rules `FILE`")
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE`, for its guards")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	f.add(cmd)
	return cmd
}

func checkOutput(o string) error {
	if o != "table" && o != "json" {
		return usage("-o is %q: it is table or json", o)
	}
	return nil
}

// tester holds alerts against rules, without a cluster.
type tester struct {
	set     *rules.Set
	guards  responders.Guards
	trust   router.Trust
	counts  *router.Counts
	now     time.Time // of the last alert that has a time
	lines   int
	matched int
	bad     int
}

func newTester(set *rules.Set, entries []responders.Entry, g responders.Guards) *tester {
	t := &tester{set: set, guards: g, trust: trustOf(entries, g), now: time.Unix(0, 0)}
	t.counts = router.NewCounts(t.trust, nil, nil)
	return t
}

func (t *tester) files(p *program, paths []string, asJSON bool) error {
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	tab := &table{head: []string{"LINE", "PRIORITY", "ALERT", "WHAT WOULD FOLLOW"}}
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
		err := eachLine(in, func(n int, line []byte) error {
			r := t.line(n, line)
			if asJSON {
				return enc.Encode(r)
			}
			tab.add(strconv.Itoa(r.Line), r.Priority, cut(clean(r.alertText()), 34), r.follows())
			return nil
		})
		if err != nil {
			return fmt.Errorf("read the alerts in %s: %w", path, err)
		}
	}
	if asJSON {
		return nil
	}
	tab.print(out, width(p.stdout))
	were := "were"
	if t.bad == 1 {
		were = "was"
	}
	fmt.Fprintf(out, "\n%s: %d matched a rule, %d matched none, %d %s no alert\n", count(t.lines, "line"), t.matched, t.lines-t.matched-t.bad, t.bad, were)
	return nil
}

// eachLine calls f for every line that is not blank, and skips those longer
// than the pipe takes.
func eachLine(in io.Reader, f func(n int, line []byte) error) error {
	r := bufio.NewReaderSize(in, 64<<10)
	var line []byte
	for n := 1; ; n++ {
		line = line[:0]
		for {
			part, err := r.ReadSlice('\n')
			if len(line) <= pipe.DefaultMaxLine {
				line = append(line, part...)
			}
			if errors.Is(err, bufio.ErrBufferFull) {
				continue
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if len(bytes.TrimSpace(line)) > 0 {
				if ferr := f(n, line); ferr != nil {
					return ferr
				}
			}
			if err != nil {
				return nil
			}
			break
		}
	}
}

func (t *tester) line(n int, line []byte) tested {
	r := tested{Line: n}
	t.lines++
	if len(line) > pipe.DefaultMaxLine {
		t.bad++
		r.Error = fmt.Sprintf("no alert: the line is longer than %d bytes", pipe.DefaultMaxLine)
		return r
	}
	a, err := alert.Parse(line)
	if err != nil {
		t.bad++
		r.Error = err.Error()
		return r
	}
	r.Rule, r.Priority = a.Rule, a.Priority.String()
	if target := a.Target(); target != (alert.Target{}) {
		r.Target = &target
	}
	found, why := t.set.Explain(a)
	if len(found) == 0 {
		r.Why = why
		return r
	}
	t.matched++
	var agreements []router.Agreement
	if router.Waiting(found) {
		agreements = t.count(a, found)
	}
	harm := false
	for i, rule := range found {
		if rule.When != nil && !agreements[i].Reached {
			r.Waits = append(r.Waits, router.Wait{Rule: rule.Name, Why: agreements[i].Why})
			continue
		}
		m := router.MatchOf(rule)
		r.Matches = append(r.Matches, m)
		harm = harm || slices.ContainsFunc(m.Steps, t.trust.Harms)
	}
	if harm {
		r.Suppressed = t.guards.Foresee(a)
	}
	return r
}

// count counts an alert, at its own time, for the rules that wait for several.
func (t *tester) count(a *alert.Alert, found []*rules.Rule) []router.Agreement {
	if !a.Time.IsZero() {
		t.now = a.Time
	}
	target := a.Target()
	target.Node = ""
	return t.counts.Add(router.Arrived{Alert: a, Target: target, Received: t.now, Now: t.now}, found)
}

func (r *tested) alertText() string {
	switch {
	case r.Error != "":
		return "(no alert)"
	case r.Rule == "":
		return "(plain text)"
	}
	return r.Rule
}

// follows says in words what the line would cause.
func (r *tested) follows() string {
	switch {
	case r.Error != "":
		return r.Error
	case len(r.Matches) == 0 && len(r.Waits) == 0:
		return r.Why
	}
	var parts []string
	for _, m := range r.Matches {
		s := m.Rule + ": " + strings.Join(m.Steps, ", ")
		if m.Mode == broker.Audit {
			s += " (audit)"
		}
		parts = append(parts, s)
	}
	for _, w := range r.Waits {
		parts = append(parts, w.Rule+" waits: "+clean(w.Why))
	}
	s := strings.Join(parts, "; ")
	if r.Suppressed != "" {
		s += "; held back: " + r.Suppressed
	}
	return s
}
