package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/node"
	"stoop/node/nodetest"
	"stoop/param"
)

// dialled is a TCP connection from one namespace to another, which the far side
// keeps open.
func dialled(t *testing.T, from, to *nodetest.Network, addr netip.Addr) net.Conn {
	t.Helper()
	var l net.Listener
	to.Do(t, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	t.Cleanup(func() { l.Close() })
	var c net.Conn
	from.Do(t, func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); far.Close() })
	return c
}

func TestBlockAddress(t *testing.T) {
	c, remote := newNetworkedContainer(t, nodetest.Netns(t)), nodetest.Netns(t)
	in, _ := nodetest.Bridge(t, c.net, remote)
	conn := dialled(t, c.net, remote, in.Host)
	act := newAddressBlocker(Env{Local: c.node})
	line := connectionAlert(fmt.Sprintf(`,"fd.name":"%s->%s","fd.l4proto":"tcp","fd.rport":1`, conn.LocalAddr(), conn.RemoteAddr()))
	r := c.request(t, "block-address", `{"ttl":"1h"}`, line)
	if err := act.Check(soonest(t), r); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, c.net, remote, in.Host) {
		t.Fatal("the address can't be reached before: the test is worth nothing")
	}
	res, err := act.Act(soonest(t), r)
	if err != nil {
		t.Fatal(err)
	}
	if res.Nothing || res.TTL != time.Hour || res.Found["address"] != in.Host.String() || res.Found["how"] != "host-side" ||
		res.Found["connection"] != fmt.Sprintf("tcp %s->%s", conn.LocalAddr(), conn.RemoteAddr()) {
		t.Errorf("result %+v", res)
	}
	if reaches(t, c.net, remote, in.Host) {
		t.Error("the address is not blocked")
	}
	if again, err := act.Act(soonest(t), r); err != nil || !again.Nothing || again.Undo != nil {
		t.Errorf("another step for the same address: %+v, %v", again, err)
	}
	r.Resumed = true
	if again, err := act.Act(soonest(t), r); err != nil || again.Nothing || again.Undo == nil {
		t.Errorf("the same step once more: %+v, %v", again, err)
	}
	u := &UndoRequest{ID: r.Step.ID, Record: res.Undo}
	if kept, err := act.Keep(soonest(t), u); err != nil || !kept.Nothing {
		t.Errorf("keep: %+v, %v", kept, err)
	}
	if back, err := act.Undo(soonest(t), u); err != nil || back.Nothing {
		t.Fatalf("undo: %+v, %v", back, err)
	}
	nodetest.Wait(t, "the address to be reached after the undo", func() bool { return reaches(t, c.net, remote, in.Host) })
	if back, err := act.Undo(soonest(t), u); err != nil || !back.Nothing {
		t.Errorf("undo once more: %+v, %v", back, err)
	}
	if _, err := act.Undo(soonest(t), &UndoRequest{Record: json.RawMessage(strings.Replace(string(res.Undo), c.node.BootID(), "another", 1))}); !errors.Is(err, ErrGone) {
		t.Errorf("undo after a reboot: %v", err)
	}

	// What the connection's own alert can't have.
	for what, alter := range map[string]struct{ params, line string }{
		"an address that nothing is connected to": {`{}`, connectionAlert(`,"fd.name":"` + conn.LocalAddr().String() + `->203.0.113.9:443"`)},
		"a connection from outside":               {`{}`, connectionAlert(fmt.Sprintf(`,"fd.name":"%s->%s"`, conn.RemoteAddr(), conn.LocalAddr()))},
		"a protected address":                     {`{"protect":["198.18.0.0/15"]}`, line},
		"no ttl":                                  {`{"ttl":"0s"}`, line},
		"no connection":                           {`{}`, connectionAlert("")},
		"a file":                                  {`{}`, connectionAlert(`,"fd.name":"/etc/passwd"`)},
	} {
		r := c.request(t, "block-address", alter.params, alter.line)
		if err := act.Check(soonest(t), r); !as[*refusal](err) {
			t.Errorf("check of %s: %v", what, err)
		}
		if _, err := act.Act(soonest(t), r); !as[*refusal](err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The same connection where it is the API server's, or the server's address
	// is not known.
	act.server, act.resolved = in.Host.String(), time.Time{}
	if _, err := act.Act(soonest(t), c.request(t, "block-address", `{}`, line)); !as[*refusal](err) {
		t.Errorf("the API server's address: %v", err)
	}
	act.server, act.servers, act.resolved = "api.invalid", nil, time.Time{}
	act.lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no such host") }
	if _, err := act.Act(soonest(t), c.request(t, "block-address", `{}`, line)); !as[*retryable](err) {
		t.Errorf("with an API server that can't be looked up: %v", err)
	}
	act.lookup = func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{in.Host}, nil }
	if _, err := act.Act(soonest(t), c.request(t, "block-address", `{}`, line)); !as[*refusal](err) {
		t.Errorf("an API server that is known by name: %v", err)
	}
	if !reaches(t, c.net, remote, in.Host) {
		t.Error("a refused step blocked the address")
	}
}

func TestBlockAddressNeverTakesTheNodesOwn(t *testing.T) {
	c := newNetworkedContainer(t, nodetest.Netns(t))
	cable := nodetest.Veth(t, c.net, "eth0")
	l, err := net.Listen("tcp", netip.AddrPortFrom(cable.Host, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var conn net.Conn
	c.net.Do(t, func() (err error) {
		conn, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	defer conn.Close()
	act := newAddressBlocker(Env{Local: c.node})
	_, err = act.Act(soonest(t), c.request(t, "block-address", `{}`, connectionAlert(fmt.Sprintf(`,"fd.name":"%s->%s"`, conn.LocalAddr(), conn.RemoteAddr()))))
	if !as[*refusal](err) || !strings.Contains(err.Error(), "the node's own") {
		t.Errorf("the node's own address: %v", err)
	}
}

func TestBlockAddressNeverTakes(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	nodetest.Root(t)
	act := &addressBlocker{node: node.New(node.Config{})}
	for _, a := range act.node.Resolvers() {
		if err := act.mayBlock(soonest(t), a, nil); !as[*refusal](err) {
			t.Errorf("the DNS server %s: %v", a, err)
		}
	}
	for _, a := range []string{"127.0.0.1", "::1", "169.254.169.254", "fe80::1", "224.0.0.1", "ff02::1", "0.0.0.0", "0.1.2.3", "::", "255.255.255.255", "10.96.0.1", "192.0.2.7"} {
		err := act.mayBlock(soonest(t), netip.MustParseAddr(a), []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")})
		if !as[*refusal](err) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestRemoteOf(t *testing.T) {
	for fields, want := range map[string]string{
		`,"fd.name":"10.1.2.3:4000->203.0.113.9:443"`:                                     "203.0.113.9:443",
		`,"fd.name":"10.1.2.3:4000->203.0.113.9:443","fd.rip":"10.1.2.3","fd.rport":4000`: "203.0.113.9:443",
		`,"fd.name":"2001:db8::1:4000->2001:db8::2:443"`:                                  "[2001:db8::2]:443",
		`,"fd.name":"::ffff:10.1.2.3:4000->::ffff:203.0.113.9:443"`:                       "203.0.113.9:443",
		`,"fd.name":"","fd.sip":"203.0.113.9"`:                                            "203.0.113.9:0",
		`,"fd.name":"<NA>","fd.rip":"203.0.113.9","fd.rport":"443"`:                       "203.0.113.9:0",
		`,"fd.name":"x->y"`:                           "",
		`,"fd.name":"10.1.2.3:1->203.0.113.9"`:        "",
		`,"fd.name":"10.1.2.3:1->203.0.113.9:999999"`: "",
		`,"fd.rip":"10.0.0.0/8"`:                      "",
		``:                                            "",
	} {
		a, err := alert.Parse([]byte(connectionAlert(fields)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := remoteOf(a)
		if want == "" && err == nil || want != "" && (err != nil || got.addr.String() != want) {
			t.Errorf("%s: %v, %v; wanted %s", fields, got.addr, err, want)
		}
	}
	if d := param.Describe(blockAddressDefaults()); d.Fields[0].Default != "1h" || d.Fields[1].Default != "pod" {
		t.Errorf("defaults %+v", d.Fields)
	}
}

// The whole node loses an address when somebody has approved it.
func TestBlockAddressForTheNode(t *testing.T) {
	c, remote := newNetworkedContainer(t, nodetest.Netns(t)), nodetest.Netns(t)
	in, _ := nodetest.Bridge(t, c.net, remote)
	conn := dialled(t, c.net, remote, in.Host)
	act := newAddressBlocker(Env{Local: c.node})
	line := connectionAlert(fmt.Sprintf(`,"fd.name":"%s->%s","fd.l4proto":"tcp"`, conn.LocalAddr(), conn.RemoteAddr()))
	r := c.request(t, "block-address", `{"ttl":"1h","scope":"node"}`, line)
	if e := blockAddress(); !e.Approve(r.Step.Params) || e.Approve(jsonRaw(`{"ttl":"1h"}`)) {
		t.Error("a step for the node asks, and no other")
	}
	if of := act.Object(r); strings.Contains(of, r.Container.ID) {
		t.Errorf("another pod's alert would do it again: %s", of)
	}
	res, err := act.Act(soonest(t), r)
	if err != nil {
		t.Fatal(err)
	}
	u := &UndoRequest{ID: r.Step.ID, Record: res.Undo}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := act.Undo(ctx, u); err != nil {
			t.Errorf("undo: %v", err)
		}
	})
	if res.Nothing || res.TTL != time.Hour || res.Found["scope"] != "node" || res.Found["address"] != in.Host.String() {
		t.Errorf("result %+v", res)
	}
	if kept, err := act.Keep(soonest(t), u); err != nil || !kept.Nothing {
		t.Errorf("keep: %+v, %v", kept, err)
	}
	if again, err := act.Act(soonest(t), r); err != nil || !again.Nothing || again.Undo != nil {
		t.Errorf("another step for the same address: %+v, %v", again, err)
	}
	r.Resumed = true
	if again, err := act.Act(soonest(t), r); err != nil || again.Nothing || again.Undo == nil {
		t.Errorf("the same step once more: %+v, %v", again, err)
	}
	if back, err := act.Undo(soonest(t), u); err != nil || back.Nothing {
		t.Fatalf("undo: %+v, %v", back, err)
	}
	if kept, err := act.Keep(soonest(t), u); err != nil || kept.Nothing {
		t.Errorf("keep of what is missing: %+v, %v", kept, err)
	}
	// The same guards as for a pod.
	act.server, act.resolved = in.Host.String(), time.Time{}
	if _, err := act.Act(soonest(t), r); !as[*refusal](err) {
		t.Errorf("the API server's address: %v", err)
	}
}
