//! The format of a record: flannel's lease JSON with four more fields.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flannel_core::config::Object;
use flannel_core::lease::{BadRecord, LeaseAttrs};
use flannel_core::net::{Dual, Family, Prefix};

/// A point in time by the wall clock, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

    /// Reads a record as flannel does: keys match case-insensitively, unknown ones are ignored. The error contains the
    /// subnets that could be read.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, BadRecord> {
        let bad = |reason: String| BadRecord::new(reason, Dual::default());
        if bytes.len() > LeaseAttrs::MAX_BYTES {
            return Err(bad(format!("larger than {} bytes", LeaseAttrs::MAX_BYTES)));
        }
        let object = Object::parse(bytes).map_err(|error| bad(error.to_string()))?;
        let mut subnets = Dual::default();
        let mut wrong = None;
        for family in Family::BOTH {
            match subnet(&object, family) {
                Ok(subnet) => *subnets.slot(family) = subnet,
                Err(reason) => wrong = Some(reason),
            }
        }
        let bad = |reason: String| BadRecord::new(reason, subnets);
        if let Some(reason) = wrong {
            return Err(bad(reason));
        }
        if subnets.is_empty() {
            return Err(bad("neither $.Subnet nor $.IPv6Subnet is given".to_owned()));
        }
        let attrs = LeaseAttrs::from_json(bytes).map_err(|error| bad(error.to_string()))?;
        let created = object.u64(CREATED).map_err(|error| bad(error.to_string()))?;
        let created = created.ok_or_else(|| bad(format!("$.{CREATED} is missing")))?;
        let expires = object.u64(EXPIRES).map_err(|error| bad(error.to_string()))?.map(WallTime);
        Ok(Self { attrs, subnets, created, expires })
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

fn subnet(object: &Object, family: Family) -> Result<Option<Prefix>, String> {
    let key = subnet_key(family);
    let Some(text) = object.string(key).map_err(|error| error.to_string())? else { return Ok(None) };
    let subnet: Prefix = text.parse().map_err(|error| format!("{}: {error}", object.path_of(key)))?;
    if subnet.family() != family {
        return Err(format!("{}: {subnet} is not {family}", object.path_of(key)));
    }
    Ok(Some(subnet))
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
