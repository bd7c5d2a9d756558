package broker

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"
)

// HeaderSession is the header by which a request says on which local
// connection it was made, and so by whom.
const HeaderSession = "Stoop-Session"

// SocketName is the name of the local socket in the data folder.
const SocketName = "stoop.sock"

// hello is the one line that the server writes on the socket before the NATS
// protocol begins.
type hello struct {
	User     string `json:"user"`
	Password string `json:"password"`
	Session  string `json:"session"`
}

// Local lets clients on this machine in, through a Unix socket in the data
// folder. Its permissions say who gets in, and the kernel says who it was.
type Local struct {
	ln       *net.UnixListener
	mu       sync.Mutex
	broker   *Broker           // what new connections reach; may change
	sessions map[string]string // session → actor
	conns    map[net.Conn]struct{}
}

// maxLocal bounds the connections on the local socket.
const maxLocal = 64

// ListenLocal opens the socket. One that a killed process left behind is
// replaced: whoever holds the data folder's lock ([Lock]) knows that nobody serves
// it.
func ListenLocal(dir string) (*Local, error) {
	path := filepath.Join(dir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("local socket: %w", err)
	}
	return &Local{ln: ln, sessions: map[string]string{}, conns: map[net.Conn]struct{}{}}, nil
}

// Use makes connections reach b. Those that reached another one are ended; the
// clients connect anew.
func (l *Local) Use(b *Broker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broker = b
	for c := range l.conns {
		c.Close()
	}
}

// Actor is who made a request on the local socket, or "" when it came another
// way.
func (l *Local) Actor(m *nats.Msg) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sessions[m.Header.Get(HeaderSession)]
}

// Serve takes connections until ctx is done.
func (l *Local) Serve(ctx context.Context) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	stop := context.AfterFunc(ctx, func() { l.ln.Close(); l.Use(nil) })
	defer stop()
	for {
		c, err := l.ln.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("local socket: %w", err)
		}
		serving.Go(func() { l.serve(c) })
	}
}

func (l *Local) serve(c *net.UnixConn) {
	defer c.Close()
	actor, err := peer(c)
	if err != nil {
		return
	}
	session := rand.Text()
	l.mu.Lock()
	b := l.broker
	if b == nil || len(l.conns) >= maxLocal {
		l.mu.Unlock()
		return
	}
	l.sessions[session] = actor
	l.conns[c] = struct{}{}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.sessions, session)
		delete(l.conns, c)
		l.mu.Unlock()
	}()
	srv, err := b.srv.InProcessConn()
	if err != nil {
		return
	}
	defer srv.Close()
	line, err := json.Marshal(hello{userLocal, b.guest, session})
	if err != nil {
		return
	}
	if _, err := c.Write(append(line, '\n')); err != nil {
		return
	}
	var back sync.WaitGroup
	back.Go(func() { _, _ = io.Copy(c, srv); c.Close() })
	_, _ = io.Copy(srv, c)
	srv.Close()
	back.Wait()
}

// peer is who is at the other end, by the kernel's word.
func peer(c *net.UnixConn) (string, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return "", err
	}
	if cerr != nil {
		return "", cerr
	}
	uid := strconv.FormatUint(uint64(cred.Uid), 10)
	if u, err := user.LookupId(uid); err == nil {
		return u.Username, nil
	}
	return "uid " + uid, nil
}

// ErrNotRunning says that no stoop answers on the local socket.
var ErrNotRunning = errors.New("no stoop is running on this data folder")

// Client is a connection to a running stoop on this machine.
type Client struct {
	*nats.Conn
	Session string
}

// Dial connects to the stoop that runs on the data folder dir.
func Dial(dir string) (*Client, error) {
	path := filepath.Join(dir, SocketName)
	c, err := net.DialTimeout("unix", path, 5*time.Second)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w (%s)", ErrNotRunning, dir)
	case err != nil:
		return nil, fmt.Errorf("connect to the running stoop: %w", err)
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	r := bufio.NewReader(c)
	line, err := r.ReadSlice('\n')
	if err != nil {
		c.Close()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("the running stoop at %s takes no connection now, since it is starting or being stopped, or has %d of them: try again", path, maxLocal)
		}
		return nil, fmt.Errorf("connect to the running stoop at %s: it does not answer: %w", path, err)
	}
	var h hello
	if err := json.Unmarshal(line, &h); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to the running stoop at %s: %w", path, err)
	}
	_ = c.SetReadDeadline(time.Time{})
	nc, err := nats.Connect("nats://stoop", nats.SetCustomDialer(onceDialer{&bufferedConn{c, r}}),
		// The host's name is nobody's: without this it would be asked of DNS.
		nats.SkipHostLookup(),
		nats.UserInfo(h.User, h.Password), nats.NoReconnect(), nats.Timeout(5*time.Second))
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to the running stoop at %s: %w", path, err)
	}
	return &Client{nc, h.Session}, nil
}

// Question requests subject of the API and returns the answer as it came.
func (c *Client) Question(ctx context.Context, subject string, in any) (*nats.Msg, error) {
	data, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	m := &nats.Msg{Subject: subject, Data: data, Header: nats.Header{HeaderSession: {c.Session}}}
	answer, err := c.RequestMsgWithContext(ctx, m)
	if err != nil {
		return nil, fmt.Errorf("ask the running stoop (%s): %w", subject, err)
	}
	if e := answer.Header.Get(HeaderError); e != "" {
		return nil, errors.New(e)
	}
	return answer, nil
}

// Ask requests subject of the API and decodes the answer into out.
func (c *Client) Ask(ctx context.Context, subject string, in, out any) error {
	answer, err := c.Question(ctx, subject, in)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(answer.Data, out); err != nil {
		return fmt.Errorf("answer of the running stoop (%s): %w", subject, err)
	}
	return nil
}

// HeaderError is the header of an answer that says what went wrong.
const HeaderError = "Stoop-Error"

type onceDialer struct{ c net.Conn }

func (d onceDialer) Dial(string, string) (net.Conn, error) { return d.c, nil }

type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }
