package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// What the pods of the chart run beside stoop run. Their image has no shell.

// prepareCommand is what an init container runs, as root.
func (p *program) prepareCommand() *cobra.Command {
	var owner string
	cmd := &cobra.Command{
		Use:    "prepare FOLDER...",
		Short:  "Give folders, and all in them, to the user that stoop runs as",
		Hidden: true,
		Args:   cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, folders []string) error {
			u, g, _ := strings.Cut(owner, ":")
			uid, uerr := strconv.ParseUint(u, 10, 31)
			gid, gerr := strconv.ParseUint(g, 10, 31)
			if uerr != nil || gerr != nil {
				return usage("--owner is %q: write UID:GID, two numbers", owner)
			}
			for _, folder := range folders {
				if err := giveAway(folder, int(uid), int(gid)); err != nil {
					return fmt.Errorf("give %s to %s: %w", folder, owner, err)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&owner, "owner", "", "`UID:GID`")
	return cmd
}

// giveAway makes all in a folder that is another's the user's. It follows no
// symbolic link, and leaves nothing by one: who had the folder before may have
// been taken over.
func giveAway(folder string, uid, gid int) error {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid && int(st.Gid) == gid {
			return nil
		}
		if path == "." {
			// The kubelet makes it for all to read. It is still ours to change.
			if err := root.Chmod(path, 0o700); err != nil && !errors.Is(err, fs.ErrPermission) {
				return err
			}
		}
		return root.Lchown(path, uid, gid)
	})
}

// probeCommand is what the kubelet asks. A probe of its own over HTTP would need
// stoop to listen on the network.
func (p *program) probeCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:       "probe live|ready",
		Short:     "Ask the stoop that runs here whether it is alive, or ready",
		Hidden:    true,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"live", "ready"},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(config)
			if err != nil {
				return wrong(err)
			}
			return probe(cmd.Context(), c.HTTP.Listen, map[string]string{"live": "/healthz", "ready": "/readyz"}[args[0]])
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE`, for http.listen")
	return cmd
}

func probe(ctx context.Context, listen, path string) error {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return errors.New("http.listen is not set: there is nobody to ask")
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(said)))
	}
	return nil
}
