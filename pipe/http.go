package pipe

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/net/netutil"

	"stoop/alert"
	"stoop/broker"
)

const (
	// maxBody bounds a request's body, in bytes.
	maxBody = 1 << 20
	// answerWithin is how long a request waits for the store. Falco sends all
	// its outputs from one thread, which waits for the answer.
	answerWithin = time.Second
	// maxConnections and maxRequests bound what requests take in memory.
	maxConnections = 256
	maxRequests    = 32
	// bodyWithin is how long a body may take, so that silent clients do not
	// keep others out for long.
	bodyWithin = 2 * time.Second
)

// HTTPConfig says where alerts are taken by HTTP, and from whom.
type HTTPConfig struct {
	Listen    string // host:port
	TokenFile string // holds the bearer token; read again when it changes
	Cert, Key string // files, PEM; read again when they change
	ClientCA  string // a file, PEM: who signs the clients' certificates
}

// HTTP takes alerts by POST, as Falco's http_output and Falcosidekick send
// them: a JSON object, several, or an array of them, on the paths / and
// /falco.
//
// A client proves itself with a certificate of the ClientCA, with the token as
// bearer, or with it as the password of basic authentication (which Falco sends
// when its http_output.url holds it: http://falco:TOKEN@127.0.0.1:2801/).
// Without a token and a ClientCA everybody on this machine may send alerts, and
// they are marked [broker.OriginOpenHTTP].
//
// The answer is 200 when all the request's alerts are stored; 400 when one of
// them is no alert, and then none is taken; 503 when the store does not take
// them in time. They may be stored later; who sends them again does no harm.
type HTTP struct {
	listener net.Listener
	token    *watched // nil: there is none
	mutual   bool
}

// ListenHTTP checks the configuration and opens the port; Run answers on it.
func ListenHTTP(c HTTPConfig) (*HTTP, error) {
	h := &HTTP{mutual: c.ClientCA != ""}
	fail := func(err error) (*HTTP, error) {
		return nil, fmt.Errorf("taking alerts by HTTP on %s: %w", c.Listen, err)
	}
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return fail(fmt.Errorf("%w: it is to be host:port, such as 127.0.0.1:2801", err))
	}
	switch {
	case (c.Cert == "") != (c.Key == ""):
		return fail(errors.New("a certificate needs its key, and a key its certificate"))
	case c.ClientCA != "" && c.Cert == "":
		return fail(errors.New("client certificates need TLS: name a certificate and key of the server too"))
	case !loopback(host) && c.TokenFile == "" && c.ClientCA == "":
		return fail(errors.New("everybody on the network could send alerts: name a token file or a client CA, or listen on 127.0.0.1"))
	case !loopback(host) && c.Cert == "":
		return fail(errors.New("the token and the alerts could be read on the network: name a certificate and key, or listen on 127.0.0.1"))
	}
	if c.TokenFile != "" {
		h.token = &watched{path: c.TokenFile}
		if _, err := h.token.text(); err != nil {
			return fail(err)
		}
	}
	tlsConfig, err := serverTLS(c, h.token != nil)
	if err != nil {
		return fail(err)
	}
	if h.listener, err = net.Listen("tcp", c.Listen); err != nil {
		return nil, fmt.Errorf("taking alerts by HTTP: %w", err)
	}
	h.listener = netutil.LimitListener(h.listener, maxConnections)
	if tlsConfig != nil {
		h.listener = tls.NewListener(h.listener, tlsConfig)
	}
	return h, nil
}

// Addr is where the port is.
func (h *HTTP) Addr() net.Addr { return h.listener.Addr() }

// Close closes the port. Run does it too.
func (h *HTTP) Close() error { return h.listener.Close() }

// Run answers requests until ctx ends, and then finishes those that are open.
func (h *HTTP) Run(ctx context.Context, in *Intake) error {
	log := in.log.With("listen", h.Addr().String())
	serve := &httpHandler{HTTP: h, in: in, log: log, slots: make(chan struct{}, maxRequests)}
	serve.reader = newReader(broker.OriginHTTP, in)
	serve.open = newReader(broker.OriginOpenHTTP, in)
	server := &http.Server{
		Handler:           serve,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	var ending sync.WaitGroup
	defer ending.Wait()
	served, done := context.WithCancel(ctx)
	defer done()
	ending.Go(func() {
		<-served.Done()
		last, cancel := context.WithTimeout(context.Background(), answerWithin+time.Second)
		defer cancel()
		if server.Shutdown(last) != nil {
			server.Close()
		}
	})
	if err := server.Serve(h.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("taking alerts by HTTP: %w", err)
	}
	return nil
}

type httpHandler struct {
	*HTTP
	in    *Intake
	log   *slog.Logger
	slots chan struct{} // one token for every request that is read

	mu     sync.Mutex
	reader *reader // counts and says what is bad
	open   *reader // the same without authentication
}

func (h *httpHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	received := time.Now()
	if r.URL.Path != "/" && r.URL.Path != "/falco" && r.URL.Path != "/falco/" {
		refuse(w, http.StatusNotFound, "alerts are taken on / and /falco")
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		refuse(w, http.StatusMethodNotAllowed, "alerts are sent with POST")
		return
	}
	origin, err := h.authenticate(r)
	if err != nil {
		w.Header().Set("WWW-Authenticate", `Bearer realm="stoop"`)
		refuse(w, http.StatusUnauthorized, err.Error())
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	case <-ctx.Done():
		h.later(w, "too many requests at once")
		return
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyWithin)) // else the server's own deadline holds
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes: send fewer alerts at once", maxBody))
			return
		}
		refuse(w, http.StatusBadRequest, "the body can't be read: "+err.Error())
		return
	}
	alerts, err := parseBody(body)
	if err != nil {
		if !errors.Is(err, errEmpty) {
			h.bad(origin, body, received, err)
		}
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	arrivals := make([]Arrival, len(alerts))
	for i, a := range alerts {
		arrivals[i] = Arrival{Alert: a, Received: received, Origin: origin}
	}
	t := h.in.Put(arrivals)
	switch {
	case !t.wait(ctx):
		h.later(w, "the alerts are not stored yet; they are kept in memory, and it does no harm to send them again")
	case t.Lost() > 0:
		h.later(w, fmt.Sprintf("%d of %d alerts could not be stored", t.Lost(), len(alerts)))
	default:
		answer(w, http.StatusOK, map[string]any{"stored": len(alerts)})
	}
}

func (h *httpHandler) later(w http.ResponseWriter, why string) {
	w.Header().Set("Retry-After", "1")
	refuse(w, http.StatusServiceUnavailable, why)
}

func refuse(w http.ResponseWriter, status int, why string) {
	answer(w, status, map[string]any{"error": why})
}

func answer(w http.ResponseWriter, status int, body map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // who does not listen gets no answer
}

func (h *httpHandler) bad(origin broker.Origin, body []byte, now time.Time, err error) {
	h.mu.Lock()
	r := h.reader
	if origin == broker.OriginOpenHTTP {
		r = h.open
	}
	r.now = now
	r.badRun = false
	r.bad("json", body, err)
	arrivals := r.taken()
	h.mu.Unlock()
	h.in.Put(arrivals)
}

// authenticate says how far the client is to be believed.
func (h *HTTP) authenticate(r *http.Request) (broker.Origin, error) {
	if h.mutual && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return broker.OriginHTTP, nil
	}
	if h.token == nil {
		if h.mutual {
			return "", errors.New("a client certificate is needed")
		}
		return broker.OriginOpenHTTP, nil
	}
	want, err := h.token.text()
	if err != nil {
		return "", errors.New("the token can't be read here, so nobody is let in")
	}
	got, ok := "", false
	if scheme, rest, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") {
		got, ok = strings.TrimSpace(rest), true
	} else {
		_, got, ok = r.BasicAuth()
	}
	if !ok {
		return "", errors.New("a token is needed: Authorization: Bearer …")
	}
	// Hashed, so that the time to compare does not tell the token's length.
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	if subtle.ConstantTimeCompare(a[:], b[:]) != 1 {
		return "", errors.New("the token is not the right one")
	}
	return broker.OriginHTTP, nil
}

const errEmpty = constError("no alert: the body is empty")

// parseBody reads one JSON object or several, one after the other or in an
// array.
func parseBody(body []byte) ([]*alert.Alert, error) {
	var alerts []*alert.Alert
	one := func(value []byte) error {
		if len(value) == 0 || value[0] != '{' {
			return fmt.Errorf("alert %d: %w: it is no JSON object", len(alerts)+1, alert.ErrNoAlert)
		}
		a, err := alert.Parse(value)
		if err != nil {
			return fmt.Errorf("alert %d: %w", len(alerts)+1, err)
		}
		alerts = append(alerts, a)
		return nil
	}
	dec := jsontext.NewDecoder(bytes.NewBuffer(body), jsontext.AllowInvalidUTF8(true))
	for {
		if dec.StackDepth() == 0 && dec.PeekKind() == '[' || dec.PeekKind() == ']' {
			if _, err := dec.ReadToken(); err != nil {
				return nil, fmt.Errorf("alert %d: %w: %w", len(alerts)+1, alert.ErrNoAlert, err)
			}
			continue
		}
		value, err := dec.ReadValue()
		if errors.Is(err, io.EOF) && dec.StackDepth() == 0 {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("alert %d: %w: %w", len(alerts)+1, alert.ErrNoAlert, err)
		}
		if err := one(value); err != nil {
			return nil, err
		}
	}
	if len(alerts) == 0 {
		return nil, errEmpty
	}
	return alerts, nil
}

// loopback reports whether only this machine reaches host.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func serverTLS(c HTTPConfig, token bool) (*tls.Config, error) {
	if c.Cert == "" {
		return nil, nil
	}
	pair := &keyPair{cert: &watched{path: c.Cert}, key: &watched{path: c.Key}}
	if _, err := pair.get(nil); err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: pair.get,
	}
	if c.ClientCA != "" {
		pem, err := os.ReadFile(c.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("the client CA: %w", err)
		}
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the client CA: %s holds no certificate in PEM", c.ClientCA)
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
		if token {
			config.ClientAuth = tls.VerifyClientCertIfGiven
		}
	}
	return config, nil
}

// keyPair is a certificate and its key, in files that may be replaced.
type keyPair struct {
	cert, key *watched

	mu   sync.Mutex
	last *tls.Certificate
	of   [2]string
}

func (p *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	cert, err := p.cert.text()
	if err != nil {
		return p.last, orNil(err, p.last)
	}
	key, err := p.key.text()
	if err != nil {
		return p.last, orNil(err, p.last)
	}
	if p.last != nil && p.of == [2]string{cert, key} {
		return p.last, nil
	}
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		// Perhaps one of the two files is replaced already and one is not.
		return p.last, orNil(fmt.Errorf("the certificate %s with the key %s: %w", p.cert.path, p.key.path, err), p.last)
	}
	p.last, p.of = &pair, [2]string{cert, key}
	return p.last, nil
}

// orNil drops the error when the last good certificate can be used.
func orNil(err error, last *tls.Certificate) error {
	if last != nil {
		return nil
	}
	return err
}

// watched is a small file whose text is read again when it has changed.
type watched struct {
	path string

	mu   sync.Mutex
	info os.FileInfo
	last string
}

func (w *watched) text() (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	info, err := os.Stat(w.path)
	if err != nil {
		return "", err
	}
	if w.info != nil && os.SameFile(w.info, info) && w.info.ModTime().Equal(info.ModTime()) && w.info.Size() == info.Size() {
		return w.last, nil
	}
	raw, err := os.ReadFile(w.path)
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(raw))
	if text == "" {
		return "", fmt.Errorf("%s is empty", w.path)
	}
	w.info, w.last = info, text
	return text, nil
}
