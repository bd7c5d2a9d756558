package nodetest

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Cable is a pair of veths: one end on the host, the other in a namespace.
type Cable struct {
	Host, Inside           netip.Addr // IPv4, in a network of their own
	Host6, Inside6         netip.Addr // IPv6; invalid where the machine has none
	HostName, InsideName   string
	HostIndex, InsideIndex int
}

// Veth connects a namespace with the one that the test runs in, as network
// plugins do: both ends are up and have an address. insideName is the name
// there. It goes when the test ends.
func Veth(t testing.TB, inside *Network, insideName string) *Cable {
	t.Helper()
	return veth(t, nil, inside, insideName, "")
}

// VethNamed is Veth with a name for the host's end.
func VethNamed(t testing.TB, inside *Network, insideName, hostName string) *Cable {
	t.Helper()
	return veth(t, nil, inside, insideName, hostName)
}

// VethBetween is Veth with another namespace in the host's place.
func VethBetween(t testing.TB, host, inside *Network, insideName string) *Cable {
	t.Helper()
	return veth(t, host, inside, insideName, "")
}

func veth(t testing.TB, host, inside *Network, insideName, hostName string) *Cable {
	t.Helper()
	Root(t)
	var b [6]byte
	var hostAddr, insideAddr [4]byte
	for {
		_, _ = rand.Read(b[:])
		hostAddr = [4]byte{198, 18 | b[0]&1, b[1], b[2] &^ 3}
		insideAddr = hostAddr
		hostAddr[3]++
		insideAddr[3] += 2
		if host != nil || !taken(t, hostAddr) {
			break
		}
	}
	if hostName == "" {
		hostName = "st" + hex.EncodeToString(b[1:])
	}
	c := &Cable{
		Host: netip.AddrFrom4(hostAddr), Inside: netip.AddrFrom4(insideAddr),
		HostName: hostName, InsideName: insideName,
	}
	h := Dial(t, host)
	defer h.Close()
	if err := h.Change(unix.RTM_NEWLINK, netlink.Create|netlink.Excl, ifinfo(0, 0), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, c.HostName)
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, "veth")
			ae.Nested(unix.IFLA_INFO_DATA, func(ae *netlink.AttributeEncoder) error {
				const vethInfoPeer = 1
				ae.Do(vethInfoPeer, func() ([]byte, error) {
					pe := netlink.NewAttributeEncoder()
					pe.String(unix.IFLA_IFNAME, insideName)
					pe.Uint32(unix.IFLA_NET_NS_FD, uint32(inside.File.Fd()))
					attrs, err := pe.Encode()
					return append(ifinfo(0, 0), attrs...), err
				})
				return nil
			})
			return nil
		})
	}); err != nil {
		Missing(t, "veth links: %v", err)
	}
	c.HostIndex = h.Up(t, c.HostName, c.Host)
	if host == nil {
		t.Cleanup(func() {
			r := Dial(t, nil)
			defer r.Close()
			// Gone with the namespace, mostly.
			_ = r.Change(unix.RTM_DELLINK, 0, ifinfo(c.HostIndex, 0), func(*netlink.AttributeEncoder) {})
		})
	}
	in := Dial(t, inside)
	defer in.Close()
	c.InsideIndex = in.Up(t, insideName, c.Inside)
	in.Route(t, c.Host)
	host6, inside6 := [16]byte{0xfd, 0x57, b[1], b[2], b[3], b[4], 15: 1}, [16]byte{0xfd, 0x57, b[1], b[2], b[3], b[4], 15: 2}
	if h.address(c.HostIndex, netip.AddrFrom16(host6), 64) == nil && in.address(c.InsideIndex, netip.AddrFrom16(inside6), 64) == nil {
		c.Host6, c.Inside6 = netip.AddrFrom16(host6), netip.AddrFrom16(inside6)
	}
	// Packets are dropped until the kernel has noticed that both ends are up,
	// which takes it up to a second.
	h.waitUp(t, c.HostIndex)
	in.waitUp(t, c.InsideIndex)
	return c
}

// taken reports whether the machine has the address already: among some hundred
// random ones two may well be the same.
func taken(t testing.TB, a [4]byte) bool {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(all, func(have net.Addr) bool {
		network, ok := have.(*net.IPNet)
		return ok && network.IP.Equal(net.IP(a[:]))
	})
}

func (r Rtnetlink) waitUp(t testing.TB, index int) {
	t.Helper()
	Wait(t, fmt.Sprintf("link %d to be up", index), func() bool {
		replies, err := r.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request},
			Data:   ifinfo(index, 0),
		})
		if err != nil || len(replies) == 0 {
			return false
		}
		ad, err := netlink.NewAttributeDecoder(replies[0].Data[unix.SizeofIfInfomsg:])
		if err != nil {
			return false
		}
		for ad.Next() {
			const up = 6
			if ad.Type() == unix.IFLA_OPERSTATE {
				return ad.Uint8() == up
			}
		}
		return false
	})
}

// Bridge connects two namespaces through a bridge on the host that has no address
// of its own, as many network plugins do: remote is no address of the node's.
func Bridge(t testing.TB, inside, remote *Network) (in, out *Cable) {
	t.Helper()
	in, out = Veth(t, inside, "eth0"), Veth(t, remote, "eth0")
	r := Dial(t, nil)
	defer r.Close()
	name := "br" + out.HostName[2:]
	if err := r.Change(unix.RTM_NEWLINK, netlink.Create|netlink.Excl, ifinfo(0, 0), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, name)
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, "bridge")
			return nil
		})
	}); err != nil {
		Missing(t, "bridges: %v", err)
	}
	index := r.Up(t, name, netip.Addr{})
	t.Cleanup(func() {
		r := Dial(t, nil)
		defer r.Close()
		DeleteLink(t, r, index)
	})
	for _, c := range []*Cable{in, out} {
		if err := r.Change(unix.RTM_NEWLINK, 0, ifinfo(c.HostIndex, 0), func(ae *netlink.AttributeEncoder) {
			ae.Uint32(unix.IFLA_MASTER, uint32(index))
		}); err != nil {
			t.Fatalf("put %s into %s: %v", c.HostName, name, err)
		}
	}
	// The remote one takes the address that the host had.
	if err := r.removeAddress(in.HostIndex, in.Host, 30); err != nil {
		t.Fatal(err)
	}
	q := Dial(t, remote)
	defer q.Close()
	if err := q.address(out.InsideIndex, in.Host, 30); err != nil {
		t.Fatal(err)
	}
	r.waitUp(t, index)
	return in, out
}

func (r Rtnetlink) removeAddress(index int, a netip.Addr, bits byte) error {
	addr := make([]byte, unix.SizeofIfAddrmsg)
	addr[0], addr[1] = unix.AF_INET, bits
	binary.NativeEndian.PutUint32(addr[4:], uint32(index))
	return r.Change(unix.RTM_DELADDR, 0, addr, func(ae *netlink.AttributeEncoder) {
		ae.Bytes(unix.IFA_LOCAL, a.AsSlice())
	})
}

// AddLinkOn makes a link of a kind on top of another, which is in the namespace
// that this one knows by the number.
func (r Rtnetlink) AddLinkOn(kind, name string, lower, number int) error {
	return r.Change(unix.RTM_NEWLINK, netlink.Create|netlink.Excl, ifinfo(0, unix.IFF_UP), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, name)
		ae.Uint32(unix.IFLA_LINK, uint32(lower))
		ae.Uint32(unix.IFLA_LINK_NETNSID, uint32(number))
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, kind)
			return nil
		})
	})
}

// DeleteLink removes a link, and its other end with it.
func DeleteLink(t testing.TB, r Rtnetlink, index int) {
	t.Helper()
	if err := r.Change(unix.RTM_DELLINK, 0, ifinfo(index, 0), func(*netlink.AttributeEncoder) {}); err != nil {
		t.Fatalf("delete link %d: %v", index, err)
	}
}

// Rtnetlink is a socket for links and addresses of one namespace.
type Rtnetlink struct{ *netlink.Conn }

// Dial opens it in a namespace; nil is the test's own.
func Dial(t testing.TB, in *Network) Rtnetlink {
	t.Helper()
	var c *netlink.Conn
	dial := func() (err error) {
		c, err = netlink.Dial(unix.NETLINK_ROUTE, nil)
		return err
	}
	if in != nil {
		in.Do(t, dial)
	} else if err := dial(); err != nil {
		t.Fatal(err)
	}
	return Rtnetlink{c}
}

// Change sends one request and waits until it is done.
func (r Rtnetlink) Change(kind netlink.HeaderType, flags netlink.HeaderFlags, head []byte, attrs func(*netlink.AttributeEncoder)) error {
	ae := netlink.NewAttributeEncoder()
	attrs(ae)
	b, err := ae.Encode()
	if err != nil {
		return err
	}
	_, err = r.Execute(netlink.Message{
		Header: netlink.Header{Type: kind, Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   append(head, b...),
	})
	return err
}

// Up switches a link on, gives it an address, if valid, with 30 bits of network
// and returns its index.
func (r Rtnetlink) Up(t testing.TB, name string, a netip.Addr) int {
	t.Helper()
	index, err := r.Index(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Change(unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP), func(*netlink.AttributeEncoder) {}); err != nil {
		t.Fatalf("switch %s on: %v", name, err)
	}
	if a.IsValid() {
		if err := r.address(index, a, 30); err != nil {
			t.Fatalf("address of %s: %v", name, err)
		}
	}
	return index
}

func (r Rtnetlink) address(index int, a netip.Addr, bits byte) error {
	addr := make([]byte, unix.SizeofIfAddrmsg)
	addr[0], addr[1] = unix.AF_INET, bits
	if a.Is6() {
		// No time is lost with looking for others that have it.
		addr[0], addr[2] = unix.AF_INET6, unix.IFA_F_NODAD
	}
	binary.NativeEndian.PutUint32(addr[4:], uint32(index))
	return r.Change(unix.RTM_NEWADDR, netlink.Create|netlink.Replace, addr, func(ae *netlink.AttributeEncoder) {
		ae.Bytes(unix.IFA_LOCAL, a.AsSlice())
		ae.Bytes(unix.IFA_ADDRESS, a.AsSlice())
	})
}

// Route sends all else by way of a neighbour.
func (r Rtnetlink) Route(t testing.TB, gateway netip.Addr) {
	t.Helper()
	route := make([]byte, unix.SizeofRtMsg)
	route[0], route[4], route[5], route[7] = unix.AF_INET, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RTN_UNICAST
	if err := r.Change(unix.RTM_NEWROUTE, netlink.Create|netlink.Replace, route, func(ae *netlink.AttributeEncoder) {
		ae.Bytes(unix.RTA_GATEWAY, gateway.AsSlice())
	}); err != nil {
		t.Fatalf("route: %v", err)
	}
}

// Index is a link's, by its name.
func (r Rtnetlink) Index(name string) (int, error) {
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.IFLA_IFNAME, name)
	b, err := ae.Encode()
	if err != nil {
		return 0, err
	}
	replies, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request},
		Data:   append(ifinfo(0, 0), b...),
	})
	if err != nil || len(replies) == 0 || len(replies[0].Data) < 8 {
		return 0, fmt.Errorf("link %s: %w", name, err)
	}
	return int(binary.NativeEndian.Uint32(replies[0].Data[4:])), nil
}

// ifinfo is the head of a request about a link: its index, and flags to set.
func ifinfo(index, flags int) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], uint32(flags))
	binary.NativeEndian.PutUint32(b[12:], uint32(flags))
	return b
}

// aside runs f in a thread of its own that is thrown away afterwards, and that
// is not the process's first: that one can't be, and what it is turned into is
// what the process looks like from outside.
func aside(f func()) {
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			done := make(chan struct{})
			aside(func() {
				f()
				close(done)
			})
			<-done
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
}
