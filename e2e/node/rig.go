package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

const (
	nodeName = "n1"
	nodeIP   = "172.30.0.1"
	// attackerIP stands for somebody outside the cluster: an address for
	// documentation (RFC 5737), which here is the node's own.
	attackerIP = "198.51.100.66"
	namespace  = "shop"
)

const containerd = "/run/containerd/containerd.sock"

// rig is the node, with stoop on it.
type rig struct {
	harness.T
	settings
	cluster *kube.Cluster
	stoop   *program.Stoop // nil when the run is bare
}

// chainRule is the name of the rule with more than one step.
const chainRule = "chain"

// rules name, for each of the rig's alerts, what is done about it.
const rules = `
mode: enforce
rules:
  - name: freeze
    match: {rule: E2E freeze}
    actions: [freeze-container]
  - name: cut
    match: {rule: E2E cut}
    actions: [cut-network]
  - name: kill-process
    match: {rule: E2E kill process}
    actions: [kill-process]
  - name: kill-container
    match: {rule: E2E kill container}
    actions: [kill-container]
  - name: ` + chainRule + `
    match: {rule: E2E chain}
    actions:
      - freeze-container
      - capture-proc
      - cut-network
      - delete-pod: {gracePeriod: 1s, force: true}
`

// startRig starts the cluster, the node and stoop; they end with t.
func startRig(t harness.T, s settings) *rig {
	t.Helper()
	r := &rig{T: t, settings: s}
	began := time.Now()
	r.network()
	r.containerd()
	r.cluster = kube.StartForNodes(r)
	r.cluster.Namespace(r, namespace)
	r.kubelet()
	r.Logf("the node is ready after %s", time.Since(began).Round(10*time.Millisecond))

	if s.Bare || s.Chart != nil {
		return r
	}
	rbac := append(responders.BaseRBAC(), responders.PauseRBAC("default")...)
	for _, e := range responders.All() {
		rbac = append(rbac, e.RBAC...)
	}
	r.stoop = program.Start(r, program.Options{
		Bin: s.Stoop, Node: nodeName, Kubeconfig: r.cluster.Account(r, rbac).Kubeconfig,
		Mode: "enforce", Rules: rules + captureRules + r.inPodRules(), Config: program.NoLimits,
	})
	return r
}

// tool runs a program that ends by itself.
func (r *rig) tool(name string, args ...string) error {
	out, err := exec.CommandContext(r.Context(), name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// network is that of the node: an interface with its address and a default
// route, which the kubelet looks for, and the attacker's address.
func (r *rig) network() {
	r.Helper()
	for _, args := range []string{
		"link set lo up",
		"link add node0 type bridge",
		"addr add " + nodeIP + "/24 dev node0",
		"addr add " + attackerIP + "/32 dev node0",
		"link set node0 up",
		"route add default via 172.30.0.254 dev node0",
	} {
		if err := r.tool("ip", strings.Fields(args)...); err != nil {
			r.Fatalf("make the node's network: %v", err)
		}
	}
}

// path is a file or a folder of the node's; the folders above it are made.
func (r *rig) path(name string) string {
	path := filepath.Join(r.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		r.Fatalf("make a folder of the node's: %v", err)
	}
	return path
}

func (r *rig) write(name, content string) string {
	path := r.path(name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		r.Fatalf("write a file of the node's: %v", err)
	}
	return path
}

// start starts a program of the node's.
func (r *rig) start(name string, args ...string) *harness.Process {
	r.Helper()
	path := r.path("logs/" + filepath.Base(name))
	log, err := os.Create(path)
	if err != nil {
		r.Fatalf("open the log of %s: %v", name, err)
	}
	defer log.Close()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.Dir, log, log
	p, err := harness.Spawn(cmd)
	if err != nil {
		r.Fatalf("%v", err)
	}
	r.Cleanup(func() {
		if r.Failed() {
			r.Logf("the last lines of %s:\n%s", filepath.Base(name), tail(path, 15))
		}
		if err := p.Kill(); err != nil {
			r.Logf("%v", err)
		}
	})
	return p
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// wait is [harness.Eventually] for what a process has to live for.
func (r *rig) wait(p *harness.Process, within time.Duration, what string, ok func() error) {
	r.Helper()
	harness.Eventually(r, within, 50*time.Millisecond, func() (bool, string) {
		if !p.Running() {
			r.Fatalf("%s ended: %v", what, p.Wait(time.Second))
		}
		if err := ok(); err != nil {
			return false, what + ": " + err.Error()
		}
		return true, ""
	})
}

// containerd is the container runtime, with the image and a network for pods.
func (r *rig) containerd() {
	r.Helper()
	config := r.write("containerd/config.toml", fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
# Nothing here needs what these look for, and each warns that it isn't there.
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true # without CAP_SYS_RESOURCE it can't be lowered
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = %q
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, r.path("containerd/root"), containerd, r.path("containerd/opt"), image, runcPath, cniBin, r.path("cni/net.d")))
	r.write("cni/net.d/10-bridge.conflist", `{"cniVersion": "1.0.0", "name": "e2e", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam",
            "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`)
	p := r.start("containerd", "-c", config)
	ctr := func(args ...string) error {
		return r.tool("ctr", append([]string{"-a", containerd, "-n", "k8s.io"}, args...)...)
	}
	r.wait(p, 30*time.Second, "containerd", func() error { return ctr("version") })
	archive := r.path("image.tar")
	if err := writeImage(archive); err != nil {
		r.Fatalf("%v", err)
	}
	if err := ctr("images", "import", archive); err != nil {
		r.Fatalf("import the image: %v", err)
	}
}

// kubelet makes this a node of the cluster, and waits until it is one.
func (r *rig) kubelet() {
	r.Helper()
	bin, err := kube.Binaries(r.Context(), r.Logf, kube.Kubelet)
	if err != nil {
		r.Fatalf("%v", err)
	}
	config := r.write("kubelet.yaml", fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /%s
enforceNodeAllocatable: [pods]
containerRuntimeEndpoint: unix://%s
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook}
makeIPTablesUtilChains: false
oomScoreAdj: 0
failSwapOn: false
resolvConf: ""
podLogsDir: %q
volumePluginDir: %q
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
evictionHard: {memory.available: 100Mi, nodefs.available: "1%%", imagefs.available: "1%%"}
`, r.Cgroup, containerd, r.cluster.KubeletClientCA(), r.path("podlogs"), r.path("plugins")))
	p := r.start(filepath.Join(bin, kube.Kubelet),
		"--config="+config, "--kubeconfig="+r.cluster.NodeKubeconfig(r), "--root-dir="+r.path("kubelet"),
		"--cert-dir="+r.path("kubelet-pki"), "--hostname-override="+nodeName, "--node-ip="+nodeIP)
	r.wait(p, 90*time.Second, "the kubelet", func() error {
		node, err := r.cluster.Client.CoreV1().Nodes().Get(r.Context(), nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type != corev1.NodeReady {
				continue
			}
			if c.Status == corev1.ConditionTrue {
				return nil
			}
			return fmt.Errorf("not ready: %s", c.Message)
		}
		return fmt.Errorf("not ready yet")
	})
}
