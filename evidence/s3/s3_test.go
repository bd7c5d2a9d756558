package s3

import (
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"stoop/evidence"
)

const (
	access = "AKIDEXAMPLE"
	secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
)

// service is an S3 service that takes objects, and believes nobody: the signature,
// the MD5 and the lock have to be right.
type service struct {
	t    *testing.T
	http *httptest.Server

	mu      sync.Mutex
	secret  string
	objects map[string]stored
	locks   bool   // the bucket was made with object lock
	fault   string // the code of an error that it answers, with 500
}

type stored struct {
	body   string
	header http.Header
}

func newService(t *testing.T) *service {
	s := &service{t: t, secret: secret, objects: map[string]stored{}}
	s.http = httptest.NewTLSServer(s)
	t.Cleanup(s.http.Close)
	return s
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client went away
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	refuse := func(status int, code string) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		fmt.Fprintf(w, "<Error><Code>%s</Code><Message>about it</Message></Error>", code)
	}
	sum := md5.Sum(body)
	switch {
	case s.fault != "":
		refuse(http.StatusServiceUnavailable, s.fault)
	case r.Method != http.MethodPut:
		s.t.Errorf("asked for %s %s", r.Method, r.URL)
		refuse(http.StatusForbidden, "AccessDenied")
	case r.ContentLength < 0:
		refuse(http.StatusLengthRequired, "MissingContentLength")
	case !s.signed(r):
		refuse(http.StatusForbidden, "SignatureDoesNotMatch")
	case r.Header.Get("Content-Md5") != base64.StdEncoding.EncodeToString(sum[:]):
		refuse(http.StatusBadRequest, "BadDigest")
	case r.Header.Get("X-Amz-Object-Lock-Mode") != "" && !s.locks:
		refuse(http.StatusBadRequest, "InvalidRequest")
	case !strings.HasPrefix(r.URL.Path, "/evidence/"):
		refuse(http.StatusNotFound, "NoSuchBucket")
	default:
		s.objects[strings.TrimPrefix(r.URL.EscapedPath(), "/evidence/")] = stored{string(body), r.Header.Clone()}
		w.Header().Set("ETag", `"`+hex.EncodeToString(sum[:])+`"`)
	}
}

// signed checks a signature of version 4, written from Amazon's description of it.
func (s *service) signed(r *http.Request) bool {
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	if !ok {
		return false
	}
	part := map[string]string{}
	for p := range strings.SplitSeq(rest, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(p), "=")
		part[k] = v
	}
	scope := strings.Split(part["Credential"], "/") // key, day, region, service, aws4_request
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if len(scope) != 5 || scope[0] != access || scope[2] != "eu-test-1" || err != nil || time.Since(at).Abs() > time.Minute {
		return false
	}
	names := strings.Split(part["SignedHeaders"], ";")
	var headers strings.Builder
	for _, name := range names {
		value := r.Header.Get(name)
		if name == "host" {
			value = r.Host
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.TrimSpace(value))
	}
	for _, name := range []string{"host", "x-amz-date", "content-md5", "x-amz-meta-sha256"} {
		if !slices.Contains(names, name) {
			s.t.Errorf("%s is not signed", name)
		}
	}
	canonical := strings.Join([]string{
		r.Method, r.URL.EscapedPath(), r.URL.Query().Encode(), headers.String(), part["SignedHeaders"], r.Header.Get("X-Amz-Content-Sha256"),
	}, "\n")
	sum := sha256.Sum256([]byte(canonical))
	text := strings.Join([]string{"AWS4-HMAC-SHA256", r.Header.Get("X-Amz-Date"), strings.Join(scope[1:], "/"), hex.EncodeToString(sum[:])}, "\n")
	key := []byte("AWS4" + s.secret)
	for _, part := range append(slices.Clone(scope[1:]), text) {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(part))
		key = h.Sum(nil)
	}
	return hex.EncodeToString(key) == part["Signature"]
}

// config reaches the service.
func (s *service) config() Config {
	c := Config{
		Endpoint: s.http.URL, Bucket: "evidence", Prefix: "cluster/a b", Region: "eu-test-1",
		Keys: func() (string, string, string, error) { return access, secret, "", nil },
	}
	if s.http.Certificate() == nil {
		return c
	}
	c.CA = filepath.Join(s.t.TempDir(), "ca.pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
	if err := os.WriteFile(c.CA, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return c
}

func bucket(t *testing.T, c Config) *Bucket {
	t.Helper()
	b, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// put puts a file.
func put(t *testing.T, b *Bucket, key, content string) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.Sum256([]byte(content))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return b.Put(ctx, key, evidence.Object{File: f, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:]), JSON: strings.HasSuffix(key, ".json")})
}

func TestPut(t *testing.T) {
	t.Run("https", func(t *testing.T) { testPut(t, newService(t)) })
	t.Run("http", func(t *testing.T) {
		s := newService(t)
		s.http.Close()
		s.http = httptest.NewServer(s)
		t.Cleanup(s.http.Close)
		testPut(t, s)
	})
}

func testPut(t *testing.T, s *service) {
	c := s.config()
	b := bucket(t, c)
	big := strings.Repeat("0123456789abcdef", 3<<20) // 48 MiB: three parts, if it were sent in parts
	for key, content := range map[string]string{
		"node/s1/main.log": "one line\n", "node/s1/empty": "", "node/s1/%2Fproc%2F1+x": "x", "node/s1/manifest.json": "{}", "node/s1/big": big,
	} {
		if err := put(t, b, key, content); err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		escaped := strings.ReplaceAll((&url.URL{Path: "cluster/a b/" + key}).EscapedPath(), "+", "%2B")
		o, ok := s.objects[escaped]
		sum := sha256.Sum256([]byte(content))
		if !ok || o.body != content || o.header.Get("X-Amz-Meta-Sha256") != hex.EncodeToString(sum[:]) || o.header.Get("X-Amz-Object-Lock-Mode") != "" {
			t.Errorf("%s: %t, %d bytes, %v", escaped, ok, len(o.body), o.header)
		}
	}
	if got := s.objects["cluster/a%20b/node/s1/manifest.json"].header.Get("Content-Type"); got != "application/json" {
		t.Errorf("a manifest has the type %q", got)
	}
	if len(s.objects) != 5 {
		t.Errorf("there are %d objects", len(s.objects))
	}
	if got := b.String(); got != s.http.URL+"/evidence/cluster/a b" {
		t.Errorf("it is %q", got)
	}
}

func TestPutWithALock(t *testing.T) {
	s := newService(t)
	c := s.config()
	c.Lock, c.Retention = "COMPLIANCE", 48*time.Hour
	b := bucket(t, c)
	if err := put(t, b, "x", "x"); err == nil || !strings.Contains(err.Error(), "made with object lock") {
		t.Errorf("in a bucket without: %v", err)
	}
	s.locks = true
	if err := put(t, b, "x", "x"); err != nil {
		t.Fatal(err)
	}
	h := s.objects["cluster/a%20b/x"].header
	until, err := time.Parse(time.RFC3339, h.Get("X-Amz-Object-Lock-Retain-Until-Date"))
	if h.Get("X-Amz-Object-Lock-Mode") != "COMPLIANCE" || err != nil || time.Until(until) < 47*time.Hour || time.Until(until) > 48*time.Hour {
		t.Errorf("the lock is %s until %s, %v", h.Get("X-Amz-Object-Lock-Mode"), until, err)
	}
}

// Keys that are changed are taken up, and what is wrong is said, never a key.
func TestKeysAndErrors(t *testing.T) {
	s := newService(t)
	c := s.config()
	key, fault := "another", error(nil)
	c.Keys = func() (string, string, string, error) { return access, key, "", fault }
	b := bucket(t, c)
	says := func(want string) {
		t.Helper()
		err := put(t, b, "x", "x")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), key) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
	says("accessKey, secretKey and region")
	key = secret
	if err := put(t, b, "x", "x"); err != nil {
		t.Errorf("with the right key: %v", err)
	}
	fault = errors.New("the secret is empty")
	says("the secret is empty")
	fault = nil
	s.mu.Lock()
	s.fault = "SlowDown"
	s.mu.Unlock()
	says("SlowDown")
	s.mu.Lock()
	s.fault = ""
	s.mu.Unlock()
	c.Bucket = "nothing"
	b = bucket(t, c)
	says("NoSuchBucket")
	c = s.config()
	c.CA = ""
	b = bucket(t, c)
	says("certificate")
	s.http.Close()
	b = bucket(t, s.config())
	says("refused")
}

func TestAHangingEndpoint(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, _ *http.Request) { <-release }))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(release) })
	s := &service{t: t, http: srv}
	b := bucket(t, s.config())
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := b.Put(ctx, "x", evidence.Object{File: f, Size: 100}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(began))
	}
}

func TestWhatCanBeSeenToBeWrong(t *testing.T) {
	good := Config{Endpoint: "https://s3.example.com", Bucket: "evidence"}
	for want, change := range map[string]func(*Config){
		"no address":        func(c *Config) { c.Endpoint = "s3.example.com" },
		"more than a host":  func(c *Config) { c.Endpoint += "/evidence" },
		"no bucket":         func(c *Config) { c.Bucket = "" },
		"needs a retention": func(c *Config) { c.Lock = "GOVERNANCE" },
		"no such file":      func(c *Config) { c.CA = "/nothing.pem" },
		"no certificate":    func(c *Config) { c.CA = os.Args[0] },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	bucket(t, good)
}

// The store and the bucket together: the endpoint comes late, and gets all.
func TestTheStoreCopiesOnceTheEndpointIsThere(t *testing.T) {
	s := newService(t)
	s.fault = "ServiceUnavailable"
	store, err := evidence.Open(evidence.Config{Dir: filepath.Join(t.TempDir(), "evidence"), Bucket: bucket(t, s.config()), Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); store.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran; store.Close() })
	c, err := store.Begin(ctx, evidence.About{Step: "s1", Responder: "capture-logs", Target: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Add(ctx, "main.log", strings.NewReader("one line\n"), -1); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.fault = ""
	})
	for end := time.Now().Add(20 * time.Second); !store.Copied("s1"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is not copied")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.objects) != 2 || s.objects["cluster/a%20b/n1/s1/main.log"].body != "one line\n" {
		t.Errorf("the bucket has %v", s.objects)
	}
}
