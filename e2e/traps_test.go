package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// trapRules answer every Critical alert with much: whoever is in the way of one of
// these steps by mistake shows in the audit log.
const trapRules = `
mode: enforce
rules:
  - name: answer
    match: {priority: critical}
    actions:
      - label-pod: {labels: {suspect: "yes"}}
      - isolate-pod: {direction: both}
      - delete-pod: {force: true}
`

// Traps for whoever answers alerts by itself, all on one stoop. At the end the
// audit log of the API server is read: nothing was asked for that concerns any
// other than the pods that were meant.
func TestTraps(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, trapRules)
	meant := map[string]bool{} // the names of the pods that may be acted on
	hit := func(t *testing.T, pod *corev1.Pod, line []byte) {
		t.Helper()
		meant[pod.Name] = true
		s.Write(line)
		if o := s.WaitOutcome(program.ID(line), "delete-pod", soon); o.Status != broker.Done {
			t.Fatalf("%s (%s), want done, for %.300s", o.Status, o.Reason, line)
		}
		w.WaitGone(t, pod, soon)
	}
	// spared sends a line and waits until no step of it acted.
	spared := func(t *testing.T, line []byte) {
		t.Helper()
		s.Write(line)
		for _, responder := range []string{"label-pod", "isolate-pod", "delete-pod"} {
			switch o := s.WaitOutcome(program.ID(line), responder, soon); o.Status {
			case broker.Suppressed, broker.Refused, broker.Nothing:
			default:
				t.Errorf("%s: %s (%s)", responder, o.Status, o.Reason)
			}
		}
	}

	t.Run("a pod that took the name", func(t *testing.T) {
		old := w.pod(t, "db-0")
		line := program.Critical("Trap", old).Line()
		w.Remove(t, old)
		replacement := w.pod(t, "db-0")
		spared(t, line)
		wantAlive(t, w.Cluster, replacement)
	})

	t.Run("a pod made anew between match and act", func(t *testing.T) {
		// The steps before take their time: what follows meets another pod.
		for n := range 5 {
			name := fmt.Sprintf("quick-%d", n)
			meant[name] = true // the first of the name
			old := w.pod(t, name)
			id := s.Send(program.Critical("Trap", old))
			w.Remove(t, old)
			replacement := w.pod(t, name)
			s.WaitOutcome(id, "delete-pod", soon)
			wantAlive(t, w.Cluster, replacement)
			if now := w.Get(t, w.ns, name); now.Labels["suspect"] != "" || now.Labels["stoop.dev/isolated"] != "" {
				t.Errorf("the replacement has the labels %v", now.Labels)
			}
		}
	})

	t.Run("two containers that share twelve characters", func(t *testing.T) {
		one := w.pod(t, "twin-1")
		id := kube.ContainerID(one)
		other := w.pod(t, "twin-2")
		other.Status.ContainerStatuses[0].ContainerID = "containerd://" + id[:12] + strings.Repeat("0", len(id)-12)
		other, err := w.Client.CoreV1().Pods(w.ns).UpdateStatus(t.Context(), other, metav1.UpdateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		a := program.Critical("Trap", one)
		for _, f := range []string{"k8s.ns.name", "k8s.pod.name", "k8s.pod.uid"} {
			delete(a.Fields, f)
		}
		spared(t, a.Line())
		// Nor with a name beside it, which Falco may have from elsewhere.
		spared(t, program.Critical("Trap", one).Line())
		wantAlive(t, w.Cluster, one)
		wantAlive(t, w.Cluster, other)
		// The whole id tells.
		a = program.Critical("Trap", one)
		a.Fields["container.id"] = id
		hit(t, one, a.Line())
		wantAlive(t, w.Cluster, other)
	})

	t.Run("fields that an attacker wrote", func(t *testing.T) {
		bystander := w.pod(t, "bystander")
		for n, value := range []string{
			"$(kubectl delete pod --all); `reboot`; '\"; rm -rf /",
			`{{ .Env }} {{ template "x" }} {{ call .Exit }} ${{ secrets.TOKEN }} ${jndi:ldap://x}`,
			"a: &b [*b]\n- !!python/object/apply:os.system [\"id\"]\n---\n%TAG ! x",
			"falco.> stoop.actions.delete-pod.* $JS.API.STREAM.PURGE.ALERTS \u0000\r\n\x1b[2J",
			strings.Repeat("A\\u0022\n", 14<<10), // 100 KiB
			"../../../../etc/shadow\x00/../" + bystander.Name,
		} {
			pod := w.pod(t, fmt.Sprintf("wrote-%d", n))
			a := program.Critical("Trap", pod)
			a.Output = value
			a.Tags = append(a.Tags, value)
			for _, f := range []string{"proc.cmdline", "proc.name", "fd.name", "container.name"} { // in all below 1 MiB, a line's most
				a.Fields[f] = value
			}
			hit(t, pod, a.Line())

			// The rule's name becomes a subject, the hostname a guard's reason.
			odd := w.pod(t, fmt.Sprintf("odd-%d", n))
			a = program.Critical(value, odd)
			hit(t, odd, a.Line())
			a = program.Critical("Trap", bystander)
			a.Hostname = value
			spared(t, a.Line())

			// What should name the pod names nothing.
			for _, f := range []string{"k8s.pod.name", "k8s.ns.name", "k8s.pod.uid", "container.id"} {
				a = program.Critical("Trap", bystander)
				a.Fields = map[string]any{f: value, "evt.time": a.Fields["evt.time"]}
				spared(t, a.Line())
			}
		}
		wantAlive(t, w.Cluster, bystander)
	})

	t.Run("a name that is another pod's", func(t *testing.T) {
		suspect, victim := w.pod(t, "suspect"), w.pod(t, "victim")
		for name, change := range map[string]func(fields map[string]any){
			"the victim's name":         func(f map[string]any) { f["k8s.pod.name"] = victim.Name },
			"the victim's UID":          func(f map[string]any) { f["k8s.pod.uid"] = string(victim.UID) },
			"the victim's name and UID": func(f map[string]any) { f["k8s.pod.name"], f["k8s.pod.uid"] = victim.Name, string(victim.UID) },
			"the victim's container":    func(f map[string]any) { f["container.id"] = kube.ShortID(victim) },
		} {
			t.Run(name, func(t *testing.T) {
				a := program.Critical("Trap", suspect)
				change(a.Fields)
				spared(t, a.Line())
			})
		}
		wantAlive(t, w.Cluster, suspect)
		wantAlive(t, w.Cluster, victim)
	})

	// The last one: after a text line no JSON from the same pipe is believed, since a
	// text alert may have carried it.
	t.Run("alerts that anybody can make up", func(t *testing.T) {
		pod := w.pod(t, "framed")
		text := fmt.Sprintf("%s: Critical Trap (k8s.ns=%s k8s.pod=%s container=%s)\n", time.Now().Format("15:04:05.000000000"), pod.Namespace, pod.Name, kube.ShortID(pod))
		internal := program.Critical("Falco internal: syscall event drop", pod)
		internal.Source = "internal"
		spared(t, []byte(text))
		spared(t, internal.Line())
		wantAlive(t, w.Cluster, pod)
	})

	for _, r := range w.requests(t) {
		name := r.Name
		if uid, ok := strings.CutPrefix(r.Name, "stoop-isolate-"); ok && r.Resource == "networkpolicies" {
			name = ""
			for _, o := range s.History() {
				if o.Target.UID == uid {
					name = o.Target.Pod
				}
			}
		}
		if !strings.HasPrefix(r.Resource, "pods") && r.Resource != "networkpolicies" || r.Namespace != w.ns {
			continue // the fleet's own
		}
		if !meant[name] {
			t.Errorf("a wrong act: %s %s %s/%s", r.Verb, r.Resource, r.Namespace, r.Name)
		}
	}
}

// 200 alerts in a second about the pods of one Deployment: as many of them are
// acted on as the limits allow, and none twice.
func TestTrapBurstOnOneDeployment(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	o := w.options(deleteRule)
	o.Config = "kubernetes: {qps: 5000, burst: 5000}\n" // the guards as they are installed
	s := program.Start(t, o)
	pods := w.Deployment(t, w.ns, "shop", w.node, 10)
	var ids []string
	var lines [][]byte
	for n := range 200 {
		a := program.Critical("Trap", pods[n%len(pods)])
		a.Fields["evt.time"] = time.Now().UnixNano() + int64(n)
		line := a.Line()
		ids, lines = append(ids, program.ID(line)), append(lines, line)
	}
	s.Write(slices.Concat(lines...))
	status := map[broker.Status]int{}
	for _, id := range ids {
		status[s.WaitOutcome(id, "delete-pod", 60*time.Second).Status]++
	}
	if status[broker.Done] != 2 { // the owner's limit: then the next is isolated instead
		t.Errorf("outcomes %v, want two done", status)
	}
	asked := map[string]int{}
	for _, r := range w.requests(t) {
		if r.Resource == "pods" && r.Verb == "delete" && r.Code == 200 {
			asked[r.Name]++
		}
	}
	if len(asked) != 2 {
		t.Errorf("deletes by pod: %v", asked)
	}
	for name, n := range asked {
		if n > 1 {
			t.Errorf("%s was deleted %d times", name, n)
		}
	}
}

// Every new pod of a Deployment raises the alert again: after two deletes nothing
// more is deleted, however many come.
func TestTrapEveryNewPodRaisesTheAlert(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, deleteRule)
	pods := w.Deployment(t, w.ns, "loop", w.node, 8)
	deleted, isolated := 0, 0
	for _, pod := range pods {
		id := s.Send(program.Critical("Trap", pod))
		if o := s.WaitOutcome(id, "delete-pod", soon); o.Status == broker.Done {
			deleted++
			w.WaitGone(t, pod, soon)
			continue
		}
		wantStatus(t, s.WaitOutcome(id, "isolate-pod", soon), broker.Done)
		wantAlive(t, w.Cluster, pod)
		isolated++
	}
	if deleted != 2 || isolated != 6 {
		t.Errorf("%d deleted and %d isolated, want 2 and 6", deleted, isolated)
	}
}

// Disposable pods raise alerts until their namespace has had its share; the real
// attack is then answered in another one.
func TestTrapDisposablePods(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	o := w.options("mode: enforce\nrules:\n" +
		"  - name: any\n    match: {priority: warning}\n    actions: [delete-pod: {force: true}]\n")
	o.Config = "kubernetes: {qps: 5000, burst: 5000}\nguard: {limits: {rule: 0, namespace: 0, node: 10/10m}}\n"
	s := program.Start(t, o)
	for n, pod := range w.Pods(t, w.ns, "decoy", w.node, 20) {
		a := program.Critical("Trap", pod)
		a.Priority = []string{"Warning", "Critical"}[n%2]
		s.WaitOutcome(s.Send(a), "delete-pod", soon)
	}
	shop := w.Namespace(t, kube.Name("shop"))
	pod := w.Pod(t, shop, "db", w.node, nil)
	wantStatus(t, s.WaitOutcome(s.Send(program.Critical("Trap", pod)), "delete-pod", soon), broker.Done)
	w.WaitGone(t, pod, soon)
	used := 0
	for _, r := range w.requests(t) {
		if r.Namespace == w.ns && r.Verb == "delete" && r.Code == 200 {
			used++
		}
	}
	if used > 5 {
		t.Errorf("one namespace had %d of the node's ten", used)
	}
}

// A step waits for a person, over a restart, and is done on the pod that was
// meant, or not at all.
func TestApproval(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.stoop(t, `
mode: enforce
rules:
  - name: asks
    match: {priority: critical}
    actions:
      - delete-pod: {}
        approve: true
      - label-pod: {labels: {after: "yes"}}
`)
	waits := func(pod *corev1.Pod) string {
		t.Helper()
		return s.WaitStatus(s.Send(program.Critical("Test approval", pod)), "delete-pod", broker.AwaitingApproval, soon).ID
	}
	approved, denied, replaced := w.pod(t, "approved"), w.pod(t, "denied"), w.pod(t, "replaced")
	yes, no, gone := waits(approved), waits(denied), waits(replaced)
	w.wantNoRequests(t)
	s.Kill()
	s.Start()
	var listed []string
	for line := range strings.Lines(s.Run("approve", "-o", "json")) {
		var a struct {
			ID, Rule, Responder string
			Target              struct{ Pod string }
		}
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		listed = append(listed, a.ID+" "+a.Rule+" "+a.Responder+" "+a.Target.Pod)
	}
	want := []string{yes + " asks delete-pod approved", no + " asks delete-pod denied", gone + " asks delete-pod replaced"}
	if !slices.Equal(listed, want) {
		t.Errorf("what waits: %q, want %q", listed, want)
	}

	s.Run("deny", no)
	w.Remove(t, replaced)
	replacement := w.pod(t, "replaced")
	s.Run("approve", gone)
	s.Run("approve", yes)
	w.WaitGone(t, approved, soon)
	end := func(id string) broker.Outcome {
		t.Helper()
		for end := time.Now().Add(soon); ; time.Sleep(10 * time.Millisecond) {
			for _, o := range s.History() {
				if o.ID == id && o.Status != broker.AwaitingApproval && program.Final(o.Status) {
					return o
				}
			}
			if time.Now().After(end) {
				t.Fatalf("step %s does not end", id)
			}
		}
	}
	if o := end(yes); o.Status != broker.Done || o.Actor == "" {
		t.Errorf("the approved one: %+v", o)
	}
	if o := end(no); o.Status != broker.Denied || o.Actor == "" {
		t.Errorf("the denied one: %+v", o)
	}
	if o := end(gone); o.Status != broker.Nothing {
		t.Errorf("the one whose pod was replaced: %+v", o)
	}
	wantAlive(t, w.Cluster, denied)
	wantAlive(t, w.Cluster, replacement)
	for _, r := range w.requests(t) {
		if r.Verb == "delete" && r.Name != approved.Name && r.Code < 400 {
			t.Errorf("a wrong act: %s %s", r.Verb, r.Name)
		}
	}
}
