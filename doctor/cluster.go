package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"stoop/responders"
)

// Dates are those of the API server's answers: what its clock says. It is wrapped
// around the transport.
type Dates struct {
	mu    sync.Mutex
	skew  time.Duration // of this machine's clock: positive is ahead
	exact time.Duration // how far off the skew may be
	known bool
}

// Wrap makes the dates known of what passes rt.
func (d *Dates) Wrap(rt http.RoundTripper) http.RoundTripper { return &dated{d, rt} }

type dated struct {
	dates *Dates
	next  http.RoundTripper
}

// RoundTrip implements [http.RoundTripper].
func (t *dated) RoundTrip(req *http.Request) (*http.Response, error) {
	sent := time.Now()
	resp, err := t.next.RoundTrip(req)
	if err == nil {
		t.dates.note(resp.Header.Get("Date"), sent, time.Now())
	}
	return resp, err
}

// note keeps the date that says it most exactly. It is in whole seconds, cut off.
func (d *Dates) note(date string, sent, got time.Time) {
	at, err := http.ParseTime(date)
	if err != nil {
		return
	}
	const half = time.Second / 2
	took := got.Sub(sent)
	d.mu.Lock()
	defer d.mu.Unlock()
	if exact := took/2 + half; !d.known || exact < d.exact {
		d.skew, d.exact, d.known = sent.Add(took/2).Sub(at.Add(half)), exact, true
	}
}

// Skew is how far this machine's clock is ahead of the API server's, give or take; ok
// is false where it is not known.
func (d *Dates) Skew() (skew, exact time.Duration, ok bool) {
	if d == nil {
		return 0, 0, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.skew, d.exact, d.known
}

// byCluster are the responders of the rules that need an API server.
func (e *Examination) byCluster() []string {
	var names []string
	for _, s := range e.Steps {
		i := slices.IndexFunc(e.Entries, func(en responders.Entry) bool { return en.Name == s.Responder })
		if i >= 0 && len(e.Entries[i].PermissionsFor(s.Params)) > 0 && !slices.Contains(names, s.Responder) {
			names = append(names, s.Responder)
		}
	}
	slices.Sort(names)
	return names
}

func lookAPI(ctx context.Context, e *Examination) []Finding {
	const do = "name a kubeconfig with --kubeconfig, or run stoop in a pod"
	if e.KubeErr != nil {
		return []Finding{missing(do, "%v", e.KubeErr)}
	}
	if e.Kube == nil {
		if by := e.byCluster(); len(by) > 0 {
			return []Finding{missing(do, "no cluster is configured, and the rules use %s", some(by))}
		}
		return []Finding{ok("no cluster is configured, and no rule needs one")}
	}
	began := time.Now()
	version, err := e.Kube.ServerVersion(ctx)
	if err != nil {
		return []Finding{missing("see whether this node reaches it, and whether the credentials are still good", "the API server at %s does not answer as it should: %v", e.Server, err)}
	}
	said := fmt.Sprintf("%s answers in %s; Kubernetes %s", e.Server, time.Since(began).Round(time.Millisecond), version)
	who, err := e.identity()
	switch {
	case err != nil:
		said += "; as whom is not known"
	case who.Node != "":
		said += fmt.Sprintf("; stoop is %s, on node %s", who.User, who.Node)
	default:
		said += "; stoop is " + who.User
	}
	out := []Finding{ok("%s", said)}
	if err == nil && who.Node != "" && who.Node != e.Node {
		out = append(out, missing(fmt.Sprintf("node: %s in stoop.yaml, or NODE_NAME from spec.nodeName", who.Node),
			"its token is of node %q, and stoop calls this node %q: it watches the pods of another", who.Node, e.Node))
	}
	return out
}

// asksAtOnce bounds the reviews that are under way.
const asksAtOnce = 8

// lookPermissions asks for each permission.
func lookPermissions(ctx context.Context, e *Examination) []Finding {
	if e.Kube == nil {
		return []Finding{ok("without a cluster none is needed")}
	}
	permit, err := responders.Permit(e.Entries, responders.Account{Namespace: e.Namespace, AuditEvents: e.AuditEvents}, e.Steps)
	if err != nil {
		return []Finding{unknown("", "%v", err)}
	}
	all := permit.All(e.Namespace)
	type answer struct {
		may bool
		err error
	}
	answers := make([]answer, len(all))
	var asking sync.WaitGroup
	free := make(chan struct{}, asksAtOnce)
	for i := range all {
		free <- struct{}{}
		asking.Go(func() {
			defer func() { <-free }()
			answers[i].may, answers[i].err = e.Kube.May(ctx, all[i])
		})
	}
	asking.Wait()

	granted := 0
	var lacks []lack
	var failed error
	unasked := 0
	for i, a := range answers {
		switch {
		case a.err != nil:
			failed, unasked = a.err, unasked+1
		case a.may:
			granted++
		default:
			lacks = addLack(lacks, all[i])
		}
	}
	var out []Finding
	if granted > 0 {
		out = append(out, ok("%d of %s granted", granted, counted(len(all), "permission")))
	}
	if e.RulesErr != nil {
		out = append(out, unknown("mend the rules", "what the rules need: they can't be read"))
	}
	if unasked > 0 {
		out = append(out, unknown("stoop rbac prints what is needed", "%d of them could not be asked for: %v", unasked, failed))
	}
	do := e.grant()
	const most = 30
	for i, l := range lacks {
		if i == most {
			out = append(out, missing(do, "and %d more", len(lacks)-most))
			break
		}
		out = append(out, missing(do, "%s, for %s", l, strings.Join(l.by, ", ")))
	}
	return out
}

// grant is how what is missing gets granted.
func (e *Examination) grant() string {
	print := "stoop rbac --rules " + e.RulesFile
	if e.AuditEvents {
		print += " --audit-events"
	}
	who, err := e.identity()
	if err != nil {
		return print + " prints what is needed"
	}
	a, is := who.Account()
	if !is {
		return fmt.Sprintf("grant it to %s; %s prints what is needed", who.User, print)
	}
	return fmt.Sprintf("%s --namespace %s --service-account %s | kubectl apply -f -", print, a.Namespace, a.Name)
}

// lack is what is not granted of one resource.
type lack struct {
	responders.Permission
	verbs []string
	by    []string
}

func addLack(lacks []lack, p responders.Permission) []lack {
	i := slices.IndexFunc(lacks, func(l lack) bool {
		return l.Namespace == p.Namespace && l.Group == p.Group && l.Resource == p.Resource && l.Name == p.Name
	})
	if i < 0 {
		lacks = append(lacks, lack{Permission: p})
		i = len(lacks) - 1
	}
	l := &lacks[i]
	l.verbs = append(l.verbs, p.Verb)
	for _, name := range p.By {
		if !slices.Contains(l.by, name) {
			l.by = append(l.by, name)
		}
	}
	slices.Sort(l.by)
	return lacks
}

// String is what is not allowed.
func (l lack) String() string {
	s := "may not " + strings.Join(l.verbs, ", ") + " " + l.Resource
	if l.Group != "" {
		s += "." + l.Group
	}
	if l.Name != "" {
		s += " " + l.Name
	}
	if l.Namespace != "" {
		return s + " in namespace " + l.Namespace
	}
	return s + " in the cluster"
}

// plugin is a network plugin, and how it is known.
type plugin struct {
	name       string
	types      []string // in the CNI configuration of the node
	groups     []string // API groups of its own
	daemonSets []string
	does       string // about policies
	enforces   bool
}

// plugins are those that most clusters have.
func plugins() []plugin {
	return []plugin{
		{"Cilium", []string{"cilium-cni"}, []string{"cilium.io"}, []string{"cilium", "anetd"}, "enforces NetworkPolicies; cilium-isolate denies above them", true},
		{"Calico", []string{"calico"}, []string{"crd.projectcalico.org", "projectcalico.org"}, []string{"calico-node", "canal"}, "enforces NetworkPolicies; calico-isolate denies above them", true},
		{"Antrea", []string{"antrea"}, []string{"crd.antrea.io"}, []string{"antrea-agent"}, "enforces NetworkPolicies", true},
		{"OVN-Kubernetes", []string{"ovn-k8s-cni-overlay"}, []string{"k8s.ovn.org"}, []string{"ovnkube-node"}, "enforces NetworkPolicies", true},
		{"kube-router", []string{"kube-router"}, nil, []string{"kube-router"}, "enforces NetworkPolicies, unless started with --run-firewall=false", true},
		{"Weave Net", []string{"weave-net"}, nil, []string{"weave-net"}, "enforces NetworkPolicies", true},
		{"kube-network-policies", nil, nil, []string{"kube-network-policies"}, "enforces NetworkPolicies", true},
		{"Azure network policy manager", nil, nil, []string{"azure-npm"}, "enforces NetworkPolicies", true},
		{"kindnet", []string{"kindnet"}, nil, []string{"kindnet"}, "enforces NetworkPolicies from kind 0.24 on, and none before", false},
		{"the Amazon VPC CNI", []string{"aws-cni"}, []string{"vpcresources.k8s.aws", "networking.k8s.aws"}, []string{"aws-node"}, "enforces NetworkPolicies only where its network policy agent is switched on (enableNetworkPolicy)", false},
		{"the Azure CNI", []string{"azure-vnet"}, nil, []string{"azure-cns"}, "enforces no policies by itself", false},
		{"Flannel", []string{"flannel"}, nil, []string{"kube-flannel-ds", "kube-flannel"}, "enforces no policies", false},
	}
}

// lookNetwork tells which network plugin there is, by what can be seen of it, and what
// it does with policies. Whether a policy holds only a try can tell.
func lookNetwork(ctx context.Context, e *Examination) []Finding {
	by := e.uses(func(en *responders.Entry) bool {
		return strings.Contains(en.Name, "isolate") || strings.Contains(en.Name, "quarantine-pod") || en.Instead == "isolate-pod"
	})
	if len(by) == 0 && e.RulesErr == nil {
		return []Finding{ok("no rule isolates by a policy")}
	}
	const try = "try it: isolate a pod of your own, and see what it still reaches"
	if e.Kube == nil {
		return []Finding{unknown("", "without a cluster nothing is known of its policies")}
	}
	seen, blind := e.plugins(ctx)
	var out []Finding
	enforced, running := false, false
	var served []string
	for _, s := range seen {
		enforced = enforced || s.enforces
		running = running || !s.served
		served = append(served, s.name)
	}
	if len(seen) > 1 && !running {
		// Definitions stay when what they were for has gone.
		return []Finding{unknown(try, "the cluster serves the API groups of %s, and which of them is its network plugin can't be told: %s", strings.Join(served, ", "), strings.Join(blind, "; "))}
	}
	for _, s := range seen {
		what := fmt.Sprintf("%s (%s) %s", s.name, s.how, s.does)
		switch {
		case s.enforces:
			out = append(out, ok("%s", what))
		case !enforced:
			out = append(out, warning(try+"; on the node itself cut-network needs no plugin", "%s, and the rules use %s", what, strings.Join(by, ", ")))
		}
	}
	if len(seen) == 0 {
		out = append(out, unknown(try, "which network plugin the cluster has, and so whether policies hold: %s", strings.Join(blind, "; ")))
	}
	return out
}

type seenPlugin struct {
	plugin
	how    string
	served bool // nothing but its API groups is to be seen
}

// plugins are those of which something is to be seen, and what could not be looked
// at.
func (e *Examination) plugins(ctx context.Context) (seen []seenPlugin, blind []string) {
	types, err := e.cniTypes()
	if err != nil || len(types) == 0 {
		blind = append(blind, "no configuration of it is to be seen on this machine (/etc/cni/net.d)")
	}
	groups, err := e.Kube.Groups(ctx)
	if err != nil {
		blind = append(blind, fmt.Sprintf("the API groups can't be asked for: %v", err))
	}
	sets, err := e.daemonSets(ctx)
	if apierrors.IsForbidden(err) {
		blind = append(blind, "stoop may not list DaemonSets, and does not need to")
	} else if err != nil {
		blind = append(blind, fmt.Sprintf("the DaemonSets can't be listed: %v", err))
	}
	both := func(a, b []string) (string, bool) {
		for _, s := range a {
			if slices.Contains(b, s) {
				return s, true
			}
		}
		return "", false
	}
	for _, p := range plugins() {
		if s, is := both(p.daemonSets, sets); is {
			seen = append(seen, seenPlugin{p, "its DaemonSet " + s + " is there", false})
		} else if s, is := both(p.types, types); is {
			seen = append(seen, seenPlugin{p, "this machine's configuration names " + s, false})
		} else if s, is := both(p.groups, groups); is {
			seen = append(seen, seenPlugin{p, "as the cluster serves " + s, true})
		}
	}
	if len(blind) == 0 && len(seen) == 0 {
		blind = append(blind, "nothing of those that this program knows")
	}
	return seen, blind
}

// daemonSets are those that may be a network plugin's, wherever they are.
func (e *Examination) daemonSets(ctx context.Context) ([]string, error) {
	var names []string
	sets := e.Kube.Dynamic().Resource(schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"})
	for options := (metav1.ListOptions{Limit: 200}); ; {
		list, err := sets.List(ctx, options)
		if err != nil {
			return names, err
		}
		for i := range list.Items {
			names = append(names, list.Items[i].GetName())
		}
		if options.Continue = list.GetContinue(); options.Continue == "" || len(names) > 5000 {
			return names, nil
		}
	}
}

// lookClock holds this machine's clock against the API server's, and against Falco's.
func lookClock(ctx context.Context, e *Examination) []Finding {
	const do = "let something keep the clocks of all machines together (chrony, systemd-timesyncd)"
	var out []Finding
	var said []string
	if e.Kube != nil {
		if _, _, known := e.Dates.Skew(); !known {
			_, _ = e.Kube.ServerVersion(ctx)
		}
	}
	if skew, exact, known := e.Dates.Skew(); known {
		// The date is in whole seconds: what is less than that is not known.
		off := max(skew.Abs()-exact, 0)
		which := "ahead of"
		if skew < 0 {
			which = "behind"
		}
		switch {
		case off == 0:
			said = append(said, "agrees with the API server's, as far as that says")
		case off > time.Minute:
			out = append(out, missing(do, "this machine's clock is %s %s the API server's: Leases and tokens don't hold", skew.Abs().Round(time.Second), which))
		case off > 2*time.Second:
			out = append(out, warning(do, "this machine's clock is %s %s the API server's", skew.Abs().Round(100*time.Millisecond), which))
		default:
			said = append(said, fmt.Sprintf("is %s %s the API server's", skew.Abs().Round(100*time.Millisecond), which))
		}
	}
	if r, err := e.running(); err == nil && r.LastAlert != nil && !r.LastAlert.Time.IsZero() {
		l := r.LastAlert
		switch lag := l.Received.Sub(l.Time); {
		case lag < -30*time.Second:
			out = append(out, missing(do, "the last alert came from the future, by %s: such alerts start nothing harmful", (-lag).Round(time.Second)))
		case lag > e.MaxAge:
			out = append(out, missing(do+"; or look what holds alerts up", "the last alert was %s old when it came, more than guard.maxAge (%s)", lag.Round(time.Second), e.MaxAge))
		case lag > 5*time.Second, lag < -5*time.Second:
			out = append(out, warning("see whether the clocks differ, or something holds alerts up", "the last alert was %s old when it came", lag.Round(100*time.Millisecond)))
		default:
			said = append(said, fmt.Sprintf("the last alert was %s old when it came", lag.Round(time.Millisecond)))
		}
	}
	if synchronised, err := clockSynchronised(); err == nil && !synchronised {
		out = append(out, warning(do, "nothing keeps this machine's clock right, as far as its kernel knows"))
	} else if err == nil {
		said = append(said, "the kernel knows of something that keeps it right")
	}
	if len(said) == 0 && len(out) == 0 {
		return []Finding{unknown("", "there is nothing to hold this machine's clock against")}
	}
	if len(said) > 0 {
		out = append([]Finding{ok("this machine's clock: %s", strings.Join(said, "; "))}, out...)
	}
	return out
}

var errNoCNI = errors.New("no CNI configuration")
