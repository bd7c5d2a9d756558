package doctor

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestData(t *testing.T) {
	c := config(t)
	if err := os.Chmod(c.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Data, "stream"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	found := examine(t, c, "data")
	has(t, found, OK, c.Data, "-rwx------", "holds 1 MiB", "may grow by 0 bytes")
	none(t, found, Missing)

	if err := os.Chmod(c.Data, 0o755); err != nil {
		t.Fatal(err)
	}
	has(t, examine(t, c, "data"), Warning, "others on this machine may look into", "chmod 700 "+c.Data)

	var st unix.Statfs_t
	if err := unix.Statfs(c.Data, &st); err != nil {
		t.Fatal(err)
	}
	c.KeepMost = int64(st.Blocks)*st.Bsize*2 + 1
	has(t, examine(t, c, "data"), Warning, "the disk can get full", "broker.limits")

	c.Data = filepath.Join(c.Data, "deeper/still")
	has(t, examine(t, c, "data"), OK, "there is no "+c.Data+" yet")
	if _, err := os.Stat(filepath.Dir(c.Data)); !os.IsNotExist(err) {
		t.Error("the folder was made")
	}
	c.Data = write(t, filepath.Join(t.TempDir(), "file"), "")
	has(t, examine(t, c, "data"), Missing, "is no folder")
}

// What is full, read-only or in memory is said.
func TestDataOnABadDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	c := config(t)
	if err := unix.Mount("tmpfs", c.Data, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Skipf("no file system can be mounted here: %v", err)
	}
	defer func() { _ = unix.Unmount(c.Data, unix.MNT_DETACH) }()
	found := examine(t, c, "data")
	has(t, found, Missing, "only 1 MiB are free", "in memory")
	has(t, found, Warning, "a reboot loses it")
	if err := unix.Mount("", c.Data, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	found = examine(t, c, "data")
	has(t, found, Missing, "is mounted read-only")
	has(t, found, Missing, "may not write", "read-only file system")
}

func TestSizes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 1023: "1023 bytes", 1 << 10: "1 KiB", 1536: "1.5 KiB", 256 << 20: "256 MiB", 3 << 40: "3 TiB", 5 << 50: "5120 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
