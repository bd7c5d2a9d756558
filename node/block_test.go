package node

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/node/nodetest"
)

func (p *pod) blocked(t testing.TB, n *Node, a netip.Addr, ttl time.Duration) *Block {
	t.Helper()
	b, err := n.block(soon(t), "test", p.members, a, ttl, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := n.Unblock(ctx, b); err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("unblock: %v", err)
		}
		for _, name := range chainsOnHost(t, n) {
			if indexOf(name) == b.Wired[0].Wires[0].Peer {
				t.Errorf("chain %s was left behind", name)
			}
		}
	})
	return b
}

func TestBlockStopsOneAddressOnly(t *testing.T) {
	n := New(Config{})
	p, other := newPod(t), newPod(t)
	s, others := p.stream(t), other.stream(t)
	b := p.blocked(t, n, p.cable.Host, time.Hour)
	nodetest.Wait(t, "the stream to stop", func() bool { return !s.flows(100 * time.Millisecond) })
	p.flush(t)
	if p.datagram(t) {
		t.Error("a datagram reached the blocked address")
	}
	if p.cable.Host6.IsValid() && !p.datagram6(t) {
		t.Error("another address can't be reached")
	}
	if !others.flows(5 * time.Second) {
		t.Error("the other pod is kept from its own address")
	}
	if _, err := n.block(soon(t), "test", p.members, p.cable.Host, time.Hour, false); !errors.Is(err, ErrBlocked) {
		t.Errorf("blocked once more: %v", err)
	}
	if _, err := n.block(soon(t), "test", p.members, p.cable.Host, time.Hour, true); err != nil {
		t.Errorf("the same step once more: %v", err)
	}
	second := p.blocked(t, n, netip.MustParseAddr("203.0.113.9"), time.Hour)
	if lifted, err := n.Unblock(soon(t), second); err != nil || !lifted {
		t.Errorf("unblock: %t, %v", lifted, err)
	}
	if p.datagram(t) {
		t.Error("lifting one address lifted another")
	}
	if restored, err := n.KeepBlock(soon(t), b); err != nil || restored {
		t.Errorf("keep of what is there: %t, %v", restored, err)
	}
	if lifted, err := n.Unblock(soon(t), b); err != nil || !lifted {
		t.Fatalf("unblock: %t, %v", lifted, err)
	}
	if !s.flows(10 * time.Second) {
		t.Error("the stream did not come back")
	}
	if lifted, err := n.Unblock(soon(t), b); err != nil || lifted {
		t.Errorf("unblock once more: %t, %v", lifted, err)
	}
	if restored, err := n.KeepBlock(soon(t), b); err != nil || !restored {
		t.Errorf("keep of what is missing: %t, %v", restored, err)
	}
	if p.datagram(t) {
		t.Error("a datagram reached the address after the block was put back")
	}
	if lifted, err := n.Unblock(soon(t), b); err != nil || !lifted {
		t.Errorf("unblock: %t, %v", lifted, err)
	}
}

func TestBlockOverIPv6(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	if !p.cable.Host6.IsValid() {
		nodetest.Missing(t, "IPv6")
	}
	p.blocked(t, n, p.cable.Host6, time.Hour)
	if p.datagram6(t) {
		t.Error("a datagram reached the blocked address")
	}
	if !p.datagram(t) {
		t.Error("another address can't be reached")
	}
}

func TestTheKernelLiftsABlock(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	b := p.blocked(t, n, p.cable.Host, 400*time.Millisecond)
	if p.datagram(t) {
		t.Error("a datagram reached the blocked address")
	}
	nodetest.Wait(t, "the block to end", func() bool { return p.datagram(t) })
	if lifted, err := n.Unblock(soon(t), b); err != nil || lifted {
		t.Errorf("unblock after its time: %t, %v", lifted, err)
	}
	for _, name := range chainsOnHost(t, n) {
		if strings.HasPrefix(name, "block-") && indexOf(name) == p.cable.HostIndex {
			t.Errorf("chain %s, which blocks nothing any more, is still there", name)
		}
	}
	if _, err := n.KeepBlock(soon(t), b); !errors.Is(err, ErrGone) {
		t.Errorf("keep after its time: %v", err)
	}
}

func TestOutbound(t *testing.T) {
	n := New(Config{})
	p, other := newPod(t), newPod(t)
	s := p.stream(t)
	is := func(what string, want bool, protocol string, local, remote netip.AddrPort) {
		t.Helper()
		got, err := n.outbound(soon(t), "test", p.members, protocol, local, remote)
		if err != nil || (len(got) > 0) != want {
			t.Errorf("%s: %v, %v; wanted one: %t", what, got, err, want)
		}
	}
	none := netip.AddrPort{}
	is("both ends", true, "tcp", s.local, s.far)
	is("the far end", true, "", none, s.far)
	is("the far address", true, "", none, netip.AddrPortFrom(s.far.Addr(), 0))
	is("another address", false, "", none, netip.MustParseAddrPort("203.0.113.9:443"))
	is("another port", false, "tcp", none, netip.AddrPortFrom(s.far.Addr(), s.far.Port()^1))
	is("another near end", false, "tcp", netip.AddrPortFrom(s.local.Addr(), s.local.Port()^1), s.far)
	is("the other way round", false, "tcp", s.far, s.local)
	is("another protocol", false, "udp", none, s.far)
	far := other.stream(t)
	is("another pod's", false, "tcp", none, far.far)

	// One that came from outside: somebody listens on its port.
	var l net.Listener
	p.net.Do(t, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(p.cable.Inside, 0).String())
		return err
	})
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	from := c.LocalAddr().(*net.TCPAddr).AddrPort()
	is("one that came from outside", false, "tcp", none, from)

	// A UDP socket is a connection when it is connected.
	var u net.Conn
	p.net.Do(t, func() (err error) {
		u, err = net.Dial("udp", netip.AddrPortFrom(p.cable.Host, 9).String())
		return err
	})
	defer u.Close()
	is("a connected UDP socket", true, "udp", none, netip.AddrPortFrom(p.cable.Host, 9))
	is("any protocol", true, "", none, netip.AddrPortFrom(p.cable.Host, 9))

	// A socket of IPv6 that is connected to an address of IPv4.
	var fd int
	p.net.Do(t, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet6{Port: 10, Addr: netip.AddrFrom16(p.cable.Host.As16()).As16()})
		}
		return err
	})
	defer unix.Close(fd)
	is("IPv4 by way of IPv6", true, "udp", none, netip.AddrPortFrom(p.cable.Host, 10))
	if p.cable.Host6.IsValid() {
		var six net.Conn
		p.net.Do(t, func() (err error) {
			six, err = net.Dial("udp", netip.AddrPortFrom(p.cable.Host6, 9).String())
			return err
		})
		defer six.Close()
		is("IPv6", true, "udp", none, netip.AddrPortFrom(p.cable.Host6, 9))
	}
}

func TestAddressesAreTheNodesOwn(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	all, err := n.Addresses(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	has := func(a netip.Addr) bool {
		for _, b := range all {
			if a == b {
				return true
			}
		}
		return false
	}
	if !has(p.cable.Host) || !has(netip.MustParseAddr("127.0.0.1")) || has(p.cable.Inside) {
		t.Errorf("the node's addresses are %v, wanted %s among them and not %s", all, p.cable.Host, p.cable.Inside)
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers([]byte("# nameserver 192.0.2.1\nsearch a b\nnameserver 10.96.0.10\nnameserver\tfe80::1%eth0\nnameserver x\nnameserver"))
	if len(got) != 2 || got[0] != netip.MustParseAddr("10.96.0.10") || got[1] != netip.MustParseAddr("fe80::1") {
		t.Errorf("nameservers %v", got)
	}
}
