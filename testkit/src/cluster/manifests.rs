//! What is applied to a cluster.

use std::fs;
use std::path::{Path, PathBuf};

use crate::programs::target;
use crate::{Context, Error};

/// Returns the path of our manifest.
pub fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/flannel.yaml")
}

/// Returns the text of our manifest.
///
/// # Errors
/// If it cannot be read.
pub fn ours() -> Result<String, Error> {
    read(&path())
}

/// Returns the text of Go flannel's manifest.
///
/// # Errors
/// If `testkit/cluster/build` has not put it there.
pub fn go_flannel() -> Result<String, Error> {
    read(&target().join("go-flannel-0.28.9.yml"))
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).context(|| format!("reading {} (testkit/cluster/build makes it)", path.display()))
}
