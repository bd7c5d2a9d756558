package responders

import (
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"stoop/child"
)

// The test program is also the children that responders start, and the
// containers that tests need.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "child":
			os.Exit(child.Main(os.Args[2], os.Stdin, os.Stdout, os.Stderr))
		case "hanging-child":
			hangingChild()
		case "container":
			if err := beContainer(os.Args[2]); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			fmt.Println("ready")
			_, _ = os.Stdin.Read(make([]byte, 1)) // to its end
			os.Exit(0)
		}
	}
	// Tests that run beside each other mostly wait, for the servers of their own.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// hangingChild says half of a piece and then nothing.
func hangingChild() {
	for _, f := range []struct {
		kind    byte
		payload string
	}{{'P', `{"name":"1.maps","max":1000}`}, {'D', "half of it"}} {
		b := binary.BigEndian.AppendUint32([]byte{f.kind}, uint32(len(f.payload)))
		if _, err := os.Stdout.Write(append(b, f.payload...)); err != nil {
			os.Exit(1)
		}
	}
	time.Sleep(time.Hour)
}

// beContainer gives this process, which has mounts of its own, a root as a
// container runtime makes it: an overlay over an image, with a volume and a
// single file mounted into it. what is in dir says more: see [startContainer].
func beContainer(dir string) error {
	at := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	there := func(name string) bool { _, err := os.Stat(at(name)); return err == nil }
	merged := at("merged")
	mount := func(source, target, fstype string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, fstype, flags, data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", source, target, err)
		}
		return nil
	}
	root := func() error {
		return mount("overlay", merged, "overlay", 0, "lowerdir="+at("lower")+",upperdir="+at("upper")+",workdir="+at("work"))
	}
	if there("no-overlay") {
		root = func() error { return mount(at("lower"), merged, "", unix.MS_BIND, "") }
	}
	for _, do := range []func() error{
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		root,
		func() error { return mount(at("volume"), filepath.Join(merged, "vol"), "", unix.MS_BIND, "") },
		func() error {
			return mount(at("volume", "hosts"), filepath.Join(merged, "etc/hosts"), "", unix.MS_BIND, "")
		},
		func() error { return mount("proc", filepath.Join(merged, "proc"), "proc", 0, "") },
		func() error { return unix.PivotRoot(merged, filepath.Join(merged, "old")) },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Unmount("/old", unix.MNT_DETACH) },
	} {
		if err := do(); err != nil {
			return err
		}
	}
	if _, err := os.Stat("/chroot-to-volume"); err == nil {
		return unix.Chroot("/vol")
	}
	return nil
}
