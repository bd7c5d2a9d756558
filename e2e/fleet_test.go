package e2e

import (
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"stoop/e2e/kube"
	"stoop/responders"
	"stoop/responders/conformance"
)

// Fifty stoops share one budget on one API server: what they do in all never passes
// the limit, and none of them starves, with exactly the permissions that the budget
// is said to need.
func TestFiftyFleets(t *testing.T) {
	account := shared.cluster.Account(t, responders.OwnRBAC())
	conformance.Fleets(t, conformance.FleetCase{
		Config:    func(int) *rest.Config { return rest.CopyConfig(account.Config) },
		Namespace: shared.cluster.Namespace(t, kube.Name("fleet")), Nodes: 50,
		Limit: responders.Rate{N: 60, Per: 5 * time.Second}, For: 25 * time.Second,
	})
}
