//go:build tools

// The last release with flannel's plug-in in it, which has moved to github.com/flannel-io/cni-plugin since.
package tools

import _ "github.com/containernetworking/plugins/plugins/meta/flannel"
