package figures

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	var d []time.Duration
	for i := range 100 {
		d = append(d, time.Duration(100-i))
	}
	for q, want := range map[float64]time.Duration{0: 1, .5: 50, .99: 99, 1: 100} {
		if got := Quantile(d, q); got != want {
			t.Errorf("the %g quantile of 1 to 100 is %d, want %d", q, got, want)
		}
	}
	if got := Quantile(nil, .5); got != 0 {
		t.Errorf("the median of nothing is %d, want 0", got)
	}
}

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	for _, c := range []struct{ old, want string }{
		{"# A\n", "# A\n\n<b>\n\nnew\n\n<e>\n"},
		{"# A\n\n<b>\n\nold\n<e>\n\nB\n", "# A\n\n<b>\n\nnew\n\n<e>\n\nB\n"},
		{"# A\n<b>\nold\n", ""},
	} {
		if err := os.WriteFile(path, []byte(c.old), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Replace(path, "<b>", "<e>", "new\n")
		got, readErr := os.ReadFile(path)
		if readErr != nil {
			t.Fatal(readErr)
		}
		switch {
		case c.want == "" && (err == nil || string(got) != c.old):
			t.Errorf("%q, where the end mark is missing, became %q (%v)", c.old, got, err)
		case c.want != "" && string(got) != c.want:
			t.Errorf("%q became %q (%v), want %q", c.old, got, err, c.want)
		}
	}
}
