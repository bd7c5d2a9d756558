package node

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

const (
	testUID  = "0f1e2d3c-1f2e-4a5b-8c7d-9e0f1a2b3c4d"
	otherUID = "11111111-1f2e-4a5b-8c7d-9e0f1a2b3c4d"
)

func idOf(c string) string { return strings.Repeat(c, 64) }

func TestReadPath(t *testing.T) {
	id, other := idOf("a"), idOf("b")
	under := strings.ReplaceAll(testUID, "-", "_")
	pod, plain, none := Place{id, testUID}, Place{Container: id}, Place{}
	for _, tc := range []struct {
		name, path string
		want       Place
	}{
		{"containerd, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod},
		{"guaranteed", "/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod},
		{"crio, systemd", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/crio-" + id + ".scope/container", pod},
		{"crio, cgroupfs", "/kubepods/besteffort/pod" + testUID + "/crio-" + id, pod},
		{"docker under kubelet", "/kubepods.slice/kubepods-pod" + under + ".slice/docker-" + id + ".scope", pod},
		{"containerd, cgroupfs", "/kubepods/burstable/pod" + testUID + "/" + id, pod},
		{"kind", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope", pod},
		{"static pod", "/kubepods/burstable/pod" + strings.Repeat("c", 32) + "/" + id, Place{id, strings.Repeat("c", 32)}},
		{"containerd that was not told", "/system.slice/containerd.service/kubepods-burstable-pod" + under + ".slice:cri-containerd:" + id, pod},
		{"out of a cgroup namespace", "/../../../besteffort/pod" + testUID + "/" + id, pod},
		{"a sibling, out of a cgroup namespace", "/../cri-containerd-" + id + ".scope", plain},
		{"docker, cgroupfs", "/docker/" + id, plain},
		{"docker, systemd", "/system.slice/docker-" + id + ".scope", plain},
		{"podman", "/machine.slice/libpod-" + id + ".scope/container", plain},
		{"podman, cgroupfs", "/libpod_parent/libpod-" + id, plain},
		{"deeper in a container", "/docker/" + id + "/init.scope", plain},

		{"the pod's own", "/kubepods/burstable/pod" + testUID, Place{PodUID: testUID}},
		{"the host", "/", none},
		{"a service", "/system.slice/ssh.service", none},
		{"a container's monitor", "/machine.slice/libpod-conmon-" + id + ".scope", none},
		{"crio's monitor", "/kubepods/pod" + testUID + "/crio-conmon-" + id, Place{PodUID: testUID}},
		{"a shorter name", "/docker/" + id[:63], none},
		{"capitals", "/docker/" + strings.ToUpper(id), none},

		// What somebody who may make cgroups could call them.
		{"a container in a container", "/docker/" + id + "/docker/" + other, plain},
		{"a pod in a container", "/docker/" + id + "/kubepods/pod" + testUID + "/" + other, plain},
		{"another pod in a pod", "/kubepods/pod" + testUID + "/" + id + "/kubepods/pod" + otherUID + "/" + other, pod},
		{"a pod in a pod", "/kubepods/pod" + testUID + "/pod" + otherUID + "/" + id, pod},
		{"a user's", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope", none},
		{"a user's kubelet", "/user.slice/kubepods/pod" + testUID + "/" + id, none},
		{"a user's of old", "/user/root/docker/" + id, none},
		{"a user's, out of a namespace", "/../../user.slice/docker-" + id + ".scope", none},
		{"a service's", "/system.slice/jenkins.service/docker-" + id + ".scope", none},
		{"a service's kubelet", "/system.slice/jenkins.service/kubepods/pod" + testUID + "/" + id, none},
		{"containerd's own, but no pod's", "/system.slice/containerd.service/" + id, none},
		{"a pod that the kubelet did not make", "/system.slice/pod" + testUID + "/" + id, plain},
		{"rubbish", "/:::/\x00/..", none},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, upto := readPath(tc.path)
			if got != tc.want {
				t.Errorf("%s: %+v, not %+v", tc.path, got, tc.want)
			}
			if got.Container != "" && (!strings.HasPrefix(tc.path, upto) || !strings.Contains(upto, got.Container) || strings.Contains(upto, other)) {
				t.Errorf("%s: its own cgroup would be %s", tc.path, upto)
			}
		})
	}
}

func TestReadCgroup(t *testing.T) {
	id, other := idOf("a"), idOf("b")
	for _, tc := range []struct {
		name, text string
		want       Place
		ok         bool
	}{
		{"hybrid", "12:cpu:/docker/" + id + "\n2:freezer:/docker/" + id + "\n1:name=systemd:/docker/" + id + "\n0::/\n", Place{Container: id}, true},
		{"those that disagree", "2:cpu:/docker/" + id + "\n1:freezer:/docker/" + other + "\n", Place{}, false},
		{"a pod's and another's", "2:cpu:/kubepods/pod" + testUID + "/" + id + "\n1:freezer:/kubepods/pod" + otherUID + "/" + id + "\n", Place{}, false},
		{"a line that is none", "x\n0::relative\n0::/docker/" + id, Place{Container: id}, true},
		{"nothing", "", Place{}, true},
	} {
		if got, _, ok := readCgroup([]byte(tc.text)); got != tc.want || ok != tc.ok {
			t.Errorf("%s: %+v, %t", tc.name, got, ok)
		}
	}
}

func TestReadStat(t *testing.T) {
	tail := " S 41 4242 4242 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 1 2 3"
	for _, comm := range []string{"sh", "a b", "x) S 1 1 1", "((", ""} {
		s, err := readStat([]byte("4242 (" + comm + ")" + tail))
		if err != nil || s.comm != comm || s.parent != 41 || s.start != 123456 || s.kernel {
			t.Errorf("%q: %+v, %v", comm, s, err)
		}
	}
	for _, bad := range []string{"", "1 (", ")(", "1 (x) S 1 2", "1 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 -1", strings.Repeat("(", 5000)} {
		if s, err := readStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, s)
		}
	}
}

// A clock that was set meanwhile is no reason to lose a process that Falco,
// which started before, places by the clock as it was.
func TestClockThatWasSet(t *testing.T) {
	n := New(Config{})
	pid := os.Getpid()
	s, err := n.stat(pid)
	if err != nil {
		t.Fatal(err)
	}
	began := int64(n.clocks.note()[0]) + int64(s.start)*int64(tick)
	if err := n.began(pid, s.start, began); err != nil {
		t.Error(err)
	}
	before := began - int64(time.Hour)
	if err := n.began(pid, s.start, before); !errors.Is(err, ErrNotSame) {
		t.Errorf("an hour apart: %v", err)
	}
	n.clocks.seen = append([]time.Duration{n.clocks.seen[0] - time.Hour}, n.clocks.seen...)
	if err := n.began(pid, s.start, before); err != nil {
		t.Errorf("as the clock was: %v", err)
	}
}
