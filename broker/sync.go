package broker

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// serverSync is how often the server syncs its files itself.
const serverSync = 2 * time.Minute

// stamped is a file as it was when it was synced.
type stamped struct {
	size int64
	at   time.Time
}

// syncLoop syncs what was written to the streams to disk, every now and then,
// until ctx is done.
//
// The server could do that, but holds the lock of a stream's newest block over
// each fsync(2) (nats-server 2.15, fileStore.syncBlocks): once a second, every
// alert that came just then waited, on a busy disk for more than 100 ms. To sync
// a file nobody has to be kept from writing to it.
func (b *Broker) syncLoop(ctx context.Context, dir string, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	synced := map[string]stamped{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		present := map[string]stamped{}
		folders := map[string]bool{}
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || ctx.Err() != nil || !strings.HasSuffix(path, ".blk") {
				return nil // it went meanwhile, or is none of the streams' blocks
			}
			info, err := d.Info()
			if err != nil {
				return nil
			}
			now := stamped{info.Size(), info.ModTime()}
			was, known := synced[path]
			if !known {
				folders[filepath.Dir(path)] = true
			}
			present[path] = now
			if was != now {
				b.syncPath(path)
			}
			return nil
		})
		for folder := range folders {
			b.syncPath(folder)
		}
		synced = present
	}
}

// syncPath syncs a file or a folder.
func (b *Broker) syncPath(path string) {
	f, err := os.Open(path)
	if err != nil {
		return // it went meanwhile
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		b.log.Error("sync the store to disk", "file", path, "error", err)
		b.fail(err)
	}
}
