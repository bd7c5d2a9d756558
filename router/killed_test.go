package router_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
	"stoop/router"
	"stoop/rules"
)

const killedRules = `
rules:
  - name: three
    match: {rule: "R*"}
    when: {count: 3, within: 60s, by: pod}
    actions: [one]
  - name: together
    match: {rule: "R*"}
    when: {rules: [R0, R1], within: 60s, by: container}
    actions: [one]
`

// killedDir tells the test that it is to be killed where to work.
const killedDir = "STOOP_TEST_KILLED"

// kill -9 at random moments, while alerts of both lanes are counted: each of them
// counts exactly once, and what agreed does so once.
func TestKilledWhileCounting(t *testing.T) {
	const (
		kills  = 12
		alerts = 6000
		pods   = 7
	)
	dir := t.TempDir()
	var lines strings.Builder
	byPod := map[string]int{}
	now := time.Now()
	for i := range alerts {
		p := fmt.Sprint("p", rand.N(pods))
		byPod[p]++
		fmt.Fprintf(&lines, `{"rule":"R%d","priority":%q,"output":"%d","time":%q,"output_fields":{"container.id":"%012x",%s}}`+"\n",
			rand.N(2), []string{"Critical", "Notice"}[rand.N(2)], i, now.Format(time.RFC3339Nano), p[1]-'0', pod(p))
	}
	if err := os.WriteFile(filepath.Join(dir, "alerts"), []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0], "-test.run=^TestToBeKilled$", "-test.timeout=2m")
		cmd.Env = append(os.Environ(), killedDir+"="+dir)
		cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	for k := range kills {
		cmd := run()
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		enough := int64(alerts*k/kills + rand.N(alerts/kills))
		for over := false; !over; {
			info, err := os.Stat(filepath.Join(dir, "stored"))
			select {
			case <-ended:
				over = true
			case <-time.After(time.Millisecond):
				over = err == nil && info.Size() > enough
			}
		}
		_ = cmd.Process.Kill()
		<-ended
	}
	if err := run().Wait(); err != nil {
		t.Fatal(err)
	}

	f, err := os.Open(filepath.Join(dir, "steps"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fired := map[string]*broker.Step{}
	for in := bufio.NewScanner(f); in.Scan(); {
		s := &broker.Step{}
		if json.Unmarshal(in.Bytes(), s) != nil {
			continue // the process was killed while it wrote that: it comes again
		}
		if was := fired[s.ID]; was != nil && !slices.Equal(was.Agreed, s.Agreed) {
			t.Errorf("step %s of alerts %v came again, of %v", s.ID, was.Agreed, s.Agreed)
		}
		fired[s.ID] = s
	}
	used, three, together := map[string]string{}, map[string]int{}, 0
	for id, s := range fired {
		for _, a := range s.Agreed {
			if other, ok := used[s.Rule+a]; ok {
				t.Errorf("alert %s counted for steps %s and %s", a, id, other)
			}
			used[s.Rule+a] = id
		}
		if s.Rule == "together" {
			together++
			continue
		}
		three[s.Target.Pod]++
	}
	for p, n := range byPod {
		if three[p] != n/3 {
			t.Errorf("of %d alerts on pod %s, each three made %d steps, want %d", n, p, three[p], n/3)
		}
	}
	t.Logf("%d steps of three alerts, %d of two together", len(fired)-together, together)
	if together < alerts/10 {
		t.Errorf("only %d steps of two together", together)
	}
}

// TestToBeKilled is the process that is killed.
func TestToBeKilled(t *testing.T) {
	dir := os.Getenv(killedDir)
	if dir == "" {
		t.Skip("run by TestKilledWhileCounting")
	}
	b, err := broker.Open(t.Context(), broker.Config{Dir: filepath.Join(dir, "data"), Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	set, err := rules.Parse("test.yaml", []byte(killedRules), rules.Catalog{"one": param.Describe(struct{}{})})
	if err != nil {
		t.Fatal(err)
	}
	r := router.New(slog.New(slog.NewTextHandler(os.Stderr, nil)), prometheus.NewRegistry(), router.Trust{})
	r.SetRules(set)
	out, err := os.OpenFile(filepath.Join(dir, "steps"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := b.OpenSteps(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		if err := r.Run(ctx, b); err != nil {
			t.Error(err)
		}
	})
	running.Go(func() {
		_ = b.ConsumeSteps(ctx, "one", 8, func(_ context.Context, d *broker.Delivery) {
			data, _ := json.Marshal(d.Step)
			if _, err := fmt.Fprintf(out, "\n%s\n", data); err != nil {
				t.Error(err)
			}
			_ = d.Ack()
		})
	})

	src, err := os.ReadFile(filepath.Join(dir, "alerts"))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := os.OpenFile(filepath.Join(dir, "stored"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600) // a byte for each
	if err != nil {
		t.Fatal(err)
	}
	defer stored.Close()
	info, err := stored.Stat()
	if err != nil {
		t.Fatal(err)
	}
	const batch = 10
	for lines := range slices.Chunk(strings.Split(strings.TrimSpace(string(src)), "\n")[info.Size():], batch) {
		var arrivals []broker.Arrival
		for _, line := range lines {
			a, err := alert.Parse([]byte(line))
			if err != nil {
				t.Fatal(err)
			}
			arrivals = append(arrivals, broker.Arrival{Alert: a, Received: time.Now(), Origin: broker.OriginFIFO})
		}
		if n, err := b.Store(ctx, arrivals); n < len(lines) {
			t.Fatal(err)
		}
		// Those that were stored before it says so come again, and are known.
		if _, err := stored.Write(make([]byte, len(lines))); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		steps, err := b.UnfinishedSteps(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if b.Unrouted() == 0 && len(steps) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after a minute, %d alerts and %d steps wait", b.Unrouted(), len(steps))
		}
	}
}
