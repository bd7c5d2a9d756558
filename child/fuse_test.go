package child

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"stoop/node/nodetest"
)

// hangingFile is a copy of a file on a file system that after hang never answers
// again who reads it: what a suspect with CAP_SYS_ADMIN in a namespace of its own
// can make. Whoever reads it then waits, and not even SIGKILL ends that, until
// release is called.
//
// Another process serves it: one that starts a program from a file system of its
// own may wait for itself.
func hangingFile(t testing.TB, of string) (path string, hang, release func()) {
	t.Helper()
	nodetest.Root(t)
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe", "suspect", "fuse", dir, of)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if said := run(t, cmd); said != "ready" {
		nodetest.Missing(t, "FUSE: %s", said)
	}
	release = sync.OnceFunc(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	t.Cleanup(release)
	hang = func() {
		if _, err := io.WriteString(in, "hang\n"); err != nil {
			t.Fatal(err)
		}
		nodetest.Wait(t, "the file system to hang", func() bool { _, err := os.Stat(dir + ".hangs"); return err == nil })
	}
	return filepath.Join(dir, "file"), hang, release
}

// beFUSE serves until its standard input ends.
func beFUSE(dir, of string) error {
	content, err := os.ReadFile(of)
	if err != nil {
		return err
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Mount("stoop-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, "fd="+strconv.Itoa(fd)+",rootmode=40000,user_id=0,group_id=0,allow_other"); err != nil {
		return err
	}
	// Whoever waits is let go when this process ends, and with it the descriptor.
	defer unix.Unmount(dir, unix.MNT_DETACH)
	var hangs atomic.Bool
	go serveFUSE(fd, content, &hangs)
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		hangs.Store(true)
		if err := os.WriteFile(dir+".hangs", nil, 0o600); err != nil {
			return err
		}
	}
	return unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
}

func serveFUSE(fd int, content []byte, hangs *atomic.Bool) {
	attr := func(b []byte, node uint64) []byte {
		mode, size := uint32(unix.S_IFDIR|0o755), uint64(0)
		if node != 1 {
			mode, size = unix.S_IFREG|0o755, uint64(len(content))
		}
		for _, n := range []uint64{node, size, size / 512, 0, 0, 0} { // ino, size, blocks, times
			b = binary.NativeEndian.AppendUint64(b, n)
		}
		for _, n := range []uint32{0, 0, 0, mode, 1, 0, 0, 0, 4096, 0} { // …, mode, nlink, uid, gid, rdev, blksize
			b = binary.NativeEndian.AppendUint32(b, n)
		}
		return b
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		opcode, unique, node := binary.NativeEndian.Uint32(buf[4:]), binary.NativeEndian.Uint64(buf[8:]), binary.NativeEndian.Uint64(buf[16:])
		var body []byte
		var errno int32
		switch opcode {
		case 26: // INIT
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body, 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 1<<16) // max_write
		case 1: // LOOKUP
			body = binary.NativeEndian.AppendUint64(body, 2)
			body = append(body, make([]byte, 32)...)
			body = attr(body, 2)
		case 3: // GETATTR
			body = attr(make([]byte, 16), node)
		case 14: // OPEN
			body = make([]byte, 16)
		case 15: // READ
			if hangs.Load() {
				continue
			}
			at, most := binary.NativeEndian.Uint64(buf[48:]), uint64(binary.NativeEndian.Uint32(buf[56:]))
			at = min(at, uint64(len(content)))
			body = content[at:min(at+most, uint64(len(content)))]
		case 2, 36, 42: // FORGET, INTERRUPT: nobody expects an answer
			continue
		case 25, 18: // FLUSH, RELEASE
		default:
			errno = -int32(unix.ENOSYS)
		}
		out := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		out = binary.NativeEndian.AppendUint32(out, uint32(errno))
		out = binary.NativeEndian.AppendUint64(out, unique)
		if _, err := unix.Write(fd, append(out, body...)); err != nil && !errors.Is(err, unix.ENOENT) {
			return
		}
	}
}
