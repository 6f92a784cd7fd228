//! Serialization of values with serde (feature `serde`), for status pages and logs. Names and shapes are stable: a
//! version may add fields and kinds; removals and renames are announced in CHANGELOG.md.
//!
//! | value | shape |
//! |---|---|
//! | addresses, prefixes, MAC addresses, names, keys, families, kernel objects | the text of their `Display` |
//! | a value per family ([`Dual`](crate::net::Dual)) | `{"v4": …, "v6": …}`, absent values left out |
//! | [`BootTime`](crate::clock::BootTime) | seconds since the host was started, as in `/proc/uptime` |
//! | [`NetworkConfig`](crate::config::NetworkConfig) | `{"networks": …, "backend": …, "enable_nftables": …, "document": …}`; `document` is flannel's document with derived values |
//! | [`Reason`] | `{"kind": …, "text": …, "remedy": …}` |
//! | [`Skip`] | `{"kind": …, "text": …}`: the text says what to do |
//! | [`Conflict`](crate::plan::Conflict) | `{"object": …, "found": …, "remedy": …}` |
//! | [`Status`](crate::overlay::Status) | its own field names, plus `ready`, `waits_for` and `degraded`; maps become lists of `{"key": …, "reason": …}` and similar. Each list has the first [`MAX_LISTED`](crate::overlay::Status::MAX_LISTED) items, with a count of all |
//! | states, such as [`UplinkState`](crate::overlay::UplinkState) and [`RulesState`](crate::firewall_keeper::RulesState) | `{"kind": "lost", …}` plus the fields of the kind |
//! | [`Event`](crate::overlay::Event) | `{"kind": …}`, named by [`kind`](crate::overlay::Event::kind), plus the fields of the kind |
//! | [`Preview`](crate::overlay::Preview) | `{"writes": […], "conflicts": […], "conflict_count": …, "deferred": [{"write": …, "reason": …}]}` |
//! | [`PeerRow`](crate::overlay::PeerRow) | `{"key": …, "subnets": …, "public_ip": …, "backend_type": …, "backend_data": …, "expires": …, "state": …, "reason": …}`: a lease with the state, named by [`kind`](crate::overlay::Standing::kind), and the reason for it; what is absent is null |
//!
//! External text is serialized unchanged: a JSON serializer escapes it.
//!
//! [`Reason`]: crate::admit::Reason
//! [`Skip`]: crate::backend::Skip

mod event;
mod peers;
mod plan;
mod status;
#[cfg(test)]
mod tests;
mod values;

use std::fmt::Display;

use serde::Serializer;

/// Serializes a value as the text of its `Display`.
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

/// A value that is serialized as its text.
pub(crate) struct Text<T>(pub(crate) T);

impl<T: Display> serde::Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}
