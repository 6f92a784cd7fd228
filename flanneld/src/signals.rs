//! SIGTERM and SIGINT: the first signal starts an orderly shutdown, the second kills the process.

use std::io;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use tokio_util::sync::CancellationToken;

/// How long an orderly shutdown may take. After that the process exits; the data plane stays up in any case.
const DEADLINE: Duration = Duration::from_millis(1900);

/// Blocks the signals for all threads that start later, and starts the thread that waits for them. Children get them
/// unblocked.
pub(crate) fn watch(cancel: CancellationToken) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block()?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        tracing::info!(signal = signal.as_str(), "ending; the data plane stays up");
        cancel.cancel();
        // From here on a signal has its default action, on this thread.
        if signals.thread_unblock().is_err() {
            tracing::warn!("a second signal will not end the program");
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
