//go:build tools

// Package tools pins the servers that the tests run stoop against. They
// are a module of their own because their dependencies are many and older than
// stoop's.
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
