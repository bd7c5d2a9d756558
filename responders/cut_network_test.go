package responders

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/node"
	"stoop/node/nodetest"
)

// networkedContainer is a process in a container's cgroup with a network of its own.
type networkedContainer struct {
	*node.Container
	node *node.Node
	net  *nodetest.Network
}

func newNetworkedContainer(t *testing.T, network *nodetest.Network) *networkedContainer {
	t.Helper()
	nodetest.Root(t)
	cgroup := nodetest.CgroupV2(t)
	cmd := exec.Command("/bin/sleep", "1000")
	nodetest.Start(t, nodetest.In{Cgroups: []string{cgroup}, Netns: network}, cmd)
	n := node.New(node.Config{})
	c, err := n.Container(soonest(t), filepath.Base(cgroup), cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return &networkedContainer{c, n, network}
}

func soonest(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (c *networkedContainer) request(t *testing.T, responder, params, line string) *Request {
	t.Helper()
	a, err := alert.Parse([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return &Request{
		Step:  &broker.Step{ID: nodetest.ID()[:20], Action: broker.Action{Responder: responder, Params: json.RawMessage(params)}},
		Alert: a, Container: c.Container,
	}
}

func connectionAlert(fields string) string {
	return `{"hostname":"n","output":"o","priority":"Warning","rule":"Test rule","source":"syscall","tags":[],"time":"2026-01-01T00:00:00.000000000Z","output_fields":{"container.id":"0123456789ab"` + fields + `}}`
}

// reaches reports whether a datagram gets from one namespace to an address of
// another.
func reaches(t *testing.T, from, to *nodetest.Network, addr netip.Addr) bool {
	t.Helper()
	var l net.PacketConn
	to.Do(t, func() (err error) {
		l, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	defer l.Close()
	from.Do(t, func() error {
		c, err := net.Dial("udp", l.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.Write([]byte("hello"))
		return nil
	})
	l.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	_, _, err := l.ReadFrom(make([]byte, 10))
	return err == nil
}

// What is stored before the cut is enough to take it back, should stoop be killed
// right after it.
func TestCutNetworkThatACrashCutOff(t *testing.T) {
	c, remote := newNetworkedContainer(t, nodetest.Netns(t)), nodetest.Netns(t)
	in, _ := nodetest.Bridge(t, c.net, remote)
	act := cutNetwork().New(Env{Local: c.node})
	r := c.request(t, "cut-network", `{"ttl":"1h"}`, connectionAlert(""))
	var stored json.RawMessage
	r.intend = func(undo json.RawMessage, ttl time.Duration) {
		stored = undo
		if ttl != time.Hour || !reaches(t, c.net, remote, in.Host) {
			t.Errorf("ttl %s; or it is stored when it is done already", ttl)
		}
	}
	if _, err := act.Act(soonest(t), r); err != nil {
		t.Fatal(err)
	}
	if reaches(t, c.net, remote, in.Host) {
		t.Error("the container is not cut off")
	}
	if res, err := act.(Undoer).Undo(soonest(t), &UndoRequest{ID: r.Step.ID, Record: stored}); err != nil || res.Nothing {
		t.Errorf("undo: %+v, %v", res, err)
	}
	if !reaches(t, c.net, remote, in.Host) {
		t.Error("the container is cut off still")
	}
}

func TestCutNetwork(t *testing.T) {
	c, remote := newNetworkedContainer(t, nodetest.Netns(t)), nodetest.Netns(t)
	in, _ := nodetest.Bridge(t, c.net, remote)
	act := cutNetwork().New(Env{Local: c.node})
	r := c.request(t, "cut-network", `{"ttl":"1h"}`, connectionAlert(""))
	res, err := act.Act(soonest(t), r)
	if err != nil {
		t.Fatal(err)
	}
	if res.Nothing || res.TTL != time.Hour || res.Found["how"] != "host-side" || res.Found["devices"] != "eth0@"+in.HostName ||
		res.Found["netAdmin"] != "true" || res.Found["removable"] != "" || res.Found["namespace"] == "" {
		t.Errorf("result %+v", res)
	}
	if reaches(t, c.net, remote, in.Host) {
		t.Error("the container is not cut off")
	}
	// After a crash the step runs again.
	r.Resumed = true
	if again, err := act.Act(soonest(t), r); err != nil || again.Nothing || again.Undo == nil {
		t.Errorf("the second run of the step: %+v, %v", again, err)
	}
	u := &UndoRequest{ID: r.Step.ID, Record: res.Undo}
	if kept, err := act.(Keeper).Keep(soonest(t), u); err != nil || !kept.Nothing {
		t.Errorf("keep: %+v, %v", kept, err)
	}
	if back, err := act.(Undoer).Undo(soonest(t), u); err != nil || back.Nothing {
		t.Fatalf("undo: %+v, %v", back, err)
	}
	// Asked for a neighbour in vain, the kernel asks again a second later.
	nodetest.Wait(t, "the container to be let back", func() bool { return reaches(t, c.net, remote, in.Host) })
	if back, err := act.(Undoer).Undo(soonest(t), u); err != nil || !back.Nothing {
		t.Errorf("undo once more: %+v, %v", back, err)
	}
	if kept, err := act.(Keeper).Keep(soonest(t), u); err != nil || kept.Nothing {
		t.Errorf("keep what is missing: %+v, %v", kept, err)
	}
	if reaches(t, c.net, remote, in.Host) {
		t.Error("the container is not cut off again")
	}
	if _, err := act.(Undoer).Undo(soonest(t), u); err != nil {
		t.Fatal(err)
	}
	// Another boot, and what nobody wrote.
	other := strings.Replace(string(res.Undo), c.node.BootID(), "another", 1)
	for _, ask := range []func(context.Context, *UndoRequest) (Result, error){act.(Undoer).Undo, act.(Keeper).Keep} {
		if _, err := ask(soonest(t), &UndoRequest{Record: json.RawMessage(other)}); !errors.Is(err, ErrGone) {
			t.Errorf("after a reboot: %v", err)
		}
		if _, err := ask(soonest(t), &UndoRequest{Record: json.RawMessage(`{"cut":{}}`)}); !as[*refusal](err) {
			t.Errorf("with a record that can't be read: %v", err)
		}
	}
}

func TestCutNetworkAllows(t *testing.T) {
	c, remote := newNetworkedContainer(t, nodetest.Netns(t)), nodetest.Netns(t)
	in, _ := nodetest.Bridge(t, c.net, remote)
	act := cutNetwork().New(Env{Local: c.node})
	r := c.request(t, "cut-network", `{"allow":["`+in.Host.String()+`/32"]}`, connectionAlert(""))
	res, err := act.Act(soonest(t), r)
	if err != nil {
		t.Fatal(err)
	}
	if res.Found["allowed"] != in.Host.String()+"/32" || !reaches(t, c.net, remote, in.Host) {
		t.Errorf("the allowed address can't be reached: %+v", res)
	}
	if _, err := act.(Undoer).Undo(soonest(t), &UndoRequest{Record: res.Undo}); err != nil {
		t.Error(err)
	}
}

func TestCutNetworkRefusesTheHosts(t *testing.T) {
	c := newNetworkedContainer(t, nil)
	act := cutNetwork().New(Env{Local: c.node})
	if _, err := act.Act(soonest(t), c.request(t, "cut-network", `{}`, connectionAlert(""))); !as[*refusal](err) {
		t.Errorf("cut of the host's network: %v", err)
	}
	if err := act.(Checker).Check(soonest(t), c.request(t, "cut-network", `{}`, connectionAlert(""))); !as[*refusal](err) {
		t.Errorf("check of the host's network: %v", err)
	}
	// Nothing but loopback.
	c = newNetworkedContainer(t, nodetest.Netns(t))
	if _, err := act.Act(soonest(t), c.request(t, "cut-network", `{}`, connectionAlert(""))); !errors.Is(err, ErrGone) {
		t.Errorf("cut of a container without a network: %v", err)
	}
}

func TestCutNetworkParams(t *testing.T) {
	for params, want := range map[string]string{
		`{"allow":["10.0.0.7"]}`:           "write 10.0.0.7/32",
		`{"allow":["10.0.0.7/8"]}`:         "bits set behind",
		`{"allow":["10.0.0.7/32:0"]}`:      "is no port",
		`{"allow":["10.0.0.7/32:dns"]}`:    "is no port",
		`{"allow":["0.0.0.0/0"]}`:          "every address",
		`{"allow":["::/0:53"]}`:            "every address",
		`{"allow":["::ffff:1.2.3.4/128"]}`: "IPv4",
		`{"ttl":"-1s"}`:                    "negative",
		`{"ttl":"1h","allow":["10.0.0.7/32","10.96.0.10/32:53","2001:db8::53/128:53"]}`: "",
	} {
		var p cutNetworkParams
		err := (&Request{Step: &broker.Step{Action: broker.Action{Params: json.RawMessage(params)}}}).Decode(&p)
		if err == nil {
			err = p.Validate()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, wanted %q", params, err, want)
		}
		if want == "" && joined(p.Allow) != "10.0.0.7/32 10.96.0.10/32:53 2001:db8::53/128:53" {
			t.Errorf("%s became %s", params, joined(p.Allow))
		}
	}
}
