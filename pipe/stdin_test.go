package pipe

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// runToEnd runs a source that ends by itself.
func runToEnd(t *testing.T, s Source, in *Intake) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := s.Run(ctx, in); err != nil {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatal("it did not end by itself")
	}
}

func pipeOf(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestStdinPipe(t *testing.T) {
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	r, w := pipeOf(t)
	go func() {
		defer w.Close()
		for i := range 3000 {
			fmt.Fprint(w, line(fmt.Sprint(i), "Notice"))
		}
		fmt.Fprint(w, "Events detected: 3000\nRule counts by severity:\n   NOTICE: 3000\n")
		fmt.Fprint(w, strings.TrimSpace(line("without a newline", "Notice")))
	}()
	runToEnd(t, NewStdin(r), in)
	got := store.rules()
	if len(got) != 3001 || got[0] != "0" || got[2999] != "2999" || got[3000] != "without a newline" {
		t.Errorf("%d arrivals, %v … %v", len(got), got[:min(3, len(got))], got[max(0, len(got)-3):])
	}
}

func TestStdinEndsWhenAllIsStored(t *testing.T) {
	store := &shelf{before: func(context.Context, []Arrival) (int, error) {
		time.Sleep(3 * Patience) // too slow to be waited for while reading
		return 0, nil
	}}
	in, _ := intake(t, Options{Store: store})
	r, w := pipeOf(t)
	go func() {
		defer w.Close()
		for range 3 {
			fmt.Fprint(w, sized("a", "Critical", 700<<10))
		}
	}()
	runToEnd(t, NewStdin(r), in)
	if n := len(store.all()); n != 3 {
		t.Errorf("it ended with %d of 3 alerts stored", n)
	}
}

// A regular file can wait: more than the memory for alerts goes through, and
// nothing is shed.
func TestStdinRegularFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "alerts")
	var text strings.Builder
	const n = 2000
	for range n {
		text.WriteString(sized("a", "Debug", 1000))
	}
	write(t, path, text.String(), os.O_CREATE)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	store := &shelf{before: func(_ context.Context, batch []Arrival) (int, error) {
		time.Sleep(time.Millisecond)
		return 0, nil
	}}
	in, _ := intake(t, Options{Store: store, Limit: 256 << 10})
	runToEnd(t, NewStdin(f), in)
	if got := len(store.all()); got != n {
		t.Errorf("%d of %d alerts are stored", got, n)
	}
}

// The writer is not stalled by a store that does not answer.
func TestStdinSlowStore(t *testing.T) {
	store := &shelf{before: func(ctx context.Context, _ []Arrival) (int, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	}}
	in, _ := intake(t, Options{Store: store, Limit: 1 << 20})
	r, w := pipeOf(t)
	start(t, NewStdin(r), in)
	begun := time.Now()
	for range 10000 {
		if _, err := w.WriteString(sized("a", "Debug", 1000)); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the writer was held up for %v", took)
	}
}

func TestStdinEndsPromptly(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	in, _ := intake(t, Options{Store: &shelf{}})
	runToEnd(t, NewStdin(null), in)

	r, w := pipeOf(t)
	if _, err := w.WriteString("{"); err != nil {
		t.Fatal(err)
	}
	stop := start(t, NewStdin(r), in)
	begun := time.Now()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("it took %v", took)
	}

	folder, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	if err := NewStdin(folder).Run(context.Background(), in); err == nil {
		t.Error("a folder was read")
	}
}
