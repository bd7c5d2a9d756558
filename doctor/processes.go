package doctor

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"stoop/broker"
)

// process is a process of this machine that has to do with alerts.
type process struct {
	pid      int
	name     string // what it calls itself
	args     []string
	uid      uint32   // effective
	groups   []uint32 // all of them
	opens    []opened
	pipeLink string // where a descriptor of Falco's points that bears the FIFO's name, and is none of it
}

func (p *process) String() string {
	if len(p.args) > 1 && (p.args[1] == "run" || p.args[1] == "hold") {
		return fmt.Sprintf("%s %s (process %d)", p.name, p.args[1], p.pid)
	}
	return fmt.Sprintf("%s (process %d)", p.name, p.pid)
}

// opened is a file that a process has open, and how.
type opened struct {
	file  fileID
	flags int
}

func (o opened) access() int { return o.flags & unix.O_ACCMODE }

// fileID is a file, whatever its name.
type fileID struct {
	major, minor uint32
	inode        uint64
}

// identify follows links, asks no server of a network file system, and opens nothing.
func identify(path string) (fileID, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return fileID{}, err
	}
	return fileID{st.Dev_major, st.Dev_minor, st.Ino}, nil
}

// processes are those that have a file open that matters here, and Falco's.
type processes struct {
	all    []*process
	unseen int  // whose open files can't be looked at
	inside bool // stoop sees only processes of its own pod
	partly bool // there were too many to look at all of them in time
}

// seen reports whether no process can have escaped.
func (p *processes) seen() bool { return p.unseen == 0 && !p.inside && !p.partly }

// why is what may have escaped, for a sentence.
func (p *processes) why() string {
	switch {
	case p.inside:
		return "only processes of its own pod can be seen"
	case p.unseen > 0:
		return fmt.Sprintf("the open files of %d processes can't be seen", p.unseen)
	}
	return "not all processes could be looked at in time"
}

// with are those that have a file open.
func (p *processes) with(f fileID, how func(opened) bool) []*process {
	var out []*process
	for _, proc := range p.all {
		for _, o := range proc.opens {
			if o.file == f && how(o) {
				out = append(out, proc)
				break
			}
		}
	}
	return out
}

// initialPID is the first pid namespace: include/linux/proc_ns.h.
const initialPID = "pid:[4026531836]"

// lookAround goes through the processes that can be seen.
func (e *Examination) lookAround(ctx context.Context) *processes {
	ps := &processes{}
	if ns, _ := os.Readlink(filepath.Join(e.proc, "self/ns/pid")); ns != initialPID {
		// A container's, unless a machine's own first process runs in it.
		first := strings.TrimSpace(string(head(filepath.Join(e.proc, "1/comm"), 64)))
		ps.inside = first != "systemd" && first != "init"
	}
	wanted := map[fileID]bool{}
	for _, path := range []string{e.Source.Pipe, e.Source.File, filepath.Join(e.Data, "run.lock"), filepath.Join(e.Data, broker.SocketName)} {
		if id, err := identify(path); path != "" && err == nil {
			wanted[id] = true
		}
	}
	dir, err := os.ReadDir(e.proc)
	if err != nil {
		ps.partly = true
		return ps
	}
	for _, d := range dir {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if ctx.Err() != nil {
			ps.partly = true
			break
		}
		e.lookAt(ps, pid, wanted)
	}
	return ps
}

func (e *Examination) lookAt(ps *processes, pid int, wanted map[fileID]bool) {
	base := filepath.Join(e.proc, strconv.Itoa(pid))
	p := &process{pid: pid, name: strings.TrimSuffix(string(head(filepath.Join(base, "comm"), 64)), "\n")}
	if p.name == "" {
		return // it has ended
	}
	fds, err := os.ReadDir(filepath.Join(base, "fd"))
	if err != nil && !os.IsNotExist(err) {
		ps.unseen++
	}
	for _, fd := range fds {
		path := filepath.Join(base, "fd", fd.Name())
		id, err := identify(path)
		if err != nil {
			continue
		}
		if wanted[id] {
			p.opens = append(p.opens, opened{id, openFlags(filepath.Join(base, "fdinfo", fd.Name()))})
		} else if p.name == "falco" && e.Source.Pipe != "" {
			link, _ := os.Readlink(path)
			if strings.TrimSuffix(link, " (deleted)") == e.Source.Pipe {
				p.pipeLink = link
			}
		}
	}
	if len(p.opens) == 0 && p.name != "falco" {
		return
	}
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(head(filepath.Join(base, "cmdline"), 16<<10), []byte{0}), []byte{0}) {
		p.args = append(p.args, string(arg))
	}
	p.credentials(filepath.Join(base, "status"))
	ps.all = append(ps.all, p)
}

// credentials reads as whom the process runs.
func (p *process) credentials(status string) {
	for line := range strings.Lines(string(head(status, 64<<10))) {
		name, values, _ := strings.Cut(line, ":")
		var ids []uint32
		for _, v := range strings.Fields(values) {
			if id, err := strconv.ParseUint(v, 10, 32); err == nil {
				ids = append(ids, uint32(id))
			}
		}
		switch {
		case name == "Uid" && len(ids) == 4:
			p.uid = ids[1]
		case name == "Gid" && len(ids) == 4:
			p.groups = append(p.groups, ids[1])
		case name == "Groups":
			p.groups = append(p.groups, ids...)
		}
	}
}

// openFlags are those that a file was opened with, from /proc/PID/fdinfo; opened for
// reading and writing where they can't be told.
func openFlags(fdinfo string) int {
	for line := range strings.Lines(string(head(fdinfo, 4096))) {
		if v, is := strings.CutPrefix(line, "flags:"); is {
			if n, err := strconv.ParseInt(strings.TrimSpace(v), 8, 64); err == nil {
				return int(n)
			}
		}
	}
	return unix.O_RDWR
}

// head is the beginning of a file of /proc.
func head(path string, most int64) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, most))
	return b
}
