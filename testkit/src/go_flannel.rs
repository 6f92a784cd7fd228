//! The real Go flannel, for comparison.

use std::path::{Path, PathBuf};

use crate::Error;

/// The path of the program, if not the one that `./test` builds.
const VARIABLE: &str = "GO_FLANNELD";

/// Returns the path of `flanneld` of Go flannel v0.28.9: `target/go-flanneld-0.28.9`, which `./test` builds, or the
/// value of `GO_FLANNELD`.
///
/// # Errors
/// The path that was searched and how to get the program: a test that needs it fails without it.
pub fn program() -> Result<PathBuf, Error> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/go-flanneld-0.28.9");
    let program = std::env::var_os(VARIABLE).map_or(target, PathBuf::from);
    if !program.is_file() {
        let remedy = "testkit/flannel/build target builds it with Go, once";
        let text = format!("no Go flannel at {}: {remedy}, or set {VARIABLE}", program.display());
        return Err(Error::new(text));
    }
    Ok(program)
}
