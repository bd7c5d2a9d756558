package cli

import (
	"bytes"
	"strings"
	"testing"
)

// What tail shows fits a terminal of 80 columns, and nothing of it is left out.
func TestTailFitsTheTerminal(t *testing.T) {
	t.Setenv("COLUMNS", "80")
	var out bytes.Buffer
	p := &program{stdout: &out, stderr: &out}
	p.showVerdict([]byte(`{"time":"2026-01-02T03:04:05Z","priority":"informational","rule":"Drop and execute new binary in container","pod":"shop-eu/web-6d5f9c7b8-x2x7k",
		"matched":[{"rule":"contain","mode":"audit","steps":["freeze-container","capture-proc","cut-network","delete-pod","slack-last"]}]}`))
	p.showVerdict([]byte(`{"time":"2026-01-02T03:04:05Z","priority":"notice","rule":"Shell","why":"no rule matched; nearest is isolate-shop, whose where needs a field that is not in the alert-ends-here"}`))
	p.showOutcome([]byte(`{"time":"2026-01-02T03:04:05Z","responder":"capture-proc","status":"done","reason":"processes captured: 1; 15 files of 135258 bytes are in /var/lib/stoop/evidence/4f1c0e6f6a4de1d0a2b7",
		"target":{"namespace":"shop-eu","pod":"web-6d5f9c7b8-x2x7k-with-a-long-name"},"took":{"done":27000}}`))
	p.showUnparsed([]byte(strings.Repeat("garbage ", 20)))
	shown := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{
		"x2x7k", "delete-pod, slack-last (audit)", "alert-ends-here", "with-a-long-name", "27ms", "evidence/4f1c0e6f6a4de1d0a2b7", strings.Repeat("garbage ", 19) + "garbage",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("%q is not shown", want)
		}
	}
	for line := range strings.Lines(out.String()) {
		if n := len([]rune(strings.TrimRight(line, "\n"))); n > 80 {
			t.Errorf("a line of %d characters: %s", n, line)
		}
	}
	if t.Failed() {
		t.Log("\n" + out.String())
	}
}
