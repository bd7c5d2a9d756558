package pipe

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func split(max, piece int, text string, end bool) (got []string) {
	l := lines{max: max}
	line := func(b []byte) { got = append(got, string(b)) }
	long := func(n int) { got = append(got, fmt.Sprintf("<%d bytes>", n)) }
	for len(text) > 0 {
		n := min(piece, len(text))
		l.feed([]byte(text[:n]), line, long)
		text = text[n:]
	}
	if end {
		l.finish(line, long)
	}
	return got
}

func TestLines(t *testing.T) {
	tests := []struct {
		name, text string
		end        bool
		want       []string
	}{
		{"whole", "a\nbc\n", false, []string{"a", "bc"}},
		{"empty lines", "\n\na\n", false, []string{"", "", "a"}},
		{"unfinished", "a\nbc", false, []string{"a"}},
		{"unfinished at the end", "a\nbc", true, []string{"a", "bc"}},
		{"nothing at the end", "a\n", true, []string{"a"}},
		{"exactly as long as allowed", "12345678\na\n", false, []string{"12345678", "a"}},
		{"one byte too long", "123456789\na\n", false, []string{"<9 bytes>", "a"}},
		{"much too long", strings.Repeat("x", 100) + "\na\n", false, []string{"<100 bytes>", "a"}},
		{"too long at the end", "a\n" + strings.Repeat("x", 50), true, []string{"a", "<50 bytes>"}},
		{"two too long", "1234567890\n12345678901\nb\n", false, []string{"<10 bytes>", "<11 bytes>", "b"}},
	}
	for _, test := range tests {
		for _, piece := range []int{1, 2, 3, 7, 8, 9, 10, 1000} {
			t.Run(fmt.Sprintf("%s in pieces of %d", test.name, piece), func(t *testing.T) {
				got := split(8, piece, test.text, test.end)
				// In pieces, an empty line is empty whichever way it came.
				equal(t, "lines", got, test.want)
			})
		}
	}
}

// A line that comes byte by byte must not be looked at from its beginning for
// every byte: 2 MiB would take minutes.
func TestLinesByteByByteIsLinear(t *testing.T) {
	l := lines{max: 2 << 20}
	n := 0
	start := time.Now()
	for range 2 << 20 {
		l.feed([]byte{'x'}, nil, nil)
	}
	l.feed([]byte{'\n'}, func(b []byte) { n = len(b) }, nil)
	if n != 2<<20 {
		t.Fatalf("the line has %d bytes", n)
	}
	if took := time.Since(start); took > within {
		t.Fatalf("it took %v", took)
	}
	if l.pending() != 0 || cap(l.part) > 64<<10 {
		t.Fatalf("%d bytes are kept in %d", l.pending(), cap(l.part))
	}
}

func FuzzLines(f *testing.F) {
	f.Add("a\nbc\n\nlonger than eight\nx", 3)
	f.Add("\n", 1)
	f.Fuzz(func(t *testing.T, text string, piece int) {
		if piece < 1 || len(text) > 1000 {
			return
		}
		whole := split(8, len(text)+1, text, true)
		equal(t, "lines", split(8, piece, text, true), whole)
	})
}
