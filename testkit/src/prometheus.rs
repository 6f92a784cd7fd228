//! Prometheus, which `./test` fetches.

use std::path::{Path, PathBuf};

use crate::Error;

/// Returns `promtool`, which checks metrics and rules.
///
/// # Errors
/// It is missing; the text says what to do.
pub fn promtool() -> Result<PathBuf, Error> {
    program("promtool")
}

/// Returns Prometheus' server.
///
/// # Errors
/// As [`promtool`].
pub fn server() -> Result<PathBuf, Error> {
    program("prometheus")
}

fn program(name: &str) -> Result<PathBuf, Error> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/prometheus").join(name);
    match program.is_file() {
        true => Ok(program),
        false => Err(Error::new(format!("no {name} at {}: testkit/prometheus/fetch target", program.display()))),
    }
}
