package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"stoop/e2e/harness"
)

// beatEvery is how often something is sent that has to be answered, and so how
// finely a silence is measured.
const beatEvery = 250 * time.Microsecond

// beat is a dialogue of numbered questions and answers, by which the other
// side's end shows.
type beat struct {
	mu   sync.Mutex
	sent []time.Time // question → when
	last int         // the highest that was answered; -1: none
	at   time.Time   // when
}

func (b *beat) ask() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent = append(b.sent, time.Now())
	return len(b.sent) - 1
}

func (b *beat) answer(n int) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if n > b.last && n < len(b.sent) {
		b.last, b.at = n, now
	}
}

// answered is the highest number that was answered, and when.
func (b *beat) answered() (n int, at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.last, b.at
}

// waitAlive waits until n more questions were answered.
func (b *beat) waitAlive(t harness.T, what string, n int) {
	t.Helper()
	from, _ := b.answered()
	harness.Eventually(t, 20*time.Second, 5*time.Millisecond, func() (bool, string) {
		got, _ := b.answered()
		return got >= from+n, fmt.Sprintf("%d more answers of %s; there were %d", n, what, got-from)
	})
}

// quiet is how long nothing may come for it to count as silence.
const quiet = 400 * time.Millisecond

// silent waits for the silence and returns when it began: with the last answer
// or the first question after it, whichever was later.
func (b *beat) silent(t harness.T, what string) time.Time {
	t.Helper()
	var began time.Time
	harness.Eventually(t, 20*time.Second, 5*time.Millisecond, func() (bool, string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		began = b.at
		if b.last+1 < len(b.sent) && b.sent[b.last+1].After(began) {
			began = b.sent[b.last+1]
		}
		// The questions have to have gone on.
		asked := time.Since(b.sent[len(b.sent)-1]) < quiet/4
		return asked && time.Since(began) > quiet, what + " to fall silent"
	})
	return began
}

// listener is where the suspects call the attacker.
type listener struct {
	net.Listener
	port int
}

func listen(t harness.T) *listener {
	t.Helper()
	l, err := net.Listen("tcp", attackerIP+":0")
	if err != nil {
		t.Fatalf("listen as the attacker: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	return &listener{l, l.Addr().(*net.TCPAddr).Port}
}

// shell is the attacker's end of a reverse shell. What it says is echo commands,
// each with its number, so that the shell answers without starting a process.
type shell struct {
	beat
	conn net.Conn
	work sync.WaitGroup
	stop chan struct{}
}

// accept waits for a suspect's call and begins to talk to it.
func (l *listener) accept(t harness.T) *shell {
	t.Helper()
	if err := l.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatalf("wait for the suspect's shell: %v", err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatalf("wait for the suspect's shell: %v", err)
	}
	s := &shell{beat: beat{last: -1}, conn: conn, stop: make(chan struct{})}
	s.say("/bin/rm /tmp/sh") // what runs is on the disk no more
	t.Cleanup(func() { conn.Close() })
	return s
}

// say writes one command. What can't be written shows as a silence.
func (s *shell) say(command string) {
	_ = s.conn.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = s.conn.Write([]byte(command + "\n"))
}

// talk asks until hangUp.
func (s *shell) talk() {
	s.work.Go(func() {
		lines := bufio.NewScanner(s.conn)
		for lines.Scan() {
			if n, err := strconv.Atoi(strings.TrimSpace(lines.Text())); err == nil {
				s.answer(n)
			}
		}
	})
	s.work.Go(func() { every(s.stop, func() { s.say("echo " + strconv.Itoa(s.ask())) }) })
}

// hangUp ends the talk and the connection.
func (s *shell) hangUp() {
	close(s.stop)
	s.conn.Close()
	s.work.Wait()
}

// every calls f every [beatEvery] until stop is closed.
func every(stop <-chan struct{}, f func()) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			f()
		}
	}
}

// pinger sends echo requests to a pod's address. The kernel answers them in the
// pod's network, also when all of its processes are frozen or ended, so it sees
// the network alone.
type pinger struct {
	beat
	conn net.PacketConn
	work sync.WaitGroup
	stop chan struct{}
}

func ping(t harness.T, ip string) *pinger {
	t.Helper()
	conn, err := net.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		t.Fatalf("open a socket for pings: %v", err)
	}
	to := &net.IPAddr{IP: net.ParseIP(ip)}
	p := &pinger{beat: beat{last: -1}, conn: conn, stop: make(chan struct{})}
	p.work.Go(func() {
		every(p.stop, func() {
			// An error, as of a pod that is gone, shows as a silence.
			_, _ = conn.WriteTo(echoRequest(uint64(p.ask())), to)
		})
	})
	p.work.Go(func() {
		b := make([]byte, 256)
		for {
			n, from, err := conn.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Type 0 is an echo reply.
			if err == nil && n == 16 && b[0] == 0 && from.String() == ip {
				p.answer(int(binary.BigEndian.Uint64(b[8:])))
			}
		}
	})
	return p
}

func (p *pinger) end() {
	close(p.stop)
	p.conn.Close()
	p.work.Wait()
}

// echoRequest is an ICMP echo request with a number as its data.
func echoRequest(n uint64) []byte {
	b := make([]byte, 16)
	b[0] = 8
	binary.BigEndian.PutUint64(b[8:], n)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum))
	return b
}
