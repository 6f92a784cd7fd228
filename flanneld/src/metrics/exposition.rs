//! The formats of the page.

use std::fmt::Write as _;

use axum::http::{HeaderMap, header};

/// A format that Prometheus and other programs read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus' text format, which every program reads.
    Text,
    OpenMetrics,
}

impl Format {
    /// Returns OpenMetrics if the client accepts it, otherwise the text format.
    pub(crate) fn accepted_by(client: &HeaderMap) -> Self {
        let mut accepted = client.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        match accepted.any(|value| value.contains("application/openmetrics-text")) {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Returns a page of OpenMetrics in this format.
    pub(super) fn page(self, openmetrics: String) -> String {
        match self {
            Self::Text => text_of(&openmetrics),
            Self::OpenMetrics => openmetrics,
        }
    }
}

/// Returns a page of OpenMetrics in Prometheus' text format. In it, the name of a counter ends in `_total` also where it
/// is described, and neither the unit nor the end of the page is stated.
fn text_of(openmetrics: &str) -> String {
    let mut page = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            page.push_str(line);
            page.push('\n');
            continue;
        };
        if let Some(text) = comment.strip_prefix("HELP ") {
            help = text.split_once(' ');
        } else if let Some((name, kind)) = comment.strip_prefix("TYPE ").and_then(|text| text.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, text)) = help.take() {
                // Writing to a string cannot fail.
                let _ = writeln!(page, "# HELP {name}{suffix} {text}");
            }
            let _ = writeln!(page, "# TYPE {name}{suffix} {kind}");
        }
    }
    page
}
