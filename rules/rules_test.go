package rules_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
	"stoop/rules"
)

var update = flag.Bool("update", false, "write the golden files anew")

// catalog stands for the real responders, which this package does not know.
func catalog() rules.Catalog {
	return rules.Catalog{
		"delete-pod": param.Describe(struct {
			GracePeriod    param.Duration `param:"gracePeriod" doc:"How long the pod has to end."`
			MaxUnavailable param.Portion  `param:"maxUnavailable" doc:"How many of its kind may be missing."`
			Force          bool           `param:"force" doc:"Whatever becomes of its workload."`
		}{GracePeriod: param.Duration(time.Second)}),
		"isolate-pod": param.Describe(struct {
			Direction  string         `param:"direction" doc:"Which way." oneof:"ingress egress both"`
			AllowCIDRs []param.CIDR   `param:"allowCIDRs" doc:"What stays allowed."`
			AllowDNS   bool           `param:"allowDNS" doc:"Names may be asked."`
			TTL        param.Duration `param:"ttl" doc:"Taken back after this; 0: never."`
		}{Direction: "both"}),
		"label-pod": param.Describe(struct {
			Labels map[string]string `param:"labels" doc:"The labels." required:"true"`
		}{}),
		"slack": param.Describe(struct {
			URL     param.Secret `param:"url" doc:"Where the address is read." required:"true"`
			Channel string       `param:"channel" doc:"Where to."`
		}{}),
		"webhook": param.Describe(struct {
			URL param.URL `param:"url" doc:"Where to." required:"true"`
		}{}),
		"file": param.Describe(struct {
			Path string `param:"path" doc:"The file."`
		}{"stoop.jsonl"}),
	}
}

func parse(t testing.TB, src string) *rules.Set {
	t.Helper()
	set, err := rules.Parse("rules.yaml", []byte(src), catalog())
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func read(t testing.TB, line string) *alert.Alert {
	t.Helper()
	a, err := alert.Parse([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestMistakes compares what is said of each testdata/*.yaml with the file
// beside it. What parses shows its warnings.
func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			set, err := rules.Parse(filepath.Base(file), src, catalog())
			var said rules.Problems
			switch {
			case err == nil:
				said = set.Warnings
			case !errors.As(err, &said):
				t.Fatalf("the error is %T, not Problems: %v", err, err)
			}
			got := "invalid\n"
			if err == nil {
				got = "valid\n"
			}
			got += said.Error() + "\n"
			golden := strings.TrimSuffix(file, ".yaml") + ".out"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if len(said) == 0 {
				t.Error("nothing is wrong with this file")
			}
			if strings.Contains(got, "hunter2") {
				t.Error("the message shows a secret")
			}
		})
	}
}

// What can't be kept in a file that editors and git may touch.
func TestMistakesInBytes(t *testing.T) {
	head := "rules:\n- name: a\n  match: {priority: debug}\n  actions: [file]\n"
	bomb := "x: &a [y, y, y, y, y, y, y, y, y, y]\n"
	for c := 'b'; c <= 'i'; c++ {
		bomb += fmt.Sprintf("x%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c, ", c-1), 10), ", "))
	}
	many := "rules:\n"
	for i := range 1001 {
		many += fmt.Sprintf("- {name: a%d, match: {priority: debug}, actions: [file]}\n", i)
	}
	for _, tt := range []struct{ name, src, want string }{
		{"empty", "", "f:1:1: there is nothing in this file"},
		{"white space", "\n \n", "f:1:1: there is nothing in this file"},
		{"no UTF-8", head + "# ok ok\n# f\xfcr\n", "f:6:4: the byte 0xfc here is not UTF-8"},
		{"UTF-16", "\xff\xfer\x00u\x00", "f:1:1: the byte 0xff here is not UTF-8"},
		{"NUL", head + "\x00", "f:"},
		{"large", head + strings.Repeat("#", 1<<20), "f:1:1: the file is larger than 1024 KiB"},
		{"bomb", bomb, "make more than 1048576 values"},
		{"cycle", "rules: &a\n- *a\n", "make more than"},
		{"merge bomb", "rules: &a {<<: [*a, *a]}\n", "make more than"},
		{"deep", "rules: " + strings.Repeat("[", 20000), "f:1:1: "},
		{"many", many, "there are more than 1000 rules"},
		{"many mistakes", "rules:\n" + strings.Repeat("- x\n", 500), "f:102:3: … and 400 more from here on"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set, err := rules.Parse("f", []byte(tt.src), catalog())
			if err == nil {
				t.Fatalf("it parsed: %v", set)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %.500s\nwant %s", err, tt.want)
			}
		})
	}
	for name, src := range map[string]string{
		"byte order mark": "\uFEFF" + head,
		"CRLF":            strings.ReplaceAll(head, "\n", "\r\n"),
		"document marks":  "---\n" + head + "...\n",
	} {
		if _, err := rules.Parse("f", []byte(src), catalog()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSet(t *testing.T) {
	set := parse(t, `
mode: enforce
rules:
  - name: one
    description: The first.
    match: {priority: critical}
    onFailure: stop
    actions:
      - isolate-pod: {direction: egress, ttl: 90m}
        onFailure: continue
      - delete-pod:
      - label-pod: {labels: {a: b}}
  - name: two
    mode: audit
    match: &all {priority: debug}
    actions: [file]
  - {name: three, match: *all, actions: &fs [file]}
  - {name: four, match: *all, actions: *fs}
`)
	one := set.Rules[0]
	want := []broker.Action{
		{Responder: "isolate-pod", Params: json.RawMessage(`{"direction":"egress","ttl":"1h30m"}`), OnFailure: broker.Continue},
		{Responder: "delete-pod", OnFailure: broker.Stop},
		{Responder: "label-pod", Params: json.RawMessage(`{"labels":{"a":"b"}}`), OnFailure: broker.Stop},
	}
	if !reflect.DeepEqual(one.Actions, want) {
		t.Errorf("got %+v", one.Actions)
	}
	var modes []broker.Mode
	for _, r := range set.Rules {
		modes = append(modes, r.Mode)
	}
	if !slices.Equal(modes, []broker.Mode{broker.Enforce, broker.Audit, broker.Enforce, broker.Enforce}) {
		t.Error(modes)
	}
	if one.Description != "The first." || len(set.Hash) != 12 || set.Warnings != nil || set.Rules[3].Actions[0].OnFailure != broker.Continue {
		t.Errorf("%+v", set)
	}
	if m := parse(t, "rules: [{name: a, match: {priority: debug}, actions: [file]}]").Rules[0].Mode; m != broker.Audit {
		t.Errorf("without a mode it is %s", m)
	}
}

// The file's mode is that of the rules that name none: so one rule can be
// switched on while the others are still looked at. The program's mode is the
// ceiling, and is asked at the act.
func TestARulesOwnModeCounts(t *testing.T) {
	for _, tt := range []struct{ file, rule, want broker.Mode }{
		{"", "", broker.Audit},
		{"", broker.Enforce, broker.Enforce},
		{broker.Audit, broker.Enforce, broker.Enforce},
		{broker.Enforce, broker.Audit, broker.Audit},
		{broker.Enforce, "", broker.Enforce},
		{broker.Enforce, broker.Enforce, broker.Enforce},
	} {
		rule := ""
		if tt.rule != "" {
			rule = "mode: " + string(tt.rule) + ", "
		}
		src := "rules: [{name: r, " + rule + "match: {priority: debug}, actions: [file]}]\n"
		if tt.file != "" {
			src += "mode: " + string(tt.file) + "\n" // wherever it stands
		}
		if got := parse(t, src).Rules[0].Mode; got != tt.want {
			t.Errorf("file %q, rule %q: got %s, want %s", tt.file, tt.rule, got, tt.want)
		}
	}
}

const shell = `{"hostname":"node-1","output":"A shell","output_fields":{"container.id":"0123456789ab","k8s.ns.name":"shop-eu",` +
	`"k8s.pod.name":null,"evt.time":1766000000123456789,"proc.name":"sh","user.uid":0,"ratio":0.5,"big":18446744073709551616,` +
	`"proc.aname[2]":"x\\y[z]","proc.is_exe_writable":true,"fd.name":"<NA>","empty":"",` +
	`"images":["good/a","bad/b"],"nothing":[],"mixed":[1,true,null],"deep":{"n":[1,2.5]}},` +
	`"priority":"Notice","rule":"Terminal shell in container","source":"syscall","tags":["container","shell","T1059"],"time":"2026-01-02T03:04:05.000000006Z"}`

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		rule string // what stands between name and actions
		want bool
	}{
		{`match: {rule: Terminal shell in container}`, true},
		{`match: {rule: terminal shell in container}`, false},
		{`match: {rule: "Terminal*"}`, true},
		{`match: {rule: "*in container"}`, true},
		{`match: {rule: "*shell*"}`, true},
		{`match: {rule: "?erminal shell in containe?"}`, true},
		{`match: {rule: "Terminal?"}`, false},
		{`match: {rule: [Other, "Term*"]}`, true},
		{`match: {rule: [Other, Another]}`, false},
		{`match: {rule: [a, b, c, d, e, f, g, h, i, j, Terminal shell in container]}`, true},

		{`match: {priority: debug}`, true},
		{`match: {priority: NOTICE}`, true},
		{`match: {priority: warning}`, false},
		{`match: {priority: =notice}`, true},
		{`match: {priority: =info}`, false},
		{`match: {priority: ["=debug", critical]}`, false},
		{`match: {priority: ["=debug", =Notice]}`, true},

		{`match: {source: syscall}`, true},
		{`match: {source: [k8s_audit, "sys*"]}`, true},
		{`match: {source: k8s_audit}`, false},
		{`match: {tags: shell}`, true},
		{`match: {tags: [x, "T1*"]}`, true},
		{`match: {tags: host}`, false},
		{`match: {hostname: "node-?"}`, true},
		{`match: {hostname: node-2}`, false},

		{`match: {fields: {proc.name: sh}}`, true},
		{`match: {fields: {proc.name: [bash, sh]}}`, true},
		{`match: {fields: {proc.name: "*"}}`, true},
		{`match: {fields: {proc.name: sh, user.uid: 1}}`, false},
		{`match: {fields: {user.uid: 0}}`, true},
		{`match: {fields: {proc.is_exe_writable: true}}`, true},
		{`match: {fields: {evt.time: 1766000000123456789}}`, true},
		{`match: {fields: {evt.time: 1766000000123456788}}`, false},
		{`match: {fields: {"proc.aname[2]": 'x\y[z]'}}`, true},
		{`match: {fields: {"proc.aname[2]": 'x\*[z]'}}`, true},
		{`match: {fields: {"proc.aname[2]": '[a-z]*'}}`, false},
		{`match: {fields: {k8s.pod.name: "*"}}`, false},
		{`match: {fields: {fd.name: "*"}}`, false},
		{`match: {fields: {empty: "*"}}`, false},
		{`match: {fields: {none.such: "*"}}`, false},
		{`match: {fields: {images: "bad/*"}}`, true},
		{`match: {fields: {images: "ugly/*"}}`, false},
		{`match: {fields: {nothing: "*"}}`, false},
		{`match: {fields: {mixed: true}}`, true},
		{`match: {fields: {deep: "*"}}`, false},

		// Keys are ANDed.
		{`match: {rule: "*", priority: notice, source: syscall, tags: shell, hostname: node-1, fields: {user.uid: 0}}`, true},
		{`match: {rule: "*", priority: notice, source: syscall, tags: shell, hostname: node-1, fields: {user.uid: 1}}`, false},

		{"match: {priority: debug}\n  except: {fields: {container.id: host}}", true},
		{"match: {priority: debug}\n  except: {fields: {k8s.ns.name: \"shop-*\"}}", false},
		{"match: {priority: debug}\n  except: {fields: {k8s.ns.name: \"shop-*\", user.uid: 1}}", true},
		{"match: {priority: debug}\n  except: {tags: shell, source: syscall}", false},
		{"match: {priority: debug}\n  except: {fields: {images: good/a}}", true}, // the other image is not spared
		{"match: {priority: debug}\n  except: {fields: {images: [good/a, \"bad/*\"]}}", false},
		{"match: {priority: debug}\n  except: {fields: {nothing: \"*\"}}", true},
		{"match: {priority: debug}\n  except: {fields: {mixed: [1, true]}}", true}, // null is neither

		{"match: {priority: debug}\n  where: fields[\"k8s.ns.name\"].startsWith(\"shop-\")", true},
		{"match: {priority: debug}\n  where: fields[\"k8s.pod.name\"] == \"\"", false},
		{"match: {priority: debug}\n  where: '!(\"k8s.pod.name\" in fields)'", true},
		{"match: {priority: debug}\n  where: '\"fd.name\" in fields || \"empty\" in fields'", false},
		{"match: {priority: debug}\n  where: fields[\"evt.time\"] == 1766000000123456789", true},
		{"match: {priority: debug}\n  where: fields[\"evt.time\"] > 1766000000123456788 && fields[\"user.uid\"] < 0.5", true},
		{"match: {priority: debug}\n  where: fields.ratio == 0.5 && fields.big > 1e19 && fields[\"proc.is_exe_writable\"] == true", true},
		{"match: {priority: debug}\n  where: fields[\"user.uid\"].startsWith(\"0\")", false}, // an error in it
		{"match: {priority: debug}\n  where: fields[\"none.such\"] != \"x\"", false},
		{"match: {priority: debug}\n  where: '!(fields[\"none.such\"] == \"x\")'", false},
		{"match: {priority: debug}\n  where: fields.images.exists(i, i.startsWith(\"bad/\")) && fields.deep.n[1] == 2.5", true},
		{"match: {priority: debug}\n  where: rule == \"Terminal shell in container\" && priority == \"notice\" && source == \"syscall\" && hostname == \"node-1\" && output == \"A shell\" && \"shell\" in tags", true},
		{"match: {priority: debug}\n  where: size(fields) > 5 && fields.exists(name, name == \"ratio\") && !fields.exists(name, name == \"empty\") && fields != {}", true},
		{"match: {priority: debug}\n  where: 'fields == {\"a\": 1} || type(fields) == int || 1 in [2]'", false},
		{"match: {priority: debug}\n  where: type(fields) == map && fields[\"user.uid\"] == int(\"0\")", true},
		{"match: {priority: debug}\n  where: output.matches(\"^A .h\") && rule.lowerAscii().contains(\"shell\")", true},
		{"match: {priority: debug}\n  where: '[1,2,3,4,5,6,7,8,9,10].all(a, [1,2,3,4,5,6,7,8,9,10].all(b, [1,2,3,4,5,6,7,8,9,10].all(c, [1,2,3,4,5,6,7,8,9,10].all(d, [1,2,3,4,5,6,7,8,9,10].all(e, [1,2,3,4,5,6,7,8,9,10].all(f, a+b+c+d+e+f > 0))))))'", false}, // too dear
	} {
		t.Run(tt.rule, func(t *testing.T) {
			set := parse(t, "rules:\n- name: r\n  "+tt.rule+"\n  actions: [file]\n")
			a := read(t, shell)
			got := len(set.Match(a)) == 1
			if got != tt.want {
				t.Errorf("got %v", got)
			}
			if why := set.Rules[0].Why(a); (why == "") != got {
				t.Errorf("it matches: %v, and yet Why says %q", got, why)
			}
		})
	}
}

func TestMatchKeepsTheOrderOfTheFile(t *testing.T) {
	set := parse(t, `
rules:
  - {name: a, match: {rule: [A, A, B]}, actions: [file]}
  - {name: b, match: {priority: notice}, actions: [file]}
  - {name: c, match: {rule: A}, actions: [file]}
  - {name: d, match: {rule: "A*"}, actions: [file]}
  - {name: e, match: {rule: A, priority: critical}, actions: [file]}
  - {name: f, match: {rule: B}, actions: [file]}
  - {name: g, match: {tags: t}, actions: [file]}
`)
	for line, want := range map[string]string{
		`{"rule":"A","priority":"Notice"}`:                "a b c d",
		`{"rule":"A","priority":"Critical","tags":["t"]}`: "a b c d e g",
		`{"rule":"A","priority":"Debug"}`:                 "a c d",
		`{"rule":"B","priority":"Debug"}`:                 "a f",
		`{"rule":"C","priority":"Debug"}`:                 "",
		`{"rule":"Axe","priority":"Debug"}`:               "d",
	} {
		var got []string
		for _, r := range set.Match(read(t, line)) {
			got = append(got, r.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", line, got, want)
		}
	}
}

// A line of text has no rule, source, tags or fields: nothing that is asked of
// them is there.
func TestMatchText(t *testing.T) {
	a := read(t, "03:04:05.000000006: Critical A shell")
	for rule, want := range map[string]bool{
		`{priority: critical}`:                       true,
		`{priority: debug, rule: "*"}`:               false,
		`{priority: debug, source: "*"}`:             false,
		`{priority: debug, tags: "*"}`:               false,
		`{priority: debug, hostname: "*"}`:           false,
		`{priority: debug, fields: {proc.name: sh}}`: false,
	} {
		set := parse(t, "rules: [{name: r, match: "+rule+", actions: [file]}]")
		if got := len(set.Match(a)) == 1; got != want {
			t.Errorf("%s: got %v", rule, got)
		}
	}
}

func TestExplain(t *testing.T) {
	set := parse(t, `
rules:
  - name: critical-pod
    match: {priority: critical, source: syscall}
    actions: [file]
  - name: shells
    match: {rule: [Terminal shell in container, Run shell untrusted], priority: notice}
    except: {fields: {k8s.ns.name: tools}}
    where: fields["user.uid"] == 0
    actions: [file]
`)
	const head = `{"rule":"Terminal shell in container","priority":"`
	for line, want := range map[string]string{
		head + `Critical"}`: `[critical-pod]`,
		head + `Debug"}`:    `no rule matched; nearest shells: priority is debug, not notice or above`,
		head + `Notice","output_fields":{"k8s.ns.name":"tools"}}`: `no rule matched; nearest shells: spared by except`,
		head + `Notice","output_fields":{"user.uid":1}}`:          `no rule matched; nearest shells: where is false`,
		head + `Notice"}`: `no rule matched; nearest shells: where: no such key: user.uid`,
		`{"rule":"Other\u001b[2J","priority":"Notice"}`:                                        `no rule matched: none is about "Other\x1b[2J" of priority notice`,
		`{"rule":"Falco internal: syscall event drop","priority":"Debug","source":"internal"}`: `no rule matched: Falco speaks of itself here`,
	} {
		matched, got := set.Explain(read(t, line))
		if got == "" {
			var names []string
			for _, r := range matched {
				names = append(names, r.Name)
			}
			got = fmt.Sprint(names)
		}
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", line, got, want)
		}
	}
}

func TestWhyIsFitForATerminal(t *testing.T) {
	set := parse(t, "rules: [{name: r, match: {rule: A, fields: {x: y}}, actions: [file]}, {name: s, match: {priority: debug}, where: 'fields[fields[\"x\"]] == 1', actions: [file]}]")
	a := read(t, `{"rule":"A","priority":"Debug","output_fields":{"x":"\u001b[2J\u202e`+strings.Repeat("x", 1000)+`"}}`)
	for _, r := range set.Rules {
		why := r.Why(a)
		if why == "" || strings.ContainsAny(why, "\x1b\u202e") || len(why) > 300 {
			t.Errorf("got %q", why)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]string{
		filepath.Join(dir, "none.yaml"): "reading the rules: stat " + dir + "/none.yaml: no such file or directory",
		dir:                             "reading the rules: " + dir + " is no regular file",
	} {
		_, err := rules.Load(path, catalog())
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestMatchByManyAtOnce(t *testing.T) {
	set := parse(t, "rules: [{name: r, match: {rule: \"*\"}, where: 'fields[\"user.uid\"] == 0 && rule.matches(\"shell\")', actions: [file]}]")
	a := read(t, shell)
	done := make(chan int)
	for range 4 {
		go func() {
			n := 0
			for range 100 {
				n += len(set.Match(a))
			}
			done <- n
		}()
	}
	for range 4 {
		if n := <-done; n != 100 {
			t.Errorf("%d of 100 matched", n)
		}
	}
}

func ExampleSet_Match() {
	set, err := rules.Parse("rules.yaml", []byte(`
mode: audit
rules:
  - name: delete-pod-on-critical
    match: {priority: critical}
    actions:
      - delete-pod: {gracePeriod: 2s}
`), catalog())
	if err != nil {
		fmt.Println(err)
		return
	}
	a, err := alert.Parse([]byte(`{"rule":"Fileless execution via memfd_create","priority":"Critical"}`))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, r := range set.Match(a) {
		fmt.Println(r.Name, r.Mode, r.Actions[0].Responder, string(r.Actions[0].Params))
	}
	// Output: delete-pod-on-critical audit delete-pod {"gracePeriod":"2s"}
}

func ExampleParse() {
	_, err := rules.Parse("rules.yaml", []byte(`rules:
  - name: delete-pod-on-critical
    match: {priority: critcal}
    actions:
      - delete-pod: {gracePeriode: 2s}
`), catalog())
	fmt.Println(err)
	// Output:
	// rules.yaml:3:23: unknown priority "critcal": did you mean "critical"? There are: emergency, alert, critical, error, warning, notice, informational, debug
	//         match: {priority: critcal}
	//                           ^
	// rules.yaml:5:22: delete-pod: unknown parameter "gracePeriode": did you mean "gracePeriod"? There are: gracePeriod, maxUnavailable, force
	//           - delete-pod: {gracePeriode: 2s}
	//                          ^
}
