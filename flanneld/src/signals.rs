//! SIGTERM and SIGINT: the first signal starts an orderly shutdown, the second kills the process. SIGHUP and SIGUSR1 are
//! ignored, with a log line.

use std::io;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use tokio_util::sync::CancellationToken;

/// How long an orderly shutdown may take. After that the process exits; the data plane stays up in any case.
const DEADLINE: Duration = Duration::from_millis(1900);

/// Blocks the signals for all threads that start later, and starts the thread that waits for them. Child
/// processes inherit the blocked signals, so only SIGKILL ends them.
pub(crate) fn watch(cancel: CancellationToken) -> io::Result<()> {
    let ignored = [Signal::SIGHUP, Signal::SIGUSR1];
    let ends: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    let signals: SigSet = ends.iter().chain(ignored).collect();
    signals.thread_block()?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let signal = loop {
            let Ok(signal) = signals.wait() else { return };
            if !ignored.contains(&signal) {
                break signal;
            }
            let remedy = "restart flanneld to change its flags";
            tracing::info!(
                target: "flannel::agent",
                signal = signal.as_str(),
                remedy,
                "signal ignored: nothing to reload"
            );
        };
        tracing::info!(target: "flannel::agent", signal = signal.as_str(), "stopping; devices and routes stay");
        cancel.cancel();
        // From here on a signal has its default action, on this thread.
        if ends.thread_unblock().is_err() {
            tracing::warn!(target: "flannel::agent", "a second signal will not end the program");
        }
        thread::sleep(DEADLINE);
        cut_off();
    })?;
    Ok(())
}

#[expect(clippy::exit, reason = "whoever asked for the end must not wait for what hangs")]
fn cut_off() {
    std::process::exit(0)
}
