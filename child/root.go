package child

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// spot is a name in a folder of a container, held by descriptors: what becomes of
// the path above it meanwhile doesn't matter.
type spot struct {
	parent *os.File
	name   string
	mount  uint64
}

// find resolves a place's folder.
func (p Place) find() (*spot, error) {
	dir, name := path.Split(p.Path)
	switch {
	case !path.IsAbs(p.Path), strings.ContainsRune(p.Path, 0), len(p.Path) >= unix.PathMax:
		return nil, refuse("what the alert names is no absolute path")
	case name == "", name == ".", name == "..":
		return nil, refuse("what the alert names is a folder")
	}
	root, err := p.root()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	mount, err := mountOf(root)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat2(int(root.Fd()), dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	switch {
	case errors.Is(err, unix.EXDEV):
		return nil, refuse("its folder is on another mount than the container's root, such as a volume: others may share it")
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, gone("its folder is not there")
	case errors.Is(err, unix.ELOOP):
		return nil, refuse("its folder is behind too many symbolic links, or one of /proc's")
	case err != nil:
		return nil, fmt.Errorf("open its folder: %w", err)
	}
	return &spot{os.NewFile(uintptr(fd), dir), name, mount}, nil
}

// root is the container's root, which has to be one of its own.
func (p Place) root() (*os.File, error) {
	root, ns, err := p.mounts()
	if err != nil {
		return nil, err
	}
	if err := p.check(root, ns); err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// mounts is the container's root and the name of its mount namespace, by its oldest
// process: what such a process made its root with chroot doesn't count.
func (p Place) mounts() (root *os.File, ns string, err error) {
	var oldest *process
	for _, s := range p.Suspects {
		q, err := hold(s, p.Container)
		if err != nil {
			continue
		}
		if oldest == nil || q.start < oldest.start || q.start == oldest.start && q.pid < oldest.pid {
			oldest, q = q, oldest
		}
		if q != nil {
			q.dir.Close()
		}
	}
	if oldest == nil {
		return nil, "", gone("no process of the container is left")
	}
	defer oldest.dir.Close()
	ns, err = oldest.link("ns/mnt")
	if err != nil {
		return nil, "", fmt.Errorf("read the mount namespace of process %d: %w", oldest.pid, err)
	}
	if hosts(ns) {
		return nil, "", refuse("the container sees the host's own mounts (or it can't be told): its files are the host's")
	}
	f, err := oldest.open("ns/mnt")
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	root, err = rootOf(f)
	return root, ns, err
}

// hosts reports whether a mount namespace is stoop's own or the host's, or may
// be. The host's is that of its init, and of its kernel threads, of which the
// parent is process 2: one of the two may not let itself be looked at.
func hosts(ns string) bool {
	if own, err := os.Readlink("/proc/self/ns/mnt"); err != nil || own == ns {
		return true
	}
	known := false
	for _, pid := range []string{"1", "2"} {
		host, err := os.Readlink("/proc/" + pid + "/ns/mnt")
		if err == nil && host == ns {
			return true
		}
		known = known || err == nil
	}
	return !known
}

// check makes sure that the root is a container's own, and that of the process
// whose path it is.
func (p Place) check(root *os.File, ns string) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &fs); err != nil {
		return fmt.Errorf("look at the container's root: %w", err)
	}
	if fs.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return refuse("the container's root is no overlay (its file system is of type %#x): it can't be told from a volume that others share", uint32(fs.Type))
	}
	if p.Seen.PID == 0 {
		return nil
	}
	q, err := hold(p.Seen, p.Container)
	if errors.Is(err, errGone) {
		return nil // it said the path while it lived; who has its number now says nothing
	}
	if err != nil {
		return refuse("the alert's process: %v", err)
	}
	defer q.dir.Close()
	fd, err := unix.Openat(int(q.dir.Fd()), "root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return refuse("the root of the alert's process can't be looked at: %v", err)
	}
	its := os.NewFile(uintptr(fd), "root")
	defer its.Close()
	if now, err := q.link("ns/mnt"); err != nil || now != ns || !sameFile(its, root) {
		return refuse("the alert's process sees other files than its container: the path may mean another file there")
	}
	return nil
}

// rootOf is the root of a mount namespace.
func rootOf(ns *os.File) (*os.File, error) {
	type answer struct {
		f   *os.File
		err error
	}
	got := make(chan answer, 1)
	go func() {
		// The thread is never unlocked, and goes with the goroutine.
		runtime.LockOSThread()
		// A thread shares its root with the others until it says otherwise, and
		// the kernel lets none that does into another namespace of mounts.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			got <- answer{err: fmt.Errorf("unshare: %w", err)}
			return
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			got <- answer{err: fmt.Errorf("enter the container's mount namespace: %w", err)}
			return
		}
		fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			got <- answer{err: fmt.Errorf("open the container's root: %w", err)}
			return
		}
		got <- answer{f: os.NewFile(uintptr(fd), "/")}
	}()
	a := <-got
	return a.f, a.err
}

// mountOf is the number of the mount that a descriptor is on.
func mountOf(f *os.File) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("look at a mount: %w", err)
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0, refuse("this kernel does not say on which mount a file is: Linux 5.8 does")
	}
	return st.Mnt_id, nil
}

// sameFile reports whether two descriptors are of one file on one mount.
func sameFile(a, b *os.File) bool {
	ma, erra := mountOf(a)
	mb, errb := mountOf(b)
	var sa, sb unix.Stat_t
	return erra == nil && errb == nil && ma == mb &&
		unix.Fstat(int(a.Fd()), &sa) == nil && unix.Fstat(int(b.Fd()), &sb) == nil && sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

// open opens the file of the name for reading, if it is a regular one on the
// container's root. Nothing else is opened: that alone may do something.
func (s *spot) open() (*os.File, error) {
	fd, err := unix.Openat(int(s.parent.Fd()), s.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, gone("the file is not there")
	case err != nil:
		return nil, fmt.Errorf("open it: %w", err)
	}
	at := os.NewFile(uintptr(fd), s.name)
	defer at.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("look at it: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, refuse("it is %s, and only regular files are taken", kindOf(st.Mode))
	}
	// One file can be a mount by itself.
	if mount, err := mountOf(at); err != nil {
		return nil, err
	} else if mount != s.mount {
		return nil, refuse("it is on another mount than the container's root, such as a volume: others may share it")
	}
	// This very file, by the descriptor, not by its name. O_NONBLOCK: a lease
	// that somebody holds on it must not keep us.
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, &Refusal{Later: true, Reason: "somebody holds a lease on it; the kernel breaks it soon"}
	}
	if err != nil {
		return nil, fmt.Errorf("open it for reading: %w", err)
	}
	return f, nil
}

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFDIR:
		return "a folder"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	}
	return "a device"
}

// xattrsMost bounds the bytes of all extended attributes of a file.
const xattrsMost = 64 << 10

// describe reads what a file is besides its content.
func describe(f *os.File, path string) (File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return File{}, fmt.Errorf("look at it: %w", err)
	}
	d := File{
		Path: path, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Size: st.Size,
		Access: clock(st.Atim), Modify: clock(st.Mtim), Change: clock(st.Ctim),
		Dev: uint64(st.Dev), Inode: st.Ino, Links: uint64(st.Nlink),
	}
	names := make([]byte, xattrsMost)
	n, err := unix.Flistxattr(int(f.Fd()), names)
	if errors.Is(err, unix.ENOTSUP) {
		return d, nil
	}
	if err != nil {
		return d, fmt.Errorf("list its extended attributes: %w", err)
	}
	total := n
	for name := range bytes.SplitSeq(names[:n], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value := make([]byte, xattrsMost)
		n, err := unix.Fgetxattr(int(f.Fd()), string(name), value)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return d, fmt.Errorf("read its extended attribute %.100q: %w", name, err)
		}
		if total += n; total > xattrsMost {
			return d, refuse("its extended attributes have more than %d bytes", xattrsMost)
		}
		if d.Xattrs == nil {
			d.Xattrs = map[string][]byte{}
		}
		d.Xattrs[string(name)] = value[:n]
	}
	return d, nil
}

func clock(t unix.Timespec) time.Time { return time.Unix(0, t.Nano()).UTC() }

// serveTake is the child's side of [Launcher.Take].
func serveTake(request json.RawMessage, to *parent) error {
	var t take
	if err := json.Unmarshal(request, &t); err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	at, err := t.find()
	if err != nil {
		return err
	}
	defer at.parent.Close()
	f, err := at.open()
	if err != nil {
		return err
	}
	defer f.Close()
	was, err := describe(f, t.Path)
	if err != nil {
		return err
	}
	if was.Size > t.Max {
		return refuse("it has %d bytes, and at most %d are taken", was.Size, t.Max)
	}
	if err := to.sayJSON(frameFound, was); err != nil {
		return err
	}
	if err := to.content(f, was.Size); err != nil {
		return err
	}
	if err := to.goAhead(); err != nil {
		return err
	}
	if err := at.remove(f, was); err != nil {
		return err
	}
	return to.say(frameDone, nil)
}

// content hands over exactly size bytes.
func (p *parent) content(r io.Reader, size int64) error {
	buf := make([]byte, 64<<10)
	var sent int64
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if sent += int64(n); sent > size {
				return refuse("it grows while it is read")
			}
			if err := p.say(frameData, buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read it: %w", err)
		}
	}
	if sent != size {
		return refuse("it shrinks while it is read")
	}
	return p.say(frameEnd, nil)
}

// remove takes the name away if it still means the file f, which still is what
// it was.
func (s *spot) remove(f *os.File, was File) error {
	now, err := describe(f, was.Path)
	if err != nil {
		return err
	}
	if !now.Same(was) {
		return &Refusal{Later: true, Reason: "it was changed while it was kept"}
	}
	again, err := s.open()
	if err != nil {
		return err
	}
	defer again.Close()
	if !sameFile(again, f) {
		return &Refusal{Later: true, Reason: "another file has its name by now"}
	}
	if err := unix.Unlinkat(int(s.parent.Fd()), s.name, 0); err != nil {
		return fmt.Errorf("remove its name: %w", err)
	}
	return nil
}

// servePutBack is the child's side of [Launcher.PutBack].
func servePutBack(request json.RawMessage, from *parent) error {
	var p putBack
	if err := json.Unmarshal(request, &p); err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	at, err := p.find()
	if err != nil {
		return err
	}
	defer at.parent.Close()
	var no *Refusal
	there, err := at.open()
	switch {
	case err == nil:
		defer there.Close()
		if already, err := p.isThere(there); err != nil || !already {
			return errors.Join(err, refuse("another file is at its place by now"))
		}
		return from.sayJSON(frameDone, true)
	case !errors.As(err, &no):
		return err
	case !no.Gone:
		return refuse("something else is at its place by now: %s", no.Reason)
	}
	if err := from.say(frameFound, nil); err != nil {
		return err
	}
	if err := at.make(p.File, p.SHA256, from); err != nil {
		return err
	}
	return from.sayJSON(frameDone, false)
}

// isThere reports whether a file is the one that is to be put back, by its content.
func (p putBack) isThere(f *os.File) (bool, error) {
	info, err := f.Stat()
	if err != nil || info.Size() != p.File.Size {
		return false, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(f, p.File.Size+1)); err != nil {
		return false, err
	}
	return hex.EncodeToString(h.Sum(nil)) == p.SHA256, nil
}

// make writes the file under a name of its own, and gives it the right one when
// it is whole.
func (s *spot) make(d File, sum string, from *parent) (err error) {
	parent := int(s.parent.Fd())
	temp := ".stoop-" + rand.Text()
	fd, err := unix.Openat(parent, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make it: %w", err)
	}
	f := os.NewFile(uintptr(fd), s.name)
	defer f.Close()
	defer func() {
		if err != nil {
			_ = unix.Unlinkat(parent, temp, 0)
		}
	}()
	h, n := sha256.New(), int64(0)
	for {
		kind, payload, err := from.in.next()
		if err != nil {
			return errors.New("the parent is gone")
		}
		if kind == frameEnd {
			break
		}
		if n += int64(len(payload)); kind != frameData || n > d.Size {
			return refuse("what was kept of it is not what it was")
		}
		h.Write(payload)
		if _, err := f.Write(payload); err != nil {
			return fmt.Errorf("write it: %w", err)
		}
	}
	if hex.EncodeToString(h.Sum(nil)) != sum {
		return refuse("what was kept of it was changed since: its SHA-256 is another")
	}
	// The owner before the mode, for it takes set-id bits away, and the
	// attributes after the owner, for it takes capabilities away.
	if err := unix.Fchown(fd, int(d.UID), int(d.GID)); err != nil {
		return fmt.Errorf("give it its owner: %w", err)
	}
	if err := unix.Fchmod(fd, d.Mode); err != nil {
		return fmt.Errorf("give it its mode: %w", err)
	}
	for name, value := range d.Xattrs {
		if err := unix.Fsetxattr(fd, name, value, 0); err != nil {
			return fmt.Errorf("give it its extended attribute %.100q: %w", name, err)
		}
	}
	if err := os.Chtimes(fmt.Sprintf("/proc/self/fd/%d", fd), d.Access, d.Modify); err != nil {
		return fmt.Errorf("give it its times: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write it: %w", err)
	}
	err = unix.Renameat2(parent, temp, parent, s.name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return refuse("another file is at its place by now")
	}
	if err != nil {
		return fmt.Errorf("give it its name: %w", err)
	}
	return nil
}
