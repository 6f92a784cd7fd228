//! Contact with the lease store: one state, out of what its watch says and what calls to it say.

use crate::agent::status::Contact;
use crate::clock::BootTime;

/// Who speaks of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Voice {
    /// The watch of the leases.
    Watch,
    /// Calls about the own lease.
    Calls,
}

/// The last word of each. One that is well does not make up for the other: while renewals are denied, events of the
/// watch would otherwise say over and over that the store is back.
#[derive(Debug, Default)]
pub(crate) struct Words {
    watch: Option<Trouble>,
    calls: Option<Trouble>,
}

#[derive(Debug)]
struct Trouble {
    since: BootTime,
    error: String,
}

impl Words {
    pub(crate) fn well(&mut self, voice: Voice) {
        *self.of(voice) = None;
    }

    pub(crate) fn trouble(&mut self, voice: Voice, now: BootTime, error: String) {
        let trouble = self.of(voice).get_or_insert_with(|| Trouble { since: now, error: String::new() });
        trouble.error = error;
    }

    /// What the watch says, whatever becomes of calls: whether what it shows is the store's own word.
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

    fn of(&mut self, voice: Voice) -> &mut Option<Trouble> {
        match voice {
            Voice::Watch => &mut self.watch,
            Voice::Calls => &mut self.calls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(secs: u64) -> BootTime {
        BootTime(Duration::from_secs(secs))
    }

    #[test]
    fn contact_is_lost_until_both_are_well() {
        let mut words = Words::default();
        words.trouble(Voice::Calls, at(3), "denied".to_owned());
        words.well(Voice::Watch);
        assert_eq!(words.contact(), Contact::Lost { since: at(3), error: "denied".to_owned() });
        words.trouble(Voice::Watch, at(5), "cut".to_owned());
        words.trouble(Voice::Calls, at(7), "denied again".to_owned());
        assert_eq!(words.contact(), Contact::Lost { since: at(3), error: "cut; denied again".to_owned() });
        words.well(Voice::Calls);
        assert_eq!(words.contact(), Contact::Lost { since: at(5), error: "cut".to_owned() });
        words.well(Voice::Watch);
        assert_eq!(words.contact(), Contact::Live);
    }
}
