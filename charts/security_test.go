package charts

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// forbidden is what the Pod Security level restricted has against a pod.
func forbidden(t *testing.T, pod corev1.PodSpec) []string {
	t.Helper()
	e, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range e.EvaluatePod(api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}, &metav1.ObjectMeta{}, &pod) {
		if !r.Allowed {
			out = append(out, r.ForbiddenReason+": "+r.ForbiddenDetail)
		}
	}
	return out
}

// without is the pod without a container, and the volumes that it alone has.
func without(pod corev1.PodSpec, name string) corev1.PodSpec {
	drop := func(list []corev1.Container) []corev1.Container {
		return slices.DeleteFunc(slices.Clone(list), func(c corev1.Container) bool { return c.Name == name })
	}
	pod.InitContainers, pod.Containers = drop(pod.InitContainers), drop(pod.Containers)
	mounted := map[string]bool{}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, m := range c.VolumeMounts {
			mounted[m.Name] = true
		}
	}
	pod.Volumes = slices.DeleteFunc(slices.Clone(pod.Volumes), func(v corev1.Volume) bool { return !mounted[v.Name] })
	return pod
}

// By default stoop's containers pass restricted, but for the folders of the host's,
// and for the init container that takes these over.
func TestRestricted(t *testing.T) {
	for _, tt := range []struct {
		args []string
		but  []string // for nothing else
	}{
		{[]string{"--values", filepath.Join(chart, "ci", "http.yaml")}, nil},
		{[]string{"--set", "data.type=emptyDir"}, nil},
		{[]string{"--set", "data.prepare=false"}, []string{"hostPath volumes"}},
		{[]string{"--values", filepath.Join(chart, "ci", "pipe.yaml")}, []string{"hostPath volumes"}},
		{nil, []string{"hostPath volumes"}},
	} {
		pod := without(*render(t, tt.args...).stoop(t), "falco")
		if len(tt.args) == 0 {
			pod = without(pod, "prepare")
		}
		got := forbidden(t, pod)
		ok := len(got) >= len(tt.but)
		for _, g := range got {
			// The check of restricted for volume types says the same of a hostPath.
			ok = ok && len(tt.but) > 0 && strings.Contains(g, "hostPath")
		}
		if !ok {
			t.Errorf("%q: restricted has against it %q, want %q", tt.args, got, tt.but)
		}
		if got := forbidden(t, *render(t).stoop(t)); len(got) < 3 {
			t.Errorf("Falco passes restricted: the check checks nothing: %q", got)
		}
	}
	prepare := container(render(t).stoop(t), "prepare")
	if c := prepare.SecurityContext.Capabilities; len(c.Drop) != 1 || c.Drop[0] != "ALL" || !slices.Equal(c.Add, []corev1.Capability{"CHOWN", "DAC_READ_SEARCH"}) {
		t.Errorf("prepare may %v", c)
	}
}

// With the node's responders stoop has what docs/containment.md names, and no more;
// the container that holds the FIFO has nothing even so.
func TestNodeProfile(t *testing.T) {
	pod := render(t, "--set", "node.responders=true").stoop(t)
	c := container(pod, "stoop")
	want := []corev1.Capability{"KILL", "SYS_PTRACE", "SYS_ADMIN", "NET_ADMIN", "NET_RAW", "DAC_READ_SEARCH", "DAC_OVERRIDE", "SYS_CHROOT", "CHOWN", "FOWNER", "FSETID", "SETFCAP"}
	s := c.SecurityContext
	if !pod.HostPID || pod.HostNetwork || pod.HostIPC || s.Privileged != nil || *s.RunAsUser != 0 || !slices.Equal(s.Capabilities.Add, want) ||
		!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || s.AppArmorProfile.Type != corev1.AppArmorProfileTypeUnconfined {
		t.Errorf("stoop has %+v", s)
	}
	cgroup := false
	for _, m := range c.VolumeMounts {
		cgroup = cgroup || m.MountPath == "/sys/fs/cgroup" && !m.ReadOnly
	}
	if !cgroup {
		t.Error("stoop does not see the host's cgroups")
	}
	hold := container(pod, "hold").SecurityContext
	if len(hold.Capabilities.Add) != 0 || !*hold.RunAsNonRoot {
		t.Errorf("what holds the FIFO may %+v", hold)
	}
	pod = render(t, "--set", "node.responders=true", "--set", "node.capabilities={KILL}").stoop(t)
	if got := container(pod, "stoop").SecurityContext.Capabilities.Add; !slices.Equal(got, []corev1.Capability{"KILL"}) {
		t.Errorf("stoop may %v", got)
	}
	for _, args := range [][]string{nil, {"--set", "split=true"}} {
		pod := render(t, args...).stoop(t)
		if s := container(pod, "stoop").SecurityContext; pod.HostPID || len(s.Capabilities.Add) != 0 || s.RunAsNonRoot == nil {
			t.Errorf("%q: without the node's responders stoop may %+v", args, s)
		}
	}
	falco := container(render(t).falco(), "falco").SecurityContext
	if falco.Privileged != nil || !slices.Equal(falco.Capabilities.Add, []corev1.Capability{"BPF", "PERFMON", "SYS_RESOURCE", "SYS_PTRACE", "DAC_OVERRIDE"}) {
		t.Errorf("Falco may %+v", falco)
	}
}
