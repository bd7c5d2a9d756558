package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"stoop/node/nodetest"
)

// pod is a process in a network namespace of its own with a link to the host, as
// the container runtime and a network plugin make it.
type pod struct {
	net   *nodetest.Network
	cable *nodetest.Cable
	pids  []int
}

func (p *pod) members() ([]int, error) { return p.pids, nil }

func newPod(t testing.TB) *pod {
	t.Helper()
	p := &pod{net: nodetest.Netns(t)}
	p.cable = nodetest.Veth(t, p.net, "eth0")
	p.pids = []int{p.run(t, "sleep", "1000")}
	return p
}

// run starts a process in the pod's network.
func (p *pod) run(t testing.TB, name string, args ...string) int {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		nodetest.Missing(t, "%s: %v", name, err)
	}
	cmd := exec.Command(path, args...)
	nodetest.Start(t, nodetest.In{Netns: p.net}, cmd)
	return cmd.Process.Pid
}

// stream is a TCP connection from the pod to the host over which the host
// sends without a pause.
type stream struct {
	last  atomic.Int64 // when the pod got something, by the test's clock
	bytes atomic.Int64
	local netip.AddrPort
	far   netip.AddrPort
}

func (p *pod) stream(t testing.TB) *stream {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(p.cable.Host, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s := &stream{far: l.Addr().(*net.TCPAddr).AddrPort()}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		chunk := make([]byte, 512)
		for {
			if _, err := c.Write(chunk); err != nil {
				return
			}
			time.Sleep(50 * time.Microsecond)
		}
	}()
	var c net.Conn
	p.net.Do(t, func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	s.local = c.LocalAddr().(*net.TCPAddr).AddrPort()
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 64<<10)
		for {
			n, err := c.Read(b)
			if n > 0 {
				s.last.Store(time.Now().UnixNano())
				s.bytes.Add(int64(n))
			}
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { c.Close(); l.Close(); <-done })
	nodetest.Wait(t, "the stream to flow", func() bool { return s.bytes.Load() > 4096 })
	return s
}

// flows reports whether something comes within a while.
func (s *stream) flows(within time.Duration) bool {
	was := s.bytes.Load()
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s.bytes.Load() > was {
			return true
		}
	}
	return false
}

func cutID() string { return "test" + nodetest.ID()[:12] }

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// cutOff cuts the pod and makes sure that nothing of it is left on the host
// after the test.
func (p *pod) cutOff(t testing.TB, n *Node, allow ...Peer) *Cut {
	t.Helper()
	c, err := n.cut(soon(t), "test", p.members, cutID(), allow, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.forget(t, n, c)
	return c
}

func (p *pod) forget(t testing.TB, n *Node, c *Cut) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := n.Uncut(ctx, c); err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("uncut: %v", err)
		}
		for _, name := range chainsOnHost(t, n) {
			if strings.Contains(name, c.ID) {
				t.Errorf("chain %s was left behind", name)
			}
		}
	})
}

func chainsOnHost(t testing.TB, n *Node) []string {
	t.Helper()
	host, err := n.HostNetwork()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := host.side(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	names, err := s.filter.chains()
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestCutStopsAnOpenConnectionAndGivesItBack(t *testing.T) {
	n := New(Config{})
	p, other := newPod(t), newPod(t)
	s, others := p.stream(t), other.stream(t)

	called := time.Now()
	c := p.cutOff(t, n)
	returned := time.Now()
	// What was on its way when Cut returned may still be read.
	nodetest.Wait(t, "the stream to stop", func() bool { return !s.flows(100 * time.Millisecond) })
	last := time.Unix(0, s.last.Load())
	t.Logf("cut in %s, the last byte %s after the call", returned.Sub(called), last.Sub(called))
	if late := last.Sub(returned); late > 50*time.Millisecond {
		t.Errorf("a byte came %s after the cut", late)
	}
	if len(c.Wired) != 1 || len(c.Wired[0].Wires) != 1 || c.Wired[0].Wires[0].Peer != p.cable.HostIndex ||
		c.Wired[0].Wires[0].PeerName != p.cable.HostName || c.Wired[0].Wires[0].Index != p.cable.InsideIndex || len(c.Inside()) != 0 {
		t.Errorf("cut at %+v, wanted the veth %+v on the host's side", c.Wired, p.cable)
	}
	if !others.flows(5 * time.Second) {
		t.Error("the other pod was cut off too")
	}
	lifted, err := n.Uncut(soon(t), c)
	if err != nil || !lifted {
		t.Fatalf("uncut: %t, %v", lifted, err)
	}
	if !s.flows(10 * time.Second) {
		t.Error("the stream did not come back")
	}
	if lifted, err := n.Uncut(soon(t), c); err != nil || lifted {
		t.Errorf("uncut once more: %t, %v, wanted false", lifted, err)
	}
}

// datagram sends one over UDP from the pod to the host, and reports whether it
// came.
func (p *pod) datagram(t testing.TB) bool {
	t.Helper()
	return p.datagramTo(t, nil)
}

// datagramTo is datagram with another namespace at the link's other end.
func (p *pod) datagramTo(t testing.TB, host *nodetest.Network) bool {
	t.Helper()
	var l net.PacketConn
	listen := func() (err error) {
		l, err = net.ListenPacket("udp", netip.AddrPortFrom(p.cable.Host, 0).String())
		return err
	}
	if host != nil {
		host.Do(t, listen)
	} else if err := listen(); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p.net.Do(t, func() error {
		c, err := net.Dial("udp", l.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		if errors.Is(err, unix.EPERM) {
			return nil // dropped where it left
		}
		return err
	})
	l.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, _, err := l.ReadFrom(make([]byte, 100))
	return err == nil
}

// datagramIn sends one from the host to the pod, which needs no answer of the
// pod's: the neighbour is known.
func (p *pod) datagramIn(t testing.TB) bool {
	t.Helper()
	var l net.PacketConn
	p.net.Do(t, func() (err error) {
		l, err = net.ListenPacket("udp", netip.AddrPortFrom(p.cable.Inside, 0).String())
		return err
	})
	defer l.Close()
	c, err := net.Dial("udp", l.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil && !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
	l.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, _, err = l.ReadFrom(make([]byte, 100))
	return err == nil
}

// datagram6 is datagram over IPv6.
func (p *pod) datagram6(t testing.TB) bool {
	t.Helper()
	over6 := *p.cable
	over6.Host = over6.Host6
	q := *p
	q.cable = &over6
	return q.datagram(t)
}

// ping reports whether the host answers.
func (p *pod) ping(t testing.TB) bool {
	t.Helper()
	var answered bool
	p.net.Do(t, func() error {
		c, err := net.Dial("ip4:icmp", p.cable.Host.String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}); err != nil && !errors.Is(err, unix.EPERM) {
			return err
		}
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, err = c.Read(make([]byte, 100))
		answered = err == nil
		return nil
	})
	return answered
}

// sendFrame sends a frame through a packet socket.
func (p *pod) sendFrame(t testing.TB, payload []byte) {
	t.Helper()
	p.net.Do(t, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = unix.Sendto(fd, payload, 0, &unix.SockaddrLinklayer{Ifindex: p.cable.InsideIndex, Protocol: 0x0008, Halen: 6})
		if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EPERM) {
			return nil // dropped where it left
		}
		return err
	})
}

// frame is a whole Ethernet frame with a UDP datagram in it, as a packet socket
// sends it.
func (p *pod) frame(t testing.TB, to netip.AddrPort) []byte {
	t.Helper()
	mac, err := net.InterfaceByIndex(p.cable.HostIndex)
	if err != nil {
		t.Fatal(err)
	}
	src, dst := p.cable.Inside.As4(), to.Addr().As4()
	f := append([]byte{}, mac.HardwareAddr...)
	f = append(f, 2, 0, 0, 0, 0, 1, 8, 0)
	ip := []byte{0x45, 0, 0, 33, 0, 1, 0, 0, 64, 17, 0, 0}
	ip = append(append(ip, src[:]...), dst[:]...)
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	sum = sum&0xffff + sum>>16
	sum = ^(sum&0xffff + sum>>16)
	ip[10], ip[11] = byte(sum>>8), byte(sum)
	f = append(f, ip...)
	f = append(f, 0x30, 0x39, byte(to.Port()>>8), byte(to.Port()), 0, 13, 0, 0)
	return append(f, "frame"...)
}

// frameArrives sends a frame through a packet socket, and reports whether the
// host's UDP socket gets what is in it.
func (p *pod) frameArrives(t testing.TB) bool {
	t.Helper()
	l, err := net.ListenPacket("udp", netip.AddrPortFrom(p.cable.Host, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p.sendFrame(t, p.frame(t, l.LocalAddr().(*net.UDPAddr).AddrPort()))
	l.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, _, err = l.ReadFrom(make([]byte, 100))
	return err == nil
}

func TestCutDropsFramesOfPacketSockets(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	six := p.cable.Host6.IsValid()
	if !p.datagram(t) || !p.frameArrives(t) || !p.ping(t) || six && !p.datagram6(t) {
		t.Fatal("frames don't arrive before the cut: the test is worth nothing")
	}
	p.cutOff(t, n)
	if p.datagram(t) {
		t.Error("a datagram got out of the pod")
	}
	if p.frameArrives(t) {
		t.Error("a frame of a packet socket got out of the pod")
	}
	if p.ping(t) {
		t.Error("a ping was answered")
	}
	if six && p.datagram6(t) {
		t.Error("a datagram of IPv6 got out of the pod")
	}
}

// flush removes every table of the pod's namespace, as nft flush ruleset does.
func (p *pod) flush(t testing.TB) {
	t.Helper()
	s := p.side(t)
	defer s.Close()
	var b batch
	b.deleteTable()
	if err := s.filter.commit(&b, 0); err != nil {
		t.Fatalf("delete the table inside the pod: %v", err)
	}
}

func (p *pod) side(t testing.TB) *side {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	w, err := newNetwork(f, p.pids[0])
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s, err := w.side(soon(t), false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCutHoldsAgainstNetAdmin(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	s := p.stream(t)
	if !p.datagramIn(t) {
		t.Fatal("a datagram does not get in before the cut: the test is worth nothing")
	}
	p.cutOff(t, n)
	p.flush(t)
	if p.datagram(t) || p.frameArrives(t) {
		t.Error("a packet got out of a pod that deleted the tables of its own namespace")
	}
	if p.datagramIn(t) {
		t.Error("a packet got into a pod that deleted the tables of its own namespace")
	}
	nodetest.Wait(t, "the stream to stop", func() bool { return !s.flows(100 * time.Millisecond) })
}

// Whoever holds NET_ADMIN in the pod makes a link without an end on the host, and
// takes the table of stoop's name for himself: that keeps no other link open.
func TestCutHoldsAgainstATableOfTheSameName(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	in := nodetest.Dial(t, p.net)
	defer in.Close()
	if err := in.Change(unix.RTM_NEWLINK, netlink.Create|netlink.Excl, make([]byte, unix.SizeofIfInfomsg), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, "mine")
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, "bridge")
			return nil
		})
	}); err != nil {
		nodetest.Missing(t, "bridges: %v", err)
	}
	theirs := p.side(t) // the table is this socket's, as long as it is open
	defer theirs.Close()
	var b batch
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create|netlink.Excl, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, filterTable)
		const owner = 2
		ae.Uint32(unix.NFTA_TABLE_FLAGS, owner)
	})
	if err := theirs.filter.commit(&b, 0); err != nil {
		nodetest.Missing(t, "tables with an owner: %v", err)
	}
	if !p.datagram(t) || !p.datagramIn(t) {
		t.Fatal("datagrams do not pass before the cut: the test is worth nothing")
	}
	c := p.cutOff(t, n)
	if !slices.Equal(c.Open, []string{"mine"}) {
		t.Errorf("open: %q", c.Open)
	}
	if p.datagram(t) || p.datagramIn(t) || p.frameArrives(t) {
		t.Error("a packet passes")
	}
	if restored, err := n.KeepCut(soon(t), c); err != nil {
		t.Errorf("keep: %t, %v", restored, err)
	}
	if _, err := n.Uncut(soon(t), c); err != nil {
		t.Errorf("uncut: %v", err)
	}
	if !p.datagram(t) {
		t.Error("it is cut off still")
	}
}

// A pod with thousands of links is cut off the first ones as fast as any, and the
// others are named.
func TestCutOfManyLinks(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	in := nodetest.Dial(t, p.net)
	defer in.Close()
	const many = 1000
	for i := range many {
		if err := in.Change(unix.RTM_NEWLINK, netlink.Create|netlink.Excl, make([]byte, unix.SizeofIfInfomsg), func(ae *netlink.AttributeEncoder) {
			ae.String(unix.IFLA_IFNAME, fmt.Sprintf("m%d", i))
			ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
				ae.String(unix.IFLA_INFO_KIND, "bridge")
				return nil
			})
		}); err != nil {
			nodetest.Missing(t, "bridges: %v", err)
		}
	}
	c := p.cutOff(t, n)
	if len(c.Open) != many-maxInside || len(c.Wired[0].Wires) != maxInside+1 {
		t.Errorf("%d links are open, %d cut", len(c.Open), len(c.Wired[0].Wires))
	}
	if p.datagram(t) || p.datagramIn(t) {
		t.Error("a packet passes")
	}
}

// The host's end is not all there is: a network plugin may redirect packets
// before they get there.
func TestCutHoldsInsideToo(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	c := p.cutOff(t, n)
	host, err := n.HostNetwork()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	s, err := host.side(soon(t), true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.remove(soon(t), func(filter) (*removal, error) {
		return &removal{chain: func(name string) bool { return strings.Contains(name, c.ID) }}, nil
	}); err != nil {
		t.Fatal(err)
	}
	if p.datagram(t) || p.frameArrives(t) {
		t.Error("a packet got out where only the inside was left")
	}
	if p.datagramIn(t) {
		t.Error("a packet got in where only the inside was left")
	}
}

func TestCutOfALinkWithoutAPeerOnTheHost(t *testing.T) {
	n := New(Config{})
	p, q := &pod{net: nodetest.Netns(t)}, nodetest.Netns(t)
	// The other end is in a namespace that is not the host's.
	p.cable = nodetest.VethBetween(t, q, p.net, "eth0")
	p.pids = []int{p.run(t, "sleep", "1000")}
	c := p.cutOff(t, n)
	if got := c.Inside(); !slices.Equal(got, []string{"eth0"}) || c.Wired[0].Wires[0].Peer != 0 {
		t.Errorf("cut inside of %q at %+v, wanted eth0 without a peer", got, c.Wired)
	}
	if !c.NetAdmin {
		t.Error("a process with every capability does not count as one with NET_ADMIN")
	}
	if lifted, err := n.Uncut(soon(t), c); err != nil || !lifted {
		t.Fatalf("uncut: %t, %v", lifted, err)
	}
	if !p.datagramTo(t, q) {
		t.Fatal("a datagram does not arrive without the cut: the test is worth nothing")
	}
	p.cutOff(t, n)
	if p.datagramTo(t, q) {
		t.Error("a datagram got out of the pod")
	}
}

// Kernels before 5.16 have no egress hook: what leaves is dropped on the host's
// side, what comes in inside the namespace.
func TestCutWithoutEgressHooks(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	if !p.datagram(t) || !p.datagramIn(t) {
		t.Fatal("datagrams don't pass before the cut: the test is worth nothing")
	}
	c := &Cut{ID: cutID(), OneWay: true}
	p.forget(t, n, c)
	if err := n.reach(soon(t), "test", p.members, func(r *reached) error {
		c.Wired = r.wired
		return c.apply(r)
	}); err != nil {
		t.Fatal(err)
	}
	if restored, err := n.KeepCut(soon(t), c); err != nil || restored {
		t.Errorf("keep of what is there: %t, %v", restored, err)
	}
	if p.datagramIn(t) {
		t.Error("a datagram got in")
	}
	if got := c.Inside(); !slices.Equal(got, []string{"eth0"}) {
		t.Errorf("cut inside of %q, wanted eth0", got)
	}
	p.flush(t)
	if p.frameArrives(t) {
		t.Error("a frame of a packet socket got out")
	}
}

func TestCutWithoutCapability(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	p.pids = []int{p.run(t, "setpriv", "--bounding-set", "-net_admin", "sleep", "1000")}
	nodetest.Wait(t, "setpriv to have become sleep", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.pids[0]))
		return string(b) == "sleep\n"
	})
	if c := p.cutOff(t, n); c.NetAdmin {
		t.Error("a process without NET_ADMIN counts as one with it")
	}
}

func TestCutRefusesTheHostsNetwork(t *testing.T) {
	nodetest.Root(t)
	n := New(Config{})
	cmd := exec.Command("/bin/sleep", "1000")
	nodetest.Start(t, nodetest.In{}, cmd)
	members := func() ([]int, error) { return []int{cmd.Process.Pid}, nil }
	before := chainsOnHost(t, n)
	if _, err := n.cut(soon(t), "test", members, cutID(), nil, nil); !errors.Is(err, ErrHostNetwork) {
		t.Errorf("cut of a process in the host's network: %v", err)
	}
	if after := chainsOnHost(t, n); !slices.Equal(before, after) {
		t.Errorf("chains %q became %q", before, after)
	}
	// One of its processes went there: the rest is cut all the same.
	p := newPod(t)
	p.pids = append([]int{cmd.Process.Pid}, p.pids...)
	if c := p.cutOff(t, n); c.InHost != 1 || len(c.Wired) != 1 {
		t.Errorf("%d processes in the host's network, wired %+v; wanted 1 and the pod's", c.InHost, c.Wired)
	}
	// One that is gone.
	if _, err := n.cut(soon(t), "test", func() ([]int, error) { return nil, nil }, cutID(), nil, nil); !errors.Is(err, ErrGone) {
		t.Errorf("cut of a container without processes: %v", err)
	}
	bare := &pod{net: nodetest.Netns(t)}
	bare.pids = []int{bare.run(t, "sleep", "1000")}
	if _, err := n.cut(soon(t), "test", bare.members, cutID(), nil, nil); !errors.Is(err, ErrNoLink) {
		t.Errorf("cut of a container without a network: %v", err)
	}
}

func TestCutAllows(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	s := p.stream(t)
	p.cutOff(t, n, Peer{Prefix: netip.PrefixFrom(p.cable.Host, 32)})
	if !s.flows(5*time.Second) || !p.datagram(t) {
		t.Error("the allowed address can't be reached")
	}

	// A network around it, and one port of it.
	port := newPod(t)
	s, other := port.stream(t), port.stream(t)
	network := netip.PrefixFrom(port.cable.Host, 30).Masked()
	port.cutOff(t, n, Peer{Prefix: network, Port: s.far.Port()})
	nodetest.Wait(t, "the other port's stream to stop", func() bool { return !other.flows(100 * time.Millisecond) })
	if !s.flows(5 * time.Second) {
		t.Error("the allowed port can't be reached")
	}
	if port.datagram(t) {
		t.Error("a port that is not allowed was reached")
	}

	// Finding the next hop takes packets too, of which none went before.
	fresh := newPod(t)
	fresh.cutOff(t, n, Peer{Prefix: netip.PrefixFrom(fresh.cable.Host, 32)})
	if !fresh.datagram(t) {
		t.Error("the allowed address can't be reached for want of ARP")
	}
	if fresh.cable.Host6.IsValid() {
		if fresh.datagram6(t) {
			t.Error("an address of IPv6 can be reached that is not allowed")
		}
		over6 := newPod(t)
		over6.cutOff(t, n, Peer{Prefix: netip.PrefixFrom(over6.cable.Host6, 128)})
		if !over6.datagram6(t) {
			t.Error("the allowed address of IPv6 can't be reached")
		}
		if over6.datagram(t) {
			t.Error("an address of IPv4 can be reached that is not allowed")
		}
	}

	// Another address.
	elsewhere := newPod(t)
	elsewhere.cutOff(t, n, Peer{Prefix: netip.MustParsePrefix("203.0.113.0/24")}, Peer{Prefix: netip.MustParsePrefix("2001:db8::/32")})
	if elsewhere.datagram(t) {
		t.Error("an address that is not allowed was reached")
	}
}

func TestTwoCutsOfOnePod(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	s := p.stream(t)
	first := p.cutOff(t, n)
	second := p.cutOff(t, n, Peer{Prefix: netip.PrefixFrom(p.cable.Host, 32)})
	if lifted, err := n.Uncut(soon(t), second); err != nil || !lifted {
		t.Fatalf("uncut: %t, %v", lifted, err)
	}
	nodetest.Wait(t, "the stream to stop", func() bool { return !s.flows(100 * time.Millisecond) })
	if lifted, err := n.Uncut(soon(t), first); err != nil || !lifted {
		t.Fatalf("uncut: %t, %v", lifted, err)
	}
	if !s.flows(10 * time.Second) {
		t.Error("the stream did not come back")
	}
}

func TestKeepCut(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	c := p.cutOff(t, n)
	if restored, err := n.KeepCut(soon(t), c); err != nil || restored {
		t.Errorf("keep of what is there: %t, %v", restored, err)
	}
	p.flush(t)
	if _, err := n.Uncut(soon(t), c); err != nil {
		t.Fatal(err)
	}
	if restored, err := n.KeepCut(soon(t), c); err != nil || !restored {
		t.Errorf("keep of what is missing: %t, %v", restored, err)
	}
	p.flush(t)
	if p.datagram(t) {
		t.Error("a datagram got out after the cut was put back")
	}
	// A link that came later.
	nodetest.Veth(t, p.net, "eth1")
	if restored, err := n.KeepCut(soon(t), c); err != nil || !restored || len(c.Wired[0].Wires) != 2 {
		t.Errorf("keep with a new link: %t, %v, at %+v", restored, err, c.Wired)
	}
	other := *c
	other.Wired = []Wired{{Inode: 1, PID: 1}}
	if _, err := n.KeepCut(soon(t), &other); !errors.Is(err, ErrGone) {
		t.Errorf("keep of a namespace that is gone: %v", err)
	}
	other.Wired = []Wired{{Inode: c.Wired[0].Inode, Cookie: c.Wired[0].Cookie + 1, PID: p.pids[0]}}
	if _, err := n.KeepCut(soon(t), &other); !errors.Is(err, ErrGone) {
		t.Errorf("keep of a namespace whose number is used again: %v", err)
	}
}

// A container with NET_ADMIN, and nothing else, may make itself a link on top of
// one of the host's: the kernel asks for the capability over the host's namespace,
// which it holds unless the pod has a user namespace of its own. What is said of
// the cut must not hide it, and keeping the cut up covers the link, inside.
func TestCutAndALinkThatNetAdminAdds(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	c := p.cutOff(t, n)
	if !c.NetAdmin {
		t.Error("the cut does not say that the container holds NET_ADMIN")
	}
	s := p.side(t)
	defer s.Close()
	host, err := n.HostNetwork()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	number, err := s.route.numberOf(host)
	if err != nil {
		t.Fatal(err)
	}
	var made error
	p.net.Do(t, func() error {
		caps := [2]unix.CapUserData{{Effective: 1 << unix.CAP_NET_ADMIN, Permitted: 1 << unix.CAP_NET_ADMIN}}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
			return err
		}
		r, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
		if err != nil {
			return err
		}
		defer r.Close()
		made = nodetest.Rtnetlink{Conn: r}.AddLinkOn("macvlan", "mv0", p.cable.HostIndex, number)
		return nil
	})
	if made != nil {
		t.Skipf("missing here: the kernel does not let NET_ADMIN make a macvlan on a link of the host: %v", made)
	}
	if restored, err := n.KeepCut(soon(t), c); err != nil || !restored {
		t.Errorf("keep with a new link: %t, %v", restored, err)
	}
	if got := c.Inside(); !slices.Equal(got, []string{"mv0"}) {
		t.Errorf("cut inside of %q, wanted mv0", got)
	}
}

// A chain takes hold of a new device that has the name of the one before, and
// stays when its device goes: neither may do harm.
func TestWhatACutLeavesHarmsNobody(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	c := p.cutOff(t, n)
	r := nodetest.Dial(t, nil)
	defer r.Close()
	nodetest.DeleteLink(t, r, p.cable.HostIndex)

	next := &pod{net: nodetest.Netns(t)}
	next.cable = nodetest.VethNamed(t, next.net, "eth0", p.cable.HostName)
	next.pids = []int{next.run(t, "sleep", "1000")}
	t.Logf("chains that outlived their device: %v", chainsOnHost(t, n))
	if !next.datagram(t) {
		t.Error("the next pod, whose link has the name of the cut one's, is cut off")
	}
	if err := n.Sweep(soon(t)); err != nil {
		t.Fatal(err)
	}
	for _, name := range chainsOnHost(t, n) {
		if strings.Contains(name, c.ID) {
			t.Errorf("chain %s of a link that is gone was not removed", name)
		}
	}
}

func TestAThousandNamespacesLeakNothing(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	enter := func() {
		nets, _, err := n.networks(soon(t), "test", p.members)
		if err != nil {
			t.Fatal(err)
		}
		defer closeAll(nets)
		s, err := nets[0].open(soon(t), unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	count := func(what string) int {
		d, err := os.ReadDir("/proc/self/" + what)
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	for range 20 {
		enter()
	}
	// A file that nobody closes is closed when it is collected.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	threads, files := count("task"), count("fd")
	for range 1000 {
		enter()
	}
	nodetest.Wait(t, fmt.Sprintf("the threads (%d) and files (%d) to be as few as before", threads, files), func() bool {
		return count("task") <= threads+3 && count("fd") <= files
	})
	if now, _ := os.Readlink("/proc/self/ns/net"); now != own {
		t.Errorf("the process is in %s, and was in %s", now, own)
	}
	// A thread that is about to end may still be seen.
	nodetest.Wait(t, "all threads to be in the process's namespace", func() bool {
		tasks, _ := os.ReadDir("/proc/self/task")
		for _, task := range tasks {
			if now, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && now != own {
				return false
			}
		}
		return true
	})
}

// The number of a process that left the container may be another's by the time
// its namespace is opened.
func TestAProcessThatLeftTheContainer(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	asked := 0
	left := func() ([]int, error) {
		if asked++; asked > 1 {
			return nil, nil
		}
		return p.pids, nil
	}
	if nets, _, err := n.networks(soon(t), "test", left); !errors.Is(err, ErrGone) {
		closeAll(nets)
		t.Errorf("the network of a process that left: %v, %v", nets, err)
	}
}

// An index means nothing outside its own namespace.
func TestPeerPointsBack(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	s := p.side(t)
	defer s.Close()
	hostNet, err := n.HostNetwork()
	if err != nil {
		t.Fatal(err)
	}
	defer hostNet.Close()
	host, err := hostNet.side(soon(t), true)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	link, err := s.route.link(p.cable.InsideIndex)
	if err != nil {
		t.Fatal(err)
	}
	hostInPod, err := s.route.numberOf(hostNet)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := host.route.link(p.cable.HostIndex)
	if err != nil {
		t.Fatal(err)
	}
	podInHost := peer.PeerNamespace
	otherIndex, otherKind, otherSpace, none, itself := link, link, link, link, link
	otherIndex.Index++
	otherKind.Kind = "macvlan"
	otherSpace.PeerNamespace++
	none.Peer = 0
	itself.PeerNamespace = -1
	for what, c := range map[string]struct {
		link                 Link
		podInHost, hostInPod int
		want                 bool
	}{
		"the pod's own":                              {link, podInHost, hostInPod, true},
		"one whose peer points at another":           {otherIndex, podInHost, hostInPod, false},
		"one whose peer points to another namespace": {link, podInHost + 1, hostInPod, false},
		"one with its peer in another namespace":     {otherSpace, podInHost, hostInPod, false},
		"one with its peer in its own":               {itself, podInHost, hostInPod, false},
		"no veth":                                    {otherKind, podInHost, hostInPod, false},
		"one without a peer":                         {none, podInHost, hostInPod, false},
	} {
		if got, ok, err := peerOf(c.link, host.route, c.podInHost, c.hostInPod); err != nil || ok != c.want || ok && got.Name != p.cable.HostName {
			t.Errorf("%s: %+v, %t, %v; wanted %t", what, got, ok, err, c.want)
		}
	}
}

// Cuts and their undoing at once, by this process and others: none takes another's
// with it when it removes the last of the table that it saw.
func TestCutsAtOnce(t *testing.T) {
	n := New(Config{})
	pods := []*pod{newPod(t), newPod(t), newPod(t), newPod(t)}
	done := make(chan error)
	for _, p := range pods {
		go func() {
			done <- func() error {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				for range 20 {
					c, err := n.cut(ctx, "test", p.members, cutID(), nil, nil)
					if err != nil {
						return err
					}
					if restored, err := n.KeepCut(ctx, c); err != nil || restored {
						return fmt.Errorf("something of the cut was missing: %t, %w", restored, err)
					}
					if lifted, err := n.Uncut(ctx, c); err != nil || !lifted {
						return fmt.Errorf("uncut: %t, %w", lifted, err)
					}
				}
				return nil
			}()
		}()
	}
	for range pods {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// A stoop in a pod of its own reaches the host's network through process 1.
func TestCutFromAnotherNamespace(t *testing.T) {
	if os.Getenv("STOOP_TEST_CUT") != "" {
		var pid int
		if _, err := fmt.Sscan(os.Getenv("STOOP_TEST_CUT"), &pid); err != nil {
			t.Fatal(err)
		}
		n := New(Config{})
		c, err := n.cut(soon(t), "test", func() ([]int, error) { return []int{pid}, nil }, os.Getenv("STOOP_TEST_ID"), nil, nil)
		if err != nil || len(c.Inside()) != 0 {
			t.Errorf("cut inside of %v: %v", c, err)
		}
		self := func() ([]int, error) { return []int{os.Getpid()}, nil }
		if _, err := n.cut(soon(t), "test", self, cutID(), nil, nil); !errors.Is(err, ErrHostNetwork) {
			t.Errorf("cut of stoop's own network: %v", err)
		}
		host := func() ([]int, error) { return []int{os.Getppid()}, nil }
		if nets, _, err := n.networks(soon(t), "test", host); !errors.Is(err, ErrHostNetwork) {
			closeAll(nets)
			t.Errorf("the host's network, seen from another: %v", err)
		}
		return
	}
	n := New(Config{})
	p, own := newPod(t), nodetest.Netns(t)
	id := cutID()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCutFromAnotherNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("STOOP_TEST_CUT=%d", p.pids[0]), "STOOP_TEST_ID="+id)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	nodetest.Start(t, nodetest.In{Netns: own}, cmd)
	w.Close()
	said, _ := io.ReadAll(r)
	if !strings.Contains(string(said), "--- PASS") {
		t.Errorf("the child said:\n%s", said)
	}
	p.flush(t)
	if p.datagram(t) {
		t.Error("a datagram got out: the cut is not on the host's side")
	}
	p.forget(t, n, &Cut{ID: id, Wired: []Wired{{Inode: 1}}})
}

func BenchmarkCut(b *testing.B) {
	n := New(Config{})
	p := newPod(b)
	ctx := context.Background()
	took := make([]time.Duration, 0, 1024)
	for b.Loop() {
		start := time.Now()
		c, err := n.cut(ctx, "bench", p.members, "bench", nil, nil)
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
		b.StopTimer()
		if _, err := n.Uncut(ctx, c); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
