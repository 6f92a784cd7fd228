//! The agent's status: JSON for programs, a table for people, one line for the supervisor.

mod line;
mod table;

use std::sync::Arc;

use flannel_backend_udp::{CarriedDevice, Observer};
use flannel_core::clock::BootTime;
use flannel_core::firewall_keeper::RulesState;
use flannel_core::overlay::{Handle, Phase, Status, Wait};
use flannel_subnet_cached::CachedSubnets;
use serde::Serialize;
use tokio::sync::watch;

pub(crate) use line::summary;

/// The answer of `/status`: the library's status, and facts about the program.
#[derive(Debug, Serialize)]
pub(crate) struct Document<'a> {
    version: &'static str,
    pid: u32,
    overlay: &'a str,
    /// Whether the overlay is ready and the firewall's rules are in place.
    ready: bool,
    /// When the answer was made. All times in it are on the same clock.
    now: BootTime,
    store: Store<'a>,
    subnet_file: &'a str,
    firewall: &'a RulesState,
    /// Devices whose packets this process carries.
    carried: Vec<CarriedDevice>,
    log_lines_dropped: u64,
    /// In the format that `flannel_core::serialize` documents.
    status: &'a Status,
}

#[derive(Debug, Serialize)]
struct Store<'a> {
    name: &'a str,
    /// Whether lease and peers are those of the state file, because the store has not answered since the start.
    stale: bool,
    state_file: Option<String>,
    /// Why the state file could not be written.
    state_file_error: Option<String>,
}

/// Facts about the program that are not in the library's status.
pub(crate) struct ProgramInfo {
    pub(crate) overlay: String,
    pub(crate) store: String,
    pub(crate) subnet_file: String,
    pub(crate) kept: Option<Arc<CachedSubnets>>,
    pub(crate) carried: Observer,
}

impl ProgramInfo {
    /// Whether lease and peers are those of the state file.
    pub(crate) fn is_stale(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.is_in_use())
    }
}

/// Whether the overlay is ready and the firewall's rules are in place.
pub(crate) fn is_ready(status: &Status, rules: &RulesState) -> bool {
    status.is_ready() && rules.is_ready()
}

/// Waits until the status or the state of the firewall's rules changes. Returns false if the agent has ended.
pub(crate) async fn changed(handle: &mut Handle, rules: &mut watch::Receiver<RulesState>) -> bool {
    tokio::select! {
        changed = handle.changed() => changed.is_ok(),
        // The rules are no longer kept after a final error, with which the agent ends, too.
        Ok(()) = rules.changed() => true,
    }
}

impl<'a> Document<'a> {
    pub(crate) fn new(
        status: &'a Status,
        firewall: &'a RulesState,
        info: &'a ProgramInfo,
        now: BootTime,
        log_lines_dropped: u64,
    ) -> Self {
        let kept = info.kept.as_ref();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            overlay: &info.overlay,
            ready: is_ready(status, firewall),
            now,
            store: Store {
                name: &info.store,
                stale: info.is_stale(),
                state_file: kept.map(|kept| kept.path().display().to_string()),
                state_file_error: kept.and_then(|kept| kept.trouble()),
            },
            subnet_file: &info.subnet_file,
            firewall,
            carried: info.carried.devices(),
            log_lines_dropped,
            status,
        }
    }
}

/// Returns what readiness waits for, each with what to do.
pub(crate) fn reasons(status: &Status, rules: &RulesState) -> Vec<String> {
    waits_for(status, rules, |wait| format!("{wait}: {}", wait.remedy()))
}

/// Returns what readiness waits for; `text` formats the overlay's reasons.
fn waits_for(status: &Status, rules: &RulesState, text: impl Fn(&Wait) -> String) -> Vec<String> {
    let mut reasons: Vec<_> = status.waits_for().iter().map(text).collect();
    match rules {
        RulesState::InPlace | RulesState::WithoutForward(_) => {}
        RulesState::Pending if status.phase != Phase::Ready => {}
        RulesState::Pending => reasons.push("the firewall rules".to_owned()),
        RulesState::Failed(error) => reasons.push(format!("the firewall rules ({error})")),
    }
    reasons
}

#[cfg(test)]
mod tests;
