//go:build tools

// Package tools pins the etcd server that the tests upgrade from: `go build` of it is all this module is for.
package tools

import _ "go.etcd.io/etcd/server/v3"
