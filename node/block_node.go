package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// NodeBlock is an address that the whole node is kept from, for a while: its pods
// as far as their packets pass the host's netfilter (not where a network plugin
// takes them by in programs of its own), and its own processes.
type NodeBlock struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"` // when the kernel lifts it
}

// The names of what there is in stoop's table of the family inet.
const (
	nodeSet4     = "block-ipv4"
	nodeSet6     = "block-ipv6"
	nodeChainIn  = "block-in"  // what comes from a device: from the address, or from a pod to it
	nodeChainOut = "block-out" // what the node itself sends
)

func nodeSet(a netip.Addr) string {
	if a.Is6() {
		return nodeSet6
	}
	return nodeSet4
}

// BlockOnNode drops every packet that goes to the address, or comes from it, for
// ttl, which the kernel counts. [ErrBlocked] when it is there already, unless again
// says that this is the same step once more.
func (n *Node) BlockOnNode(ctx context.Context, a netip.Addr, ttl time.Duration, again bool) (*NodeBlock, error) {
	if !a.IsValid() || ttl <= 0 {
		return nil, fmt.Errorf("block %s for %s: neither may be nothing", a, ttl)
	}
	k := &NodeBlock{Address: a.Unmap().WithZone(""), Until: time.Now().Add(ttl).UTC()}
	err := n.onNode(ctx, func(f filter) error {
		there, err := k.there(f)
		if err != nil || there && !again {
			return errors.Join(err, blocked(there))
		}
		return k.apply(f)
	})
	if err != nil {
		return nil, fmt.Errorf("block %s for the node: %w", k.Address, err)
	}
	return k, nil
}

// KeepNodeBlock makes sure that a block still holds, for what is left of its time.
// restored says that it was missing; [ErrGone] that its time is over.
func (n *Node) KeepNodeBlock(ctx context.Context, k *NodeBlock) (restored bool, err error) {
	if time.Until(k.Until) <= 0 {
		return false, fmt.Errorf("the block of %s ended at %s: %w", k.Address, k.Until.Format(time.RFC3339), ErrGone)
	}
	err = n.onNode(ctx, func(f filter) error {
		there, err := k.there(f)
		if err != nil {
			return err
		}
		restored = !there
		return k.apply(f)
	})
	if err != nil {
		return false, fmt.Errorf("keep the block of %s: %w", k.Address, err)
	}
	return restored, nil
}

// UnblockOnNode takes a block back, and nothing but it. lifted says whether there
// was anything left of it.
func (n *Node) UnblockOnNode(ctx context.Context, k *NodeBlock) (lifted bool, err error) {
	err = n.onNode(ctx, func(f filter) error {
		for {
			if err := ctx.Err(); err != nil {
				return err
			}
			lifted, err = k.lift(f)
			if !errors.Is(err, errRaced) {
				return err
			}
		}
	})
	if err != nil {
		return false, fmt.Errorf("unblock %s for the node: %w", k.Address, err)
	}
	return lifted, nil
}

// onNode opens the packet filter of the host's namespace for f.
func (n *Node) onNode(ctx context.Context, f func(filter) error) error {
	host, err := n.HostNetwork()
	if err != nil {
		return err
	}
	defer host.Close()
	s, err := host.side(ctx, true)
	if err != nil {
		return err
	}
	defer s.Close()
	s.filter.inet = true
	return f(s.filter)
}

func (k *NodeBlock) there(f filter) (bool, error) {
	elements, err := f.elements(nodeSet(k.Address))
	_, there := elements[k.Address]
	return there, err
}

// apply is idempotent.
func (k *NodeBlock) apply(f filter) error {
	b := batch{inet: true}
	b.addTable()
	b.addSet(nodeSet4, false)
	b.addSet(nodeSet6, true)
	b.chain(nodeChainIn, unix.NF_INET_PRE_ROUTING, "",
		ofNode(false, false), ofNode(false, true), ofNode(true, false), ofNode(true, true))
	b.chain(nodeChainOut, unix.NF_INET_LOCAL_OUT, "", ofNode(false, true), ofNode(true, true))
	b.addElement(nodeSet(k.Address), k.Address, time.Until(k.Until))
	return f.commit(&b, 0)
}

// ofNode drops what comes from, or goes to, an address of a set.
func ofNode(v6, to bool) []expr.Any {
	set, family, offset, size := nodeSet4, byte(unix.NFPROTO_IPV4), uint32(12), uint32(4)
	if v6 {
		set, family, offset, size = nodeSet6, unix.NFPROTO_IPV6, 8, 16
	}
	if to {
		offset += size
	}
	return rule([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Lookup{SourceRegister: 1, SetName: set},
	}, drop())
}

// lift takes the address out, and with the last one the table.
func (k *NodeBlock) lift(f filter) (lifted bool, err error) {
	generation, err := f.generation()
	if err != nil {
		return false, err
	}
	left := 0
	for _, set := range []string{nodeSet4, nodeSet6} {
		elements, err := f.elements(set)
		if err != nil {
			return false, err
		}
		if _, there := elements[k.Address]; there {
			lifted = true
			delete(elements, k.Address)
		}
		left += len(elements)
	}
	b := batch{inet: true}
	switch sets, err := f.sets(); {
	case err != nil:
		return false, err
	case len(sets) == 0:
		return false, nil // there is no table
	case left == 0:
		b.deleteTable()
	case lifted:
		b.deleteElement(nodeSet(k.Address), k.Address)
	}
	return lifted, f.commit(&b, generation)
}
