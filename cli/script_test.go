package cli

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	// The children of a stoop in a script are this program, by its path.
	if len(os.Args) > 1 && os.Args[1] == "child" {
		os.Exit(Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	testscript.Main(m, map[string]func(){
		"stoop": func() { os.Exit(Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

// The scripts of testdata/script are sessions with the real program. Besides
// the usual commands they have:
//
//	await COMMAND...        runs it until it succeeds, for at most 20 s
//	await-text FILE TEXT    waits until the file holds the text
//	await-http URL REGEXP   waits until the answer matches
//	no-text URL TEXT        fails if the answer holds the text
//	exits CODE COMMAND...   runs it and wants this exit code
//	alerts FILE...          replaces @now@, @work@ and @addr@ (also $ADDR: a free port) in the files
//	lines N FILE            fails unless the file has N lines
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		// A script that hangs (on a FIFO that nobody reads) is ended, and says
		// where, long before the test is.
		Deadline: time.Now().Add(3 * time.Minute),
		Setup: func(e *testscript.Env) error {
			addr, err := freeAddr()
			if err != nil {
				return err
			}
			e.Setenv("ADDR", addr)
			e.Defer(func() { _ = exec.Command("umount", "-l", e.Getenv("WORK")+"/disk").Run() })
			e.Defer(func() { // a script that failed in the middle
				end := exec.Command("sh", "suspect.sh", "end")
				end.Dir = e.Getenv("WORK")
				_ = end.Run()
			})
			e.Setenv("NODE_NAME", "node-1")
			e.Setenv("COLUMNS", "80")
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "tmpfs" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			// In CI what needs root is never skipped.
			return os.Getuid() == 0 || os.Getenv("CI") != "", nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await":      await,
			"await-text": awaitText,
			"exits":      exits,
			"alerts":     alerts,
			"await-http": awaitHTTP,
			"lines":      lines,
			"no-text":    noText,
		},
	})
}

const patience = 20 * time.Second

// freeAddr is an address on loopback that nobody listens on: the tests may run
// more than once at a time on one machine.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}

func command(ts *testscript.TestScript, args []string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = ts.Getenv("WORK")
	for _, k := range []string{"PATH", "HOME", "NODE_NAME", "COLUMNS", "TMPDIR"} {
		cmd.Env = append(cmd.Env, k+"="+ts.Getenv(k))
	}
	path, err := lookPath(ts, args[0])
	ts.Check(err)
	cmd.Path = path
	return cmd
}

// lookPath finds a program on the script's PATH, not on the test's.
func lookPath(ts *testscript.TestScript, name string) (string, error) {
	for _, dir := range strings.Split(ts.Getenv("PATH"), ":") {
		if p := dir + "/" + name; strings.HasPrefix(p, "/") {
			if info, err := os.Stat(p); err == nil && info.Mode()&0o111 != 0 {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("%s is not on the PATH", name)
}

func await(ts *testscript.TestScript, neg bool, args []string) {
	var out []byte
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var err error
		if out, err = command(ts, args).CombinedOutput(); (err == nil) != neg {
			return
		}
	}
	ts.Fatalf("%s: not within %s: %s", strings.Join(args, " "), patience, out)
}

func awaitText(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await-text FILE TEXT")
	}
	var data []byte
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		data, _ = os.ReadFile(ts.MkAbs(args[0]))
		if bytes.Contains(data, []byte(args[1])) {
			return
		}
	}
	ts.Fatalf("%s does not hold %q within %s: %s", args[0], args[1], patience, data)
}

func awaitHTTP(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await-http URL REGEXP")
	}
	want := regexp.MustCompile(args[1])
	var body []byte
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get(args[0])
		if err != nil {
			body = []byte(err.Error())
			continue
		}
		body, _ = io.ReadAll(resp.Body)
		resp.Body.Close()
		if want.Match(body) {
			return
		}
	}
	ts.Fatalf("%s does not answer %s within %s: %s", args[0], args[1], patience, body)
}

func noText(ts *testscript.TestScript, _ bool, args []string) {
	resp, err := http.Get(args[0])
	ts.Check(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	ts.Check(err)
	if len(body) == 0 || bytes.Contains(body, []byte(args[1])) {
		ts.Fatalf("%s answers nothing, or holds %q", args[0], args[1])
	}
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	var stdout, stderr bytes.Buffer
	cmd := command(ts, args[1:])
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run()
	fmt.Fprintf(ts.Stdout(), "%s", stdout.Bytes())
	fmt.Fprintf(ts.Stderr(), "%s", stderr.Bytes())
	if got := fmt.Sprint(cmd.ProcessState.ExitCode()); got != args[0] {
		ts.Fatalf("%s: exit code %s, want %s: %s%s", strings.Join(args[1:], " "), got, args[0], stdout.Bytes(), stderr.Bytes())
	}
}

func alerts(ts *testscript.TestScript, _ bool, args []string) {
	for _, f := range args {
		now := time.Now().UTC().Format("2006-01-02T15:04:05.000000000Z")
		text := strings.NewReplacer("@now@", now, "@work@", ts.Getenv("WORK"), "@addr@", ts.Getenv("ADDR")).Replace(ts.ReadFile(f))
		ts.Check(os.WriteFile(ts.MkAbs(f), []byte(text), 0o600))
	}
}

func lines(ts *testscript.TestScript, _ bool, args []string) {
	if got := fmt.Sprint(strings.Count(ts.ReadFile(args[1]), "\n")); got != args[0] {
		ts.Fatalf("%s has %s lines, want %s:\n%s", args[1], got, args[0], ts.ReadFile(args[1]))
	}
}
