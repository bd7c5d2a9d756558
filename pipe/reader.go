package pipe

import (
	"bytes"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"stoop/alert"
	"stoop/broker"
)

const (
	// textRun text alerts in a row are no accident: Falco writes text.
	textRun = 3
	// textTaint is how long after a text alert a JSON alert of the same source
	// counts as text too, see [reader.believe].
	textTaint = time.Minute
	// excerpt bounds what is shown of a bad line, in bytes.
	excerpt = 200
	// salvageTries bounds where in a broken line a whole alert is looked for.
	salvageTries = 16
)

// reader turns what one source reads into arrivals. It is used by one
// goroutine.
type reader struct {
	origin  broker.Origin
	log     *slog.Logger
	metrics *metrics
	lines   lines

	out []Arrival
	now time.Time

	badRun     bool      // the line before was bad too
	badSaid    time.Time // when a bad line was logged last
	badUnsaid  int       // how many were not logged since
	longSaid   time.Time
	longUnsaid int
	texts      int       // text alerts in a row
	textSaid   bool      // that json_output is off
	lastText   time.Time // when the last text alert came
	statistics bool      // inside the statistics that Falco writes when it ends
}

func newReader(origin broker.Origin, in *Intake) *reader {
	return &reader{
		origin:  origin,
		log:     in.log.With("origin", origin),
		metrics: in.metrics,
		lines:   lines{max: in.maxLine},
	}
}

// read takes the next piece, which was read at now, and returns what its
// complete lines said. The slice is the caller's.
func (r *reader) read(piece []byte, now time.Time) []Arrival {
	r.now = now
	r.lines.feed(piece, r.line, r.overlong)
	return r.taken()
}

// end reads the last line, which no newline ended.
func (r *reader) end(now time.Time) []Arrival {
	r.now = now
	r.lines.finish(r.line, r.overlong)
	return r.taken()
}

func (r *reader) taken() []Arrival {
	out := r.out
	r.out = nil
	return out
}

func (r *reader) line(line []byte) {
	if r.statistics && len(line) > 0 && (line[0] == ' ' || line[0] == '\t') {
		r.metrics.passed.WithLabelValues(string(r.origin)).Inc()
		return
	}
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return
	}
	r.statistics = false
	a, err := alert.Parse(line)
	switch {
	case err == nil:
		r.good(a)
	case r.passOver(line):
		r.metrics.passed.WithLabelValues(string(r.origin)).Inc()
	case line[0] == '{':
		if !r.salvage(line) {
			r.bad("json", line, err)
		}
	default:
		r.bad("text", line, err)
	}
}

func (r *reader) good(a *alert.Alert) {
	r.badRun = false
	r.believe(a)
	r.out = append(r.out, Arrival{Alert: a, Received: r.now, Origin: r.origin})
}

// believe looks for signs that Falco writes text. Its text lines are not
// escaped, so whoever runs a process can put a newline into its arguments, and
// behind it a line of their own: a text alert, which is marked as forgeable
// anyway, or the JSON of one. So JSON that comes close behind text is marked
// too.
func (r *reader) believe(a *alert.Alert) {
	if !a.Text {
		r.texts = 0
		if !r.lastText.IsZero() && r.now.Sub(r.lastText) < textTaint {
			a.Distrust()
		}
		return
	}
	r.lastText = r.now
	if r.texts++; r.texts >= textRun && !r.textSaid {
		r.textSaid = true
		r.log.Warn("json_output is off in Falco: its alerts come as plain text, which can be forged and names no rule, "+
			"so they are stored but start nothing harmful; set json_output: true in falco.yaml and restart Falco",
			"output", quote([]byte(a.Output)))
	}
}

func (r *reader) bad(reason string, line []byte, err error) {
	r.metrics.bad.WithLabelValues(string(r.origin), reason).Inc()
	r.keep(line)
	said := r.badRun
	r.badRun = true
	if r.badUnsaid++; said || r.now.Sub(r.badSaid) < sayEvery {
		return
	}
	r.log.Warn("a line is no alert; it is kept on "+alert.UnparsedSubject,
		"error", err, "line", quote(line), "bytes", len(line), "count", r.badUnsaid)
	r.badSaid, r.badUnsaid = r.now, 0
}

// keep hands a line that is no alert on as it is.
func (r *reader) keep(line []byte) {
	r.out = append(r.out, Arrival{Unparsed: bytes.Clone(line[:min(len(line), MaxUnparsed)]), Received: r.now, Origin: r.origin})
}

func (r *reader) overlong(length int) {
	r.metrics.overlong.WithLabelValues(string(r.origin)).Inc()
	if r.longUnsaid++; r.now.Sub(r.longSaid) < sayEvery {
		return
	}
	r.log.Warn("a line is too long and was skipped", "bytes", length, "limit_bytes", r.lines.max, "count", r.longUnsaid)
	r.longSaid, r.longUnsaid = r.now, 0
}

// salvage looks for whole alerts in a line that is broken: before its
// statistics, which Falco once glued to the last alert, and behind a piece of a
// line, which a writer left that died in the middle of it.
//
// Inside valid JSON nobody can forge an alert by this. The first kind begins
// where the line does. The second begins with an unescaped quote behind a brace
// and ends where the line does, and of what a process can write neither is
// possible within a JSON string; see TestSalvageCannotBeForged.
func (r *reader) salvage(line []byte) bool {
	found := false
	for {
		n := objectLength(line)
		if n == 0 {
			break
		}
		a, err := alert.Parse(line[:n])
		if err != nil {
			return found
		}
		found = true
		r.good(a)
		if line = bytes.TrimSpace(line[n:]); len(line) == 0 {
			return true
		}
		if r.passOver(line) {
			r.metrics.passed.WithLabelValues(string(r.origin)).Inc()
			return true
		}
	}
	if line[0] != '{' {
		if found {
			r.bad("torn", line, errTorn)
		}
		return found
	}
	for _, at := range objectStart.FindAllIndex(line[1:], salvageTries) {
		start := 1 + at[0]
		if a, err := alert.Parse(line[start:]); err == nil {
			r.bad("torn", line[:start], errTorn)
			r.good(a)
			return true
		}
	}
	if found {
		r.bad("torn", line, errTorn)
	}
	return found
}

type constError string

func (e constError) Error() string { return string(e) }

const errTorn = constError("a torn piece of a line stands beside a whole alert")

// objectStart is how every alert that Falco ever wrote begins.
var objectStart = regexp.MustCompile(`\{\s*"(?:hostname|message|output|output_fields|priority|rule|source|tags|time|uuid)"\s*:`)

// objectLength is the length of the JSON object that line begins with; 0: it
// begins with none.
func objectLength(line []byte) int {
	if len(line) == 0 || line[0] != '{' {
		return 0
	}
	dec := jsontext.NewDecoder(bytes.NewBuffer(line), jsontext.AllowInvalidUTF8(true))
	if err := dec.SkipValue(); err != nil {
		return 0
	}
	return int(dec.InputOffset())
}

// passOver reports whether the line is one of those that Falco writes beside
// its alerts: the statistics at its end, and its log, which stands among the
// alerts where standard error is read too (kubectl logs).
func (r *reader) passOver(line []byte) bool {
	for _, title := range statistics {
		if bytes.HasPrefix(line, []byte(title)) {
			r.statistics = strings.HasSuffix(title, ":")
			return true
		}
	}
	return r.origin == broker.OriginStdin && falcoLog.Match(line)
}

// statistics begin the lines that Falco writes when it ends. Under those with a
// colon stand indented ones.
var statistics = []string{
	"Events detected: ",
	"Rule counts by severity:",
	"Triggered rules by rule name:",
	"Syscall event drop monitoring:",
	"Driver Events:",
	"Driver Drops:",
	"Elapsed time: ",
}

// falcoLog is a line of Falco's own log: the date as ctime writes it, or, with
// time_format_iso_8601, a whole one; then no priority, which would have made it
// an alert.
var falcoLog = regexp.MustCompile(`^(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+0000): `)

// quote shows the beginning of what may hold anything.
func quote(line []byte) string {
	s := string(line[:min(len(line), excerpt)])
	if len(line) > excerpt {
		s += "…"
	}
	return s
}
