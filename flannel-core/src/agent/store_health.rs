//! Contact with the lease store: one state, combined from its watch and the calls to it.

use crate::agent::status::Contact;
use crate::clock::BootTime;

/// The source of a report about the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The watch of the leases.
    Watch,
    /// Calls about this node's lease.
    Calls,
}

/// The last error of each source. A success of one does not clear an error of the other: while renewals are denied,
/// events of the watch would otherwise report again and again that the store is back.
#[derive(Debug, Default)]
pub(crate) struct StoreHealth {
    watch: Option<Trouble>,
    calls: Option<Trouble>,
}

#[derive(Debug)]
struct Trouble {
    since: BootTime,
    error: String,
}

impl StoreHealth {
    pub(crate) fn well(&mut self, source: Source) {
        *self.of(source) = None;
    }

    pub(crate) fn trouble(&mut self, source: Source, now: BootTime, error: String) {
        let trouble = self.of(source).get_or_insert_with(|| Trouble { since: now, error: String::new() });
        trouble.error = error;
    }

    /// The state of the watch alone: whether its events come from the store itself.
    pub(crate) fn watch(&self) -> Contact {
        match &self.watch {
            None => Contact::Live,
            Some(trouble) => Contact::Lost { since: trouble.since, error: trouble.error.clone() },
        }
    }

    pub(crate) fn contact(&self) -> Contact {
        match (&self.watch, &self.calls) {
            (None, None) => Contact::Live,
            (Some(one), None) | (None, Some(one)) => Contact::Lost { since: one.since, error: one.error.clone() },
            (Some(watch), Some(calls)) => {
                let error = match watch.error == calls.error {
                    true => watch.error.clone(),
                    false => format!("{}; {}", watch.error, calls.error),
                };
                Contact::Lost { since: watch.since.min(calls.since), error }
            }
        }
    }

    fn of(&mut self, source: Source) -> &mut Option<Trouble> {
        match source {
            Source::Watch => &mut self.watch,
            Source::Calls => &mut self.calls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::samples::at;

    #[test]
    fn contact_is_lost_until_both_are_well() {
        let mut health = StoreHealth::default();
        health.trouble(Source::Calls, at(3), "denied".to_owned());
        health.well(Source::Watch);
        assert_eq!(health.contact(), Contact::Lost { since: at(3), error: "denied".to_owned() });
        health.trouble(Source::Watch, at(5), "cut".to_owned());
        health.trouble(Source::Calls, at(7), "denied again".to_owned());
        assert_eq!(health.contact(), Contact::Lost { since: at(3), error: "cut; denied again".to_owned() });
        health.well(Source::Calls);
        assert_eq!(health.contact(), Contact::Lost { since: at(5), error: "cut".to_owned() });
        health.well(Source::Watch);
        assert_eq!(health.contact(), Contact::Live);
    }
}
