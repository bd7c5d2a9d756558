// Command block_user shows how a function of your own, in Go, answers stoop's
// responder call: it keeps a list of users to be locked out, and puts the user of
// the alert on it. It stands beside an alert's way and uses nothing of stoop's code,
// so it can be copied as it is. docs/functions.md has what is asked and answered.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("block_user: ")
	var c config
	flag.StringVar(&c.URL, "url", "tls://127.0.0.1:4222", "stoop's broker.listen")
	flag.StringVar(&c.CA, "ca", "", "the authority that signed its certificate, a PEM `file` (default: the system's)")
	flag.StringVar(&c.User, "user", "", "a name of broker.users")
	flag.StringVar(&c.Subject, "subject", "functions.block-user", "one of the user's serve")
	flag.StringVar(&c.List, "list", "blocked-users", "the `file` with the list")
	passwordFile := flag.String("password-file", "", "a `file` that holds the password")
	flag.Parse()
	if *passwordFile != "" {
		b, err := os.ReadFile(*passwordFile)
		if err != nil {
			log.Fatal(err)
		}
		c.Password = strings.TrimSpace(string(b))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, c, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

type config struct{ URL, CA, User, Password, Subject, List string }

// question is what is wanted here of what stoop asks.
type question struct {
	Alert struct {
		Fields struct {
			User any `json:"user.name"` // a string, if it is one
		} `json:"output_fields"`
	} `json:"alert"`
}

// answer is what stoop understands.
type answer struct {
	Status string            `json:"status"` // done, nothing, refused or failed
	Reason string            `json:"reason,omitempty"`
	Found  map[string]string `json:"found,omitempty"`
}

// serve answers until ctx is done or stoop refuses.
func serve(ctx context.Context, c config, out io.Writer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	opts := []nats.Option{
		nats.Name("block_user"), nats.UserInfo(c.User, c.Password),
		nats.MaxReconnects(-1), nats.ReconnectWait(time.Second), // stoop may restart
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				cancel(err)
				return
			}
			log.Print(err)
		}),
		nats.ClosedHandler(func(nc *nats.Conn) { cancel(nc.LastError()) }), // refused for good
	}
	if c.CA != "" {
		opts = append(opts, nats.RootCAs(c.CA))
	}
	nc, err := nats.Connect(c.URL, opts...)
	if err != nil {
		return fmt.Errorf("connect to stoop at %s: %w", c.URL, err)
	}
	defer nc.Close()
	// In a queue group one of several such programs is asked, not all of them. The
	// questions come one after the other.
	_, err = nc.QueueSubscribe(c.Subject, "block-user", func(m *nats.Msg) {
		a, err := json.Marshal(block(m.Data, c.List))
		if err != nil {
			log.Print(err)
			return
		}
		if err := m.Respond(a); err != nil {
			log.Print(err)
		}
	})
	if err != nil {
		return fmt.Errorf("subscribe to %s: %w", c.Subject, err)
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	fmt.Fprintln(out, "listening")
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// userName is what a name may be. Attackers choose it: without this a line break in
// it would put others on the list.
var userName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)

// block puts the user of the alert on the list, once.
func block(body []byte, list string) answer {
	var q question
	if err := json.Unmarshal(body, &q); err != nil {
		return answer{Status: "failed", Reason: err.Error()}
	}
	user, _ := q.Alert.Fields.User.(string)
	if !userName.MatchString(user) {
		return answer{Status: "refused", Reason: "the alert names no user that could be locked out"}
	}
	found := map[string]string{"user": user}
	b, err := os.ReadFile(list)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return answer{Status: "failed", Reason: err.Error()}
	}
	if slices.Contains(strings.Split(string(b), "\n"), user) {
		return answer{Status: "nothing", Reason: user + " is on the list", Found: found}
	}
	f, err := os.OpenFile(list, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return answer{Status: "failed", Reason: err.Error()}
	}
	_, err = f.WriteString(user + "\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return answer{Status: "failed", Reason: err.Error()}
	}
	return answer{Status: "done", Reason: user + " is on the list now", Found: found}
}
