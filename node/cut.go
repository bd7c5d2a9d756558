package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoLink says that there is nothing to cut: the container has no network but
// its own loopback.
var ErrNoLink = errors.New("it has no network link")

// maxOutside and maxInside are how many links with and without an end on the host
// are looked after in one namespace, those that came first: a container with
// NET_ADMIN can make any number, and thousands of chains take seconds.
const (
	maxOutside = 256
	maxInside  = 64
)

// Wire is a link of a pod.
type Wire struct {
	Index int    `json:"index"` // in the pod's namespace
	Name  string `json:"name"`
	// Peer is its other end, on the host, which nothing in the pod can reach; 0:
	// it has none there (macvlan, ipvlan, a real device).
	Peer     int    `json:"peer,omitempty"`
	PeerName string `json:"peerName,omitempty"`
}

// Wired is a network namespace and its links.
type Wired struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie,omitempty"` // 0 before Linux 5.14
	PID    int    `json:"pid"`              // where it was found: a hint
	Wires  []Wire `json:"wires"`
}

// Cut is what keeps a container off the network: chains that live in the
// kernel until [Node.Uncut], a reboot, or the end of the links. What is stored
// of it (as JSON) is all that taking it back needs.
type Cut struct {
	ID    string  `json:"id"` // names the chains; letters, digits, dots
	Allow []Peer  `json:"allow,omitempty"`
	Wired []Wired `json:"wired"`

	// InHost is how many of the container's processes are in the host's network,
	// where they are not cut off: a privileged one can go there.
	InHost int `json:"-"`
	// OneWay says that the kernel has no egress hook (Linux before 5.16), so that
	// what comes in is dropped inside the namespace only.
	OneWay bool `json:"oneWay,omitempty"`
	// NetAdmin says that the container holds NET_ADMIN, or could come to.
	NetAdmin bool `json:"-"`
	// Open are links that are not cut: they could only be inside the namespace, where
	// somebody with NET_ADMIN kept stoop from it, or there are too many.
	Open []string `json:"-"`
}

// Inside are the links that have no end on the host: whoever holds NET_ADMIN in
// the namespace can lift what is done about them.
func (c *Cut) Inside() (names []string) {
	for _, w := range c.Wired {
		for _, l := range w.Wires {
			if l.Peer == 0 || c.OneWay {
				names = append(names, l.Name)
			}
		}
	}
	return names
}

// Cut drops every packet in or out of the container's network, and so of its
// pod's, except to and from the peers that are allowed; connections that are
// open stop at once. Packets are dropped on the host's end of each link, and
// inside the namespace as well: what a network plugin redirects in programs of
// its own (tc, XDP: Cilium) never reaches the host's end, and a link that has no
// such end has only the inside. Loopback is left alone.
//
// Cutting again under the same id replaces what was there. before, if not nil, is
// called right before anything is cut, with all that [Node.Uncut] needs. Errors:
// [ErrGone], [ErrHostNetwork], [ErrNoLink]; after an error nothing is left behind.
func (n *Node) Cut(ctx context.Context, c *Container, id string, allow []Peer, before func(*Cut)) (*Cut, error) {
	return n.cut(ctx, c.ID, c.Pids, id, allow, before)
}

func (n *Node) cut(ctx context.Context, name string, members func() ([]int, error), id string, allow []Peer, before func(*Cut)) (*Cut, error) {
	if !validID(id) {
		return nil, fmt.Errorf("%q can't name a chain", id)
	}
	cut := &Cut{ID: id, Allow: allow}
	err := n.reach(ctx, name, members, func(r *reached) error {
		cut.Wired, cut.InHost = r.wired, r.inHost
		if before != nil {
			before(cut)
		}
		err := cut.apply(r)
		if errors.Is(err, unix.EOPNOTSUPP) {
			cut.OneWay = true
			err = cut.apply(r)
		}
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			if _, uerr := n.Uncut(undo, cut); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		cut.Open = r.open
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cut container %s off the network: %w", name, err)
	}
	if pids, err := members(); err == nil {
		cut.NetAdmin = n.mayChangeNetwork(pids)
	}
	return cut, nil
}

// apply puts the cut in force, on the host's side first.
func (c *Cut) apply(r *reached) error {
	return r.apply(c.OneWay, c.add)
}

func (c *Cut) add(b *batch, h hook) {
	b.addChain(cutChain(c.ID, h.index, h.out), h, cutRules(c.Allow, h.out)...)
}

func (c *Cut) chains(index int) []string {
	return []string{cutChain(c.ID, index, true), cutChain(c.ID, index, false)}
}

// Uncut takes a cut back, and nothing but it. lifted says whether there was
// anything left of it; [ErrGone] that the pod's network is not there any more.
func (n *Node) Uncut(ctx context.Context, c *Cut) (lifted bool, err error) {
	prefix := "cut-" + c.ID + "-"
	return n.lift(ctx, c.Wired, func(f filter) (*removal, error) {
		return &removal{chain: func(name string) bool { return strings.HasPrefix(name, prefix) }}, nil
	})
}

// KeepCut makes sure that a cut still holds: it puts back what is missing, also
// on links that the namespace got since. restored says that something was
// missing. [ErrGone] says that the namespace has ended.
func (n *Node) KeepCut(ctx context.Context, c *Cut) (restored bool, err error) {
	restored, err = n.keepAll(ctx, c.Wired, keeping{c.OneWay, c.chains, c.add, nil})
	if err != nil {
		err = fmt.Errorf("keep the cut %s: %w", c.ID, err)
	}
	return restored, err
}

// Block is an address that a container's network is kept from, for a while.
type Block struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"` // when the kernel lifts it
	Wired   []Wired    `json:"wired"`
	OneWay  bool       `json:"oneWay,omitempty"`

	InHost   int      `json:"-"`
	NetAdmin bool     `json:"-"`
	Open     []string `json:"-"`
}

// ErrBlocked says that the address is blocked already.
var ErrBlocked = errors.New("it is blocked already")

// Block drops every packet between the container's network and the address, for
// ttl, at the same places as [Node.Cut]. The time is the kernel's: it ends with
// or without stoop. [ErrBlocked] when the address is there already, unless again
// says that this is the same step once more.
func (n *Node) Block(ctx context.Context, c *Container, a netip.Addr, ttl time.Duration, again bool) (*Block, error) {
	return n.block(ctx, c.ID, c.Pids, a, ttl, again)
}

func (n *Node) block(ctx context.Context, name string, members func() ([]int, error), a netip.Addr, ttl time.Duration, again bool) (*Block, error) {
	if !a.IsValid() || ttl <= 0 {
		return nil, fmt.Errorf("block %s for %s: neither may be nothing", a, ttl)
	}
	a = a.Unmap().WithZone("")
	block := &Block{Address: a, Until: time.Now().Add(ttl).UTC()}
	err := n.reach(ctx, name, members, func(r *reached) error {
		block.Wired, block.InHost = r.wired, r.inHost
		if !again {
			there, err := block.everywhere(r)
			if err != nil || there {
				return errors.Join(err, blocked(there))
			}
		}
		err := block.apply(r)
		if errors.Is(err, unix.EOPNOTSUPP) {
			block.OneWay = true
			err = block.apply(r)
		}
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			if _, uerr := n.Unblock(undo, block); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		block.Open = r.open
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("block %s for container %s: %w", a, name, err)
	}
	if pids, err := members(); err == nil {
		block.NetAdmin = n.mayChangeNetwork(pids)
	}
	return block, nil
}

func blocked(there bool) error {
	if there {
		return ErrBlocked
	}
	return nil
}

// everywhere reports whether the address is in the sets of all links with an end
// on the host, or, where there is none of these, of all inside.
func (k *Block) everywhere(r *reached) (bool, error) {
	var asked int
	for i, w := range r.wired {
		for _, l := range w.Wires {
			f, index := r.inside[i].filter, l.Index
			if l.Peer != 0 {
				f, index = r.host.filter, l.Peer
			}
			asked++
			elements, err := f.elements(blockSet(index, k.Address.Is6()))
			if err != nil {
				return false, err
			}
			if _, there := elements[k.Address]; !there {
				return false, nil
			}
		}
	}
	return asked > 0, nil
}

func (k *Block) apply(r *reached) error {
	return r.apply(k.OneWay, k.add)
}

// add is idempotent. The sets belong to the link: a link that is gone takes
// their meaning with it.
func (k *Block) add(b *batch, h hook) {
	v4, v6 := blockSet(h.index, false), blockSet(h.index, true)
	b.addSet(v4, false)
	b.addSet(v6, true)
	b.addChain(blockChain(h.index, h.out), h,
		rule(farInSet(v4, false, h.out), drop()),
		rule(farInSet(v6, true, h.out), drop()))
	b.addElement(blockSet(h.index, k.Address.Is6()), k.Address, time.Until(k.Until))
}

func (k *Block) chains(index int) []string {
	return []string{blockChain(index, true), blockChain(index, false)}
}

// Unblock takes a block back, and nothing but it. lifted says whether there was
// anything left of it; [ErrGone] that the pod's network is not there any more.
func (n *Node) Unblock(ctx context.Context, k *Block) (lifted bool, err error) {
	peers := map[int]bool{}
	for _, w := range k.Wired {
		for _, l := range w.Wires {
			peers[l.Peer] = true
		}
	}
	return n.lift(ctx, k.Wired, func(f filter) (*removal, error) {
		sets, err := f.sets()
		if err != nil {
			return nil, err
		}
		rm := &removal{elements: map[string]netip.Addr{}}
		empty := map[int]bool{}
		for _, set := range sets {
			index := indexOf(set)
			if !strings.HasPrefix(set, "block-") || f.host && !peers[index] {
				continue
			}
			elements, err := f.elements(set)
			if err != nil {
				return nil, err
			}
			if _, there := elements[k.Address]; there {
				rm.elements[set] = k.Address
				delete(elements, k.Address)
			}
			if was, seen := empty[index]; !seen || was {
				empty[index] = len(elements) == 0
			}
		}
		// What holds no address any more goes as a whole.
		unused := func(name string) bool { return strings.HasPrefix(name, "block-") && empty[indexOf(name)] }
		rm.chain, rm.set = unused, unused
		return rm, nil
	})
}

// KeepBlock makes sure that a block still holds, for what is left of its time.
// restored says that something was missing; [ErrGone] that its time is over, or
// the namespace has ended.
func (n *Node) KeepBlock(ctx context.Context, k *Block) (restored bool, err error) {
	if time.Until(k.Until) <= 0 {
		return false, fmt.Errorf("the block of %s ended at %s: %w", k.Address, k.Until.Format(time.RFC3339), ErrGone)
	}
	restored, err = n.keepAll(ctx, k.Wired, keeping{k.OneWay, k.chains, k.add, k.everywhere})
	if err != nil {
		err = fmt.Errorf("keep the block of %s: %w", k.Address, err)
	}
	return restored, err
}

// side is one namespace, with the sockets that reach into it.
type side struct {
	sockets
	route  route
	filter filter
}

func (w *Network) side(ctx context.Context, host bool) (*side, error) {
	s, err := w.open(ctx, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &side{s, route{s[unix.NETLINK_ROUTE]}, filter{Conn: s[unix.NETLINK_NETFILTER], host: host}}, nil
}

// reached is a container's network with all that it takes to act on it.
type reached struct {
	host   *side
	inside []*side // one a namespace
	wired  []Wired
	inHost int
	beyond []string // links that are too many
	open   []string // these, and those that apply could do nothing about
}

// reach opens the container's network for f.
func (n *Node) reach(ctx context.Context, name string, members func() ([]int, error), f func(*reached) error) error {
	nets, inHost, err := n.networks(ctx, name, members)
	if err != nil {
		return err
	}
	defer closeAll(nets)
	return n.reachNetworks(ctx, nets, inHost, f)
}

func (n *Node) reachNetworks(ctx context.Context, nets []*Network, inHost int, f func(*reached) error) error {
	hostNet, err := n.HostNetwork()
	if err != nil {
		return err
	}
	defer hostNet.Close()
	r := &reached{inHost: inHost}
	if r.host, err = hostNet.side(ctx, true); err != nil {
		return err
	}
	defer r.host.Close()
	links := 0
	for _, w := range nets {
		s, err := w.side(ctx, false)
		if err != nil {
			return err
		}
		defer s.Close()
		wires, beyond, err := wiresOf(s, r.host, w, hostNet)
		if err != nil {
			return err
		}
		r.beyond = append(r.beyond, beyond...)
		links += len(wires)
		r.inside = append(r.inside, s)
		r.wired = append(r.wired, Wired{Inode: w.Inode, Cookie: w.Cookie, PID: w.PID, Wires: wires})
	}
	if links == 0 {
		return ErrNoLink
	}
	return f(r)
}

// wiresOf are the namespace's links, those with an end on the host first, and the
// names of those that are too many.
func wiresOf(s, host *side, w, hostNet *Network) (wires []Wire, beyond []string, err error) {
	links, err := s.route.links()
	if err != nil {
		return nil, nil, err
	}
	hostInPod, err := s.route.numberOf(hostNet)
	if err != nil {
		return nil, nil, err
	}
	podInHost, err := host.route.numberOf(w)
	if err != nil {
		return nil, nil, err
	}
	// The one that the runtime made is older than all that the container did.
	slices.SortFunc(links, func(a, b Link) int { return cmp.Compare(a.Index, b.Index) })
	var outside, inside []Wire
	for _, l := range links {
		if l.Loopback {
			continue
		}
		if len(outside) >= maxOutside && len(inside) >= maxInside {
			beyond = append(beyond, l.Name)
			continue
		}
		wire := Wire{Index: l.Index, Name: l.Name}
		peer, ok, err := peerOf(l, host.route, podInHost, hostInPod)
		if err != nil {
			return nil, nil, err
		}
		wire.Peer, wire.PeerName = peer.Index, peer.Name
		switch {
		case ok && len(outside) < maxOutside:
			outside = append(outside, wire)
		case !ok && len(inside) < maxInside:
			inside = append(inside, wire)
		default:
			beyond = append(beyond, l.Name)
		}
	}
	return append(outside, inside...), beyond, nil
}

// apply commits what add makes of each hook, on the host and inside. That the
// inside could not be done is an error only in a namespace where it is all there
// is: whoever holds NET_ADMIN there can make a link without an end on the host,
// and a table of stoop's name that stoop may not touch, and must not keep the
// others open by that. Without oneWay every link has both hooks on either side.
func (r *reached) apply(oneWay bool, add func(*batch, hook)) error {
	r.open = slices.Clone(r.beyond)
	both := func(b *batch, h hook, ingressIsOut bool) {
		h.ingress, h.out = true, ingressIsOut
		add(b, h)
		if !oneWay {
			h.ingress, h.out = false, !ingressIsOut
			add(b, h)
		}
	}
	var outside batch
	outside.addTable()
	alone := make([][]string, len(r.wired)) // links that have nothing but the inside
	outer := make([]bool, len(r.wired))     // there are others
	peers := 0
	for i, w := range r.wired {
		for _, l := range w.Wires {
			if l.Peer == 0 || oneWay {
				alone[i] = append(alone[i], l.Name)
			}
			if l.Peer != 0 {
				outer[i] = true
				peers++
				both(&outside, hook{index: l.Peer, device: l.PeerName}, true)
			}
		}
	}
	if peers > 0 {
		if err := r.host.filter.commit(&outside, 0); err != nil {
			return fmt.Errorf("on the host's side: %w", err)
		}
		if err := r.verify(); err != nil {
			return err
		}
	}
	for i, w := range r.wired {
		var b batch
		b.addTable()
		for _, l := range w.Wires {
			both(&b, hook{index: l.Index, device: l.Name}, false)
		}
		if len(w.Wires) == 0 {
			continue
		}
		err := r.inside[i].filter.commit(&b, 0)
		if err != nil && !outer[i] {
			return fmt.Errorf("inside the namespace: %w", err)
		}
		if err != nil {
			r.open = append(r.open, alone[i]...)
		}
	}
	return nil
}

// verify makes sure that the devices that the chains were given by name are the
// links that were meant.
func (r *reached) verify() error {
	for _, w := range r.wired {
		for _, l := range w.Wires {
			if l.Peer == 0 {
				continue
			}
			now, err := r.host.route.link(l.Peer)
			if err != nil {
				return err
			}
			if now.Name != l.PeerName {
				return fmt.Errorf("link %d was renamed from %s to %s meanwhile; try again", l.Peer, l.PeerName, now.Name)
			}
		}
	}
	return nil
}

// keeping is what is kept in force.
type keeping struct {
	oneWay bool
	chains func(index int) []string // the one for what leaves the pod first
	add    func(*batch, hook)
	whole  func(*reached) (bool, error) // asked besides, if not nil
}

// keepAll is keep for each of the namespaces; those that were made inside the
// pod may end before it.
func (n *Node) keepAll(ctx context.Context, wired []Wired, k keeping) (restored bool, err error) {
	gone := 0
	for i := range wired {
		again, err := n.keep(ctx, &wired[i], k)
		switch {
		case errors.Is(err, ErrGone):
			gone++
		case err != nil:
			return restored, err
		}
		restored = restored || again
	}
	if gone == len(wired) {
		return false, fmt.Errorf("the pod's network: %w", ErrGone)
	}
	return restored, nil
}

// keep puts in force again what is missing in one namespace and on its links.
func (n *Node) keep(ctx context.Context, w *Wired, k keeping) (restored bool, err error) {
	net, err := n.findNetwork(ctx, w.Inode, w.Cookie, w.PID)
	if err != nil {
		return false, err
	}
	defer net.Close()
	reserved, err := n.reserved()
	if err != nil {
		return false, err
	}
	if slices.Contains(reserved, net.String()) {
		return false, ErrHostNetwork
	}
	err = n.reachNetworks(ctx, []*Network{net}, 0, func(r *reached) error {
		there := map[*side][]string{}
		for _, s := range []*side{r.host, r.inside[0]} {
			if there[s], err = s.filter.chains(); err != nil {
				return err
			}
		}
		for _, l := range r.wired[0].Wires {
			ends := map[*side]int{r.inside[0]: l.Index}
			if l.Peer != 0 {
				ends[r.host] = l.Peer
			}
			for s, index := range ends {
				for i, name := range k.chains(index) {
					// The egress chain: the second on the host, the first inside.
					if k.oneWay && (i == 1) == (s == r.host) {
						continue
					}
					restored = restored || !slices.Contains(there[s], name)
				}
			}
		}
		*w = r.wired[0]
		if k.whole != nil && !restored {
			whole, err := k.whole(r)
			if err != nil {
				return err
			}
			restored = !whole
		}
		// Also where nothing is missing: somebody may have emptied a chain.
		return r.apply(k.oneWay, k.add)
	})
	return restored, err
}

// removal is what goes from a ruleset.
type removal struct {
	chain    func(name string) bool
	set      func(name string) bool
	elements map[string]netip.Addr // by set
}

// lift removes from the host and from the namespaces what decide says, which it
// says on the ruleset as it is, and with it what links that are gone left behind.
func (n *Node) lift(ctx context.Context, wired []Wired, decide func(filter) (*removal, error)) (lifted bool, err error) {
	host, err := n.HostNetwork()
	if err != nil {
		return false, err
	}
	defer host.Close()
	s, err := host.side(ctx, true)
	if err != nil {
		return false, err
	}
	defer s.Close()
	if lifted, err = s.remove(ctx, decide); err != nil {
		return false, err
	}
	gone := 0
	var errs error
	for _, w := range wired {
		again, err := n.liftInside(ctx, w, decide)
		switch {
		case errors.Is(err, ErrGone):
			gone++
		case err != nil:
			errs = errors.Join(errs, err)
		}
		lifted = lifted || again
	}
	if errs == nil && gone == len(wired) && !lifted {
		return false, fmt.Errorf("the pod's network: %w", ErrGone)
	}
	return lifted, errs
}

func (n *Node) liftInside(ctx context.Context, w Wired, decide func(filter) (*removal, error)) (bool, error) {
	net, err := n.findNetwork(ctx, w.Inode, w.Cookie, w.PID)
	if err != nil {
		return false, err
	}
	defer net.Close()
	s, err := net.side(ctx, false)
	if err != nil {
		return false, err
	}
	defer s.Close()
	return s.remove(ctx, decide)
}

// remove makes the removal and takes stoop's table away when it is the last of
// it. It decides anew when another changes the ruleset in between.
func (s *side) remove(ctx context.Context, decide func(filter) (*removal, error)) (did bool, err error) {
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		did, err = s.tryRemove(decide)
		if !errors.Is(err, errRaced) {
			return did, err
		}
	}
}

func (s *side) tryRemove(decide func(filter) (*removal, error)) (did bool, err error) {
	generation, err := s.filter.generation()
	if err != nil {
		return false, err
	}
	chains, err := s.filter.chains()
	if err != nil {
		return false, err
	}
	sets, err := s.filter.sets()
	if err != nil || len(chains)+len(sets) == 0 {
		return false, err
	}
	rm, err := decide(s.filter)
	if err != nil {
		return false, err
	}
	stale, err := s.stale(append(slices.Clone(chains), sets...))
	if err != nil {
		return false, err
	}
	var b batch
	left := 0
	for set, a := range rm.elements {
		if stale[indexOf(set)] || rm.set(set) {
			did = true
			continue // the set goes as a whole
		}
		did = true
		b.deleteElement(set, a)
	}
	// Chains before the sets that their rules look into.
	for _, name := range chains {
		switch {
		case rm.chain(name):
			// Chains without elements that they look for are no block.
			did = did || rm.elements == nil
			b.deleteChain(name)
		case stale[indexOf(name)]:
			b.deleteChain(name)
		default:
			left++
		}
	}
	for _, name := range sets {
		if stale[indexOf(name)] || rm.set != nil && rm.set(name) {
			b.deleteSet(name)
		} else {
			left++
		}
	}
	if left == 0 {
		b.deleteTable()
	}
	return did, s.filter.commit(&b, generation)
}

// stale are the indexes, among those of the names, that no link has any more.
func (s *side) stale(names []string) (map[int]bool, error) {
	stale := map[int]bool{}
	for _, name := range names {
		index := indexOf(name)
		if _, seen := stale[index]; seen || index == 0 {
			continue
		}
		_, err := s.route.link(index)
		if err != nil && !errors.Is(err, ErrGone) {
			return nil, err
		}
		stale[index] = err != nil
	}
	return stale, nil
}

// Sweep removes what links that are gone left behind on the host. It harms
// nobody before that (see addChain), so nothing waits for it.
func (n *Node) Sweep(ctx context.Context) error {
	_, err := n.lift(ctx, nil, func(filter) (*removal, error) {
		return &removal{chain: func(string) bool { return false }}, nil
	})
	if errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// validID keeps ids to what can stand in a chain's name and be found again.
func validID(id string) bool {
	for _, r := range id {
		if (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '.' {
			return false
		}
	}
	return id != "" && len(id) <= 64
}
