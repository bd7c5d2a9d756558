package node

import "slices"

// Live reports whether the kernel tells of new containers.
func (n *Node) Live() bool {
	n.index.mu.Lock()
	defer n.index.mu.Unlock()
	return n.index.live
}

// Walks is how often all cgroups were read.
func (n *Node) Walks() int {
	n.index.mu.Lock()
	defer n.index.mu.Unlock()
	return int(n.index.walks)
}

// Known reports whether the index has all of the containers.
func (n *Node) Known(ids ...string) bool {
	return !slices.ContainsFunc(ids, func(id string) bool {
		found, err := n.index.find(id)
		return len(found) == 0 || err != nil
	})
}

// Held runs f while the index can't change.
func (n *Node) Held(f func()) {
	n.index.mu.Lock()
	defer n.index.mu.Unlock()
	f()
}

// WithoutChildren has n find children as on a kernel without /proc/PID/task/TID/children.
func (n *Node) WithoutChildren() *Node { n.noChildren = true; return n }
