package e2e

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/program"
)

// bucket is an S3 service of others' making that goes down and comes back, always at
// one address.
type bucket struct {
	t       *testing.T
	addr    string
	backend *s3mem.Backend
	server  *http.Server
	served  chan struct{}

	mu      sync.Mutex
	put     []string // the keys, in the order in which they were put
	hang    string   // the end of the key at whose put it hangs
	hanging chan struct{}
}

func newBucket(t *testing.T) *bucket {
	b := &bucket{t: t, addr: harness.Loopback(harness.FreePort(t)), backend: s3mem.New()}
	if err := b.backend.CreateBucket("evidence"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.down)
	return b
}

func (b *bucket) up() {
	b.t.Helper()
	ln, err := net.Listen("tcp", b.addr)
	if err != nil {
		b.t.Fatal(err)
	}
	next := gofakes3.New(b.backend).Server()
	server, served := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := strings.TrimPrefix(r.URL.Path, "/evidence/")
		b.mu.Lock()
		hang := b.hang != "" && strings.HasSuffix(key, b.hang)
		if hang {
			b.hang = ""
			close(b.hanging)
		}
		b.mu.Unlock()
		if hang {
			// Half of it is read, and no answer comes.
			_, _ = io.CopyN(io.Discard, r.Body, 16)
			<-r.Context().Done()
			return
		}
		next.ServeHTTP(w, r)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.put = append(b.put, key)
	})}, make(chan struct{})
	b.server, b.served = server, served
	go func() {
		defer close(served)
		_ = server.Serve(ln)
	}()
}

func (b *bucket) down() {
	if b.server == nil {
		return
	}
	_ = b.server.Close()
	<-b.served
	b.server = nil
}

// keys are those of all objects.
func (b *bucket) keys() []string {
	b.t.Helper()
	list, err := b.backend.ListBucket("evidence", &gofakes3.Prefix{}, gofakes3.ListBucketPage{})
	if err != nil {
		b.t.Fatal(err)
	}
	var keys []string
	for _, o := range list.Contents {
		keys = append(keys, o.Key)
	}
	return keys
}

func (b *bucket) get(key string) []byte {
	b.t.Helper()
	o, err := b.backend.GetObject("evidence", key, nil)
	if err != nil {
		b.t.Fatalf("%s: %v", key, err)
	}
	defer o.Contents.Close()
	data, err := io.ReadAll(o.Contents)
	if err != nil {
		b.t.Fatal(err)
	}
	return data
}

// The bucket is away when evidence is kept, which holds up no chain; then it hangs
// in the middle of a case, and stoop is killed; the next stoop copies all of it, and
// each manifest after what it names.
func TestEvidenceReachesTheBucket(t *testing.T) {
	w, b := newWorld(t), newBucket(t)
	s := program.New(t, program.Options{
		Bin: program.Build(t), Node: w.node, Kubeconfig: w.account.Kubeconfig, Mode: "enforce",
		Rules: `
mode: enforce
rules:
  - name: keep-and-label
    match: {rule: Test keep}
    actions:
      - capture-manifest
      - capture-events
      - label-pod: {labels: {quarantine: "yes"}}
`,
		Config: program.NoLimits + `
evidence:
  s3:
    endpoint: http://` + b.addr + `
    bucket: evidence
    prefix: test
    accessKey: {env: ACCESS}
    secretKey: {env: SECRET}
`,
	})
	env := []string{"ACCESS=key", "SECRET=secret"}
	s.Start(env...)
	pod := w.Pod(t, w.ns, "web", w.node, nil)
	alert := s.Send(program.Critical("Test keep", pod))
	s.WaitStatus(alert, "label-pod", broker.Done, soon)
	cases, err := filepath.Glob(filepath.Join(s.Data, "evidence", "*", "manifest.json"))
	if err != nil || len(cases) != 2 {
		t.Fatalf("kept are %q, %v", cases, err)
	}
	harness.Eventually(t, soon, 10*time.Millisecond, func() (bool, string) {
		return s.Metric(`stoop_evidence_uploads_total{result="failed"}`) > 1, "the bucket to be tried in vain"
	})
	if n := s.Metric("stoop_evidence_pending"); n != 2 {
		t.Errorf("%v cases wait", n)
	}

	b.mu.Lock()
	b.hang, b.hanging = "/manifest.json", make(chan struct{})
	b.mu.Unlock()
	b.up()
	select {
	case <-b.hanging:
	case <-time.After(soon):
		t.Fatal("the bucket is not tried again")
	}
	s.Kill()
	for _, key := range b.keys() {
		if strings.HasSuffix(key, "/manifest.json") {
			t.Errorf("there is the manifest of a case that is not there: %q", b.keys())
		}
	}
	s.Start(env...)
	harness.Eventually(t, soon, 10*time.Millisecond, func() (bool, string) {
		return s.Metric("stoop_evidence_pending") == 0, "all to be copied"
	})

	want := 0
	for _, manifest := range cases {
		dir := filepath.Dir(manifest)
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		key := "test/" + w.node + "/" + filepath.Base(dir) + "/"
		last := slices.Index(b.put, key+"manifest.json")
		for _, f := range files {
			if strings.HasPrefix(f.Name(), ".") {
				continue
			}
			want++
			data, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil || !bytes.Equal(data, b.get(key+f.Name())) {
				t.Errorf("%s is not what is on the disk, %v", key+f.Name(), err)
			}
			if slices.Index(b.put, key+f.Name()) > last {
				t.Errorf("%s came after the manifest: %q", f.Name(), b.put)
			}
		}
	}
	if got := b.keys(); len(got) != want || want < 6 {
		t.Errorf("the bucket has %q, %d files are on the disk", got, want)
	}
	if out := s.Run("evidence", "--verify", "-o", "json"); strings.Count(out, `"copied":true`) != 2 {
		t.Errorf("stoop evidence says %s", out)
	}
}
