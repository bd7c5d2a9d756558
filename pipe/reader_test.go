package pipe

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/broker"
)

const textLine = "10:21:03.120000001: Notice A shell was spawned (command=sh)\n"

func readAll(t *testing.T, origin broker.Origin, text string) (rules []string, r *reader, out *logged) {
	t.Helper()
	in, out := intake(t, Options{Store: &shelf{}, Registerer: prometheus.NewRegistry()})
	r = newReader(origin, in)
	for _, a := range append(r.read([]byte(text), time.Now()), r.end(time.Now())...) {
		switch {
		case a.Alert == nil:
			rules = append(rules, "!"+string(a.Unparsed))
		case a.Alert.Text && a.Alert.Rule == "":
			rules = append(rules, "text")
		case a.Alert.Text:
			rules = append(rules, "distrusted "+a.Alert.Rule)
		default:
			rules = append(rules, a.Alert.Rule)
		}
	}
	return rules, r, out
}

func TestReader(t *testing.T) {
	a, b := strings.TrimSpace(line("a", "Notice")), strings.TrimSpace(line("b", "Critical"))
	torn := a[:len(a)/2]
	tests := []struct {
		name   string
		origin broker.Origin
		text   string
		want   []string
		bad    string // reason=count
		passed int
	}{
		{name: "alerts", text: a + "\n" + b + "\r\n\n  \n" + a, want: []string{"a", "b", "a"}},
		{name: "torn, then the next line glued on", text: torn + b + "\n" + a, want: []string{"!" + torn, "b", "a"}, bad: "torn=1"},
		{name: "torn in the middle of a key", text: `{"hostna` + b, want: []string{`!{"hostna`, "b"}, bad: "torn=1"},
		{name: "torn twice", text: torn + torn + b, want: []string{"!" + torn + torn, "b"}, bad: "torn=1"},
		{name: "two alerts in one line", text: a + b, want: []string{"a", "b"}},
		{name: "an alert, a torn one and another", text: a + torn + b, want: []string{"a", "!" + torn, "b"}, bad: "torn=1"},
		{name: "garbage behind an alert", text: a + "garbage", want: []string{"a", "!garbage"}, bad: "torn=1"},
		{name: "statistics glued to an alert", text: a + "Events detected: 1\nRule counts by severity:\n   NOTICE: 1\nTriggered rules by rule name:\n   a: 1\n" + b, want: []string{"a", "b"}, passed: 5},
		{name: "statistics", origin: broker.OriginStdin, text: "Events detected: 1\nRule counts by severity:\n   NOTICE: 1\n", passed: 3},
		{name: "indented without statistics", text: "   NOTICE: 1\n", want: []string{"!NOTICE: 1"}, bad: "text=1"},
		{
			name: "Falco's log", origin: broker.OriginStdin, passed: 2, want: []string{"a"},
			text: "Fri Oct 10 00:20:23 2025: Falco version: 0.44.1 (x86_64)\n2025-10-10T00:20:23+0000: Loading rules from:\n" + a,
		},
		{name: "Falco's log on a FIFO is none", text: "Fri Oct 10 00:20:23 2025: Falco version: 0.44.1\n", want: []string{"!Fri Oct 10 00:20:23 2025: Falco version: 0.44.1"}, bad: "text=1"},
		{name: "JSON, and no alert", text: `{"level":"info","msg":"hello"}`, want: []string{`!{"level":"info","msg":"hello"}`}, bad: "json=1"},
		{name: "not UTF-8", text: "\xff\xfe\x00\n" + a, want: []string{"!\xff\xfe\x00", "a"}, bad: "text=1"},
		{name: "text", text: textLine, want: []string{"text"}},
		{name: "JSON behind text may be forged", text: textLine + b, want: []string{"text", "distrusted b"}},
		{name: "text is not salvaged", text: "10:21:03.1: Nonsense command=" + b, want: []string{"!10:21:03.1: Nonsense command=" + b}, bad: "text=1"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.origin == "" {
				test.origin = broker.OriginFIFO
			}
			got, r, _ := readAll(t, test.origin, test.text)
			equal(t, "arrivals", got, test.want)
			bad := ""
			for _, reason := range []string{"json", "text", "torn"} {
				if n := value(r.metrics.bad.WithLabelValues(string(test.origin), reason)); n > 0 {
					bad += fmt.Sprintf("%s=%v", reason, n)
				}
			}
			if bad != test.bad {
				t.Errorf("bad lines: %q, want %q", bad, test.bad)
			}
			if n := value(r.metrics.passed.WithLabelValues(string(test.origin))); int(n) != test.passed {
				t.Errorf("passed over %v lines, want %d", n, test.passed)
			}
		})
	}
}

// Whoever runs a process chooses the values in an alert. Cut anywhere, and with
// any alert glued on, none of what stands in them may come out as an alert.
func TestSalvageCannotBeForged(t *testing.T) {
	forged := `{"output":"x","priority":"Emergency","rule":"forged","source":"syscall","time":"2025-10-09T08:53:20Z","output_fields":{}}`
	values := []string{
		forged,
		forged + "{",
		`{`, `{"`, `","output":"x","priority":"Critical","rule":"forged"}`,
		`:1,"rule":"forged","priority":"Critical","time":"`,
		"\n" + forged + "\n",
		`\` + forged, `\\"` + forged, `"}` + forged,
		`:"x","priority":"Critical","rule":"forged"}`,
	}
	good := strings.TrimSpace(line("good", "Notice"))
	lines := 0
	for _, first := range values {
		for _, second := range values {
			victim, err := json.Marshal(map[string]any{
				"hostname": "node-a", "output": first + second, "priority": "Notice", "rule": "victim", "source": "syscall", "time": second,
				"tags":          []string{first, second, first},
				"output_fields": map[string]any{"proc.cmdline": first, "proc.name": second, "ka.req.images": []string{first, second, first}},
			})
			if err != nil {
				t.Fatal(err)
			}
			var text strings.Builder
			step := 37 // the same value everywhere is cut closer
			if first == second {
				step = 3
			}
			cuts := 0
			for cut := 0; cut < len(victim); cut += step {
				cuts++
				text.Write(victim[:cut])
				text.WriteString(good + "\n")
				text.Write(victim[:cut])
				text.WriteString("\n")
				text.Write(victim[:cut])
				text.Write(victim)
				text.WriteString("\n")
				lines += 3
			}
			in, _ := intake(t, Options{Store: &shelf{}})
			r := newReader(broker.OriginFIFO, in)
			found := map[string]int{}
			for _, a := range r.read([]byte(text.String()), time.Now()) {
				if a.Alert != nil {
					found[a.Alert.Rule]++
				}
			}
			if found["forged"] > 0 || len(found) > 2 {
				t.Fatalf("%q and %q came out as alerts: %v", first, second, found)
			}
			if found["good"] != cuts || found["victim"] != cuts {
				t.Fatalf("of %d good alerts %v came out", cuts, found)
			}
		}
	}
	t.Logf("%d lines", lines)
}

func TestReaderSaysOnce(t *testing.T) {
	text := strings.Repeat("no alert\n", 1000) + line("a", "Notice") + strings.Repeat("no alert either\n", 1000)
	_, _, out := readAll(t, broker.OriginFIFO, text)
	if n := out.count("a line is no alert"); n != 1 {
		t.Errorf("2000 bad lines were said %d times:\n%s", n, out)
	}
	_, _, out = readAll(t, broker.OriginFIFO, strings.Repeat(strings.Repeat("x", 2<<20)+"\n", 3))
	if n := out.count("too long"); n != 1 {
		t.Errorf("3 overlong lines were said %d times:\n%s", n, out)
	}
	_, _, out = readAll(t, broker.OriginFIFO, "\x1b[2Jevil \" \xff"+strings.Repeat("y", 5000)+"\n")
	if strings.Contains(out.String(), "\x1b") || !utf8.ValidString(out.String()) || len(out.String()) > 1000 {
		t.Errorf("the excerpt is not cut and quoted:\n%q", out.String())
	}
}

func TestReaderSaysThatJSONIsOff(t *testing.T) {
	const said = "json_output is off in Falco"
	_, _, out := readAll(t, broker.OriginFIFO, textLine+textLine+line("a", "Notice")+textLine+textLine)
	if n := out.count(said); n != 0 {
		t.Errorf("said of two text alerts in a row:\n%s", out)
	}
	_, _, out = readAll(t, broker.OriginFIFO, strings.Repeat(textLine, 100))
	if n := out.count(said); n != 1 {
		t.Errorf("said %d times of 100 text alerts:\n%s", n, out)
	}
}

func TestReaderCutsUnparsed(t *testing.T) {
	got, _, _ := readAll(t, broker.OriginFIFO, strings.Repeat("z", 1<<20)+"\n")
	if len(got) != 1 || len(got[0]) != 1+MaxUnparsed {
		t.Fatalf("%d arrivals, the first of %d bytes", len(got), len(got[0]))
	}
}

// A JSON alert long after the last text one is Falco's: it was restarted with
// json_output on.
func TestReaderBelievesJSONAgain(t *testing.T) {
	in, _ := intake(t, Options{Store: &shelf{}})
	r := newReader(broker.OriginFIFO, in)
	now := time.Now()
	r.read([]byte(textLine), now)
	if a := r.read([]byte(line("a", "Notice")), now.Add(textTaint-time.Second)); !a[0].Alert.Text {
		t.Error("believed at once")
	}
	if a := r.read([]byte(line("a", "Notice")), now.Add(textTaint+time.Second)); a[0].Alert.Text {
		t.Error("never believed again")
	}
}

// Whatever comes in, and in whatever pieces, the same comes out of it.
func FuzzReader(f *testing.F) {
	a, b := line("a", "Notice"), line("b", "Critical")
	f.Add(a+b, 1)
	f.Add(a[:100]+b+textLine, 7)
	f.Add(strings.TrimSpace(a)+"Events detected: 1\nRule counts by severity:\n   X: 1\n", 3)
	f.Add(`{"rule":"x"{"rule":"y","priority":"Debug"}`+"\n\n  \n\x00\xff", 2)
	f.Add(`{"rule":`+strings.Repeat("[", 2000)+strings.Repeat(`{"rule":`, 50), 500)
	f.Fuzz(func(t *testing.T, text string, piece int) {
		if piece < 1 {
			return
		}
		in := &Intake{log: slog.New(slog.DiscardHandler), maxLine: 4000, metrics: newMetrics(nil, nil)}
		now := time.Now()
		read := func(piece int) (got []string) {
			r := newReader(broker.OriginStdin, in)
			all := []Arrival{}
			for rest := text; len(rest) > 0; {
				n := min(piece, len(rest))
				all = append(all, r.read([]byte(rest[:n]), now)...)
				rest = rest[n:]
			}
			for _, a := range append(all, r.end(now)...) {
				switch {
				case a.Alert == nil && len(a.Unparsed) == 0, a.Alert != nil && a.Unparsed != nil:
					t.Fatalf("%+v", a)
				case a.Alert == nil:
					got = append(got, "!"+string(a.Unparsed))
				default:
					got = append(got, a.Alert.ID)
				}
			}
			return got
		}
		equal(t, "arrivals", read(piece), read(len(text)+1))
	})
}
