//! The commands other than running the agent.

use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use flannel_backend_udp::UdpDataPlane;
use flannel_core::files::FileError;
use flannel_core::firewall::FirewallError;
use flannel_core::overlay::{MissingUplink, OverlayError, Preview};
use serde::Serialize;

use crate::assemble::{AssembleError, assemble};
use crate::cleanup::AgentsRun;
use crate::client::{self, ClientError};
use crate::options::Options;
use crate::output::{self, Format, Output, Repeat, Screen};
use crate::privileges::PrivilegeError;
use crate::stores::StoreError;
use crate::{chain, cleanup, doctor, exit, stores};

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
    File(#[from] FileError),
    #[error(transparent)]
    AgentsRun(#[from] AgentsRun),
    #[error("starting the runtime")]
    Runtime(#[source] io::Error),
    #[error("writing to stdout")]
    Output(#[source] io::Error),
}

/// Prints the version.
pub(crate) fn version(output: Output) -> Result<u8, CommandError> {
    match output.format {
        Format::Json => document(&Version { program: "flanneld", version: env!("CARGO_PKG_VERSION") }),
        Format::Table | Format::Wide => print(output.format, &version_line()),
    }
}

/// Returns the version in one line.
pub(crate) fn version_line() -> String {
    concat!("flanneld ", env!("CARGO_PKG_VERSION"), " (flannelkit)\n").to_owned()
}

/// The output of `version -o json`.
#[derive(Serialize)]
struct Version {
    program: &'static str,
    version: &'static str,
}

/// Prints the running agent's status. The exit code is success if the agent is ready.
pub(crate) fn status(options: &Options) -> Result<u8, CommandError> {
    follow(options, "/status")?;
    let is_ready = block_on(client::is_ready(address(options)?))?;
    Ok(if is_ready { exit::SUCCESS } else { exit::FAILURE })
}

/// Prints the records of the other nodes.
pub(crate) fn peers(options: &Options) -> Result<u8, CommandError> {
    follow(options, "/peers")?;
    Ok(exit::SUCCESS)
}

/// Prints why a peer is or is not programmed.
pub(crate) fn explain(options: &Options, peer: &str) -> Result<u8, CommandError> {
    let format = options.output.format;
    let path = format!("/explain?peer={}", client::escape(peer));
    print(format, &block_on(client::ask(address(options)?, &path, client::accepting(format)))?)
}

/// Prints what a start would change.
pub(crate) fn plan(options: &Options) -> Result<u8, CommandError> {
    let preview = block_on(async {
        let overlay =
            assemble(options, &stores::open(&options.store).await?, MissingUplink::Fail, UdpDataPlane::new())?;
        Ok::<_, CommandError>(overlay.preview().await?)
    })?;
    if options.output.format == Format::Json {
        return document(&Planned { leased: preview.is_some(), preview: preview.as_ref() });
    }
    print(
        options.output.format,
        &match preview {
            Some(preview) => preview.to_string(),
            None => "no lease yet; starting will allocate one and create everything\n".to_owned(),
        },
    )
}

/// The output of `plan -o json`.
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
    match options.output.format {
        Format::Json => document(&report)?,
        format @ (Format::Table | Format::Wide) => print(format, &report.to_string())?,
    };
    Ok(if report.is_healthy() { exit::SUCCESS } else { exit::FAILURE })
}

/// Removes everything of this overlay from the host, or prints what would be removed.
pub(crate) fn cleanup(options: &Options) -> Result<u8, CommandError> {
    let report = block_on(cleanup::cleanup(options))?;
    print(options.output.format, &report.to_string())?;
    report.failed.map_or(Ok(exit::SUCCESS), Err)
}

/// How often the agent is asked while its answers are followed.
const EVERY: Duration = Duration::from_secs(1);

/// Prints an answer of the agent, and again whenever it changes if that is requested: until a signal ends the process,
/// or nobody reads the output. Only the last answer is kept.
fn follow(options: &Options, path: &str) -> Result<(), CommandError> {
    let Output { format, repeat } = options.output;
    let (addr, screen) = (address(options)?, Screen::of_stdout(format));
    let ask = || block_on(client::ask(addr, path, client::accepting(format)));
    let mut shown = ask()?;
    let mut is_read = output::write(&screen.render(&shown)).map_err(CommandError::Output)?;
    while is_read && repeat == Repeat::OnChange {
        thread::sleep(EVERY);
        // The agent may be restarted meanwhile.
        let answer = ask().unwrap_or_else(|error| unanswered(format, &error));
        if without_time(&answer).ne(without_time(&shown)) {
            let text = format!("{}{}", screen.separator(), screen.render(&answer));
            is_read = output::write(&text).map_err(CommandError::Output)?;
            shown = answer;
        }
    }
    Ok(())
}

/// Returns what is printed instead of an answer.
fn unanswered(format: Format, error: &CommandError) -> String {
    match format {
        Format::Json => format!("{}\n", serde_json::json!({ "error": chain(error) })),
        Format::Table | Format::Wide => format!("{}\n", chain(error)),
    }
}

/// Returns the lines of an answer except the time at which it was made.
fn without_time(answer: &str) -> impl Iterator<Item = &str> {
    answer.lines().filter(|line| !line.trim_start().starts_with("\"now\":"))
}

fn address(options: &Options) -> Result<SocketAddr, CommandError> {
    options.metrics.map(|metrics| metrics.addr).ok_or(CommandError::NoAddress)
}

fn block_on<T, E: Into<CommandError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::Runtime)?;
    let outcome = runtime.block_on(work);
    // A disk that hangs must not delay the end.
    runtime.shutdown_background();
    outcome.map_err(Into::into)
}

/// Prints a table.
fn print(format: Format, text: &str) -> Result<u8, CommandError> {
    output::write(&Screen::of_stdout(format).render(text)).map_err(CommandError::Output)?;
    Ok(exit::SUCCESS)
}

/// Prints a value as JSON.
fn document(value: &impl Serialize) -> Result<u8, CommandError> {
    let json = serde_json::to_string_pretty(value).map_err(CommandError::Json)?;
    print(Format::Json, &format!("{json}\n"))
}
