package node

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hierarchy is a tree of cgroups that can freeze.
type hierarchy struct {
	root    string
	version int // of cgroups: 1 is the freezer's hierarchy
}

// hierarchies finds what is mounted: v2 alone, v1, or both side by side, as the
// hybrid layout has them, where v2 comes first. A v2 before Linux 5.2 can't
// freeze and is left out.
func hierarchies(mount string) []hierarchy {
	var found []hierarchy
	for _, h := range []hierarchy{
		{mount, 2},
		{filepath.Join(mount, "unified"), 2},
		{filepath.Join(mount, "freezer"), 1},
	} {
		tell := "cgroup.controllers"
		if h.version == 1 {
			tell = "tasks"
		}
		if _, err := os.Stat(filepath.Join(h.root, tell)); err == nil {
			found = append(found, h)
		}
	}
	return found
}

// has reports whether a line of /proc/PID/cgroup is about this hierarchy.
func (h hierarchy) has(l membership) bool {
	if h.version == 2 {
		return l.controllers == ""
	}
	return slices.Contains(strings.Split(l.controllers, ","), "freezer")
}

const (
	maxDepth  = 16    // of cgroups that are looked into; containers are at most 6 deep
	maxFolder = 65536 // cgroups that one walk looks at
)

// walk calls see for each cgroup folder below dir that may hold containers, and
// found for each that is one; it looks into no container, for what is in there
// is that container's, and into nothing of the host's users.
func (h hierarchy) walk(dir string, see func(dir string), found func(entry)) error {
	left := maxFolder
	var visit func(dir string, depth int) error
	visit = func(dir string, depth int) error {
		if left--; left < 0 || depth > maxDepth {
			return nil
		}
		if see != nil {
			see(dir) // before it is read: what is made after that is seen by the watch
		}
		names, err := folders(dir)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || gone(err) {
				return nil
			}
			return err
		}
		for _, name := range names {
			child := filepath.Join(dir, name)
			switch e, ok := h.entryOf(child); {
			case ok:
				found(e)
			case h.mayHold(child):
				if err := visit(child, depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return visit(dir, 0)
}

// mayHold reports whether containers below a folder could be believed.
func (h hierarchy) mayHold(dir string) bool {
	base := filepath.Base(dir)
	return base != "user.slice" && (!strings.HasSuffix(base, ".service") || base == "containerd.service") &&
		(base != "user" || filepath.Dir(dir) != h.root)
}

// entryOf tells whether a folder is a container's own cgroup.
func (h hierarchy) entryOf(dir string) (entry, bool) {
	rel, ok := strings.CutPrefix(dir, h.root)
	if !ok {
		return entry{}, false
	}
	p, upto := readPath(rel)
	if p.Container == "" || len(upto) != len(rel) {
		return entry{}, false
	}
	return entry{Place: p, path: dir, version: h.version}, true
}

// folders are the names of the folders in dir. The kernel says of each name
// what it is, so nothing but dir is looked at.
func folders(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range all {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
