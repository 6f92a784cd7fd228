//! The signals that end a run.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals with which users and systems end a program.
pub(crate) struct Signals([(u8, Signal); 3]);

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        // signal(7): SIGHUP is 1, SIGINT 2 and SIGTERM 15 wherever Linux runs.
        let listen = |number: u8| Ok::<_, io::Error>((number, signal(SignalKind::from_raw(number.into()))?));
        Ok(Self([listen(1)?, listen(2)?, listen(15)?]))
    }

    /// Waits for the next signal and returns its number.
    pub(crate) async fn next(&mut self) -> u8 {
        let [(hup, hangup), (int, interrupt), (term, terminate)] = &mut self.0;
        tokio::select! {
            _ = hangup.recv() => *hup,
            _ = interrupt.recv() => *int,
            _ = terminate.recv() => *term,
        }
    }
}
