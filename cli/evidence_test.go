package cli

import (
	"strings"
	"testing"
)

// What an attacker wrote into a file moves no cursor on a terminal, and what is no text
// is not shown.
func TestTextOnATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"":                               "",
		"one\ntwo":                       "one\ntwo",
		"\x1b[2Jclear\x07\n\u202ex":      "\uFFFD[2Jclear\uFFFD\n\uFFFDx",
		"tab\there\r\n":                  "tab here \n",
		"Grüße ✓\n":                      "Grüße ✓\n",
		"a" + strings.Repeat("é", 70000): "a" + strings.Repeat("é", 70000), // over the edge of a buffer
	} {
		var out strings.Builder
		if err := showText(&out, strings.NewReader(in), "x"); err != nil || out.String() != want {
			t.Errorf("%.40q is shown as %.60q, %v", in, out.String(), err)
		}
	}
	for _, in := range []string{"\x7fELF\x02\x01\x01\x00", "a\x00b", strings.Repeat("\xff\xfe", 100)} {
		var out strings.Builder
		if err := showText(&out, strings.NewReader(in), "x.exe"); err == nil || out.Len() > 0 || !strings.Contains(err.Error(), "> FILE") {
			t.Errorf("%q is shown as %q, %v", in, out.String(), err)
		}
	}
}

func TestSizes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 400_000_000: "381.5 MiB", 1 << 40: "1.0 TiB", 1 << 51: "2048.0 TiB"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d is %q", n, got)
		}
	}
}
