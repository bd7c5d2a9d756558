package broker

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/nats-io/nats-server/v2/server"
)

// Listen lets NATS clients in over the network.
type Listen struct {
	Addr          string // host:port
	Cert, Key, CA string // files; with a CA, clients must show a certificate of it
	Users         []User
}

// User may connect over the network. It has a password or an nkey.
type User struct {
	Name     string
	Password string
	NKey     string // the public key
	// Serve are the subjects that it answers calls on. A user with some may do
	// that and nothing else.
	Serve []string
}

// permissions are what the user may do.
func (u *User) permissions(mirror []string) (*server.Permissions, error) {
	if len(u.Serve) == 0 {
		return clientPermissions(mirror), nil
	}
	for _, s := range u.Serve {
		if err := CheckServe(s); err != nil {
			return nil, fmt.Errorf("broker.users: serve: %w", err)
		}
		for _, m := range mirror {
			if server.SubjectsCollide(s, m) {
				return nil, fmt.Errorf("broker.users: serve: on %q come the alerts of broker.mirror (%s): nobody may answer there", s, m)
			}
		}
	}
	return servePermissions(u.Serve), nil
}

// clientPermissions is what a client is let do: hear alerts and outcomes, ask
// stoop's API, and nothing else. It can publish on none of stoop's subjects
// and does not reach the streams.
func clientPermissions(mirror []string) *server.Permissions {
	hear := append([]string{"falco.>", "stoop.outcomes.>", "stoop.tail", "_INBOX.>"}, mirror...)
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"stoop.api.>"}},
		Subscribe: &server.SubjectPermission{Allow: hear},
	}
}

// checkMirror refuses what is no subject, and the subjects that mean something
// already: an alert that is mirrored there would be taken for a step, or stored
// twice.
func checkMirror(subjects []string) error {
	for _, s := range subjects {
		if err := CheckSubject(s); err != nil {
			return fmt.Errorf("broker.mirror: %w", err)
		}
	}
	return nil
}

// apply sets the server's options. A nil Listen leaves it deaf.
func (l *Listen) apply(o *server.Options, mirror []string) error {
	if l == nil || l.Addr == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(l.Addr)
	if err != nil {
		return fmt.Errorf("broker.listen %q: %w", l.Addr, err)
	}
	o.Port, err = strconv.Atoi(port)
	if err != nil || o.Port < 0 || o.Port > 65535 {
		return fmt.Errorf("broker.listen %q: %q is no port", l.Addr, port)
	}
	if o.Port == 0 {
		o.Port = server.RANDOM_PORT
	}
	o.Host = host
	if l.Cert == "" || l.Key == "" {
		return errors.New("broker.listen needs TLS: set broker.tls.cert and broker.tls.key")
	}
	ip := net.ParseIP(host)
	if loopback := host == "localhost" || ip != nil && ip.IsLoopback(); !loopback && len(l.Users) == 0 && l.CA == "" {
		return fmt.Errorf("broker.listen %q can be reached from outside this machine and needs authentication: set broker.users, or broker.tls.ca for client certificates", l.Addr)
	}
	cert, err := tls.LoadX509KeyPair(l.Cert, l.Key)
	if err != nil {
		return fmt.Errorf("broker.tls: %w", err)
	}
	o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	if l.CA != "" {
		pem, err := os.ReadFile(l.CA)
		if err != nil {
			return fmt.Errorf("broker.tls.ca: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("broker.tls.ca: %s holds no certificate", l.CA)
		}
		o.TLSConfig.ClientCAs, o.TLSConfig.ClientAuth = pool, tls.RequireAndVerifyClientCert
		o.TLSVerify = true
	}
	o.TLS, o.TLSTimeout = true, 5
	o.DontListen = false
	o.MaxConn = 256
	for _, u := range l.Users {
		may, err := u.permissions(mirror)
		if err != nil {
			return err
		}
		switch {
		case u.NKey != "":
			o.Nkeys = append(o.Nkeys, &server.NkeyUser{Nkey: u.NKey, Permissions: may})
		case u.Name == userStoop || u.Name == userLocal || u.Name == userAPI || u.Name == userCall || u.Name == userGuest:
			return fmt.Errorf("broker.users: the name %q is stoop's own", u.Name)
		case u.Name == "" || u.Password == "":
			return fmt.Errorf("broker.users: user %q has neither a password nor an nkey", u.Name)
		default:
			o.Users = append(o.Users, &server.User{Username: u.Name, Password: u.Password, Permissions: may})
		}
	}
	if len(l.Users) == 0 {
		// Loopback, or a client certificate: who gets this far is let in as a
		// client without a name. Without a certificate that is everybody on the
		// machine, who may look and not touch.
		guest := clientPermissions(mirror)
		if l.CA == "" {
			guest.Publish.Allow = []string{"stoop.api.history", "stoop.api.watch"}
		}
		o.Users = append(o.Users, &server.User{Username: userGuest, Permissions: guest})
		o.NoAuthUser = userGuest
	}
	return nil
}

const userGuest = "guest"

// Addr is the address that clients from the network reach, or nil.
func (b *Broker) Addr() net.Addr {
	if b.cfg.Listen == nil || b.cfg.Listen.Addr == "" {
		return nil
	}
	return b.srv.Addr()
}
