// Package kube gives a test a real Kubernetes API: etcd and kube-apiserver,
// built from their modules, on loopback, with RBAC and an audit log.
//
// It is the far end of an alert's way. There is no scheduler, no controller
// manager and, unless the caller brings one, no node: what those would do and
// the tests need (a pod's status, its end after a graceful delete) is done here,
// under users of their own, so that the audit log tells stoop's requests from
// all others.
package kube
