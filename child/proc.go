package child

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// patience is how long one read of a suspect's may take.
	patience = 500 * time.Millisecond
	// exePatience is the same for a part of its executable, on a disk.
	exePatience = 2 * time.Second

	smallMost   = 64 << 10 // status, cgroup
	argsMost    = 1 << 20  // cmdline, environ
	mapsMost    = 2 << 20
	socketsMost = 4 << 20
	mountsMost  = 1 << 20
	filesMost   = 4096 // open files that are listed
)

// process is a suspect, held by its folder in /proc: that never comes to mean
// another process.
type process struct {
	pid     int
	dir     *os.File
	start   uint64
	blocked bool // a read of it did not come back
}

// errGone says that a suspect has ended.
var errGone = errors.New("it has ended")

// hold opens a suspect's folder and makes sure that it is the one that is meant.
func hold(s Suspect, container string) (*process, error) {
	dir, err := os.OpenFile("/proc/"+strconv.Itoa(s.PID), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errGone
	}
	if err != nil {
		return nil, err
	}
	p := &process{pid: s.PID, dir: dir}
	if err := p.prove(s, container); err != nil {
		dir.Close()
		return nil, err
	}
	return p, nil
}

func (p *process) prove(s Suspect, container string) error {
	b, err := p.small("stat")
	if err != nil {
		return errGone
	}
	if p.start, err = started(b); err != nil {
		return err
	}
	if s.Start != 0 && p.start != s.Start {
		return fmt.Errorf("%w: another process has its number", errGone)
	}
	if container == "" {
		return nil
	}
	b, err = p.small("cgroup")
	if err != nil {
		return errGone
	}
	if !inContainer(b, container) {
		return errors.New("it is not in the container any more")
	}
	return nil
}

// inContainer reports whether /proc/PID/cgroup names a container's whole id.
func inContainer(cgroup []byte, id string) bool {
	name, err := regexp.Compile(`(^|[^0-9a-f])` + regexp.QuoteMeta(id) + `([^0-9a-f]|$)`)
	return err == nil && name.Match(cgroup)
}

// started reads the start of a process out of /proc/PID/stat. The command's
// name, in brackets, may hold spaces and brackets itself.
func started(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	f := bytes.Fields(stat[i+1:])
	const starttime = 22 - 3 // proc_pid_stat(5) counts from 1, and two come before
	if i < 0 || len(f) <= starttime {
		return 0, errors.New("its stat can't be read")
	}
	return strconv.ParseUint(string(f[starttime]), 10, 64)
}

// open opens a file of the process's folder.
func (p *process) open(name string) (*os.File, error) {
	fd, err := unix.Openat(int(p.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (p *process) link(name string) (string, error) {
	b := make([]byte, 4*unix.PathMax)
	n, err := unix.Readlinkat(int(p.dir.Fd()), name, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// small reads a file that the kernel writes without asking the process's memory.
func (p *process) small(name string) ([]byte, error) {
	f, err := p.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, smallMost))
}

// patient reads a file of the process that may never answer.
func (p *process) patient(name string, wait time.Duration) *patientReader {
	return &patientReader{wait: wait, of: p, open: func() (io.ReadCloser, error) { return p.open(name) }}
}

// errBlocked says that a read did not come back in time.
var errBlocked = errors.New("the read did not come back in time: the process keeps the kernel waiting")

// patientReader gives up on a read that does not come back. The thread that is
// in it stays behind, and goes with this child.
type patientReader struct {
	wait time.Duration
	of   *process
	open func() (io.ReadCloser, error)

	asks    chan struct{}
	answers chan answer
	rest    []byte
	err     error
}

type answer struct {
	b   []byte
	err error
}

func (r *patientReader) Read(b []byte) (int, error) {
	if len(r.rest) == 0 && r.err == nil {
		if r.asks == nil {
			r.asks, r.answers = make(chan struct{}, 1), make(chan answer, 1)
			go serveReads(r.open, r.asks, r.answers)
		}
		late := time.NewTimer(r.wait)
		defer late.Stop()
		r.asks <- struct{}{}
		select {
		case a := <-r.answers:
			r.rest, r.err = a.b, a.err
		case <-late.C:
			r.err = errBlocked
			r.of.blocked = true
		}
	}
	if len(r.rest) == 0 {
		return 0, r.err
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends the reading.
func (r *patientReader) Close() error {
	if r.asks != nil {
		close(r.asks)
		r.asks = nil
	}
	if r.err == nil {
		r.err = fs.ErrClosed
	}
	return nil
}

// serveReads reads once for each time it is asked.
func serveReads(open func() (io.ReadCloser, error), asks <-chan struct{}, answers chan<- answer) {
	var f io.ReadCloser
	var err error
	buf := make([]byte, 64<<10)
	for range asks {
		if f == nil {
			if f, err = open(); err != nil {
				answers <- answer{err: err}
				return
			}
			defer f.Close()
		}
		n, err := f.Read(buf)
		answers <- answer{buf[:n], err}
	}
}

// facts are what is told of a process in PID.json.
type facts struct {
	PID        int               `json:"pid"`
	Start      uint64            `json:"start"` // clock ticks after boot
	Comm       string            `json:"comm"`
	State      string            `json:"state"` // as in /proc/PID/stat
	PPID       int               `json:"ppid"`
	Exe        string            `json:"exe,omitempty"`
	ExeDeleted bool              `json:"exeDeleted,omitempty"` // it is on no disk any more
	ExePiece   string            `json:"exePiece,omitempty"`   // where it is kept
	Cwd        string            `json:"cwd,omitempty"`
	Root       string            `json:"root,omitempty"`
	Cgroup     []string          `json:"cgroup,omitempty"`
	Namespaces map[string]string `json:"namespaces,omitempty"`
	Files      []openFile        `json:"files,omitempty"` // by number
	Errors     []string          `json:"errors,omitempty"`
}

type openFile struct {
	FD    int    `json:"fd"`
	To    string `json:"to"`
	Flags string `json:"flags,omitempty"` // octal, as open(2) has them
}

const deletedSuffix = " (deleted)"

// facts reads what the kernel says without asking the process's memory.
func (p *process) facts() facts {
	f := facts{PID: p.pid, Start: p.start, Namespaces: map[string]string{}}
	fail := func(what string, err error) {
		if err != nil {
			f.Errors = append(f.Errors, what+": "+err.Error())
		}
	}
	stat, err := p.small("stat")
	fail("stat", err)
	if open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')'); open >= 0 && end > open {
		f.Comm = string(stat[open+1 : end])
		if rest := strings.Fields(string(stat[end+1:])); len(rest) > 1 {
			f.State = rest[0]
			f.PPID, err = strconv.Atoi(rest[1])
			fail("ppid", err)
		}
	}
	f.Exe, err = p.link("exe")
	fail("exe", err)
	f.Exe, f.ExeDeleted = strings.CutSuffix(f.Exe, deletedSuffix)
	f.Cwd, err = p.link("cwd")
	fail("cwd", err)
	f.Root, err = p.link("root")
	fail("root", err)
	cgroup, err := p.small("cgroup")
	fail("cgroup", err)
	f.Cgroup = strings.Split(strings.TrimSpace(string(cgroup)), "\n")
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
		to, err := p.link("ns/" + ns)
		fail("ns/"+ns, err)
		if err == nil {
			f.Namespaces[ns] = to
		}
	}
	f.Files, err = p.files()
	fail("fd", err)
	return f
}

func (p *process) files() ([]openFile, error) {
	d, err := p.open("fd")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(filesMost + 1)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if len(names) > filesMost {
		names, err = names[:filesMost], fmt.Errorf("there are more than %d open files", filesMost)
	}
	var files []openFile
	for _, name := range names {
		n, aerr := strconv.Atoi(name)
		if aerr != nil {
			continue
		}
		// Only where the link points: to look at the file itself could hang.
		to, lerr := p.link("fd/" + name)
		if lerr != nil {
			continue // closed meanwhile
		}
		file := openFile{FD: n, To: to}
		if info, ierr := p.small("fdinfo/" + name); ierr == nil {
			for line := range strings.Lines(string(info)) {
				if v, ok := strings.CutPrefix(line, "flags:"); ok {
					file.Flags = strings.TrimSpace(v)
				}
			}
		}
		files = append(files, file)
	}
	slices.SortFunc(files, func(a, b openFile) int { return a.FD - b.FD })
	return files, err
}

// redactor takes the secrets out of an environment.
type redactor []string

// validate says which glob can't be read.
func (r redactor) validate() error {
	for _, glob := range r {
		if _, err := path.Match(glob, ""); err != nil {
			return fmt.Errorf("%q is no glob", glob)
		}
	}
	return nil
}

// login is a user and password in an address, whatever the variable is called.
var login = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#\s@]*:[^/?#\s]*@`)

// environ is an environment as the kernel shows it, NAME=value with a zero byte
// after each, without the values of variables whose names match. No hash of such a
// value is kept: of most of them it would be as good as the value.
func (r redactor) environ(b []byte) []byte {
	var out []byte
	for entry := range bytes.SplitAfterSeq(b, []byte{0}) {
		entry, whole := bytes.CutSuffix(entry, []byte{0})
		if len(entry) == 0 && !whole {
			continue
		}
		name, value, ok := bytes.Cut(entry, []byte("="))
		if ok {
			out = append(append(append(out, name...), '='), r.value(string(name), value)...)
		} else {
			out = append(out, entry...)
		}
		out = append(out, 0)
	}
	return out
}

func (r redactor) value(name string, value []byte) []byte {
	if r.matches(name) {
		return fmt.Appendf(nil, "<redacted, %d bytes>", len(value))
	}
	return login.ReplaceAll(value, []byte("$1<redacted>@"))
}

// Redacted is what evidence may show of a value: nothing of it where its name
// matches one of the globs, as in [Capture], and else all but the logins in
// addresses.
func Redacted(globs []string, name, value string) string {
	return string(redactor(globs).value(name, []byte(value)))
}

func (r redactor) matches(name string) bool {
	name = strings.ToUpper(name)
	for _, glob := range r {
		// A name is no path: "/" is a letter like any other.
		if ok, err := path.Match(strings.ReplaceAll(strings.ToUpper(glob), "/", "_"), strings.ReplaceAll(name, "/", "_")); ok || err != nil {
			return true
		}
	}
	return false
}

// serveCapture is the child's side of [Launcher.Capture].
func serveCapture(request json.RawMessage, to *parent) error {
	var c Capture
	if err := json.Unmarshal(request, &c); err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	s := capturing{Capture: c, redact: redactor(c.Redact), to: to, exes: map[fileID]string{}, seen: map[string]bool{}}
	if err := s.redact.validate(); err != nil {
		return refuse("%v", err)
	}
	return s.all()
}

// fileID tells files apart.
type fileID struct {
	dev, ino    uint64
	size, mtime int64
}

type capturing struct {
	Capture
	redact redactor
	to     *parent
	held   []*process
	exes   map[fileID]string // piece that holds it
	seen   map[string]bool   // namespaces that were read
	got    Captured
}

// all reads the cheapest and surest of every process first, and what is large or
// may hang last.
func (s *capturing) all() error {
	for _, suspect := range s.Suspects {
		p, err := hold(suspect, s.Container)
		if err != nil {
			s.got.Gone++
			if err := s.to.note("process %d: %v", suspect.PID, err); err != nil {
				return err
			}
			continue
		}
		s.held = append(s.held, p)
	}
	s.got.Processes = len(s.held)
	for _, pass := range []func(*process) error{s.told, s.memory, s.surroundings, s.executable} {
		for _, p := range s.held {
			if err := pass(p); err != nil {
				return err
			}
		}
	}
	for _, p := range s.held {
		if p.blocked {
			s.got.Blocked++
		}
	}
	return s.to.sayJSON(frameDone, s.got)
}

func (s *capturing) told(p *process) error {
	f := p.facts()
	f.ExePiece = s.exePiece(p)
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if err := s.to.piece(fmt.Sprintf("%d.json", p.pid), int64(len(b)), bytes.NewReader(b)); err != nil {
		return err
	}
	return s.file(p, "status", fmt.Sprintf("%d.status", p.pid), smallMost)
}

// memory is what the kernel reads out of the process's own memory, or locks it
// for.
func (s *capturing) memory(p *process) error {
	if err := s.file(p, "cmdline", fmt.Sprintf("%d.cmdline", p.pid), argsMost); err != nil {
		return err
	}
	if !p.blocked {
		if err := s.environ(p); err != nil {
			return err
		}
	}
	if !p.blocked {
		if err := s.file(p, "maps", fmt.Sprintf("%d.maps", p.pid), mapsMost); err != nil {
			return err
		}
	}
	if p.blocked {
		return s.to.note("process %d: not all of its memory's files could be had: %v", p.pid, errBlocked)
	}
	return nil
}

func (s *capturing) environ(p *process) error {
	name := fmt.Sprintf("%d.environ", p.pid)
	r := p.patient("environ", patience)
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, argsMost))
	if len(b) == argsMost {
		// The last one may be the half of a name.
		b = b[:bytes.LastIndexByte(b, 0)+1]
		err = fmt.Errorf("there is more than %d bytes", argsMost)
	}
	var content io.Reader = bytes.NewReader(s.redact.environ(b))
	if err != nil {
		content = io.MultiReader(content, failing{err})
	}
	return s.to.piece(name, 2*argsMost, content)
}

// failing is a reader that fails.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// file hands over a file of a process's folder.
func (s *capturing) file(p *process, name, piece string, most int64) error {
	r := p.patient(name, patience)
	defer r.Close()
	return s.to.piece(piece, most, r)
}

// surroundings are what processes share: the sockets of a network, the mounts.
func (s *capturing) surroundings(p *process) error {
	if ns, ok := s.first(p, "net"); ok {
		for _, name := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "unix"} {
			if err := s.file(p, "net/"+name, "net-"+ns+"."+name, socketsMost); err != nil {
				return err
			}
		}
	}
	if ns, ok := s.first(p, "mnt"); ok {
		return s.file(p, "mountinfo", "mnt-"+ns+".mountinfo", mountsMost)
	}
	return nil
}

// first is the number of a process's namespace, and whether it is the first of
// it.
func (s *capturing) first(p *process, kind string) (string, bool) {
	ns, err := p.link("ns/" + kind) // "net:[4026531840]"
	number := strings.Trim(strings.TrimPrefix(ns, kind+":"), "[]")
	if err != nil || s.seen[ns] || !digits.MatchString(number) {
		return "", false
	}
	s.seen[ns] = true
	return number, true
}

var digits = regexp.MustCompile(`^[0-9]+$`)

// exePiece is the name of the piece that will hold a process's executable; "": it
// has none.
func (s *capturing) exePiece(p *process) string {
	id, err := p.exeID()
	if err != nil {
		return ""
	}
	if s.exes[id] == "" {
		s.exes[id] = fmt.Sprintf("%d.exe", p.pid)
	}
	return s.exes[id]
}

// exeID tells a process's executable from others, without opening it.
func (p *process) exeID() (fileID, error) {
	done := make(chan struct{})
	var st unix.Stat_t
	var err error
	go func() {
		defer close(done)
		// Through the link of /proc, which holds the file also when its name is
		// gone. A file system of the suspect's own may not answer.
		err = unix.Fstatat(int(p.dir.Fd()), "exe", &st, 0)
	}()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		p.blocked = true
		return fileID{}, errBlocked
	}
	if err != nil {
		return fileID{}, err
	}
	return fileID{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano()}, nil
}

func (s *capturing) executable(p *process) error {
	name := fmt.Sprintf("%d.exe", p.pid)
	mine := false
	for _, piece := range s.exes {
		mine = mine || piece == name
	}
	if !mine {
		return nil // another process's is the same, or it has none
	}
	r := &patientReader{wait: exePatience, of: p, open: p.openExe}
	defer r.Close()
	return s.to.piece(name, s.MaxExe, r)
}

// openExe opens what a process runs, which may be on no disk any more.
func (p *process) openExe() (io.ReadCloser, error) {
	f, err := p.open("exe")
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("exe: it is no regular file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
