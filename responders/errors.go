package responders

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"stoop/broker"
	"stoop/node"
)

// Errors of [Pods.Resolve], besides [ErrGone]: its text always says which pod
// and why.
var (
	// errNoPod: the alert points at no pod of this node.
	errNoPod = errors.New("there is no pod to act on")
	// errUnproved: there is a pod of that name, but nothing proves that it
	// raised the alert.
	errUnproved = errors.New("not proved to be the pod that raised the alert")
)

// classify tells what an error of an act makes of its step: the status, and
// whether, and after how long (0: as the host thinks fit), it is to be tried
// again. With retry the status is the one that counts when the tries run out.
func classify(err error) (status broker.Status, retry bool, after time.Duration, reason string) {
	if err == nil {
		return broker.Done, false, 0, ""
	}
	reason = err.Error()
	var again *retryable
	var api apierrors.APIStatus
	switch {
	case as[*refusal](err), errors.Is(err, errNoPod), errors.Is(err, errUnproved), errors.Is(err, node.ErrAmbiguous):
		return broker.Refused, false, 0, reason
	case as[*spareError](err):
		return broker.Suppressed, false, 0, reason
	case errors.As(err, &again):
		// Before what it wraps: whoever wrote Retry knows better.
		return broker.Failed, true, again.after, reason
	case isGone(err):
		return broker.Nothing, false, 0, reason
	case errors.As(err, &api):
		return classifyStatus(err, api)
	case passes(err):
		return broker.Failed, true, 0, reason
	}
	return broker.Failed, false, 0, reason
}

func as[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

// classifyStatus is for what the API server answered.
func classifyStatus(err error, api apierrors.APIStatus) (broker.Status, bool, time.Duration, string) {
	status := api.Status()
	switch {
	case apierrors.IsForbidden(err):
		return broker.Failed, false, 0, forbidden(err, status.Message)
	case apierrors.IsUnauthorized(err):
		// The token is being rotated, or the API server can't check it now.
		return broker.Failed, true, 0, fmt.Sprintf("%v: the API server does not accept stoop's credentials; is its service account (or kubeconfig) still valid?", err)
	case apierrors.IsTooManyRequests(err), apierrors.IsServerTimeout(err), apierrors.IsTimeout(err),
		apierrors.IsServiceUnavailable(err), apierrors.IsInternalError(err), apierrors.IsConflict(err),
		status.Code >= 500:
		var after time.Duration
		if s, ok := apierrors.SuggestsClientDelay(err); ok {
			after = time.Duration(s) * time.Second
		}
		return broker.Failed, true, after, err.Error()
	}
	return broker.Failed, false, 0, err.Error()
}

// isGone reports whether an error says that the object which the step is
// about is not there any more, or is another one of the same name by now.
func isGone(err error) bool {
	switch {
	case errors.Is(err, ErrGone), errors.Is(err, node.ErrGone), errors.Is(err, node.ErrNotSame), apierrors.IsNotFound(err), apierrors.IsGone(err):
		return true
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return true
	}
	var api apierrors.APIStatus
	if !errors.As(err, &api) {
		return false
	}
	status := api.Status()
	switch {
	case apierrors.IsConflict(err):
		// An update of something that changed meanwhile is a 409 as well, and
		// passes: only the text tells the two apart.
		return strings.Contains(status.Message, "UID in the precondition") ||
			strings.Contains(status.Message, "UID in precondition")
	case apierrors.IsInvalid(err) && status.Details != nil:
		// A patch that carries the UID of the pod before.
		for _, c := range status.Details.Causes {
			if c.Field == "metadata.uid" {
				return true
			}
		}
	}
	return false
}

// passes reports whether an error that no API server sent may be over with
// the next try.
func passes(err error) bool {
	// Not any net.Error: every error number of the kernel is one.
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) ||
		errors.Is(err, io.ErrUnexpectedEOF) || utilnet.IsHTTP2ConnectionLost(err) ||
		as[*url.Error](err) || as[*net.OpError](err)
}

// cannot reads the sentence of the API server's RBAC authorizer.
var cannot = regexp.MustCompile(`(User "[^"]*") cannot (\S+) resource "([^"]+)" in API group "([^"]*)"(?: in the namespace "([^"]*)")?`)

// forbidden says of a 403 which permission is missing and what to do.
func forbidden(err error, message string) string {
	m := cannot.FindStringSubmatch(message)
	if m == nil {
		// Not RBAC: an admission webhook, a quota.
		return fmt.Sprintf("%v: the API server lets nobody do this here (admission or quota), a role won't help", err)
	}
	user, verb, resource, group, namespace := m[1], m[2], m[3], m[4], m[5]
	where := "in the whole cluster"
	if namespace != "" {
		where = "in namespace " + namespace
	}
	if group != "" {
		resource += "." + group
	}
	return fmt.Sprintf("missing permission: %s may not %s %s %s; give its role the verb %s on %s (stoop rbac prints what your rules need)",
		user, verb, resource, where, verb, resource)
}
