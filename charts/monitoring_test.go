package charts

import (
	"encoding/json"
	"go/ast"
	goparser "go/parser"
	"go/token"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	sigsyaml "sigs.k8s.io/yaml"
)

// metrics are those that stoop's sources make, by name, each with its labels.
func metrics(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	text := func(e ast.Expr) string {
		if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
			s, err := strconv.Unquote(l.Value)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		return ""
	}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != ".." || slices.Contains([]string{"charts", "e2e", "testdata", "tools"}, d.Name())) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := goparser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			name, labels, histogram := "", []string{}, false
			for _, arg := range call.Args {
				if s := text(arg); name == "" && strings.HasPrefix(s, "stoop_") {
					name = s
				}
				lit, ok := arg.(*ast.CompositeLit)
				if !ok {
					continue
				}
				for _, e := range lit.Elts {
					if kv, ok := e.(*ast.KeyValueExpr); ok {
						if key, ok := kv.Key.(*ast.Ident); ok && key.Name == "Name" && strings.HasPrefix(text(kv.Value), "stoop_") {
							name = text(kv.Value)
						}
						if key, ok := kv.Key.(*ast.Ident); ok && key.Name == "Buckets" {
							histogram = true
						}
					} else if _, ok := lit.Type.(*ast.ArrayType); ok {
						labels = append(labels, text(e))
					}
				}
			}
			if name == "" {
				return true
			}
			out[name] = labels
			if histogram {
				delete(out, name)
				out[name+"_sum"], out[name+"_count"], out[name+"_bucket"] = labels, labels, append(slices.Clone(labels), "le")
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 20 {
		t.Fatalf("the metrics are %v", out)
	}
	return out
}

// known checks that a query names metrics that there are, by labels that they have.
func known(t *testing.T, where, query string, all map[string][]string) {
	t.Helper()
	// Grafana's own.
	query = strings.NewReplacer("$__rate_interval", "5m", "$node", ".*").Replace(query)
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
	if err != nil {
		t.Errorf("%s: %s: %v", where, query, err)
		return
	}
	// What Prometheus adds to each.
	always := []string{"node", "instance", "job", "pod", "namespace"}
	var own []string
	parser.Inspect(expr, func(n parser.Node, _ []parser.Node) error {
		switch n := n.(type) {
		case *parser.VectorSelector:
			has, ok := all[n.Name]
			if !ok {
				t.Errorf("%s: there is no metric %q: %s", where, n.Name, query)
			}
			own = append(own, has...)
			for _, m := range n.LabelMatchers {
				if m.Name != labels.MetricName && !slices.Contains(has, m.Name) && !slices.Contains(always, m.Name) {
					t.Errorf("%s: %s has no label %q: %s", where, n.Name, m.Name, query)
				}
			}
		}
		return nil
	})
	parser.Inspect(expr, func(n parser.Node, _ []parser.Node) error {
		if a, ok := n.(*parser.AggregateExpr); ok {
			for _, label := range a.Grouping {
				if !slices.Contains(own, label) && !slices.Contains(always, label) {
					t.Errorf("%s: nothing has the label %q: %s", where, label, query)
				}
			}
		}
		return nil
	})
}

// Every alert and every query of the dashboard is about metrics that stoop has.
func TestQueriesNameMetrics(t *testing.T) {
	all := metrics(t)
	all["process_resident_memory_bytes"] = nil
	r := render(t, "--values", filepath.Join(chart, "ci", "monitoring.yaml"))
	asked := 0
	for _, o := range r.others {
		if o.GetKind() != "PrometheusRule" {
			continue
		}
		spec, err := sigsyaml.Marshal(o.Object["spec"])
		if err != nil {
			t.Fatal(err)
		}
		groups, errs := rulefmt.Parse(spec, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
		for _, err := range errs {
			t.Error(err)
		}
		for _, g := range groups.Groups {
			for _, rule := range g.Rules {
				asked++
				known(t, rule.Alert, rule.Expr, all)
				if rule.Annotations["summary"] == "" || rule.Labels["severity"] == "" {
					t.Errorf("%s says nothing, or not how bad it is", rule.Alert)
				}
			}
		}
	}
	if asked < 5 {
		t.Errorf("there are %d alerts", asked)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
	}
	if err := json.Unmarshal([]byte(r.configs["watchdog-dashboard"].Data["stoop.json"]), &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("%s asks nothing", p.Title)
		}
		for _, target := range p.Targets {
			known(t, p.Title, target.Expr, all)
		}
	}
	if len(dashboard.Panels) < 10 {
		t.Errorf("there are %d panels", len(dashboard.Panels))
	}
}

// The metrics in the sources are those that a running stoop serves: all that have no
// label are there from the start.
func TestMetricsAreServed(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	config, rules := filepath.Join(dir, "stoop.yaml"), filepath.Join(dir, "rules.yaml")
	for file, text := range map[string]string{
		config: "http: {listen: " + addr + "}\nsource: {pipe: " + filepath.Join(dir, "pipe") + "}\ndata: " + filepath.Join(dir, "data") + "\n",
		rules:  "rules: [{name: a, match: {priority: critical}, actions: [delete-pod]}]\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), programs.stoop, "run", "--config", config, "--rules", rules, "--node", "a")
	cmd.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST=", "KUBECONFIG=")
	cmd.Stderr = t.Output()
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cmd.Cancel(); err == nil {
			err = cmd.Wait()
			if err != nil {
				t.Error(err)
			}
		}
	}()
	// The probes of the pod ask this one.
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, err := command(t.Context(), "", programs.stoop, "probe", "ready", "--config", config)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	served, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for name, labels := range metrics(t) {
		if strings.HasPrefix(name, "stoop_fleet_") || strings.HasPrefix(name, "stoop_cluster_") || strings.HasPrefix(name, "stoop_audit_") {
			continue // with a cluster alone
		}
		if len(labels) == 0 && !strings.Contains(string(served), "\n"+name+" ") {
			t.Errorf("%s is not served", name)
		}
	}
}
