package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"stoop/broker"
	"stoop/doctor"
	"stoop/node"
	"stoop/param"
	"stoop/responders"
	"stoop/rules"
)

func (p *program) doctorCommand() *cobra.Command {
	var f struct {
		config, rules, pipe, file, node, data, kubeconfig, falco, falcoVersion, output string
	}
	cmd := &cobra.Command{
		Use:   "doctor [CHECK...]",
		Short: "Say what is there, what is missing, and what to do",
		Long: `Looks at everything that an alert passes on its way from Falco to the act, and
says of each what is there, what is missing, and what to do about it. It changes
nothing: it reads, and asks the API server and the stoop that runs here, if one
does. Run it as stoop runs, as the same user and in the same pod, with the same
flags: it sees with its own eyes.

` + wrapped("The checks are "+strings.Join(doctor.Names(doctor.Checks()), ", ")+". Without one it makes them all.") + `

Exits with 1 if something is missing that is needed. Warnings, and what can't be
seen from here, change nothing.`,
		Example: "  stoop doctor --rules rules.yaml\n  stoop doctor falco --falco falco.yaml --falco-version 0.44.1\n  kubectl exec -n stoop ds/stoop -c stoop -- /usr/bin/stoop doctor",
	}
	fl := cmd.Flags()
	fl.StringVar(&f.config, "config", "", "the configuration `FILE` (default\n"+defaultConfig+")")
	fl.StringVar(&f.rules, "rules", defaultRules, "the rules `FILE`")
	fl.StringVar(&f.pipe, "pipe", "", "the FIFO `PATH`")
	fl.StringVar(&f.file, "file", "", "the `PATH` of the file that is followed")
	fl.StringVar(&f.node, "node", "", "this node's `NAME` (default NODE_NAME, or the\nhost's)")
	fl.StringVar(&f.data, "data", "", "the data `FOLDER` (default /var/lib/stoop)")
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "a kubeconfig `FILE` (default in a pod: its\naccount)")
	fl.StringVar(&f.falco, "falco", "", "Falco's configuration `FILE` (default: that of the\nFalco that runs, or /etc/falco/falco.yaml)")
	fl.StringVar(&f.falcoVersion, "falco-version", "", "Falco's `VERSION`, where it can't be seen")
	fl.StringVarP(&f.output, "output", "o", "table", "table or json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(f.output); err != nil {
			return err
		}
		checks, err := checksOf(args)
		if err != nil {
			return err
		}
		c, err := loadConfig(f.config)
		if err != nil {
			return wrong(err)
		}
		for _, s := range []struct {
			v    *string
			flag string
		}{{&c.Node, f.node}, {&c.Data, f.data}, {&c.Kubernetes.Kubeconfig, f.kubeconfig}} {
			if s.flag != "" {
				*s.v = s.flag
			}
		}
		switch {
		case f.pipe != "" && f.file != "":
			return usage("--pipe and --file exclude each other; the configuration can name several sources")
		case f.pipe != "" || f.file != "":
			c.Source = Source{Pipe: f.pipe, File: f.file}
		case c.Source == Source{}:
			c.Source.Pipe = defaultPipe
		}
		for _, path := range []*string{&c.Source.Pipe, &c.Source.File} {
			if *path != "" {
				if *path, err = filepath.Abs(*path); err != nil {
					return err
				}
			}
		}
		dc, err := p.examined(&c, f.rules)
		if err != nil {
			return err
		}
		dc.Falco, dc.FalcoVersion = f.falco, f.falcoVersion
		return p.printFindings(doctor.Examine(cmd.Context(), dc, checks), f.output == "json")
	}
	return cmd
}

// checksOf are the checks that are named, or all.
func checksOf(names []string) ([]doctor.Check, error) {
	all := doctor.Checks()
	if len(names) == 0 {
		return all, nil
	}
	for _, name := range names {
		if !slices.Contains(doctor.Names(all), name) {
			meant := ""
			if near := param.Nearest(name, doctor.Names(all)); near != "" {
				meant = fmt.Sprintf("; did you mean %s?", near)
			}
			return nil, usage("there is no check %q%s (stoop doctor --help lists them)", name, meant)
		}
	}
	return slices.DeleteFunc(all, func(c doctor.Check) bool { return !slices.Contains(names, c.Name) }), nil
}

// examined is what the doctor looks at.
func (p *program) examined(c *Config, rulesFile string) (doctor.Config, error) {
	name, err := c.nodeName()
	if err != nil {
		return doctor.Config{}, err
	}
	entries := responders.All()
	l := c.Broker.Limits
	d := doctor.Config{
		Version: version(), Node: name, Aliases: c.Aliases, MaxAge: time.Duration(c.Guard.MaxAge),
		Source: doctor.Source{Pipe: c.Source.Pipe, File: c.Source.File, HTTP: c.Source.HTTP.Listen, Stdin: c.Source.Stdin},
		Data:   c.Data, KeepMost: int64(l.Alerts.Size) + int64(l.Outcomes.Size) + int64(c.Evidence.Size),
		RulesFile: rulesFile, Entries: entries,
		Host:    node.New(node.Config{Cgroup: c.Host.Cgroup}),
		Dates:   &doctor.Dates{},
		Running: func(ctx context.Context) (doctor.Running, error) { return askStatus(ctx, c.Data) },
	}
	for _, path := range []string{c.Source.HTTP.TokenFile, c.Source.HTTP.Cert, c.Source.HTTP.Key, c.Source.HTTP.ClientCA} {
		if path != "" && c.Source.HTTP.Listen != "" {
			d.Source.HTTPFiles = append(d.Source.HTTPFiles, path)
		}
	}
	rc, self, err := c.reach()
	switch {
	case err != nil:
		d.KubeErr = err
	case rc != nil:
		rc.Wrap(d.Dates.Wrap)
		// It asks much at once, and no more after that.
		rc.QPS, rc.Burst = 50, 200
		d.Server = rc.Host
		d.Kube, d.KubeErr = responders.NewKube(rc)
	}
	d.Namespace, d.AuditEvents = self.Home(), c.Kubernetes.AuditEvents == elected
	set, err := rules.Load(rulesFile, catalogOf(entries))
	if err != nil {
		d.RulesErr = err
		return d, nil
	}
	d.RulesHash = set.Hash
	d.Steps = planned(set, entries, append(slices.Clone(c.Guard.Protect.Namespaces), d.Namespace), d.AuditEvents)
	for _, w := range set.Warnings {
		d.Doubts = append(d.Doubts, w.String())
	}
	d.Doubts = append(d.Doubts, c.unserved(set)...)
	return d, nil
}

// askStatus asks the stoop that runs on a data folder how it is.
func askStatus(ctx context.Context, data string) (doctor.Running, error) {
	var r doctor.Running
	client, err := broker.Dial(data)
	if err != nil {
		return r, err
	}
	defer client.Close()
	return r, client.Ask(ctx, apiStatus, struct{}{}, &r)
}

// status answers how stoop is.
func (a *api) status(ctx context.Context, _ *nats.Msg, _ string) (any, error) {
	r := doctor.Running{
		Version: version(), Node: a.engine.host.Env.Node, Mode: string(a.engine.host.Guards.Mode),
		Paused: a.host.Paused().Paused,
	}
	if p := a.host.PausedCluster(); p != nil {
		if r.Unseen = p.Problem; p.Paused {
			r.Lift = responders.PauseCommand(p.Namespace, false)
		}
	}
	if h := a.engine.health; h != nil {
		if set := h.rules.Load(); set != nil {
			r.Rules = set.Hash
		}
		if err := h.ready(ctx); err != nil {
			r.NotReady = err.Error()
		}
	}
	last, err := a.broker.LastAlert(ctx)
	if err != nil {
		return nil, err
	}
	if last != nil {
		r.LastAlert = &doctor.LastAlert{
			Rule: last.Alert.Rule, Time: last.Alert.Time, Received: last.Received,
			Hostname: last.Alert.Hostname, Text: last.Alert.Text, Origin: string(last.Origin),
		}
	}
	return r, nil
}

// printFindings prints what was found, none of it unescaped: files and processes say
// what others wrote.
func (p *program) printFindings(found []doctor.Finding, asJSON bool) error {
	counts := map[doctor.Status]int{}
	for i := range found {
		f := &found[i]
		counts[f.Status]++
		f.Found, f.Do = clean(f.Found), clean(f.Do)
	}
	if asJSON {
		enc := json.NewEncoder(p.stdout)
		enc.SetEscapeHTML(false)
		for _, f := range found {
			if err := enc.Encode(f); err != nil {
				return err
			}
		}
	} else {
		p.printTable(found)
		fmt.Fprintf(p.stdout, "\n%d ok, %d missing, %s, %d unknown\n", counts[doctor.OK], counts[doctor.Missing], count(counts[doctor.Warning], "warning"), counts[doctor.Unknown])
	}
	if counts[doctor.Missing] > 0 {
		return errSilent
	}
	return nil
}

func (p *program) printTable(found []doctor.Finding) {
	w := width(p.stdout)
	if w == 0 {
		w = 80
	}
	t := &table{head: []string{"CHECK", "STATUS", "WHAT IS THERE, AND WHAT TO DO"}}
	name := ""
	for i, f := range found {
		check := f.Check
		if check == name {
			check = ""
		}
		name = f.Check
		t.add(check, string(f.Status), f.Found)
		// What mends several in a row is said once, below them.
		if f.Do != "" && (i+1 == len(found) || found[i+1].Check != f.Check || found[i+1].Do != f.Do) {
			t.add("", "", "> "+f.Do)
		}
	}
	t.print(p.stdout, w)
}

// wrapped is a text for the help, in lines that fit.
func wrapped(s string) string { return strings.Join(wrap(s, 80), "\n") }
