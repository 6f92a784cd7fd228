//! The format of a record: flannel's lease JSON with four more fields.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flannel_core::lease::{AttrsError, BadRecord, LeaseAttrs};
use flannel_core::net::{Dual, Family, Prefix};

/// A point in time by the wall clock, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WallTime(pub(crate) u64);

impl WallTime {
    #[expect(clippy::disallowed_methods, reason = "the only clock that the processes of a store share across boots")]
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(millis(since))
    }

    pub(crate) fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }

    /// Returns the time since `earlier`, or zero if `earlier` is later.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The contents of a record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) attrs: LeaseAttrs,
    pub(crate) subnets: Dual<Prefix>,
    /// The generation in which this node took these subnets: a renewal keeps it.
    pub(crate) created: u64,
    /// `None`: never.
    pub(crate) expires: Option<WallTime>,
}

impl Entry {
    pub(crate) fn is_expired(&self, now: WallTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    pub(crate) fn to_json(&self) -> String {
        let mut text = self.attrs.to_json();
        text.pop();
        // Writing to a String cannot fail.
        for (family, subnet) in self.subnets.iter() {
            let _ = write!(text, ",\"{}\":\"{subnet}\"", subnet_key(family));
        }
        let _ = write!(text, ",\"{CREATED}\":{}", self.created);
        if let Some(WallTime(expires)) = self.expires {
            let _ = write!(text, ",\"{EXPIRES}\":{expires}");
        }
        text.push_str("}\n");
        text
    }

    /// Reads a record as flannel does: keys match case-insensitively, the last of duplicate keys wins, unknown ones are
    /// ignored. The error contains the subnets that could be read.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, BadRecord> {
        let mut others = Others::default();
        let attrs = LeaseAttrs::from_json_with(bytes, |key, value| others.set(key, value));
        if let Err(error @ (AttrsError::TooLarge(_) | AttrsError::Json(_))) = attrs {
            return Err(BadRecord::new(error, Dual::default()));
        }
        let Others { subnets, created, expires } = others;
        let known =
            |subnet: &Option<Result<Prefix, String>>| subnet.as_ref().and_then(|subnet| subnet.as_ref().ok().copied());
        let known = Dual { v4: known(&subnets.v4), v6: known(&subnets.v6) };
        let bad = |reason: String| BadRecord::new(reason, known);
        if let Some(Err(reason)) = [subnets.v4, subnets.v6].into_iter().flatten().find(Result::is_err) {
            return Err(bad(reason));
        }
        if known.is_empty() {
            return Err(bad("neither $.Subnet nor $.IPv6Subnet is given".to_owned()));
        }
        let attrs = attrs.map_err(|error| bad(error.to_string()))?;
        let created = created.unwrap_or_else(|| Err(format!("$.{CREATED} is missing"))).map_err(bad)?;
        let expires = expires.transpose().map_err(bad)?.map(WallTime);
        Ok(Self { attrs, subnets: known, created, expires })
    }
}

/// The members of a record that are not lease attributes, each with its value or what is wrong with it.
#[derive(Default)]
struct Others {
    subnets: Dual<Result<Prefix, String>>,
    created: Option<Result<u64, String>>,
    expires: Option<Result<u64, String>>,
}

impl Others {
    fn set(&mut self, key: &str, value: &str) {
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        // Has no effect, as in Go.
        if value == "null" {
            return;
        }
        if let Some(family) = Family::BOTH.into_iter().find(|family| is(subnet_key(*family))) {
            *self.subnets.slot(family) = Some(subnet(family, value));
        } else if is(CREATED) {
            self.created = Some(number(CREATED, value));
        } else if is(EXPIRES) {
            self.expires = Some(number(EXPIRES, value));
        }
    }
}

const CREATED: &str = "Created";
const EXPIRES: &str = "ExpiresUnixMs";

fn subnet_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "Subnet",
        Family::V6 => "IPv6Subnet",
    }
}

fn subnet(family: Family, value: &str) -> Result<Prefix, String> {
    let key = subnet_key(family);
    let text: String = serde_json::from_str(value).map_err(|_| format!("$.{key}: {value} is not a string"))?;
    let subnet: Prefix = text.parse().map_err(|error| format!("$.{key}: {error}"))?;
    if subnet.family() != family {
        return Err(format!("$.{key}: {subnet} is not {family}"));
    }
    Ok(subnet)
}

fn number(key: &str, value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("$.{key}: {value} is not a whole number, 0 or more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = concat!(
        r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1},"#,
        r#""Subnet":"10.5.3.0/24","IPv6Subnet":"fd00:5:0:3::/64","Created":7,"ExpiresUnixMs":1767225600000}"#,
        "\n"
    );

    #[test]
    fn a_record_round_trips_byte_for_byte_and_is_flannels_lease_too() {
        let entry = Entry::from_json(TEXT.as_bytes()).unwrap();
        assert_eq!(entry.to_json(), TEXT);
        assert_eq!(LeaseAttrs::from_json(TEXT.as_bytes()).unwrap(), entry.attrs);
        assert!(entry.is_expired(WallTime(1_767_225_600_000)) && !entry.is_expired(WallTime(1_767_225_599_999)));
        let never = Entry { expires: None, ..entry };
        assert_eq!(Entry::from_json(never.to_json().as_bytes()), Ok(never));
    }

    #[test]
    fn what_is_bad_says_where_and_keeps_the_subnets_that_can_be_read() {
        let subnet: Prefix = "10.5.3.0/24".parse().unwrap();
        for (text, names, known) in [
            ("", "JSON", None),
            (r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"#, "JSON", None),
            ("[]", "JSON", None),
            (r#"{"PublicIP":"1.2.3.4","Created":1}"#, "$.Subnet", None),
            (r#"{"PublicIP":"1.2.3.4","Subnet":"10.5.3.1/24","Created":1}"#, "$.Subnet", None),
            (r#"{"PublicIP":"1.2.3.4","Subnet":"fd00::/64","Created":1}"#, "$.Subnet", None),
            (r#"{"PublicIP":"1.2.3.4","Subnet":7,"Created":1}"#, "$.Subnet", None),
            (r#"{"PublicIP":7,"Subnet":"10.5.3.0/24","Created":1}"#, "PublicIP", Some(subnet)),
            (r#"{"PublicIP":"1.2.3.4","Subnet":"10.5.3.0/24"}"#, "$.Created", Some(subnet)),
            (r#"{"PublicIP":"1.2.3.4","Subnet":"10.5.3.0/24","Created":-1}"#, "$.Created", Some(subnet)),
            (
                r#"{"PublicIP":"1.2.3.4","Subnet":"10.5.3.0/24","Created":1,"ExpiresUnixMs":"x"}"#,
                "$.ExpiresUnixMs",
                Some(subnet),
            ),
            (
                r#"{"PublicIP":"1.2.3.4","Subnet":"10.5.3.0/24","IPv6Subnet":"x","Created":1}"#,
                "$.IPv6Subnet",
                Some(subnet),
            ),
        ] {
            let bad = Entry::from_json(text.as_bytes()).unwrap_err();
            assert!(bad.reason.contains(names), "{text}: {}", bad.reason);
            assert_eq!(bad.subnets.v4, known, "{text}");
        }
        let large = format!("{TEXT}{}", " ".repeat(LeaseAttrs::MAX_BYTES));
        assert!(Entry::from_json(large.as_bytes()).unwrap_err().reason.contains("4096"));
    }
}
