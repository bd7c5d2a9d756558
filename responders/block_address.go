package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"stoop/alert"
	"stoop/node"
	"stoop/param"
)

func blockAddress() Entry {
	return Entry{
		Name: "block-address",
		Doc:  "Drops every packet between the pod, or plain container, that raised the alert, or the whole node, and the remote address of the alert's connection.",
		Notes: `Whoever runs a process in a container chooses what it connects to, and so what the alert
says. So the address is blocked for this pod only, and only while the kernel confirms a
connection to it that the pod itself opened: TCP that is established or asked for, from
a port on which nothing listens, or a connected UDP socket. A connection that is over
when the step comes to it (most are, within seconds) is refused, and so is one that came
from outside. The remote address is the second one in fd.name. Where the alert has none,
fd.sip is taken, or else fd.rip, without a port.

Never blocked are the API server's address, as stoop knows it (KUBERNETES_SERVICE_HOST,
the kubeconfig); DNS servers, as the node's resolv.conf, the kubelet's configuration
(clusterDNS) and stoop's own resolv.conf name them; the node's own addresses; loopback,
link-local (with it the cloud's metadata service), multicast; and what protect lists.
Name there the control plane's own addresses and whatever else the pods depend on. The
pod's own resolv.conf counts for nothing: it is the pod's to write.

For a pod packets are dropped where cut-network drops them, and the same is to be said of
links without an end on the host and of NET_ADMIN. For the node they are dropped in the
host's netfilter, as they come in from any device, a pod's too, and as the node's own
processes send them: all pods and the node itself lose that address. Packets that a
network plugin takes by netfilter in programs of its own (Cilium's host routing in eBPF)
are not seen there. By the time somebody approves, the connection has to be open still.
The kernel lifts it when ttl is over, with or without stoop.`,
		Params:   param.Describe(blockAddressDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedSysAdmin, node.NeedNetAdmin},
		Kind:     Harm,
		Object:   ContainerObject,
		Deadline: 5 * time.Second,
		Approve: func(raw json.RawMessage) bool {
			p := blockAddressDefaults()
			_ = param.Decode(raw, &p) // Act says what is wrong with them
			return p.Scope != "pod"
		},
		New: func(env Env) Responder { return newAddressBlocker(env) },
	}
}

type blockAddressParams struct {
	TTL     param.Duration `param:"ttl" min:"1s" max:"720h" doc:"How long the address is blocked; the kernel counts."`
	Scope   string         `param:"scope" oneof:"pod node" doc:"For whom: pod is the alert's pod alone, node all pods of this node and the node itself."`
	Protect []param.CIDR   `param:"protect" doc:"Addresses that are never blocked, besides those that never are."`
}

func blockAddressDefaults() blockAddressParams {
	return blockAddressParams{TTL: param.Duration(time.Hour), Scope: "pod"}
}

type addressBlocker struct {
	node   *node.Node
	server string // the API server's host, as configured
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	mu       sync.Mutex
	servers  []netip.Addr // the addresses of server
	resolved time.Time
}

func newAddressBlocker(env Env) *addressBlocker {
	b := &addressBlocker{node: env.Local}
	if env.Kube != nil && env.Kube.core != nil {
		if u := env.Kube.core.Get().URL(); u != nil {
			b.server = u.Hostname()
		}
	}
	b.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}
	return b
}

// remote is what an alert says of a connection, which is not yet true.
type remote struct {
	protocol   string // "" is not known
	near, addr netip.AddrPort
}

// remoteOf reads the far end of the alert's connection as if the container had
// opened it: the client's end comes first in fd.name.
func remoteOf(a *alert.Alert) (remote, error) {
	var r remote
	if a == nil || a.Text {
		return r, errors.New("the alert names no connection")
	}
	if p, _ := a.Field("fd.l4proto"); p == "tcp" || p == "udp" {
		r.protocol = p
	}
	if name, _ := a.Field("fd.name"); strings.Contains(name, "->") {
		near, far, _ := strings.Cut(name, "->")
		n, nerr := endOf(near)
		f, ferr := endOf(far)
		if nerr != nil || ferr != nil {
			return r, fmt.Errorf("fd.name %s is no connection", param.Cut(name))
		}
		r.near, r.addr = n, f
		return r, nil
	}
	for _, f := range [][2]string{{"fd.sip", "fd.sport"}, {"fd.rip", "fd.rport"}} {
		ip, ok := a.Field(f[0])
		if !ok {
			continue
		}
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			return r, fmt.Errorf("%s %s is no address", f[0], param.Cut(ip))
		}
		// Without its port: Falco's ports mix the ends up.
		r.addr = netip.AddrPortFrom(addr.Unmap().WithZone(""), 0)
		return r, nil
	}
	return r, errors.New("the alert names no connection: its rule has to print fd.name")
}

// endOf reads an end as Falco writes it, IPv6 without brackets.
func endOf(s string) (netip.AddrPort, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.AddrPort{}, errors.New("no port")
	}
	addr, err := netip.ParseAddr(strings.Trim(s[:i], "[]"))
	if err != nil {
		return netip.AddrPort{}, err
	}
	p, err := netip.ParseAddrPort("0.0.0.0:" + s[i+1:])
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(addr.Unmap().WithZone(""), p.Port()), nil
}

// Object is the address and for whom it is blocked: another one in the same pod is
// another matter, and so is the same one in another pod.
func (b *addressBlocker) Object(r *Request) string {
	far, err := remoteOf(r.Alert)
	if err != nil {
		return ""
	}
	params := blockAddressDefaults()
	_ = r.Decode(&params) // Act says what is wrong with them
	if params.Scope == "node" {
		return "address/node/" + far.addr.Addr().String()
	}
	return "address/" + r.Container.ID + "/" + far.addr.Addr().String()
}

func (b *addressBlocker) params(r *Request) (blockAddressParams, remote, error) {
	params := blockAddressDefaults()
	if err := r.Decode(&params); err != nil {
		return params, remote{}, Refuse("%v", err)
	}
	if params.TTL <= 0 {
		return params, remote{}, Refuse("ttl: 0 would be never, and an address is blocked for a while only")
	}
	far, err := remoteOf(r.Alert)
	if err != nil {
		return params, far, Refuse("%v", err)
	}
	return params, far, nil
}

// Check refuses what it would refuse to block.
func (b *addressBlocker) Check(ctx context.Context, r *Request) error {
	_, _, _, err := b.confirm(ctx, r)
	return err
}

// confirm asks the kernel whether what the alert says is so, after making sure
// that it may be blocked at all.
func (b *addressBlocker) confirm(ctx context.Context, r *Request) (blockAddressParams, remote, node.Connection, error) {
	params, far, err := b.params(r)
	if err != nil {
		return params, far, node.Connection{}, err
	}
	if err := b.mayBlock(ctx, far.addr.Addr(), prefixes(params.Protect)); err != nil {
		return params, far, node.Connection{}, err
	}
	found, err := b.node.Outbound(ctx, r.Container, far.protocol, far.near, far.addr)
	if err != nil {
		return params, far, node.Connection{}, networkError(err)
	}
	if len(found) == 0 {
		return params, far, node.Connection{}, Refuse("the kernel knows no connection to %s that the container has open now and opened itself", far.addr.Addr())
	}
	return params, far, found[0], nil
}

// mayBlock refuses the addresses that nothing an attacker does may take from a
// pod.
func (b *addressBlocker) mayBlock(ctx context.Context, a netip.Addr, protect []netip.Prefix) error {
	switch {
	case !a.IsValid(), a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(),
		a == netip.AddrFrom4([4]byte{255, 255, 255, 255}), a.Is4() && a.As4()[0] == 0:
		return Refuse("%s is no address of another machine", a)
	}
	for _, p := range protect {
		if p.Contains(a) {
			return Refuse("%s is protected: it is in %s", a, p)
		}
	}
	servers, err := b.apiServer(ctx)
	if err != nil {
		return Retry(err, 0)
	}
	if slices.Contains(servers, a) {
		return Refuse("%s is the API server's address", a)
	}
	if slices.Contains(b.node.Resolvers(), a) {
		return Refuse("%s is a DNS server's address", a)
	}
	own, err := b.node.Addresses(ctx)
	if err != nil {
		return err
	}
	if slices.Contains(own, a) {
		return Refuse("%s is the node's own address", a)
	}
	return nil
}

// apiServer are the addresses under which stoop and the pods know the API
// server.
func (b *addressBlocker) apiServer(ctx context.Context) ([]netip.Addr, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.resolved) < 5*time.Minute {
		return b.servers, nil
	}
	var all []netip.Addr
	for _, host := range []string{os.Getenv("KUBERNETES_SERVICE_HOST"), b.server} {
		if host == "" {
			continue
		}
		if a, err := netip.ParseAddr(host); err == nil {
			all = append(all, a.Unmap())
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		found, err := b.lookup(ctx, host)
		cancel()
		switch {
		case err != nil && b.servers != nil:
			found = b.servers // as they were
		case err != nil:
			return nil, fmt.Errorf("the API server's address, which must not be blocked, is not known: %w", &url.Error{Op: "look up", URL: host, Err: err})
		}
		for _, a := range found {
			all = append(all, a.Unmap())
		}
	}
	b.servers, b.resolved = all, time.Now()
	return all, nil
}

// addressBlock is the undo record: it is all that Undo and Keep believe.
type addressBlock struct {
	Boot      string          `json:"boot"`
	Container string          `json:"container"`
	Block     *node.Block     `json:"block,omitempty"`
	Node      *node.NodeBlock `json:"node,omitempty"` // in place of Block
}

func (b *addressBlock) address() netip.Addr {
	if b.Node != nil {
		return b.Node.Address
	}
	return b.Block.Address
}

func (b *addressBlocker) Act(ctx context.Context, r *Request) (Result, error) {
	params, far, connection, err := b.confirm(ctx, r)
	if err != nil {
		return Result{}, err
	}
	a := far.addr.Addr()
	if params.Scope == "node" {
		return b.actOnNode(ctx, r, a, time.Duration(params.TTL), connection)
	}
	block, err := b.node.Block(ctx, r.Container, a, time.Duration(params.TTL), r.Resumed)
	if errors.Is(err, node.ErrBlocked) {
		return Result{Nothing: true, Reason: fmt.Sprintf("%s is blocked for the pod already", a)}, nil
	}
	if err != nil {
		return Result{}, networkError(err)
	}
	undo, err := json.Marshal(addressBlock{Boot: b.node.BootID(), Container: r.Container.ID, Block: block})
	if err != nil {
		return Result{}, err
	}
	tidy(ctx, b.node)
	found := wiring(block.Wired, block.OneWay, block.NetAdmin)
	found["address"] = a.String()
	found["connection"] = connection.Protocol + " " + connection.Local.String() + "->" + connection.Remote.String()
	found["until"] = block.Until.Format(time.RFC3339)
	return Result{
		Reason: fmt.Sprintf("%s is blocked until %s", a, found["until"]) + inHost(block.InHost, found) + leftOpen(block.Open, found),
		Found:  found, Undo: undo, TTL: time.Duration(params.TTL),
	}, nil
}

func (b *addressBlocker) actOnNode(ctx context.Context, r *Request, a netip.Addr, ttl time.Duration, c node.Connection) (Result, error) {
	block, err := b.node.BlockOnNode(ctx, a, ttl, r.Resumed)
	if errors.Is(err, node.ErrBlocked) {
		return Result{Nothing: true, Reason: fmt.Sprintf("%s is blocked for the node already", a)}, nil
	}
	if err != nil {
		return Result{}, networkError(err)
	}
	undo, err := json.Marshal(addressBlock{Boot: b.node.BootID(), Container: r.Container.ID, Node: block})
	if err != nil {
		return Result{}, err
	}
	until := block.Until.Format(time.RFC3339)
	return Result{
		Reason: fmt.Sprintf("%s is blocked for the whole node until %s", a, until),
		Found: map[string]string{
			"address": a.String(), "until": until, "scope": "node",
			"connection": c.Protocol + " " + c.Local.String() + "->" + c.Remote.String(),
		},
		Undo: undo, TTL: ttl,
	}, nil
}

// Undo takes the address out of the kernel's sets, if its time is not over.
func (b *addressBlocker) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := b.read(u)
	if err != nil {
		return Result{}, err
	}
	var lifted bool
	if rec.Node != nil {
		lifted, err = b.node.UnblockOnNode(ctx, rec.Node)
	} else {
		lifted, err = b.node.Unblock(ctx, rec.Block)
	}
	if err != nil {
		return Result{}, fmt.Errorf("unblock %s: %w", rec.address(), networkError(err))
	}
	if !lifted {
		return Result{Nothing: true, Reason: fmt.Sprintf("%s is not blocked any more: its time was over, or somebody lifted it", rec.address())}, nil
	}
	return Result{Reason: fmt.Sprintf("%s is not blocked any more", rec.address())}, nil
}

// Keep puts the address back for the rest of its time.
func (b *addressBlocker) Keep(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := b.read(u)
	if err != nil {
		return Result{}, err
	}
	var restored bool
	if rec.Node != nil {
		restored, err = b.node.KeepNodeBlock(ctx, rec.Node)
	} else {
		restored, err = b.node.KeepBlock(ctx, rec.Block)
	}
	if err != nil {
		return Result{}, networkError(err)
	}
	if !restored {
		return Result{Nothing: true, Reason: fmt.Sprintf("%s is blocked", rec.address())}, nil
	}
	return Result{Reason: fmt.Sprintf("the block of %s was missing and was put back", rec.address())}, nil
}

func (b *addressBlocker) read(u *UndoRequest) (*addressBlock, error) {
	var rec addressBlock
	if err := json.Unmarshal(u.Record, &rec); err != nil || (rec.Block == nil) == (rec.Node == nil) || !rec.address().IsValid() || rec.Boot == "" {
		return nil, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if rec.Boot != b.node.BootID() {
		return nil, fmt.Errorf("the block ended when the machine was restarted: %w", ErrGone)
	}
	return &rec, nil
}
