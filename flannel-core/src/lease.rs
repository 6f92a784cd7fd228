//! Leases, the attributes that nodes publish in them, and the records of a lease store.

mod bounds;
mod fence;
mod json;
mod key;

use std::fmt::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::{Arc, LazyLock};

use crate::clock::BootTime;
use crate::net::{Dual, Family, Prefix};
use crate::text::{Cut, Plain};

pub use bounds::{Dropped, MAX_RECORDS, OldestRecords, RECORD_BYTES, is_complete, keep_oldest, weight};
pub use fence::Fence;
pub(crate) use json::Text;
pub use json::{Json, JsonError, Scalar};
pub use key::LeaseKey;

/// What a node publishes: how to reach it (docs/compatibility.md, "Lease attributes").
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct LeaseAttrs {
    /// The addresses peers send to, one per family.
    pub public_ip: Dual<IpAddr>,
    /// [`Backend::wire_type`](crate::backend::Backend::wire_type); empty for udp and alloc.
    pub backend_type: Arc<str>,
    /// The data the backend publishes about this node, one value per family (`BackendData`, `BackendV6Data`).
    pub backend_data: Dual<Json>,
}

/// The text is not the JSON of lease attributes. Final for this record: its writer has to correct it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttrsError {
    /// Larger than [`LeaseAttrs::MAX_BYTES`].
    #[error("record of {0} bytes is larger than {max}", max = LeaseAttrs::MAX_BYTES)]
    TooLarge(usize),
    /// Not a JSON object, or a field has the wrong type.
    #[error("lease JSON: {}", Plain(.0))]
    Json(String),
    /// A field has an invalid value.
    #[error("lease field {field} is {found:?}, expected {expected}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// The value found, cut to 64 characters.
        found: String,
        /// The value expected.
        expected: &'static str,
    },
}

impl LeaseAttrs {
    /// The largest record accepted, in bytes (docs/design.md, "Hostile records").
    pub const MAX_BYTES: usize = 4096;

    /// Creates attributes with addresses and without a backend.
    pub fn new(public_ip: Dual<IpAddr>) -> Self {
        Self { public_ip, ..Self::default() }
    }

    /// Sets the backend [type](Self::backend_type) and its data.
    #[must_use]
    pub fn with_backend(self, backend_type: impl Into<Arc<str>>, backend_data: Dual<Json>) -> Self {
        Self { backend_type: backend_type.into(), backend_data, ..self }
    }

    /// Returns a name for [`backend_type`](Self::backend_type). Known names share one allocation: ten thousand records
    /// use only a handful of names.
    pub fn backend_name(text: &str) -> Arc<str> {
        static KNOWN: LazyLock<[Arc<str>; 5]> =
            LazyLock::new(|| ["vxlan", "host-gw", "", "wireguard", "ipip"].map(Arc::from));
        KNOWN.iter().find(|known| &***known == text).cloned().unwrap_or_else(|| text.into())
    }

    /// Returns whether only addresses are set. An operator writes such attributes to reserve subnets for a node before
    /// it has a lease.
    pub fn are_addresses_alone(&self) -> bool {
        self.backend_type.is_empty() && self.backend_data.is_empty()
    }

    /// Returns the JSON text, byte for byte as flannel writes it (docs/compatibility.md, "Lease attributes").
    pub fn to_json(&self) -> String {
        let v4 = match self.public_ip.v4 {
            Some(addr) => addr,
            None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let mut text = format!("{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":");
        // Writing to a String cannot fail.
        let _ = match self.public_ip.v6 {
            Some(addr) => write!(text, "\"{addr}\""),
            None => write!(text, "null"),
        };
        if !self.backend_type.is_empty() {
            let quoted = serde_json::Value::from(&*self.backend_type);
            let _ = write!(text, ",\"BackendType\":{quoted}");
        }
        for (field, data) in [("BackendData", &self.backend_data.v4), ("BackendV6Data", &self.backend_data.v6)] {
            if let Some(data) = data {
                let _ = write!(text, ",\"{field}\":{}", data.as_str());
            }
        }
        text.push('}');
        text
    }

    /// Parses attributes that flannel or flannelkit wrote. Keys match in any case, unknown keys are ignored, and the
    /// last of duplicate keys wins. As in Go, bytes that are not UTF-8 are read as U+FFFD.
    ///
    /// # Errors
    /// [`AttrsError`] names the field. Final for this record.
    pub fn from_json(bytes: &[u8]) -> Result<Self, AttrsError> {
        Self::from_json_with(bytes, |_, _| {})
    }

    /// Parses attributes as [`from_json`](Self::from_json) does, and passes each other member of the object to `other`,
    /// in the order of the text: its key, and its value as JSON text.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json). With [`AttrsError::Field`], `other` has received all other members.
    pub fn from_json_with(bytes: &[u8], mut other: impl FnMut(&str, &str)) -> Result<Self, AttrsError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(AttrsError::TooLarge(bytes.len()));
        }
        let text = String::from_utf8_lossy(bytes);
        // U+FFFD is longer than the byte that it replaces.
        if text.len() > Self::MAX_BYTES {
            return Err(AttrsError::TooLarge(text.len()));
        }
        wire::Attrs::parse(&text, &mut other).map_err(|error| AttrsError::Json(error.to_string()))?.check()
    }
}

mod wire {
    use std::borrow::Cow;

    use serde::de::{Deserializer, MapAccess, Visitor};
    use serde_json::value::RawValue;

    use super::*;

    /// The fields as they appear in the text.
    #[derive(Default)]
    pub(super) struct Attrs<'a> {
        public_ip: Option<&'a RawValue>,
        public_ipv6: Option<&'a RawValue>,
        backend_type: Option<&'a RawValue>,
        backend_data: Option<&'a RawValue>,
        backend_v6_data: Option<&'a RawValue>,
    }

    /// Holds the function that receives the other members.
    struct AttrsVisitor<'f, F>(&'f mut F);

    impl<'de, F: FnMut(&str, &str)> Visitor<'de> for AttrsVisitor<'_, F> {
        type Value = Attrs<'de>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object with PublicIP")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Attrs<'de>, A::Error> {
            let mut attrs = Attrs::default();
            while let Some((Text(key), value)) = map.next_entry::<_, &RawValue>()? {
                match attrs.field(&key) {
                    Some(field) => *field = Some(value),
                    None => (self.0)(&key, value.get()),
                }
            }
            Ok(attrs)
        }
    }

    impl<'a> Attrs<'a> {
        pub(super) fn parse(text: &'a str, other: &mut impl FnMut(&str, &str)) -> serde_json::Result<Self> {
            let mut document = serde_json::Deserializer::from_str(text);
            let attrs = document.deserialize_map(AttrsVisitor(other))?;
            document.end()?;
            Ok(attrs)
        }

        fn field(&mut self, key: &str) -> Option<&mut Option<&'a RawValue>> {
            let fields = [
                ("PublicIP", &mut self.public_ip),
                ("PublicIPv6", &mut self.public_ipv6),
                ("BackendType", &mut self.backend_type),
                ("BackendData", &mut self.backend_data),
                ("BackendV6Data", &mut self.backend_v6_data),
            ];
            fields.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value)
        }

        pub(super) fn check(self) -> Result<LeaseAttrs, AttrsError> {
            let mut attrs = LeaseAttrs::default();
            let v4: Option<Ipv4Addr> = address("PublicIP", self.public_ip, IPV4_TEXT)?;
            let v4 = v4.ok_or_else(|| mistyped("PublicIP", self.public_ip, IPV4_TEXT))?;
            attrs.public_ip.v4 = (!v4.is_unspecified()).then_some(v4.into());
            let v6: Option<Ipv6Addr> = address("PublicIPv6", self.public_ipv6, "IPv6 text or null")?;
            attrs.public_ip.v6 = v6.filter(|addr| !addr.is_unspecified()).map(IpAddr::V6);
            if let Some(kind) = text("BackendType", self.backend_type, "a string")? {
                attrs.backend_type = LeaseAttrs::backend_name(&kind);
            }
            for (family, data) in [(Family::V4, self.backend_data), (Family::V6, self.backend_v6_data)] {
                *attrs.backend_data.slot(family) = data.map(Json::of_raw).filter(|data| !data.is_null());
            }
            Ok(attrs)
        }
    }

    const IPV4_TEXT: &str = "dotted IPv4 text";

    /// Reads a string; `null` is absent.
    fn text<'a>(
        field: &'static str,
        found: Option<&'a RawValue>,
        expected: &'static str,
    ) -> Result<Option<Cow<'a, str>>, AttrsError> {
        let Some(raw) = found.filter(|raw| raw.get() != Json::NULL) else { return Ok(None) };
        let Text(text) = serde_json::from_str(raw.get()).map_err(|_| mistyped(field, found, expected))?;
        Ok(Some(text))
    }

    fn address<T: FromStr>(
        field: &'static str,
        found: Option<&RawValue>,
        expected: &'static str,
    ) -> Result<Option<T>, AttrsError> {
        let addr = text(field, found, expected)?.map(|text| text.parse());
        addr.transpose().map_err(|_| mistyped(field, found, expected))
    }

    fn mistyped(field: &'static str, found: Option<&RawValue>, expected: &'static str) -> AttrsError {
        let found = found.map_or(Json::NULL, RawValue::get);
        AttrsError::Field { field, found: found.chars().take(64).collect(), expected }
    }
}

/// A subnet of the network that one node has leased, usually for a limited time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// The store's name for it.
    pub key: LeaseKey,
    /// The subnet of each family.
    pub subnets: Dual<Prefix>,
    /// How to reach the node that holds the lease.
    pub attrs: LeaseAttrs,
    /// When the lease expires unless renewed; `None` if the store has no expiry.
    pub expires: Option<BootTime>,
    /// The token that the store compares before the next write.
    pub fence: Fence,
}

impl Lease {
    /// Creates a lease without expiry and with an empty fence.
    pub fn new(key: LeaseKey, subnets: Dual<Prefix>, attrs: LeaseAttrs) -> Self {
        Self { key, subnets, attrs, expires: None, fence: Fence::default() }
    }

    /// Sets the expiry.
    #[must_use]
    pub fn expiring(self, expires: Option<BootTime>) -> Self {
        Self { expires, ..self }
    }

    /// Sets the fence.
    #[must_use]
    pub fn fenced(self, fence: Fence) -> Self {
        Self { fence, ..self }
    }

    /// Sets the attributes.
    #[must_use]
    pub fn publishing(self, attrs: LeaseAttrs) -> Self {
        Self { attrs, ..self }
    }
}

/// A record in a store that does not parse. It counts as present and bad, never as absent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BadRecord {
    /// What is wrong, as text for people.
    pub reason: String,
    /// The subnets that the record's key names, if any: a bad record does not cause routes there to be deleted.
    pub subnets: Dual<Prefix>,
}

impl BadRecord {
    /// The maximum length of a reason, in bytes. A reason may quote a long part of a hostile record.
    pub const MAX_BYTES: usize = 160;

    /// Creates a bad record with this reason, cut to [`MAX_BYTES`](Self::MAX_BYTES).
    pub fn new(reason: impl fmt::Display, subnets: Dual<Prefix>) -> Self {
        Self { reason: Self::cut(reason), subnets }
    }

    /// Returns the text of a reason, cut to [`MAX_BYTES`](Self::MAX_BYTES).
    pub(crate) fn cut(reason: impl fmt::Display) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = write!(Cut::new(&mut text, Self::MAX_BYTES), "{reason}");
        text
    }
}

/// One entry of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The store's name for it.
    pub key: LeaseKey,
    /// The store's order of creation (etcd: create revision; Kubernetes: creation timestamp; files: generation). Of two
    /// conflicting records, the older wins on every node.
    pub created: u64,
    /// The lease, or why the record is bad.
    pub lease: Result<Arc<Lease>, Box<BadRecord>>,
}

impl Record {
    /// Creates the record of a lease, under the lease's key.
    pub fn of(lease: Lease, created: u64) -> Self {
        Self { key: lease.key.clone(), created, lease: Ok(Arc::new(lease)) }
    }

    /// Creates a record that does not parse.
    pub fn bad(key: LeaseKey, created: u64, bad: BadRecord) -> Self {
        Self { key, created, lease: Err(Box::new(bad)) }
    }
}

/// An event from a watch of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// A complete list: a record that is not listed does not exist, unless the list counts as more than [`MAX_RECORDS`]
    /// (see [`is_complete`]).
    Reset(Vec<Record>),
    /// A record appeared or changed.
    Upsert(Record),
    /// A record was deleted.
    Remove(LeaseKey),
    /// The watch works again after an error that it reported, and no event was missed.
    Resumed,
    /// The store's settings for this node, apart from its record, changed. Holds the addresses to publish now
    /// ([`ThisNode::public`](crate::subnet::ThisNode::public)). An agent without a lease tries to acquire one again; an
    /// agent with a lease renews it. A store that keeps such settings also sends this event after each `Reset`.
    ThisNode(Dual<IpAddr>),
    /// The network's configuration may have changed. The agent reads it again, and shows in its status if it differs
    /// from the one in force. A store that cannot detect such changes never sends this event; the agent then reads the
    /// configuration when contact with the store is restored. It may come before the first `Reset`, and while the store
    /// does not answer.
    ConfigChanged,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_wrong_with_a_record_is_told_in_a_bounded_text() {
        let bad = BadRecord::new("é".repeat(1 << 20), Dual::default());
        assert_eq!(bad.reason.len(), BadRecord::MAX_BYTES);
        assert_eq!(BadRecord::new("no JSON", Dual::default()).reason, "no JSON");
    }

    const VXLAN: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn attributes_round_trip_byte_for_byte() {
        let dual = r#"{"PublicIP":"10.0.0.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":1},"BackendV6Data":{"VNI":2}}"#;
        for text in [VXLAN, dual, r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#] {
            assert_eq!(LeaseAttrs::from_json(text.as_bytes()).unwrap().to_json(), text);
        }
    }

    #[test]
    fn attribute_keys_match_in_any_case_and_unknown_ones_are_ignored() {
        let attrs =
            LeaseAttrs::from_json(br#"{"publicip":"1.2.3.4","Extra":{"a":[1]},"BACKENDTYPE":"vxlan"}"#).unwrap();
        assert_eq!(attrs.public_ip.v4, Some("1.2.3.4".parse().unwrap()));
        assert_eq!(&*attrs.backend_type, "vxlan");
    }

    #[test]
    fn other_members_are_passed_on_also_beside_a_wrong_field() {
        let read = |text: &str| {
            let mut others = Vec::new();
            let attrs = LeaseAttrs::from_json_with(text.as_bytes(), |key, value| others.push(format!("{key}={value}")));
            (attrs.is_ok(), others.join(" "))
        };
        let others = r#""a":7, "BackendType":"x", "\u0062": [1, "c"], "a":null"#;
        assert_eq!(
            read(&format!(r#"{{"publicip":"1.2.3.4",{others}}}"#)),
            (true, r#"a=7 b=[1, "c"] a=null"#.to_owned())
        );
        assert_eq!(read(&format!(r#"{{"PublicIP":7,{others}}}"#)), (false, r#"a=7 b=[1, "c"] a=null"#.to_owned()));
    }

    #[test]
    fn bytes_that_are_not_utf8_are_replaced_as_in_go() {
        let text = |bytes: &[u8]| [br#"{"PublicIP":"1.2.3.4","BackendType":"a"#, bytes, br#"b"}"#].concat();
        let attrs = LeaseAttrs::from_json(&text(b"\xff")).unwrap();
        assert_eq!(&*attrs.backend_type, "a\u{fffd}b");
        assert_eq!(LeaseAttrs::from_json(attrs.to_json().as_bytes()), Ok(attrs));
        // Each is replaced by three bytes.
        let long = text(&[0xff; LeaseAttrs::MAX_BYTES / 2]);
        assert!(matches!(LeaseAttrs::from_json(&long), Err(AttrsError::TooLarge(len)) if len > LeaseAttrs::MAX_BYTES));
    }

    #[test]
    fn attributes_that_are_not_what_they_must_be_are_named() {
        for (text, names) in [
            ("", "lease JSON"),
            ("[]", "lease JSON"),
            ("{}", "PublicIP"),
            (r#"{"PublicIP":null}"#, "PublicIP"),
            (r#"{"PublicIP":"2001:db8::1"}"#, "PublicIP"),
            (r#"{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}"#, "PublicIPv6"),
            (r#"{"PublicIP":"1.2.3.4","BackendType":7}"#, "BackendType"),
            (r#"{"PublicIP":"1.2.3.4"} x"#, "lease JSON"),
        ] {
            let error = LeaseAttrs::from_json(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(names), "{text}: {error}");
        }
        let large = format!(r#"{{"PublicIP":"1.2.3.4","x":"{}"}}"#, "x".repeat(5000));
        assert!(matches!(LeaseAttrs::from_json(large.as_bytes()), Err(AttrsError::TooLarge(_))));
    }

    const DATA: &str =
        "(\\{\"VNI\":[1-9][0-9]{0,6}, \"VtepMAC\":\"[0-9a-f:]{0,17}\"\\}|\"\\\\u00[0-9a-f]{2}\"|\\[\\[1\\],null\\])";

    proptest! {
        #[test]
        fn what_is_published_reads_back(
            v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>, kind in "[\\PC\n\"\\\\]{0,12}",
            data in proptest::option::of(DATA), v6_data in proptest::option::of(DATA),
        ) {
            let json = |text: Option<String>| text.map(|text| Json::parse(&text).unwrap());
            let attrs = LeaseAttrs {
                public_ip: Dual {
                    v4: v4.filter(|addr| !addr.is_unspecified()).map(IpAddr::V4),
                    v6: v6.filter(|addr| !addr.is_unspecified()).map(IpAddr::V6),
                },
                backend_type: kind.as_str().into(),
                backend_data: Dual { v4: json(data), v6: json(v6_data) },
            };
            prop_assert_eq!(LeaseAttrs::from_json(attrs.to_json().as_bytes()), Ok(attrs));
        }

        #[test]
        fn any_text_is_read_or_refused(
            fields in proptest::collection::vec("\"(PublicIP|publicipv6|BackendType|BackendData|x)\":(null|7|\"\\PC{0,9}\"|\"1.2.3.4\"|\\[\\])", 0..6),
            text in "\\PC{0,40}",
        ) {
            for text in [format!("{{{}}}", fields.join(",")), text] {
                if let Ok(attrs) = LeaseAttrs::from_json(text.as_bytes()) {
                    prop_assert_eq!(LeaseAttrs::from_json(attrs.to_json().as_bytes()), Ok(attrs));
                }
            }
        }
    }
}
