package nodetest

import (
	"encoding/binary"
	"errors"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Stuck runs a process in a cgroup that is in a call to the kernel which does not
// come back, whatever is sent to it, before release: it looks for a file in a file
// system that answers nobody, as a container with CAP_SYS_ADMIN can make one.
func Stuck(t testing.TB, cgroup string) (release func()) {
	t.Helper()
	Root(t)
	dir := t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		Missing(t, "FUSE: %v", err)
	}
	options := "fd=" + strconv.Itoa(fd) + ",rootmode=40000,user_id=0,group_id=0"
	if err := unix.Mount("stoop-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = unix.Close(fd)
		Missing(t, "FUSE: %v", err)
	}
	asked, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		serveNobody(fd, sync.OnceFunc(func() { close(asked) }))
	}()
	release = sync.OnceFunc(func() {
		_ = unix.Unmount(dir, unix.MNT_FORCE) // ends the waits on both sides
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		<-ended
		_ = unix.Close(fd)
	})
	t.Cleanup(release)
	Shell(t, cgroup, "cat "+dir+"/file; sleep 1000")
	t.Cleanup(release) // before the shell is waited for
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody looked into the file system")
	}
	return release
}

// serveNobody begins to serve a FUSE mount, and answers nothing that is asked of it.
func serveNobody(fd int, asked func()) {
	const lookup, begin = 1, 26
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil || n < 16 {
			return
		}
		switch binary.NativeEndian.Uint32(buf[4:]) {
		case lookup:
			asked()
		case begin:
			out := make([]byte, 16+64)
			binary.NativeEndian.PutUint32(out, uint32(len(out)))
			copy(out[8:16], buf[8:16])                 // whose answer it is
			binary.NativeEndian.PutUint32(out[16:], 7) // the protocol's version
			binary.NativeEndian.PutUint32(out[20:], 31)
			binary.NativeEndian.PutUint32(out[36:], 1<<16) // the largest write
			if _, err := unix.Write(fd, out); err != nil {
				return
			}
		}
	}
}
