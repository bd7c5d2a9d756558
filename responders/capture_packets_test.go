package responders

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/broker"
	"stoop/evidence"
	"stoop/node"
	"stoop/node/nodetest"
)

// recorder is a container with a network of its own, and capture-packets.
type recorder struct {
	*packetCapturer
	t   *testing.T
	c   *node.Container
	net *nodetest.Network // nil: the host's
}

func newRecorder(t *testing.T, inside *nodetest.Network) *recorder {
	t.Helper()
	nodetest.Root(t)
	dir := nodetest.CgroupV2(t)
	nodetest.Start(t, nodetest.In{Cgroups: []string{dir}, Netns: inside}, exec.Command("/bin/sleep", "1000"))
	local := node.New(node.Config{})
	c, err := local.Container(t.Context(), filepath.Base(dir), 0)
	if err != nil {
		t.Fatal(err)
	}
	store, err := evidence.Open(evidence.Config{Dir: filepath.Join(t.TempDir(), "evidence")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return &recorder{capturePackets().New(Env{Local: local, Evidence: store}).(*packetCapturer), t, c, inside}
}

func (r *recorder) request(id, params string) *Request {
	r.t.Helper()
	a, err := alert.Parse([]byte(`{"rule":"R","priority":"Critical"}`))
	if err != nil {
		r.t.Fatal(err)
	}
	s := &broker.Step{ID: id, AlertID: a.ID, Rule: "r", Action: broker.Action{Responder: "capture-packets", Params: json.RawMessage(params)}}
	return &Request{Step: s, Alert: a, Container: r.c}
}

// talk sends datagrams to two ports of the loopback until it is told to stop.
func (r *recorder) talk(network string, payload int) (to, other int, stop func()) {
	r.t.Helper()
	var l [2]net.PacketConn
	var c [2]net.Conn
	r.net.Do(r.t, func() (err error) {
		host := map[string]string{"udp4": "127.0.0.1:0", "udp6": "[::1]:0"}[network]
		for i := range l {
			if l[i], err = net.ListenPacket(network, host); err == nil {
				c[i], err = net.Dial(network, l[i].LocalAddr().String())
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	port := func(i int) int { return l[i].LocalAddr().(*net.UDPAddr).Port }
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			case <-tick.C:
				for i := range c {
					_, _ = c[i].Write(append(fmt.Appendf(nil, "%d:%06d:", port(i), n), make([]byte, payload)...))
				}
			}
		}
	}()
	return port(0), port(1), func() {
		close(end)
		<-ended
		for i := range l {
			l[i].Close()
			c[i].Close()
		}
	}
}

// packet is one of a pcap file.
type packet struct {
	at       time.Time
	protocol uint16
	size     int
	data     []byte // from the network header on
}

// readPcap reads the format as its specification has it.
func readPcap(t *testing.T, b []byte) (packets []packet) {
	t.Helper()
	le := binary.LittleEndian
	if len(b) < 24 || le.Uint32(b) != 0xa1b2c3d4 || le.Uint16(b[4:]) != 2 || le.Uint16(b[6:]) != 4 || le.Uint32(b[20:]) != 113 {
		t.Fatalf("no pcap file of Linux cooked packets: %x", b[:min(24, len(b))])
	}
	for b = b[24:]; len(b) > 0; {
		if len(b) < 32 || len(b) < 16+int(le.Uint32(b[8:])) {
			return packets // cut off
		}
		n := int(le.Uint32(b[8:]))
		packets = append(packets, packet{
			at:       time.Unix(int64(le.Uint32(b)), int64(le.Uint32(b[4:]))*1000),
			size:     int(le.Uint32(b[12:])) - 16,
			protocol: binary.BigEndian.Uint16(b[30:]), data: b[32 : 16+n],
		})
		b = b[16+n:]
	}
	return packets
}

func TestCapturePackets(t *testing.T) {
	for network, protocol := range map[string]uint16{"udp4": 0x0800, "udp6": 0x86dd} {
		t.Run(network, func(t *testing.T) {
			r := newRecorder(t, nodetest.Netns(t))
			to, other, stop := r.talk(network, 0)
			defer stop()
			began := time.Now()
			res, err := tryOn(t, r, r.request("all", `{"duration":"300ms"}`))
			if took := time.Since(began); err != nil || took < 300*time.Millisecond || took > 10*time.Second {
				t.Fatalf("after %s: %+v, %v", took, res, err)
			}
			all := readPcap(t, []byte(piece(t, r.store, "all", piecePackets)))
			seen := map[string]int{}
			for _, p := range all {
				if p.protocol != protocol || p.size != len(p.data) || p.at.Before(began.Add(-time.Second)) || p.at.After(time.Now()) {
					t.Fatalf("a packet: %+v", p)
				}
				if i := bytes.LastIndexByte(p.data[:len(p.data)-1], ':'); i > 12 {
					seen[string(p.data[len(p.data)-len("12345:000000:"):])]++
				}
			}
			for what, n := range seen {
				if n != 1 {
					t.Errorf("%s was recorded %d times", what, n)
				}
			}
			for _, port := range []int{to, other} {
				if !strings.Contains(fmt.Sprint(seen), fmt.Sprintf("%d:", port)) {
					t.Errorf("nothing to port %d was recorded: %v", port, seen)
				}
			}
			if res.Found["packets"] != fmt.Sprint(len(all)) {
				t.Errorf("found %v, there are %d", res.Found, len(all))
			}

			if _, err := tryOn(t, r, r.request("port", fmt.Sprintf(`{"duration":"200ms","ports":[%d]}`, to))); err != nil {
				t.Fatal(err)
			}
			some := readPcap(t, []byte(piece(t, r.store, "port", piecePackets)))
			for _, p := range some {
				if !bytes.Contains(p.data, fmt.Appendf(nil, "%d:", to)) {
					t.Errorf("with ports: %d there is %x", to, p.data)
				}
			}
			if len(some) == 0 {
				t.Error("with ports nothing was recorded")
			}
			for hosts, want := range map[string]bool{`"127.0.0.0/8","::1"`: true, `"10.0.0.0/8","fe80::/10"`: false} {
				id := fmt.Sprintf("hosts-%t", want)
				if _, err := tryOn(t, r, r.request(id, `{"duration":"200ms","hosts":[`+hosts+`]}`)); err != nil {
					t.Fatal(err)
				}
				if got := len(readPcap(t, []byte(piece(t, r.store, id, piecePackets)))); got > 0 != want {
					t.Errorf("with hosts: %s there are %d packets", hosts, got)
				}
			}
		})
	}
}

// The file, the time and stoop's own end bound a recording, also under a flood.
func TestCapturePacketsEnds(t *testing.T) {
	r := newRecorder(t, nodetest.Netns(t))
	_, _, stop := r.talk("udp4", 1200)
	defer stop()
	res, err := tryOn(t, r, r.request("size", `{"duration":"1m","maxSize":"8KiB"}`))
	p, _ := manifestOf(t, r.store, "size").Piece(piecePackets)
	if err != nil || p.Size != 8<<10 || !p.Cut || !strings.Contains(res.Reason, "as much as is kept") {
		t.Errorf("with maxSize: %+v, %+v, %v", p, res, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	res, err = r.Act(ctx, r.request("stopped", `{"duration":"1m"}`))
	if took := time.Since(began); err != nil || took > 10*time.Second || !strings.Contains(res.Reason, "before its time") {
		t.Errorf("stopped in the middle, after %s: %+v, %v", took, res, err)
	}
	if len(readPcap(t, []byte(piece(t, r.store, "stopped", piecePackets)))) == 0 {
		t.Error("what there was by then is not kept")
	}
}

func TestCapturePacketsOfTheHost(t *testing.T) {
	r := newRecorder(t, nil)
	res, err := tryOn(t, r, r.request("host", `{"duration":"100ms"}`))
	if !as[*refusal](err) {
		t.Errorf("of a container in the host's network: %+v, %v; want a refusal", res, err)
	}
	if _, err := r.store.Case("host"); err == nil {
		t.Error("there is a case of the host's network")
	}
}

func TestCapturePacketsValidate(t *testing.T) {
	for _, bad := range []capturePacketsParams{{Hosts: []string{"example.com"}}, {Hosts: []string{""}}, {Ports: []int{0}}, {Ports: []int{65536}}} {
		if bad.Validate() == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	if err := (capturePacketsParams{Hosts: []string{"10.1.2.3", "fd00::/8"}, Ports: []int{53}}).Validate(); err != nil {
		t.Error(err)
	}
}

// Networked is what capture-packets looks at.
func Networked(tb testing.TB) *TestSuspect {
	t := tb.(*testing.T)
	dir := nodetest.CgroupV2(t)
	cmd := exec.Command("/bin/sleep", "1000")
	nodetest.Start(t, nodetest.In{Cgroups: []string{dir}, Netns: nodetest.Netns(t)}, cmd)
	return &TestSuspect{Container: filepath.Base(dir), Remove: func() { removed(t, dir, cmd.Process.Pid) }}
}
