package alert

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const example = `{"hostname":"node-a","output":"10:21:03.120000001: Notice A shell was spawned in a container with an attached terminal (evt_type=execve user=root user_uid=0 user_loginuid=-1 process=sh proc_exepath=/bin/busybox parent=runc command=sh terminal=34816 exe_flags=EXE_WRITABLE|EXE_LOWER_LAYER container_id=3f1d5e6a7b8c container_image=docker.io/library/alpine container_image_tag=3.20 container_name=web k8s_ns=shop k8s_pod=web-5f6d8c9b7-x2x4p)","output_fields":{"container.id":"3f1d5e6a7b8c","container.image.repository":"docker.io/library/alpine","container.image.tag":"3.20","container.name":"web","evt.arg.flags":"EXE_WRITABLE|EXE_LOWER_LAYER","evt.time":1760000000123456789,"evt.type":"execve","k8s.ns.name":"shop","k8s.pod.name":"web-5f6d8c9b7-x2x4p","proc.cmdline":"sh","proc.exepath":"/bin/busybox","proc.name":"sh","proc.pname":"runc","proc.tty":34816,"user.loginuid":-1,"user.name":"root","user.uid":0},"priority":"Notice","rule":"Terminal shell in container","source":"syscall","tags":["T1059","container","maturity_stable","mitre_execution","shell"],"time":"2025-10-09T08:53:20.123456789Z"}`

func mustParse(t testing.TB, line string) *Alert {
	t.Helper()
	a, err := Parse([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseJSON(t *testing.T) {
	a := mustParse(t, " "+example+" \r\n")
	if a.Rule != "Terminal shell in container" || a.Priority != Notice || a.Source != "syscall" || a.Hostname != "node-a" || a.Text {
		t.Errorf("%+v", a)
	}
	if want := time.Date(2025, 10, 9, 8, 53, 20, 123456789, time.UTC); !a.Time.Equal(want) {
		t.Errorf("the time is %v", a.Time)
	}
	if want := []string{"T1059", "container", "maturity_stable", "mitre_execution", "shell"}; !reflect.DeepEqual(a.Tags, want) {
		t.Errorf("the tags are %q", a.Tags)
	}
	if string(a.Raw) != example {
		t.Errorf("the bytes are not kept: %s", a.Raw)
	}
	if len(a.ID) != 32 || a.ID != IDOf([]byte(example)) || a.ID != IDOf([]byte("\t"+example+"\n")) {
		t.Errorf("the id is %q", a.ID)
	}
	if got := a.Subject(); got != "falco.notice.terminal_shell_in_container" {
		t.Errorf("the subject is %q", got)
	}
	if got, _ := a.Field("evt.time"); got != "1760000000123456789" {
		t.Errorf("evt.time has lost digits: %s", got)
	}
	if got, ok := a.Field("user.loginuid"); got != "-1" || !ok {
		t.Errorf("user.loginuid is %q, %v", got, ok)
	}
}

func TestParseKeepsNothingOfTheLine(t *testing.T) {
	line := []byte(example)
	a, err := Parse(line)
	if err != nil {
		t.Fatal(err)
	}
	for i := range line {
		line[i] = 'x'
	}
	if string(a.Raw) != example || a.Rule != "Terminal shell in container" || a.Fields()["proc.name"] != "sh" {
		t.Errorf("it changed with the line: %s", a.Raw)
	}
}

func TestParseVariants(t *testing.T) {
	tests := []struct {
		name, line string
		check      func(a *Alert) bool
	}{
		{"2018: five keys", `{"output":"x","priority":"Critical","rule":"r","time":"2018-05-01T10:00:00.5Z","output_fields":{}}`, func(a *Alert) bool {
			return a.Source == SourceSyscall && a.Hostname == "" && a.Tags == nil && !a.Time.IsZero()
		}},
		{"an empty source", `{"priority":"Info","rule":"r","source":""}`, func(a *Alert) bool { return a.Source == SourceSyscall && a.Priority == Informational }},
		{"another source", `{"priority":"Info","rule":"r","source":"k8s_audit"}`, func(a *Alert) bool { return a.Source == "k8s_audit" }},
		{"nulls", `{"priority":"ERROR","rule":"r","source":null,"tags":null,"hostname":null,"output":null,"output_fields":null,"time":null}`, func(a *Alert) bool {
			return a.Priority == Error && a.Fields() == nil && a.Time.IsZero() && a.Output == ""
		}},
		{"a time that is none", `{"priority":"Error","rule":"r","time":"2021-04-13T20:58:00.7Z+2"}`, func(a *Alert) bool { return a.Time.IsZero() }},
		{"a time with a zone", `{"priority":"Error","rule":"r","time":"2020-03-03T17:50:03.391768+02:00"}`, func(a *Alert) bool {
			return a.Time.Hour() == 15 && a.Time.Location() == time.UTC
		}},
		{"escaped keys and values", "{\"pri\\u006frity\":\"Not\\u0069ce\",\"rule\":\"a \\\"b\\\"\\n\"}", func(a *Alert) bool {
			return a.Priority == Notice && a.Rule == "a \"b\"\n"
		}},
		{"further keys", `{"uuid":"1","priority":"Alert","rule":"r","custom":{"priority":"Debug","deep":[[{}]]}}`, func(a *Alert) bool { return a.Priority == Alerting }},
		{"not UTF-8", "{\"priority\":\"Alert\",\"rule\":\"a\xffb\",\"output_fields\":{\"x\":\"\xfe\"}}", func(a *Alert) bool {
			v, ok := a.Field("x")
			return ok && v == "\uFFFD" && a.Rule == "a\uFFFDb"
		}},
		{"an empty object of fields", `{"priority":"Alert","rule":"r","output_fields":{}}`, func(a *Alert) bool { _, ok := a.Field("x"); return !ok }},
		{"made from text", `{"output":"m","priority":"error","text":true,"time":"2025-10-09T08:53:20Z"}`, func(a *Alert) bool {
			return a.Text && a.Rule == "" && a.Source == "" && a.Subject() == "falco.error._text"
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if a := mustParse(t, test.line); !test.check(a) {
				t.Errorf("%+v", a)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	for line, want := range map[string]string{
		"":                                  "the line is empty",
		" \t\r ":                            "the line is empty",
		"{":                                 "no alert",
		"{}":                                `no "priority"`,
		`{"rule":"r","priority":""}`:        `no "priority"`,
		`{"priority":"Error"}`:              `no "rule"`,
		`{"priority":"Loud","rule":"r"}`:    `unknown priority "Loud"`,
		`{"priority":4,"rule":"r"}`:         `"priority" is a number, where a string is expected`,
		`{"priority":"Error","rule":["r"]}`: `"rule" is an array`,
		`{"priority":"Error","rule":"r","tags":"a"}`:              `"tags" is a string, where an array`,
		`{"priority":"Error","rule":"r","tags":[1]}`:              `"tags" is a number, where a string`,
		`{"priority":"Error","rule":"r","output_fields":[]}`:      `"output_fields" is an array, where an object`,
		`{"priority":"Error","rule":"r","output_fields":{"a":,}}`: "no alert",
		`{"priority":"Error","rule":"r"} x`:                       `"x" stands behind the JSON object`,
		`{"priority":"Error","rule":"r","rule":"s"}`:              "duplicate",
		`["a"]`:                                  "neither a JSON object nor",
		"hello":                                  "neither a JSON object nor",
		"hello: world":                           `"hello" is no time`,
		"10:21:03.1: Loud message":               `unknown priority "Loud"`,
		"10:21:03.1: Error":                      "has no message",
		"25:21:03.1: Error message":              "is no time",
		"{" + strings.Repeat(`"a":{`, 20000):     "no alert",
		`{"rule":` + strings.Repeat("[", 200000): "no alert",
	} {
		a, err := Parse([]byte(line))
		if a != nil || !errors.Is(err, ErrNoAlert) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%.60q: %v; want %q", line, err, want)
		}
		if len(fmt.Sprint(err)) > 400 {
			t.Errorf("%.60q: the error is %d bytes long", line, len(err.Error()))
		}
	}
}

func TestParseText(t *testing.T) {
	zone := time.FixedZone("", 2*3600)
	now := time.Date(2025, 10, 9, 0, 30, 0, 0, zone)
	tests := []struct {
		line, output string
		priority     Priority
		time         time.Time
	}{
		{"00:29:59.123456789: Warning some (a=b): c", "some (a=b): c", Warning, time.Date(2025, 10, 9, 0, 29, 59, 123456789, zone)},
		{"23:59:59.000000001: critical x", "x", Critical, time.Date(2025, 10, 8, 23, 59, 59, 1, zone)},
		{"2025-10-08T20:00:00.500000000+0000: Informational x", "x", Informational, time.Date(2025, 10, 8, 20, 0, 0, 500000000, time.UTC)},
		{"2025-10-08T20:00:00Z: Debug x\x00\xffy", "x\x00\uFFFDy", Debug, time.Date(2025, 10, 8, 20, 0, 0, 0, time.UTC)},
		{"00:30:00.2: Error clocks differ a little", "clocks differ a little", Error, time.Date(2025, 10, 9, 0, 30, 0, 200000000, zone)},
	}
	for _, test := range tests {
		a, err := parseText([]byte(test.line), now)
		if err != nil {
			t.Errorf("%q: %v", test.line, err)
			continue
		}
		if !a.Text || a.Rule != "" || a.Source != "" || a.Priority != test.priority || a.Output != test.output || !a.Time.Equal(test.time) {
			t.Errorf("%q: %+v, want %v", test.line, a, test)
		}
		again := mustParse(t, string(a.Raw))
		if !again.Text || again.Output != test.output || again.Priority != test.priority || !again.Time.Equal(test.time) {
			t.Errorf("%q: its JSON %s says something else", test.line, a.Raw)
		}
	}
}

func TestDistrust(t *testing.T) {
	for _, line := range []string{
		example,
		`{"priority":"Error","rule":"r","text":false}`,
		`{"text":"x","priority":"Error","rule":"r"}`,
		`{"te\u0078t":null , "priority" : "Error", "rule":"a \"}b","x":{"text":false}}`,
	} {
		a := mustParse(t, line)
		id, rule := a.ID, a.Rule
		a.Distrust()
		if !a.Text || a.ID != id {
			t.Errorf("%s: it is not marked", line)
		}
		again := mustParse(t, string(a.Raw))
		if !again.Text || again.Rule != rule || !reflect.DeepEqual(again.Fields(), a.Fields()) {
			t.Errorf("%s: its JSON is %s", line, a.Raw)
		}
		var std map[string]any
		if err := json.Unmarshal(a.Raw, &std); err != nil || std["text"] != true {
			t.Errorf("%s: %v", a.Raw, err)
		}
		raw := string(a.Raw)
		if a.Distrust(); string(a.Raw) != raw {
			t.Errorf("marked twice: %s", a.Raw)
		}
	}
}

func TestPriorities(t *testing.T) {
	for i, p := range Priorities() {
		for _, word := range []string{p.String(), strings.ToUpper(p.String()), strings.ToUpper(p.String()[:1]) + p.String()[1:]} {
			if got, err := ParsePriority(word); err != nil || got != p {
				t.Errorf("%q is %v, %v", word, got, err)
			}
		}
		if p.Urgent() != (i <= 2) || !Emergency.AtLeast(p) || !p.AtLeast(Debug) {
			t.Errorf("%v is out of order", p)
		}
		text, err := p.MarshalText()
		var back Priority
		if err != nil || back.UnmarshalText(text) != nil || back != p {
			t.Errorf("%v does not come back from %q", p, text)
		}
	}
	for _, word := range []string{"Info", "INFO", "info"} {
		if got, err := ParsePriority(word); err != nil || got != Informational {
			t.Errorf("%q is %v, %v", word, got, err)
		}
	}
	for _, word := range []string{"", "warn", "Critical ", "ſ", strings.Repeat("x", 1000)} {
		if got, err := ParsePriority(word); err == nil || len(err.Error()) > 100 {
			t.Errorf("%.20q is %v, %v", word, got, err)
		}
	}
}

func TestSubject(t *testing.T) {
	for rule, want := range map[string]string{
		"Terminal shell in container":              "terminal_shell_in_container",
		"  --Launch (Privileged) Container v1.2!!": "launch_privileged_container_v1_2",
		"a.b*c>d e":                 "a_b_c_d_e",
		"Ünïcode":                   "n_code",
		"\u212a":                    "rule_" + hashOf("\u212a"), // the Kelvin sign is no k
		"漢字":                        "rule_" + hashOf("漢字"),
		"_text":                     "text",
		strings.Repeat("ab ", 1000): strings.Repeat("ab_", 66) + "ab",
	} {
		line, err := json.Marshal(map[string]string{"rule": rule, "priority": "Debug"})
		if err != nil {
			t.Fatal(err)
		}
		got := mustParse(t, string(line)).Subject()
		if got != "falco.debug."+want {
			t.Errorf("%.40q is published on %q, want %q", rule, got, "falco.debug."+want)
		}
	}
}

func hashOf(s string) string { return IDOf([]byte(s))[:8] }

func TestFields(t *testing.T) {
	a := mustParse(t, `{"priority":"Error","rule":"r","output_fields":{"s":"x","i":12345678901234567890,"f":1.50,"t":true,"n":null,"e":"","na":"<NA>","l":["a",1,null],"o":{"k":"v"},"proc.aname[2]":"sh","jevt.value[/x]":"y","esc\"":"\u0000"}}`)
	want := map[string]any{
		"s": "x", "i": json.Number("12345678901234567890"), "f": json.Number("1.50"), "t": true, "n": nil, "e": "", "na": "<NA>",
		"l": []any{"a", json.Number("1"), nil}, "o": map[string]any{"k": "v"}, "proc.aname[2]": "sh", "jevt.value[/x]": "y", "esc\"": "\x00",
	}
	if got := a.Fields(); !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %#v\nwant %#v", got, want)
	}
	for name, want := range map[string]string{"s": "x", "i": "12345678901234567890", "f": "1.50", "t": "true", "proc.aname[2]": "sh"} {
		if got, ok := a.Field(name); !ok || got != want {
			t.Errorf("%s is %q, %v", name, got, ok)
		}
	}
	for _, name := range []string{"n", "e", "na", "l", "o", "absent"} {
		if got, ok := a.Field(name); ok || got != "" {
			t.Errorf("%s is there: %q", name, got)
		}
	}
}

func TestTarget(t *testing.T) {
	const full = "3f1d5e6a7b8c0123456789abcdef0123456789abcdef0123456789abcdef0123"
	tests := []struct {
		name, keys, fields string
		want               Target
	}{
		{"a pod", `"hostname":"node-a",`, `"container.id":"3f1d5e6a7b8c","k8s.ns.name":"shop","k8s.pod.name":"web-0"`, Target{Namespace: "shop", Pod: "web-0", Container: "3f1d5e6a7b8c", Node: "node-a"}},
		{
			"all of it", `"hostname":"node-a",`, `"container.id":"3f1d5e6a7b8c","container.full_id":"` + full + `","k8s.ns.name":"shop","k8s.pod.name":"web-0","k8s.pod.uid":"0b5cbb3e-0000-4000-8000-000000000001","proc.pid":4711,"proc.pid.ts":1760000000123456789`,
			Target{Namespace: "shop", Pod: "web-0", UID: "0b5cbb3e-0000-4000-8000-000000000001", Container: full, Node: "node-a", PID: 4711, PIDStart: 1760000000123456789},
		},
		{"the host", "", `"container.id":"host","container.full_id":"` + full + `","k8s.ns.name":"shop","k8s.pod.name":"web-0","k8s.pod.uid":"0b5c"`, Target{Host: true}},
		{"none: null", "", `"container.id":null,"k8s.ns.name":null,"k8s.pod.name":null,"proc.pid":null`, Target{}},
		{"none: <NA>", "", `"container.id":"<NA>","k8s.ns.name":"<NA>","k8s.pod.name":"<NA>","proc.pid":"<NA>"`, Target{}},
		{"none: empty", "", `"container.id":"","k8s.ns.name":"","k8s.pod.name":""`, Target{}},
		{"none: absent", "", ``, Target{}},
		{"a container alone", "", `"container.id":"3f1d5e6a7b8c"`, Target{Container: "3f1d5e6a7b8c"}},
		{"numbers as strings", "", `"proc.pid":"4711","proc.pid.ts":"1760000000123456789"`, Target{PID: 4711, PIDStart: 1760000000123456789}},
		{"numbers that are none", "", `"proc.pid":-1,"proc.pid.ts":1.5e9`, Target{}},
		{"the host's name in the fields", "", `"evt.hostname":"node-b"`, Target{Node: "node-b"}},
		{"names that nothing has", "", `"container.id":"../../x","k8s.ns.name":"a/b","k8s.pod.name":"A B","k8s.pod.uid":"x; rm"`, Target{}},
		{
			"an audit event", `"source":"k8s_audit",`, `"ka.target.resource":"configmaps","ka.target.name":"settings","ka.target.namespace":"shop","ka.verb":"get"`,
			Target{Resource: &Resource{Resource: "configmaps", Name: "settings", Namespace: "shop"}},
		},
		{
			"an audit event with the name in the response", `"source":"k8s_audit",`, `"ka.target.resource":"pods","ka.target.name":null,"ka.resp.name":"web-0","ka.target.namespace":"shop","ka.target.subresource":"exec"`,
			Target{Resource: &Resource{Resource: "pods", Name: "web-0", Namespace: "shop", Subresource: "exec"}},
		},
		{"an audit event with names that nothing has", "", `"ka.target.resource":"pods/../nodes","ka.target.name":"x"`, Target{}},
		{
			"an audit event with some", "", `"ka.target.resource":"clusterroles","ka.target.name":"system:node","ka.target.namespace":"a/../b","ka.target.subresource":"x?y"`,
			Target{Resource: &Resource{Resource: "clusterroles", Name: "system:node"}},
		},
		{"text names nothing", `"text":true,"hostname":"node-a",`, `"container.id":"3f1d5e6a7b8c","proc.pid":1`, Target{Node: "node-a"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a := mustParse(t, `{`+test.keys+`"priority":"Error","rule":"r","output_fields":{`+test.fields+`}}`)
			if got := a.Target(); !reflect.DeepEqual(got, test.want) {
				t.Errorf("\n got %+v %+v\nwant %+v", got, got.Resource, test.want)
			}
		})
	}
}

// corpus reads a file of real alerts, which are not part of the project.
func corpus(t *testing.T, name string) [][]byte {
	t.Helper()
	folder := os.Getenv("STOOP_CORPUS")
	if folder == "" {
		t.Skip("STOOP_CORPUS does not name a folder of recorded alerts")
	}
	raw, err := os.ReadFile(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	var lines [][]byte
	scan := bufio.NewScanner(bytes.NewReader(raw))
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		lines = append(lines, bytes.Clone(scan.Bytes()))
	}
	if err := scan.Err(); err != nil || len(lines) == 0 {
		t.Fatalf("%s: %d lines, %v", name, len(lines), err)
	}
	return lines
}

func TestCorpusJSON(t *testing.T) {
	for i, line := range corpus(t, "alerts-json.jsonl") {
		a, err := Parse(line)
		if err != nil {
			t.Errorf("line %d: %v", i+1, err)
			continue
		}
		// encoding/json, which is slower, reads the same.
		var want struct {
			Rule, Output, Hostname string
			Tags                   []string
			Fields                 map[string]any `json:"output_fields"`
		}
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber()
		if err := d.Decode(&want); err != nil {
			t.Fatal(err)
		}
		if a.Rule != want.Rule || a.Output != want.Output || a.Hostname != want.Hostname || len(a.Tags) != len(want.Tags) {
			t.Errorf("line %d: %+v", i+1, a)
		}
		if !reflect.DeepEqual(a.Fields(), want.Fields) {
			t.Errorf("line %d: its fields are\n%v, want\n%v", i+1, a.Fields(), want.Fields)
		}
		if !bytes.Equal(a.Raw, bytes.TrimSpace(line)) || a.Text || a.Source == "" {
			t.Errorf("line %d: %+v", i+1, a)
		}
		a.Target()
		if subject := a.Subject(); strings.Count(subject, ".") != 2 || strings.ContainsAny(subject, " *>") {
			t.Errorf("line %d: %q", i+1, subject)
		}
	}
}

func TestCorpusText(t *testing.T) {
	texts := 0
	for i, line := range corpus(t, "alerts-text.log") {
		a, err := Parse(line)
		if err != nil {
			if !errors.Is(err, ErrNoAlert) {
				t.Errorf("line %d: %v", i+1, err)
			}
			t.Logf("line %d: %v", i+1, err)
			continue
		}
		texts++
		if !a.Text || a.Output == "" || a.Time.IsZero() {
			t.Errorf("line %d: %+v", i+1, a)
		}
	}
	if texts < 50 {
		t.Errorf("%d text alerts were read", texts)
	}
}

func TestCorpusOdd(t *testing.T) {
	for i, line := range corpus(t, "odd-lines.log") {
		a, err := Parse(line)
		switch {
		case err == nil && len(a.Raw) > 0:
			a.Target()
			t.Logf("line %d: %s", i+1, a.Subject())
		case errors.Is(err, ErrNoAlert) && len(err.Error()) < 400:
			t.Logf("line %d: %v", i+1, err)
		default:
			t.Errorf("line %d: %v, %v", i+1, a, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		example,
		"10:21:03.120000001: Notice A shell was spawned (command=sh)",
		"2025-10-08T20:00:00.500000000+0000: Informational x",
		`{"output":"x","priority":"Critical","rule":"r","time":"2018-05-01T10:00:00.5Z","output_fields":{"a":null,"b":[1,"<NA>"],"evt.time":18446744073709551616}}`,
		`{"priority":"Info","rule":"r","source":"internal","output_fields":{"n_drops":"4"}}`,
		`{"priority":"Alert","rule":"\ud800","tags":["\u0000"]}`,
		`{"text":true,"priority":"debug"}`,
		`{"priority":"Error","rule":"r"}{`,
		`{"priority":"Error","rule":"r\xff","tags":["a\u0041","\xfe"],"output_fields":{"\u0061":1,"b\xff":{"c":[]},"":null}}`,
		"{", "[", "\x00", "::: ", "\xff: \xfe",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		a, err := Parse(line)
		if err != nil {
			if a != nil || !errors.Is(err, ErrNoAlert) {
				t.Fatalf("%v, %v", a, err)
			}
			return
		}
		subject := a.Subject()
		for _, c := range subject {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '.' {
				t.Fatalf("the subject is %q", subject)
			}
		}
		if strings.Count(subject, ".") != 2 || strings.Contains(subject, "..") || strings.HasSuffix(subject, ".") || len(subject) > 300 {
			t.Fatalf("the subject is %q", subject)
		}
		if a.Text && a.Target().Container+a.Target().Pod+a.Target().Namespace != "" {
			t.Fatalf("text has a target: %+v", a.Target())
		}
		for name, v := range a.Fields() {
			if one := findField(a.rawFields, name); !reflect.DeepEqual(one, v) {
				t.Fatalf("field %q alone is %#v, among all it is %#v, in %q", name, one, v, line)
			}
		}
		if findField(a.rawFields, "no such field") != a.Fields()["no such field"] {
			t.Fatalf("a field that is not there is found in %q", line)
		}
		// What is stored says the same when it is read again.
		again, err := Parse(a.Raw)
		if err != nil {
			t.Fatalf("%q, made from %q: %v", a.Raw, line, err)
		}
		if again.Rule != a.Rule || again.Priority != a.Priority || again.Text != a.Text || !again.Time.Equal(a.Time) || again.Output != a.Output || !reflect.DeepEqual(again.Target(), a.Target()) {
			t.Fatalf("%+v\nis read again as\n%+v", a, again)
		}
		a.Distrust()
		if again, err = Parse(a.Raw); err != nil || !again.Text || again.Rule != a.Rule {
			t.Fatalf("distrusted: %q: %v", a.Raw, err)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	line := []byte(example)
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(line); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFields is Parse and the fields, as the rules need them.
func BenchmarkFields(b *testing.B) {
	line := []byte(example)
	b.ReportAllocs()
	for b.Loop() {
		a, err := Parse(line)
		if err != nil {
			b.Fatal(err)
		}
		if a.Fields() == nil {
			b.Fatal("no fields")
		}
	}
}
