package responders

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// groupTrouble begins what the child says when it could not enter its cgroup.
	groupTrouble = "cgroup: "
	// runFiles, runFileSize and runProcesses limit a program, besides memory.
	runFiles     = 1024
	runFileSize  = 1 << 30
	runProcesses = 256
)

// RunChild is the hidden command "stoop child run", what the responder run starts:
// it puts limits on itself, which a parent could only do when the program runs
// already, and becomes the program. It returns only if it could not, and has then
// said why on file descriptor 3.
func RunChild(args []string) error {
	// Neither that nor what stoop itself was given without its knowing goes on to
	// the program.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		unix.CloseOnExec(3) // before Linux 5.11
	}
	err := runChild(args)
	if _, werr := io.WriteString(os.NewFile(3, "parent"), err.Error()+"\n"); werr != nil {
		return errors.Join(err, werr)
	}
	return err
}

func runChild(args []string) error {
	var groups []string
	flags := flag.NewFlagSet("child run", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	memory := flags.Int64("memory", 0, "")
	flags.Func("cgroup", "", func(dir string) error { groups = append(groups, dir); return nil })
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 || *memory <= 0 {
		return errors.New("this command is stoop's own: it is started by the responder run")
	}
	for _, dir := range groups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf(groupTrouble+"%w", err)
		}
	}
	// The first to go when memory is short, before stoop. Where the kernel does
	// not let it say so, it says nothing.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	syscall.Umask(0o077)
	for _, l := range []struct {
		resource int
		most     uint64
	}{
		{unix.RLIMIT_CORE, 0},
		{unix.RLIMIT_NOFILE, runFiles},
		{unix.RLIMIT_FSIZE, runFileSize},
	} {
		most, err := within(l.resource, l.most)
		if err != nil {
			return err
		}
		if err := syscall.Setrlimit(l.resource, &most); err != nil {
			return fmt.Errorf("set limit %d to %d: %w", l.resource, most.Cur, err)
		}
	}
	data, err := within(unix.RLIMIT_DATA, uint64(*memory))
	if err != nil {
		return err
	}
	path, err := syscall.BytePtrFromString(flags.Arg(0))
	if err != nil {
		return err
	}
	arguments, err := syscall.SlicePtrFromStrings(flags.Args())
	if err != nil {
		return err
	}
	environment, err := syscall.SlicePtrFromStrings(os.Environ())
	if err != nil {
		return err
	}
	// That it dies with stoop was asked of the thread it was started with. What is
	// executed goes on with the thread that does so, which may be another one.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("have it end with stoop: %w", err)
	}
	// From here on this process may have more memory than it is allowed, and what
	// Go's runtime asks for ends it. So there is nothing in between.
	debug.SetGCPercent(-1)
	if _, _, errno := syscall.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_DATA, uintptr(unsafe.Pointer(&data)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("set limit %d to %d: %w", unix.RLIMIT_DATA, data.Cur, errno)
	}
	_, _, errno := syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&arguments[0])), uintptr(unsafe.Pointer(&environment[0])))
	return errno
}

// within is a limit as it is wanted, or as tight as it is already.
func within(resource int, most uint64) (syscall.Rlimit, error) {
	var now syscall.Rlimit
	if err := syscall.Getrlimit(resource, &now); err != nil {
		return now, fmt.Errorf("read limit %d: %w", resource, err)
	}
	most = min(most, now.Max)
	return syscall.Rlimit{Cur: most, Max: most}, nil
}
