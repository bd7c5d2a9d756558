package convert

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"stoop/broker"
	"stoop/param"
)

// actionner is one of Talon's, and what stoop has in its place.
type actionner struct {
	name      string
	also      string // its name in earlier versions
	responder string // "": there is none
	why       string // there is none, and what to do
	ends      bool   // Talon goes no further after it, unless continue says so
	params    []string
	convert   func(c *step)
}

func (a actionner) is(name string) bool { return name == a.name || a.also != "" && name == a.also }

// actionners are Talon's.
func actionners() []actionner {
	return []actionner{
		{
			name: "kubernetes:terminate", responder: "delete-pod", ends: true,
			params:  []string{"grace_period_seconds", "ignore_daemonsets", "ignore_statefulsets", "ignore_standalone_pods", "min_healthy_replicas"},
			convert: terminate,
		},
		{name: "kubernetes:label", also: "kubernetes:labelize", responder: "label-pod", params: []string{"labels", "level"}, convert: label},
		{name: "kubernetes:annotation", responder: "annotate-pod", params: []string{"annotations", "level"}, convert: annotate},
		{
			name: "kubernetes:networkpolicy", responder: "isolate-pod", params: []string{"allow", "allow_cidr", "allow_namespaces"},
			convert: func(c *step) {
				c.set("direction", bare(c.action.node, "egress"))
				c.allow()
				c.note("Talon's policy selects by the labels of the pod's owner, so all of its pods lose their network; stoop isolates the one that raised the alert.")
			},
		},
		{name: "kubernetes:exec", responder: "exec-in-pod", params: []string{"shell", "command"}, convert: func(c *step) { c.shell("command") }},
		{
			name: "kubernetes:script", responder: "exec-in-pod", params: []string{"shell", "script", "file"},
			convert: func(c *step) {
				if f := c.get("file"); f != nil {
					c.refuse(f, "file is a script in Talon's own container: write it here, as script")
					return
				}
				c.shell("script")
			},
		},
		{
			name: "kubernetes:log", responder: "capture-logs", params: []string{"tail_lines"},
			convert: func(c *step) {
				if n := c.get("tail_lines"); n != nil {
					c.set("tail", n)
				}
			},
		},
		{name: "kubernetes:download", responder: "capture-files", params: []string{"file"}, convert: download},
		{
			name: "kubernetes:tcpdump", responder: "capture-packets", ends: true, params: []string{"duration", "snaplen", "image"},
			convert: func(c *step) {
				if n := c.get("duration"); n == nil || n.Value == "0" {
					c.set("duration", bare(c.action.node, "5s")) // Talon's default
				} else {
					c.seconds("duration", "duration")
				}
				if c.get("snaplen") != nil {
					c.note("snaplen is left out: packets are kept whole, up to maxSize in all.")
				}
				if c.get("image") != nil {
					c.note("image is left out: stoop puts no container into the pod for this.")
				}
			},
		},
		{name: "kubernetes:sysdig", ends: true, why: "stoop captures no system calls: take it away, or use run or call with a tool of yours"},
		{
			name: "kubernetes:delete", responder: "delete-resource", ends: true, params: []string{},
			convert: func(c *step) {
				c.set("kinds", texts(c.action.node, []string{
					"namespaces", "configmaps", "secrets", "services", "serviceaccounts", "deployments.apps", "daemonsets.apps",
					"replicasets.apps", "statefulsets.apps", "roles.rbac.authorization.k8s.io", "clusterroles.rbac.authorization.k8s.io",
				}))
				c.set("verbs", texts(c.action.node, []string{"create", "update", "patch"}))
				c.note("The kinds are all that Talon deletes: leave those that are meant. stoop deletes only what the request of the alert has just made or changed (Falco has to write " +
					"the fields for that: see docs/responders.md), and waits until somebody approves, unless approve: false stands here.")
			},
		},
		{
			name: "kubernetes:cordon", responder: "cordon-node", params: []string{},
			convert: func(*step) {},
		},
		{
			name: "kubernetes:drain", responder: "drain-node",
			params: []string{
				"ignore_daemonsets", "ignore_statefulsets", "min_healthy_replicas", "ignore_errors", "ignore_error", "max_wait_period", "wait_period_excluded_namespaces",
			},
			convert: drain,
		},
		{
			name: "calico:networkpolicy", responder: "calico-isolate", params: []string{"allow", "allow_cidr", "allow_namespaces", "order"},
			convert: func(c *step) {
				c.egress()
				if n := c.get("order"); n != nil && c.takes("order") {
					c.set("order", n)
				} else if n != nil {
					c.note("order is left out: stoop's policy comes before others.")
				}
			},
		},
		{
			name: "cilium:networkpolicy", responder: "cilium-isolate", params: []string{"allow", "allow_cidr", "allow_namespaces", "order"},
			convert: func(c *step) { c.egress() },
		},
		{name: "aws:lambda", why: "give the function a URL, and write webhook-call: {url: …} by hand"},
		{name: "gcp:function", why: "write webhook-call: {url: …, token: …} with the function's address by hand"},
	}
}

// step is an action on its way.
type step struct {
	*talon
	action *talonAction
	kind   actionner
	params *yaml.Node
	notes  []string
	beside []entry // keys beside the responder's
}

// step is the entry of actions that an action becomes; nil if it is refused.
func (t *talon) step(a *talonAction) *yaml.Node {
	if a.actionner == nil {
		t.refuse(a.node, "the action %s has no actionner, neither here nor in a block of its own", param.Cut(a.name))
		return nil
	}
	var names []string
	for _, k := range actionners() {
		names = append(names, k.name)
	}
	i := slices.IndexFunc(actionners(), func(k actionner) bool { return k.is(a.actionner.Value) })
	if i < 0 {
		t.refuse(a.actionner, "%s", param.Unknown("actionner", a.actionner.Value, names))
		return nil
	}
	c := &step{talon: t, action: a, kind: actionners()[i], params: mapping(a.node)}
	if c.kind.responder == "" {
		t.refuse(a.actionner, "there is nothing like %s: %s", c.kind.name, c.kind.why)
		return nil
	}
	before := len(t.all)
	for _, e := range a.params {
		if name := param.Resolve(e.key).Value; !slices.Contains(c.kind.params, name) {
			t.refuse(e.key, "%s: %s. Talon passes over it: take it away, or write what is meant", c.kind.name, param.Unknown("parameter", name, c.kind.params))
		}
	}
	c.kind.convert(c)
	if t.catalog[c.kind.responder] == nil {
		t.refuse(a.actionner, "this stoop has no responder %s to do what %s does", c.kind.responder, c.kind.name)
		return nil
	}
	if len(t.all) == before {
		raw, wrong := t.catalog[c.kind.responder].Check(c.params)
		t.meant = append(t.meant, broker.Action{Responder: c.kind.responder, Params: raw})
		for _, p := range wrong {
			at := p.Node
			if at == nil || at.Line == 0 {
				at = a.node
			}
			t.refuse(at, "%s: %s", c.kind.responder, p.Message)
		}
	}
	c.outputs()
	return c.entry()
}

// entry is what stands in the list of actions.
func (c *step) entry() *yaml.Node {
	var n *yaml.Node
	if a := c.action; a.ignoreErrors != nil && a.ignoreErrors.Value == "false" {
		c.beside = append(c.beside, entry{scalar(a.ignoreErrors, "onFailure"), bare(a.ignoreErrors, "stop")})
	}
	if len(c.params.Content) == 0 && len(c.beside) == 0 {
		n = scalar(c.action.node, c.kind.responder)
	} else {
		n = mapping(c.action.node)
		params := c.params
		if len(params.Content) == 0 {
			params.Style = yaml.FlowStyle
		}
		set(n, c.kind.responder, params)
		for _, e := range c.beside {
			n.Content = append(n.Content, e.key, e.value)
		}
	}
	if len(c.notes) > 0 {
		n.HeadComment = comment(c.notes...)
	}
	return n
}

func (c *step) note(format string, args ...any) {
	c.notes = append(c.notes, fmt.Sprintf(format, args...))
}

func (c *step) set(key string, value *yaml.Node) { set(c.params, key, value) }

func (c *step) refuse(n *yaml.Node, format string, args ...any) {
	c.talon.refuse(n, c.kind.name+": "+format, args...)
}

// get is the value of a parameter of Talon's; nil: it is not there.
func (c *step) get(name string) *yaml.Node {
	for _, e := range c.action.params {
		if param.Resolve(e.key).Value == name {
			return place(&[]yaml.Node{*param.Resolve(e.value)}[0], e.value)
		}
	}
	return nil
}

// on reports whether a parameter of Talon's is true.
func (c *step) on(name string) (*yaml.Node, bool) {
	n := c.get(name)
	return n, n != nil && n.Value == "true"
}

// takes reports whether the responder has a parameter.
func (c *step) takes(name string) bool {
	d := c.catalog[c.kind.responder]
	if d == nil {
		return false
	}
	return slices.ContainsFunc(d.Fields, func(f param.Field) bool { return f.Name == name })
}

// seconds is a whole number of seconds as a duration.
func (c *step) seconds(theirs, ours string) bool {
	n := c.get(theirs)
	if n == nil {
		return false
	}
	if s, err := strconv.Atoi(n.Value); err != nil || s < 0 {
		c.refuse(n, "%s is a number of seconds, not %s", theirs, param.What(n))
		return true
	}
	if !c.takes(ours) && c.catalog[c.kind.responder] != nil {
		c.note("%s is left out: it means nothing here.", theirs)
		return true
	}
	c.set(ours, bare(n, n.Value+"s"))
	return true
}

func terminate(c *step) {
	switch n := c.get("grace_period_seconds"); {
	case !c.seconds("grace_period_seconds", "gracePeriod"):
		c.note("Without grace_period_seconds Talon deletes with 0, by which the pod vanishes while its processes run on for seconds; stoop's default is 1s.")
	case n.Value == "0":
		c.note("With 0 the pod vanishes while its processes run on for seconds; 1s is stoop's default.")
	}
	if n, on := c.on("ignore_daemonsets"); on {
		c.refuse(n, "ignore_daemonsets: stoop can't tell in a rule by whom a pod is owned. Take this away only if the rule may delete such pods, or leave their namespaces out in the rule")
	}
	if c.takes("force") && c.takes("maxUnavailable") {
		c.sparing()
		return
	}
	for _, name := range []string{"ignore_statefulsets", "ignore_standalone_pods", "min_healthy_replicas"} {
		if n := c.get(name); n != nil && n.Value != "false" {
			c.refuse(n, "%s: this stoop's delete-pod can't be told that", name)
		}
	}
}

// sparing is which pods are left. Talon passes over them; stoop isolates them.
func (c *step) sparing() {
	healthy := c.get("min_healthy_replicas")
	_, sets := c.on("ignore_statefulsets")
	alone := c.get("ignore_standalone_pods") // true, says Talon, where it is not written
	if alone != nil && alone.Value == "false" {
		if !sets && healthy == nil {
			c.set("force", bare(alone, "true"))
			c.note("force deletes any pod, as Talon does. Without it stoop isolates the last healthy pod of a workload, pods of StatefulSets, with ReadWriteOnce volumes and without a controller.")
			return
		}
		c.note("Pods without a controller are isolated instead of deleted: there is no leave for them alone, force: true takes any pod.")
	}
	c.unavailable(healthy)
	if sets {
		c.note("Talon passes over pods of StatefulSets; stoop isolates them, and those with ReadWriteOnce volumes or without a controller.")
	} else {
		c.note("Talon deletes pods of StatefulSets too; stoop isolates them, and those with ReadWriteOnce volumes or without a controller, unless force: true stands here.")
	}
}

var share = regexp.MustCompile(`^([0-9]{1,3})%$`)

// unavailable turns how many replicas have to be healthy into how many need not be.
func (c *step) unavailable(healthy *yaml.Node) {
	if healthy == nil {
		c.set("maxUnavailable", bare(c.action.node, "100%"))
		c.note("Without min_healthy_replicas Talon deletes the last healthy pod too: take maxUnavailable away, and stoop isolates that one.")
		return
	}
	percent := share.FindStringSubmatch(healthy.Value)
	p := 0
	if percent != nil {
		p, _ = strconv.Atoi(percent[1])
	}
	switch {
	case healthy.Value == "0":
		c.set("maxUnavailable", bare(healthy, "100%"))
	case healthy.Value == "1":
		c.note("min_healthy_replicas: 1 is what stoop does by itself.")
	case percent == nil || p > 100:
		c.refuse(healthy, "min_healthy_replicas: a number of pods that stay can't be said: write a percentage, or by hand maxUnavailable, which is the number that may be missing")
		return
	default:
		// Both round in favour of the workload: D - ceil(D*p/100) = floor(D*(100-p)/100).
		c.set("maxUnavailable", bare(healthy, strconv.Itoa(100-p)+"%"))
	}
	c.note("Talon counts the healthy pods before it deletes one, and only of a ReplicaSet; stoop those that are left without it, of any workload.")
}

// level reports whether a label or annotation is for the node.
func (c *step) level() bool {
	n := c.get("level")
	if n != nil && n.Value != "pod" && n.Value != "node" {
		c.refuse(n, "level is pod or node, not %s", param.What(n))
	}
	return n != nil && n.Value == "node"
}

func label(c *step) {
	if c.level() {
		c.kind.responder = "label-node"
	}
	c.metadata("labels")
}

func annotate(c *step) {
	if c.level() {
		c.refuse(c.get("level"), "stoop annotates no nodes: take it away, or use a label")
		return
	}
	c.metadata("annotations")
}

// metadata is a map of texts.
func (c *step) metadata(name string) {
	n := c.get(name)
	switch {
	case n == nil:
		c.refuse(c.action.node, "%s is missing", name)
		return
	case n.Kind != yaml.MappingNode:
		c.refuse(n, "%s is a mapping, not %s", name, param.What(n))
		return
	}
	m := mapping(n)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := param.Resolve(n.Content[i]), param.Resolve(n.Content[i+1])
		if v.Kind != yaml.ScalarNode {
			c.refuse(n.Content[i+1], "the value of %s is a text, not %s", param.Cut(k.Value), param.What(v))
			continue
		}
		value := v.Value
		if param.IsNull(v) {
			value = ""
		}
		s := scalar(n.Content[i+1], value)
		if value == "" {
			s.Style = yaml.DoubleQuotedStyle
		}
		m.Content = append(m.Content, scalar(n.Content[i], k.Value), s)
	}
	c.set(name, m)
}

// allow is where a pod without network may go.
func (c *step) allow() {
	for _, name := range []string{"allow", "allow_cidr"} {
		n := c.get(name)
		if n == nil {
			continue
		}
		if n.Kind != yaml.SequenceNode {
			c.refuse(n, "%s is a list, not %s", name, param.What(n))
			return
		}
		if len(n.Content) > 0 {
			l := list(n)
			for _, i := range n.Content {
				l.Content = append(l.Content, scalar(i, param.Resolve(i).Value))
			}
			c.set("allowCIDRs", list(n, l.Content...))
		}
	}
	if n := c.get("allow_namespaces"); n != nil && len(n.Content) > 0 {
		c.refuse(n, "allow_namespaces: stoop lets an isolated pod reach addresses only: write their CIDRs in allow_cidr")
	}
}

// egress is for the policies that deny one address.
func (c *step) egress() {
	if c.takes("direction") {
		c.set("direction", bare(c.action.node, "egress"))
	}
	if c.takes("allowCIDRs") {
		c.allow()
	} else if n := c.get("allow_cidr"); n != nil && len(n.Content) > 0 {
		c.refuse(n, "allow_cidr can't be said")
	} else if n := c.get("allow_namespaces"); n != nil && len(n.Content) > 0 {
		c.refuse(n, "allow_namespaces can't be said")
	}
	c.note("Talon denies the pods of the owner the one address of the alert; stoop cuts off all that goes out of the one pod. block-address denies the address alone.")
}

func drain(c *step) {
	c.seconds("max_wait_period", "deadline")
	if n := c.get("ignore_daemonsets"); n != nil && n.Value == "false" {
		c.note("Pods of DaemonSets are left where they are.")
	}
	if n, on := c.on("ignore_statefulsets"); on {
		c.refuse(n, "ignore_statefulsets: stoop evicts them too. Take it away if that is fine")
	}
	if n := c.get("min_healthy_replicas"); n != nil {
		c.refuse(n, "min_healthy_replicas: stoop evicts, so that each PodDisruptionBudget is kept: take it away, and give the workloads such budgets")
	}
	if n := c.get("wait_period_excluded_namespaces"); n != nil && len(n.Content) > 0 {
		c.note("wait_period_excluded_namespaces is left out: stoop waits for all that it evicts.")
	}
	for _, name := range []string{"ignore_errors", "ignore_error"} {
		if _, on := c.on(name); on {
			c.note("%s is left out: a drain that leaves pods has failed, and the chain goes on even so.", name)
		}
	}
	c.note("A node with pods that have no controller, or an emptyDir volume, is not drained unless force, or deleteEmptyDirData, is set here.")
	c.note("The node is cordoned first, one node of the cluster at a time, and stoop waits until somebody approves, unless approve: false stands here.")
}

func download(c *step) {
	n := c.get("file")
	if n == nil {
		c.refuse(c.action.node, "file is missing")
		return
	}
	if m := variable.FindStringSubmatch(n.Value); m != nil {
		if m[0] != n.Value {
			c.refuse(n, "stoop puts no value of an alert into a path: name the file, or one field that holds all of it, such as ${FD_NAME}")
			return
		}
		field, ok := fieldOf(m[1] + m[2])
		if !ok {
			c.refuse(n, "%s is no field of an alert", n.Value)
			return
		}
		c.set("fields", list(n, scalar(n, field)))
		return
	}
	c.set("paths", list(n, scalar(n, n.Value)))
}

// variable is what Talon puts a value in the place of.
var variable = regexp.MustCompile(`\$(?:\{([A-Z][A-Z0-9_]*)\}|([A-Z][A-Z0-9_]*))`)

// fieldOf is the field of an alert that Talon calls by an environment variable's
// name: FD_NAME is fd.name.
func fieldOf(name string) (string, bool) {
	parts := strings.Split(strings.ToLower(name), "_")
	classes := []string{"evt", "proc", "thread", "user", "group", "container", "fd", "fs", "k8s", "ka", "k8smeta", "jevt", "syslog", "ct", "json", "http"}
	if len(parts) < 2 || !slices.Contains(classes, parts[0]) || slices.Contains(parts, "") {
		return "", false
	}
	if _, err := strconv.Atoi(parts[len(parts)-1]); err == nil && len(parts) > 2 {
		return strings.Join(parts[:len(parts)-1], ".") + "[" + parts[len(parts)-1] + "]", true
	}
	if i := slices.Index(parts, "is"); i > 0 && i+1 < len(parts) {
		return strings.Join(parts[:i], ".") + "." + strings.Join(parts[i:], "_"), true
	}
	field := strings.Join(parts, ".")
	for _, known := range []string{"container.full_id", "container.start_ts", "proc.exe_ino", "proc.is_exe_writable", "evt.plugininfo"} {
		if strings.ReplaceAll(known, "_", ".") == field {
			return known, true
		}
	}
	return field, true
}

// shell is a text that a shell in the container runs.
func (c *step) shell(name string) {
	n := c.get(name)
	if n == nil || n.Value == "" {
		c.refuse(c.action.node, "%s is missing", name)
		return
	}
	shell := "/bin/sh"
	if s := c.get("shell"); s != nil && s.Value != "" {
		shell = s.Value
	}
	env := mapping(n)
	var others []string
	for _, m := range variable.FindAllStringSubmatch(n.Value, -1) {
		name := m[1] + m[2]
		field, ok := fieldOf(name)
		switch {
		case !ok && !slices.Contains(others, m[0]):
			others = append(others, m[0])
		case ok && !has(env, name):
			set(env, name, scalar(n, field))
		}
	}
	c.set("command", list(n, scalar(n, shell), scalar(n, "-c"), scalar(n, n.Value)))
	if len(env.Content) > 0 {
		c.set("environment", env)
		c.note("Talon writes the values into the shell's text, where whoever chooses them can run code. Here they are variables of the command: quote them (\"$FD_NAME\").")
	}
	if len(others) > 0 {
		c.note("Talon writes its own values for %s; here the container's shell does. Contexts of clouds and nodes are not there.", strings.Join(others, ", "))
	}
}

// outputs says what becomes of what an action finds.
func (c *step) outputs() {
	if c.action.output == nil {
		return
	}
	target := "a place of its own"
	for i := 0; i+1 < len(c.action.output.Content); i += 2 {
		if param.Resolve(c.action.output.Content[i]).Value == "target" {
			target = param.Resolve(c.action.output.Content[i+1]).Value
		}
	}
	c.note("Talon writes this to %s. stoop keeps it in its evidence store, as stoop.yaml says below evidence.", target)
}
