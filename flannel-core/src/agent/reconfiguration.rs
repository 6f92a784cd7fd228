//! Whether the configuration in the store is still the one that the agent goes by.

use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;

/// When to ask the store for its configuration: each time that it speaks again, until it has answered.
#[derive(Debug)]
pub(crate) struct Reconfiguration {
    /// When to ask next.
    due: Option<BootTime>,
    under_way: bool,
    /// Whether contact was lost during the question: a state file may have answered it.
    void: bool,
    /// Whether the store has confirmed the configuration that the agent started with.
    confirmed: bool,
    backoff: Backoff,
}

impl Reconfiguration {
    pub(crate) fn new(jitter: Jitter) -> Self {
        Self { due: None, under_way: false, void: false, confirmed: false, backoff: Backoff::new(jitter) }
    }

    /// The store speaks again, or has just refused a lease of the configuration in force.
    pub(crate) fn ask(&mut self) {
        self.due = Some(BootTime::default());
    }

    /// The store is silent: what it would answer is asked once it speaks.
    pub(crate) fn wait(&mut self) {
        (self.due, self.void) = (None, self.under_way);
    }

    pub(crate) fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.due.filter(|_| !self.under_way)
    }

    /// Whether to ask now.
    pub(crate) fn call(&mut self, now: BootTime) -> bool {
        let begins = !self.under_way && self.due.take_if(|due| *due <= now).is_some();
        self.under_way |= begins;
        begins
    }

    /// Whether an answer that has come is the store's own.
    pub(crate) fn takes_answer(&mut self) -> bool {
        self.under_way = false;
        !std::mem::take(&mut self.void)
    }

    /// The store has answered.
    pub(crate) fn answered(&mut self, is_same: bool) {
        self.confirmed |= is_same;
        self.backoff.reset();
    }

    /// There was no answer. It is asked again if it `speaks` otherwise.
    pub(crate) fn unanswered(&mut self, now: BootTime, speaks: bool) {
        if speaks {
            self.due.get_or_insert_with(|| now.after(self.backoff.wait()));
        }
    }
}
