//go:build linux

package pipe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/alert"
	"stoop/pipe/namedpipe"
)

// pipes opens a FIFO of the given size in a temporary folder and a writer to
// it.
func pipes(t testing.TB, size int) (*FIFO, *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "falco.pipe")
	fifo, err := openFIFO(path, size)
	if err != nil {
		t.Fatal(err)
	}
	return fifo, writer(t, path)
}

// writer opens a FIFO as Falco does: for writing only.
func writer(t testing.TB, path string) *os.File {
	t.Helper()
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { w.Close() })
	return w
}

// unread is how many bytes stand in a FIFO.
func unread(t testing.TB, w *os.File) int {
	t.Helper()
	n, err := unix.IoctlGetInt(int(w.Fd()), unix.TIOCINQ)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func must(t testing.TB, _ int, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFIFOPieces(t *testing.T) {
	long := sized("long", "Notice", DefaultMaxLine)
	if len(long) != DefaultMaxLine+1 {
		t.Fatal(len(long))
	}
	var many strings.Builder
	var manyRules []string
	for i := range 5000 {
		name := fmt.Sprint("rule ", i)
		manyRules = append(manyRules, name)
		many.WriteString(sized(name, "Notice", 300+i%4000))
	}
	a, b := line("a", "Notice"), line("b", "Critical")
	tests := []struct {
		name  string
		text  string
		piece int
		want  []string
		slow  bool
	}{
		{name: "byte by byte", text: a + b + a, piece: 1, want: []string{"a", "b", "a"}},
		{name: "pieces of 7", text: strings.Repeat(a, 100), piece: 7, want: slices.Repeat([]string{"a"}, 100)},
		{name: "pieces of 4096", text: many.String(), piece: 4096, want: manyRules},
		{name: "pieces of 3000, a page each", text: many.String(), piece: 3000, want: manyRules},
		{name: "all at once", text: many.String(), piece: 100 << 20, want: manyRules},
		{name: "the longest line", text: a + long + a, piece: 100 << 20, want: []string{"a", "long", "a"}},
		{name: "the longest line in pieces", text: a + long + a, piece: 1000, want: []string{"a", "long", "a"}},
		{name: "one byte too long", text: a + "x" + long + a, piece: 100 << 20, want: []string{"a", "a"}},
		{name: "10 MB without a newline", text: a + strings.Repeat("x", 10_000_000) + "\n" + b, piece: 100 << 20, want: []string{"a", "b"}},
		{name: "10 MB without a newline, in pieces", text: strings.Repeat("x", 10_000_000) + "\n" + b + "\n", piece: 5000, want: []string{"b"}},
	}
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		for _, test := range tests {
			t.Run(fmt.Sprintf("%s through %d KiB", test.name, size>>10), func(t *testing.T) {
				t.Parallel()
				store := &shelf{}
				in, _ := intake(t, Options{Store: store})
				fifo, w := pipes(t, size)
				start(t, fifo, in)
				for text := test.text; len(text) > 0; {
					n := min(test.piece, len(text))
					_, err := w.WriteString(text[:n])
					must(t, 0, err)
					text = text[n:]
				}
				store.has(t, len(test.want))
				got := store.rules()
				slices.Sort(got) // urgent ones go another way
				want := slices.Sorted(slices.Values(test.want))
				equal(t, "alerts", got, want)
				eventually(t, func() error {
					if n := unread(t, w); n != 0 {
						return fmt.Errorf("%d bytes are left in the FIFO", n)
					}
					return nil
				})
			})
		}
	}
}

// When the pipe is smaller than what may be seen of it, as when the scratch
// pipe could not be made as large.
func TestFIFOSmallScratch(t *testing.T) {
	store := &shelf{}
	in, _ := intake(t, Options{Store: store, OnShed: func(_ alert.Priority, n int) { t.Errorf("%d alerts were shed", n) }})
	fifo, w := pipes(t, 1<<20)
	if _, err := unix.FcntlInt(uintptr(fifo.scratch[0]), unix.F_SETPIPE_SZ, 8<<10); err != nil {
		t.Fatal(err)
	}
	start(t, fifo, in)
	for i := range 500 {
		_, err := w.WriteString(sized("a", "Notice", 1000+40*i))
		must(t, 0, err)
	}
	store.has(t, 500)
}

// The writer dies in the middle of a line, and the next one goes on.
func TestFIFOTornLine(t *testing.T) {
	store := &shelf{}
	in, out := intake(t, Options{Store: store})
	fifo, w := pipes(t, 64<<10)
	start(t, fifo, in)
	torn := line("torn", "Notice")
	must(t, 0, first(w.WriteString(line("a", "Notice")+torn[:100])))
	w.Close()
	store.has(t, 1)
	w = writer(t, fifo.path)
	must(t, 0, first(w.WriteString(line("b", "Notice"))))
	store.has(t, 3)
	got := store.rules()
	slices.Sort(got)
	equal(t, "alerts", got, []string{"!", "a", "b"})
	if out.count("torn piece") != 1 {
		t.Errorf("not said:\n%s", out)
	}
}

func first(_ int, err error) error { return err }

// Falco with keep_alive false: end of file after every alert.
func TestFIFOWriterComesAndGoes(t *testing.T) {
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	fifo, _ := pipes(t, 1<<20)
	start(t, fifo, in)
	for i := range 300 {
		write(t, fifo.path, line(fmt.Sprint(i), "Notice"), 0)
	}
	store.has(t, 300)
}

// A whole line is handed on the moment it is there, also behind an unfinished
// one that stood in the FIFO.
func TestFIFOLatency(t *testing.T) {
	stored := make(chan time.Time, 1)
	store := &shelf{before: func(context.Context, []Arrival) (int, error) {
		stored <- time.Now()
		return 0, nil
	}}
	in, _ := intake(t, Options{Store: store})
	fifo, w := pipes(t, 1<<20)
	start(t, fifo, in)
	var took []time.Duration
	text := line("a", "Critical")
	for i := range 300 {
		half := i % len(text)
		must(t, 0, first(w.WriteString(text[:half])))
		if half > 0 {
			time.Sleep(100 * time.Microsecond) // so that the piece is seen by itself, mostly
		}
		begun := time.Now()
		must(t, 0, first(w.WriteString(text[half:])))
		took = append(took, (<-stored).Sub(begun))
	}
	slices.Sort(took)
	p50, p99 := took[len(took)/2], took[len(took)*99/100]
	t.Logf("written to stored: p50 %v, p99 %v", p50, p99)
	if p50 > 2*time.Millisecond {
		t.Errorf("p50 is %v, p99 %v", p50, p99)
	}
}

// Bytes stay in the FIFO until the store has what they say.
func TestFIFOConsumesAfterTheStore(t *testing.T) {
	g := newGate()
	store := &shelf{before: g.pass}
	in, _ := intake(t, Options{Store: store})
	fifo, w := pipes(t, 64<<10)
	start(t, fifo, in)
	text := line("a", "Notice")
	must(t, 0, first(w.WriteString(text+text[:10])))
	<-g.entered
	if n := unread(t, w); n != len(text)+10 {
		t.Errorf("%d bytes stand in the FIFO while the store is asked, want %d", n, len(text)+10)
	}
	close(g.open)
	eventually(t, func() error {
		if n := unread(t, w); n != 10 {
			return fmt.Errorf("%d bytes are left, want the 10 of the unfinished line", n)
		}
		return nil
	})
	must(t, 0, first(w.WriteString(text[10:])))
	store.has(t, 2)
	equal(t, "alerts", store.rules(), []string{"a", "a"})
}

// A store that hangs, and then refuses, must not stall Falco: it is held up
// once, and then the FIFO is drained into memory, and the least urgent is shed.
// A store that answers in time and yet takes less than is written does not hold
// the writer up, as long as half of the intake's memory is free; and nothing is
// shed for it.
func TestFIFOStoreThatFallsBehind(t *testing.T) {
	store := &shelf{before: func(ctx context.Context, batch []Arrival) (int, error) {
		select {
		case <-time.After(Patience * 9 / 10): // for 512 KiB: less than 6 MB a second
		case <-ctx.Done():
		}
		return len(batch), nil
	}}
	in, _ := intake(t, Options{Store: store})
	fifo, w := pipes(t, 1<<20)
	start(t, fifo, in)
	const mb = 6
	text := strings.Repeat(sized("debug", "Debug", 1000), 64)
	begun := time.Now()
	for written := 0; written < mb<<20; written += len(text) {
		must(t, 0, first(w.WriteString(text)))
	}
	if took := time.Since(begun); took > 1500*time.Millisecond {
		t.Errorf("writing %d MiB took %v", mb, took)
	}
}

func TestFIFOSlowStore(t *testing.T) {
	for _, size := range []int{64 << 10, 1 << 20} {
		t.Run(fmt.Sprintf("%d KiB", size>>10), func(t *testing.T) {
			store := &shelf{before: func(ctx context.Context, batch []Arrival) (int, error) {
				select {
				case <-time.After(300 * time.Millisecond):
				case <-ctx.Done():
				}
				return 0, errFull
			}}
			in, out := intake(t, Options{Store: store, Limit: 2 << 20})
			fifo, w := pipes(t, size)
			start(t, fifo, in)
			var longest time.Duration
			const urgent = 20
			for i := range 8000 {
				text := sized("debug", "Debug", 1000)
				if i%400 == 0 {
					text = sized(fmt.Sprint("urgent ", i), "Critical", 1000)
				}
				begun := time.Now()
				must(t, 0, first(w.WriteString(text)))
				longest = max(longest, time.Since(begun))
			}
			if longest > 350*time.Millisecond {
				t.Errorf("the writer was held up for %v", longest)
			}
			eventually(t, func() error {
				if n := unread(t, w); n > 0 {
					return fmt.Errorf("%d bytes are left in the FIFO", n)
				}
				return nil
			})
			t.Logf("the longest write took %v", longest)
			store.set(nil)
			eventually(t, func() error {
				n := 0
				for _, r := range store.rules() {
					if strings.HasPrefix(r, "urgent") {
						n++
					}
				}
				if n != urgent {
					return fmt.Errorf("%d of %d urgent alerts are stored", n, urgent)
				}
				return nil
			})
			if out.count("alerts were shed") == 0 {
				t.Errorf("that alerts were shed was not said:\n%s", out)
			}
		})
	}
}

func TestFIFOEndsPromptly(t *testing.T) {
	for _, test := range []struct {
		name, text string
		before     func(context.Context, []Arrival) (int, error)
		left       int
	}{
		{name: "empty"},
		{name: "with an unfinished line", text: "{", left: 1},
		{name: "while the store hangs", text: line("a", "Notice"), left: len(line("a", "Notice")), before: func(ctx context.Context, _ []Arrival) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := &shelf{before: test.before}
			in, _ := intake(t, Options{Store: store})
			fifo, w := pipes(t, 64<<10)
			// Somebody holds it, so that what is left stays.
			holder, err := namedpipe.Open(fifo.path)
			if err != nil {
				t.Fatal(err)
			}
			defer holder.Close()
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- fifo.Run(ctx, in) }()
			must(t, 0, first(w.WriteString(test.text)))
			begun := time.Now()
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(within):
				t.Fatal("it did not end")
			}
			if took := time.Since(begun); took > time.Second {
				t.Errorf("it took %v", took)
			}
			if n := unread(t, w); n != test.left {
				t.Errorf("%d bytes are left in the FIFO, want %d", n, test.left)
			}
		})
	}
}

// What came in just before the end is still taken.
func TestFIFOTakesWhatIsThereAtTheEnd(t *testing.T) {
	for range 20 {
		store := &shelf{}
		in, _ := intake(t, Options{Store: store})
		fifo, w := pipes(t, 64<<10)
		stop := start(t, fifo, in)
		must(t, 0, first(w.WriteString(line("a", "Notice"))))
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		equal(t, "alerts", store.rules(), []string{"a"})
	}
}

func TestFIFOReadByTwo(t *testing.T) {
	store := &shelf{}
	in, out := intake(t, Options{Store: store})
	fifo, w := pipes(t, 64<<10)
	stop := start(t, fifo, in)
	second, err := OpenFIFO(fifo.path)
	if err != nil {
		t.Fatal(err)
	}
	start(t, second, in)
	eventually(t, func() error {
		if out.count("another stoop reads this FIFO") == 0 {
			return errors.New("the second does not wait")
		}
		return nil
	})
	must(t, 0, first(w.WriteString(line("a", "Notice"))))
	store.has(t, 1)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	must(t, 0, first(w.WriteString(line("b", "Notice"))))
	store.has(t, 2)
	equal(t, "alerts", store.rules(), []string{"a", "b"})

	// Somebody takes an unfinished line away.
	thief, err := namedpipe.Open(fifo.path)
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	for try := 0; out.count("somebody else reads from the FIFO") == 0; try++ {
		if try == 100 {
			t.Fatal("the theft was not noticed")
		}
		must(t, 0, first(w.WriteString("some bytes")))
		time.Sleep(time.Millisecond) // so that they are seen, mostly
		must(t, 0, first(thief.Read(make([]byte, 100))))
		time.Sleep(2 * lookAgain)
	}
	must(t, 0, first(w.WriteString("\n"+line("c", "Notice"))))
	eventually(t, func() error {
		if rules := store.rules(); !slices.Contains(rules, "c") {
			return fmt.Errorf("stored: %v", rules)
		}
		return nil
	})
}

func TestFIFOPath(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("regular"), line("a", "Notice"), os.O_CREATE)
	if err := os.Mkdir(path("folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("nowhere"), path("dangling")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		path string
		want []string
	}{
		{path("regular"), []string{"is a regular file", "Falco creates one when it comes before stoop", "mv " + path("regular")}},
		{path("folder"), []string{"is a folder and no FIFO"}},
		{"/dev/null", []string{"is a device and no FIFO"}},
		{path("dangling"), []string{path("dangling")}},
		{path("missing/falco.pipe"), []string{"create its folder first"}},
	} {
		_, err := OpenFIFO(test.path)
		for _, want := range test.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; want %q in it", test.path, err, want)
			}
		}
	}
	if raw, err := os.ReadFile(path("regular")); err != nil || string(raw) != line("a", "Notice") {
		t.Errorf("the regular file was touched: %q, %v", raw, err)
	}

	fifo, err := OpenFIFO(path("new"))
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	info, err := os.Stat(path("new"))
	if err != nil || info.Mode() != os.ModeNamedPipe|0o600 {
		t.Errorf("it was created as %v, %v", info.Mode(), err)
	}
	size, err := unix.FcntlInt(fifo.file.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil || size != 1<<20 {
		t.Errorf("it holds %d bytes, %v", size, err)
	}
}

// A FIFO as systemd hands it over: open for reading and writing, blocking.
func TestFIFOHandedOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "falco.pipe")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(flags int) *os.File {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "falco.pipe")
	}
	fifo, err := FIFOFrom(open(unix.O_RDWR))
	if err != nil {
		t.Fatal(err)
	}
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	stop := start(t, fifo, in)
	write(t, path, line("a", "Notice"), 0)
	store.has(t, 1)
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	if _, err := FIFOFrom(open(unix.O_RDONLY | unix.O_NONBLOCK)); err == nil || !strings.Contains(err.Error(), "open for both") {
		t.Errorf("opened for reading only: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FIFOFrom(null); err == nil || !strings.Contains(err.Error(), "no FIFO") {
		t.Errorf("no FIFO: %v", err)
	}
}

// The protocol by which systemd hands a FIFO over, with a socket before it.
func TestFIFOHandedOverBySystemd(t *testing.T) {
	dir := t.TempDir()
	path, out := filepath.Join(dir, "falco.pipe"), filepath.Join(dir, "stored")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	fifo := os.NewFile(uintptr(fd), path)
	defer fifo.Close()
	other, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	c := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	c.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=x:falco.pipe", handed+"=1", storeIn+"="+out)
	c.ExtraFiles = []*os.File{other, fifo}
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		c.Process.Kill()
		c.Wait()
	}()
	write(t, path, line("a", "Notice"), 0)
	eventually(t, func() error {
		if raw, err := os.ReadFile(out); err != nil || string(raw) != "a\n" {
			return fmt.Errorf("stored %q, %v", raw, err)
		}
		return nil
	})
}

func TestHold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "falco.pipe")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- namedpipe.Hold(ctx, path, slog.New(slog.DiscardHandler)) }()
	eventually(t, func() error { _, err := os.Stat(path); return err })
	write(t, path, line("a", "Notice"), 0) // does not block, and is not lost
	store := &shelf{}
	in, _ := intake(t, Options{Store: store})
	fifo, err := OpenFIFO(path)
	if err != nil {
		t.Fatal(err)
	}
	start(t, fifo, in)
	store.has(t, 1)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(t.TempDir(), "x"), "", os.O_CREATE)
	if err := namedpipe.Hold(context.Background(), filepath.Dir(path), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a folder was held")
	}
}

// The names of the variables by which this test binary is told to be another
// program.
const (
	readerOf = "STOOP_TEST_READ_FIFO"
	handed   = "STOOP_TEST_READ_HANDED_FIFO"
	storeIn  = "STOOP_TEST_STORE_FILE"
)

func TestMain(m *testing.M) {
	open := func() (*FIFO, error) { return OpenFIFO(os.Getenv(readerOf)) }
	if os.Getenv(handed) != "" {
		open = HandedFIFO
	}
	if out := os.Getenv(storeIn); out != "" {
		fmt.Fprintln(os.Stderr, readIntoFile(open, out))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// appender is a store that appends to a file, which outlives the process.
type appender struct{ f *os.File }

func (s appender) Store(_ context.Context, batch []Arrival) (int, error) {
	var b strings.Builder
	for _, a := range batch {
		if a.Alert == nil {
			fmt.Fprintf(&b, "!%s\n", a.Unparsed)
			continue
		}
		b.WriteString(a.Alert.Rule + "\n")
	}
	if _, err := io.WriteString(s.f, b.String()); err != nil {
		return 0, err
	}
	return len(batch), nil
}

func readIntoFile(open func() (*FIFO, error), out string) error {
	f, err := os.OpenFile(out, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	fifo, err := open()
	if err != nil {
		return err
	}
	if fifo == nil {
		return errors.New("no FIFO was handed over")
	}
	return fifo.Run(context.Background(), NewIntake(Options{Store: appender{f}}))
}

// Killed at any moment, the reader loses nothing of what was written, as long
// as somebody holds the FIFO.
func TestFIFOSurvivesKills(t *testing.T) {
	const kills = 10
	dir := t.TempDir()
	path, out := filepath.Join(dir, "falco.pipe"), filepath.Join(dir, "stored")
	ctx, cancel := context.WithCancel(context.Background())
	held := make(chan error, 1)
	go func() { held <- namedpipe.Hold(ctx, path, slog.New(slog.DiscardHandler)) }()
	eventually(t, func() error { _, err := os.Stat(path); return err })

	run := func() *exec.Cmd {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), readerOf+"="+path, storeIn+"="+out)
		c.Stderr = os.Stderr
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	w := writer(t, path)
	var stop atomic.Bool
	wrote := make(chan int, 1)
	go func() {
		n := 0
		for ; !stop.Load(); n++ {
			if _, err := w.WriteString(sized(fmt.Sprint(n), "Notice", 300+n%3000)); err != nil {
				t.Error(err)
				break
			}
		}
		wrote <- n
	}()
	size := func() int64 {
		info, err := os.Stat(out)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	for range kills {
		before := size()
		c := run()
		eventually(t, func() error {
			if size() <= before {
				return errors.New("the reader stores nothing")
			}
			return nil
		})
		time.Sleep(rand.N(20 * time.Millisecond))
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		c.Wait()
	}
	last := run()
	stop.Store(true)
	n := <-wrote
	eventually(t, func() error {
		if left := unread(t, w); left > 0 {
			return fmt.Errorf("%d bytes are left in the FIFO", left)
		}
		return nil
	})
	last.Process.Kill()
	last.Wait()
	cancel()
	if err := <-held; err != nil {
		t.Fatal(err)
	}

	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seen := map[string]int{}
	lines, bad := 0, 0
	for scan := bufio.NewScanner(f); scan.Scan(); lines++ {
		if strings.HasPrefix(scan.Text(), "!") {
			bad++
		}
		seen[scan.Text()]++
	}
	lost := 0
	for i := range n {
		if seen[fmt.Sprint(i)] == 0 {
			lost++
		}
	}
	t.Logf("%d lines written, %d stored (%d twice), %d lost, %d bad, %d kills", n, lines, lines-len(seen), lost, bad, kills)
	if lost > 0 || n < 1000 {
		t.Errorf("%d of %d lines are lost", lost, n)
	}
	// A reader that is killed between two splices leaves a piece of a line.
	if bad > kills {
		t.Errorf("%d lines were torn", bad)
	}
}

type counter struct{ n atomic.Int64 }

func (c *counter) Store(_ context.Context, batch []Arrival) (int, error) {
	c.n.Add(int64(len(batch)))
	return len(batch), nil
}

// BenchmarkFIFO is a line of 1 KiB from the FIFO, parsed, into a store that
// does nothing.
func BenchmarkFIFO(b *testing.B) {
	fifo, w := pipes(b, pipeSize)
	store := &counter{}
	in := NewIntake(Options{Store: store})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fifo.Run(ctx, in) }()
	text := benchLine
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if _, err := w.WriteString(text); err != nil {
			b.Fatal(err)
		}
	}
	eventually(b, func() error {
		if n := store.n.Load(); n < int64(b.N) {
			return fmt.Errorf("%d of %d lines are stored", n, b.N)
		}
		return nil
	})
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	if err := in.Close(context.Background()); err != nil {
		b.Fatal(err)
	}
}

const benchLine = `{"hostname":"node-a","output":"10:21:03.120000001: Notice A shell was spawned in a container with an attached terminal (evt_type=execve user=root user_uid=0 user_loginuid=-1 process=sh proc_exepath=/bin/busybox parent=runc command=sh terminal=34816 exe_flags=EXE_WRITABLE|EXE_LOWER_LAYER container_id=3f1d5e6a7b8c container_name=web k8s_ns=shop k8s_pod=web-5f6d8c9b7-x2x4p)","output_fields":{"container.id":"3f1d5e6a7b8c","container.image.repository":"docker.io/library/alpine","container.image.tag":"3.20","container.name":"web","evt.arg.flags":"EXE_WRITABLE|EXE_LOWER_LAYER","evt.time":1760000000123456789,"evt.type":"execve","k8s.ns.name":"shop","k8s.pod.name":"web-5f6d8c9b7-x2x4p","proc.cmdline":"sh","proc.exepath":"/bin/busybox","proc.name":"sh","proc.pname":"runc","proc.tty":34816,"user.loginuid":-1,"user.name":"root","user.uid":0},"priority":"Notice","rule":"Terminal shell in container","source":"syscall","tags":["T1059","container","maturity_stable","mitre_execution","shell"],"time":"2025-10-09T08:53:20.123456789Z"}` + "\n"
