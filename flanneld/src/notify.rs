//! Notifications to the supervisor (sd_notify).

use std::time::Duration;

use flannel_core::overlay::Handle;
use flannel_core::text::{Plain, cut};
use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::status::{changed, is_ready, summary};
use flannel_core::firewall_keeper::RulesState;

/// The minimum time between status lines.
const SPACING: Duration = Duration::from_secs(1);
/// The longest status line, in bytes, without the note that it was cut. systemd drops messages of more than 4096.
const MAX_STATUS: usize = 1024;

/// Sends `READY=1` once, and status lines until the agent ends.
pub(crate) async fn follow(mut handle: Handle, mut rules: watch::Receiver<RulesState>) {
    let (mut ready, mut told) = (false, String::new());
    loop {
        let (line, now_ready, ended) = {
            let (status, rules) = (handle.status(), rules.borrow_and_update());
            (one_line(&summary(&status, &rules)), is_ready(&status, &rules), status.ended.is_some())
        };
        if now_ready && !ready {
            ready = true;
            let status = handle.status();
            let degraded = status.degraded().map(tracing::field::display);
            tracing::info!(target: "flannel::agent", peers = status.peers.accepted, degraded, "ready");
            send(Notification::Ready).await;
        }
        if line != told {
            send(Notification::Status(line.clone())).await;
            told = line;
        }
        if ended {
            return;
        }
        let next = Instant::now() + SPACING;
        if !changed(&mut handle, &mut rules).await {
            return;
        }
        // Until the agent is ready, every change may make it ready.
        if ready {
            sleep_until(next).await;
        }
    }
}

/// Returns a valid status line: a line break in it would begin another message.
fn one_line(summary: &str) -> String {
    let mut line = Plain(summary).to_string();
    cut(&mut line, MAX_STATUS);
    line
}

/// Sends watchdog notifications twice as often as systemd requires, if it does.
pub(crate) async fn watchdog() {
    let mut micros = 0;
    if !sd_notify::watchdog_enabled(false, &mut micros) {
        return;
    }
    let mut ticks = tokio::time::interval(Duration::from_micros((micros / 2).max(1000)));
    loop {
        ticks.tick().await;
        send(Notification::Watchdog).await;
    }
}

pub(crate) async fn stopping() {
    send(Notification::Stopping).await;
}

/// A notification.
enum Notification {
    Ready,
    Status(String),
    Watchdog,
    Stopping,
}

impl Notification {
    fn state(&self) -> NotifyState<'_> {
        match self {
            Self::Ready => NotifyState::Ready,
            Self::Status(line) => NotifyState::Status(line),
            Self::Watchdog => NotifyState::Watchdog,
            Self::Stopping => NotifyState::Stopping,
        }
    }
}

/// Sends a notification to the supervisor. If the supervisor does not read it, only a separate thread waits, not the
/// agent.
async fn send(notification: Notification) {
    let sent = tokio::task::spawn_blocking(move || sd_notify::notify(false, &[notification.state()])).await;
    if let Ok(Err(error)) = sent {
        tracing::warn!(target: "flannel::agent", %error, "cannot notify the supervisor");
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::overlay::{Status, Wait};
    use flannel_core::text::is_plain;

    use super::*;

    #[test]
    fn text_of_others_is_one_plain_line_that_the_supervisor_takes_whole() {
        let mut status = Status::default();
        for hostile in ["x\nMAINPID=1\nREADY=1\u{1b}[2J\u{202e}\r\n", "\u{9b}", "\u{fffd}", "line\n"] {
            status.starting = Some(Wait::Lease { error: Some(hostile.repeat(5000)) });
            let line = one_line(&summary(&status, &RulesState::Pending));
            assert!(line.starts_with("not ready: waiting for a lease ("), "{line}");
            assert!(line.chars().all(is_plain), "{line:?}");
            assert!(line.len() <= MAX_STATUS + 40, "{}", line.len());
        }
    }
}
