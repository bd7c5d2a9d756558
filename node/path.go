package node

import (
	"bytes"
	"regexp"
	"strings"
)

// Place is where a cgroup path says that a process runs; the zero value is the
// host.
type Place struct {
	Container string // whole id
	PodUID    string // of the Kubernetes pod; "" for a plain container
}

// How the container runtimes and the kubelet name their cgroups.
var (
	// With systemd cri-containerd-<id>.scope, crio-<id>.scope, docker-<id>.scope,
	// libpod-<id>.scope; with cgroupfs the id alone, or behind the runtime's
	// name. crio-conmon-<id> and libpod-conmon-<id> hold the container's
	// monitor, which is the host's.
	containerName = regexp.MustCompile(`^(?:(?:cri-containerd|containerd|nerdctl|crio|docker|libpod)-)?([0-9a-f]{64})(?:\.scope)?$`)
	// A containerd that was not told of the kubelet's systemd driver makes
	// kubepods-burstable-pod<uid>.slice:cri-containerd:<id>.
	colonName = regexp.MustCompile(`^([a-z-]*pod[0-9a-f_-]+\.slice):(?:cri-containerd|containerd|crio|docker):([0-9a-f]{64})$`)
	// Static pods have 32 hexadecimal digits for their UID.
	podName = regexp.MustCompile(`^(?:[a-z-]+-)?pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?$`)

	containerID = regexp.MustCompile(`^[0-9a-f]{12,64}$`)
)

// readPath reads one cgroup path, as seen from the root of its hierarchy or, if
// it begins with /.., of a cgroup namespace. upto is the part of it that is the
// container's own cgroup.
//
// Who may make cgroups may call them as he likes, so only what stands furthest
// left counts: below a container everything is that container's, below a user's
// slice or a service nothing is anybody's.
func readPath(path string) (p Place, upto string) {
	var kubelet bool
	for i, from := 0, 0; from < len(path); i++ {
		to := len(path)
		if n := strings.IndexByte(path[from:], '/'); n >= 0 {
			to = from + n
		}
		name := path[from:to]
		switch {
		case name == "..":
			kubelet = true // what stands above is not to be seen
		case name == "user.slice", name == "user" && strings.Trim(path[:from], "/.") == "":
			return Place{}, ""
		case strings.HasSuffix(name, ".service"):
			// Only containerd's own, which holds what it was not told about.
			rest, colon := strings.CutPrefix(path[to:], "/")
			rest, _, _ = strings.Cut(rest, "/")
			if !colon || !colonName.MatchString(rest) || name != "containerd.service" {
				return Place{}, ""
			}
		case containerName.MatchString(name):
			p.Container = containerName.FindStringSubmatch(name)[1]
			return p, path[:to]
		case colonName.MatchString(name):
			m := colonName.FindStringSubmatch(name)
			p.Container = m[2]
			if pod := podName.FindStringSubmatch(m[1]); pod != nil && p.PodUID == "" {
				p.PodUID = uidOf(pod[1])
			}
			return p, path[:to]
		}
		kubelet = kubelet || strings.Contains(name, "kubepods")
		if m := podName.FindStringSubmatch(name); m != nil && kubelet && p.PodUID == "" {
			p.PodUID = uidOf(m[1])
		}
		from = to + 1
	}
	return p, ""
}

func uidOf(s string) string { return strings.ReplaceAll(s, "_", "-") }

// membership is one line of /proc/PID/cgroup.
type membership struct {
	controllers string // "" is v2
	path        string
}

// readCgroup reads /proc/PID/cgroup: one line for cgroup v2, one a hierarchy for
// v1. Lines that name different containers or pods prove none: ok is false.
func readCgroup(b []byte) (p Place, lines []membership, ok bool) {
	for line := range bytes.Lines(b) {
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			continue
		}
		lines = append(lines, membership{f[1], f[2]})
		here, _ := readPath(f[2])
		if here == (Place{}) {
			continue
		}
		if p != (Place{}) && p != here {
			return Place{}, lines, false
		}
		p = here
	}
	return p, lines, true
}
