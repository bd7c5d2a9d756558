package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// lookData looks at the data folder.
func lookData(ctx context.Context, e *Examination) []Finding {
	info, err := os.Stat(e.Data)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return e.lookNoData()
	case err != nil:
		return []Finding{unknown("run this as root, or as stoop's user", "the data folder can't be looked at: %v", err)}
	case !info.IsDir():
		return []Finding{missing("name another with data, or --data", "%s is no folder", e.Data)}
	}
	used, seen := usage(ctx, e.Data)
	var out []Finding
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		out = append(out, warning("chmod 700 "+e.Data, "others on this machine may look into %s (%s): alerts and evidence are in it", e.Data, mode))
	}
	if err := unix.Faccessat(unix.AT_FDCWD, e.Data, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		do := fmt.Sprintf("run this as user %d, which it belongs to; if stoop does not run as that, chown it", owner(info))
		out = append(out, missing(do, "user %d may not write to %s (%s, of user %d): %v", os.Geteuid(), e.Data, info.Mode().Perm(), owner(info), err))
	}
	space, found := e.space(e.Data, used)
	keeps := bytesText(used)
	if !seen {
		keeps = "more than " + keeps
	}
	said := ok("%s is of user %d (%s) and holds %s; %s", e.Data, owner(info), info.Mode().Perm(), keeps, space)
	return append(append([]Finding{said}, out...), found...)
}

// lookNoData looks at where the data folder will be made.
func (e *Examination) lookNoData() []Finding {
	above := filepath.Dir(filepath.Clean(e.Data))
	for {
		if _, err := os.Stat(above); err == nil || above == "/" || above == "." {
			break
		}
		above = filepath.Dir(above)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, above, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return []Finding{missing(fmt.Sprintf("as root: install -d -m 700 -o USER %s", e.Data), "there is no %s, and user %d can't make it in %s: %v", e.Data, os.Geteuid(), above, err)}
	}
	space, found := e.space(above, 0)
	return append([]Finding{ok("there is no %s yet, stoop makes it; %s", e.Data, space)}, found...)
}

const (
	// spaceLeast is below what stoop has no room to begin with.
	spaceLeast = 64 << 20
)

// space holds what stoop may come to keep against what there is room for.
func (e *Examination) space(dir string, used int64) (string, []Finding) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "its free space is not known", []Finding{unknown("", "free space: %v", err)}
	}
	free := int64(st.Bavail) * st.Bsize
	grows := max(e.KeepMost-used, 0)
	said := fmt.Sprintf("%s are free, and it may grow by %s", bytesText(free), bytesText(grows))
	var out []Finding
	const less = "free some, or lower broker.limits and evidence.size"
	switch {
	case free < spaceLeast:
		out = append(out, missing(less, "only %s are free: stoop will go on in memory, and lose on a restart what is there", bytesText(free)))
	case free < grows:
		out = append(out, warning(less, "%s are free, and it may grow by %s: the disk can get full", bytesText(free), bytesText(grows)))
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		out = append(out, missing("mount it writable, or name another data folder", "the file system of %s is mounted read-only", dir))
	}
	switch st.Type {
	case unix.OVERLAYFS_SUPER_MAGIC:
		out = append(out, warning("give it a volume (hostPath)", "%s is in the container's own layer: what is undone, approved or counted is lost with it", dir))
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		out = append(out, warning("name a folder on a disk", "%s is in memory: a reboot loses it", dir))
	}
	return said, out
}

// usage is how many bytes of the disk are used below a folder; seen is false where not
// all of it could be looked at.
func usage(ctx context.Context, dir string) (n int64, seen bool) {
	seen = true
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // stoop is at work there
		}
		if err != nil {
			seen = false
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, is := info.Sys().(*syscall.Stat_t); is {
				n += st.Blocks * 512
			}
		}
		return nil
	})
	return n, seen && err == nil
}

// bytesText is a size in the units of the configuration.
func bytesText(n int64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB"}
	if n < 1<<10 {
		return fmt.Sprintf("%d bytes", n)
	}
	v, i := float64(n)/(1<<10), 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + " " + units[i]
}
