package doctor

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// falco is the Falco of this machine: its process, if one is to be seen, and its
// configuration as it puts it together.
type falco struct {
	process *process // nil: none runs that can be seen
	others  int      // further processes of that name
	tree    tree     // its files
	env     map[string]string
	file    string   // its configuration; "": none was found
	files   []string // what was read into it, in order
	config  *yaml.Node
	err     error
	broken  bool // err is of what the configuration says: Falco won't start with it

	unbuffered bool // -U
	version    falcoVersion
	from       string // where the version is known from
}

const (
	falcoFile = "/etc/falco/falco.yaml"
	// includesMost is how many files are read into a configuration.
	includesMost = 100
)

// findFalco reads the configuration of the Falco that runs, or that is installed.
func (e *Examination) findFalco(ctx context.Context) *falco {
	f := &falco{file: e.Falco}
	f.process, f.others = e.processes().falco()
	var options []string
	if p := f.process; p != nil && e.Falco == "" {
		base := filepath.Join(e.proc, strconv.Itoa(p.pid))
		own, _ := os.Readlink(filepath.Join(e.proc, "self/ns/mnt"))
		its, err := os.Readlink(filepath.Join(base, "ns/mnt"))
		switch {
		case err != nil:
			f.err = fmt.Errorf("the files of Falco (process %d) can't be seen: %w", p.pid, err)
		case its != own:
			f.tree = tree(filepath.Join(base, "root"))
		}
		f.env = environment(filepath.Join(base, "environ"))
		f.file = falcoFile
		options = f.arguments(p.args)
	}
	switch {
	case f.err != nil:
		return f
	case f.file == "":
		if _, err := os.Stat(falcoFile); errors.Is(err, fs.ErrNotExist) {
			f.version, f.from = e.falcoVersion(ctx, f)
			return f
		}
		f.file = falcoFile
	}
	f.version, f.from = e.falcoVersion(ctx, f)
	f.load(options)
	if f.from == "" && f.config != nil {
		f.version, f.from = f.ask(ctx, e.proc)
	}
	return f
}

// falco is the process of that name which is most likely to be the one: anybody's may
// be called so.
func (ps *processes) falco() (best *process, others int) {
	rank := func(p *process) int {
		switch {
		case len(p.opens) > 0:
			return 2
		case p.uid == 0:
			return 1
		}
		return 0
	}
	n := 0
	for _, p := range ps.all {
		if p.name != "falco" {
			continue
		}
		if n++; best == nil || rank(p) > rank(best) {
			best = p
		}
	}
	return best, max(n-1, 0)
}

// arguments takes in those of Falco's command line; the options -o are returned.
func (f *falco) arguments(args []string) (options []string) {
	for i := 1; i < len(args); i++ {
		value := func(names ...string) (string, bool) {
			for _, name := range names {
				switch {
				case args[i] == name && i+1 < len(args):
					i++
					return args[i], true
				case strings.HasPrefix(name, "--") && strings.HasPrefix(args[i], name+"="),
					!strings.HasPrefix(name, "--") && strings.HasPrefix(args[i], name) && len(args[i]) > len(name):
					return strings.TrimPrefix(strings.TrimPrefix(args[i], name), "="), true
				}
			}
			return "", false
		}
		if args[i] == "-U" || args[i] == "--unbuffered" {
			f.unbuffered = true
		} else if v, is := value("-c", "--config"); is {
			if f.file = v; !filepath.IsAbs(v) {
				f.err = fmt.Errorf("falco (process %d) was started with a path of its configuration that is relative to a folder nobody knows: %s", f.process.pid, v)
			}
		} else if v, is := value("-o", "--option"); is {
			options = append(options, v)
		}
	}
	return options
}

// environment is that of a process; nil where it can't be read.
func environment(path string) map[string]string {
	b := head(path, 1<<20)
	if b == nil {
		return nil
	}
	env := map[string]string{}
	for line := range bytes.SplitSeq(b, []byte{0}) {
		k, v, _ := strings.Cut(string(line), "=")
		env[k] = v
	}
	return env
}

// load reads the configuration as Falco does: the file, then what its config_files
// name, each key of theirs over those before, and what the command line says over
// all. From 0.41 on a list is appended to, unless the entry's strategy says
// otherwise. A file that config_files name and that is not there is passed over.
func (f *falco) load(options []string) {
	root, err := f.document(f.file)
	if err != nil {
		f.err = err
		return
	}
	f.config, f.files = root, []string{f.file}
	late := options[:0:0]
	for _, o := range options {
		if strings.HasPrefix(o, "config_files") {
			f.set(o)
		} else {
			late = append(late, o)
		}
	}
	for _, entry := range items(f.get("config_files")) {
		path, strategy := entry.Value, "append"
		if n := key(entry, "path"); n != nil {
			path = n.Value
			if s := key(entry, "strategy"); s != nil {
				strategy = s.Value
			}
		}
		if f.from != "" && f.version.before(0, 41, 0) {
			strategy = "override"
		}
		paths, err := f.tree.list(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			f.err = fmt.Errorf("read what config_files names: %w", err)
			return
		}
		for _, p := range paths {
			if len(f.files) >= includesMost {
				f.err = fmt.Errorf("config_files names more than %d files", includesMost)
				return
			}
			over, err := f.document(p)
			if err != nil {
				f.err = err
				return
			}
			f.files = append(f.files, p)
			if err := f.include(p, over, strategy); err != nil {
				f.err, f.broken = err, true
				return
			}
		}
	}
	for _, o := range late {
		f.set(o)
	}
}

// document reads a file that holds a mapping, or nothing.
func (f *falco) document(path string) (*yaml.Node, error) {
	src, err := f.tree.read(path)
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(src, &doc); err != nil {
		f.broken = true
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(doc.Content) == 0 {
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	if root.Kind != yaml.MappingNode {
		f.broken = true
		return nil, fmt.Errorf("%s is not a mapping", path)
	}
	if f.env != nil {
		expand(root, f.env)
	}
	return root, nil
}

// expand puts variables of the environment in place of ${NAME}; $${NAME} is ${NAME}.
func expand(n *yaml.Node, env map[string]string) {
	if n.Kind == yaml.ScalarNode && strings.Contains(n.Value, "${") {
		var b strings.Builder
		rest := n.Value
		for {
			before, after, found := strings.Cut(rest, "${")
			name, then, closed := strings.Cut(after, "}")
			if !found || !closed {
				b.WriteString(rest)
				break
			}
			if plain, escaped := strings.CutSuffix(before, "$"); escaped {
				b.WriteString(plain + "${" + name + "}")
			} else {
				b.WriteString(before + env[name])
			}
			rest = then
		}
		n.Value = b.String()
	}
	for _, c := range n.Content {
		expand(c, env)
	}
}

func (f *falco) include(path string, over *yaml.Node, strategy string) error {
	for i := 0; i+1 < len(over.Content); i += 2 {
		name, value := over.Content[i].Value, resolve(over.Content[i+1])
		if name == "config_files" {
			return fmt.Errorf("%s has config_files itself, which Falco takes in no file but its first", path)
		}
		was := key(f.config, name)
		switch {
		case was == nil:
			f.config.Content = append(f.config.Content, over.Content[i], value)
		case strategy == "add-only":
		case strategy != "override" && value.Kind == yaml.SequenceNode && was.Kind == yaml.SequenceNode:
			*was = yaml.Node{Kind: yaml.SequenceNode, Content: slices.Concat(was.Content, value.Content)}
		default:
			*was = *value
		}
	}
	return nil
}

// set is an option -o: key=value or key.sub=value, key[] for one more item.
func (f *falco) set(option string) {
	name, text, is := strings.Cut(option, "=")
	if !is {
		return
	}
	value := &yaml.Node{Kind: yaml.ScalarNode, Value: text}
	if strings.HasPrefix(text, "{") && strings.HasSuffix(text, "}") {
		var doc yaml.Node
		if yaml.Unmarshal([]byte(text), &doc) == nil && len(doc.Content) > 0 {
			value = doc.Content[0]
		}
	}
	at := f.config
	parts := strings.Split(name, ".")
	for i, part := range parts {
		part, index, list := strings.Cut(part, "[")
		next := key(at, part)
		if next == nil {
			if at.Kind != yaml.MappingNode {
				*at = yaml.Node{Kind: yaml.MappingNode}
			}
			next = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"}
			at.Content = append(at.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: part}, next)
		}
		if list {
			if next.Kind != yaml.SequenceNode {
				*next = yaml.Node{Kind: yaml.SequenceNode}
			}
			n, err := strconv.Atoi(strings.TrimSuffix(index, "]"))
			if err != nil || n < 0 || n >= len(next.Content) {
				n = len(next.Content)
				next.Content = append(next.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"})
			}
			next = next.Content[n]
		}
		if at = next; i == len(parts)-1 {
			*at = *value
		}
	}
}

// get is a value of the configuration, "file_output", "enabled"; nil: it is not there.
func (f *falco) get(path ...string) *yaml.Node {
	n := f.config
	for _, k := range path {
		if n = key(n, k); n == nil {
			return nil
		}
	}
	return n
}

// truth is a boolean as yaml-cpp reads it; what is none is what it is without.
func (f *falco) truth(without bool, path ...string) bool {
	n := f.get(path...)
	if n == nil {
		return without
	}
	switch strings.ToLower(n.Value) {
	case "true", "yes", "on", "y":
		return true
	case "false", "no", "off", "n":
		return false
	}
	return without
}

func (f *falco) text(path ...string) string {
	if n := f.get(path...); n != nil && n.Kind == yaml.ScalarNode {
		return n.Value
	}
	return ""
}

// key is a value of a mapping.
func key(n *yaml.Node, name string) *yaml.Node {
	if n = resolve(n); n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return resolve(n.Content[i+1])
		}
	}
	return nil
}

// items are those of a list; a single value counts as a list of one.
func items(n *yaml.Node) []*yaml.Node {
	switch {
	case n == nil, n.Kind == yaml.ScalarNode && n.Value == "":
		return nil
	case n.Kind != yaml.SequenceNode:
		return []*yaml.Node{n}
	}
	out := slices.Clone(n.Content)
	for i := range out {
		out[i] = resolve(out[i])
	}
	return out
}

func resolve(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// falcoVersion is a version of Falco's.
type falcoVersion [3]int

func parseFalco(s string) (falcoVersion, bool) {
	s, _, _ = strings.Cut(s, "-") // a package's revision, a build's commit
	s, _, _ = strings.Cut(s, "+")
	var v falcoVersion
	parts := strings.Split(s, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return v, false
	}
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 {
			return v, false
		}
		v[i] = n
	}
	return v, true
}

func (v falcoVersion) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

func (v falcoVersion) before(major, minor, patch int) bool {
	return cmp.Or(cmp.Compare(v[0], major), cmp.Compare(v[1], minor), cmp.Compare(v[2], patch)) < 0
}

// falcoVersion is Falco's version and where it is known from; "": from nowhere. No
// program is run for it.
func (e *Examination) falcoVersion(_ context.Context, f *falco) (falcoVersion, string) {
	if v, is := parseFalco(e.FalcoVersion); is {
		return v, "--falco-version"
	}
	if v, is := parseFalco(f.tree.installed("falco")); is {
		return v, "its package"
	}
	return falcoVersion{}, ""
}

// installed is the version of a Debian package, or "".
func (t tree) installed(names ...string) string {
	f, err := t.file("/var/lib/dpkg/status")
	if err != nil {
		return ""
	}
	defer f.Close()
	in, version, there := false, "", false
	lines := bufio.NewScanner(io.LimitReader(f, 64<<20))
	lines.Buffer(nil, fileMost)
	for lines.Scan() {
		line := lines.Text()
		if name, is := strings.CutPrefix(line, "Package: "); is {
			in, version, there = slices.Contains(names, name), "", false
		}
		if v, is := strings.CutPrefix(line, "Version: "); is && in {
			version = v
		}
		if s, is := strings.CutPrefix(line, "Status: "); is && in {
			there = strings.HasSuffix(s, " installed")
		}
		if line == "" && in && there && version != "" {
			return version
		}
	}
	if in && there {
		return version
	}
	return ""
}

// ask asks Falco's own web server, where it listens on this machine's network.
func (f *falco) ask(ctx context.Context, proc string) (falcoVersion, string) {
	if f.process == nil || !f.truth(false, "webserver", "enabled") || f.truth(false, "webserver", "ssl_enabled") {
		return falcoVersion{}, ""
	}
	own, _ := os.Readlink(filepath.Join(proc, "self/ns/net"))
	its, err := os.Readlink(filepath.Join(proc, strconv.Itoa(f.process.pid), "ns/net"))
	if err != nil || own != its {
		return falcoVersion{}, ""
	}
	host := f.text("webserver", "listen_address")
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	} else if !ip.IsLoopback() {
		return falcoVersion{}, ""
	}
	port := cmp.Or(f.text("webserver", "listen_port"), "8765")
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return falcoVersion{}, ""
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/versions", nil)
	if err != nil {
		return falcoVersion{}, ""
	}
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // no proxy
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return falcoVersion{}, ""
	}
	defer resp.Body.Close()
	var answer struct {
		Version string `json:"falco_version"`
	}
	if json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&answer) != nil {
		return falcoVersion{}, ""
	}
	if v, is := parseFalco(answer.Version); is {
		return v, "its web server"
	}
	return falcoVersion{}, ""
}
