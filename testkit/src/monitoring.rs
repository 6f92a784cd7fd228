//! Programs of Prometheus and Grafana that check metrics, alerts and the dashboard.

use std::path::PathBuf;

use crate::{Error, programs};

/// Returns `promtool`, which checks metrics and rules.
///
/// # Errors
/// It is missing; the text says what to do.
pub fn promtool() -> Result<PathBuf, Error> {
    programs::find("prometheus/promtool")
}

/// Returns a program that checks the dashboard on its standard input against Grafana's schema.
///
/// # Errors
/// As [`promtool`].
pub fn grafana_schema() -> Result<PathBuf, Error> {
    programs::find("grafana-schema-0.0.22")
}
