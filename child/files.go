package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const opFiles = "capture-files"

// Files asks for files of a container, as its oldest process's mounts have them.
type Files struct {
	Container string    `json:"container"` // the whole id
	Suspects  []Suspect `json:"suspects"`  // its processes
	// Globs are absolute patterns of [path.Match]; of a folder that one matches, all
	// below is meant. Paths are absolute too and mean just one file.
	Globs []string `json:"globs,omitempty"`
	Paths []string `json:"paths,omitempty"`
	Max   int64    `json:"max"`   // bytes of each file
	Count int      `json:"count"` // of files
}

// FoundFile is one that was found, in the order in which they come. It tells too of
// what has no content to be kept.
type FoundFile struct {
	Piece string `json:"piece,omitempty"` // what its content is called; "": it is not kept
	Kind  string `json:"kind"`
	Link  string `json:"link,omitempty"` // what a symbolic link says; the rest is of what that means, where it is there
	Why   string `json:"why,omitempty"`  // why its content is not kept
	File
}

// GotFiles is how it went.
type GotFiles struct {
	Files   int `json:"files"`   // whose content was read
	Others  int `json:"others"`  // that were found and have none to be kept
	Blocked int `json:"blocked"` // that did not let themselves be read in time
}

// Files has a child read files out of a container. found gets each file, keep then
// its content, if it has any. An error of keep ends it. [Died]: the child did not end
// by itself, and what was kept until then is not all.
func (l *Launcher) Files(ctx context.Context, want Files, found func(FoundFile), keep func(name string, max int64, r io.Reader) error, note func(string)) (GotFiles, error) {
	r, err := l.start(ctx, opFiles, want)
	if err != nil {
		return GotFiles{}, err
	}
	var got GotFiles
	err = r.pieces(&got, keep, note, func(payload []byte) error {
		var f FoundFile
		if err := json.Unmarshal(payload, &f); err != nil {
			return fmt.Errorf("the child says what is no file: %w", err)
		}
		found(f)
		return nil
	})
	return got, err
}

const (
	// filePatience is how long one look at a file may take.
	filePatience = 2 * time.Second
	// filesLook bounds how many names are looked at for one request, filesDeep how
	// many folders are in one another, and filesBlocked how many looks may not come
	// back before the child gives up.
	filesLook    = 100_000
	filesDeep    = 64
	filesBlocked = 4
)

// serveFiles is the child's side of [Launcher.Files].
func serveFiles(request json.RawMessage, to *parent) error {
	var want Files
	if err := json.Unmarshal(request, &want); err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	root, _, err := Place{Container: want.Container, Suspects: want.Suspects}.mounts()
	if err != nil {
		return err
	}
	defer root.Close()
	s := &search{root: root, want: want, to: to, seen: map[string]bool{}}
	err = s.all()
	if err != nil && !errors.Is(err, errSearched) {
		return err
	}
	return to.sayJSON(frameDone, s.got)
}

// errSearched ends a search that has found as much as it may.
var errSearched = errors.New("enough was found")

// search looks for files.
type search struct {
	root *os.File
	want Files
	to   *parent
	got  GotFiles
	seen map[string]bool // paths
	look int
}

func (s *search) all() error {
	for _, p := range s.want.Paths {
		if err := s.take(p, filesDeep); err != nil {
			return err
		}
	}
	for _, g := range s.want.Globs {
		if err := s.expand("/", strings.Split(strings.Trim(path.Clean(g), "/"), "/")); err != nil {
			return err
		}
	}
	return nil
}

// expand takes all that the names, which may be patterns, mean below dir.
func (s *search) expand(dir string, names []string) error {
	if len(names) == 0 || names[0] == "" {
		return s.take(dir, 0)
	}
	if !strings.ContainsAny(names[0], `*?[\`) {
		return s.expand(path.Join(dir, names[0]), names[1:])
	}
	return s.each(dir, func(name string) error {
		if ok, err := path.Match(names[0], name); err != nil || !ok {
			return err
		}
		return s.expand(path.Join(dir, name), names[1:])
	})
}

// each calls f for every name in a folder, in order. What is no folder has none.
func (s *search) each(dir string, f func(name string) error) error {
	names, err := within(func() ([]string, error) {
		d, err := s.open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		if why := pseudo(d); why != "" {
			return nil, errors.New(why)
		}
		names, err := d.Readdirnames(filesLook)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return names, err
	})
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil
	case err != nil:
		return s.trouble(dir, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if s.look++; s.look > filesLook {
			if err := s.to.note("more than %d names were looked at: the rest was not", filesLook); err != nil {
				return err
			}
			return errSearched
		}
		if err := f(name); err != nil {
			return err
		}
	}
	return nil
}

// trouble says that something could not be looked at.
func (s *search) trouble(what string, err error) error {
	if nerr := s.to.note("%.300q: %v", what, err); nerr != nil {
		return nerr
	}
	if !errors.Is(err, errBlocked) {
		return nil
	}
	if s.got.Blocked++; s.got.Blocked < filesBlocked {
		return nil
	}
	if err := s.to.note("given up: %d looks did not come back", filesBlocked); err != nil {
		return err
	}
	return errSearched
}

// open opens what a path means in the container's root, and never leaves that: a link
// to / is one to the container's, and those of /proc are not followed (the first flag
// has that too, for now, as openat2(2) says).
func (s *search) open(name string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(s.root.Fd()), name, &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// take hands over what is at a path: a file, or all files below a folder.
func (s *search) take(name string, depth int) error {
	if s.seen[name] {
		return nil
	}
	s.seen[name] = true
	if s.got.Files+s.got.Others >= s.want.Count {
		if err := s.to.note("more than %d files were found: the rest was not looked at", s.want.Count); err != nil {
			return err
		}
		return errSearched
	}
	l, err := within(func() (looked, error) { return s.lookAt(name) })
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return s.to.note("%.300q is not there", name)
	case err != nil:
		return s.trouble(name, err)
	case l.dir && depth < filesDeep && l.Link == "":
		return s.each(name, func(below string) error { return s.take(path.Join(name, below), depth+1) })
	case l.file == nil:
		s.got.Others++
		return s.to.sayJSON(frameFound, l.FoundFile)
	}
	defer l.file.Close()
	s.got.Files++
	l.Piece = fmt.Sprintf("%d.file", s.got.Files)
	if err := s.to.sayJSON(frameFound, l.FoundFile); err != nil {
		return err
	}
	var of process
	r := &patientReader{wait: filePatience, of: &of, open: func() (io.ReadCloser, error) { return l.file, nil }}
	if err := s.to.piece(l.Piece, s.want.Max, r); err != nil {
		return err
	}
	if of.blocked {
		return s.trouble(name, errBlocked)
	}
	return r.Close()
}

// looked is what is at a path.
type looked struct {
	FoundFile
	dir  bool
	file *os.File // for reading; nil: it is no regular file, or not to be read
}

func (s *search) lookAt(name string) (l looked, err error) {
	at, err := s.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return l, err
	}
	defer func() { at.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(at.Fd()), &st); err != nil {
		return l, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(at.Fd()), "", b)
		if err != nil {
			return l, err
		}
		l.Link, l.Kind = string(b[:n]), kindOf(st.Mode)
		to, err := s.open(name, unix.O_PATH)
		if err != nil {
			l.Path, l.Why = name, fmt.Sprintf("what it means in the container can't be opened: %v", err)
			return l, nil
		}
		at.Close()
		at = to
		if err := unix.Fstat(int(at.Fd()), &st); err != nil {
			return l, err
		}
	}
	l.Path, l.Mode, l.UID, l.GID, l.Size = name, st.Mode&0o7777, st.Uid, st.Gid, st.Size
	l.Access, l.Modify, l.Change = clock(st.Atim), clock(st.Mtim), clock(st.Ctim)
	l.Dev, l.Inode, l.Links = uint64(st.Dev), st.Ino, uint64(st.Nlink)
	l.dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	l.Kind = kindOf(st.Mode)
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		l.Why = "only regular files are read"
		return l, nil
	}
	l.Kind = "a file"
	if l.Why = pseudo(at); l.Why != "" {
		return l, nil
	}
	// This very file, by the descriptor, not by its name. Its time of access is
	// evidence, so it is left as it is, where the kernel lets stoop.
	link := fmt.Sprintf("/proc/self/fd/%d", at.Fd())
	const flags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOCTTY
	l.file, err = os.OpenFile(link, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		l.file, err = os.OpenFile(link, flags, 0)
	}
	if err != nil {
		l.Why, l.file = err.Error(), nil
		return l, nil
	}
	if d, derr := describe(l.file, name); derr == nil {
		l.File = d
	}
	return l, nil
}

// pseudo is why a file is not read: its file system is one whose files the kernel
// makes up, and some of which do something when they are read. "": it is read.
func pseudo(f *os.File) string {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Sprintf("its file system can't be looked at: %v", err)
	}
	switch uint32(fs.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
		unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.SELINUX_MAGIC, unix.BPF_FS_MAGIC,
		unix.DEVPTS_SUPER_MAGIC, unix.EFIVARFS_MAGIC, unix.BINFMTFS_MAGIC, unix.NSFS_MAGIC, unix.HUGETLBFS_MAGIC,
		unix.RDTGROUP_SUPER_MAGIC, unix.PSTOREFS_MAGIC, configfs, mqueue:
		return fmt.Sprintf("it is the kernel's own (its file system is of type %#x)", uint32(fs.Type))
	}
	return ""
}

// File systems that golang.org/x/sys does not name.
const (
	configfs = 0x62656570
	mqueue   = 0x19800202
)

// within calls f and gives up on it when it does not come back: a file system of the
// suspect's may not answer. The thread that is in it stays behind, and goes with this
// child.
func within[T any](f func() (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	got := make(chan answer, 1)
	go func() {
		v, err := f()
		got <- answer{v, err}
	}()
	late := time.NewTimer(filePatience)
	defer late.Stop()
	select {
	case a := <-got:
		return a.v, a.err
	case <-late.C:
		var none T
		return none, errBlocked
	}
}
