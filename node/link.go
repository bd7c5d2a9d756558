package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network interface.
type Link struct {
	Index    int
	Name     string
	Kind     string // "veth", "macvlan", …; "" for a real device
	Loopback bool
	// Peer is the index of the link that it hangs on: of a veth its other end, of
	// a macvlan the device below; 0: none. PeerNamespace is how its own namespace
	// numbers the one where that is; -1: its own.
	Peer          int
	PeerNamespace int
}

// route talks to rtnetlink in one namespace.
type route struct{ *netlink.Conn }

// links are all links of the namespace.
func (r route) links() ([]Link, error) {
	replies, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfInfomsg),
	})
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var links []Link
	for _, m := range replies {
		l, err := linkOf(m)
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		links = append(links, l)
	}
	return links, nil
}

// link is the one with the index; [ErrGone] when there is none.
func (r route) link(index int) (Link, error) {
	req := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(req[4:], uint32(index))
	replies, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request},
		Data:   req,
	})
	switch {
	case errors.Is(err, unix.ENODEV):
		return Link{}, fmt.Errorf("link %d: %w", index, ErrGone)
	case err != nil:
		return Link{}, fmt.Errorf("link %d: %w", index, err)
	case len(replies) != 1:
		return Link{}, fmt.Errorf("link %d: %d answers", index, len(replies))
	}
	return linkOf(replies[0])
}

func linkOf(m netlink.Message) (Link, error) {
	if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
		return Link{}, fmt.Errorf("an answer of type %d and %d bytes", m.Header.Type, len(m.Data))
	}
	l := Link{
		Index:         int(int32(binary.NativeEndian.Uint32(m.Data[4:]))),
		Loopback:      binary.NativeEndian.Uint32(m.Data[8:])&unix.IFF_LOOPBACK != 0,
		PeerNamespace: -1,
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return Link{}, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_IFNAME:
			l.Name = ad.String()
		case unix.IFLA_LINK:
			l.Peer = int(ad.Uint32())
		case unix.IFLA_LINK_NETNSID:
			l.PeerNamespace = int(ad.Int32())
		case unix.IFLA_LINKINFO:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.IFLA_INFO_KIND {
						l.Kind = ad.String()
					}
				}
				return nil
			})
		}
	}
	return l, ad.Err()
}

// numberOf is how this namespace numbers the other; -1: not at all, so that no
// link of the one has its other end in the other.
func (r route) numberOf(w *Network) (int, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(unix.NETNSA_FD, uint32(w.file.Fd()))
	attrs, err := ae.Encode()
	if err != nil {
		return -1, err
	}
	replies, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNSID, Flags: netlink.Request},
		Data:   append(make([]byte, unix.SizeofRtGenmsg+3), attrs...), // padded to 4 bytes
	})
	if err != nil {
		return -1, fmt.Errorf("number of a namespace: %w", err)
	}
	for _, m := range replies {
		ad, err := netlink.NewAttributeDecoder(m.Data[min(len(m.Data), unix.SizeofRtGenmsg+3):])
		if err != nil {
			return -1, err
		}
		for ad.Next() {
			if ad.Type() == unix.NETNSA_NSID {
				return int(ad.Int32()), nil
			}
		}
	}
	return -1, nil
}

// addresses are those of all links of the namespace.
func (r route) addresses() ([]netip.Addr, error) {
	replies, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETADDR, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfAddrmsg),
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var all []netip.Addr
	for _, m := range replies {
		if m.Header.Type != unix.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfAddrmsg:])
		if err != nil {
			return nil, err
		}
		for ad.Next() {
			// IFA_LOCAL is the own end of a point-to-point link.
			if t := ad.Type(); t == unix.IFA_ADDRESS || t == unix.IFA_LOCAL {
				if a, ok := netip.AddrFromSlice(ad.Bytes()); ok {
					all = append(all, a.Unmap())
				}
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Addresses are the node's own: those of every link of the host.
func (n *Node) Addresses(ctx context.Context) ([]netip.Addr, error) {
	host, err := n.HostNetwork()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	s, err := host.open(ctx, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("the node's addresses: %w", err)
	}
	defer s.Close()
	return route{s[unix.NETLINK_ROUTE]}.addresses()
}

// peerOf is the host's end of a pod's link, and whether it has one. It is
// believed only when the other end points back: indexes mean nothing outside
// their own namespace. podInHost is how the host numbers the pod's namespace,
// hostInPod the other way.
func peerOf(l Link, host route, podInHost, hostInPod int) (Link, bool, error) {
	if l.Kind != "veth" || l.Peer == 0 || hostInPod < 0 || podInHost < 0 || l.PeerNamespace != hostInPod {
		return Link{}, false, nil
	}
	peer, err := host.link(l.Peer)
	if errors.Is(err, ErrGone) {
		return Link{}, false, nil
	}
	if err != nil {
		return Link{}, false, err
	}
	if peer.Kind != "veth" || peer.Peer != l.Index || peer.PeerNamespace != podInHost {
		return Link{}, false, nil
	}
	return peer, true, nil
}
