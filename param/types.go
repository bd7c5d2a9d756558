package param

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time, written with its unit: "300ms", "1s", "1h30m".
// It is never negative.
type Duration time.Duration

// UnmarshalText reads what [time.ParseDuration] reads.
func (d *Duration) UnmarshalText(b []byte) error {
	s := string(b)
	v, err := time.ParseDuration(s)
	switch {
	case err == nil && v < 0:
		return fmt.Errorf("%s is negative", Cut(s))
	case err == nil:
		*d = Duration(v)
		return nil
	}
	if _, nerr := strconv.ParseFloat(s, 64); nerr == nil {
		return fmt.Errorf("%s has no unit: write %ss, %sm or %sh", Cut(s), s, s, s)
	}
	if n, ok := strings.CutSuffix(s, "d"); ok {
		if days, nerr := strconv.Atoi(n); nerr == nil && days >= 0 && days < 100_000 {
			return fmt.Errorf("%s: days are written in hours, %dh", Cut(s), days*24)
		}
	}
	return fmt.Errorf("%s is no duration, such as 300ms, 30s, 5m or 1h", Cut(s))
}

// String is the duration as it would be written: "1h", not "1h0m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Size is a number of bytes, written with its unit: "512B", "64KiB", "10MiB".
type Size int64

type unit struct {
	name  string
	bytes int64
}

func units() []unit {
	return []unit{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}
}

// UnmarshalText reads a whole or decimal number with one of the units B, KiB,
// MiB, GiB and TiB; 0 needs none.
func (s *Size) UnmarshalText(b []byte) error {
	text := string(b)
	if text == "0" {
		*s = 0
		return nil
	}
	for _, u := range units() {
		number, ok := strings.CutSuffix(text, u.name)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || !(f >= 0) || f*float64(u.bytes) > math.MaxInt64/2 {
			break
		}
		*s = Size(f * float64(u.bytes))
		return nil
	}
	if _, err := strconv.ParseInt(text, 10, 64); err == nil {
		return fmt.Errorf("%s has no unit: write %sB, %sKiB or %sMiB", Cut(text), text, text, text)
	}
	return fmt.Errorf("%s is no size, such as 512B, 64KiB, 10MiB or 1GiB", Cut(text))
}

// String is the size in the largest unit that holds it in a whole number.
func (s Size) String() string {
	if s == 0 {
		return "0"
	}
	for _, u := range units() {
		if int64(s)%u.bytes == 0 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
		}
	}
	return ""
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Portion is some of a whole: a number, "2", or a percentage of it, "25%". The zero
// value says that none was given, which is not the same as 0.
type Portion struct {
	n            int
	given, share bool
}

// portionMost bounds a number: none of the wholes that people have is as large.
const portionMost = 1_000_000

// UnmarshalText reads a whole number, with or without a percent sign.
func (p *Portion) UnmarshalText(b []byte) error {
	s := string(b)
	digits, share := strings.CutSuffix(s, "%")
	n, err := strconv.Atoi(digits)
	switch {
	case err != nil || digits[0] == '+':
		return fmt.Errorf("%s is neither a whole number, such as 1, nor a percentage, such as 25%%", Cut(s))
	case n < 0:
		return fmt.Errorf("%s is negative", Cut(s))
	case share && n > 100:
		return fmt.Errorf("%s is more than all: 100%% at most", Cut(s))
	case n > portionMost:
		return fmt.Errorf("%s is too many: %d at most", Cut(s), portionMost)
	}
	*p = Portion{n: n, given: true, share: share}
	return nil
}

// Of is how many of a whole that is, a percentage rounded down: 25% of 3 is 0.
func (p Portion) Of(whole int) int {
	if p.share {
		return int(int64(whole) * int64(p.n) / 100)
	}
	return p.n
}

// IsSet reports whether it was given at all.
func (p Portion) IsSet() bool { return p.given }

// IsAll reports whether it is the whole, however large that is: 100%.
func (p Portion) IsAll() bool { return p.share && p.n == 100 }

// String is the portion as it would be written, "" if it is not set.
func (p Portion) String() string {
	switch {
	case !p.given:
		return ""
	case p.share:
		return strconv.Itoa(p.n) + "%"
	}
	return strconv.Itoa(p.n)
}

// MarshalText is String.
func (p Portion) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// CIDR is a range of addresses: "10.0.0.0/8", "2001:db8::/32".
type CIDR struct{ netip.Prefix }

// UnmarshalText refuses bits behind the prefix: 10.1.2.3/8 could mean one
// address or sixteen million.
func (c *CIDR) UnmarshalText(b []byte) error {
	s := string(b)
	p, err := netip.ParsePrefix(s)
	switch {
	case err == nil && p.Masked() != p:
		return fmt.Errorf("%s has bits set behind its prefix: write %s, or %s/%d for the one address",
			Cut(s), p.Masked(), p.Addr(), p.Addr().BitLen())
	case err == nil:
		c.Prefix = p
		return nil
	}
	if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
		return fmt.Errorf("%s is an address: write %s/%d for it alone", Cut(s), s, a.BitLen())
	}
	return fmt.Errorf("%s is no range of addresses, such as 10.0.0.0/8 or 2001:db8::/32", Cut(s))
}

// URL is an absolute http or https address without a password in it.
type URL string

// UnmarshalText never repeats the text in its error: people put secrets into
// addresses.
func (u *URL) UnmarshalText(b []byte) error {
	p, err := url.Parse(string(b))
	switch {
	case err != nil || p.Host == "":
		return errors.New("this is no address, such as https://example.com/path")
	case p.Scheme != "http" && p.Scheme != "https":
		return errors.New("only http:// and https:// addresses are possible")
	case p.User != nil:
		return errors.New("a user or password does not belong into an address")
	}
	*u = URL(b)
	return nil
}

// Secret is where a secret is to be read, never the secret itself:
// {file: PATH} or {env: NAME}. It is read anew each time it is used, so that a
// rotated one is taken up, and nothing here can print it.
type Secret struct {
	File string `json:"file,omitempty"`
	Env  string `json:"env,omitempty"`
}

const maxSecret = 64 << 10

// IsSet reports whether the secret was given at all.
func (s Secret) IsSet() bool { return s != Secret{} }

// Resolve reads the secret, without the white space around it. An empty or
// missing one is an error, which names the place and never the content.
func (s Secret) Resolve() (string, error) {
	var value string
	switch {
	case s.File != "":
		b, err := readSecret(s.File)
		if err != nil {
			return "", fmt.Errorf("reading a secret: %w", err)
		}
		value = string(bytes.TrimSpace(b))
	case s.Env != "":
		value = strings.TrimSpace(os.Getenv(s.Env))
	default:
		return "", errors.New("the secret is not set: write {file: PATH} or {env: NAME}")
	}
	if value == "" {
		return "", fmt.Errorf("the secret %s is empty", s)
	}
	return value, nil
}

func readSecret(path string) ([]byte, error) {
	// Opening a FIFO would block.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err == nil && len(b) > maxSecret {
		err = fmt.Errorf("%s is larger than %d KiB", path, maxSecret>>10)
	}
	return b, err
}

// String is where the secret is read, as it would be written; "" if it is not
// set.
func (s Secret) String() string {
	switch {
	case s.File != "":
		return "{file: " + s.File + "}"
	case s.Env != "":
		return "{env: " + s.Env + "}"
	}
	return ""
}
