package main

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// captureRules are those of what keeps what the API server and the kubelet tell of a
// pod.
const captureRules = `
  - name: tell
    match: {rule: E2E tell}
    actions:
      - capture-logs: {tail: 2}
      - capture-manifest
      - capture-events
`

// twice is a container that says something, ends, and says something else when the
// kubelet starts it again.
const twice = `if [ -e /kept/mark ]; then echo second life; exec sleep 1000; fi
touch /kept/mark
for n in 1 2 3; do echo first life $n; done
exit 3`

// logs has the logs kept of a container that was started again since it raised its
// alert.
func (m *measuring) logs() {
	m.Helper()
	no := false
	pod, err := m.cluster.Client.CoreV1().Pods(namespace).Create(m.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: kube.Name("twice"), Namespace: namespace},
		Spec: corev1.PodSpec{
			NodeName: nodeName, TerminationGracePeriodSeconds: new(int64(0)),
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Volumes: []corev1.Volume{{Name: "kept", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
			Containers: []corev1.Container{{
				Name: "main", Image: image, ImagePullPolicy: corev1.PullNever, Command: []string{"/bin/sh", "-c", twice},
				Env:          []corev1.EnvVar{{Name: "DB_PASSWORD", Value: "hunter2"}},
				VolumeMounts: []corev1.VolumeMount{{Name: "kept", MountPath: "/kept"}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		m.Fatalf("make a pod: %v", err)
	}
	var status corev1.ContainerStatus
	harness.Eventually(m, 90*time.Second, 50*time.Millisecond, func() (bool, string) {
		if now := m.cluster.Get(m, namespace, pod.Name); now != nil && len(now.Status.ContainerStatuses) > 0 {
			status = now.Status.ContainerStatuses[0]
		}
		return status.State.Running != nil && status.LastTerminationState.Terminated != nil,
			fmt.Sprintf("the pod %s to be started again; it says %+v", pod.Name, status)
	})
	_, first, _ := strings.Cut(status.LastTerminationState.Terminated.ContainerID, "://")
	now := time.Now().UTC()
	id, _ := m.say(program.Alert{
		Hostname: nodeName, Output: "of the first life", Priority: "Critical", Rule: "E2E tell", Source: "syscall", Time: program.Stamp(now),
		Fields: map[string]any{"container.id": first[:12], "k8s.ns.name": namespace, "k8s.pod.name": pod.Name, "evt.time": now.UnixNano()},
	})
	o := m.done(id, "capture-logs")
	before, after := string(m.piece(o, "main.previous.log")), string(m.piece(o, "main.log"))
	// Each line begins with when it was written.
	if lines := strings.Split(before, "\n"); len(lines) != 3 || !strings.HasSuffix(lines[0], "Z first life 2") || !strings.HasSuffix(lines[1], "Z first life 3") {
		m.Fatalf("capture-logs kept %q of the container that raised the alert", before)
	}
	if !strings.HasSuffix(after, "Z second life\n") {
		m.Fatalf("capture-logs kept %q of the container that was started after it", after)
	}
	manifest := m.manifest(o)
	if manifest.Pieces[0].Name != "main.previous.log" || !strings.Contains(strings.Join(manifest.Notes, "\n"), "main.previous.log is of container containerd://"+first) {
		m.Fatalf("the manifest is %+v", manifest)
	}
	o = m.done(id, "capture-manifest")
	if got := string(m.piece(o, "pod.json")); !strings.Contains(got, string(pod.UID)) || !strings.Contains(got, `"exitCode": 3`) || strings.Contains(got, "hunter2") {
		m.Fatalf("capture-manifest kept %s", got)
	}
	o = m.done(id, "capture-events")
	if got := string(m.piece(o, "events.jsonl")); strings.Count(got, `"reason":"Started"`) == 0 || !strings.Contains(got, string(pod.UID)) {
		m.Fatalf("capture-events kept %s", got)
	}
	m.cluster.Remove(m, pod)
	m.note("`capture-logs` had from the kubelet what a container wrote before it was started again, `capture-events` what the kubelet told of it.")
}
