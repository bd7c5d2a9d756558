package param_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"stoop/param"
)

type common struct {
	TTL param.Duration `param:"ttl" doc:"Taken back after this." max:"24h"`
}

type nested struct {
	Cert string `param:"cert" doc:"A file."`
	Port int    `param:"port" doc:"A port." min:"1" max:"65535"`
}

type all struct {
	common
	Name      string            `param:"name" doc:"A name." required:"true"`
	Direction string            `param:"direction" doc:"Which way." oneof:"ingress egress both"`
	DNS       bool              `param:"allowDNS" doc:"Names may be asked."`
	Lines     int               `param:"lines" doc:"How many." min:"1" max:"1000"`
	Size      param.Size        `param:"size" doc:"How much." max:"1GiB"`
	Ranges    []param.CIDR      `param:"ranges" doc:"Where to."`
	Words     []string          `param:"words" doc:"Words." oneof:"a b"`
	Labels    map[string]string `param:"labels" doc:"Labels."`
	Token     param.Secret      `param:"token" doc:"A secret."`
	URL       param.URL         `param:"url" doc:"An address."`
	TLS       nested            `param:"tls" doc:"TLS."`
	Users     []nested          `param:"users" doc:"Users."`
	hidden    int
}

func (a *all) Validate() error {
	if a.Name == "nobody" {
		return errors.New("nobody is nobody's name")
	}
	return nil
}

func defaults() all {
	return all{
		common:    common{TTL: param.Duration(time.Hour)},
		Direction: "both",
		Lines:     100,
		Size:      10 << 20,
		Words:     []string{"a"},
		Labels:    map[string]string{"x": "y"},
		TLS:       nested{Port: 443},
		hidden:    7,
	}
}

func node(t *testing.T, src string) *yaml.Node {
	t.Helper()
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(src), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Content) == 0 {
		return nil
	}
	return doc.Content[0]
}

func TestDescribe(t *testing.T) {
	var got []string
	for _, f := range param.Describe(defaults()).Fields {
		got = append(got, fmt.Sprintf("%s|%s|%s|%v", f.Name, f.Type, f.Default, f.Required))
	}
	want := []string{
		"ttl|duration|1h|false",
		"name|string||true",
		"direction|string|both|false",
		"allowDNS|bool|false|false",
		"lines|integer|100|false",
		"size|size|10MiB|false",
		"ranges|list of CIDR||false",
		"words|list of string|[a]|false",
		`labels|map of string|{"x":"y"}|false`,
		"token|secret||false",
		"url|URL||false",
		"tls|mapping||false",
		"users|list of mapping||false",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestDescribePanicsOnAnAuthorsMistake(t *testing.T) {
	for name, v := range map[string]any{
		"no struct": 1,
		"no name":   struct{ A string }{},
		"type": struct {
			A float64 `param:"a"`
		}{},
		"bound": struct {
			A string `param:"a" max:"1"`
		}{},
		"bad bound": struct {
			A param.Duration `param:"a" max:"x"`
		}{},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			param.Describe(v)
		})
	}
}

func TestCheckAndDecode(t *testing.T) {
	d := param.Describe(defaults())
	raw, problems := d.Check(node(t, `
name: &n box
ttl: 90s
direction: egress
allowDNS: true
lines: 5
size: 1.5KiB
ranges: [10.0.0.0/8, "2001:db8::/32"]
words: [b, a]
labels: {team: "red", when: 2026-01-02}
token: {file: /run/token}
url: https://example.com/x?y
tls: {cert: c}
users:
  - {cert: *n, port: 1}
`))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	got := defaults()
	if err := param.Decode(raw, &got); err != nil {
		t.Fatal(err)
	}
	if got.Name != "box" || got.TTL != param.Duration(90*time.Second) || got.Direction != "egress" || !got.DNS ||
		got.Lines != 5 || got.Size != 1536 || len(got.Ranges) != 2 || got.Ranges[0].Bits() != 8 ||
		!reflect.DeepEqual(got.Words, []string{"b", "a"}) ||
		!reflect.DeepEqual(got.Labels, map[string]string{"team": "red", "when": "2026-01-02"}) ||
		got.Token.File != "/run/token" || got.URL != "https://example.com/x?y" ||
		got.TLS != (nested{"c", 443}) || !reflect.DeepEqual(got.Users, []nested{{"box", 1}}) || got.hidden != 7 {
		t.Errorf("got %+v", got)
	}
	again, err := json.Marshal(json.RawMessage(raw))
	if err != nil || string(again) != string(raw) {
		t.Errorf("%s is no compact JSON: %v", raw, err)
	}
}

func TestNothingWrittenMeansDefaults(t *testing.T) {
	d := param.Describe(struct {
		Grace param.Duration `param:"gracePeriod" doc:"x"`
	}{1})
	for _, n := range []*yaml.Node{nil, {}, node(t, "null"), node(t, "{}"), node(t, "~")} {
		if raw, problems := d.Check(n); raw != nil || problems != nil {
			t.Errorf("got %s %v", raw, problems)
		}
	}
	v := defaults()
	if err := param.Decode(nil, &v); err != nil || !reflect.DeepEqual(v, defaults()) {
		t.Errorf("%v %+v", err, v)
	}
}

func TestEveryProblemIsSaidWhereItStands(t *testing.T) {
	tests := []struct{ name, src, want string }{
		{"missing", "{}", `1:1 the parameter "name" (string) is missing: it has no default`},
		{"empty required", "name: ''", `1:7 "name" may not be empty`},
		{"null required", "name:", `1:1 "name" has no value: a string is expected`},
		{"null", "{name: a, lines: }", `1:11 "lines" has no value: leave the key out for the default, 100`},
		{"no mapping", "[]", "1:1 a mapping of parameters is expected here, not a list, such as {ttl: …}"},
		{"unknown", "name: a\ndirektion: both", `2:1 unknown parameter "direktion": did you mean "direction"? There are: ttl, name, direction, allowDNS, lines, size, ranges, words, labels, token, url, tls, users`},
		{"word", "{name: a, direction: ingres}", `1:22 unknown direction "ingres": did you mean "ingress"? There are: ingress, egress, both`},
		{"word in a list", "{name: a, words: [a, c]}", `1:22 unknown words "c". There are: a, b`},
		{"number for text", "name: 12", `1:7 "name" takes text here, not the number "12": write it in quotes, "12"`},
		{"list for text", "name: [a]", `1:7 "name" is a string, not a list`},
		{"tag", "name: !!binary aGk=", `1:7 "name" takes text here, nothing with the tag "!!binary"`},
		{"bool", "{name: a, allowDNS: yes}", `1:21 "allowDNS" is true or false, not the text "yes"`},
		{"integer", "{name: a, lines: 1.5}", `1:18 "lines" is an integer, not the number "1.5"`},
		{"quoted integer", `{name: a, lines: "5"}`, `1:18 "lines" is an integer, not the text "5"`},
		{"small", "{name: a, lines: 0}", `1:18 "lines" is at least 1, not 0`},
		{"huge", "{name: a, lines: 99999999999999999999}", `1:18 "lines" is an integer, not the number "99999999999999999999"`},
		{"long", "{name: a, ttl: 48h}", `1:16 "ttl" is at most 24h, not 48h`},
		{"no unit", "{name: a, ttl: 30}", `1:16 "ttl": "30" has no unit: write 30s, 30m or 30h`},
		{"days", "{name: a, ttl: 2d}", `1:16 "ttl": "2d": days are written in hours, 48h`},
		{"negative", "{name: a, ttl: -1s}", `1:16 "ttl": "-1s" is negative`},
		{"duration", "{name: a, ttl: soon}", `1:16 "ttl": "soon" is no duration, such as 300ms, 30s, 5m or 1h`},
		{"size", "{name: a, size: 10MB}", `1:17 "size": "10MB" is no size, such as 512B, 64KiB, 10MiB or 1GiB`},
		{"size without unit", "{name: a, size: 10}", `1:17 "size": "10" has no unit: write 10B, 10KiB or 10MiB`},
		{"size NaN", "{name: a, size: NaNB}", `1:17 "size": "NaNB" is no size, such as 512B, 64KiB, 10MiB or 1GiB`},
		{"large", "{name: a, size: 2GiB}", `1:17 "size" is at most 1GiB, not 2GiB`},
		{"no list", "{name: a, ranges: 10.0.0.0/8}", `1:19 "ranges" is a list of CIDR, not the text "10.0.0.0/8": write [10.0.0.0/8]`},
		{"address", "{name: a, ranges: [10.0.0.1]}", `1:20 "ranges": "10.0.0.1" is an address: write 10.0.0.1/32 for it alone`},
		{"bits", "{name: a, ranges: [10.0.0.1/8]}", `1:20 "ranges": "10.0.0.1/8" has bits set behind its prefix: write 10.0.0.0/8, or 10.0.0.1/32 for the one address`},
		{"range", "{name: a, ranges: [all]}", `1:20 "ranges": "all" is no range of addresses, such as 10.0.0.0/8 or 2001:db8::/32`},
		{"empty entry", "{name: a, words: [a, ]}\n", ``}, // a trailing comma is no entry
		{"null entry", "{name: a, words: [a, ~]}\n", `1:22 "words" has an empty entry here`},
		{"label", "{name: a, labels: {x: true}}", `1:23 "labels" takes text here, not the boolean true: write it in quotes, "true"`},
		{"labels", "{name: a, labels: [x]}", `1:19 "labels" is a mapping of text to text, not a list: write {key: value}`},
		{"secret in clear", "{name: a, token: hunter2}", `1:18 secret "token" is a secret, which is never written here itself: write {file: PATH} or {env: NAME}`},
		{"secret under another key", "{name: a, token: {value: hunter2}}", `1:19 secret "token" is a secret: write {file: PATH} or {env: NAME}`},
		{"secret under a misspelt name", "{name: a, tokn: hunter2}", `1:11 secret unknown parameter "tokn": did you mean "token"? There are: ttl, name, direction, allowDNS, lines, size, ranges, words, labels, token, url, tls, users`},
		{"two secrets", "{name: a, token: {file: x, env: y}}", `1:18 "token" is a secret with exactly one place that it is read from: write {file: PATH} or {env: NAME}`},
		{"empty secret", "{name: a, token: {}}", `1:18 "token" is a secret with exactly one place that it is read from: write {file: PATH} or {env: NAME}`},
		{"password in an address", "{name: a, url: 'https://u:hunter2@x/'}", `1:16 secret "url": a user or password does not belong into an address`},
		{"scheme", "{name: a, url: 'ftp://x/'}", `1:16 secret "url": only http:// and https:// addresses are possible`},
		{"address without host", "{name: a, url: example.com}", `1:16 secret "url": this is no address, such as https://example.com/path`},
		{"nested", "{name: a, tls: {crt: x, port: 0}}", "1:17 unknown parameter \"crt\": did you mean \"cert\"? There are: cert, port\n1:31 \"port\" is at least 1, not 0"},
		{"nested list", "{name: a, users: [{port: 70000}]}", `1:26 "port" is at most 65535, not 70000`},
		{"twice", "name: a\nlines: 1\nlines: 2", `3:1 "lines" stands here twice: first in line 2`},
		{"merge", "name: a\n<<: {lines: 5}", `2:1 "<<" is not supported here: write the keys out, or use an alias for a whole value`},
		{"key", "name: a\n? [x]\n: y", `2:3 a key must be plain text, not a list`},
		{"together", "name: nobody", `1:1 nobody is nobody's name`},
		{"all at once", "ttl: x\nlines: 0", "1:6 \"ttl\": \"x\" is no duration, such as 300ms, 30s, 5m or 1h\n2:8 \"lines\" is at least 1, not 0\n1:1 the parameter \"name\" (string) is missing: it has no default"},
		{"cycle", "name: &a [*a]", `1:7 "name" is a string, not a list`},
		{"cyclic labels", "{name: a, labels: &a {x: *a}}", `1:26 "labels" takes text here, not a mapping`},
	}
	d := param.Describe(defaults())
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw, problems := d.Check(node(t, tt.src))
			var got []string
			for _, p := range problems {
				s := fmt.Sprintf("%d:%d ", p.Node.Line, p.Node.Column)
				if p.Secret {
					s += "secret "
				}
				got = append(got, s+p.Message)
				if strings.Contains(p.Message, "hunter2") {
					t.Errorf("the message gives the secret away: %s", p.Message)
				}
			}
			if g := strings.Join(got, "\n"); g != tt.want {
				t.Errorf("got\n%s\nwant\n%s", g, tt.want)
			}
			if len(problems) > 0 && raw != nil {
				t.Errorf("parameters in spite of problems: %s", raw)
			}
		})
	}
}

func TestDecodeRefusesWhatItDoesNotKnow(t *testing.T) {
	v := defaults()
	for raw, want := range map[string]string{
		`{"gone":1}`:     `there is no parameter "gone" here: was it written by another version?`,
		`{"lines":"x"}`:  "reading the parameter lines: ",
		`{"ttl":"soon"}`: "reading the parameter ttl: ",
		`[]`:             "reading the parameters: ",
	} {
		if err := param.Decode(json.RawMessage(raw), &v); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", raw, err)
		}
	}
	if err := param.Decode(json.RawMessage(`{}`), v); err == nil {
		t.Error("a struct that is not pointed to can't be set")
	}
}

func TestWhatIsShownCanBeWritten(t *testing.T) {
	for _, d := range []time.Duration{0, 1, time.Millisecond, time.Second, 90 * time.Second, time.Hour, 90 * time.Minute, 10 * time.Minute, 10 * time.Hour, 100*time.Hour + time.Second} {
		var back param.Duration
		s := param.Duration(d).String()
		if err := back.UnmarshalText([]byte(s)); err != nil || time.Duration(back) != d {
			t.Errorf("%v → %s → %v, %v", d, s, time.Duration(back), err)
		}
	}
	for _, n := range []param.Size{0, 1, 1023, 1024, 1536, 10 << 20, 3 << 40} {
		var back param.Size
		if err := back.UnmarshalText([]byte(n.String())); err != nil || back != n {
			t.Errorf("%d → %s → %d, %v", n, n, back, err)
		}
	}
}

func TestSecretResolve(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	t.Setenv("STOOP_TEST_TOKEN", "t0ken")
	t.Setenv("STOOP_TEST_EMPTY", " ")
	for _, tt := range []struct {
		name      string
		s         param.Secret
		want, err string
	}{
		{"file", param.Secret{File: write("ok", "hunter2\n")}, "hunter2", ""},
		{"variable", param.Secret{Env: "STOOP_TEST_TOKEN"}, "t0ken", ""},
		{"not set", param.Secret{}, "", "not set"},
		{"empty variable", param.Secret{Env: "STOOP_TEST_EMPTY"}, "", "the secret {env: STOOP_TEST_EMPTY} is empty"},
		{"no variable", param.Secret{Env: "STOOP_TEST_NONE"}, "", "is empty"},
		{"empty file", param.Secret{File: write("empty", "\n")}, "", "is empty"},
		{"no file", param.Secret{File: dir + "/none"}, "", "no such file"},
		{"folder", param.Secret{File: dir}, "", "is no regular file"},
		{"large", param.Secret{File: write("large", strings.Repeat("x", 65<<10))}, "", "is larger than 64 KiB"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.s.Resolve()
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestNearest(t *testing.T) {
	words := []string{"delete-pod", "isolate-pod", "label-pod", "slack", "webhook", "file", "gracePeriod", "ttl"}
	for word, want := range map[string]string{
		"delete_pod": "delete-pod", "deletePod": "delete-pod", "delet-pod": "delete-pod", "slak": "slack",
		"webhok": "webhook", "grace": "gracePeriod", "tll": "ttl", "TTL": "ttl", "isolate": "isolate-pod",
		"graceperoid": "gracePeriod", "xyzzy": "", "": "", "x": "", strings.Repeat("delete", 100): "",
	} {
		if got := param.Nearest(word, words); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
}

func ExampleDescribe() {
	type params struct {
		GracePeriod param.Duration `param:"gracePeriod" doc:"How long the pod has to end." max:"5m"`
	}
	d := param.Describe(params{GracePeriod: param.Duration(time.Second)})
	f := d.Fields[0]
	fmt.Println(f.Name, f.Type, f.Default)

	var doc yaml.Node
	if err := yaml.Unmarshal([]byte("{grace: 10s}"), &doc); err != nil {
		panic(err)
	}
	_, problems := d.Check(doc.Content[0])
	fmt.Println(problems[0].Message)
	// Output:
	// gracePeriod duration 1s
	// unknown parameter "grace": did you mean "gracePeriod"? There is only: gracePeriod
}

func TestPortion(t *testing.T) {
	for _, c := range []struct {
		text      string
		whole, of int
		all       bool
	}{
		{"0", 4, 0, false},
		{"3", 4, 3, false},
		{"9", 4, 9, false},
		{"0%", 4, 0, false},
		{"25%", 3, 0, false},
		{"25%", 4, 1, false},
		{"25%", 7, 1, false},
		{"33%", 3, 0, false},
		{"34%", 3, 1, false},
		{"99%", 1, 0, false},
		{"99%", 100, 99, false},
		{"100%", 3, 3, true},
		{"50%", 0, 0, false},
		{"50%", 1 << 30, 1 << 29, false},
	} {
		var p param.Portion
		if err := p.UnmarshalText([]byte(c.text)); err != nil {
			t.Errorf("%s: %v", c.text, err)
		}
		if got := p.Of(c.whole); got != c.of || p.IsAll() != c.all || !p.IsSet() || p.String() != c.text {
			t.Errorf("%s of %d is %d (all: %t, set: %t, %q), want %d", c.text, c.whole, got, p.IsAll(), p.IsSet(), p, c.of)
		}
	}
	if p := (param.Portion{}); p.IsSet() || p.IsAll() || p.String() != "" {
		t.Errorf("none given: %q", p)
	}
	for _, text := range []string{"", "%", "1.5", "-1", "-1%", "+1", "101%", "1000001", "all", "1 %", "0x1"} {
		var p param.Portion
		if err := p.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %s", text, p)
		}
	}
}
