//! Values as serde serializes them (feature `serde`), for status pages and logs. Names and shapes are stable: a version may
//! add fields and kinds, and does not rename or remove any without saying so in CHANGELOG.md.
//!
//! | value | shape |
//! |---|---|
//! | addresses, prefixes, MAC addresses, names, keys, families, kernel objects | the text that their `Display` writes |
//! | a value of each family ([`Dual`](crate::net::Dual)) | `{"v4": …, "v6": …}`, each left out where there is none |
//! | [`BootTime`](crate::clock::BootTime) | seconds since the host was started, as `/proc/uptime` counts them |
//! | [`Reason`] | `{"kind": …, "text": …, "remedy": …}` |
//! | [`Skip`] | `{"kind": …, "text": …}`: the text says what to do |
//! | [`Conflict`](crate::plan::Conflict) | `{"object": …, "found": …, "remedy": …}` |
//! | [`Status`](crate::overlay::Status) | its own names, with `ready`, `waits_for` and `degraded`; maps are lists of `{"key": …, "reason": …}` and the like. Of each list the first [`MAX_LISTED`](crate::overlay::Status::MAX_LISTED), with a count of all |
//! | states, as [`UplinkState`](crate::overlay::UplinkState) and [`RulesState`](crate::firewall_keeper::RulesState) | `{"kind": "lost", …}` with what belongs to the kind |
//! | [`Event`](crate::overlay::Event) | `{"kind": …}` with what belongs to the kind, named by [`kind`](crate::overlay::Event::kind) |
//! | [`Preview`](crate::overlay::Preview) | `{"writes": […], "conflicts": […], "conflict_count": …, "held": [{"write": …, "reason": …}]}` |
//!
//! Texts from outside are as they came: a JSON serializer escapes them.
//!
//! [`Reason`]: crate::admit::Reason
//! [`Skip`]: crate::backend::Skip

mod event;
mod plan;
mod status;
#[cfg(test)]
mod tests;
mod values;

use std::fmt::Display;

use serde::Serializer;

/// Serializes a value as the text that its `Display` writes.
macro_rules! as_text {
    ($($kind:ty),+ $(,)?) => {
        $(impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        })+
    };
}
pub(crate) use as_text;

/// A value that is serialized as its text, in place of a shape of its own.
pub(crate) struct Text<T>(pub(crate) T);

impl<T: Display> serde::Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}
