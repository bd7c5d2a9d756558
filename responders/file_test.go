package responders_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/broker"
	"stoop/responders"
)

func readLines(t testing.TB, path string) []map[string]any {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lines []map[string]any
	s := bufio.NewScanner(f)
	s.Buffer(nil, 4<<20)
	for s.Scan() {
		var m map[string]any
		if err := json.Unmarshal(s.Bytes(), &m); err != nil {
			t.Fatalf("%s: %v in %s", path, err, s.Text())
		}
		lines = append(lines, m)
	}
	if s.Err() != nil {
		t.Fatal(s.Err())
	}
	return lines
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "alerts.jsonl")
	r := entryOf(t, "file").New(responders.Env{Node: "node-1", Cluster: "prod"})
	req := notification(t, "file", "path: "+path)
	if _, err := r.Act(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	lines := readLines(t, path)
	if len(lines) != 1 {
		t.Fatalf("there are %d lines", len(lines))
	}
	stamp, err := time.Parse(time.RFC3339Nano, lines[0]["@timestamp"].(string))
	if err != nil || time.Since(stamp) > time.Minute || stamp.Location() != time.UTC {
		t.Errorf("@timestamp is %v (%v)", lines[0]["@timestamp"], err)
	}
	a, _ := lines[0]["alert"].(map[string]any)
	if lines[0]["id"] != req.Step.ID || lines[0]["rule"] != "tell" || lines[0]["node"] != "node-1" || lines[0]["cluster"] != "prod" || a["rule"] != req.Alert.Rule {
		t.Errorf("the line is %v", lines[0])
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}

	again := *req
	again.Resumed = true
	if res, err := r.Act(t.Context(), &again); err != nil || !res.Nothing || len(readLines(t, path)) != 1 {
		t.Errorf("resumed: %+v, %v", res, err)
	}
	other := *req.Step
	other.ID = "99999999999999999999"
	again.Step = &other
	if res, err := r.Act(t.Context(), &again); err != nil || res.Nothing || len(readLines(t, path)) != 2 {
		t.Errorf("another step resumed: %+v, %v", res, err)
	}
}

// The id of another step in an alert's text must not make a resumed step
// believe that it is written.
func TestFileIsNotFooledByAnAlert(t *testing.T) {
	path := filepath.Join(t.TempDir(), "alerts.jsonl")
	r := entryOf(t, "file").New(responders.Env{})
	req := notification(t, "file", "path: "+path)
	line := fmt.Sprintf(`{"priority":"Critical","rule":"%s","id":"11111111111111111111"}`, strings.Repeat("x", 300))
	req.Step.Alert = json.RawMessage(line)
	if _, err := r.Act(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	s := *req.Step
	s.ID = "11111111111111111111"
	req.Step, req.Resumed = &s, true
	if res, err := r.Act(t.Context(), req); err != nil || res.Nothing {
		t.Errorf("result %+v, error %v", res, err)
	}
}

func TestFileRotates(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "alerts.jsonl")
	r := entryOf(t, "file").New(responders.Env{})
	params := "{path: " + path + ", maxSize: 1MiB, keep: 2}"
	const n = 50
	big := notification(t, "file", params)
	big.Step.Alert = json.RawMessage(fmt.Sprintf(`{"priority":"Critical","rule":"x","output":%q}`, strings.Repeat("y", 200<<10)))
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			req := *big
			s := *big.Step
			s.ID = fmt.Sprintf("%020d", i)
			req.Step = &s
			if _, err := r.Act(t.Context(), &req); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	total, ids := 0, map[string]bool{}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 1<<20 {
			t.Errorf("%s has %d bytes", e.Name(), info.Size())
		}
		for _, l := range readLines(t, filepath.Join(dir, e.Name())) {
			total++
			ids[l["id"].(string)] = true
		}
	}
	if len(entries) != 3 || len(ids) != total || total < 11 || total > 15 {
		t.Errorf("%d files, %d lines, %d ids", len(entries), total, len(ids))
	}
}

func TestFileWritesOnlyToAFile(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.WriteFile(target, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		link: "symbolic link", fifo: "", dir: "", filepath.Join(dir, "no", "file"): "make " + filepath.Join(dir, "no") + " first",
	} {
		r := entryOf(t, "file").New(responders.Env{})
		for _, resumed := range []bool{false, true} {
			req := notification(t, "file", "path: "+path)
			req.Resumed = resumed
			_, err := r.Act(t.Context(), req)
			if status, retry, _, reason := responders.Classify(err); status != broker.Failed || retry || !strings.Contains(reason, want) {
				t.Errorf("%s: status %s, retry %t: %s", path, status, retry, reason)
			}
		}
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "before" {
		t.Errorf("what the link points at was written to: %q, %v", b, err)
	}
}

func TestFileParameters(t *testing.T) {
	for params, want := range map[string]string{
		"{}":                            "path",
		"path: alerts.jsonl":            "absolute",
		"path: /var/log/../etc/x":       "absolute",
		"path: /":                       "absolute",
		"path: /var/log/":               "absolute",
		"{path: /a/b, maxSize: 1KiB}":   "1MiB",
		"{path: /a/b, keep: -1}":        "0",
		"path: /var/log/stoop.jsonl":    "",
		"{path: /a/b, maxSize: 100MiB}": "",
	} {
		if got := problems(t, entryOf(t, "file"), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}

// A full disk leaves no half a line behind, and the step is tried again.
func TestFileOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	path := filepath.Join(dir, "alerts.jsonl")
	r := entryOf(t, "file").New(responders.Env{})
	req := notification(t, "file", "path: "+path)
	written := 0
	for range 1000 {
		_, err := r.Act(t.Context(), req)
		if err != nil {
			if status, retry, _, _ := responders.Classify(err); status != broker.Failed || !retry {
				t.Fatalf("status %s, retry %t: %v", status, retry, err)
			}
			break
		}
		written++
	}
	if got := len(readLines(t, path)); got != written || written == 0 || written == 1000 {
		t.Errorf("%d lines, %d were written", got, written)
	}
}
