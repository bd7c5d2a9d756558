package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
	"gopkg.in/yaml.v3"
)

// Connection is a socket that is connected, as the kernel has it.
type Connection struct {
	Protocol      string // "tcp" or "udp"
	Local, Remote netip.AddrPort
}

// States of a socket, as inet_diag numbers them; a connected UDP socket counts
// as established, one that is not as closed.
const (
	stateEstablished = 1
	stateSynSent     = 2
	stateClose       = 7
	stateListen      = 10
)

// diag talks to sock_diag in one namespace.
type diag struct{ *netlink.Conn }

// sockets are those of the protocol in one of the states whose port, the
// remote one or else the local one, and whose remote address are these; 0 and
// the zero address are any.
func (d diag) sockets(protocol byte, states uint32, far netip.Addr, port uint16, remote bool) ([]Connection, error) {
	var all []Connection
	// A socket of IPv6 may be connected to an address of IPv4.
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, 56)
		req[0], req[1] = family, protocol
		binary.NativeEndian.PutUint32(req[4:], states)
		ae := netlink.NewAttributeEncoder()
		ae.Bytes(1, only(far, port, remote)) // INET_DIAG_REQ_BYTECODE
		attrs, err := ae.Encode()
		if err != nil {
			return nil, err
		}
		replies, err := d.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump},
			Data:   append(req, attrs...),
		})
		if errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("list sockets: %w (the kernel lacks tcp_diag or udp_diag)", err)
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		for _, m := range replies {
			if m.Header.Type != unix.SOCK_DIAG_BY_FAMILY || len(m.Data) < 72 {
				continue
			}
			all = append(all, Connection{Protocol: protocolName(protocol), Local: end(m.Data, 4, 8), Remote: end(m.Data, 6, 24)})
		}
	}
	return all, nil
}

func end(msg []byte, port, addr int) netip.AddrPort {
	size := 4
	if msg[0] == unix.AF_INET6 {
		size = 16
	}
	a, _ := netip.AddrFromSlice(msg[addr : addr+size])
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(msg[port:]))
}

func protocolName(p byte) string {
	if p == unix.IPPROTO_UDP {
		return "udp"
	}
	return "tcp"
}

// only is the program that the kernel picks the sockets by, so that those of a
// container with many don't all pass through here. It is one condition: a jump
// past the program's end says no.
func only(far netip.Addr, port uint16, remote bool) []byte {
	const localCond, remoteCond = 7, 8
	code, family := byte(localCond), byte(unix.AF_UNSPEC)
	if remote {
		code = remoteCond
	}
	var addr []byte
	if far.IsValid() {
		addr, family = far.AsSlice(), unix.AF_INET
		if far.Is6() {
			family = unix.AF_INET6
		}
	}
	anyPort := int32(-1)
	want := uint32(anyPort)
	if port != 0 {
		want = uint32(port)
	}
	size := 4 + 8 + len(addr)
	b := []byte{code, byte(size)}
	b = binary.NativeEndian.AppendUint16(b, uint16(size+4))
	b = append(b, family, byte(8*len(addr)), 0, 0)
	b = binary.NativeEndian.AppendUint32(b, want)
	return append(b, addr...)
}

// Outbound are the container's connections to an address, and port if not 0,
// that the container opened itself, by the kernel's word: a TCP connection that
// is established or asked for, from a port on which nothing listens, or a UDP
// socket that is connected. protocol is "tcp", "udp" or "" for both; local is the
// near end, where it is known. Nothing, without an error, when there is none.
func (n *Node) Outbound(ctx context.Context, c *Container, protocol string, local, remote netip.AddrPort) ([]Connection, error) {
	return n.outbound(ctx, c.ID, c.Pids, protocol, local, remote)
}

func (n *Node) outbound(ctx context.Context, name string, members func() ([]int, error), protocol string, local, remote netip.AddrPort) ([]Connection, error) {
	nets, _, err := n.networks(ctx, name, members)
	if err != nil {
		return nil, err
	}
	defer closeAll(nets)
	var all []Connection
	for _, w := range nets {
		found, err := w.outbound(ctx, protocol, local, remote)
		if err != nil {
			return nil, fmt.Errorf("connections of container %s: %w", name, err)
		}
		all = append(all, found...)
	}
	return all, nil
}

func (w *Network) outbound(ctx context.Context, protocol string, local, remote netip.AddrPort) ([]Connection, error) {
	s, err := w.open(ctx, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	d := diag{s[unix.NETLINK_SOCK_DIAG]}
	var all []Connection
	for _, p := range []struct {
		number               byte
		connected, unrelated uint32 // states: of a connection; of a server on its port
	}{
		{unix.IPPROTO_TCP, 1<<stateEstablished | 1<<stateSynSent, 1 << stateListen},
		{unix.IPPROTO_UDP, 1 << stateEstablished, 1 << stateClose},
	} {
		if protocol != "" && protocol != protocolName(p.number) {
			continue
		}
		found, err := d.sockets(p.number, p.connected, remote.Addr(), remote.Port(), true)
		if err != nil {
			if protocol == "" && p.number == unix.IPPROTO_UDP && errors.Is(err, unix.ENOENT) {
				continue
			}
			return nil, err
		}
		for _, c := range found {
			if local.Port() != 0 && c.Local.Port() != local.Port() ||
				local.Addr().IsValid() && !local.Addr().IsUnspecified() && c.Local.Addr() != local.Addr() {
				continue
			}
			servers, err := d.sockets(p.number, p.unrelated, netip.Addr{}, c.Local.Port(), false)
			if err != nil {
				return nil, err
			}
			if len(servers) == 0 {
				all = append(all, c)
			}
			if len(all) >= 16 {
				return all, nil
			}
		}
	}
	return all, nil
}

// Resolvers are the DNS servers that the node itself, its containers by the
// kubelet's word, and stoop ask. What a pod's own resolv.conf says is the pod's
// to write, and is not among them.
func (n *Node) Resolvers() []netip.Addr {
	var all []netip.Addr
	for _, path := range []string{"etc/resolv.conf", "run/systemd/resolve/resolv.conf"} {
		all = append(all, nameservers(n.hostFile(path))...)
	}
	if b, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		all = append(all, nameservers(b)...)
	}
	var kubelet struct {
		ClusterDNS []string `yaml:"clusterDNS"`
	}
	if yaml.Unmarshal(n.hostFile("var/lib/kubelet/config.yaml"), &kubelet) == nil {
		for _, s := range kubelet.ClusterDNS {
			if a, err := netip.ParseAddr(s); err == nil {
				all = append(all, a.Unmap())
			}
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

func nameservers(conf []byte) (all []netip.Addr) {
	lines := bufio.NewScanner(bytes.NewReader(conf))
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) >= 2 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil {
				all = append(all, a.Unmap().WithZone(""))
			}
		}
	}
	return all
}

// hostFile is a small file of the host's, wherever stoop runs; nil when it can't
// be read. Its symbolic links mean what they mean on the host.
func (n *Node) hostFile(path string) []byte {
	root, err := unix.Open(filepath.Join(n.procDir(), strconv.Itoa(1), "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		// Without leave to look at process 1, stoop's own, which is the host's
		// unless it runs in a container.
		if root, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return nil
		}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil
	}
	_ = f.SetReadDeadline(time.Now().Add(time.Second))
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil
	}
	return b
}
