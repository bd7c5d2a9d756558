package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Packets is what passes a container's network from now on, as a file in pcap's
// classic format: read it to the end. What there is before it is read is held by the
// kernel, up to a limit.
type Packets struct {
	Count   int // packets that were read
	Beyond  int // further network namespaces of the container's, which are not seen
	InHost  int // processes of the container's in the host's network, which is not seen
	sock    *os.File
	filter  PacketFilter
	off     func() bool
	pending []byte
	frame   []byte
	oob     []byte
	begun   bool
}

// PacketFilter says which packets are wanted: those of any of the hosts, if there are
// any, and of any of the ports, if there are any, whichever side has them. The zero
// value wants all. Of a datagram in fragments only the first one has ports.
type PacketFilter struct {
	Hosts []netip.Prefix
	Ports []uint16
}

const (
	// packetMost is how much of a packet is read. The kernel hands over larger ones
	// than a wire would carry, before it cuts them up.
	packetMost = 256 << 10
	// packetBuffer is how much the kernel may hold that is not read yet.
	packetBuffer = 4 << 20
)

// Packets begins to record the network of a container: what the pod's containers send
// and receive, by every interface, loopback too. It ends after a time, or with ctx.
// Errors: [ErrGone], [ErrHostNetwork].
func (n *Node) Packets(ctx context.Context, c *Container, filter PacketFilter, d time.Duration) (*Packets, error) {
	nets, inHost, err := n.Networks(ctx, c)
	if err != nil {
		return nil, err
	}
	defer closeAll(nets)
	p := &Packets{
		Beyond: len(nets) - 1, InHost: inHost, filter: filter,
		frame: make([]byte, packetMost), oob: make([]byte, 256),
	}
	if err := nets[0].run(p.open); err != nil {
		return nil, fmt.Errorf("record the network of container %s: %w", c.ID, err)
	}
	if err := p.sock.SetReadDeadline(time.Now().Add(d)); err != nil {
		p.sock.Close()
		return nil, fmt.Errorf("record the network of container %s: %w", c.ID, err)
	}
	p.off = context.AfterFunc(ctx, func() { _ = p.sock.SetReadDeadline(time.Unix(1, 0)) })
	return p, nil
}

// open makes the socket: it belongs to the namespace that the thread is in, and stays
// so.
func (p *Packets) open() error {
	// SOCK_DGRAM: without the link's own header, which is another one on each kind
	// of link.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w (CAP_NET_RAW is needed)", err)
	}
	p.sock = os.NewFile(uintptr(fd), "packets")
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUF, packetBuffer},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			p.sock.Close()
			return fmt.Errorf("set up a packet socket: %w", err)
		}
	}
	// Only now do packets come: no interface 0 is all of them.
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}); err != nil {
		p.sock.Close()
		return fmt.Errorf("bind a packet socket: %w", err)
	}
	return nil
}

// htons is a number as it is on the wire, and the other way round.
func htons(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}

// Close ends the recording.
func (p *Packets) Close() error {
	p.off()
	return p.sock.Close()
}

// Dropped is how many packets the kernel had no room for, since it was asked last.
func (p *Packets) Dropped() (n int, err error) {
	conn, err := p.sock.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := conn.Control(func(fd uintptr) {
		var st *unix.TpacketStats
		if st, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			n = int(st.Drops)
		}
	})
	return n, errors.Join(err, cerr)
}

// Read reads the file; its end is the end of the recording.
func (p *Packets) Read(b []byte) (int, error) {
	if !p.begun {
		p.begun, p.pending = true, pcapHeader()
	}
	for len(p.pending) == 0 {
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, p.pending)
	p.pending = p.pending[n:]
	return n, nil
}

// next reads one packet, and keeps it if it is wanted.
func (p *Packets) next() error {
	var size, oobn int
	var from unix.Sockaddr
	conn, err := p.sock.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	err = conn.Read(func(fd uintptr) bool {
		// MSG_TRUNC: the size is that of the packet, however much fits.
		size, oobn, _, from, rerr = unix.Recvmsg(int(fd), p.frame, p.oob, unix.MSG_TRUNC)
		return !errors.Is(rerr, unix.EAGAIN)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return io.EOF
	case err != nil:
		return fmt.Errorf("read a packet: %w", err)
	case errors.Is(rerr, unix.ENETDOWN), errors.Is(rerr, unix.EINTR):
		return nil // an interface went down
	case rerr != nil:
		return fmt.Errorf("read a packet: %w", rerr)
	}
	link, ok := from.(*unix.SockaddrLinklayer)
	const loopback = 772 // ARPHRD_LOOPBACK
	// On loopback each packet is seen as it leaves and as it arrives: once is enough.
	if !ok || link.Hatype == loopback && link.Pkttype == unix.PACKET_OUTGOING {
		return nil
	}
	data := p.frame[:min(size, len(p.frame))]
	if !p.filter.wants(data, htons(link.Protocol)) {
		return nil
	}
	p.Count++
	p.pending = pcapPacket(stamp(p.oob[:oobn]), size, data, link)
	return nil
}

// stamp is when the kernel saw a packet.
func stamp(oob []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err == nil {
		for _, m := range messages {
			if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
				return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
			}
		}
	}
	return time.Now()
}

// The format: https://www.tcpdump.org/manpages/pcap-savefile.5.html, with packets as
// https://www.tcpdump.org/linktypes/LINKTYPE_LINUX_SLL.html says.
const (
	pcapMagic    = 0xa1b2c3d4 // microseconds
	pcapLinuxSLL = 113
	sllSize      = 16
)

func pcapHeader() []byte {
	b := make([]byte, 24)
	binary.LittleEndian.PutUint32(b, pcapMagic)
	binary.LittleEndian.PutUint16(b[4:], 2)
	binary.LittleEndian.PutUint16(b[6:], 4)
	binary.LittleEndian.PutUint32(b[16:], packetMost+sllSize)
	binary.LittleEndian.PutUint32(b[20:], pcapLinuxSLL)
	return b
}

func pcapPacket(at time.Time, size int, data []byte, link *unix.SockaddrLinklayer) []byte {
	const head = 16
	b := make([]byte, head+sllSize, head+sllSize+len(data))
	binary.LittleEndian.PutUint32(b, uint32(at.Unix()))
	binary.LittleEndian.PutUint32(b[4:], uint32(at.Nanosecond()/1000))
	binary.LittleEndian.PutUint32(b[8:], uint32(len(data)+sllSize))
	binary.LittleEndian.PutUint32(b[12:], uint32(size+sllSize))
	sll := b[head:]
	binary.BigEndian.PutUint16(sll, uint16(link.Pkttype))
	binary.BigEndian.PutUint16(sll[2:], link.Hatype)
	binary.BigEndian.PutUint16(sll[4:], uint16(link.Halen))
	copy(sll[6:14], link.Addr[:])
	binary.BigEndian.PutUint16(sll[14:], htons(link.Protocol))
	return append(b, data...)
}

// wants reports whether a packet of an Ethernet protocol is one of those that are
// wanted.
func (f PacketFilter) wants(data []byte, protocol uint16) bool {
	if len(f.Hosts) == 0 && len(f.Ports) == 0 {
		return true
	}
	var src, dst netip.Addr
	var transport byte
	var rest []byte
	switch {
	case protocol == unix.ETH_P_IP && len(data) >= 20:
		src, _ = netip.AddrFromSlice(data[12:16])
		dst, _ = netip.AddrFromSlice(data[16:20])
		transport = data[9]
		size := int(data[0]&0x0f) * 4
		fragment := binary.BigEndian.Uint16(data[6:]) & 0x1fff
		if size >= 20 && size <= len(data) && fragment == 0 {
			rest = data[size:]
		}
	case protocol == unix.ETH_P_IPV6 && len(data) >= 40:
		src, _ = netip.AddrFromSlice(data[8:24])
		dst, _ = netip.AddrFromSlice(data[24:40])
		transport, rest = data[6], data[40:]
	default:
		return false
	}
	of := func(a netip.Addr) bool {
		return slices.ContainsFunc(f.Hosts, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
	}
	if len(f.Hosts) > 0 && !of(src) && !of(dst) {
		return false
	}
	if len(f.Ports) == 0 {
		return true
	}
	switch transport {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_UDPLITE:
	default:
		return false
	}
	return len(rest) >= 4 && (slices.Contains(f.Ports, binary.BigEndian.Uint16(rest)) ||
		slices.Contains(f.Ports, binary.BigEndian.Uint16(rest[2:])))
}
