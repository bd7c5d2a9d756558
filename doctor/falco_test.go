package doctor

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// good is a configuration that has all that it should.
const good = `
json_output: true
file_output: {enabled: true, keep_alive: true, filename: "%s"}
append_output:
  - suggested_output: true
  - match: {source: syscall}
    extra_fields: [proc.pid, proc.pid.ts, k8s.pod.uid, container.full_id, evt.hostname]
plugins: [{name: container, library_path: libcontainer.so}]
load_plugins: [container]
`

func TestFalcoIsFine(t *testing.T) {
	c := config(t)
	c.Source.Pipe, c.FalcoVersion = fifo(t), "0.44.1"
	c.Falco = write(t, filepath.Join(t.TempDir(), "falco.yaml"), fmt.Sprintf(good, c.Source.Pipe))
	c.Steps = steps("kill-process")
	found := examine(t, c, "falco")
	has(t, found, OK, c.Falco, "json_output", "file_output to "+c.Source.Pipe, "append_output adds container.full_id", "unbuffered")
	none(t, found, Warning, Missing, Unknown)
}

// Each line that is not as it should be, and what is said of it.
func TestFalco(t *testing.T) {
	for _, tt := range []struct {
		name, more, version string
		steps               []string
		status              Status
		words               []string
	}{
		{"plain text", "json_output: false", "", nil, Missing, []string{"json_output is off", "json_output: true"}},
		{"no fields", "json_include_output_fields_property: false", "", nil, Missing, []string{"hold no fields"}},
		{"no tags", "json_include_tags_property: no", "", nil, Warning, []string{"hold no tags"}},
		{"no output", "file_output: {enabled: false}", "", nil, Missing, []string{"file_output is off", "keep_alive: true, filename: "}},
		{"an output of a name alone", "file_output: {enabled: true}", "", nil, Missing, []string{"relative"}},
		{"another file", "file_output: {enabled: true, filename: /dev/null}", "", nil, Missing, []string{"writes to /dev/null, and stoop reads "}},
		{"no keep_alive", "file_output: {enabled: true, filename: @pipe@}", "", nil, Warning, []string{"opens and closes the FIFO"}},
		{"a program", "file_output: {enabled: false}\nprogram_output: {enabled: true, keep_alive: true, program: stoop publish}", "", nil, Warning, []string{"stoop publish", "lost in silence"}},
		{"no append_output", "append_output: []", "", nil, Warning, []string{"proc.pid, proc.pid.ts, k8s.pod.uid, container.full_id", "suggested_output: true"}},
		{"nothing suggested", "append_output: [{extra_fields: [proc.pid]}]", "", nil, Warning, []string{"what Falco suggests"}},
		{"fields of one rule", "append_output: [{suggested_output: true}, {match: {rule: Shell}, extra_fields: [proc.pid]}]", "", []string{"kill-process"}, Missing, []string{"proc.pid", "kill-process can't find the process"}},
		{"fields of some tags", "append_output: [{match: {tags: [a]}, extra_fields: [proc.pid]}]", "", []string{"kill-process"}, Missing, []string{"proc.pid"}},
		{"fields of another source", "append_output: [{match: {source: k8s_audit}, extra_fields: [proc.pid]}]", "", []string{"kill-process"}, Missing, []string{"proc.pid"}},
		{"fields in the output", "append_output: [{extra_output: 'pid=%proc.pid ts=%proc.pid.ts'}]", "", []string{"kill-process"}, Warning, []string{"does not ask for k8s.pod.uid, container.full_id:"}},
		{"fields with a format", "append_output: [{extra_fields: [{proc.pid: '%proc.pid'}, proc.pid.ts]}]", "", []string{"kill-process"}, Warning, []string{"does not ask for k8s.pod.uid, container.full_id:"}},
		{"what else a responder needs", "", "", []string{"lock-user"}, Warning, []string{"user.name, user.uid", "lock-user"}},
		{"buffered", "buffered_outputs: true", "", nil, Warning, []string{"buffered_outputs is on", "4096"}},
		{"buffered all the same", "buffered_outputs: false", "0.43.1", nil, Warning, []string{"Falco 0.43.1 buffers despite", "-U"}},
		{"of no known version", "", "-", nil, Unknown, []string{"--falco-version"}},
		{"too old for append_output", "", "0.38.2", nil, Warning, []string{"no append_output", "0.39"}},
		{"a short queue", "outputs_queue: {capacity: 100}", "", nil, Warning, []string{"capacity is 100", "dropped"}},
		{"no container plugin", "load_plugins: []", "", nil, Missing, []string{"container.full_id, k8s.pod.uid", "refuses its rules"}},
		{"a priority", "priority: Error", "", nil, OK, []string{"no alerts below priority error"}},
		{"no YAML", "a: [", "", nil, Missing, []string{"does not start"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := config(t)
			c.Source.Pipe, c.FalcoVersion, c.Steps = fifo(t), tt.version, steps(tt.steps...)
			if tt.version == "" {
				c.FalcoVersion = "0.44.1"
			}
			dir := t.TempDir()
			c.Falco = write(t, filepath.Join(dir, "falco.yaml"), fmt.Sprintf(good, c.Source.Pipe)+
				"config_files: [{path: "+dir+"/config.d, strategy: override}]\n")
			write(t, filepath.Join(dir, "config.d/over.yaml"), strings.ReplaceAll(tt.more, "@pipe@", c.Source.Pipe))
			has(t, examine(t, c, "falco"), tt.status, tt.words...)
		})
	}
}

// The files are put together as Falco does it.
func TestFalcoIsPutTogether(t *testing.T) {
	dir := t.TempDir()
	main := write(t, filepath.Join(dir, "falco.yaml"), `
json_output: false
buffered_outputs: true
rules_files: [a]
append_output: [{extra_fields: [one]}]
config_files:
  - `+dir+`/config.d
  - `+dir+`/none
  - {path: `+dir+`/over.yaml, strategy: override}
  - {path: `+dir+`/add.yaml, strategy: add-only}
`)
	write(t, filepath.Join(dir, "config.d/b.yaml"), "json_output: ${JSON}\nappend_output: [{extra_fields: [two]}]\nname: $${X}-${NONE}.\n")
	write(t, filepath.Join(dir, "config.d/a.yaml"), "json_output: maybe\nempty:\n")
	write(t, filepath.Join(dir, "config.d/c.txt"), "# nothing\n")
	if err := os.MkdirAll(filepath.Join(dir, "config.d/deeper.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "over.yaml"), "rules_files: [b]\n")
	write(t, filepath.Join(dir, "add.yaml"), "rules_files: [c]\nadded: yes\n")

	f := &falco{file: main, env: map[string]string{"JSON": "true"}}
	f.load([]string{"buffered_outputs=false", "webserver.enabled=true", "append_output[]={extra_fields: [three]}", "config_files[]=" + write(t, filepath.Join(dir, "last.yaml"), "late: here")})
	if f.err != nil {
		t.Fatal(f.err)
	}
	a := f.appended()
	for what, is := range map[string]bool{
		"a drop-in is over the file":            f.truth(false, "json_output"),
		"a variable is put in":                  f.text("json_output") == "true",
		"an escaped one is not":                 f.text("name") == "${X}-.",
		"lists grow":                            a.fields["one"] && a.fields["two"],
		"override replaces lists":               len(items(f.get("rules_files"))) == 1 && items(f.get("rules_files"))[0].Value == "b",
		"add-only adds":                         f.truth(false, "added"),
		"-o is over all":                        !f.truth(true, "buffered_outputs"),
		"-o makes what is not there":            f.truth(false, "webserver", "enabled"),
		"-o adds an item":                       a.fields["three"],
		"-o config_files is read":               f.text("late") == "here",
		"what is no mapping's key is not there": f.get("json_output", "x") == nil,
	} {
		if !is {
			t.Errorf("not so: %s", what)
		}
	}
	if want := 7; len(f.files) != want {
		t.Errorf("read %v, want %d files", f.files, want)
	}

	old := &falco{file: main, version: falcoVersion{0, 40, 0}, from: "a test"}
	old.load(nil)
	if a := old.appended(); a.fields["one"] || !a.fields["two"] {
		t.Errorf("Falco 0.40 has %v, want the drop-in's list alone", a.fields)
	}

	write(t, filepath.Join(dir, "config.d/z.yaml"), "config_files: [x]")
	again := &falco{file: main}
	if again.load(nil); again.err == nil || !again.broken {
		t.Errorf("config_files in a drop-in: %v", again.err)
	}
}

// Nothing but a regular file is read, and no huge one.
func TestFalcoFilesAreOthers(t *testing.T) {
	c := config(t)
	c.Falco = fifo(t)
	has(t, examine(t, c, "falco"), Unknown, "no regular file")
	big := write(t, filepath.Join(t.TempDir(), "falco.yaml"), "")
	if err := os.Truncate(big, fileMost+1); err != nil {
		t.Fatal(err)
	}
	c.Falco = big
	has(t, examine(t, c, "falco"), Unknown, "larger than")
	c.Falco = filepath.Join(t.TempDir(), "none")
	has(t, examine(t, c, "falco"), Unknown, "no such file")
}

// The links of another's root lead nowhere but into it.
func TestTreeOfAnother(t *testing.T) {
	root := t.TempDir()
	outside := write(t, filepath.Join(t.TempDir(), "secret"), "outside")
	write(t, filepath.Join(root, "etc/real.yaml"), "inside")
	for _, l := range []struct{ to, at string }{
		{outside, "etc/falco.yaml"}, {"/etc/real.yaml", "etc/absolute.yaml"}, {"../../../../etc/real.yaml", "etc/up.yaml"}, {"/proc/self/root" + outside, "etc/magic.yaml"},
	} {
		if err := os.Symlink(l.to, filepath.Join(root, l.at)); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{"/etc/absolute.yaml": "inside", "/etc/up.yaml": "inside", "/etc/falco.yaml": "", "/etc/magic.yaml": ""} {
		got, err := tree(root).read(path)
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%s holds %q, %v, want %q", path, got, err, want)
		}
	}
	paths, err := tree(root).list("/etc")
	if err != nil || len(paths) != 3 || paths[2] != "/etc/up.yaml" {
		t.Errorf("the folder holds %v, %v", paths, err)
	}
}

// Falco's own process says which configuration it took, with which options and by
// which name it calls this host.
func TestFalcoRuns(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the files and variables of a process can be read by root alone")
	}
	c := config(t)
	c.Source.Pipe = fifo(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	answers := `{"falco_version": "0.44.1"}`
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/versions" {
			fmt.Fprint(w, answers)
		}
	})}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	file := write(t, filepath.Join(t.TempDir(), "mine.yaml"), fmt.Sprintf(good, "${DOCTOR_TEST_PATH}")+"webserver: {enabled: true, listen_port: "+port+"}\nbuffered_outputs: true\n")
	t.Setenv("FALCO_HOSTNAME", "ip-10-0-0-1")
	pid, _ := open(t, c.Source.Pipe, unix.O_RDWR, "falco", "-c", file, "-o", "buffered_outputs=false", "--option=priority=notice")
	found := examine(t, c, "falco")
	has(t, found, OK, file, fmt.Sprintf("falco (process %d)", pid), "file_output to "+c.Source.Pipe, "below priority notice", "unbuffered")
	has(t, found, Missing, `"ip-10-0-0-1"`, `"node-1"`, "aliases: [ip-10-0-0-1]")
	has(t, examine(t, c, "versions"), OK, "Falco 0.44.1 (its web server)")
	c.Aliases = []string{"ip-10-0-0-1"}
	none(t, examine(t, c, "falco"), Warning, Missing, Unknown)

	answers = `{"falco_version": "\u001b[31m0.44"}`
	has(t, examine(t, c, "falco"), Unknown, "Falco's version is not known")
}

func TestFalcoVersions(t *testing.T) {
	for s, want := range map[string]string{"0.44.1": "0.44.1", "0.43": "0.43.0", "0.44.1-1": "0.44.1", "0.45.0-dev+abc": "0.45.0", "": "", "x": "", "1": "", "0.1.2.3": "", "0.-1.2": ""} {
		v, is := parseFalco(s)
		if is != (want != "") || is && v.String() != want {
			t.Errorf("%q is version %s, %t, want %q", s, v, is, want)
		}
	}
	if v := (falcoVersion{0, 43, 1}); !v.before(0, 43, 2) || v.before(0, 43, 1) || v.before(0, 9, 9) || !v.before(1, 0, 0) {
		t.Error("versions compare wrongly")
	}
	root := t.TempDir()
	write(t, filepath.Join(root, "var/lib/dpkg/status"), "Package: falco-doc\nStatus: install ok installed\nVersion: 1.0\n\nPackage: falco\nStatus: deinstall ok config-files\nVersion: 0.1\n\nPackage: falco\nStatus: install ok installed\nVersion: 0.42.0-1\n")
	if got := tree(root).installed("falco"); got != "0.42.0-1" {
		t.Errorf("the package has version %q", got)
	}
}
