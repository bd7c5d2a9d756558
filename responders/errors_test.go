package responders_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"stoop/broker"
	"stoop/responders"
)

func TestClassify(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	status := func(code int32, reason metav1.StatusReason, message string, d *metav1.StatusDetails) error {
		return &apierrors.StatusError{ErrStatus: metav1.Status{Status: "Failure", Code: code, Reason: reason, Message: message, Details: d}}
	}
	for _, tc := range []struct {
		name   string
		err    error
		status broker.Status
		retry  bool
		after  time.Duration
		reason string
	}{
		{"nothing wrong", nil, broker.Done, false, 0, ""},
		{"refusal", responders.Refuse("no: %d", 1), broker.Refused, false, 0, "no: 1"},
		{"no pod", fmt.Errorf("x: %w", responders.ErrNoPod), broker.Refused, false, 0, ""},
		{"unproved", fmt.Errorf("x: %w", responders.ErrUnproved), broker.Refused, false, 0, ""},
		{"gone", fmt.Errorf("x: %w", responders.ErrGone), broker.Nothing, false, 0, "x: the target is gone"},
		{"404", apierrors.NewNotFound(pods, "web-0"), broker.Nothing, false, 0, "not found"},
		{
			"409 on the UID, as 1.36 says it", status(409, metav1.StatusReasonConflict,
				`Operation cannot be fulfilled on Pod "web-0": the UID in the precondition (1) does not match the UID in record (2). The object might have been deleted and then recreated`, nil),
			broker.Nothing, false, 0, "",
		},
		{
			"409 on the UID, as it was said before", status(409, metav1.StatusReasonConflict,
				`Operation cannot be fulfilled on pods "web-0": Precondition failed: UID in precondition: 1, UID in object meta: 2`, nil),
			broker.Nothing, false, 0, "",
		},
		{
			"422 on the UID", status(422, metav1.StatusReasonInvalid, "immutable", &metav1.StatusDetails{Causes: []metav1.StatusCause{{Field: "metadata.uid"}}}),
			broker.Nothing, false, 0, "",
		},
		{
			"namespace going", status(403, metav1.StatusReasonForbidden, "is being terminated", &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}}),
			broker.Nothing, false, 0, "",
		},
		{"409 on the version", apierrors.NewConflict(pods, "web-0", errors.New("the object has been modified")), broker.Failed, true, 0, ""},
		{
			"422", status(422, metav1.StatusReasonInvalid, "metadata.labels: Invalid value", &metav1.StatusDetails{Causes: []metav1.StatusCause{{Field: "metadata.labels"}}}),
			broker.Failed, false, 0, "",
		},
		{
			"403 of RBAC", apierrors.NewForbidden(pods, "web-0", errors.New(`User "system:serviceaccount:stoop:stoop" cannot delete resource "pods" in API group "" in the namespace "shop"`)),
			broker.Failed, false, 0, `missing permission: User "system:serviceaccount:stoop:stoop" may not delete pods in namespace shop; give its role the verb delete on pods`,
		},
		{
			"403 of RBAC, of a group", status(403, metav1.StatusReasonForbidden, `networkpolicies.networking.k8s.io is forbidden: User "s" cannot create resource "networkpolicies" in API group "networking.k8s.io" in the namespace "shop"`, nil),
			broker.Failed, false, 0, "create on networkpolicies.networking.k8s.io",
		},
		{
			"403 of RBAC, of the cluster", status(403, metav1.StatusReasonForbidden, `pods is forbidden: User "s" cannot list resource "pods" in API group "" at the cluster scope`, nil),
			broker.Failed, false, 0, "may not list pods in the whole cluster",
		},
		{"403 of a quota", apierrors.NewForbidden(pods, "web-0", errors.New("exceeded quota: q")), broker.Failed, false, 0, "a role won't help"},
		{"401", apierrors.NewUnauthorized("Unauthorized"), broker.Failed, true, 0, "credentials"},
		{"429", apierrors.NewTooManyRequests("slow down", 7), broker.Failed, true, 7 * time.Second, ""},
		{"500", apierrors.NewInternalError(errors.New("etcdserver: request timed out")), broker.Failed, true, 0, ""},
		{"502", apierrors.NewGenericServerResponse(http.StatusBadGateway, "get", pods, "web-0", "bad gateway", 0, true), broker.Failed, true, 0, ""},
		{"503", apierrors.NewServiceUnavailable("starting"), broker.Failed, true, 0, ""},
		{"504", apierrors.NewTimeoutError("x", 3), broker.Failed, true, 3 * time.Second, ""},
		{"400", apierrors.NewBadRequest("x"), broker.Failed, false, 0, ""},
		{"connection refused", &url.Error{Op: "Get", URL: "https://x", Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}, broker.Failed, true, 0, ""},
		{"cut off", &url.Error{Op: "Get", URL: "https://x", Err: io.ErrUnexpectedEOF}, broker.Failed, true, 0, ""},
		{"deadline", context.DeadlineExceeded, broker.Failed, true, 0, ""},
		{"asked to retry", responders.Retry(errors.New("busy"), time.Minute), broker.Failed, true, time.Minute, "busy"},
		{"asked to retry a 404", responders.Retry(apierrors.NewNotFound(pods, "x"), 0), broker.Failed, true, 0, ""},
		{"anything else", errors.New("boom"), broker.Failed, false, 0, "boom"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.err
			if err != nil {
				err = fmt.Errorf("delete pod shop/web-0: %w", err)
			}
			status, retry, after, reason := responders.Classify(err)
			if status != tc.status || retry != tc.retry || after != tc.after || !strings.Contains(reason, tc.reason) {
				t.Errorf("got %s, retry %t after %s, %q; want %s, retry %t after %s, %q", status, retry, after, reason, tc.status, tc.retry, tc.after, tc.reason)
			}
		})
	}
}
