package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"

	"stoop/alert"
	"stoop/broker"
	"stoop/param"
	"stoop/responders"
	"stoop/router"
	"stoop/rules"
)

// documents are what people read, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	var paths []string
	for _, pattern := range []string{"../*.md", "../docs/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	if len(paths) < 10 {
		t.Fatalf("only %d documents: %v", len(paths), paths)
	}
	all := map[string]string{}
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		all[p] = string(data)
	}
	return all
}

var (
	fence  = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")
	inline = regexp.MustCompile("`([^`\n]+)`")
)

// blocks are a document's fenced blocks of one language.
func blocks(text, language string) []string {
	var out []string
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		if m[1] == language {
			out = append(out, m[2])
		}
	}
	return out
}

// Every stoop command that is shown exists and takes what is shown, every make
// target and every package of a go command is there.
func TestDocsCommands(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for path, text := range documents(t) {
		for _, block := range blocks(text, "sh") {
			for _, argv := range commands(block) {
				switch name := argv[0]; {
				case name == "stoop" || strings.HasSuffix(name, "/stoop"):
					checked++
					if err := takes(argv[1:]); err != nil {
						t.Errorf("%s: %s: %v", path, strings.Join(argv, " "), err)
					}
				case name == "make":
					checked++
					checkTargets(t, path, makefile, argv[1:])
				case name == "go":
					for _, a := range argv {
						if _, err := os.Stat(filepath.Join("..", a)); strings.HasPrefix(a, "./") && err != nil {
							t.Errorf("%s: %s: %v", path, strings.Join(argv, " "), err)
						}
					}
				}
			}
		}
		for _, m := range inline.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			switch argv := strings.Fields(m[1]); {
			case len(argv) > 1 && (argv[0] == "stoop" || argv[0] == "./stoop"):
				checked++
				if err := names(argv[1:]); err != nil {
					t.Errorf("%s: `%s`: %v", path, m[1], err)
				}
			case len(argv) > 1 && argv[0] == "make":
				checked++
				checkTargets(t, path, makefile, argv[1:])
			}
		}
	}
	if checked < 50 {
		t.Errorf("only %d commands were found", checked)
	}
}

// The check itself tells right from wrong.
func TestDocsCommandsAreChecked(t *testing.T) {
	script := "FOO=1 stoop nonsense a # stoop run\ncat <<END | stoop tail 'a b' >out && x \\\n  | ./stoop run --stdin <in 2>err &\nstoop no\nEND\nstoop undo \"$(cat id)\""
	var got []string
	for _, argv := range commands(script) {
		got = append(got, strings.Join(argv, "|"))
	}
	want := []string{"stoop|nonsense|a", "cat", "stoop|tail|a b", "x", "./stoop|run|--stdin", "stoop|undo|$(cat id)"}
	if !slices.Equal(got, want) {
		t.Errorf("the commands are %q, want %q", got, want)
	}
	for _, wrong := range []string{"nonsense", "run --nonsense", "run extra", "undo", "tail everything", "history --since x"} {
		if takes(strings.Fields(wrong)) == nil {
			t.Errorf("stoop %s is taken", wrong)
		}
	}
	for _, wrong := range []string{"nonsense", "run --nonsense"} {
		if names(strings.Fields(wrong)) == nil {
			t.Errorf("stoop %s is taken", wrong)
		}
	}
}

func commandTree() *cobra.Command {
	root := (&program{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard}).root()
	root.InitDefaultHelpCmd()
	return root
}

// takes is why the program would not take a command line, or nil. Nothing is
// run.
func takes(args []string) error {
	cmd, rest, err := commandTree().Find(args)
	if err != nil {
		return err
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}

// names is takes for a mention in a sentence, whose arguments may be left out
// or stand for others.
func names(args []string) error {
	cmd, _, err := commandTree().Find(args[:1])
	if err == nil && !cmd.HasParent() {
		err = cmd.ValidateArgs(args[:1])
	}
	for _, a := range args[1:] {
		flag, _, _ := strings.Cut(strings.TrimLeft(a, "-"), "=")
		known := cmd.Flags().Lookup(flag) != nil || len(flag) == 1 && cmd.Flags().ShorthandLookup(flag) != nil
		if err == nil && len(a) > 1 && a[0] == '-' && !known {
			err = fmt.Errorf("unknown flag: %s", a)
		}
	}
	return err
}

func checkTargets(t *testing.T, path string, makefile []byte, targets []string) {
	t.Helper()
	for _, target := range targets {
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(target) + `:`).Match(makefile) {
			t.Errorf("%s: make %s: there is no such target", path, target)
		}
	}
}

// commands are the simple commands of a shell script, as far as documentation
// has them: quotes, comments, continued lines, pipes, redirections, here
// documents, variables before a command.
func commands(script string) [][]string {
	var all [][]string
	var argv []string
	end := func() {
		if len(argv) > 0 {
			all = append(all, argv)
		}
		argv = nil
	}
	script = strings.ReplaceAll(script, "\\\n", " ")
	until := ""
	for line := range strings.Lines(script) {
		line = strings.TrimSuffix(line, "\n")
		if until != "" {
			if line == until {
				until = ""
			}
			continue
		}
		skip := false // the next word is a redirection's
		for len(line) > 0 {
			switch {
			case line[0] == '#':
				line = ""
			case unicode.IsSpace(rune(line[0])):
				line = line[1:]
			case strings.HasPrefix(line, "<<"):
				until, line, _ = strings.Cut(line[2:], " ")
			case line[0] == '<' || line[0] == '>':
				skip, line = true, line[1:]
			case strings.ContainsRune("|&;", rune(line[0])):
				end()
				line = line[1:]
			default:
				var w string
				w, line = word(line)
				switch {
				case skip:
					skip = false
				case descriptor.MatchString(w) && line != "" && strings.ContainsRune("<>", rune(line[0])): // 2>file
				case len(argv) == 0 && assignment.MatchString(w):
				default:
					argv = append(argv, w)
				}
			}
		}
		if !strings.HasSuffix(line, "|") {
			end()
		}
	}
	return all
}

var (
	assignment = regexp.MustCompile(`^[A-Z_]+=`)
	descriptor = regexp.MustCompile(`^[0-9]$`)
)

// word takes the first word off a line, without its quotes.
func word(line string) (w, rest string) {
	var quote byte
	depth := 0 // of $( )
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && depth == 0 && (c == '\'' || c == '"'):
			quote = c
		case c == '(':
			depth++
			w += string(c)
		case c == ')' && depth > 0:
			depth--
			w += string(c)
		case quote == 0 && depth == 0 && strings.IndexByte(" \t|&;<>", c) >= 0:
			return w, line[i:]
		default:
			w += string(c)
		}
	}
	return w, ""
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

// Every link to a file of the project leads to one, and its # to a heading.
func TestDocsLinks(t *testing.T) {
	checked := 0
	for path, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			checked++
			to, heading, _ := strings.Cut(m[1], "#")
			target := path
			if to != "" {
				target = filepath.Join(filepath.Dir(path), to)
			}
			data, err := os.ReadFile(target)
			if err != nil {
				t.Errorf("%s: the link %s: %v", path, m[1], err)
				continue
			}
			if heading != "" && !slices.Contains(headings(string(data)), heading) {
				t.Errorf("%s: the link %s: there is no such heading", path, m[1])
			}
		}
	}
	if checked < 10 {
		t.Errorf("only %d links were found", checked)
	}
}

// headings are a document's, as they are linked to.
func headings(text string) []string {
	var out []string
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, m[1])
		out = append(out, slug)
	}
	return out
}

// The files that are shown are right: rules, configurations, and what is to be
// set in Falco is at least YAML. Their first line says which they are.
func TestDocsFiles(t *testing.T) {
	shown := map[string]int{}
	for path, text := range documents(t) {
		for _, block := range blocks(text, "yaml") {
			first, _, _ := strings.Cut(block, "\n")
			shown[first]++
			switch first {
			case "# rules.yaml":
				set, err := rules.Parse(path, []byte(block), catalogOf(responders.All()))
				if err != nil {
					t.Error(err)
				} else if len(set.Warnings) > 0 {
					t.Error(rules.Problems(set.Warnings).Error())
				}
			case "# stoop.yaml":
				if _, err := rules.Settings(path, []byte(block), param.Describe(defaults())); err != nil {
					t.Error(err)
				}
			case "# falco.yaml":
				var v map[string]any
				if err := yaml.Unmarshal([]byte(block), &v); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
		}
	}
	for _, kind := range []string{"# rules.yaml", "# stoop.yaml", "# falco.yaml"} {
		if shown[kind] == 0 {
			t.Errorf("no example begins with %q", kind)
		}
	}
}

// docs/subjects.md has the subjects, headers, statuses and keys that there are.
func TestDocsSubjects(t *testing.T) {
	const path = "../docs/subjects.md"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, want := range []string{
		apiPause, apiResume, apiUndo, apiApprove, apiDeny, apiWaiting, apiHistory, apiPublish, apiWatch, headerMore, broker.HeaderError, router.SubjectTail,
		broker.HeaderID, broker.HeaderReceived, broker.HeaderOrigin, alert.UnparsedSubject, broker.SocketName,
		string(broker.OriginFIFO), string(broker.OriginStdin), string(broker.OriginFile), string(broker.OriginHTTP),
		string(broker.OriginLocal), string(broker.OriginStoop), string(broker.OriginOpenHTTP),
		string(broker.Done), string(broker.Nothing), string(broker.Audited), string(broker.Suppressed), string(broker.Refused),
		string(broker.Retrying), string(broker.Failed), string(broker.Expired), string(broker.Undone),
		string(broker.AwaitingApproval), string(broker.Denied),
	} {
		if !regexp.MustCompile("`" + regexp.QuoteMeta(want) + "[`:]").MatchString(text) {
			t.Errorf("%s does not tell of `%s`", path, want)
		}
	}
	shapes := []any{&broker.Outcome{}, &router.Verdict{}}
	examples := blocks(text, "json")
	if len(examples) != len(shapes) {
		t.Fatalf("%s has %d examples of messages, want %d", path, len(examples), len(shapes))
	}
	for i, shape := range shapes {
		dec := json.NewDecoder(bytes.NewReader([]byte(examples[i])))
		dec.DisallowUnknownFields()
		if err := dec.Decode(shape); err != nil {
			t.Errorf("%s: an example of %T: %v", path, shape, err)
		}
	}
}

// What README says of speed is what docs/performance.md says.
func TestReadmeQuotesTheMeasuredFigures(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	measured, err := os.ReadFile("../docs/performance.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(readme), "\n## How fast\n")
	if !ok {
		t.Fatal("README has no section on speed")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	rows := 0
	for line := range strings.Lines(section) {
		if strings.HasPrefix(line, "| ") {
			rows++
			if !strings.Contains(string(measured), line) {
				t.Errorf("docs/performance.md does not have this row: %s", line)
			}
		}
	}
	if rows < 5 {
		t.Errorf("only %d rows", rows)
	}
}
