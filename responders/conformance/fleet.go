package conformance

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"stoop/responders"
)

// FleetCase is many stoops that share one budget.
type FleetCase struct {
	Config    func(node int) *rest.Config
	Namespace string
	Nodes     int
	Limit     responders.Rate
	For       time.Duration // several windows
}

// Fleets has every node ask for credit by itself: the first as fast as it can, some
// often, most now and then. It fails where a window had more than the limit, or
// where a node got nothing.
func Fleets(t *testing.T, c FleetCase) {
	type grant struct {
		at   time.Time
		node int
	}
	var mu sync.Mutex
	var grants []grant
	var asked, failed int
	ctx, cancel := context.WithTimeout(t.Context(), c.For)
	defer cancel()
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var asking, running sync.WaitGroup
	for i := range c.Nodes {
		config := c.Config(i)
		config.QPS = -1
		kube, err := responders.NewKube(config)
		if err != nil {
			t.Fatal(err)
		}
		f, err := responders.NewFleet(responders.FleetConfig{
			Kube: kube, Namespace: c.Namespace, Node: fmt.Sprint("node-", i), Limit: c.Limit, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { f.Run(background) })
		// The first two are greedy; of the others a few have an alert every
		// tenth of the window, most one about twice in it.
		every := c.Limit.Per / 2
		switch {
		case i < 2:
			every = time.Millisecond
		case i < 8:
			every = c.Limit.Per / 10
		}
		asking.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				err := f.Take(ctx, fmt.Sprintf("%d/%d", i, n), "", true)
				at := time.Now()
				mu.Lock()
				asked++
				switch {
				case err == nil:
					grants = append(grants, grant{at, i})
				case ctx.Err() == nil && !responders.HeldBack(err):
					failed++
				}
				mu.Unlock()
				select {
				case <-time.After(every/2 + rand.N(every)):
				case <-ctx.Done():
				}
			}
		})
	}
	asking.Wait()
	stop()
	running.Wait()

	slices.SortFunc(grants, func(x, y grant) int { return x.at.Compare(y.at) })
	most, first := 0, 0
	got := make([]int, c.Nodes)
	for i, g := range grants {
		got[g.node]++
		for ; g.at.Sub(grants[first].at) >= c.Limit.Per; first++ {
		}
		most = max(most, i+1-first)
	}
	t.Logf("%d asked, %d were granted, %d could not ask; at most %d in a window, the limit is %d; by node %v", asked, len(grants), failed, most, c.Limit.N, got)
	if most > c.Limit.N {
		t.Errorf("%d in a window, the limit is %d", most, c.Limit.N)
	}
	if windows := int(c.For / c.Limit.Per); len(grants) < c.Limit.N*windows/3 {
		t.Errorf("%d granted in %d windows of %d: hardly anything", len(grants), windows, c.Limit.N)
	}
	for node, n := range got {
		if n == 0 {
			t.Errorf("node %d got nothing", node)
		}
	}
	if asked > 0 && failed*20 > asked {
		t.Errorf("%d of %d could not ask", failed, asked)
	}
}
