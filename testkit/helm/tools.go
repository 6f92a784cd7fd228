//go:build tools

// Package helm names the program that the tests of the Helm chart run: ./build makes it.
package helm

import _ "helm.sh/helm/v4/cmd/helm"
