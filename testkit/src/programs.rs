//! Programs that `./test` builds or fetches.

use std::path::{Path, PathBuf};

use crate::Error;

/// Returns the directory that they are in.
pub(crate) fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")
}

/// Returns the path of a program, given its place in that directory.
///
/// # Errors
/// The path that was searched and how to get the program: a test that needs it fails without it.
pub(crate) fn find(place: &str) -> Result<PathBuf, Error> {
    let program = target().join(place);
    match program.is_file() {
        true => Ok(program),
        false => Err(Error::new(format!("no program at {}: run ./test, which makes it once", program.display()))),
    }
}
