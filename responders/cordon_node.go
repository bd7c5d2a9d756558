package responders

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"stoop/param"
)

func cordonNode() Entry {
	return Entry{
		Name: "cordon-node",
		Doc:  "Cordons the node that the alert came from: no new pods are put on it.",
		Notes: `What runs on the node runs on, and DaemonSets' pods still come: cordoning stops
nothing, it keeps the cluster from giving a node that may be taken over more to take.
Whoever has the credentials of the node's kubelet can uncordon it again.

A node that is cordoned already, by a person or by another step, is left as it is:
the outcome is nothing, and undo and ttl stay with whoever did it. The step notes
itself on the node as the annotation stoop.dev/node-act. and the step's id. Undo
uncordons only a node that still bears it, and that no other step of stoop's keeps
cordoned; a node that somebody uncordoned by hand meanwhile is left alone.

` + nodeActsNotes,
		Params:   param.Describe(cordonNodeParams{}),
		RBAC:     nodeActsRBAC(),
		Kind:     Harm,
		Object:   NodeObject,
		Deadline: 30 * time.Second,
		New:      func(env Env) Responder { return &nodeCordoner{newNodeActs(env)} },
	}
}

type cordonNodeParams struct {
	TTL param.Duration `param:"ttl" doc:"After how long the node is uncordoned by itself; 0 is never."`
}

type nodeCordoner struct{ acts nodeActs }

// Foresee implements [Foreseer].
func (c *nodeCordoner) Foresee(ctx context.Context, _ *Request) error { return c.acts.room(ctx) }

func (c *nodeCordoner) Act(ctx context.Context, r *Request) (Result, error) {
	var params cordonNodeParams
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	node, err := c.acts.get(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("cordon: %w", err)
	}
	rec := nodeRecord{Node: node.Name, UID: node.UID, Step: r.Step.ID}
	undo, err := json.Marshal(rec)
	if err != nil {
		return Result{}, err
	}
	ttl := time.Duration(params.TTL)
	done := Result{Reason: fmt.Sprintf("node %s cordoned", node.Name), Undo: undo, TTL: ttl}
	all := notes(node.Annotations)
	switch by := stepsWith(all, noteCordon); {
	case !node.Spec.Unschedulable && all[rec.Step] == noteCordon:
		return Result{}, c.acts.lifted(ctx, rec, "uncordoned")
	case !node.Spec.Unschedulable:
	case all[rec.Step] == noteCordon:
		return done, nil // by an earlier try of this very step
	case by != "":
		return Result{Nothing: true, Reason: fmt.Sprintf("node %s is cordoned already, by step %s", node.Name, by)}, nil
	default:
		return Result{Nothing: true, Reason: fmt.Sprintf("node %s is cordoned already, not by stoop", node.Name)}, nil
	}
	var others bool
	err = c.acts.hold(ctx, func(ctx context.Context) error {
		r.Intend(undo, ttl)
		others, err = c.acts.cordon(ctx, rec, false)
		return err
	})
	if err != nil {
		return Result{}, fmt.Errorf("cordon node %s: %w", node.Name, err)
	}
	if others {
		return Result{Nothing: true, Reason: fmt.Sprintf("somebody else cordoned node %s at the same time", node.Name)}, nil
	}
	return done, nil
}

func (c *nodeCordoner) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	return c.acts.uncordon(ctx, u)
}
