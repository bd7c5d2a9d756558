package responders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/param"
)

func taintNode() Entry {
	return Entry{
		Name: "taint-node",
		Doc:  "Taints the node that the alert came from, beside the taints that it has.",
		Notes: `The node's other taints stay, also those that others add or take off at the same
time. A taint of the same key and effect with another value is somebody else's: the
step is refused. One that is there already is left as it is: the outcome is nothing,
and undo and ttl stay with whoever set it. Undo takes this one taint off, and
only where the node still bears the annotation stoop.dev/node-act. and the step's id.

NoSchedule keeps new pods off that don't tolerate it. PreferNoSchedule only makes the
scheduler look elsewhere first, so it needs no turn and counts for nothing below.

NoExecute ends at once all pods on the node that don't tolerate it, asks no
PodDisruptionBudget and spares no protected namespace: what keeps kube-system's pods
there are their own tolerations. So a step with it waits for a person unless its
rule says approve: false, and it is refused where it would end stoop's own pod, which
then could not take it back. drain-node is the gentler way. Undo brings no pod back.

Keys under kubernetes.io/ and k8s.io/ and under names below these are refused: some of
them (node.kubernetes.io/out-of-service) have volumes torn from running pods.

` + nodeActsNotes,
		Params: param.Describe(taintNodeDefaults()),
		RBAC: nodeActsRBAC(
			rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
		),
		Kind:     Harm,
		Object:   NodeObject,
		Deadline: 30 * time.Second,
		Approve: func(params json.RawMessage) bool {
			p := taintNodeDefaults()
			return param.Decode(params, &p) != nil || p.taint().Effect == corev1.TaintEffectNoExecute
		},
		New: func(env Env) Responder { return &nodeTainter{newNodeActs(env), env.Self} },
	}
}

type taintNodeParams struct {
	Key    string         `param:"key" doc:"The taint's key."`
	Value  string         `param:"value" doc:"The taint's value."`
	Effect string         `param:"effect" oneof:"NoSchedule PreferNoSchedule NoExecute" doc:"What it does to pods that don't tolerate it."`
	TTL    param.Duration `param:"ttl" doc:"After how long the taint is taken off by itself; 0 is never."`
}

func taintNodeDefaults() taintNodeParams {
	return taintNodeParams{Key: ownPrefix + "suspect", Effect: string(corev1.TaintEffectNoSchedule)}
}

// Validate refuses what the API server would, and what is others' to set.
func (p taintNodeParams) Validate() error {
	if msgs := validation.IsQualifiedName(p.Key); len(msgs) > 0 {
		return fmt.Errorf("key: %s is no key for a taint: %s", param.Cut(p.Key), msgs[0])
	}
	if msgs := validation.IsValidLabelValue(p.Value); len(msgs) > 0 {
		return fmt.Errorf("value: %s is no value for a taint: %s", param.Cut(p.Value), msgs[0])
	}
	if reservedName(p.Key) && !ownName(p.Key) {
		return fmt.Errorf("key: %s is Kubernetes' own, not for rules to set", param.Cut(p.Key))
	}
	return nil
}

func (p taintNodeParams) taint() corev1.Taint {
	return corev1.Taint{Key: p.Key, Value: p.Value, Effect: corev1.TaintEffect(p.Effect)}
}

// errLifted says that somebody has taken the taint off again.
var errLifted = errors.New("somebody has taken the taint off")

type nodeTainter struct {
	acts nodeActs
	self Self
}

// Foresee implements [Foreseer].
func (t *nodeTainter) Foresee(ctx context.Context, r *Request) error {
	params := taintNodeDefaults()
	if err := r.Decode(&params); err != nil {
		return Refuse("%v", err)
	}
	if params.taint().Effect == corev1.TaintEffectPreferNoSchedule {
		return nil // it keeps no pod off, and is not counted
	}
	return t.acts.room(ctx)
}

func (t *nodeTainter) Act(ctx context.Context, r *Request) (Result, error) {
	params := taintNodeDefaults()
	if err := r.Decode(&params); err != nil {
		return Result{}, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	taint := params.taint()
	name := taint.ToString()
	node, err := t.acts.get(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("taint: %w", err)
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("taint node %s with %s: %w", node.Name, name, err)
	}
	rec := nodeRecord{Node: node.Name, UID: node.UID, Step: r.Step.ID, Taint: &taint}
	undo, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	ttl := time.Duration(params.TTL)
	done := Result{Reason: fmt.Sprintf("node %s tainted with %s", node.Name, name), Undo: undo, TTL: ttl}
	// look says whether the taint is there: by this step, or by another.
	look := func(node *corev1.Node) (there bool, res Result, err error) {
		have := taintOf(node, taint)
		switch by := stepsWith(notes(node.Annotations), noteTaint+name); {
		case have == nil && notes(node.Annotations)[rec.Step] == noteTaint+name:
			return true, Result{}, errLifted
		case have == nil:
			return false, Result{}, nil
		case have.Value != taint.Value:
			return true, Result{}, Refuse("node %s has the taint %s already, with another value, and it is left as it is", node.Name, have.ToString())
		case notes(node.Annotations)[rec.Step] == noteTaint+name:
			return true, done, nil
		case by != "":
			return true, Result{Nothing: true, Reason: fmt.Sprintf("node %s is tainted with %s already, by step %s", node.Name, name, by)}, nil
		}
		return true, Result{Nothing: true, Reason: fmt.Sprintf("node %s is tainted with %s already, not by stoop", node.Name, name)}, nil
	}
	there, res, err := look(node)
	switch {
	case errors.Is(err, errLifted):
		return fail(t.acts.lifted(ctx, rec, "taken it off"))
	case there:
		return res, err
	}
	if err := t.spareSelf(ctx, taint); err != nil {
		return fail(err)
	}
	act := func(ctx context.Context) error {
		r.Intend(undo, ttl)
		_, err := t.acts.change(ctx, rec.Node, rec.UID, func(now *corev1.Node) (*nodeChange, error) {
			there, found, err := look(now)
			if res = done; there {
				res = found
				return nil, err
			}
			return &nodeChange{
				notes: map[string]*string{notePrefix + rec.Step: new(noteTaint + name)},
				spec:  map[string]any{"taints": append(slices.Clone(now.Spec.Taints), taint)},
			}, nil
		})
		return err
	}
	if taint.Effect == corev1.TaintEffectPreferNoSchedule {
		err = act(ctx)
	} else {
		err = t.acts.hold(ctx, act)
	}
	if err != nil {
		return fail(err)
	}
	return res, nil
}

// spareSelf refuses what would end this very stoop.
func (t *nodeTainter) spareSelf(ctx context.Context, taint corev1.Taint) error {
	if taint.Effect != corev1.TaintEffectNoExecute || t.self.Pod == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, t.acts.answer)
	defer cancel()
	pod, err := t.acts.kube.Pods(t.self.Namespace).Get(ctx, t.self.Pod, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look whether stoop's own pod tolerates it: %w", err)
	}
	if pod.Spec.NodeName == t.acts.node && !slices.ContainsFunc(pod.Spec.Tolerations, func(o corev1.Toleration) bool {
		return o.TolerationSeconds == nil && o.ToleratesTaint(logr.Discard(), &taint, false)
	}) {
		return Refuse("stoop's own pod %s/%s does not tolerate it and would be ended by it: give its DaemonSet the toleration", pod.Namespace, pod.Name)
	}
	return nil
}

// Undo takes the one taint off, and leaves the others.
func (t *nodeTainter) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	rec, err := t.acts.record(u)
	if err != nil {
		return Result{}, err
	}
	if rec.Taint == nil {
		return Result{}, Refuse("the undo record of step %s can't be read: it names no taint", u.ID)
	}
	name := rec.Taint.ToString()
	var res Result
	_, err = t.acts.change(ctx, rec.Node, rec.UID, func(node *corev1.Node) (*nodeChange, error) {
		if notes(node.Annotations)[rec.Step] != noteTaint+name {
			res = Result{Nothing: true, Reason: fmt.Sprintf("the node is not tainted with %s by this step any more", name)}
			return nil, nil
		}
		c := &nodeChange{notes: map[string]*string{notePrefix + rec.Step: nil}}
		if have := taintOf(node, *rec.Taint); have == nil || have.Value != rec.Taint.Value {
			res = Result{Nothing: true, Reason: fmt.Sprintf("somebody has taken the taint %s off already", name)}
			return c, nil
		}
		res = Result{Reason: fmt.Sprintf("the taint %s taken off", name)}
		rest := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.MatchTaint(rec.Taint) })
		c.spec = map[string]any{"taints": rest}
		return c, nil
	})
	if err != nil {
		return Result{}, fmt.Errorf("take the taint %s off node %s: %w", name, rec.Node, err)
	}
	return res, nil
}

// taintOf is the node's taint of the same key and effect, or nil: it has no two.
func taintOf(node *corev1.Node, taint corev1.Taint) *corev1.Taint {
	for i := range node.Spec.Taints {
		if node.Spec.Taints[i].MatchTaint(&taint) {
			return &node.Spec.Taints[i]
		}
	}
	return nil
}
