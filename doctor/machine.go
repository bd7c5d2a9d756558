package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"stoop/responders"
)

// cniDir is where the kubelet's network plugins are configured.
const cniDir = "/etc/cni/net.d"

// cniTypes are the types of the node's network plugins: of the first configuration by
// name, which is the one that container runtimes take.
func (e *Examination) cniTypes() ([]string, error) {
	paths, err := tree("").list(cniDir)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(path)) {
			continue
		}
		src, err := tree("").read(path)
		if err != nil {
			return nil, err
		}
		var conf struct {
			Type    string
			Plugins []struct{ Type string }
		}
		if json.Unmarshal(src, &conf) != nil {
			continue
		}
		types := []string{conf.Type}
		for _, p := range conf.Plugins {
			types = append(types, p.Type)
		}
		return types, nil
	}
	return nil, errNoCNI
}

// clockSynchronised reports what the kernel was told of its clock. adjtimex(2) with no
// modes reads alone.
func clockSynchronised() (bool, error) {
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		return false, err
	}
	return t.Status&unix.STA_UNSYNC == 0, nil
}

// lookNode looks at what the rules' responders need of this machine.
func lookNode(_ context.Context, e *Examination) []Finding {
	local := e.uses(func(en *responders.Entry) bool { return len(en.Needs) > 0 })
	if len(local) == 0 {
		if e.RulesErr != nil {
			return []Finding{unknown("mend the rules; stoop responders says it of each responder", "what the rules need of this machine: they can't be read")}
		}
		return []Finding{ok("the rules act on nothing of the node itself")}
	}
	by := map[string][]string{}
	var order, fine []string
	for _, name := range local {
		i := slices.IndexFunc(e.Entries, func(en responders.Entry) bool { return en.Name == name })
		lacks := e.Host.Missing(e.Entries[i].Needs...)
		if len(lacks) == 0 {
			fine = append(fine, name)
		}
		for _, l := range lacks {
			if by[l] == nil {
				order = append(order, l)
			}
			by[l] = append(by[l], name)
		}
	}
	var out []Finding
	if len(fine) > 0 {
		out = append(out, ok("all is there for %s", strings.Join(fine, ", ")))
	}
	for _, l := range order {
		out = append(out, missing("docs/containment.md has what each needs, and why; run this as stoop runs", "for %s: %s", strings.Join(by[l], ", "), l))
	}
	return out
}

// lookVersions says which versions there are, of what can be seen.
func lookVersions(_ context.Context, e *Examination) []Finding {
	said := []string{"stoop " + e.Version, runtime.GOARCH}
	var not []string
	if f := e.falco(); f.from != "" {
		said = append(said, fmt.Sprintf("Falco %s (%s)", f.version, f.from))
	} else {
		not = append(not, "Falco")
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		said = append(said, "Linux "+unix.ByteSliceToString(u.Release[:]))
	}
	if v := systemd(); v != "" {
		said = append(said, "systemd "+v)
	} else if _, err := os.Stat("/run/systemd/system"); err == nil {
		not = append(not, "systemd")
	}
	if v := tree("").installed("containerd", "containerd.io"); v != "" {
		said = append(said, "containerd "+v)
	} else {
		not = append(not, "containerd")
	}
	out := []Finding{ok("%s", strings.Join(said, "; "))}
	if len(not) > 0 {
		out[0].Found += "; not to be seen from here: " + strings.Join(not, ", ")
	}
	return out
}

// systemd is the version of the systemd that is installed, by the name of its library:
// its programs would have to be run, and its bus spoken to.
func systemd() string {
	for _, pattern := range []string{"/usr/lib/systemd/libsystemd-shared-*.so", "/usr/lib/*/systemd/libsystemd-shared-*.so", "/lib/systemd/libsystemd-shared-*.so"} {
		found, _ := filepath.Glob(pattern)
		if len(found) > 0 {
			name := strings.TrimSuffix(filepath.Base(found[len(found)-1]), ".so")
			return strings.TrimPrefix(name, "libsystemd-shared-")
		}
	}
	return ""
}
