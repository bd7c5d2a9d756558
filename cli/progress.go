package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progress is a bar on a terminal, and nothing elsewhere.
type progress struct {
	w     io.Writer // nil: nobody looks
	begun time.Time
	next  time.Time
	shown bool
}

const (
	// barAfter is when a bar appears, and barEvery how often it moves.
	barAfter = 500 * time.Millisecond
	barEvery = 100 * time.Millisecond
	barWidth = 24
	// barLook is after how many alerts the clock is looked at.
	barLook = 256
)

func newProgress(w io.Writer) *progress {
	p := &progress{begun: time.Now()}
	p.next = p.begun.Add(barAfter)
	if isTerminal(w) {
		p.w = w
	}
	return p
}

// say says how many were dealt with, and how many are left; 0: nobody knows.
func (p *progress) say(done int, left uint64) {
	if p.w == nil || done%barLook != 0 {
		return
	}
	now := time.Now()
	if now.Before(p.next) {
		return
	}
	p.next, p.shown = now.Add(barEvery), true
	fmt.Fprint(p.w, "\r", barText(done, left, now.Sub(p.begun)), "\x1b[K")
}

func barText(done int, left uint64, took time.Duration) string {
	rate := float64(done) / took.Seconds()
	if left == 0 {
		return fmt.Sprintf("%d alerts, %.0f a second", done, rate)
	}
	part := float64(done) / (float64(done) + float64(left))
	full := int(part * barWidth)
	return fmt.Sprintf("[%s%s] %3.0f %%, %d alerts, %.0f a second",
		strings.Repeat("#", full), strings.Repeat(".", barWidth-full), part*100, done, rate)
}

// end takes the bar away.
func (p *progress) end() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
