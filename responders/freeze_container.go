package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"stoop/node"
	"stoop/param"
)

func freezeContainer() Entry {
	return Entry{
		Name: "freeze-container",
		Doc:  "Stops every process of the container that raised the alert, within milliseconds and without the API server.",
		Notes: `The kernel's cgroup freezer does it (v2: cgroup.freeze, v1: freezer.state), and the step
is done when the kernel says that all have stopped: no process of the container runs
another instruction, and none gets to see that it was stopped. Memory, open files and
connections stay as they are, for whoever looks into them.

A process in a call to the kernel that can't be broken off (a read of a file system that
does not answer; with CAP_SYS_ADMIN a container makes one) stops when the call comes
back. The step waits a second for it; the others stay stopped, and found.stopping is
true.

It stays frozen until somebody undoes it. The end of the ttl thaws it only with
onExpire: release, since a ttl that lets the attacker go on is no containment. When
stoop is started again, it makes sure that the container is frozen still.

A liveness probe fails meanwhile, and the kubelet may then end the container and start
it anew, unfrozen: what has to be done before that belongs in the same chain. A delete
of the pod waits out its whole grace period, since nothing frozen answers SIGTERM.

Processes that the container started on the host, or that others started in its
namespaces, are not in its cgroup and run on.`,
		Params:   param.Describe(freezeContainerDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedCgroup},
		Kind:     Harm,
		Object:   ContainerObject,
		Deadline: 5 * time.Second,
		New:      func(env Env) Responder { return &containerFreezer{env.Local} },
	}
}

type freezeContainerParams struct {
	TTL      param.Duration `param:"ttl" doc:"After how long onExpire applies; 0 is never."`
	OnExpire string         `param:"onExpire" oneof:"keep release" doc:"What the end of the ttl does: keep leaves the container frozen, release thaws it."`
}

func freezeContainerDefaults() freezeContainerParams {
	return freezeContainerParams{OnExpire: "keep"}
}

// Validate refuses a release that would never come.
func (p freezeContainerParams) Validate() error {
	if p.OnExpire != "keep" && p.OnExpire != "release" {
		return fmt.Errorf("onExpire: %s is neither keep nor release", param.Cut(p.OnExpire))
	}
	if p.OnExpire == "release" && p.TTL == 0 {
		return errors.New("onExpire: release has no meaning without a ttl")
	}
	return nil
}

type containerFreezer struct{ local *node.Node }

// Check refuses the container that stoop itself runs in.
func (f *containerFreezer) Check(_ context.Context, r *Request) error { return spareOwn(r.Container) }

// spareOwn refuses stoop's own container.
func spareOwn(c *node.Container) error {
	own, err := c.Own()
	if err == nil && own {
		err = node.ErrOwn
	}
	return refuseOwn(err)
}

func refuseOwn(err error) error {
	if errors.Is(err, node.ErrOwn) {
		return Refuse("%v", err)
	}
	return err
}

// overdue is the error of what the kernel did not do in time: a process is in a
// call that nothing breaks off. It is not tried again, for the rest of the chain
// would wait for as long as the suspect likes.
func overdue(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return errors.New(err.Error())
	}
	return err
}

// frozenContainer is the undo record: all that Undo and Keep believe.
type frozenContainer struct {
	Container string `json:"container"`
	Path      string `json:"path"` // of the cgroup
	Inode     uint64 `json:"inode"`
	Boot      string `json:"boot"`
}

func (f *containerFreezer) Act(ctx context.Context, r *Request) (Result, error) {
	params := freezeContainerDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	c := r.Container
	result := Result{Found: foundContainer(c)}
	if params.OnExpire == "release" {
		result.TTL = time.Duration(params.TTL)
	}
	undo, err := json.Marshal(frozenContainer{c.ID, c.Path, c.Inode, f.local.BootID()})
	if err != nil {
		return Result{}, err
	}
	// Stored before: whatever happens next, what is frozen is not forgotten.
	frozen, err := c.Frozen()
	if err != nil {
		return Result{}, err
	}
	if !frozen {
		r.Intend(undo, result.TTL)
	}
	already, late, err := freezeIn(ctx, c)
	if err != nil {
		return Result{}, overdue(refuseOwn(err))
	}
	if pids, err := c.Pids(); err == nil {
		result.Found["processes"] = strconv.Itoa(len(pids))
		result.Found["pids"] = list(pids)
	}
	// An earlier run of this very step that was cut off may have frozen it: then
	// it is this step that undo takes back.
	if already && (!r.Resumed || r.Intended == nil) {
		result.Nothing, result.Reason = true, "the container is frozen already, by another step or by somebody else"
		return result, nil
	}
	result.Reason, result.Undo = "all processes of the container stopped", undo
	if late != "" {
		result.Reason, result.Found["stopping"] = "the container was told to stop"+late, "true"
	}
	result.Reason += probed(c)
	return result, nil
}

// stopIn is how long a freeze is waited for; nearly all take a few milliseconds.
const stopIn = time.Second

// freezeIn freezes a container, and waits no longer than stopIn: a process that the
// kernel can't stop must hold up neither the others' freeze nor the chain. late
// says that there is one.
func freezeIn(ctx context.Context, c *node.Container) (already bool, late string, err error) {
	ctx, cancel := context.WithTimeout(ctx, stopIn)
	defer cancel()
	already, err = c.Freeze(ctx)
	if errors.Is(err, node.ErrStopping) {
		return already, "; not all of its processes have stopped yet: one in a call to the kernel that can't be broken off stops when that comes back", nil
	}
	return already, "", err
}

// probed is what to mind of the kubelet.
func probed(c *node.Container) string {
	if c.PodUID == "" {
		return ""
	}
	return "; a liveness probe of it fails meanwhile, and the kubelet may then start the container anew, unfrozen"
}

func foundContainer(c *node.Container) map[string]string {
	return map[string]string{"container": c.ID, "cgroup": "v" + strconv.Itoa(c.Version())}
}

// list writes numbers for an outcome, the first of them where there are many.
func list(pids []int) string {
	const most = 32
	var words []string
	for i, pid := range pids {
		if i == most {
			words = append(words, fmt.Sprintf("%d more", len(pids)-most))
			break
		}
		words = append(words, strconv.Itoa(pid))
	}
	return strings.Join(words, ", ")
}

// find is the container that the record is of, if it is still the same.
func (f *containerFreezer) find(u *UndoRequest) (*node.Container, error) {
	var rec frozenContainer
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Container == "" || rec.Path == "" || rec.Inode == 0 || rec.Boot == "" {
		return nil, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if boot := f.local.BootID(); boot != rec.Boot {
		return nil, fmt.Errorf("container %s was frozen before the machine was started anew: %w", rec.Container, ErrGone)
	}
	c, err := f.local.ContainerAt(rec.Path, rec.Inode)
	if err != nil {
		return nil, err
	}
	if c.ID != rec.Container {
		return nil, Refuse("the undo record of step %s names container %s, but a cgroup of container %s", u.ID, rec.Container, c.ID)
	}
	return c, nil
}

// Undo thaws the container that Act froze.
func (f *containerFreezer) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	c, err := f.find(u)
	if err != nil {
		return Result{}, err
	}
	already, err := c.Thaw(ctx)
	switch {
	case err != nil:
		return Result{}, err
	case already:
		return Result{Nothing: true, Reason: "the container is not frozen any more"}, nil
	}
	return Result{Reason: "the container's processes go on", Found: foundContainer(c)}, nil
}

// Keep freezes the container again where somebody thawed it.
func (f *containerFreezer) Keep(ctx context.Context, u *UndoRequest) (Result, error) {
	c, err := f.find(u)
	if err != nil {
		return Result{}, err
	}
	already, late, err := freezeIn(ctx, c)
	switch {
	case err != nil:
		return Result{}, err
	case already:
		return Result{Nothing: true, Reason: "the container is frozen still" + late}, nil
	}
	return Result{Reason: "the container had been thawed and is frozen again" + late + probed(c), Found: foundContainer(c)}, nil
}
