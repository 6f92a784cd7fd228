//! Programs of Prometheus and Grafana that check what a monitoring system reads. `./test` fetches and builds them.

use std::path::{Path, PathBuf};

use crate::Error;

/// Returns `promtool`, which checks metrics and rules.
///
/// # Errors
/// It is missing; the text says what to do.
pub fn promtool() -> Result<PathBuf, Error> {
    program("prometheus/promtool", "testkit/prometheus/fetch")
}

/// Returns a program that checks the dashboard on its standard input against Grafana's schema.
///
/// # Errors
/// As [`promtool`].
pub fn grafana_schema() -> Result<PathBuf, Error> {
    program("grafana-schema-0.0.22", "testkit/grafana/build")
}

fn program(path: &str, made_by: &str) -> Result<PathBuf, Error> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(path);
    match program.is_file() {
        true => Ok(program),
        false => Err(Error::new(format!("no program at {}: {made_by} target", program.display()))),
    }
}
