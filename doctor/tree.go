package doctor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tree is a file system as a process sees it; "" is this one's own. What is below the
// root of another can be made by whoever runs there: links are followed within it,
// and nothing but regular files is opened.
type tree string

// fileMost is how large a file may be that is read.
const fileMost = 1 << 20

// find opens a path without opening what is there.
func (t tree) find(path string) (*os.File, error) {
	if t == "" {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "look at", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	root, err := unix.Open(string(t), unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "look into", Path: string(t), Err: err}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, strings.TrimLeft(path, "/"), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "look at", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// reopen opens what find found.
func reopen(f *os.File, flags int) (*os.File, error) {
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// file opens a regular file.
func (t tree) file(path string) (*os.File, error) {
	found, err := t.find(path)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	info, err := found.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	return reopen(found, unix.O_RDONLY)
}

// read reads a regular file.
func (t tree) read(path string) ([]byte, error) {
	f, err := t.file(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, fileMost+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > fileMost:
		return nil, fmt.Errorf("%s is larger than %d bytes", path, fileMost)
	}
	return b, nil
}

// list are the paths of the regular files of a folder, sorted; of a file its own.
func (t tree) list(path string) ([]string, error) {
	found, err := t.find(path)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	info, err := found.Stat()
	switch {
	case err != nil:
		return nil, err
	case info.Mode().IsRegular():
		return []string{path}, nil
	case !info.IsDir():
		return nil, nil
	}
	dir, err := reopen(found, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	const most = 1000
	names, err := dir.Readdirnames(most)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var out []string
	for _, name := range names {
		p := filepath.Join(path, name)
		f, err := t.find(p)
		if err != nil {
			continue
		}
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			out = append(out, p)
		}
		f.Close()
	}
	slices.Sort(out)
	return out, nil
}

// identify says which file is at a path.
func (t tree) identify(path string) (fileID, error) {
	f, err := t.find(path)
	if err != nil {
		return fileID{}, err
	}
	defer f.Close()
	return identify("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}
