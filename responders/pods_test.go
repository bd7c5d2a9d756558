package responders_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

const testNode = "node-1"

// containerID is a whole id that begins with the digits.
func containerID(digits string) string { return digits + strings.Repeat("0", 64-len(digits)) }

type podWorld struct {
	t      testing.TB
	server *conformance.Server
	admin  kubernetes.Interface
	pods   *responders.Pods
}

// newPodWorld has the pods running; make is called before they are first read.
func newPodWorld(t testing.TB, make func(w *podWorld)) *podWorld {
	s := conformance.NewServer(t)
	w := &podWorld{t: t, server: s, admin: s.Admin()}
	make(w)
	w.pods = runPods(t, s.Config())
	w.pods.SetWait(time.Second)
	w.pods.SetProc(t.TempDir())
	return w
}

func runPods(t testing.TB, config *rest.Config) *responders.Pods {
	client, err := responders.NewKube(config)
	if err != nil {
		t.Fatal(err)
	}
	p := responders.NewPods(client, testNode, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return p
}

// add makes a pod; edit fills in its status.
func (w *podWorld) add(node, namespace, name string, edit func(s *corev1.PodStatus)) *corev1.Pod {
	w.t.Helper()
	pod, err := w.admin.CoreV1().Pods(namespace).Create(context.Background(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "x"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.edit(pod, edit)
}

func (w *podWorld) edit(pod *corev1.Pod, edit func(s *corev1.PodStatus)) *corev1.Pod {
	w.t.Helper()
	if edit == nil {
		return pod
	}
	edit(&pod.Status)
	pod, err := w.admin.CoreV1().Pods(pod.Namespace).UpdateStatus(context.Background(), pod, metav1.UpdateOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return pod
}

func (w *podWorld) remove(pod *corev1.Pod) {
	w.t.Helper()
	err := w.admin.CoreV1().Pods(pod.Namespace).Delete(context.Background(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil {
		w.t.Fatal(err)
	}
}

func running(ids ...string) func(*corev1.PodStatus) {
	return func(s *corev1.PodStatus) {
		s.ContainerStatuses = nil
		for _, id := range ids {
			s.ContainerStatuses = append(s.ContainerStatuses, corev1.ContainerStatus{Name: "main", ContainerID: "containerd://" + id})
		}
	}
}

func TestResolve(t *testing.T) {
	a, b, c, d, e := containerID("aaaaaaaaaaaa"), containerID("bbbbbbbbbbbb"), containerID("cccccccccccc"), containerID("dddddddddddd"), containerID("eeeeeeeeeeee")
	twin1, twin2 := containerID("ffffffffffff1"), containerID("ffffffffffff2")
	w := newPodWorld(t, func(w *podWorld) {
		w.add(testNode, "shop", "web-0", func(s *corev1.PodStatus) {
			s.ContainerStatuses = []corev1.ContainerStatus{{
				Name: "main", ContainerID: "containerd://" + a,
				LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://" + b}},
			}}
			s.InitContainerStatuses = []corev1.ContainerStatus{{
				Name: "init", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "cri-o://" + c}},
			}}
			s.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "debug", ContainerID: "docker://" + d}}
		})
		w.add(testNode, "other", "web-0", running(containerID("111111111111")))
		w.add(testNode, "shop", "twin-1", running(twin1))
		w.add(testNode, "shop", "twin-2", running(twin2))
		w.add("node-2", "shop", "elsewhere", running(e))
	})
	w.pods.SetWait(100 * time.Millisecond)
	web0, err := w.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		target alert.Target
		pod    string // "" is none
		err    error
		reason string
	}{
		{"short id", alert.Target{Namespace: "shop", Pod: "web-0", Container: a[:12]}, "shop/web-0", nil, ""},
		{"whole id", alert.Target{Namespace: "shop", Pod: "web-0", Container: a}, "shop/web-0", nil, ""},
		{"last state", alert.Target{Namespace: "shop", Pod: "web-0", Container: b[:12]}, "shop/web-0", nil, ""},
		{"init container, terminated", alert.Target{Namespace: "shop", Pod: "web-0", Container: c[:12]}, "shop/web-0", nil, ""},
		{"ephemeral container", alert.Target{Namespace: "shop", Pod: "web-0", Container: d[:12]}, "shop/web-0", nil, ""},
		{"without a namespace, as in 2018", alert.Target{Pod: "web-0", Container: a[:12]}, "shop/web-0", nil, ""},
		{"the other of that name", alert.Target{Pod: "web-0", Container: "111111111111"}, "other/web-0", nil, ""},
		{"only a container", alert.Target{Container: a[:12]}, "shop/web-0", nil, ""},
		{"the right uid", alert.Target{Pod: "web-0", Container: a[:12], UID: string(web0.UID)}, "shop/web-0", nil, ""},
		{"whole id decides between twins", alert.Target{Container: twin2}, "shop/twin-2", nil, ""},
		{"id as far as they differ", alert.Target{Container: twin1[:13]}, "shop/twin-1", nil, ""},

		{"twins", alert.Target{Container: twin1[:12]}, "", responders.ErrUnproved, "begin alike"},
		{"twins by name", alert.Target{Namespace: "shop", Pod: "twin-1", Container: twin1[:12]}, "", responders.ErrUnproved, "begin alike"},
		{"a whole id that is none of it, though it begins alike", alert.Target{Namespace: "shop", Pod: "web-0", Container: a[:63] + "1"}, "", responders.ErrUnproved, "none of pod shop/web-0"},
		{"another container", alert.Target{Namespace: "shop", Pod: "web-0", Container: "222222222222"}, "", responders.ErrUnproved, "none of pod shop/web-0"},
		{"no container", alert.Target{Namespace: "shop", Pod: "web-0"}, "", responders.ErrUnproved, "no container"},
		{"the right uid alone proves nothing", alert.Target{Namespace: "shop", Pod: "web-0", UID: string(web0.UID)}, "", responders.ErrUnproved, "no container"},
		{"container of another pod", alert.Target{Namespace: "shop", Pod: "web-1", Container: a[:12]}, "", responders.ErrUnproved, "names pod web-1"},
		{"container in another namespace", alert.Target{Namespace: "other", Pod: "web-0", Container: a[:12]}, "", responders.ErrUnproved, "names namespace other"},
		{"another uid", alert.Target{Namespace: "shop", Pod: "web-0", Container: "222222222222", UID: "0"}, "", responders.ErrGone, "by now"},
		{"host", alert.Target{Host: true, PID: 1}, "", responders.ErrNoPod, "host"},
		{"nothing", alert.Target{Node: testNode}, "", responders.ErrNoPod, "neither"},
		{"a process that is not there", alert.Target{PID: 4242}, "", responders.ErrNoPod, "4242"},
		{"another node's", alert.Target{Namespace: "shop", Pod: "elsewhere", Container: e[:12]}, "", responders.ErrGone, "no pod shop/elsewhere"},
		{"unknown container", alert.Target{Container: "333333333333"}, "", responders.ErrGone, "no container"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod, got, err := w.pods.Resolve(t.Context(), tc.target)
			if tc.err != nil {
				if pod != nil || !errors.Is(err, tc.err) || !strings.Contains(err.Error(), tc.reason) {
					t.Fatalf("pod %v, error %v, want %v saying %q", pod, err, tc.err, tc.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if name := pod.Namespace + "/" + pod.Name; name != tc.pod {
				t.Fatalf("pod %s, want %s", name, tc.pod)
			}
			if got.Namespace != pod.Namespace || got.Pod != pod.Name || got.UID != string(pod.UID) || len(got.Container) != 64 ||
				!strings.HasPrefix(got.Container, tc.target.Container) {
				t.Errorf("the target was resolved to %+v", got)
			}
		})
	}
}

func TestResolveWaitsForWhatIsNotThereYet(t *testing.T) {
	a := containerID("aaaaaaaaaaaa")
	for name, before := range map[string]bool{"the pod": false, "its container": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newPodWorld(t, func(*podWorld) {})
			w.pods.SetWait(20 * time.Second)
			var pod *corev1.Pod
			if before {
				pod = w.add(testNode, "shop", "web-0", nil)
			}
			found := make(chan error, 1)
			go func() {
				p, _, err := w.pods.Resolve(t.Context(), alert.Target{Namespace: "shop", Pod: "web-0", Container: a[:12]})
				if err == nil && p.Name != "web-0" {
					err = fmt.Errorf("pod %s", p.Name)
				}
				found <- err
			}()
			if !before {
				pod = w.add(testNode, "shop", "web-0", nil)
			}
			w.edit(pod, running(a))
			select {
			case err := <-found:
				if err != nil {
					t.Fatal(err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("Resolve does not notice that the container is there")
			}
		})
	}
}

func TestResolveWaitsInVainOnce(t *testing.T) {
	w := newPodWorld(t, func(*podWorld) {})
	w.pods.SetWait(300 * time.Millisecond)
	target := alert.Target{Container: "aaaaaaaaaaaa"}
	began := time.Now()
	if _, _, err := w.pods.Resolve(t.Context(), target); !errors.Is(err, responders.ErrGone) {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("it gave up after %s", took)
	}
	w.pods.SetWait(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, _, err := w.pods.Resolve(ctx, target); !errors.Is(err, responders.ErrGone) || ctx.Err() != nil {
		t.Errorf("a second alert of the container waits again: %v", err)
	}
}

func TestResolveKnowsWhatWent(t *testing.T) {
	a, b := containerID("aaaaaaaaaaaa"), containerID("bbbbbbbbbbbb")
	var old *corev1.Pod
	w := newPodWorld(t, func(w *podWorld) { old = w.add(testNode, "shop", "web-0", running(a)) })
	w.pods.SetWait(20 * time.Second) // no answer may need the wait
	target := alert.Target{Namespace: "shop", Pod: "web-0", Container: a[:12]}
	gone := func(t *testing.T, target alert.Target) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		pod, got, err := w.pods.Resolve(ctx, target)
		if pod != nil || !errors.Is(err, responders.ErrGone) || !strings.Contains(err.Error(), "was deleted") || ctx.Err() != nil {
			t.Errorf("pod %v, error %v", pod, err)
		}
		if got.UID != string(old.UID) || got.Namespace != "shop" || got.Pod != "web-0" {
			t.Errorf("the target was resolved to %+v", got)
		}
	}
	if _, _, err := w.pods.Resolve(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	w.remove(old)
	untilGone(t, w.pods, 0)
	t.Run("by container", func(t *testing.T) { gone(t, target) })
	t.Run("by name", func(t *testing.T) { gone(t, alert.Target{Pod: "web-0", Container: "cccccccccccc"}) })
	t.Run("by uid", func(t *testing.T) { gone(t, alert.Target{UID: string(old.UID)}) })

	w.add(testNode, "shop", "web-0", running(b))
	untilGone(t, w.pods, 1)
	t.Run("replaced", func(t *testing.T) { gone(t, target) })
	pod, _, err := w.pods.Resolve(t.Context(), alert.Target{Namespace: "shop", Pod: "web-0", Container: b[:12]})
	if err != nil || pod.UID == old.UID {
		t.Errorf("the replacement's own alert: pod %v, error %v", pod, err)
	}
}

func untilGone(t *testing.T, p *responders.Pods, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); p.Len() != n || !p.Synced(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("there are %d pods, want %d", p.Len(), n)
		}
	}
}

// A container that restarted twice is in the status no more, but was the pod's.
func TestResolveRemembersAPodsPastContainers(t *testing.T) {
	first := containerID("aaaaaaaaaaaa")
	var pod *corev1.Pod
	w := newPodWorld(t, func(w *podWorld) { pod = w.add(testNode, "shop", "web-0", running(first)) })
	untilGone(t, w.pods, 1)
	last := ""
	for i := range 100 {
		last = containerID(fmt.Sprintf("%012d", i))
		pod = w.edit(pod, running(last))
	}
	target := alert.Target{Namespace: "shop", Pod: "web-0"}
	resolve := func(id string) error {
		target.Container = id
		_, _, err := w.pods.Resolve(t.Context(), target)
		return err
	}
	if err := resolve(last[:12]); err != nil {
		t.Fatal(err)
	}
	if err := resolve(containerID(fmt.Sprintf("%012d", 98))[:12]); err != nil {
		t.Errorf("the container before: %v", err)
	}
	w.pods.SetWait(50 * time.Millisecond)
	if err := resolve(first[:12]); !errors.Is(err, responders.ErrUnproved) {
		t.Errorf("a hundred restarts ago: %v; what is remembered has no bound", err)
	}
}

const uid = "0b4ea3d6-1f2e-4a5b-8c7d-9e0f1a2b3c4d"

func TestResolveByCgroup(t *testing.T) {
	id := containerID("abcdefabcdef")
	under := strings.ReplaceAll(uid, "-", "_")
	systemd := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope"
	cgroupfs := "/kubepods/besteffort/pod" + uid + "/" + id
	other := "/kubepods/besteffort/pod" + strings.ReplaceAll(uid, "0b4ea3d6", "11111111") + "/" + id
	for _, tc := range []struct {
		name   string
		cgroup string
		target alert.Target
		proved bool
	}{
		{"v2, systemd", "0::" + systemd + "\n", alert.Target{Container: id[:12]}, true},
		{"v2, cgroupfs", "0::" + cgroupfs + "\n", alert.Target{Container: id}, true},
		{"v2, seen out of a cgroup namespace", "0::/../../../besteffort/pod" + uid + "/" + id + "\n", alert.Target{Container: id[:12]}, true},
		{"v1", "12:cpu:" + cgroupfs + "\n2:memory:" + cgroupfs + "\n1:name=systemd:" + cgroupfs + "\n0::/\n", alert.Target{Container: id[:12]}, true},
		{"a cgroup made inside a container", "0::" + cgroupfs + "/pod11111111-1f2e-4a5b-8c7d-9e0f1a2b3c4d/" + containerID("1") + "\n", alert.Target{Container: id[:12]}, true},
		{"controllers that disagree", "2:memory:" + cgroupfs + "\n1:cpu:" + other + "\n", alert.Target{Container: id[:12]}, false},
		{"another pod", "0::" + other + "\n", alert.Target{Container: id[:12]}, false},
		{"another container", "0::" + cgroupfs + "\n", alert.Target{Container: "123456123456"}, false},
		{"a user's own cgroup", "0::/user.slice/user-1000.slice" + cgroupfs + "\n", alert.Target{Container: id[:12]}, false},
		{"a host's process", "0::/system.slice/ssh.service\n", alert.Target{Container: id[:12]}, false},
		{"no container and no start", "0::" + cgroupfs + "\n", alert.Target{Namespace: "shop", Pod: "web-0"}, false},
		{"rubbish", "\x00:::\npod\n", alert.Target{Container: id[:12]}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newPodWorld(t, func(w *podWorld) { w.add(testNode, "shop", "web-0", nil) })
			pod, err := w.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w.pods.SetWait(100 * time.Millisecond)
			root := t.TempDir()
			w.pods.SetProc(root)
			if err := os.Mkdir(filepath.Join(root, "4242"), 0o700); err != nil {
				t.Fatal(err)
			}
			// The pod's UID is the server's to choose.
			real := strings.ReplaceAll(strings.ReplaceAll(tc.cgroup, uid, string(pod.UID)), under, strings.ReplaceAll(string(pod.UID), "-", "_"))
			if err := os.WriteFile(filepath.Join(root, "4242", "cgroup"), []byte(real), 0o600); err != nil {
				t.Fatal(err)
			}
			target := tc.target
			target.PID = 4242
			got, resolved, err := w.pods.Resolve(t.Context(), target)
			if tc.proved != (err == nil) || tc.proved && (got.Name != "web-0" || resolved.Container != id || resolved.UID != string(pod.UID)) {
				t.Errorf("pod %v, target %+v, error %v", got, resolved, err)
			}
		})
	}
}

// Without a container's id a process's number is believed only with its start.
func TestResolveByARealProcess(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Skipf("no process to look at: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	forked := responders.StartOf(t, cmd.Process.Pid)
	var pod *corev1.Pod
	w := newPodWorld(t, func(w *podWorld) { pod = w.add(testNode, "shop", "web-0", nil) })
	w.pods.SetWait(100 * time.Millisecond)

	// A real start, a cgroup that this process can't have.
	root := t.TempDir()
	dir := filepath.Join(root, fmt.Sprint(cmd.Process.Pid))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte("0::/kubepods/pod"+string(pod.UID)+"/"+containerID("1")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid), filepath.Join(dir, "stat")); err != nil {
		t.Fatal(err)
	}
	w.pods.SetProc(root)
	target := alert.Target{Namespace: "shop", Pod: "web-0", PID: int64(cmd.Process.Pid), PIDStart: forked}
	if got, _, err := w.pods.Resolve(t.Context(), target); err != nil || got.UID != pod.UID {
		t.Errorf("pod %v, error %v", got, err)
	}
	target.PIDStart -= int64(5 * time.Second)
	if got, _, err := w.pods.Resolve(t.Context(), target); !errors.Is(err, responders.ErrUnproved) {
		t.Errorf("a process that was given the number of an earlier one: pod %v, error %v", got, err)
	}
}

func TestResolveWithoutAnAPIServer(t *testing.T) {
	p := runPods(t, &rest.Config{Host: "http://127.0.0.1:1"})
	p.SetWait(200 * time.Millisecond)
	_, _, err := p.Resolve(t.Context(), alert.Target{Container: "aaaaaaaaaaaa"})
	status, retry, _, reason := responders.Classify(err)
	if status != broker.Failed || !retry || !strings.Contains(reason, "have not been read yet") || !strings.Contains(reason, "refused") {
		t.Errorf("status %s, retry %t, reason %q", status, retry, reason)
	}
	if p.Synced() {
		t.Error("it says that it knows the node's pods")
	}
}

// What is kept of a pod must be enough for guards and responders, and not more.
func TestPodsAreKeptSlim(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: "web-0", Namespace: "shop", UID: uid, Labels: map[string]string{"a": "b"},
			Annotations:     map[string]string{corev1.MirrorPodAnnotationKey: "x", "big": strings.Repeat("x", 1000)},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kubelet"}},
			OwnerReferences: []metav1.OwnerReference{{Kind: "Node", UID: "1"}},
		},
		Spec: corev1.PodSpec{
			NodeName: testNode, HostNetwork: true, PriorityClassName: "system-node-critical",
			Volumes:    []corev1.Volume{{Name: "v"}},
			Containers: []corev1.Container{{Name: "main", Image: "i", Env: []corev1.EnvVar{{Name: "SECRET", Value: "s"}}}},
		},
	}
	s := responders.SlimPod(pod)
	if s.ManagedFields != nil || s.Spec.Volumes != nil || s.Spec.Containers[0].Env != nil || s.Annotations["big"] != "" {
		t.Errorf("too much is kept: %+v", s)
	}
	if s.UID != pod.UID || s.Spec.NodeName != testNode || !s.Spec.HostNetwork || s.Spec.PriorityClassName == "" ||
		s.Labels["a"] != "b" || !slices.Equal(s.OwnerReferences, pod.OwnerReferences) || s.Annotations[corev1.MirrorPodAnnotationKey] != "x" {
		t.Errorf("too little is kept: %+v", s)
	}
}

// BenchmarkResolve is what proving a pod costs a step, on a node with 100
// pods, and what keeping these costs in memory.
func BenchmarkResolve(b *testing.B) {
	const n = 100
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var before uint64
	w := newPodWorld(b, func(w *podWorld) {
		for i := range n {
			w.add(testNode, "shop", fmt.Sprintf("web-%d", i), running(containerID(fmt.Sprintf("%012d", i))))
		}
		before = heap()
	})
	for !w.pods.Synced() {
		time.Sleep(time.Millisecond)
	}
	kept := float64(heap()-before) / 1024
	target := alert.Target{Pod: "web-42", Container: fmt.Sprintf("%012d", 42)}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := w.pods.Resolve(b.Context(), target); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(kept, "KiB/100pods")
}
