package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"stoop/node"
	"stoop/param"
)

func cutNetwork() Entry {
	return Entry{
		Name: "cut-network",
		Doc:  "Drops every packet in or out of the pod, or plain container, that raised the alert; open connections stop at once.",
		Notes: `Packets are dropped by nftables chains of stoop's own (table netdev stoop) on the host's
end of each of the pod's links, where nothing in the pod can lift them, whatever its
capabilities, and inside its network namespace as well, for network plugins that
redirect packets before they reach the host's end (Cilium). All protocols are meant:
also ARP, neighbour discovery, ICMP, and frames from packet sockets. Neither the API
server nor the network plugin has a part in it. The containers of a pod share one
network and are all cut off; their loopback is left alone, and so is what they share on
disk.

A link without an end on the host (macvlan, ipvlan, host-device, the guest's side of
some plugins) is cut inside the namespace only, and before Linux 5.16 so is what comes
in on any link: found.how then says inside, and found.removable is true if the container
holds NET_ADMIN, with which it can lift that, or keep stoop from doing it: found.open
names such links, and the others are cut. A container with NET_ADMIN may also make
itself another link on top of one of the host's (a macvlan; not where the pod has a user
namespace of its own): found.netAdmin is true, and such a link is cut only when stoop is
started the next time. Stop such a container first: freeze-container, then cut-network.

allow takes addresses, each with one of its ports (TCP and UDP) if wanted: 10.0.0.7/32
for an investigator, 10.96.0.10/32:53 for the cluster's DNS, as the pod sees the
address. There is no memory of connections: what is allowed passes both ways.

Pods in the host's network are refused. A liveness or readiness probe over the network
fails from now on, unless the node's own address is allowed. The kubelet may then start
the container anew, and the pod stays cut off. The cut ends with the pod.`,
		Params: param.Describe(cutNetworkParams{}),
		Needs:  []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedSysAdmin, node.NeedNetAdmin},
		Kind:   Harm,
		Object: ContainerObject,
		// A cut takes about a millisecond; the rest is for a ruleset that another
		// program is changing.
		Deadline: 5 * time.Second,
		New:      func(env Env) Responder { return &networkCutter{env.Local} },
	}
}

type cutNetworkParams struct {
	Allow []Peer         `param:"allow" doc:"Addresses that the pod may still talk to, each with one of their ports if wanted: 10.0.0.7/32, 10.96.0.10/32:53."`
	TTL   param.Duration `param:"ttl" doc:"After how long the pod is let back by itself; 0 is never."`
}

// maxAllowed is how many peers may be allowed: each costs rules in every chain.
const maxAllowed = 32

// Validate refuses what would be no cut.
func (p cutNetworkParams) Validate() error {
	if len(p.Allow) > maxAllowed {
		return fmt.Errorf("allow: %d addresses, and at most %d can be", len(p.Allow), maxAllowed)
	}
	for _, a := range p.Allow {
		if a.Prefix.Bits() == 0 {
			return fmt.Errorf("allow: %s is every address: nothing would be cut off", a)
		}
	}
	return nil
}

// Peer is a range of addresses with, if wanted, one port of theirs:
// "10.0.0.7/32", "10.96.0.10/32:53", "2001:db8::53/128:53".
type Peer struct{ node.Peer }

// UnmarshalText reads a range as [param.CIDR] does, and what follows it.
func (p *Peer) UnmarshalText(b []byte) error {
	s := string(b)
	addr, bits, ok := strings.Cut(s, "/")
	bits, port, withPort := strings.Cut(bits, ":")
	var cidr param.CIDR
	if !ok {
		return cidr.UnmarshalText(b)
	}
	if err := cidr.UnmarshalText([]byte(addr + "/" + bits)); err != nil {
		return err
	}
	if cidr.Addr().Is4In6() {
		return fmt.Errorf("%s is an address of IPv4: write it as one", param.Cut(s))
	}
	p.Peer = node.Peer{Prefix: cidr.Prefix}
	if withPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("%s is no port, behind %s", param.Cut(port), cidr)
		}
		p.Port = uint16(n)
	}
	return nil
}

// MarshalText is String.
func (p Peer) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

type networkCutter struct{ node *node.Node }

// networkCut is the undo record: it is all that Undo and Keep believe.
type networkCut struct {
	Boot      string    `json:"boot"`
	Container string    `json:"container"`
	Cut       *node.Cut `json:"cut"`
}

// Check refuses a container in the host's network.
func (c *networkCutter) Check(ctx context.Context, r *Request) error {
	nets, _, err := c.node.Networks(ctx, r.Container)
	for _, w := range nets {
		w.Close()
	}
	if errors.Is(err, node.ErrHostNetwork) {
		return networkError(err)
	}
	return nil // the rest is for Act to find out
}

func (c *networkCutter) Act(ctx context.Context, r *Request) (Result, error) {
	var params cutNetworkParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	var allow []node.Peer
	for _, p := range params.Allow {
		allow = append(allow, p.Peer)
	}
	// A second run of the step replaces what the first made, under the same names.
	record := func(cut *node.Cut) ([]byte, error) {
		return json.Marshal(networkCut{Boot: c.node.BootID(), Container: r.Container.ID, Cut: cut})
	}
	// Stored before: nothing else would know of the chains, should stoop be killed
	// and the step not come again in time.
	cut, err := c.node.Cut(ctx, r.Container, r.Step.ID, allow, func(cut *node.Cut) {
		if undo, err := record(cut); err == nil {
			r.Intend(undo, time.Duration(params.TTL))
		}
	})
	if err != nil {
		return Result{}, networkError(err)
	}
	undo, err := record(cut)
	if err != nil {
		return Result{}, err
	}
	tidy(ctx, c.node)
	found := wiring(cut.Wired, cut.OneWay, cut.NetAdmin)
	if len(allow) > 0 {
		found["allowed"] = joined(params.Allow)
	}
	reason := "cut off the network on " + found["devices"]
	if found["removable"] == "true" {
		reason += "; the container holds NET_ADMIN and can lift what is done inside its namespace (" + strings.Join(cut.Inside(), ", ") + "): freeze it"
	} else if cut.NetAdmin {
		reason += "; the container holds NET_ADMIN, with which it may be able to make itself another link: freeze it"
	}
	return Result{
		Reason: reason + inHost(cut.InHost, found) + leftOpen(cut.Open, found), Found: found, Undo: undo,
		TTL: time.Duration(params.TTL),
	}, nil
}

// Undo lifts this cut; others of the same pod stay.
func (c *networkCutter) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := c.read(u)
	if err != nil {
		return Result{}, err
	}
	lifted, err := c.node.Uncut(ctx, rec.Cut)
	if err != nil {
		return Result{}, fmt.Errorf("let container %s back: %w", rec.Container, networkError(err))
	}
	if !lifted {
		return Result{Nothing: true, Reason: "the cut was lifted already"}, nil
	}
	return Result{Reason: "let back to the network on " + wiring(rec.Cut.Wired, false, false)["devices"]}, nil
}

// Keep puts chains that somebody removed back, and cuts links that the pod got
// since.
func (c *networkCutter) Keep(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := c.read(u)
	if err != nil {
		return Result{}, err
	}
	restored, err := c.node.KeepCut(ctx, rec.Cut)
	if err != nil {
		return Result{}, fmt.Errorf("container %s: %w", rec.Container, networkError(err))
	}
	if !restored {
		return Result{Nothing: true, Reason: "the cut holds"}, nil
	}
	return Result{Reason: "something of the cut was missing and was put back"}, nil
}

func (c *networkCutter) read(u *UndoRequest) (*networkCut, error) {
	var rec networkCut
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Cut == nil || rec.Cut.ID == "" || rec.Boot == "" {
		return nil, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if rec.Boot != c.node.BootID() {
		return nil, fmt.Errorf("the cut ended when the machine was restarted: %w", ErrGone)
	}
	return &rec, nil
}

// tidy removes what links that are gone left behind. Nothing hangs on it: that it
// failed is not worth a word.
func tidy(ctx context.Context, n *node.Node) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = n.Sweep(ctx)
}

// networkError makes of a node's error what the host understands.
func networkError(err error) error {
	switch {
	case errors.Is(err, node.ErrHostNetwork):
		return Refuse("%v: the node would be cut off with it", err)
	case errors.Is(err, node.ErrNoLink):
		return fmt.Errorf("%w: %w", err, ErrGone)
	case errors.Is(err, node.ErrGone):
		return fmt.Errorf("%w: %w", err, ErrGone)
	}
	return err
}

// wiring is where it was done, for the outcome.
func wiring(wired []node.Wired, oneWay, netAdmin bool) map[string]string {
	var devices, inodes []string
	inside := oneWay
	for _, w := range wired {
		inodes = append(inodes, strconv.FormatUint(w.Inode, 10))
		for _, l := range w.Wires {
			if l.Peer == 0 {
				inside = true
				devices = append(devices, l.Name)
			} else {
				devices = append(devices, l.Name+"@"+l.PeerName)
			}
		}
	}
	found := map[string]string{
		"devices":   joinedFirst(devices, 8),
		"namespace": strings.Join(inodes, " "),
		"how":       "host-side",
	}
	if inside {
		found["how"] = "inside"
	}
	if netAdmin {
		found["netAdmin"] = "true"
		if inside {
			found["removable"] = "true"
		}
	}
	return found
}

func joinedFirst(all []string, n int) string {
	if len(all) > n {
		return strings.Join(all[:n], " ") + fmt.Sprintf(" and %d more", len(all)-n)
	}
	return strings.Join(all, " ")
}

func joined[T fmt.Stringer](all []T) string {
	var s []string
	for _, v := range all {
		s = append(s, v.String())
	}
	return strings.Join(s, " ")
}

// inHost tells of the processes that it does not reach.
func inHost(n int, found map[string]string) string {
	if n == 0 {
		return ""
	}
	found["inHostNetwork"] = strconv.Itoa(n)
	return fmt.Sprintf("; %d of its processes are in the host's network, and not cut off", n)
}

// leftOpen tells of the links that somebody inside kept stoop from.
func leftOpen(links []string, found map[string]string) string {
	if len(links) == 0 {
		return ""
	}
	found["open"] = joinedFirst(links, 8)
	return "; not on " + found["open"] + ": its namespace has more links than stoop looks after, or somebody in there keeps stoop out: freeze it"
}

// prefixes are the ranges as the standard library has them.
func prefixes(all []param.CIDR) (p []netip.Prefix) {
	for _, c := range all {
		p = append(p, c.Prefix)
	}
	return p
}
