package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// statusEvery is how often systemd is told what stoop is doing, if that changed.
const statusEvery = time.Second

// tellSystemd hands a line to systemd, where it started this process. Nothing
// depends on it.
func tellSystemd(state string) { _, _ = daemon.SdNotify(false, state) }

// statusLine is what `systemctl status` shows below the unit's state.
func statusLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return "STATUS=" + text
}

// notifySystemd tells systemd until ctx ends what stoop is doing, and, if the
// unit has a watchdog, that it lives: while live is nil and no longer, so that
// one whose parts wait for each other is killed and started again.
func notifySystemd(ctx context.Context, status func() string, live func() error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	show := time.NewTicker(statusEvery)
	defer show.Stop()
	var feed <-chan time.Time
	if within, err := daemon.SdWatchdogEnabled(false); err == nil && within > 0 {
		t := time.NewTicker(within / 3)
		defer t.Stop()
		feed = t.C
	}
	last := ""
	for {
		if now := status(); now != last {
			tellSystemd(statusLine(now))
			last = now
		}
		select {
		case <-ctx.Done():
			return
		case <-show.C:
		case <-feed:
			if live() == nil {
				tellSystemd(daemon.SdNotifyWatchdog)
			}
		}
	}
}

// status is what stoop is doing, in one line.
func (h *health) status(mode string) string {
	said := []string{"mode " + mode}
	if s := h.rules.Load(); s != nil {
		said = append(said, fmt.Sprintf("%d rules", len(s.Rules)))
	}
	if h.rulesBad.Load() {
		said = append(said, "the rules file is wrong and the last good rules are in force (stoop check)")
	}
	if g := h.engine.current.Load(); g != nil {
		if p := g.host.Paused(); p.Paused {
			said = append(said, "paused by "+p.Actor)
		}
		if p := g.host.PausedCluster(); p != nil && p.Paused {
			said = append(said, "every node of the cluster is paused: "+p.Actor)
		}
		if n := g.host.OpenBreakers(); n > 0 {
			said = append(said, fmt.Sprintf("%d breakers hold steps back", n))
		}
		if g.broker.InMemory() && h.engine.cfg.Dir != "" {
			said = append(said, "the disk refuses, alerts are kept in memory only")
		}
	}
	if alerts, _, oldest := h.intake.Backlog(); alerts > 0 && time.Since(oldest) > oldestWaiting {
		said = append(said, fmt.Sprintf("%d alerts wait to be stored, the oldest for %s", alerts, time.Since(oldest).Round(time.Second)))
	}
	return strings.Join(said, "; ")
}
