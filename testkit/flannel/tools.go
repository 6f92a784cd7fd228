//go:build tools

// Package tools pins the Go flannel that the tests run beside ours: `go build` of it is all this module is for.
package tools

import _ "github.com/flannel-io/flannel"
