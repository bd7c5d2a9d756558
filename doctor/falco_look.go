package doctor

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"stoop/responders"
)

// wants is one thing that Falco's configuration should have.
type wants func(*Examination, *falco) (good string, found []Finding)

// lookFalco looks at Falco's configuration.
func lookFalco(_ context.Context, e *Examination) []Finding {
	f := e.falco()
	switch {
	case f.file == "":
		return []Finding{unknown("name its configuration with --falco FILE, if it runs in a container that can't be seen from here",
			"no Falco is to be found: no process of that name, no %s", falcoFile)}
	case f.err != nil && f.broken:
		return []Finding{missing("falco --dry-run says more; Falco does not start with this", "%v", f.err)}
	case f.err != nil:
		return []Finding{unknown("run this as root, in a pod with hostPID; or name Falco's configuration with --falco FILE", "Falco's configuration can't be read: %v", f.err)}
	}
	said := f.file
	if n := len(f.files) - 1; n > 0 {
		var names []string
		for _, p := range f.files[1:] {
			names = append(names, filepath.Base(p))
		}
		said += fmt.Sprintf(" with %s (%s)", counted(n, "further file"), some(names))
	}
	if f.process != nil {
		said += ", of " + f.process.String()
	}
	var good []string
	var found []Finding
	for _, look := range []wants{wantsJSON, wantsOutput, wantsFields, wantsUnbuffered, wantsQueue, wantsHostname} {
		g, more := look(e, f)
		if g != "" {
			good = append(good, g)
		}
		found = append(found, more...)
	}
	if p := f.text("priority"); p != "" && !strings.EqualFold(p, "debug") {
		good = append(good, "no alerts below priority "+strings.ToLower(p))
	}
	if f.process == nil && e.Falco == "" {
		found = append(found, unknown("start it, or run this where its process can be seen", "no Falco is to be seen running"))
	}
	if f.others > 0 {
		found = append(found, warning("", "%s of the name falco run; this is about process %d", counted(f.others+1, "process"), f.process.pid))
	}
	return append([]Finding{ok("%s", strings.Join(append([]string{said}, good...), "; "))}, found...)
}

func wantsJSON(_ *Examination, f *falco) (string, []Finding) {
	if !f.truth(false, "json_output") {
		return "", []Finding{missing("json_output: true", "json_output is off: plain text can be forged, names no rule, and starts nothing harmful")}
	}
	var found []Finding
	if !f.truth(true, "json_include_output_fields_property") {
		found = append(found, missing("json_include_output_fields_property: true", "its alerts hold no fields: no pod, no process can be found by them"))
	}
	if !f.truth(true, "json_include_tags_property") {
		found = append(found, warning("json_include_tags_property: true", "its alerts hold no tags: rules that match tags never match"))
	}
	return "json_output", found
}

// wantsOutput looks for the way from Falco to the source.
func wantsOutput(e *Examination, f *falco) (string, []Finding) {
	const once = "keep_alive: false there, as Falco starts it once only: when it ends, every later alert is lost in silence"
	if f.truth(false, "program_output", "enabled") && strings.Contains(f.text("program_output", "program"), "stoop publish") {
		if f.truth(false, "program_output", "keep_alive") {
			return "", []Finding{warning(once, "program_output hands its alerts to stoop publish, with keep_alive")}
		}
		return "program_output hands its alerts to stoop publish", nil
	}
	path := e.Source.Pipe
	if path == "" {
		path = e.Source.File
	}
	switch {
	case path != "":
		return e.wantsFile(f, path)
	case e.Source.HTTP != "":
		return e.wantsHTTP(f)
	}
	return "", nil
}

func (e *Examination) wantsFile(f *falco, path string) (string, []Finding) {
	do := fmt.Sprintf("file_output: {enabled: true, keep_alive: true, filename: %s}", path)
	name := f.text("file_output", "filename")
	switch {
	case !f.truth(false, "file_output", "enabled"):
		return "", []Finding{missing(do, "file_output is off: Falco writes nothing to %s", path)}
	case !filepath.IsAbs(name):
		return "", []Finding{missing(do, "file_output writes to %q, a path that is relative to wherever Falco is started", name)}
	case filepath.Clean(name) != filepath.Clean(path):
		// Another name of the same file, in a container that has it elsewhere.
		here, err := identify(path)
		there, err2 := f.tree.identify(name)
		if err != nil || err2 != nil || here != there {
			return "", []Finding{missing(do+"; or --pipe, where a container has it by another name", "file_output writes to %s, and stoop reads %s", name, path)}
		}
	}
	if e.Source.Pipe != "" && !f.truth(false, "file_output", "keep_alive") {
		return "file_output to " + name, []Finding{warning(do, "file_output has no keep_alive: Falco opens and closes the FIFO for each alert")}
	}
	return "file_output to " + name, nil
}

// wantsHTTP names no more of the address than host and port: the rest may hold the
// token.
func (e *Examination) wantsHTTP(f *falco) (string, []Finding) {
	do := fmt.Sprintf("http_output: {enabled: true, url: \"http://falco:TOKEN@%s/\"}", e.Source.HTTP)
	if !f.truth(false, "http_output", "enabled") {
		return "", []Finding{missing(do, "http_output is off: Falco sends nothing to %s", e.Source.HTTP)}
	}
	u, err := url.Parse(f.text("http_output", "url"))
	if err != nil || u.Host == "" {
		return "", []Finding{missing(do, "http_output has no address that can be read")}
	}
	_, port, _ := strings.Cut(e.Source.HTTP, ":")
	if i := strings.LastIndex(e.Source.HTTP, ":"); i >= 0 {
		port = e.Source.HTTP[i+1:]
	}
	if u.Port() != port {
		return "", []Finding{warning(do, "http_output sends to %s, and stoop listens on %s: something between them has to pass it on", u.Host, e.Source.HTTP)}
	}
	return "http_output to " + u.Host, nil
}

// appended are the fields that append_output adds to every alert of system calls.
type appended struct {
	fields    map[string]bool
	suggested bool
}

// formatField is a field in an output format: %proc.name, %proc.aname[2].
var formatField = regexp.MustCompile(`%\(?([a-z][a-zA-Z0-9_.]*(?:\[[^\]]*\])?)`)

func (f *falco) appended() appended {
	a := appended{fields: map[string]bool{}}
	for _, item := range items(f.get("append_output")) {
		match := key(item, "match")
		if s := key(match, "source"); s != nil && s.Value != "syscall" || key(match, "rule") != nil || len(items(key(match, "tags"))) > 0 {
			continue
		}
		if s := key(item, "suggested_output"); s != nil && strings.EqualFold(s.Value, "true") {
			a.suggested = true
		}
		for _, field := range items(key(item, "extra_fields")) {
			name := field.Value
			if len(field.Content) == 2 { // name: format
				name = field.Content[0].Value
			}
			a.fields[name] = true
		}
		if o := key(item, "extra_output"); o != nil {
			for _, m := range formatField.FindAllStringSubmatch(o.Value, -1) {
				a.fields[m[1]] = true
			}
		}
	}
	return a
}

// exact are the fields that name a target exactly, none of which is in an alert by
// itself.
var exact = []string{"proc.pid", "proc.pid.ts", "k8s.pod.uid", "container.full_id"}

// fieldsOf are the fields that responders need besides, of which the rules of Falco
// print some.
func fieldsOf() map[string][]string {
	return map[string][]string{
		"block-address":   {"fd.name", "fd.l4proto"},
		"quarantine-file": {"fd.name"},
		"lock-user":       {"user.name", "user.uid"},
	}
}

func wantsFields(e *Examination, f *falco) (string, []Finding) {
	a := f.appended()
	var found []Finding
	do := func(fields []string) string {
		return "append_output: [{suggested_output: true}, {match: {source: syscall}, extra_fields: [" + strings.Join(fields, ", ") + "]}]"
	}
	if f.from != "" && f.version.before(0, 39, 0) {
		return "", []Finding{warning("upgrade Falco to 0.39 or later", "Falco %s has no append_output: pods are known by their names only, and processes not at all", f.version)}
	}
	if !a.suggested && !a.fields["container.id"] {
		found = append(found, warning("append_output: [{suggested_output: true}]", "append_output does not ask for what Falco suggests, with which alerts name their container and pod"))
	}
	var absent []string
	for _, name := range exact {
		if !a.fields[name] {
			absent = append(absent, name)
		}
	}
	byProcess := e.uses(func(en *responders.Entry) bool { return en.Object == responders.ProcessObject })
	switch {
	case len(byProcess) > 0 && !a.fields["proc.pid"]:
		found = append(found, missing(do(exact), "append_output does not ask for proc.pid, without which %s can't find the process", strings.Join(byProcess, ", ")))
		absent = slices.DeleteFunc(absent, func(s string) bool { return s == "proc.pid" })
		fallthrough
	default:
		if len(absent) > 0 {
			found = append(found, warning(do(exact), "append_output does not ask for %s: targets are known less exactly", strings.Join(absent, ", ")))
		}
	}
	more := map[string]bool{}
	var by []string
	for name, fields := range fieldsOf() {
		if len(e.uses(func(en *responders.Entry) bool { return en.Name == name })) == 0 {
			continue
		}
		for _, field := range fields {
			if !a.fields[field] {
				more[field] = true
				if !slices.Contains(by, name) {
					by = append(by, name)
				}
			}
		}
	}
	if len(more) > 0 {
		slices.Sort(by)
		names := slices.Sorted(maps.Keys(more))
		found = append(found, warning(do(names), "append_output does not ask for %s, which %s has only where Falco's rule prints it", strings.Join(names, ", "), strings.Join(by, ", ")))
	}
	if p := f.withoutPlugin(a); p != "" {
		found = append(found, missing("load_plugins: [container], or leave them out", "append_output asks for %s, and Falco's container plugin is not loaded: Falco refuses its rules", p))
	}
	if len(absent) > 0 || len(a.fields) == 0 {
		return "", found
	}
	return "append_output adds " + some(slices.Sorted(maps.Keys(a.fields))), found
}

// withoutPlugin are the fields that are asked for and that only the container plugin
// has, where it is not loaded. Up to 0.40 there is none, and Falco has them itself.
func (f *falco) withoutPlugin(a appended) string {
	if f.from == "" || f.version.before(0, 41, 0) {
		return ""
	}
	named := false
	for _, p := range items(f.get("plugins")) {
		n := key(p, "name")
		named = named || n != nil && n.Value == "container"
	}
	if load := f.get("load_plugins"); load != nil {
		named = named && slices.ContainsFunc(items(load), func(n *yaml.Node) bool { return n.Value == "container" })
	}
	if named {
		return ""
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(a.fields)) {
		if strings.HasPrefix(name, "container.") || strings.HasPrefix(name, "k8s.") {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

func wantsUnbuffered(e *Examination, f *falco) (string, []Finding) {
	if e.Source.Pipe == "" && e.Source.File == "" {
		return "", nil
	}
	const late = "alerts wait for one another until 4096 bytes are together"
	switch {
	case f.unbuffered:
		return "unbuffered (-U)", nil
	case f.truth(false, "buffered_outputs"):
		return "", []Finding{warning("buffered_outputs: false", "buffered_outputs is on: %s", late)}
	case f.from == "":
		return "", []Finding{unknown("--falco-version says which it is", "Falco's version is not known from here; from 0.32 to 0.43.1 %s, whatever buffered_outputs says, unless it is started with -U", late)}
	case !f.version.before(0, 32, 0) && f.version.before(0, 43, 2):
		return "", []Finding{warning("start Falco with -U, or upgrade it to 0.44", "Falco %s buffers despite buffered_outputs: false: %s", f.version, late)}
	}
	return "unbuffered", nil
}

func wantsQueue(_ *Examination, f *falco) (string, []Finding) {
	n, err := strconv.Atoi(f.text("outputs_queue", "capacity"))
	if err != nil || n <= 0 {
		return "", nil
	}
	return "", []Finding{warning("outputs_queue: {capacity: 0}", "outputs_queue.capacity is %d: what comes beyond, while something stalls Falco's outputs, is dropped", n)}
}

// wantsHostname holds what Falco calls this host against what stoop calls it.
func wantsHostname(e *Examination, f *falco) (string, []Finding) {
	if f.process == nil || f.env == nil {
		return "", nil
	}
	name := f.env["FALCO_HOSTNAME"]
	if name == "" {
		own, _ := os.Readlink(filepath.Join(e.proc, "self/ns/uts"))
		its, err := os.Readlink(filepath.Join(e.proc, strconv.Itoa(f.process.pid), "ns/uts"))
		if err != nil || own != its {
			return "", nil
		}
		if name, err = os.Hostname(); err != nil {
			return "", nil
		}
	}
	if name == e.Node || slices.Contains(e.Aliases, name) {
		return "hostname " + name, nil
	}
	return "", []Finding{missing(fmt.Sprintf("aliases: [%s] in stoop.yaml, or FALCO_HOSTNAME=%s for Falco", name, e.Node),
		"Falco calls this host %q, and stoop calls it %q: alerts of another host start nothing harmful", name, e.Node)}
}

// some are the first of many names.
func some(names []string) string {
	const most = 12
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

func counted(n int, what string) string {
	switch {
	case n == 1:
		return "1 " + what
	case strings.HasSuffix(what, "s"):
		return strconv.Itoa(n) + " " + what + "es"
	}
	return strconv.Itoa(n) + " " + what + "s"
}
