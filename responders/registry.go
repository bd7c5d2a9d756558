package responders

import (
	rbacv1 "k8s.io/api/rbac/v1"
)

// All is every responder there is. A new one is a file, its test, and a line
// here; the rules' check, docs/responders.md and the chart's role follow.
func All() []Entry {
	return []Entry{
		deletePod(),
		evictPod(),
		quarantinePod(),
		scaleWorkload(),
		restartWorkload(),
		isolatePod(),
		ciliumIsolate(),
		calicoIsolate(),
		clusterIsolate(),
		labelPod(),
		annotatePod(),
		labelNode(),
		cordonNode(),
		taintNode(),
		drainNode(),
		execInPod(),
		debugPod(),
		deleteResource(),
		revokeAccess(),
		captureFiles(),
		capturePackets(),
		checkpointContainer(),
		freezeContainer(),
		killProcess(),
		killContainer(),
		cutNetwork(),
		blockAddress(),
		captureProc(),
		captureLogs(),
		captureManifest(),
		captureEvents(),
		quarantineFile(),
		lockUser(),
		run(),
		call(),
		webhookCall(),
		event(),
		slack(),
		webhook(),
		file(),
	}
}

// BaseRBAC is what stoop needs in a cluster before any responder does: to know
// the pods of its own node. RBAC can't say "of one node"; the requests do.
func BaseRBAC() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "list", "watch"}},
	}
}

// OwnRBAC is what stoop needs in its own namespace before any responder does.
func OwnRBAC() []rbacv1.PolicyRule { return fleetRBAC() }
