package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Format is the format of the data folder that this stoop writes. It is raised by
// one when a stoop that knows the old one could misread or spoil the new: also
// when the NATS server's files change so.
const Format = 1

// formatFile is the file in the data folder that says which format it has.
const formatFile = "format"

// ErrNewer says that a newer stoop has written the data folder, in a format that
// this one does not know. Nothing in it was touched.
var ErrNewer = errors.New("a newer stoop has written this data folder")

// checkFormat says whether this stoop can read a data folder. One without a mark
// is empty, or of a stoop that wrote none, which is format 1.
func checkFormat(dir string) error {
	path := filepath.Join(dir, formatFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the data folder's format: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || n < 1 {
		return fmt.Errorf("%s says nothing that can be the data folder's format; stoop writes %d there: if no newer stoop has been at work on it, remove the file", path, Format)
	}
	if n > Format {
		return fmt.Errorf("%w: %s has format %d, and this stoop knows %d; nothing in it was touched: install the newer stoop again, or name another folder (data, or --data)", ErrNewer, dir, n, Format)
	}
	return nil
}

// markFormat writes the format into a data folder that is this stoop's to write.
func markFormat(dir string) error {
	path := filepath.Join(dir, formatFile)
	mark := []byte(strconv.Itoa(Format) + "\n")
	if have, err := os.ReadFile(path); err == nil && string(have) == string(mark) {
		return nil
	}
	err := os.WriteFile(path+".new", mark, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	// A full disk disarms nothing, and no mark is as good as that of format 1.
	if Format == 1 && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mark the data folder: %w", err)
	}
	return nil
}
