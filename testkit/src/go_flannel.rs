//! The real Go flannel, to stand beside ours.

use std::path::{Path, PathBuf};

use crate::Error;

/// Names the program, where it is not to be the one that `./test` builds.
const VARIABLE: &str = "GO_FLANNELD";

/// `flanneld` of Go flannel v0.28.9: `target/go-flanneld-0.28.9`, which `./test` builds, or what `GO_FLANNELD` names.
///
/// # Errors
/// Says where it was looked for and how to get it: a test that needs it fails without.
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
