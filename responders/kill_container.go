package responders

import (
	"context"
	"strconv"
	"time"

	"stoop/node"
	"stoop/param"
)

func killContainer() Entry {
	return Entry{
		Name: "kill-container",
		Doc:  "Kills every process of the container that raised the alert at once, without the API server.",
		Notes: `The kernel kills the whole cgroup in one act (v2: cgroup.kill, since Linux 5.14), so
that a fork bomb does not get away. Elsewhere the container is frozen, each process gets
a SIGKILL, and it is thawed, until none is left. The step is done when there is none,
also where the container was frozen before.

The kubelet then starts the container again, from its image and as the pod's
restartPolicy says: chain delete-pod. Nobody gets to clean up, and nothing is left to
look at: capture-proc comes before it in a chain.

Processes that the container started on the host are not in its cgroup and run on.`,
		Params:   param.Describe(killContainerParams{}),
		Needs:    []node.Need{node.NeedHostPID, node.NeedCgroup, node.NeedKill},
		Kind:     Harm,
		Object:   ContainerObject,
		Deadline: 10 * time.Second,
		New:      func(Env) Responder { return containerKiller{} },
	}
}

type killContainerParams struct{}

type containerKiller struct{}

// Check refuses the container that stoop itself runs in.
func (containerKiller) Check(_ context.Context, r *Request) error { return spareOwn(r.Container) }

func (containerKiller) Act(ctx context.Context, r *Request) (Result, error) {
	var params killContainerParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	c := r.Container
	killed, err := c.Kill(ctx)
	if err != nil {
		return Result{}, overdue(refuseOwn(err))
	}
	if killed == 0 {
		return Result{Nothing: true, Reason: "no process of the container is left", Found: foundContainer(c)}, nil
	}
	result := Result{Reason: "every process of the container was killed: " + strconv.Itoa(killed), Found: foundContainer(c)}
	result.Found["processes"] = strconv.Itoa(killed)
	if c.PodUID != "" {
		result.Reason += "; the kubelet starts the container again unless its pod is deleted too (delete-pod) or its restartPolicy forbids it"
	}
	return result, nil
}
