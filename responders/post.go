package responders

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"stoop/param"
)

// poster sends notifications by HTTP. What it returns says whether another
// try can help, and never holds the address, which may be a secret (Slack's
// are): only its host.
type poster struct {
	client *http.Client
}

func newPoster(client *http.Client) *poster {
	if client == nil {
		client = http.DefaultClient
	}
	// A redirect would carry the secrets of one place to another.
	c := *client
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &poster{client: &c}
}

// maxRetryAfter bounds how long another side can make stoop wait.
const maxRetryAfter = 10 * time.Minute

// post sends body as JSON. The context bounds it.
func (p *poster) post(ctx context.Context, address string, header http.Header, body []byte) error {
	_, err := p.ask(ctx, address, header, body, 0)
	return err
}

// ask posts body as JSON and returns the answer, which is an error if it has
// more than most bytes; with 0 it is not looked at.
func (p *poster) ask(ctx context.Context, address string, header http.Header, body []byte, most int64) ([]byte, error) {
	host, err := hostOf(address)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("the address is none that a request can be sent to")
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "stoop")
	resp, err := p.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the address
		}
		return nil, Retry(fmt.Errorf("post to %s: %w", host, err), 0)
	}
	defer resp.Body.Close()
	code := resp.StatusCode
	if code/100 == 2 && most > 0 {
		answer, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
		switch {
		case err != nil:
			return nil, Retry(fmt.Errorf("post to %s: reading the answer: %w", host, err), 0)
		case int64(len(answer)) > most:
			return nil, fmt.Errorf("post to %s: the answer has more than %s", host, param.Size(most))
		}
		return answer, nil
	}
	excerpt, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	// The rest, up to a bound, so that the connection can be used again.
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	if code/100 == 2 {
		return nil, nil
	}
	err = fmt.Errorf("post to %s: %d %s", host, code, http.StatusText(code))
	if said := oneLine(string(excerpt), 200); said != "" {
		err = fmt.Errorf("%w: %s", err, strconv.Quote(said))
	}
	switch {
	case code/100 == 3:
		return nil, fmt.Errorf("%w; redirects are not followed: write the address that is meant", err)
	case code == http.StatusTooManyRequests, code == http.StatusServiceUnavailable:
		return nil, Retry(err, retryAfter(resp.Header.Get("Retry-After"), time.Now()))
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooEarly:
		return nil, Retry(err, 0)
	}
	return nil, err
}

// retryAfter reads seconds or a date; 0 is neither.
func retryAfter(s string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.Atoi(s); err == nil {
		d = time.Duration(min(n, int(maxRetryAfter/time.Second))) * time.Second
	} else if t, err := http.ParseTime(s); err == nil {
		d = t.Sub(now)
	}
	return max(0, min(d, maxRetryAfter))
}

func hostOf(address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return "", errors.New("the address is no http or https address") // without it: it may be a secret
	}
	return u.Host, nil
}

// lane is a name for a destination: its host, for people, and a hash of all
// that tells it from others.
func lane(address string, more ...string) string {
	h := sha256.New()
	for _, s := range append([]string{address}, more...) {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	host, err := hostOf(address)
	if err != nil {
		host = "unknown"
	}
	host = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(host))
	if len(host) > 40 {
		host = host[:40]
	}
	return host + "-" + hex.EncodeToString(h.Sum(nil)[:4])
}

// oneLine makes text that anybody may have written fit for a message: what
// breaks lines or turns the direction of writing becomes a space, and it is
// cut to at most n characters.
func oneLine(s string, n int) string {
	s = strings.ToValidUTF8(s, "�")
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028' || r == '\u2029'
	}), " ")
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
