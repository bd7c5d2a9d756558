package broker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// ErrNobody says that no program answers on a subject now.
var ErrNobody = errors.New("nobody answers there")

// Call asks the program that answers on subject, which is one of the user's own,
// and returns its answer. Without one it fails at once with [ErrNobody]; one that
// does not answer is given up when ctx is done.
//
// The subject is the rule's and the program is a stranger: the connection that
// asks can reach none of stoop's subjects, and the program is let answer where it
// was asked, once.
func (b *Broker) Call(ctx context.Context, subject string, data []byte) ([]byte, error) {
	if err := CheckSubject(subject); err != nil {
		return nil, err
	}
	if slices.Contains(b.cfg.Mirror, subject) {
		return nil, fmt.Errorf("%q is one of broker.mirror: what is published there is taken for an alert", subject)
	}
	nc, err := b.caller()
	if err != nil {
		return nil, err
	}
	answer, err := nc.RequestWithContext(ctx, subject, data)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return nil, ErrNobody
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("no answer in time: %w", err)
	case err != nil:
		return nil, err
	}
	// What the services of NATS's own libraries answer when they fail.
	if e := answer.Header.Get("Nats-Service-Error"); e != "" {
		return nil, &ServiceError{Code: answer.Header.Get("Nats-Service-Error-Code"), Message: e}
	}
	return answer.Data, nil
}

// ServiceError is the answer of a NATS service that failed. A stranger wrote it.
type ServiceError struct{ Code, Message string }

func (e *ServiceError) Error() string {
	return fmt.Sprintf("it answered with the error %q (%q)", e.Message, e.Code)
}

// caller is the connection that [Broker.Call] asks on, opened when it is first
// needed: most have no use for it.
func (b *Broker) caller() (*nats.Conn, error) {
	b.calls.mu.Lock()
	defer b.calls.mu.Unlock()
	if b.calls.conn == nil {
		nc, err := b.connectAs("calls", userCall, b.calls.inbox)
		if err != nil {
			return nil, err
		}
		b.calls.conn = nc
	}
	return b.calls.conn, nil
}

// newCallInbox is below which the answers to calls come: nobody else can hear, or
// guess, what is there.
func newCallInbox() string { return "_CALL." + rand.Text() }

// callPermissions are those of the connection that calls are made on.
func callPermissions(inbox string, mirror []string) *server.Permissions {
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Deny: append(ours(), mirror...)},
		Subscribe: &server.SubjectPermission{Allow: []string{inbox + ".>"}},
	}
}

// answerFor is how long after it was asked a program may answer.
const answerFor = 2 * time.Minute

// servePermissions is what a program is let do that answers calls: hear them, and
// answer each once. No more: it is let hear nothing else, because wherever it may
// answer is said by what it hears, and alerts, for one, carry the address at which
// the store acknowledges them.
func servePermissions(subjects []string) *server.Permissions {
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Deny: []string{">"}},
		Subscribe: &server.SubjectPermission{Allow: slices.Clone(subjects)},
		Response:  &server.ResponsePermission{MaxMsgs: 1, Expires: answerFor},
	}
}

// ours are the subjects that mean something to stoop or to NATS.
func ours() []string {
	return []string{
		"falco", "falco.>", "stoop", "stoop.>",
		"$JS.>", "$KV.>", "$O.>", "$SYS.>", "$SRV.>", "$NRG.>", "$G.>", "$MQTT.>", "$GNR.>",
		"_INBOX.>", "_STOOP.>", "_CALL.>", "_R_.>", "_GR_.>",
	}
}

// CheckSubject refuses what is no subject of the user's own that one message can
// be published on: it has no wildcard, and means nothing to stoop or NATS.
func CheckSubject(subject string) error {
	if server.IsValidSubject(subject) && !server.IsValidPublishSubject(subject) {
		return fmt.Errorf("%q holds a wildcard: name the one subject that is meant", subject)
	}
	return checkOwn(subject)
}

// CheckServe refuses what a program can't be let answer on. It may have wildcards,
// but not in its first part.
func CheckServe(subject string) error {
	if first, _, _ := strings.Cut(subject, "."); first == ">" || first == "*" {
		return fmt.Errorf("%q takes in subjects of stoop's own: begin it with a name, such as functions.>", subject)
	}
	return checkOwn(subject)
}

// Serves reports whether who may answer on served, which may have wildcards, is
// asked by a call of subject.
func Serves(served, subject string) bool { return server.SubjectsCollide(served, subject) }

const maxSubject = 255

// checkOwn refuses what is no subject, or one that is taken.
func checkOwn(subject string) error {
	first, _, _ := strings.Cut(subject, ".")
	switch {
	case !server.IsValidSubject(subject), len(subject) > maxSubject, strings.ContainsFunc(subject, unicode.IsControl):
		return fmt.Errorf("%q is no subject: it is made of parts without white space, with dots between, such as functions.block-user", subject)
	case first == "falco", first == "stoop", strings.HasPrefix(first, "$"), strings.HasPrefix(first, "_"):
		return fmt.Errorf("subjects under %s are taken; name another than %q, such as functions.block-user", first, subject)
	}
	return nil
}
