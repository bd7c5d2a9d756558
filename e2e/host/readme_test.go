package host

import (
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"stoop/e2e/harness"
)

// What README says to do on a host, line by line, with a stand-in for Falco that
// raises an alert when it is started.
func TestReadme(t *testing.T) {
	needs(t)
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## On a host with Falco\n")
	if !ok {
		t.Fatal("README has no section about a host")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var blocks []string
	for _, b := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(section, -1) {
		blocks = append(blocks, b[1])
	}
	if len(blocks) != 3 || blocks[0] != "make packages\n" || blocks[2] != "stoop doctor\nstoop tail\n" {
		t.Fatalf("README says to do %q", blocks)
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("README names the package for amd64")
	}

	m := boot(t)
	made := packageOf(t, m, "deb", newer) // as make packages makes it
	m.run("mkdir", "-p", "/root/dist", "/etc/falco/config.d")
	m.run("mv", made, "/root/dist/"+filepath.Base(made))
	m.write("/srv/falco", `#!/bin/sh
sleep 1
printf '{"hostname":"%s","output":"A shell was spawned","output_fields":{"container.id":"0123456789ab","k8s.ns.name":"shop","k8s.pod.name":"web"},"priority":"Notice","rule":"Terminal shell in container","source":"syscall","time":"%s"}\n' "$(hostname)" "$(date -u +%FT%T.%NZ)" > /run/stoop/falco.pipe
exec sleep infinity
`)
	m.write("/etc/systemd/system/falco-modern-bpf.service", "[Service]\nExecStart=/bin/sh /srv/falco\n[Install]\nAlias=falco.service\nWantedBy=multi-user.target\n")
	m.run("systemctl", "enable", "falco-modern-bpf.service")

	began := time.Now()
	m.run("sh", "-ec", "cd /root\n"+blocks[1])
	m.state("stoop.service", "active")
	m.state("falco.service", "active")
	// Its own status is that it found something to say: here there is no Falco.
	if out, _ := m.try("stoop", "doctor"); !strings.Contains(out, "/run/stoop/falco.pipe") {
		t.Errorf("stoop doctor says nothing of the FIFO: %s", out)
	}
	harness.Eventually(t, 20*time.Second, 200*time.Millisecond, func() (bool, string) {
		out, _ := m.try("stoop", "history")
		return strings.Contains(out, "shop/web"), "the alert's outcome; there is " + out
	})
	m.run("sh", "-c", "timeout 60 stoop tail > /srv/tail 2>&1 &")
	harness.Eventually(t, 50*time.Second, 2*time.Second, func() (bool, string) {
		shown, _ := os.ReadFile(m.path("/srv/tail"))
		if out := string(shown); strings.Contains(out, "Terminal shell in container") && strings.Contains(out, "audit") {
			return true, ""
		}
		m.run("systemctl", "restart", "falco") // tail shows what comes after it
		return false, "stoop tail to show the alert; it shows " + string(shown)
	})
	t.Logf("from the package to the first alert: %s", time.Since(began).Round(time.Second))
}
