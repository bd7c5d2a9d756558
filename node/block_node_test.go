package node

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/node/nodetest"
)

func nodeBlocked(t *testing.T, n *Node, a netip.Addr, ttl time.Duration) *NodeBlock {
	t.Helper()
	k, err := n.BlockOnNode(soon(t), a, ttl, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := n.UnblockOnNode(ctx, k); err != nil {
			t.Errorf("unblock: %v", err)
		}
	})
	return k
}

// An address is blocked for every pod and for the node itself, and no other is.
func TestBlockOnTheNode(t *testing.T) {
	n := New(Config{})
	p, other := newPod(t), newPod(t)
	s, others := p.stream(t), other.stream(t)
	k := nodeBlocked(t, n, p.cable.Host, time.Hour)
	nodetest.Wait(t, "the stream to stop", func() bool { return !s.flows(100 * time.Millisecond) })
	if p.datagram(t) {
		t.Error("a datagram reached the blocked address")
	}
	if !others.flows(5*time.Second) || !other.datagram(t) {
		t.Error("another address can't be reached")
	}
	// What the node itself sends, and what comes from there.
	inside := nodeBlocked(t, n, other.cable.Inside, time.Hour)
	c, err := net.Dial("udp", netip.AddrPortFrom(other.cable.Inside, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); !errors.Is(err, unix.EPERM) {
		t.Errorf("the node sends to the blocked address: error %v", err)
	}
	if other.datagram(t) {
		t.Error("a datagram came from the blocked address")
	}
	if _, err := n.BlockOnNode(soon(t), p.cable.Host, time.Hour, false); !errors.Is(err, ErrBlocked) {
		t.Errorf("blocked once more: %v", err)
	}
	if _, err := n.BlockOnNode(soon(t), p.cable.Host, time.Hour, true); err != nil {
		t.Errorf("the same step once more: %v", err)
	}
	if lifted, err := n.UnblockOnNode(soon(t), inside); err != nil || !lifted {
		t.Errorf("unblock: %t, %v", lifted, err)
	}
	if !other.datagram(t) {
		t.Error("it is blocked still")
	}
	if p.datagram(t) {
		t.Error("lifting one address lifted another")
	}
	if restored, err := n.KeepNodeBlock(soon(t), k); err != nil || restored {
		t.Errorf("keep of what is there: %t, %v", restored, err)
	}
	if lifted, err := n.UnblockOnNode(soon(t), k); err != nil || !lifted {
		t.Fatalf("unblock: %t, %v", lifted, err)
	}
	if !s.flows(10 * time.Second) {
		t.Error("the stream did not come back")
	}
	if lifted, err := n.UnblockOnNode(soon(t), k); err != nil || lifted {
		t.Errorf("unblock once more: %t, %v", lifted, err)
	}
	if restored, err := n.KeepNodeBlock(soon(t), k); err != nil || !restored {
		t.Errorf("keep of what is missing: %t, %v", restored, err)
	}
	if p.datagram(t) {
		t.Error("a datagram reached the address after the block was put back")
	}
}

func TestBlockOnTheNodeOverIPv6(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	if !p.cable.Host6.IsValid() {
		nodetest.Missing(t, "IPv6")
	}
	nodeBlocked(t, n, p.cable.Host6, time.Hour)
	if p.datagram6(t) {
		t.Error("a datagram reached the blocked address")
	}
	if !p.datagram(t) {
		t.Error("another address can't be reached")
	}
}

// The kernel ends it by itself, and nothing of it stays in the way afterwards.
func TestTheKernelLiftsABlockOfTheNode(t *testing.T) {
	n := New(Config{})
	p := newPod(t)
	k := nodeBlocked(t, n, p.cable.Host, 400*time.Millisecond)
	if p.datagram(t) {
		t.Error("a datagram reached the blocked address")
	}
	nodetest.Wait(t, "the block to end", func() bool { return p.datagram(t) })
	if lifted, err := n.UnblockOnNode(soon(t), k); err != nil || lifted {
		t.Errorf("unblock after its time: %t, %v", lifted, err)
	}
	if _, err := n.KeepNodeBlock(soon(t), k); !errors.Is(err, ErrGone) {
		t.Errorf("keep after its time: %v", err)
	}
	// Others may have theirs there at the same time.
	if err := n.onNode(soon(t), func(f filter) error {
		elements, err := f.elements(nodeSet(k.Address))
		if _, there := elements[k.Address]; there {
			t.Errorf("left behind: %v", elements)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
