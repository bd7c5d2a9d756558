package responders

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"stoop/evidence"
)

// beginCase opens the case of a step. kept is nil where none is to be filled: then the
// result, or the error, is the step's.
func beginCase(ctx context.Context, store *evidence.Store, r *Request, target string) (kept *evidence.Case, res Result, err error) {
	kept, err = store.Begin(ctx, evidence.About{
		Step: r.Step.ID, Alert: r.Step.AlertID, Rule: r.Step.Rule, Responder: r.Step.Responder, Target: target,
	})
	switch {
	case errors.Is(err, evidence.ErrFull), errors.Is(err, evidence.ErrEnough):
		return nil, Result{Nothing: true, Reason: err.Error()}, nil
	case err != nil:
		return nil, Result{}, err
	case kept.WasFinished():
		if err := kept.Close(); err != nil {
			return nil, Result{}, err
		}
		return nil, Result{Reason: "kept by an earlier run of this step, in " + kept.Path(), Found: foundEvidence(kept)}, nil
	}
	return kept, Result{}, nil
}

// beginCapture opens the case of a step about a pod. Where there is nothing more
// to be done, because enough is kept or an earlier run of the step kept it, ended
// is what came of the step.
func beginCapture(ctx context.Context, store *evidence.Store, r *Request, pod *corev1.Pod) (kept *evidence.Case, ended *Result, err error) {
	kept, res, err := beginCase(ctx, store, r, fmt.Sprintf("pod %s uid %s", key(&nodePod{Pod: pod}), pod.UID))
	if kept == nil && err == nil {
		ended = &res
	}
	return kept, ended, err
}

// endCapture closes a case, with the alert in it. One into which nothing came is
// taken away again, and err is what came of the step; else err is said.
func endCapture(ctx context.Context, kept *evidence.Case, r *Request, err error) (Result, error) {
	// Stoop is being stopped: the case stays open, and the next run goes on with it.
	if errors.Is(ctx.Err(), context.Canceled) {
		return Result{}, fmt.Errorf("the evidence of step %s is to be gone on with: %w", r.Step.ID, ctx.Err())
	}
	var files int
	var size int64
	var part []string
	for _, p := range kept.Manifest().Pieces {
		if p.SHA256 != "" {
			files++
			size += p.Size
		}
		switch {
		case p.Cut && p.Error == "":
			part = append(part, p.Name+" is cut at its limit")
		case !p.Whole():
			part = append(part, p.Name+": "+p.Error)
		}
	}
	if files == 0 {
		if err == nil {
			err = errors.New("there was nothing to keep")
		}
		return Result{}, errors.Join(err, kept.Discard())
	}
	if err != nil {
		part = append(part, err.Error())
	}
	keepAlert(ctx, kept, r)
	if cerr := kept.Close(); cerr != nil {
		return Result{}, errors.Join(err, cerr)
	}
	res := Result{
		Found:  foundEvidence(kept),
		Reason: fmt.Sprintf("%d files of %d bytes are in %s", files, size, kept.Path()),
	}
	if len(part) > 0 {
		res.Reason += "; not whole: " + strings.Join(part, "; ")
	}
	return res, nil
}

// keepAlert puts the alert into a case, which then tells by itself what it is about,
// also years later.
func keepAlert(ctx context.Context, kept *evidence.Case, r *Request) {
	if _, err := kept.Add(context.WithoutCancel(ctx), alertPiece, bytes.NewReader(r.Step.Alert), -1); err != nil {
		kept.Note("the alert could not be kept: %v", err)
	}
}

// alertPiece is the alert, as Falco wrote it.
const alertPiece = "alert.json"
