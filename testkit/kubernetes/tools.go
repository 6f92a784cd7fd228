//go:build tools

// Package kubernetes names the programs that the tests of the Kubernetes store run: ./build makes them.
package kubernetes

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
)
