// Command subscriber shows how a program of your own hears what stoop hears: it
// connects to stoop's NATS server and prints a line for every alert and every
// outcome. It stands beside an alert's way and uses nothing of stoop's code, so
// it can be copied as it is. docs/subjects.md has the subjects and messages.
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("subscriber: ")
	var c config
	flag.StringVar(&c.URL, "url", "tls://127.0.0.1:4222", "stoop's broker.listen")
	flag.StringVar(&c.CA, "ca", "", "the authority that signed its certificate, a PEM `file` (default: the system's)")
	flag.StringVar(&c.User, "user", "", "a name of broker.users")
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
	if err := follow(ctx, c, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

type config struct{ URL, CA, User, Password string }

// alert is what is wanted here of what Falco wrote. Whoever runs a process on a
// watched machine chooses much of it: trust none of it, and quote what is shown.
type alert struct {
	Rule     string `json:"rule"`
	Priority string `json:"priority"`
	Hostname string `json:"hostname"`
}

// outcome is what is wanted here of what became of a step. One step may have
// several: while it is retried, and when it is taken back.
type outcome struct {
	ID        string `json:"id"`
	Responder string `json:"responder"`
	Status    string `json:"status"`
	Reason    string `json:"reason"`
	Target    struct {
		Namespace string `json:"namespace"`
		Pod       string `json:"pod"`
	} `json:"target"`
}

// queue bounds what waits here. When it is full NATS drops messages for this
// subscriber, and only for it.
const queue = 8192

// follow prints alerts and outcomes until ctx is done or stoop refuses.
func follow(ctx context.Context, c config, out io.Writer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	opts := []nats.Option{
		nats.Name("subscriber"), nats.UserInfo(c.User, c.Password),
		nats.MaxReconnects(-1), nats.ReconnectWait(time.Second), // stoop may restart
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { log.Printf("the connection is lost: %v", err) }),
		nats.ReconnectHandler(func(*nats.Conn) { log.Print("connected again; what came meanwhile was missed") }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				cancel(err)
				return
			}
			log.Print(err) // nats.ErrSlowConsumer: something was dropped
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
	msgs := make(chan *nats.Msg, queue)
	for _, subject := range []string{"falco.>", "stoop.outcomes.>"} {
		if _, err := nc.ChanSubscribe(subject, msgs); err != nil {
			return fmt.Errorf("subscribe to %s: %w", subject, err)
		}
	}
	// From here on nothing is missed.
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	fmt.Fprintln(out, "listening")
	for {
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		case m := <-msgs:
			fmt.Fprintln(out, line(m))
		}
	}
}

// line is a message in words.
func line(m *nats.Msg) string {
	if m.Subject == "falco.unparsed" {
		return fmt.Sprintf("no alert: %.200q", m.Data)
	}
	if strings.HasPrefix(m.Subject, "falco.") {
		var a alert
		if err := json.Unmarshal(m.Data, &a); err != nil {
			return fmt.Sprintf("%s: %v", m.Subject, err)
		}
		received := "?"
		if ns, err := strconv.ParseInt(m.Header.Get("Stoop-Received"), 10, 64); err == nil {
			received = time.Unix(0, ns).UTC().Format(time.RFC3339)
		}
		return fmt.Sprintf("alert %s %s %s %q on %q", m.Header.Get("Stoop-Id"), received, a.Priority, a.Rule, a.Hostname)
	}
	var o outcome
	if err := json.Unmarshal(m.Data, &o); err != nil {
		return fmt.Sprintf("%s: %v", m.Subject, err)
	}
	return fmt.Sprintf("outcome %s %s: %s %s/%s %q", o.ID, o.Responder, o.Status, o.Target.Namespace, o.Target.Pod, o.Reason)
}
