package convert_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"stoop/alert"
	"stoop/convert"
	"stoop/param"
	"stoop/responders"
	"stoop/rules"
)

var update = flag.Bool("update", false, "write what comes of the files in testdata again")

func catalog(t testing.TB) rules.Catalog {
	t.Helper()
	c := rules.Catalog{}
	for _, e := range responders.All() {
		c[e.Name] = e.Params
	}
	return c
}

// Beside NAME.yaml in testdata stands what comes of it: NAME.out, the rules or what
// is refused. NAME-2.yaml is a file that overrides it.
func TestTalon(t *testing.T) {
	names, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		if strings.HasSuffix(name, "-2.yaml") {
			continue
		}
		n++
		t.Run(filepath.Base(name), func(t *testing.T) {
			files := []convert.File{file(t, name)}
			if second := strings.TrimSuffix(name, ".yaml") + "-2.yaml"; exists(second) {
				files = append(files, file(t, second))
			}
			got, err := convert.Talon(files, catalog(t))
			var refused rules.Problems
			switch {
			case errors.As(err, &refused):
				got = []byte(err.Error() + "\n")
			case err != nil:
				t.Fatal(err)
			}
			out := strings.TrimSuffix(name, ".yaml") + ".out"
			if *update {
				if err := os.WriteFile(out, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("what comes of it is\n%s\nand not, as in %s,\n%s\n(go test ./convert -update writes it again)", got, out, want)
			}
		})
	}
	if n == 0 {
		t.Error("there is nothing to convert in testdata")
	}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func file(t testing.TB, name string) convert.File {
	t.Helper()
	src, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return convert.File{Name: filepath.Base(name), Src: src}
}

// convertRules converts rules, and reads what comes of them.
func convertRules(t *testing.T, src string) *rules.Set {
	t.Helper()
	out, err := convert.Talon([]convert.File{{Name: "talon.yaml", Src: []byte(src)}}, catalog(t))
	if err != nil {
		t.Fatalf("%v\nof\n%s", err, src)
	}
	set, err := rules.Parse("rules.yaml", out, catalog(t))
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, out)
	}
	return set
}

// event is an alert as Talon sees it, with the fields as it writes them.
type event struct {
	rule, priority, source string
	tags                   []string
	fields                 map[string]any
}

// talonMatch is what a rule of Talon's asks for.
type talonMatch struct {
	rules, tags, fields []string
	priority, source    string
}

// matches is how Talon compares, as its documentation says.
func (m talonMatch) matches(e event) bool {
	if len(m.rules) > 0 && !slices.Contains(m.rules, e.rule) || m.source != "" && m.source != e.source {
		return false
	}
	order := []string{"debug", "informational", "notice", "warning", "error", "critical", "alert", "emergency"}
	if m.priority != "" {
		word := strings.ToLower(strings.TrimLeft(m.priority, "<>="))
		is, asked := slices.Index(order, e.priority), slices.Index(order, word)
		ok := is == asked
		switch strings.TrimRight(m.priority[:len(m.priority)-len(word)], "=") {
		case ">":
			ok = is > asked || ok && strings.Contains(m.priority, "=")
		case "<":
			ok = is < asked || ok && strings.Contains(m.priority, "=")
		}
		if !ok {
			return false
		}
	}
	anyOf := func(entries []string, holds func(part string) bool) bool {
		return len(entries) == 0 || slices.ContainsFunc(entries, func(entry string) bool {
			return !slices.ContainsFunc(strings.Split(strings.ReplaceAll(entry, " ", ""), ","), func(part string) bool { return !holds(part) })
		})
	}
	return anyOf(m.tags, func(tag string) bool { return slices.Contains(e.tags, tag) }) &&
		anyOf(m.fields, func(part string) bool {
			if field, value, ok := strings.Cut(part, "!="); ok {
				v, there := e.fields[field]
				return !there || fmt.Sprint(v) != value
			}
			field, value, _ := strings.Cut(part, "=")
			v, there := e.fields[field]
			return there && fmt.Sprint(v) == value
		})
}

func (m talonMatch) yaml() string {
	var b strings.Builder
	b.WriteString("- rule: it\n  match:\n")
	for key, list := range map[string][]string{"rules": m.rules, "tags": m.tags, "output_fields": m.fields} {
		if len(list) > 0 {
			fmt.Fprintf(&b, "    %s: [%s]\n", key, strings.Join(quote(list), ", "))
		}
	}
	for key, value := range map[string]string{"priority": m.priority, "source": m.source} {
		if value != "" {
			fmt.Fprintf(&b, "    %s: %q\n", key, value)
		}
	}
	return b.String() + "  actions: [{action: a, actionner: kubernetes:cordon}]\n"
}

func quote(list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = strconv.Quote(s)
	}
	return out
}

// What a rule of Talon's matches, and nothing else, the converted one matches.
func TestTalonMatchesTheSame(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) // the same each time
	some := func(most int, of ...string) []string {
		var list []string
		for range random.IntN(most + 1) {
			list = append(list, of[random.IntN(len(of))])
		}
		return list
	}
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	conditions := func() []string {
		var entries []string
		for range random.IntN(3) {
			var parts []string
			for range 1 + random.IntN(3) {
				parts = append(parts, one("k8s.ns.name", "user.uid", "proc.name", "proc.is_exe_writable")+one("=", "!=")+one("shop", "bank", "0", "7", "sh", "true", "s*", "?"))
			}
			entries = append(entries, strings.Join(parts, ", "))
		}
		return entries
	}
	matched := 0
	for range 400 {
		m := talonMatch{
			rules: some(2, "A", "B", "C *", "A?"), tags: some(2, "x", "y", "x, y", "y,z"), fields: conditions(),
			priority: one("", "", ">=Warning", ">Notice", "<error", "<=Error", "Critical", "=notice"), source: one("", "", "syscall", "k8s_audit"),
		}
		set := convertRules(t, m.yaml())
		for range 50 {
			e := event{
				rule: one("A", "B", "C *", "C d", "AB"), priority: one("debug", "notice", "warning", "error", "critical", "emergency"),
				source: one("syscall", "k8s_audit"), tags: some(3, "x", "y", "z"), fields: map[string]any{},
			}
			for field, values := range map[string][]any{
				"k8s.ns.name": {"shop", "bank", "s*"}, "user.uid": {0, 7, 1000000}, "proc.name": {"sh", "7", "?", "s"}, "proc.is_exe_writable": {true, false},
			} {
				if random.IntN(3) > 0 {
					e.fields[field] = values[random.IntN(len(values))]
				}
			}
			line, err := json.Marshal(map[string]any{
				"rule": e.rule, "priority": e.priority, "source": e.source, "tags": e.tags, "output_fields": e.fields, "time": "2026-01-02T03:04:05Z", "output": "o",
			})
			if err != nil {
				t.Fatal(err)
			}
			a, err := alert.Parse(line)
			if err != nil {
				t.Fatal(err)
			}
			want := m.matches(e)
			if got := len(set.Match(a)) > 0; got != want {
				t.Fatalf("%s\nis of %s\n%t in stoop, %t in Talon (%s)", m.yaml(), line, got, want, set.Rules[0].Why(a))
			}
			if want {
				matched++
			}
		}
	}
	if matched < 500 {
		t.Errorf("only %d alerts matched: the test compares nothing", matched)
	}
}

// What hangs on the responders that there are.
func TestTalonByWhatThereIs(t *testing.T) {
	type none struct{}
	type isolate struct {
		Direction  string       `param:"direction" doc:"d"`
		AllowCIDRs []param.CIDR `param:"allowCIDRs" doc:"d"`
		Order      int          `param:"order" doc:"d"`
	}
	type deletePod struct {
		MaxUnavailable param.Portion `param:"maxUnavailable" doc:"d"`
		Force          bool          `param:"force" doc:"d"`
	}
	rule := func(actionner, params string) string {
		return fmt.Sprintf("- rule: r\n  actions: [{action: a, actionner: %s, parameters: {%s}}]\n", actionner, params)
	}
	terminate := func(params string) string { return rule("kubernetes:terminate", params) }
	deleting := rules.Catalog{"delete-pod": param.Describe(deletePod{})}
	for _, c := range []struct {
		src     string
		catalog rules.Catalog
		want    string // in what comes of it, or is refused
		refused bool
	}{
		{rule("calico:networkpolicy", "order: 20"), rules.Catalog{}, "talon.yaml:2:36: this stoop has no responder calico-isolate", true},
		{rule("calico:networkpolicy", "order: 20, allow_cidr: [10.0.0.0/8]"), rules.Catalog{"calico-isolate": param.Describe(isolate{})}, "order: 20", false},
		{rule("calico:networkpolicy", "order: 20"), rules.Catalog{"calico-isolate": param.Describe(none{})}, "order is left out", false},
		{rule("cilium:networkpolicy", "allow_cidr: [10.0.0.0/8]"), rules.Catalog{"cilium-isolate": param.Describe(isolate{})}, "allowCIDRs: [10.0.0.0/8]", false},
		{rule("cilium:networkpolicy", "allow_cidr: [10.0.0.0/8]"), rules.Catalog{"cilium-isolate": param.Describe(none{})}, "allow_cidr can't be said", true},
		{rule("cilium:networkpolicy", "allow_namespaces: [a]"), rules.Catalog{"cilium-isolate": param.Describe(none{})}, "allow_namespaces can't be said", true},
		{terminate(""), deleting, "maxUnavailable: 100%\n", false},
		{terminate("ignore_statefulsets: true"), deleting, "Talon passes over pods of StatefulSets; stoop isolates them", false},
		{terminate("ignore_statefulsets: true"), deleting, "maxUnavailable: 100%\n", false},
		{terminate("ignore_statefulsets: false"), deleting, "Talon deletes pods of StatefulSets too", false},
		{terminate("ignore_standalone_pods: true"), deleting, "maxUnavailable: 100%\n", false},
		{terminate("ignore_standalone_pods: false"), deleting, "force: true\n", false},
		{terminate("ignore_standalone_pods: false, ignore_statefulsets: true"), deleting, "Pods without a controller are isolated instead of deleted", false},
		{terminate("ignore_standalone_pods: false, min_healthy_replicas: 50%"), deleting, "maxUnavailable: 50%\n", false},
		{terminate("min_healthy_replicas: 33%"), deleting, "maxUnavailable: 67%\n", false},
		{terminate("min_healthy_replicas: '100%'"), deleting, "maxUnavailable: 0%\n", false},
		{terminate("min_healthy_replicas: 0%"), deleting, "maxUnavailable: 100%\n", false},
		{terminate("min_healthy_replicas: '0'"), deleting, "maxUnavailable: 100%\n", false},
		{terminate("min_healthy_replicas: '1'"), deleting, "- delete-pod\n", false},
		{terminate("min_healthy_replicas: '2'"), deleting, "write a percentage", true},
		{terminate("min_healthy_replicas: 101%"), deleting, "write a percentage", true},
		{terminate("min_healthy_replicas: 33%"), rules.Catalog{"delete-pod": param.Describe(none{})}, "min_healthy_replicas: this stoop's delete-pod can't be told that", true},
		{terminate("ignore_daemonsets: true"), deleting, "ignore_daemonsets: stoop can't tell", true},
	} {
		out, err := convert.Talon([]convert.File{{Name: "talon.yaml", Src: []byte(c.src)}}, c.catalog)
		got := string(out)
		if err != nil {
			got = err.Error()
		}
		if (err != nil) != c.refused || !strings.Contains(got, c.want) {
			t.Errorf("%s\nbecomes\n%s\n(refused: %t), want %q", c.src, got, err != nil, c.want)
		}
	}
}

func FuzzTalon(f *testing.F) {
	names, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range names {
		f.Add(file(f, name).Src, []byte(nil))
	}
	f.Add(file(f, "testdata/override.yaml").Src, file(f, "testdata/override-2.yaml").Src)
	c := catalog(f)
	f.Fuzz(func(t *testing.T, one, two []byte) {
		files := []convert.File{{Name: "1", Src: one}}
		if len(two) > 0 {
			files = append(files, convert.File{Name: "2", Src: two})
		}
		// That the rules are right, and say what was meant, it proves itself.
		_, err := convert.Talon(files, c)
		var refused rules.Problems
		switch {
		case err == nil, strings.HasPrefix(err.Error(), "there is no rule in "):
		case !errors.As(err, &refused) || strings.Contains(err.Error(), "mistake of stoop's"):
			t.Fatal(err)
		}
		for _, p := range refused {
			src := files[0].Src
			if p.File == "2" {
				src = two
			}
			if p.Line < 1 || p.Column < 1 || p.Line > bytes.Count(src, []byte("\n"))+1 || p.Message == "" {
				t.Errorf("%s", p)
			}
		}
		if err != nil && strings.ContainsRune(err.Error(), '\x1b') {
			t.Error("a control character gets through to the terminal")
		}
	})
}
