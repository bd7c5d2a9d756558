package responders

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"stoop/evidence"
	"stoop/node"
	"stoop/param"
)

func capturePackets() Entry {
	return Entry{
		Name: "capture-packets",
		Doc:  "Records what the suspect's pod sends and receives for a while, as a pcap file.",
		Notes: `The pod's network namespace is entered on the node, so nobody in the container notices,
and no program of the image is needed. All interfaces are recorded, loopback once, in the
classic pcap format with Linux cooked headers (LINKTYPE_LINUX_SLL): tcpdump -r and
Wireshark read it. A pod in the host's network is refused, for that would record the whole
node. What a container does in further network namespaces of its own is not seen; the
manifest says that there are some.

The step takes as long as duration, and the steps after it wait for that: put it last, or in
a rule of its own. Of a container that is frozen there is nothing but what others send
to it, and behind cut-network what the cut lets through: to see the attacker's traffic,
record first, and answer in another rule.

hosts and ports keep only packets of one of these hosts and one of these ports, on either
side; of a datagram in fragments only the first has ports, and what is in a tunnel is not
looked into. Past maxSize the recording ends. What the kernel had to drop since there was
too much is counted in the manifest. Packets hold what was said, passwords too where it was
not encrypted; only stoop's user (root) can read the evidence. As of all evidence, the
first cases of one container are kept (evidence.perTarget).`,
		Params:   param.Describe(capturePacketsDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedPtrace, node.NeedSysAdmin, node.NeedNetRaw},
		Kind:     Evidence,
		Object:   ContainerObject,
		Deadline: 6 * time.Minute,
		New:      func(env Env) Responder { return &packetCapturer{local: env.Local, store: env.Evidence} },
	}
}

type capturePacketsParams struct {
	Duration param.Duration `param:"duration" min:"100ms" max:"5m" doc:"How long is recorded."`
	MaxSize  param.Size     `param:"maxSize" min:"4KiB" max:"4GiB" doc:"How large the file becomes at most."`
	Hosts    []string       `param:"hosts" doc:"Addresses or networks (10.0.0.0/8); none: all."`
	Ports    []int          `param:"ports" doc:"Ports of TCP, UDP or SCTP; none: all."`
}

func capturePacketsDefaults() capturePacketsParams {
	return capturePacketsParams{Duration: param.Duration(10 * time.Second), MaxSize: 64 << 20}
}

// Validate refuses what is no address and no port.
func (p capturePacketsParams) Validate() error {
	_, err := p.filter()
	return err
}

func (p capturePacketsParams) filter() (node.PacketFilter, error) {
	var f node.PacketFilter
	for _, h := range p.Hosts {
		prefix, err := netip.ParsePrefix(h)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(h); err == nil {
				prefix, err = a.Unmap().WithZone("").Prefix(a.Unmap().BitLen())
			}
		}
		if err != nil {
			return f, fmt.Errorf("hosts: %s is no address and no network", param.Cut(h))
		}
		f.Hosts = append(f.Hosts, prefix)
	}
	for _, n := range p.Ports {
		if n < 1 || n > 65535 {
			return f, fmt.Errorf("ports: %d is no port", n)
		}
		f.Ports = append(f.Ports, uint16(n))
	}
	return f, nil
}

type packetCapturer struct {
	local *node.Node
	store *evidence.Store
}

const piecePackets = "packets.pcap"

func (c *packetCapturer) Act(ctx context.Context, r *Request) (Result, error) {
	params := capturePacketsDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	filter, err := params.filter()
	switch {
	case err != nil:
		return Result{}, Refuse("%v", err)
	case c.store == nil:
		return Result{}, Refuse("there is no evidence store")
	case r.Container == nil:
		return Result{}, errHost
	}
	kept, again, err := beginCase(ctx, c.store, r, r.Container.ID)
	if kept == nil || err != nil {
		return again, err
	}
	packets, err := c.local.Packets(ctx, r.Container, filter, time.Duration(params.Duration))
	if err != nil {
		if derr := kept.Discard(); derr != nil {
			return Result{}, derr
		}
		if errors.Is(err, node.ErrHostNetwork) {
			return Result{}, Refuse("%v: that would record the whole node", err)
		}
		return Result{}, err
	}
	defer packets.Close()
	if packets.Beyond > 0 || packets.InHost > 0 {
		kept.Note("not recorded are %d more network namespaces of the container, and the host's, in which %d of its processes are", packets.Beyond, packets.InHost)
	}
	// What there was when stoop is stopped is kept.
	p, err := kept.Add(context.WithoutCancel(ctx), piecePackets, packets, int64(params.MaxSize))
	dropped, derr := packets.Dropped()
	switch {
	case derr != nil:
		kept.Note("how many packets the kernel dropped is not known: %v", derr)
	case dropped > 0:
		kept.Note("the kernel dropped %d packets, since there were too many", dropped)
	}
	early := ctx.Err() != nil
	if early {
		kept.Note("ended before its time: %v", context.Cause(ctx))
	}
	keepAlert(ctx, kept, r)
	if cerr := kept.Close(); cerr != nil || err != nil {
		return Result{}, errors.Join(err, cerr)
	}
	res := Result{Found: foundEvidence(kept)}
	res.Found["packets"] = strconv.Itoa(packets.Count)
	res.Reason = fmt.Sprintf("packets recorded: %d in %s, %d bytes in %s", packets.Count, params.Duration, p.Size, kept.Path())
	switch {
	case p.Cut:
		res.Reason += "; ended early, for that is as much as is kept"
	case early:
		res.Reason += "; ended before its time"
	}
	if p.Error != "" {
		res.Reason += "; " + p.Error
	}
	if dropped > 0 {
		res.Reason += fmt.Sprintf("; %d more were dropped by the kernel", dropped)
	}
	return res, nil
}
