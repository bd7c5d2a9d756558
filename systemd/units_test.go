// Package systemd is the units with which a host runs stoop beside Falco. The
// code in it only tests them.
package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

// analyze is systemd-analyze, which every host with systemd has.
func analyze(t *testing.T, dir, path string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err) // in CI nothing is skipped
		}
		t.Skip("this machine has no systemd-analyze, with which the units are checked: ", err)
	}
	cmd := exec.Command("systemd-analyze", args...)
	cmd.Dir = dir // it takes a unit's name for that of a file
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+path)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// installed lays the units out as a host has them, with one drop-in or none,
// and a stand-in for the program.
func installed(t *testing.T, dropIn string) string {
	t.Helper()
	dir := t.TempDir()
	put := func(name, text string) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "/usr/bin/stoop ", "/bin/sh ")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"stoop.socket", "stoop.service"} {
		put(name, read(t, name))
	}
	if dropIn != "" {
		put(dropIn, read(t, dropIn))
	}
	put("falco.service", "[Service]\nExecStart=/bin/sh\n")
	put("falco.service.d/stoop.conf", read(t, "falco.service.d/stoop.conf"))
	return dir
}

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

const node = "stoop.service.d/node.conf"

func TestUnitsAreRight(t *testing.T) {
	for _, dropIn := range []string{"", node} {
		dir := installed(t, dropIn)
		var units []string
		for _, u := range []string{"stoop.socket", "stoop.service", "falco.service"} {
			units = append(units, filepath.Join(dir, u))
		}
		out, err := analyze(t, dir, dir+":", append([]string{"verify", "--man=no"}, units...)...)
		// It also says what is wrong with units of the machine's own.
		for line := range strings.Lines(out) {
			if err != nil || strings.Contains(line, dir) || strings.Contains(line, "stoop") {
				t.Errorf("with %q: %v: %s", dropIn, err, line)
			}
		}
	}
}

var exposure = regexp.MustCompile(`Overall exposure level for stoop\.service: ([0-9.]+)`)

// What a stoop that was taken over can do to the host. The second figure is
// stated in docs/host.md.
func TestUnitsAreHardened(t *testing.T) {
	doc := read(t, "../docs/host.md")
	for dropIn, most := range map[string]float64{"": 1.5, node: 4.4} {
		dir := installed(t, dropIn)
		out, err := analyze(t, dir, dir, "security", "--offline=true", "stoop.service")
		m := exposure.FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("systemd-analyze: %v: %s", err, out)
		}
		if got, err := strconv.ParseFloat(m[1], 64); err != nil || got > most {
			t.Errorf("with %q the exposure is %s, want at most %.1f:\n%s", dropIn, m[1], most, out)
		}
		if !strings.Contains(doc, m[1]) {
			t.Errorf("docs/host.md does not say that the exposure with %q is %s", dropIn, m[1])
		}
	}
}

// Without any one of these the FIFO is closed some day, and Falco's alerts are
// lost in silence. Each stands below a comment that says why.
func TestUnitsKeepTheFIFO(t *testing.T) {
	for name, lines := range map[string][]string{
		"stoop.socket":               {"TriggerLimitIntervalSec=0", "PipeSize=1M", "SocketMode=0600", "FlushPending=no"},
		"stoop.service":              {"StartLimitIntervalSec=0", "Restart=always", "NonBlocking=yes"},
		"falco.service.d/stoop.conf": {"Wants=stoop.socket", "After=stoop.socket"},
	} {
		text := read(t, name)
		for _, line := range lines {
			at := strings.Index(text, "\n"+line+"\n")
			if at < 0 {
				t.Errorf("%s lacks %s", name, line)
				continue
			}
			before := text[:at]
			if last := before[strings.LastIndex(before, "\n")+1:]; !strings.HasPrefix(last, "#") && name != "falco.service.d/stoop.conf" {
				t.Errorf("%s: %s has no reason above it, but %q", name, line, last)
			}
		}
		// systemd removes a runtime directory with the service, and the FIFO in it.
		if strings.Contains(text, "\nRuntimeDirectory=") {
			t.Errorf("%s has a RuntimeDirectory", name)
		}
	}
}

// Falco's part names the FIFO that the socket unit makes, and asks for what
// docs/falco.md says is needed.
func TestFalcosPart(t *testing.T) {
	var falco struct {
		JSON bool `yaml:"json_output"`
		File struct {
			Enabled   bool   `yaml:"enabled"`
			KeepAlive bool   `yaml:"keep_alive"`
			Filename  string `yaml:"filename"`
		} `yaml:"file_output"`
		Append []struct {
			Match  map[string]string `yaml:"match"`
			Fields []string          `yaml:"extra_fields"`
		} `yaml:"append_output"`
		Buffered *bool `yaml:"buffered_outputs"`
	}
	if err := yaml.Unmarshal([]byte(read(t, "falco.yaml")), &falco); err != nil {
		t.Fatal(err)
	}
	f := falco.File
	if !falco.JSON || !f.Enabled || !f.KeepAlive || falco.Buffered == nil || *falco.Buffered {
		t.Errorf("falco.yaml says %+v", falco)
	}
	if !strings.Contains(read(t, "stoop.socket"), "\nListenFIFO="+f.Filename+"\n") {
		t.Errorf("the socket unit does not make %s", f.Filename)
	}
	var fields []string
	for _, a := range falco.Append {
		fields = append(fields, a.Fields...)
	}
	for _, want := range []string{"proc.pid", "proc.pid.ts", "k8s.pod.uid", "container.full_id", "evt.hostname"} {
		if !strings.Contains(" "+strings.Join(fields, " ")+" ", " "+want+" ") {
			t.Errorf("falco.yaml does not ask for %s", want)
		}
	}
}
