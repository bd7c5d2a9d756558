// Package cli is stoop's commands, and the wiring of the program that answers
// alerts. It knows all the other packages, and none of them knows it.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"stoop/param"
)

// Exit codes.
const (
	exitFine  = 0
	exitWrong = 1 // the thing asked about is wrong, or what was asked can't be done
	exitUsage = 2
)

// program is one run of the command line.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
}

// usageError is a command line that can't be understood.
type usageError struct{ error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// shownError is an error that is a finished message: rules with their lines and
// carets.
type shownError struct{ error }

func wrong(err error) error {
	if err == nil {
		return nil
	}
	return shownError{err}
}

// errSilent ends a command with exit code 1 when all has been said.
var errSilent = errors.New("")

// Main runs the command line and returns the exit code.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	p := &program{stdin: stdin, stdout: stdout, stderr: stderr}
	ctx, stop := signals()
	defer stop()
	root := p.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var u usageError
	switch {
	case err == nil:
		return exitFine
	case errors.Is(err, errSilent):
		return exitWrong
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "stoop: %v\n", err)
		return exitUsage
	case errors.As(err, &shownError{}):
		fmt.Fprintln(stderr, err)
		return exitWrong
	}
	fmt.Fprintf(stderr, "stoop: %v\n", err)
	return exitWrong
}

// signals is a context that the first SIGTERM or Ctrl-C ends; the second ends
// the process.
func signals() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGTERM, os.Interrupt)
	go func() {
		if _, ok := <-ch; !ok {
			return
		}
		cancel()
		if s, ok := <-ch; ok {
			code := 1
			if n, ok := s.(syscall.Signal); ok {
				code = 128 + int(n)
			}
			os.Exit(code)
		}
	}()
	return ctx, func() { signal.Stop(ch); close(ch); cancel() }
}

func (p *program) root() *cobra.Command {
	var asked bool
	root := &cobra.Command{
		Use:   "stoop",
		Short: "Answer Falco's alerts in milliseconds",
		Long: `stoop reads Falco's alerts and answers them by your rules: within milliseconds
it freezes the container, cuts its network or kills the process; it keeps the
evidence, deletes or isolates the pod, tells people. A person may have to
approve a step first, and can take one back. It begins in audit mode, in
which it only says what it would do.`,
		Example:      "  stoop check --rules rules.yaml\n  stoop run --rules rules.yaml --pipe /run/stoop/falco.pipe\n  stoop tail",
		SilenceUsage: true, SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asked {
				return p.printVersion()
			}
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%v (%s --help says more)", err, cmd.CommandPath())
	})
	root.CompletionOptions.HiddenDefaultCmd = true
	// Not cobra's: its templates take methods by name, and the linker would have to
	// keep every exported one, 12 MB of them.
	root.Flags().BoolVar(&asked, "version", false, "print the version")
	root.AddCommand(
		p.runCommand(), p.checkCommand(), p.testCommand(), p.holdCommand(), p.publishCommand(), p.tailCommand(),
		p.historyCommand(), p.undoCommand(), p.approveCommand(), p.denyCommand(), p.evidenceCommand(), p.pauseCommand(), p.resumeCommand(), p.respondersCommand(), p.rbacCommand(), p.doctorCommand(), p.versionCommand(), p.convertCommand(),
		p.childCommand(), p.prepareCommand(), p.probeCommand(),
	)
	for _, c := range root.Commands() {
		if check := c.Args; check != nil {
			c.Args = func(cmd *cobra.Command, args []string) error {
				if err := check(cmd, args); err != nil {
					return usage("%v (%s --help says more)", err, cmd.CommandPath())
				}
				return nil
			}
		}
	}
	return root
}

func unknownCommand(cmd *cobra.Command, name string) error {
	hint := ""
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	if near := param.Nearest(name, names); near != "" {
		hint = fmt.Sprintf("; did you mean %s?", near)
	}
	return usage("unknown command %q%s (stoop --help lists them)", name, hint)
}

// logger writes to stderr: text for people, JSON for programs.
func (p *program) logger(c Log) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.Level)) // checked when it was read
	opts := &slog.HandlerOptions{Level: level}
	text := c.Format == "text"
	if c.Format == "auto" || c.Format == "" {
		text = isTerminal(p.stderr)
	}
	if text {
		return slog.New(slog.NewTextHandler(p.stderr, opts))
	}
	return slog.New(slog.NewJSONHandler(p.stderr, opts))
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// width is how wide the terminal is that w goes to, or what COLUMNS says; 0:
// neither.
func width(w any) int {
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil {
			return n
		}
	}
	n, err := strconv.Atoi(os.Getenv("COLUMNS"))
	if err != nil || n < 20 {
		return 0
	}
	return n
}

// version is what the program was built from.
func version() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v == "devel" {
			return v + "-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return v
}
