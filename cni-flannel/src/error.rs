//! Errors of a call, and the JSON that the runtime gets.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::conf::VERSIONS;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the configuration's cniVersion {0:?} is not supported: write one of {known}", known = VERSIONS.join(", "))]
    Version(String),
    #[error("{command} needs cniVersion {needed} or later, and the configuration has {found}")]
    TooOld { command: &'static str, needed: &'static str, found: String },
    #[error("the environment variable {name} {problem}")]
    Environment { name: &'static str, problem: String },
    #[error("reading stdin: {0}")]
    Stdin(#[source] io::Error),
    #[error("the configuration on stdin is not a JSON object: {0}")]
    Decode(String),
    #[error("`{place}` of the configuration {problem}")]
    Config { place: &'static str, problem: String },
    #[error("the plug-in {name:?} is in no directory of CNI_PATH: install it")]
    NoPlugin { name: String },
    #[error("running {}: {source}", path.display())]
    Run { path: PathBuf, source: io::Error },
    #[error("{doing} {}: {source}", path.display())]
    State { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("another call for this container has not ended within {} s", .0.as_secs())]
    Busy(Duration),
    #[error("{0}: check that flanneld runs on this node and has a lease")]
    NotReady(String),
    #[error("this plug-in has not attached the container {container}: it has no entry in {}", data_dir.display())]
    NotAttached { container: String, data_dir: PathBuf },
    /// The other plug-in's own error, as it printed it.
    #[error("the plug-in {name} failed")]
    Delegate { name: String, printed: serde_json::Map<String, serde_json::Value> },
    #[error("the plug-in {name} failed without an error in JSON ({status}): {printed}")]
    Broken { name: String, status: String, printed: String },
    #[error("the plug-in {0} printed more than 1 MiB")]
    TooMuch(String),
}

impl Error {
    /// The code, by the CNI specification, "Error".
    fn code(&self) -> u64 {
        match self {
            Self::Version(_) | Self::TooOld { .. } => 1,
            Self::Environment { .. } => 4,
            Self::Stdin(_) | Self::Run { .. } | Self::State { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config { .. } | Self::NoPlugin { .. } => 7,
            Self::Busy(_) | Self::NotReady(_) => 11,
            Self::NotAttached { .. } => 100,
            Self::Delegate { .. } | Self::Broken { .. } | Self::TooMuch(_) => 999,
        }
    }

    /// What goes to stdout. `version` is the configuration's, as far as it was read.
    pub(crate) fn to_json(&self, version: &str, command: Option<&str>) -> String {
        #[derive(Serialize)]
        struct Document<'a> {
            #[serde(rename = "cniVersion")]
            version: &'a str,
            code: u64,
            msg: &'a str,
            details: String,
        }
        if let Self::Delegate { printed, .. } = self {
            return crate::go_json::object(printed);
        }
        // A runtime asks with STATUS whether pods can be attached, and has a code for that.
        let code = match (command, self.code()) {
            (Some("STATUS"), 11) => 50,
            (_, code) => code,
        };
        let msg = match code {
            1 => "incompatible CNI version",
            4 => "invalid environment variables",
            5 => "I/O failure",
            6 => "failed to decode content",
            7 => "invalid network configuration",
            11 => "try again later",
            50 => "the plug-in is not available",
            _ => "flannel",
        };
        let document = Document { version, code, msg, details: self.to_string() };
        // Texts and a number cannot fail to be JSON.
        serde_json::to_string(&document).unwrap_or_default()
    }
}
