package responders

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"stoop/alert"
	"stoop/node/nodetest"
)

const execContainer = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// raised is an alert of a container at a time.
func raised(t *testing.T, at time.Time, fields map[string]any) *alert.Alert {
	t.Helper()
	all := map[string]any{"container.id": execContainer[:12], "proc.cmdline": "ps aux", "proc.pid": 4711}
	for name, v := range fields {
		all[name] = v
		if v == nil {
			delete(all, name)
		}
	}
	b, err := json.Marshal(map[string]any{"rule": "R", "priority": "Critical", "time": at.UTC().Format(time.RFC3339Nano), "output_fields": all})
	if err != nil {
		t.Fatal(err)
	}
	a, err := alert.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Alerts of a command that stoop had executed are its own: while it was, in that
// container, of exactly that command.
func TestOwnExecution(t *testing.T) {
	own := &OwnProcesses{host: func() bool { return true }}
	before := time.Now().Add(-time.Second)
	ended := own.Executing(execContainer, []string{"env", "A=b", "/usr/bin/ps", "aux"}, []string{"/usr/bin/ps", "aux"})
	during := time.Now()
	for name, c := range map[string]struct {
		at     time.Time
		fields map[string]any
		own    bool
	}{
		"it":                        {during, nil, true},
		"env, which becomes it":     {during, map[string]any{"proc.cmdline": "env A=b /usr/bin/ps aux"}, true},
		"its child":                 {during, map[string]any{"proc.cmdline": "sh -c x", "proc.pcmdline": "ps aux"}, true},
		"its grandchild":            {during, map[string]any{"proc.cmdline": "x", "proc.pcmdline": "sh -c x", "proc.acmdline[2]": "ps aux"}, true},
		"begun meanwhile":           {during, map[string]any{"proc.pid.ts": during.UnixNano()}, true},
		"the whole id":              {during, map[string]any{"container.full_id": execContainer}, true},
		"before it":                 {before, nil, false},
		"a process from before":     {during, map[string]any{"proc.pid.ts": before.UnixNano()}, false},
		"more arguments":            {during, map[string]any{"proc.cmdline": "ps aux; evil"}, false},
		"fewer arguments":           {during, map[string]any{"proc.cmdline": "ps"}, false},
		"other letters":             {during, map[string]any{"proc.cmdline": "PS aux"}, false},
		"the path in the line":      {during, map[string]any{"proc.cmdline": "/usr/bin/ps aux"}, false},
		"no command line":           {during, map[string]any{"proc.cmdline": nil}, false},
		"another container":         {during, map[string]any{"container.id": "fedcba987654"}, false},
		"the host":                  {during, map[string]any{"container.id": "host"}, false},
		"no container":              {during, map[string]any{"container.id": nil}, false},
		"only its exepath is alike": {during, map[string]any{"proc.cmdline": "evil", "proc.exepath": "/usr/bin/ps"}, false},
	} {
		if got := own.Owns(raised(t, c.at, c.fields)); got != c.own {
			t.Errorf("%s: own %t, want %t", name, got, c.own)
		}
	}
	ended()
	if !own.Owns(raised(t, during, nil)) {
		t.Error("an alert that comes after the end, of a time before it, is not own")
	}
	if own.Owns(raised(t, time.Now().Add(ownSlack+10*time.Millisecond), nil)) {
		t.Error("the same command after the end is own")
	}
	var none *OwnProcesses
	none.Executing(execContainer, []string{"ps"})()
}

// Who is in the container and starts the same command meanwhile is known by its
// parent, which is in the container too.
func TestOwnExecutionImitated(t *testing.T) {
	cgroup := nodetest.CgroupV2(t)
	container := filepath.Base(cgroup)
	shell, _ := nodetest.Counter(t, cgroup)
	inside := shell.Process.Pid
	own := &OwnProcesses{host: func() bool { return true }}
	defer own.Executing(container, []string{"ps", "aux"})()
	for name, c := range map[string]struct {
		fields map[string]any
		own    bool
	}{
		"by the runtime":                         {map[string]any{"proc.ppid": os.Getpid()}, true},
		"by a parent that is gone":               {map[string]any{"proc.ppid": 1 << 22}, true},
		"by a shell of the container":            {map[string]any{"proc.ppid": inside}, false},
		"by a shell, as apid[1]":                 {map[string]any{"proc.apid[1]": inside}, false},
		"a child of an imitator":                 {map[string]any{"proc.cmdline": "evil", "proc.pcmdline": "ps aux", "proc.apid[2]": inside}, false},
		"a child of it, whose parent is outside": {map[string]any{"proc.cmdline": "x", "proc.pcmdline": "ps aux", "proc.ppid": inside, "proc.apid[2]": os.Getpid()}, true},
	} {
		c.fields["container.id"] = container[:12]
		if got := own.Owns(raised(t, time.Now(), c.fields)); got != c.own {
			t.Errorf("%s: own %t, want %t", name, got, c.own)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for want, command := range map[string][]string{
		"ps aux":              {"ps", "aux"},
		"ps":                  {"/bin/ps"},
		"sh -c a  b":          {"sh", "-c", "a  b"},
		"a-name-of-twent x y": {"/opt/a-name-of-twenty", "x", "y"},
	} {
		if got := commandLine(command); got != want {
			t.Errorf("%q: %q, want %q", command, got, want)
		}
	}
}

// What is remembered has a bound.
func TestOwnExecutionsAreForgotten(t *testing.T) {
	own := &OwnProcesses{}
	for i := range ownMost + 100 {
		own.Executing(strings.Repeat(strconv.Itoa(i%10), 64), []string{"ps"})()
	}
	if n := len(own.execs); n > ownMost+1 {
		t.Errorf("%d are remembered, at most %d should be", n, ownMost)
	}
}
