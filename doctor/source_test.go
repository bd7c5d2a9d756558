package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPipe(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("who has a file open can be seen by root alone")
	}
	c := config(t)
	c.Source.Pipe = fifo(t)
	path := c.Source.Pipe

	found := examine(t, c, "source")
	has(t, found, OK, path, "is a FIFO", "-rw-------")
	has(t, found, Warning, "nobody but stoop holds", "ListenFIFO")

	holder, stopHolder := open(t, path, unix.O_RDWR, "stoop-hold", path)
	found = examine(t, c, "source")
	has(t, found, OK, fmt.Sprintf("held open by stoop-hold (process %d)", holder))
	none(t, found, Warning, Missing)

	reader, _ := open(t, path, unix.O_RDWR, "stoop", "run", "--pipe", path)
	falco, _ := open(t, path, unix.O_WRONLY, "falco")
	found = examine(t, c, "source")
	has(t, found, OK, fmt.Sprintf("read by stoop run (process %d)", reader), fmt.Sprintf("held open by stoop-hold (process %d)", holder), fmt.Sprintf("written to by falco (process %d)", falco))
	none(t, found, Warning, Missing)

	// A stoop by another name is known by the lock that it holds.
	lock := write(t, filepath.Join(c.Data, "run.lock"), "")
	program, stopProgram := open(t, path+":"+lock, unix.O_RDWR, "program", "serve")
	has(t, examine(t, c, "source"), Warning, fmt.Sprintf("program (process %d)", program), "only one of them can")
	stopProgram()

	stopHolder()
	found = examine(t, c, "source")
	has(t, found, Warning, "nobody but stoop holds")

	second, stopSecond := open(t, path, unix.O_RDWR, "stoop", "run")
	has(t, examine(t, c, "source"), Warning, strconv.Itoa(reader), strconv.Itoa(second), "only one of them can")
	stopSecond()

	cat, _ := open(t, path, unix.O_RDONLY, "cat")
	has(t, examine(t, c, "source"), Missing, fmt.Sprintf("cat (process %d)", cat), "takes alerts away")
}

// What stands where the FIFO should be, and what Falco writes to in its stead.
func TestPipeIsNone(t *testing.T) {
	c := config(t)
	c.Source.Pipe = filepath.Join(t.TempDir(), "falco.pipe")
	has(t, examine(t, c, "source"), Missing, "there is no FIFO", "stoop hold "+c.Source.Pipe)
	write(t, c.Source.Pipe, "an alert\n")
	has(t, examine(t, c, "source"), Missing, "regular file of 9 bytes", "stop Falco", "mv "+c.Source.Pipe)
	if got, err := os.ReadFile(c.Source.Pipe); err != nil || string(got) != "an alert\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
	if err := os.Remove(c.Source.Pipe); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(c.Source.Pipe, 0o700); err != nil {
		t.Fatal(err)
	}
	has(t, examine(t, c, "source"), Missing, "is a folder and no FIFO")
}

func TestFalcoWritesElsewhere(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("who has a file open can be seen by root alone")
	}
	c := config(t)
	c.Source.Pipe = fifo(t)
	hold, _ := os.OpenFile(c.Source.Pipe, os.O_RDWR, 0)
	defer hold.Close()
	falco, _ := open(t, c.Source.Pipe, unix.O_WRONLY, "falco")
	if err := os.Remove(c.Source.Pipe); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(c.Source.Pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	has(t, examine(t, c, "source"), Missing, fmt.Sprintf("falco (process %d) writes to another file", falco), fmt.Sprintf("kill -USR1 %d", falco))
}

// To look at the FIFO must not open it: an end that comes and goes can be Falco's last
// reader.
func TestPipeIsNotOpened(t *testing.T) {
	c := config(t)
	c.Source.Pipe, c.FalcoVersion = fifo(t), "0.44.1"
	other := filepath.Join(t.TempDir(), "link") // so that it has to be seen whether they are one
	if err := os.Symlink(c.Source.Pipe, other); err != nil {
		t.Fatal(err)
	}
	c.Falco = write(t, filepath.Join(t.TempDir(), "falco.yaml"), fmt.Sprintf(good, other))
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, c.Source.Pipe, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	events := make([]byte, 4096)
	Examine(t.Context(), c, Checks())
	if n, err := unix.Read(watch, events); err != unix.EAGAIN {
		t.Errorf("the FIFO was opened: %d bytes of events, %v", n, err)
	}
	// What would be seen.
	open(t, c.Source.Pipe, unix.O_RDWR, "holder")
	if n, err := unix.Read(watch, events); n <= 0 || err != nil {
		t.Errorf("that the FIFO is opened is not seen: %v", err)
	}
}

func TestFile(t *testing.T) {
	c := config(t)
	c.Source.File = filepath.Join(t.TempDir(), "falco.json")
	has(t, examine(t, c, "source"), Warning, "is not there yet")
	write(t, c.Source.File, strings.Repeat("x", 2048))
	has(t, examine(t, c, "source"), OK, "holds 2 KiB")
	c.Source.File = t.TempDir()
	has(t, examine(t, c, "source"), Missing, "is no regular file")
}

func TestStoop(t *testing.T) {
	c := config(t)
	has(t, examine(t, c, "stoop"), Warning, "no stoop runs on "+c.Data)
	now := time.Now()
	running := Running{
		Version: "1.0", Node: "node-1", Mode: "audit", Rules: "abc",
		LastAlert: &LastAlert{Rule: "Shell", Time: now.Add(-time.Millisecond), Received: now, Hostname: "node-1", Origin: "fifo"},
	}
	c.Running = func(context.Context) (Running, error) { return running, nil }
	found := examine(t, c, "stoop")
	has(t, found, OK, "node-1", "audit mode", "by fifo")
	none(t, found, Warning, Missing)

	running.Paused, running.NotReady, running.Version, running.Rules = true, "store: refuses\npipe: waits", "0.9", "def"
	running.LastAlert.Hostname, c.Aliases = "ip-10-0-0-1", []string{"other"}
	found = examine(t, c, "stoop")
	has(t, found, Warning, "paused", "stoop resume")
	c.AuditEvents = true
	for _, f := range examine(t, c, "stoop") {
		if strings.Contains(f.Found, "ip-10-0-0-1") {
			t.Errorf("one that answers audit events: %+v", f)
		}
	}
	c.AuditEvents = false
	has(t, found, Missing, "store: refuses; pipe: waits")
	has(t, found, Warning, "1.0", "0.9")
	has(t, found, Warning, "it follows rules def", "rules.yaml are rules abc")
	has(t, found, Missing, `"ip-10-0-0-1"`, "aliases: [ip-10-0-0-1]", "FALCO_HOSTNAME=node-1")
	c.Aliases = []string{"ip-10-0-0-1"}
	running.Lift, running.Unseen = "kubectl annotate namespace stoop stoop.dev/pause-", "may not list namespaces"
	found = examine(t, c, "stoop")
	has(t, found, Warning, "every node of the cluster is paused", running.Lift)
	has(t, found, Missing, "would not reach this node: may not list namespaces")
	running.LastAlert.Text = true
	found = examine(t, c, "stoop")
	has(t, found, Missing, "plain text", "json_output: true")
	running.LastAlert = nil
	has(t, examine(t, c, "stoop"), Warning, "no alert yet")
}

func TestHTTP(t *testing.T) {
	c := config(t)
	c.Source.HTTP = "127.0.0.1:2801"
	token := filepath.Join(t.TempDir(), "token")
	c.Source.HTTPFiles = []string{token}
	has(t, examine(t, c, "source"), Missing, token, "no such file")
	write(t, token, "secret")
	none(t, examine(t, c, "source"), Missing)

	c.FalcoVersion, c.Falco = "0.44.1", write(t, filepath.Join(t.TempDir(), "falco.yaml"), strings.Replace(fmt.Sprintf(good, "/x"), "file_output", "http_output: {enabled: true, url: 'http://falco:SECRET@127.0.0.1:2801/'}\nfile_output", 1))
	found := examine(t, c, "falco")
	has(t, found, OK, "http_output to 127.0.0.1:2801")
	c.Source.HTTP = "127.0.0.1:2802"
	found = append(found, examine(t, c, "falco")...)
	has(t, found, Warning, "sends to 127.0.0.1:2801, and stoop listens on 127.0.0.1:2802")
	for _, f := range found {
		if strings.Contains(fmt.Sprint(f), "SECRET") {
			t.Errorf("the token is shown: %+v", f)
		}
	}
	c.Falco = write(t, filepath.Join(t.TempDir(), "falco.yaml"), fmt.Sprintf(good, "/x"))
	has(t, examine(t, c, "falco"), Missing, "http_output is off", "TOKEN@127.0.0.1:2802")
}

// Falco may write to the FIFO as its owner, by one of its groups, or as root.
func TestWhoMayWrite(t *testing.T) {
	path := fifo(t)
	for _, tt := range []struct {
		mode os.FileMode
		p    process
		may  bool
	}{
		{0o600, process{uid: 0}, true},
		{0o600, process{uid: 1000, groups: []uint32{1000}}, false},
		{0o660, process{uid: 1000, groups: []uint32{1000, uint32(os.Getgid())}}, true},
		{0o620, process{uid: 1000, groups: []uint32{uint32(os.Getgid())}}, true},
		{0o640, process{uid: 1000, groups: []uint32{uint32(os.Getgid())}}, false},
		{0o602, process{uid: 1000}, true},
	} {
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := writable(info, &tt.p); got != tt.may && os.Getuid() == 0 {
			t.Errorf("mode %s, %+v: %t", tt.mode, tt.p, got)
		}
	}
	var self process
	if self.credentials("/proc/self/status"); int(self.uid) != os.Geteuid() || len(self.groups) == 0 || int(self.groups[0]) != os.Getegid() {
		t.Errorf("this process is %+v", self)
	}
}

// Of several processes called falco the one counts that has the FIFO open, then root's.
func TestWhichFalco(t *testing.T) {
	user, root, writes := &process{name: "falco", uid: 1000}, &process{name: "falco"}, &process{name: "falco", uid: 1000, opens: []opened{{}}}
	for _, tt := range []struct {
		all    []*process
		want   *process
		others int
	}{
		{nil, nil, 0},
		{[]*process{{name: "falcon"}}, nil, 0},
		{[]*process{user}, user, 0},
		{[]*process{user, root}, root, 1},
		{[]*process{root, user}, root, 1},
		{[]*process{user, root, writes}, writes, 2},
	} {
		if got, others := (&processes{all: tt.all}).falco(); got != tt.want || others != tt.others {
			t.Errorf("of %v: %v and %d others", tt.all, got, others)
		}
	}
}
