package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// filterTable is stoop's own nftables table: of the family netdev in the host's
// namespace and in those of the pods, and of the family inet in the host's for what
// the whole node is kept from. Nobody else's is ever touched.
const filterTable = "stoop"

// filter talks to nftables in one namespace. The messages are written here
// rather than by the library's connection, which has no deadlines, no way to
// commit only what was decided on the ruleset as it was read, and waits for an
// acknowledgement of each message.
type filter struct {
	*netlink.Conn
	host bool // it is the host's namespace
	inet bool // the table is of the family inet, not netdev
}

func familyOf(inet bool) uint8 {
	if inet {
		return unix.NFPROTO_INET
	}
	return unix.NFPROTO_NETDEV
}

// batch is changes that the kernel makes all at once or not at all.
type batch struct {
	inet     bool // as in filter
	messages []netlink.Message
	size     int
	err      error
}

const nftables = unix.NFNL_SUBSYS_NFTABLES << 8

func (b *batch) add(kind int, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	fill(ae)
	attrs, err := ae.Encode()
	if err != nil {
		b.err = errors.Join(b.err, err)
		return
	}
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(nftables | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{familyOf(b.inet), unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	b.size += len(attrs) + 20
}

func (b *batch) addTable() {
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, filterTable)
	})
}

func (b *batch) deleteTable() {
	b.add(unix.NFT_MSG_DELTABLE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, filterTable)
	})
}

// hook is a place on a device where packets pass.
type hook struct {
	index  int
	device string
	// ingress: what the device receives; otherwise what it is given to send.
	ingress bool
	// out: what passes there leaves the pod; otherwise it is on its way in.
	out bool
}

// addChain makes a chain at the hook, before all others there (a flowtable
// would let packets pass by those that come later), that holds these rules and
// no others.
//
// The kernel knows a chain's device by its name. A name can come to mean
// another link, that of the next pod even (Calico gives a StatefulSet's pods the
// same one each time, and since Linux 6.16 a chain takes hold of a new device of
// its name), so all rules hold only for the index, which is not used again.
func (b *batch) addChain(name string, h hook, rules ...[]expr.Any) {
	hooknum, key := uint32(unix.NF_NETDEV_EGRESS), expr.MetaKeyOIF
	if h.ingress {
		hooknum, key = unix.NF_NETDEV_INGRESS, expr.MetaKeyIIF
	}
	otherDevice := []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, uint32(h.index))},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	b.chain(name, hooknum, h.device, append([][]expr.Any{otherDevice}, rules...)...)
}

// chain makes a chain that holds these rules and no others; device is "" where the
// hook is no device's.
func (b *batch) chain(name string, hooknum uint32, device string, rules ...[]expr.Any) {
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, filterTable)
		ae.String(unix.NFTA_CHAIN_NAME, name)
		ae.Nested(unix.NFTA_CHAIN_HOOK, func(ae *netlink.AttributeEncoder) error {
			first := int32(math.MinInt32)
			ae.Uint32(unix.NFTA_HOOK_HOOKNUM, hooknum)
			ae.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(first))
			if device != "" {
				ae.String(unix.NFTA_HOOK_DEV, device)
			}
			return nil
		})
		ae.Uint32(unix.NFTA_CHAIN_POLICY, 1) // accept
		ae.String(unix.NFTA_CHAIN_TYPE, "filter")
	})
	// A rule without a handle is all of them: those of an earlier run.
	b.add(unix.NFT_MSG_DELRULE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_RULE_TABLE, filterTable)
		ae.String(unix.NFTA_RULE_CHAIN, name)
	})
	for _, rule := range rules {
		b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(ae *netlink.AttributeEncoder) {
			ae.String(unix.NFTA_RULE_TABLE, filterTable)
			ae.String(unix.NFTA_RULE_CHAIN, name)
			ae.Nested(unix.NFTA_RULE_EXPRESSIONS, func(ae *netlink.AttributeEncoder) error {
				for _, e := range rule {
					data, err := expr.Marshal(familyOf(b.inet), e)
					if err != nil {
						return err
					}
					ae.Bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, data)
				}
				return nil
			})
		})
	}
}

func (b *batch) deleteChain(name string) {
	b.add(unix.NFT_MSG_DELCHAIN, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, filterTable)
		ae.String(unix.NFTA_CHAIN_NAME, name)
	})
}

// addSet makes a set of addresses that the kernel forgets by itself.
func (b *batch) addSet(name string, v6 bool) {
	kind, size := uint32(7), uint32(4) // as nft names them: ipv4_addr
	if v6 {
		kind, size = 8, 16
	}
	b.add(unix.NFT_MSG_NEWSET, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_TABLE, filterTable)
		ae.String(unix.NFTA_SET_NAME, name)
		ae.Uint32(unix.NFTA_SET_FLAGS, unix.NFT_SET_TIMEOUT)
		ae.Uint32(unix.NFTA_SET_KEY_TYPE, kind)
		ae.Uint32(unix.NFTA_SET_KEY_LEN, size)
		ae.Uint32(unix.NFTA_SET_ID, uint32(len(b.messages)+1))
	})
}

func (b *batch) deleteSet(name string) {
	b.add(unix.NFT_MSG_DELSET, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_TABLE, filterTable)
		ae.String(unix.NFTA_SET_NAME, name)
	})
}

// addElement puts an address into a set for a while; one that is there already
// stays as it is.
func (b *batch) addElement(set string, a netip.Addr, ttl time.Duration) {
	b.element(unix.NFT_MSG_NEWSETELEM, netlink.Create, set, a, max(ttl, time.Millisecond))
}

func (b *batch) deleteElement(set string, a netip.Addr) {
	b.element(unix.NFT_MSG_DELSETELEM, 0, set, a, 0)
}

func (b *batch) element(kind int, flags netlink.HeaderFlags, set string, a netip.Addr, ttl time.Duration) {
	b.add(kind, flags, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, filterTable)
		ae.String(unix.NFTA_SET_ELEM_LIST_SET, set)
		ae.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) error {
				ae.Nested(unix.NFTA_SET_ELEM_KEY, func(ae *netlink.AttributeEncoder) error {
					ae.Bytes(unix.NFTA_DATA_VALUE, a.AsSlice())
					return nil
				})
				if ttl > 0 {
					ae.Uint64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(ttl.Milliseconds()))
				}
				return nil
			})
			return nil
		})
	})
}

// errRaced says that the ruleset changed since it was read.
var errRaced = errors.New("the packet filter was changed by another meanwhile")

// commit has the kernel make the changes. generation is the ruleset's that they
// were decided on; 0: whichever.
func (f filter) commit(b *batch, generation uint32) error {
	if b.err != nil {
		return fmt.Errorf("packet filter: %w", b.err)
	}
	if len(b.messages) == 0 {
		return nil
	}
	const bounds = 2 * 64
	if b.size+bounds > 64<<10 {
		// The whole batch has to fit into the socket's buffer.
		if err := f.SetWriteBuffer(2 * (b.size + bounds)); err != nil {
			return fmt.Errorf("packet filter: %w", err)
		}
	}
	subsystem := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	begin := netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request},
		Data:   subsystem,
	}
	if generation != 0 {
		const genid = 1 // NFNL_BATCH_GENID
		begin.Data = append(append([]byte{}, subsystem...), attribute(genid, binary.BigEndian.AppendUint32(nil, generation))...)
	}
	messages := append([]netlink.Message{begin}, b.messages...)
	// Errors come before it, in the order of the messages.
	messages[len(messages)-1].Header.Flags |= netlink.Acknowledge
	messages = append(messages, netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request},
		Data:   subsystem,
	})
	sent, err := f.SendMessages(messages)
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	last := sent[len(sent)-2].Header.Sequence
	for {
		replies, err := f.Receive()
		switch {
		case errors.Is(err, unix.ERESTART):
			return errRaced
		case err != nil:
			return fmt.Errorf("packet filter: %w", err)
		}
		for _, m := range replies {
			if m.Header.Sequence == last {
				return nil
			}
		}
	}
}

func attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	return append(b, make([]byte, -len(b)&3)...)
}

// get asks for what there is; an answer's attributes are big-endian.
func (f filter) get(kind int, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) ([]*netlink.AttributeDecoder, error) {
	b := batch{inet: f.inet}
	b.add(kind, flags, fill)
	if b.err != nil {
		return nil, b.err
	}
	replies, err := f.Execute(b.messages[0])
	if err != nil {
		return nil, err
	}
	var all []*netlink.AttributeDecoder
	for _, m := range replies {
		if len(m.Data) < 4 || m.Header.Type == netlink.Done {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, err
		}
		ad.ByteOrder = binary.BigEndian
		all = append(all, ad)
	}
	return all, nil
}

// generation is the number of the ruleset as it is now.
func (f filter) generation() (uint32, error) {
	replies, err := f.get(unix.NFT_MSG_GETGEN, 0, func(*netlink.AttributeEncoder) {})
	if err != nil {
		return 0, fmt.Errorf("packet filter: %w", err)
	}
	for _, ad := range replies {
		for ad.Next() {
			if ad.Type() == unix.NFTA_GEN_ID {
				return ad.Uint32(), nil
			}
		}
	}
	return 0, errors.New("packet filter: the kernel names no generation")
}

// chains are the names of the chains in stoop's table.
func (f filter) chains() ([]string, error) {
	return f.names("chains", unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME)
}

// sets are the names of the sets in stoop's table.
func (f filter) sets() ([]string, error) {
	return f.names("sets", unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME)
}

func (f filter) names(what string, kind int, table, name uint16) ([]string, error) {
	replies, err := f.get(kind, netlink.Dump, func(ae *netlink.AttributeEncoder) {
		ae.String(table, filterTable)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("packet filter: list %s: %w", what, err)
	}
	var names []string
	for _, ad := range replies {
		var in, is string
		for ad.Next() {
			switch ad.Type() {
			case table:
				in = ad.String()
			case name:
				is = ad.String()
			}
		}
		if err := ad.Err(); err != nil {
			return nil, fmt.Errorf("packet filter: list %s: %w", what, err)
		}
		if in == filterTable {
			names = append(names, is)
		}
	}
	return names, nil
}

// elements are the addresses in a set, and how long each stays.
func (f filter) elements(set string) (map[netip.Addr]time.Duration, error) {
	replies, err := f.get(unix.NFT_MSG_GETSETELEM, netlink.Dump, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, filterTable)
		ae.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("packet filter: list %s: %w", set, err)
	}
	all := map[netip.Addr]time.Duration{}
	for _, ad := range replies {
		for ad.Next() {
			if ad.Type() == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						ad.Nested(func(ad *netlink.AttributeDecoder) error {
							a, left := element(ad)
							all[a] = left
							return nil
						})
					}
					return nil
				})
			}
		}
		if err := ad.Err(); err != nil {
			return nil, fmt.Errorf("packet filter: list %s: %w", set, err)
		}
	}
	return all, nil
}

func element(ad *netlink.AttributeDecoder) (a netip.Addr, left time.Duration) {
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.NFTA_DATA_VALUE {
						a, _ = netip.AddrFromSlice(ad.Bytes())
					}
				}
				return nil
			})
		case unix.NFTA_SET_ELEM_EXPIRATION:
			left = time.Duration(ad.Uint64()) * time.Millisecond
		}
	}
	return a, left
}

// What rules are made of. Verdicts of a rule come last in it.

func drop() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

func rule(parts ...[]expr.Any) (all []expr.Any) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func etherType(t uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, t)},
	}
}

func layer4(protocol byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
	}
}

// farAddress loads the address of the other side: where a packet that leaves
// the pod goes, or where one comes from.
func farAddress(v6, out bool) []expr.Any {
	offset, size, kind := uint32(12), uint32(4), uint16(unix.ETH_P_IP)
	if v6 {
		offset, size, kind = 8, 16, unix.ETH_P_IPV6
	}
	if out {
		offset += size
	}
	return rule(etherType(kind), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
	})
}

func farIn(p netip.Prefix, out bool) []expr.Any {
	a := p.Masked().Addr()
	mask := make([]byte, a.BitLen()/8)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	match := farAddress(a.Is6(), out)
	if p.Bits() < a.BitLen() {
		match = append(match, &expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask)),
		})
	}
	return append(match, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()})
}

func farInSet(set string, v6, out bool) []expr.Any {
	return append(farAddress(v6, out), &expr.Lookup{SourceRegister: 1, SetName: set})
}

func farPort(port uint16, out bool) []expr.Any {
	var offset uint32
	if out {
		offset = 2
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// neighbours accepts what finding the next hop takes: neighbour solicitation
// and advertisement.
func neighbours() [][]expr.Any {
	var rules [][]expr.Any
	for _, kind := range []byte{135, 136} {
		rules = append(rules, rule(etherType(unix.ETH_P_IPV6), layer4(unix.IPPROTO_ICMPV6), []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind}},
		}, accept()))
	}
	return rules
}

// Peer is an address or a range of them, and one of its ports if not 0.
type Peer struct {
	Prefix netip.Prefix
	Port   uint16
}

// String is as it is written in rules: 10.0.0.7/32, 10.96.0.10/32:53.
func (p Peer) String() string {
	s := p.Prefix.String()
	if p.Port != 0 {
		s += fmt.Sprintf(":%d", p.Port)
	}
	return s
}

// cutRules let pass what is allowed and drop the rest, of every protocol.
func cutRules(allow []Peer, out bool) (rules [][]expr.Any) {
	var v4, v6 bool
	for _, p := range allow {
		v4, v6 = v4 || p.Prefix.Addr().Is4(), v6 || p.Prefix.Addr().Is6()
		if p.Port == 0 {
			rules = append(rules, rule(farIn(p.Prefix, out), accept()))
			continue
		}
		for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			rules = append(rules, rule(farIn(p.Prefix, out), layer4(protocol), farPort(p.Port, out), accept()))
		}
	}
	if v4 {
		rules = append(rules, rule(etherType(unix.ETH_P_ARP), accept()))
	}
	if v6 {
		rules = append(rules, neighbours()...)
	}
	return append(rules, drop())
}

// Names of chains and sets end in the index of the link that they are about, so
// that what a link left behind is found.

func cutChain(id string, index int, out bool) string {
	return fmt.Sprintf("cut-%s-%s-%d", id, direction(out), index)
}

func blockChain(index int, out bool) string {
	return fmt.Sprintf("block-%s-%d", direction(out), index)
}

func blockSet(index int, v6 bool) string {
	if v6 {
		return fmt.Sprintf("block-ipv6-%d", index)
	}
	return fmt.Sprintf("block-ipv4-%d", index)
}

func direction(out bool) string {
	if out {
		return "out"
	}
	return "in"
}

// indexOf is the link that a chain or set is about; 0: none that is stoop's.
func indexOf(name string) int {
	var index int
	_, last, ok := cutLast(name, "-")
	if !ok {
		return 0
	}
	if _, err := fmt.Sscanf(last, "%d", &index); err != nil {
		return 0
	}
	return index
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
