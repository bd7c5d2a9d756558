package rules

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Watcher reads a file of rules again whenever it changes. Set its fields, then
// call [Watcher.Run].
//
// It watches folders, not the file: an editor puts a new file in the place of
// the old one, and a ConfigMap swaps a symbolic link two folders away. What no
// event tells (some network file systems have none) a look at the content now
// and then does.
type Watcher struct {
	Path    string
	Catalog Catalog
	Hash    string // of the rules in force, [Set.Hash]

	// OnChange takes rules that are good and not those in force. From then on
	// they are.
	OnChange func(*Set)
	// OnError takes what keeps the file from being used: [Problems], or that
	// it can't be read or watched. It is called once, not at every look, and
	// the rules in force stay.
	OnError func(error)
	// OnRecovered, if set, is called when after an error the file holds again
	// the rules that are in force.
	OnRecovered func()

	Poll   time.Duration // between two looks at the content; 0: 10 s
	Settle time.Duration // a file is read once it did not change for so long; 0: 100 ms

	reported string // what was last told to OnError
}

// Run watches until the context ends, calling back from this goroutine. Its
// first look is at once, so that no change since the file was loaded is lost.
func (w *Watcher) Run(ctx context.Context) {
	poll, settle := w.Poll, w.Settle
	if poll <= 0 {
		poll = 10 * time.Second
	}
	if settle <= 0 {
		settle = 100 * time.Millisecond
	}
	var events <-chan fsnotify.Event
	var faults <-chan error
	fs, err := fsnotify.NewWatcher()
	if err != nil {
		w.OnError(fmt.Errorf("watching the rules: %w; their file is looked at every %s instead", err, poll))
	} else {
		defer fs.Close()
		events, faults = fs.Events, fs.Errors
	}
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		names := w.follow(fs)
		w.look(ctx, settle)
		for changed := false; !changed; {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				changed = true
			case e, ok := <-events:
				if !ok {
					events = nil
				}
				changed = ok && names[filepath.Base(e.Name)]
			case _, ok := <-faults:
				// Events were lost: look.
				if !ok {
					faults = nil
				}
				changed = ok
			}
		}
	}
}

// follow watches the folders of the path and of each symbolic link that it
// leads through, and returns the names to mind in them.
func (w *Watcher) follow(fs *fsnotify.Watcher) map[string]bool {
	names := map[string]bool{"..data": true}
	path := w.Path
	const most = 10 // links; a circle has no end
	for range most {
		names[filepath.Base(path)] = true
		if fs != nil {
			// A folder that is not there is looked for at every poll.
			_ = fs.Add(filepath.Dir(path))
		}
		to, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = to
	}
	return names
}

// look reads the file, and takes its rules if they are good and new.
func (w *Watcher) look(ctx context.Context, settle time.Duration) {
	src, err := w.settled(ctx, settle)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		w.report(err)
		return
	}
	if hashOf(src) == w.Hash {
		if w.reported != "" && w.OnRecovered != nil {
			w.OnRecovered()
		}
		w.reported = ""
		return
	}
	set, err := Parse(w.Path, src, w.Catalog)
	if err != nil {
		w.report(err)
		return
	}
	w.Hash, w.reported = set.Hash, ""
	w.OnChange(set)
}

// settled is the content of the file once two reads in a row saw the same: an
// editor that writes in place leaves half a file, which may well be a file of
// fewer rules.
func (w *Watcher) settled(ctx context.Context, settle time.Duration) ([]byte, error) {
	const most = 50 // reads; a file that changes all the time is tried again later
	before, err := read(w.Path)
	if err == nil && hashOf(before) == w.Hash {
		return before, nil
	}
	for range most {
		timer := time.NewTimer(settle)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		case <-timer.C:
		}
		now, nowErr := read(w.Path)
		if nowErr != nil && err != nil {
			return nil, nowErr
		}
		if nowErr == nil && err == nil && bytes.Equal(before, now) {
			return now, nil
		}
		before, err = now, nowErr
	}
	return nil, errors.Join(fmt.Errorf("reading the rules: %s does not stop changing", w.Path), err)
}

func (w *Watcher) report(err error) {
	if err.Error() == w.reported {
		return
	}
	w.reported = err.Error()
	w.OnError(err)
}
