package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"stoop/responders"
	"stoop/responders/conformance"
)

// inCluster has c look at a cluster.
func inCluster(t *testing.T, c *Config, rc *rest.Config) {
	t.Helper()
	c.Dates = &Dates{}
	rc.Wrap(c.Dates.Wrap)
	kube, err := responders.NewKube(rc)
	if err != nil {
		t.Fatal(err)
	}
	c.Kube, c.Server = kube, rc.Host
}

func TestAPI(t *testing.T) {
	c := config(t)
	has(t, examine(t, c, "api"), OK, "no rule needs one")
	c.Steps = steps("slack")
	has(t, examine(t, c, "api"), OK, "no rule needs one")
	c.Steps = steps("delete-pod", "slack")
	has(t, examine(t, c, "api"), Missing, "the rules use delete-pod", "--kubeconfig")

	s := conformance.NewServer(t)
	inCluster(t, &c, s.Config())
	has(t, examine(t, c, "api"), OK, "v1.36.3", "system:serviceaccount:stoop:stoop")
	c.KubeErr = fmt.Errorf("a kubeconfig that is none")
	has(t, examine(t, c, "api"), Missing, "a kubeconfig that is none")

	c.KubeErr = nil
	gone := s.Config()
	gone.Host = "http://127.0.0.1:1"
	inCluster(t, &c, gone)
	has(t, examine(t, c, "api"), Missing, "does not answer", "connection refused")
}

func TestPermissions(t *testing.T) {
	c := config(t)
	has(t, examine(t, c, "permissions"), OK, "none is needed")
	s := conformance.NewServer(t)
	inCluster(t, &c, s.Config())
	c.Steps = []responders.Planned{
		{Responder: "delete-pod", Params: json.RawMessage("{}")},
		{Responder: "isolate-pod", Params: json.RawMessage("{}"), Namespaces: []string{"shop"}},
	}
	found := examine(t, c, "permissions")
	none(t, found, Missing, Unknown)
	permit, err := responders.Permit(c.Entries, responders.Account{Namespace: "stoop"}, c.Steps)
	if err != nil {
		t.Fatal(err)
	}
	all := permit.All("stoop")
	has(t, found, OK, fmt.Sprintf("%d of %d permissions granted", len(all), len(all)))

	s.Forbid(t, "delete", "", "pods")
	s.Forbid(t, "create", "", "networkpolicies")
	s.Forbid(t, "update", "", "networkpolicies")
	s.Forbid(t, "update", "", "configmaps")
	found = examine(t, c, "permissions")
	const do = "stoop rbac --rules rules.yaml --namespace stoop --service-account stoop | kubectl apply -f -"
	has(t, found, Missing, "may not delete pods in the cluster, for delete-pod", do)
	has(t, found, Missing, "may not update configmaps", "in namespace stoop, for stoop itself")
	has(t, found, Missing, "networkpolicies.networking.k8s.io", "in the cluster, for isolate-pod", do)

	c.RulesErr, c.Steps = fmt.Errorf("wrong"), nil
	has(t, examine(t, c, "permissions"), Unknown, "they can't be read")
	gone := s.Config()
	gone.Host = "http://127.0.0.1:1"
	inCluster(t, &c, gone)
	has(t, examine(t, c, "permissions"), Unknown, "could not be asked for", "connection refused")
}

// The cluster tells which plugin it has by what it serves, and by its DaemonSets where
// they may be listed.
func TestNetwork(t *testing.T) {
	c := config(t)
	has(t, examine(t, c, "network"), OK, "no rule isolates")
	c.Steps = steps("isolate-pod")
	s := conformance.NewServer(t)
	inCluster(t, &c, s.Config())
	has(t, examine(t, c, "network"), Unknown, "which of them is its network plugin can't be told", "Cilium, Calico")
	s.Remove("projectcalico.org")
	has(t, examine(t, c, "network"), OK, "Cilium (as the cluster serves cilium.io) enforces")
	s.Remove("cilium.io")
	s.Forbid(t, "list", "", "daemonsets")
	found := examine(t, c, "network")
	if types, _ := (&Examination{}).cniTypes(); len(types) > 0 {
		t.Skip("this machine has a network plugin of its own")
	}
	has(t, found, Unknown, "stoop may not list DaemonSets", "try it")

	s = conformance.NewServer(t)
	s.Remove("cilium.io")
	s.Remove("projectcalico.org")
	inCluster(t, &c, s.Config())
	has(t, examine(t, c, "network"), Unknown, "no configuration of it is to be seen")
	set := func(name string) {
		t.Helper()
		if _, err := s.Admin().AppsV1().DaemonSets("kube-flannel").Create(t.Context(), &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	set("kube-flannel-ds")
	has(t, examine(t, c, "network"), Warning, "Flannel (its DaemonSet kube-flannel-ds is there) enforces no policies", "isolate-pod", "cut-network")
	set("canal")
	found = examine(t, c, "network")
	has(t, found, OK, "Calico (its DaemonSet canal is there)")
	none(t, found, Warning)
}

func TestClock(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, tt := range []struct {
		ahead  time.Duration
		status Status
		word   string
	}{{0, OK, "agrees"}, {2 * time.Second, OK, "ahead of"}, {5 * time.Second, Warning, "ahead of"}, {-5 * time.Second, Warning, "behind"}, {2 * time.Minute, Missing, "2m0s ahead of"}} {
		c := config(t)
		inCluster(t, &c, conformance.NewServer(t).Config())
		c.Dates = &Dates{}
		c.Dates.note(at.Format(http.TimeFormat), at.Add(500*time.Millisecond+tt.ahead), at.Add(510*time.Millisecond+tt.ahead))
		has(t, examine(t, c, "clock"), tt.status, tt.word)
	}
	// The answer that took least says it best.
	d := &Dates{}
	d.note(at.Format(http.TimeFormat), at, at.Add(10*time.Second))
	d.note(at.Format(http.TimeFormat), at.Add(3*time.Second), at.Add(3*time.Second+time.Millisecond))
	d.note(at.Format(http.TimeFormat), at.Add(time.Hour), at.Add(2*time.Hour))
	d.note("nonsense", at, at)
	if skew, exact, known := d.Skew(); !known || skew.Round(100*time.Millisecond) != 2500*time.Millisecond || exact > 510*time.Millisecond {
		t.Errorf("ahead by %s, give or take %s, %t", skew, exact, known)
	}
	c := config(t)
	inCluster(t, &c, conformance.NewServer(t).Config())
	has(t, examine(t, c, "clock"), OK, "agrees with the API server's")
}

func TestClockOfFalco(t *testing.T) {
	for _, tt := range []struct {
		lag    time.Duration
		status Status
		word   string
	}{{time.Millisecond, OK, "1ms old"}, {time.Minute, Warning, "1m0s old"}, {time.Hour, Missing, "guard.maxAge"}, {-time.Minute, Missing, "from the future, by 1m0s"}} {
		c := config(t)
		now := time.Now()
		c.Running = func(context.Context) (Running, error) {
			return Running{LastAlert: &LastAlert{Time: now.Add(-tt.lag), Received: now}}, nil
		}
		has(t, examine(t, c, "clock"), tt.status, tt.word)
	}
}

func TestNodeNeeds(t *testing.T) {
	c := config(t)
	has(t, examine(t, c, "node"), OK, "nothing of the node")
	for i := range c.Entries {
		if c.Entries[i].Name == "freeze-container" {
			c.Entries[i].Needs = append(c.Entries[i].Needs, "CAP_NOBODY_HAS")
		}
	}
	c.Steps = steps("freeze-container", "slack")
	found := examine(t, c, "node")
	has(t, found, Missing, "for freeze-container: ", "CAP_NOBODY_HAS")
	for _, f := range found {
		if strings.Contains(f.Found, "slack") {
			t.Errorf("found %+v", f)
		}
	}
}
