package cli

import (
	"encoding"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"stoop/broker"
	"stoop/evidence"
	"stoop/evidence/s3"
	"stoop/param"
	"stoop/responders"
	"stoop/rules"
)

// Config is stoop.yaml. Its tags are what the file is checked by and what
// docs/configuration.md is written from.
type Config struct {
	Node       string     `param:"node" doc:"This node's name. Default: the environment's NODE_NAME, then the host's name."`
	Aliases    []string   `param:"aliases" doc:"Further hostnames that mean this node, as Falco writes them."`
	Cluster    string     `param:"cluster" doc:"A name that every outcome carries."`
	Data       string     `param:"data" doc:"The folder for streams, offsets, evidence and the local socket."`
	Mode       string     `param:"mode" oneof:"audit enforce" doc:"The program's mode: a ceiling for every rule. In audit, everything happens but the acts."`
	Source     Source     `param:"source" doc:"Where alerts come from: one or more. Default: the pipe."`
	Broker     Broker     `param:"broker" doc:"The embedded NATS server."`
	Kubernetes Kubernetes `param:"kubernetes" doc:"The API server."`
	Guard      Guard      `param:"guard" doc:"What stands between a rule and an act."`
	Evidence   Evidence   `param:"evidence" doc:"What is kept of suspects, in the data folder."`
	Host       Host       `param:"host" doc:"Where the kernel of this node is seen, for what is done on the node itself."`
	HTTP       HTTP       `param:"http" doc:"Metrics and health over HTTP."`
	Log        Log        `param:"log" doc:"What stoop says of itself, on stderr."`
}

// Source is where alerts come from.
type Source struct {
	Pipe  string     `param:"pipe" doc:"A FIFO that Falco's file_output writes to; created if missing. Default, if no other source is named: /run/stoop/falco.pipe."`
	File  string     `param:"file" doc:"A file that Falco appends to; followed from where the last run stopped."`
	Stdin bool       `param:"stdin" doc:"Standard input; stoop ends with it."`
	HTTP  HTTPSource `param:"http" doc:"Falco's http_output, or Falcosidekick's webhook."`
}

// HTTPSource is an HTTP endpoint for alerts.
type HTTPSource struct {
	Listen    string `param:"listen" doc:"host:port; off when empty. Anything but loopback needs a token or client certificates."`
	TokenFile string `param:"token-file" doc:"A file with the bearer token that is asked for. Without it or a client CA, alerts start nothing harmful."`
	Cert      string `param:"cert" doc:"The server's certificate, a PEM file."`
	Key       string `param:"key" doc:"Its key, a PEM file."`
	ClientCA  string `param:"client-ca" doc:"Clients must show a certificate of this authority, a PEM file."`
}

// Broker is the embedded NATS server.
type Broker struct {
	Listen string       `param:"listen" doc:"host:port for other NATS clients; off when empty. Needs TLS, and anything but loopback needs users or a client CA."`
	TLS    TLS          `param:"tls" doc:"Certificates for listen."`
	Users  []BrokerUser `param:"users" doc:"Who may connect: they hear alerts and outcomes and may call stoop.api.>, no more; those with serve answer calls instead."`
	Mirror []string     `param:"mirror" doc:"Further subjects that every alert is published on."`
	Sync   Sync         `param:"sync" doc:"How often the store is synced to disk: a duration, or always. A killed process loses nothing either way; a lost machine loses as much."`
	Limits BrokerLimits `param:"limits" doc:"What is kept, and for how long."`
}

// TLS are PEM files.
type TLS struct {
	Cert string `param:"cert" doc:"The server's certificate, a PEM file."`
	Key  string `param:"key" doc:"Its key, a PEM file."`
	CA   string `param:"ca" doc:"Clients must show a certificate of this authority, a PEM file."`
}

// BrokerUser may connect over the network.
type BrokerUser struct {
	Name     string       `param:"name" doc:"The user's name."`
	Password param.Secret `param:"password" doc:"Where the password is read: {file: PATH} or {env: NAME}."`
	NKey     string       `param:"nkey" doc:"The public nkey, in place of name and password."`
	Serve    []Subject    `param:"serve" doc:"The subjects on which it answers the responder call, such as functions.>. It may do that and nothing else."`
}

// Subject is a NATS subject that programs of the user's may answer on.
type Subject string

// UnmarshalText refuses what takes in a subject of stoop's.
func (s *Subject) UnmarshalText(b []byte) error {
	if err := broker.CheckServe(string(b)); err != nil {
		return err
	}
	*s = Subject(b)
	return nil
}

// BrokerLimits is what the streams keep.
type BrokerLimits struct {
	Alerts   Keep `param:"alerts" doc:"Alerts; a quarter of the size is for Critical and above alone."`
	Outcomes Keep `param:"outcomes" doc:"Outcomes."`
	Matched  Keep `param:"matched" doc:"Alerts that matched a rule, for stoop test --from-history; a quarter of the size is for Critical and above alone."`
}

// Keep is for how long, and how much, a stream keeps.
type Keep struct {
	Age  param.Duration `param:"age" doc:"The oldest that is kept." min:"1m"`
	Size param.Size     `param:"size" doc:"The most that is kept." min:"1MiB"`
}

// Sync is a duration, or "always" (negative).
type Sync time.Duration

// UnmarshalText reads "always" or a duration.
func (s *Sync) UnmarshalText(b []byte) error {
	if string(b) == "always" {
		*s = -1
		return nil
	}
	var d param.Duration
	if err := d.UnmarshalText(b); err != nil || d == 0 {
		return errors.New("is neither a duration, such as 1s, nor always")
	}
	*s = Sync(d)
	return nil
}

// String is the value as it would be written.
func (s Sync) String() string {
	if s < 0 {
		return "always"
	}
	return param.Duration(s).String()
}

// Kubernetes is how the API server is reached.
type Kubernetes struct {
	Kubeconfig  string `param:"kubeconfig" doc:"A kubeconfig file. Default: in a pod, its service account; elsewhere no cluster."`
	AuditEvents string `param:"auditEvents" oneof:"off elected" doc:"Whether this stoop answers Kubernetes audit events (source k8s_audit), which are of no node. off: they start nothing harmful here. elected: it answers them and nothing else, one stoop at a time of all that say so, elected by a Lease; the others stand by and are not ready."`
	QPS         int    `param:"qps" min:"1" max:"10000" doc:"Requests a second, at most."`
	Burst       int    `param:"burst" min:"1" max:"10000" doc:"Requests at once, at most."`
}

// elected is the value of kubernetes.auditEvents of a stoop that answers them.
const elected = "elected"

// Guard is what stands between a rule and an act.
type Guard struct {
	Protect     Protect        `param:"protect" doc:"What is never touched."`
	Cooldown    param.Duration `param:"cooldown" doc:"After an act, the same rule leaves the same object alone for so long."`
	MaxAge      param.Duration `param:"maxAge" min:"1s" doc:"An older alert is not acted on."`
	Approval    param.Duration `param:"approval" min:"1m" doc:"So long a step waits for somebody to approve it."`
	Settle      param.Duration `param:"settle" doc:"So long a rule that is new, or was changed, acts as in audit mode. 0s: it enforces at once."`
	Limits      APILimits      `param:"limits" doc:"Harmful steps through the API server at most, as N/window; 0 is no limit."`
	LocalLimits Limits         `param:"localLimits" doc:"The same for harmful steps that this node does by itself: freeze, cut, kill. A busy breaker of the one holds up none of the other."`
}

// Protect is what is never touched.
type Protect struct {
	Namespaces      []string `param:"namespaces" doc:"Namespaces, as globs. stoop's own is always protected."`
	PriorityClasses []string `param:"priorityClasses" doc:"Pods of these priority classes, as globs."`
}

// Limits bound the blast radius.
type Limits struct {
	Rule      Rate `param:"rule" doc:"By one rule on this node."`
	Namespace Rate `param:"namespace" doc:"In one namespace on this node. Alerts below Critical get three quarters of it."`
	Node      Rate `param:"node" doc:"On this node. A namespace gets at most half of it, and alerts below Critical three quarters."`
}

// APILimits are Limits with one for the whole cluster.
type APILimits struct {
	Rule      Rate `param:"rule" doc:"By one rule on this node."`
	Namespace Rate `param:"namespace" doc:"In one namespace on this node. Alerts below Critical get three quarters of it."`
	Node      Rate `param:"node" doc:"On this node. A namespace gets at most half of it, and alerts below Critical three quarters."`
	Cluster   Rate `param:"cluster" doc:"By all nodes of the cluster together, at most 2000. A node gets at most a quarter of it, but one step at least, a namespace at most half of it and of the node's quarter, and alerts below Critical three quarters of each."`
}

func (l APILimits) rates() responders.Limits { return Limits{l.Rule, l.Namespace, l.Node}.rates() }

func (l Limits) rates() responders.Limits {
	return responders.Limits{Rule: responders.Rate(l.Rule), Namespace: responders.Rate(l.Namespace), Node: responders.Rate(l.Node)}
}

// Rate is written as N/window.
type Rate responders.Rate

// UnmarshalText reads "5/1m", or "0" for no limit.
func (r *Rate) UnmarshalText(b []byte) error {
	bad := fmt.Errorf("is not of the form 5/1m (steps in a window), nor 0 for no limit")
	if string(b) == "0" {
		*r = Rate{}
		return nil
	}
	n, per, ok := strings.Cut(string(b), "/")
	if !ok {
		return bad
	}
	var d param.Duration
	if err := d.UnmarshalText([]byte(per)); err != nil || d <= 0 {
		return bad
	}
	count, err := strconv.Atoi(n)
	if err != nil || count < 1 {
		return bad
	}
	*r = Rate{N: count, Per: time.Duration(d)}
	return nil
}

// String is the rate as it would be written.
func (r Rate) String() string {
	if r.N == 0 {
		return "0"
	}
	return fmt.Sprintf("%d/%s", r.N, param.Duration(r.Per))
}

var (
	_ encoding.TextUnmarshaler = (*Rate)(nil)
	_ encoding.TextUnmarshaler = (*Sync)(nil)
)

// Evidence is how much is kept of suspects.
type Evidence struct {
	Size      param.Size     `param:"size" doc:"The most that is kept in all. What does not fit is left out, and said." min:"1MiB"`
	PerTarget int            `param:"perTarget" doc:"How many cases of one container or process are kept: the first ones." min:"1" max:"1000"`
	Age       param.Duration `param:"age" doc:"How old a case gets before it is taken away from the disk; with s3 only when the bucket has it. 0: as old as it likes."`
	S3        S3             `param:"s3" doc:"A bucket to which every finished case is copied."`
}

// S3 is the bucket of an S3 service.
type S3 struct {
	Endpoint     param.URL      `param:"endpoint" doc:"https://host or https://host:port; off when empty. With http:// the evidence can be read on its way."`
	Bucket       string         `param:"bucket" doc:"The bucket's name. stoop makes none."`
	Prefix       string         `param:"prefix" doc:"Begins every key: prefix/node/step/file."`
	Region       string         `param:"region" doc:"The bucket's region."`
	AccessKey    param.Secret   `param:"accessKey" doc:"Where the access key is read: {file: PATH} or {env: NAME}. It is read anew for every file, and needs s3:PutObject alone."`
	SecretKey    param.Secret   `param:"secretKey" doc:"Where its secret is read, likewise."`
	SessionToken param.Secret   `param:"sessionToken" doc:"Where the session token is read, likewise, if the key has one."`
	CA           string         `param:"ca" doc:"The authorities that the endpoint's certificate may be of, a PEM file. Default: the system's."`
	Lock         string         `param:"lock" oneof:"none governance compliance" doc:"The object lock that every object gets, for as long as retention. The bucket must have been made with object lock. none: how long it keeps what is the bucket's own affair."`
	Retention    param.Duration `param:"retention" min:"1h" doc:"How long the lock holds."`
}

// Host is where the kernel of this node is seen. Its processes are in /proc, or
// stoop can't name them to the kernel either.
type Host struct {
	Cgroup string `param:"cgroup" doc:"Where the node's cgroup hierarchies are mounted."`
}

// HTTP is where metrics and health are served.
type HTTP struct {
	Listen string `param:"listen" doc:"host:port for /metrics, /healthz and /readyz; off when empty. They hold no names of pods and no alert."`
}

// Log is how stoop logs.
type Log struct {
	Level  string `param:"level" oneof:"debug info warn error" doc:"The least that is said."`
	Format string `param:"format" oneof:"auto text json" doc:"auto: text on a terminal, JSON otherwise."`
}

// Validate says what of a configuration can't be.
func (c Config) Validate() error {
	if c.Guard.Limits.Cluster.N == 0 {
		return nil
	}
	if err := responders.CheckFleetLimit(responders.Rate(c.Guard.Limits.Cluster)); err != nil {
		return fmt.Errorf("guard.limits.cluster: %w", err)
	}
	return nil
}

// defaultPipe is where Falco's alerts come from when nothing else is said.
const defaultPipe = "/run/stoop/falco.pipe"

func defaults() Config {
	minute := time.Minute
	return Config{
		Data: "/var/lib/stoop",
		Mode: string(broker.Audit),
		Broker: Broker{
			Sync: Sync(time.Second),
			Limits: BrokerLimits{
				Alerts:   Keep{param.Duration(24 * time.Hour), 256 << 20},
				Outcomes: Keep{param.Duration(720 * time.Hour), 128 << 20},
				Matched:  Keep{param.Duration(720 * time.Hour), 256 << 20},
			},
		},
		Kubernetes: Kubernetes{AuditEvents: "off", QPS: 10, Burst: 50},
		Guard: Guard{
			Protect: Protect{
				Namespaces:      []string{"kube-system", "kube-node-lease", "kube-public", "falco"},
				PriorityClasses: []string{"system-*"},
			},
			Cooldown:    param.Duration(5 * minute),
			MaxAge:      param.Duration(10 * minute),
			Approval:    param.Duration(60 * minute),
			Settle:      param.Duration(10 * minute),
			Limits:      APILimits{Rate{5, minute}, Rate{5, minute}, Rate{10, minute}, Rate{60, 10 * minute}},
			LocalLimits: Limits{Rate{20, minute}, Rate{20, minute}, Rate{40, minute}},
		},
		Evidence: Evidence{
			Size: 1 << 30, PerTarget: 3, Age: param.Duration(720 * time.Hour),
			S3: S3{Region: "us-east-1", Lock: "none", Retention: param.Duration(720 * time.Hour)},
		},
		Host: Host{Cgroup: "/sys/fs/cgroup"},
		Log:  Log{Level: "info", Format: "auto"},
	}
}

// defaultConfig is read when no --config is given and it is there.
const defaultConfig = "/etc/stoop/stoop.yaml"

// loadConfig reads the configuration; path "" is the default file, or the
// defaults where there is none.
func loadConfig(path string) (Config, error) {
	c := defaults()
	optional := path == ""
	if optional {
		path = defaultConfig
	}
	src, err := os.ReadFile(path)
	switch {
	case optional && errors.Is(err, os.ErrNotExist):
		return c, nil
	case err != nil:
		return c, fmt.Errorf("read the configuration: %w", err)
	}
	raw, err := rules.Settings(path, src, param.Describe(defaults()))
	if err != nil {
		return c, err
	}
	return c, param.Decode(raw, &c)
}

// loadBoth reads the configuration, as loadConfig does, and the rules.
func loadBoth(config, file string, entries []responders.Entry) (Config, *rules.Set, error) {
	c, err := loadConfig(config)
	if err != nil {
		return c, nil, err
	}
	set, err := rules.Load(file, catalogOf(entries))
	return c, set, err
}

// nodeName is the name of this node.
func (c *Config) nodeName() (string, error) {
	if c.Node != "" {
		return c.Node, nil
	}
	if n := os.Getenv("NODE_NAME"); n != "" {
		return n, nil
	}
	n, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("find this node's name (set node in the configuration): %w", err)
	}
	return n, nil
}

// brokerConfig is the broker's part, with its secrets read.
func (c *Config) brokerConfig() (broker.Config, error) {
	l := c.Broker.Limits
	bc := broker.Config{
		Dir: c.Data, Sync: time.Duration(c.Broker.Sync), SyncAlways: c.Broker.Sync < 0,
		AlertsAge: time.Duration(l.Alerts.Age), AlertsSize: int64(l.Alerts.Size),
		OutcomesAge: time.Duration(l.Outcomes.Age), OutcomesSize: int64(l.Outcomes.Size),
		MatchedAge: time.Duration(l.Matched.Age), MatchedSize: int64(l.Matched.Size),
		Mirror: c.Broker.Mirror,
	}
	if bc.SyncAlways {
		bc.Sync = 0
	}
	if c.Broker.Listen == "" {
		return bc, nil
	}
	bc.Listen = &broker.Listen{Addr: c.Broker.Listen, Cert: c.Broker.TLS.Cert, Key: c.Broker.TLS.Key, CA: c.Broker.TLS.CA}
	for _, u := range c.Broker.Users {
		user := broker.User{Name: u.Name, NKey: u.NKey}
		for _, s := range u.Serve {
			user.Serve = append(user.Serve, string(s))
		}
		if u.Password.IsSet() {
			p, err := u.Password.Resolve()
			if err != nil {
				return bc, fmt.Errorf("broker.users, %s: %w", u.Name, err)
			}
			user.Password = p
		}
		bc.Listen.Users = append(bc.Listen.Users, user)
	}
	return bc, nil
}

// evidenceBucket is where evidence is copied to; nil: nowhere.
func (c *Config) evidenceBucket() (evidence.Bucket, error) {
	s := c.Evidence.S3
	if s.Endpoint == "" {
		if s.Bucket != "" {
			return nil, errors.New("evidence.s3 names a bucket and no endpoint")
		}
		return nil, nil
	}
	keys := func() (access, secret, session string, err error) {
		if access, err = s.AccessKey.Resolve(); err != nil {
			return "", "", "", fmt.Errorf("evidence.s3.accessKey: %w", err)
		}
		if secret, err = s.SecretKey.Resolve(); err != nil {
			return "", "", "", fmt.Errorf("evidence.s3.secretKey: %w", err)
		}
		if s.SessionToken.IsSet() {
			if session, err = s.SessionToken.Resolve(); err != nil {
				return "", "", "", fmt.Errorf("evidence.s3.sessionToken: %w", err)
			}
		}
		return access, secret, session, nil
	}
	if _, _, _, err := keys(); err != nil {
		return nil, err
	}
	sc := s3.Config{
		Endpoint: string(s.Endpoint), Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region, Keys: keys, CA: s.CA,
		Retention: time.Duration(s.Retention),
	}
	if s.Lock != "none" {
		sc.Lock = strings.ToUpper(s.Lock)
	}
	b, err := s3.New(sc)
	if err != nil {
		return nil, fmt.Errorf("evidence.s3: %w", err)
	}
	return b, nil
}

// isLoopback reports whether only this machine reaches an address.
func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
