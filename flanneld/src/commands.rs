//! The commands other than running the agent.

use std::io::{self, Write};
use std::net::SocketAddr;

use cni_flannel::install::InstallError;
use flannel_backend_udp::UdpDataPlane;
use flannel_core::files::FileError;
use flannel_core::firewall::FirewallError;
use flannel_core::overlay::{MissingUplink, OverlayError, Preview};
use flannel_core::text::Plain;
use serde::Serialize;

use crate::assemble::{AssembleError, assemble};
use crate::cleanup::OthersRun;
use crate::client::{self, ClientError};
use crate::options::Options;
use crate::privileges::PrivilegeError;
use crate::stores::StoreError;
use crate::{cleanup, doctor, exit, stores};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("-metrics-port is 0: a running agent can only be asked through it")]
    NoAddress,
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("writing JSON")]
    Json(#[source] serde_json::Error),
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error("removing the firewall's rules")]
    Firewall(#[from] FirewallError),
    #[error(transparent)]
    StateFile(#[from] FileError),
    #[error(transparent)]
    OthersRun(#[from] OthersRun),
    #[error(transparent)]
    Cni(#[from] InstallError),
    #[error("starting the runtime")]
    Runtime(#[source] io::Error),
    #[error("writing to stdout")]
    Output(#[source] io::Error),
}

/// Prints the running agent's status. The exit code is success if the agent is ready.
pub(crate) fn status(options: &Options) -> Result<u8, CommandError> {
    let addr = address(options)?;
    print(&client::ask(addr, "/status", form(options))?)?;
    Ok(if client::is_ready(addr)? { exit::SUCCESS } else { exit::FAILURE })
}

/// Prints the running agent's peers.
pub(crate) fn peers(options: &Options) -> Result<u8, CommandError> {
    print(&client::ask(address(options)?, "/peers", form(options))?)?;
    Ok(exit::SUCCESS)
}

/// Prints why a peer is or is not programmed.
pub(crate) fn explain(options: &Options, peer: &str) -> Result<u8, CommandError> {
    print(&client::ask(address(options)?, &format!("/explain?peer={}", client::escape(peer)), client::TEXT)?)?;
    Ok(exit::SUCCESS)
}

/// Prints what a start would change.
pub(crate) fn plan(options: &Options) -> Result<u8, CommandError> {
    let preview = block_on(async {
        let overlay =
            assemble(options, &stores::open(&options.store).await?, MissingUplink::Fail, UdpDataPlane::new())?;
        Ok::<_, CommandError>(overlay.preview().await?)
    })?;
    if options.json {
        let document = Planned { leased: preview.is_some(), preview: preview.as_ref() };
        print(&format!("{}\n", serde_json::to_string_pretty(&document).map_err(CommandError::Json)?))?;
        return Ok(exit::SUCCESS);
    }
    print(&match preview {
        Some(preview) => preview.to_string(),
        None => "the store has no lease of this node: a start takes one, then makes everything\n".to_owned(),
    })?;
    Ok(exit::SUCCESS)
}

/// The output of `plan -json`.
#[derive(Serialize)]
struct Planned<'a> {
    /// Whether the store has a lease of this node; if not, there is no preview.
    leased: bool,
    /// In the format that `flannel_core::serialize` documents.
    #[serde(flatten)]
    preview: Option<&'a Preview>,
}

/// Prints what is wrong on this host. The exit code is success if there is no error.
pub(crate) fn doctor(options: &Options, warnings: &[String]) -> Result<u8, CommandError> {
    let report = block_on(async { Ok::<_, CommandError>(doctor::examine(options, warnings).await) })?;
    if options.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report).map_err(CommandError::Json)?))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(if report.is_healthy() { exit::SUCCESS } else { exit::FAILURE })
}

/// Removes everything of this overlay from the host, or prints what would be removed.
pub(crate) fn cleanup(options: &Options) -> Result<u8, CommandError> {
    print(&block_on(cleanup::cleanup(options))?.to_string())?;
    Ok(exit::SUCCESS)
}

/// Returns the requested format of the agent's answer.
fn form(options: &Options) -> &'static str {
    if options.json { client::JSON } else { client::TEXT }
}

fn address(options: &Options) -> Result<SocketAddr, CommandError> {
    options.metrics.map(|metrics| metrics.addr).ok_or(CommandError::NoAddress)
}

fn block_on<T>(work: impl Future<Output = Result<T, CommandError>>) -> Result<T, CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(CommandError::Runtime)?.block_on(work)
}

/// Prints escaped lines: another program may have answered at the agent's address.
fn print(text: &str) -> Result<(), CommandError> {
    let lines: String = text.lines().map(|line| format!("{}\n", Plain(line))).collect();
    match io::stdout().write_all(lines.as_bytes()) {
        // It is not an error if the reader closes the pipe early.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CommandError::Output(error)),
        _ => Ok(()),
    }
}
