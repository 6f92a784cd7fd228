//! What the supervisor is told (sd_notify).

use std::time::Duration;

use flannel_core::overlay::{Handle, Phase};
use flannel_core::text::Plain;
use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::firewall::Rulebook;
use crate::status::{is_ready, summary};

/// The status line changes at most so often.
const SPACING: Duration = Duration::from_secs(1);

/// Tells `READY=1` once, and the status line, until the agent ends.
pub(crate) async fn follow(mut handle: Handle, mut rules: watch::Receiver<Rulebook>) {
    let (mut ready, mut told) = (false, String::new());
    loop {
        let (line, now_ready, ended) = {
            let (status, rules) = (handle.status(), rules.borrow_and_update());
            (summary(&status, &rules), is_ready(&status, &rules), status.phase == Phase::Stopped)
        };
        if now_ready && !ready {
            ready = true;
            tracing::info!("ready: {line}");
            tell(&[NotifyState::Ready]);
        }
        if line != told {
            // A line break in it would be the next message.
            tell(&[NotifyState::Status(&Plain(&line).to_string())]);
            told = line;
        }
        if ended {
            return;
        }
        let next = Instant::now() + SPACING;
        tokio::select! {
            changed = handle.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            Ok(()) = rules.changed() => {}
        }
        // Not ready yet: every change may be the one that is waited for.
        if ready {
            sleep_until(next).await;
        }
    }
}

/// Shows that the agent is not stuck, twice as often as systemd asks for, if it does.
pub(crate) async fn watchdog() {
    let mut micros = 0;
    if !sd_notify::watchdog_enabled(false, &mut micros) {
        return;
    }
    let mut ticks = tokio::time::interval(Duration::from_micros((micros / 2).max(1000)));
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::warn!(%error, "the supervisor could not be told");
    }
}
