//! The state file's format: one JSON object, version 1.
//!
//! ```json
//! {"version":1,"origin":"…","saved_unix_ms":0,"allocation":"pool","config":{…},
//!  "this_node":{"name":"…","public":["…"]},
//!  "own":{"node":"…","key":"…","subnets":["…"],"attrs":{…},"expires_unix_ms":0,"fence":"…"},
//!  "records":[{"key":"…","created":1,"subnets":["…"],"attrs":{…}},{"key":"…","created":2,"subnets":[],"bad":"…"}]}
//! ```
//!
//! `config` is [`NetworkConfig::to_json`], `attrs` [`LeaseAttrs::to_json`]. `this_node` is left out if it is not known,
//! or contains nothing because the node is identified by its address. Fence and expiry of other nodes' records are not
//! needed here and not kept.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flannel_core::clock::BootTime;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, OldestRecords, Record};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::known::{Entry, Known, Own};

const VERSION: u64 = 1;
/// How far the wall clock may have been set back since the file was written; beyond that it cannot show whether a lease
/// has expired.
const SET_BACK: u64 = 60_000;

/// Writes `known`, which has to be complete. `now` and `wall` are the same point in time.
pub(crate) fn write(
    to: &mut dyn Write,
    known: &Known,
    origin: &str,
    now: BootTime,
    wall: SystemTime,
) -> io::Result<()> {
    let (Some(config), Some(records)) = (&known.config, &known.records) else {
        return Err(io::Error::other("nothing to keep yet"));
    };
    let saved_unix_ms = millis_of(wall);
    let own = match &known.own {
        Own::Unasked | Own::None | Own::Doubted(..) => None,
        Own::Held(node, lease) => {
            Holding::of(node, lease, |expires| saved_unix_ms.saturating_add(millis(expires.since(now))))
        }
    };
    let document = Document {
        version: VERSION,
        origin: origin.into(),
        saved_unix_ms,
        allocation: AllocationText::of(config),
        config: raw(config.to_json())?,
        this_node: known.this_node.as_ref().and_then(NodeText::of),
        own,
        records: Records(Cow::Borrowed(records)),
    };
    serde_json::to_writer(&mut *to, &document)?;
    to.write_all(b"\n")
}

/// Parses the file, or returns the reason why it is unusable.
pub(crate) fn parse(bytes: &[u8], origin: &str, now: BootTime, wall: SystemTime) -> Result<Known, String> {
    let head: Head = serde_json::from_slice(bytes).map_err(|error| format!("it is corrupt: {error}"))?;
    if head.version != VERSION {
        return Err(format!("it has version {}, and this program reads version {VERSION}", head.version));
    }
    let document: Document<'_> = serde_json::from_slice(bytes).map_err(|error| format!("it is corrupt: {error}"))?;
    if document.origin != origin {
        return Err(format!("it is of another store: {:?}, and this is {origin:?}", document.origin));
    }
    let allocation = document.allocation.value();
    let config = NetworkConfig::parse(document.config.get().as_bytes(), allocation);
    let config = config.map_err(|error| format!("it is corrupt: configuration: {error}"))?;
    let time = Time { saved: document.saved_unix_ms, wall: millis_of(wall), now };
    let own = match document.own {
        None => Own::None,
        Some(own) => own.read(&time)?,
    };
    Ok(Known {
        this_node: document.this_node.map(NodeText::read).transpose()?,
        config: Some(config),
        own,
        records: Some(document.records.0.into_owned().into_iter().collect()),
        asked: None,
    })
}

#[derive(Deserialize)]
struct Head {
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    version: u64,
    #[serde(borrow)]
    origin: Cow<'a, str>,
    saved_unix_ms: u64,
    allocation: AllocationText,
    config: Box<RawValue>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    this_node: Option<NodeText<'a>>,
    own: Option<Holding<'a>>,
    records: Records<'a>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AllocationText {
    Pool,
    External,
}

impl AllocationText {
    fn of(config: &NetworkConfig) -> Self {
        let pool = config.networks.iter().any(|(_, network)| network.pool.is_some());
        if pool { Self::Pool } else { Self::External }
    }

    fn value(self) -> Allocation {
        match self {
            Self::Pool => Allocation::Pool,
            Self::External => Allocation::External,
        }
    }
}

/// The node's identity.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeText<'a> {
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
    public: Vec<IpAddr>,
}

impl<'a> NodeText<'a> {
    fn of(node: &'a ThisNode) -> Option<Self> {
        let name = node.name.as_ref().map(|name| name.as_str().into());
        (*node != ThisNode::by_address())
            .then(|| Self { name, public: node.public.iter().map(|(_, addr)| *addr).collect() })
    }

    fn read(self) -> Result<ThisNode, String> {
        let name = self.name.map(|name| NodeIdentity::new(&name)).transpose();
        let mut public = Dual::default();
        for addr in self.public {
            *public.slot(Family::of(addr)) = Some(addr);
        }
        let node =
            name.map_err(|error| format!("this node: {error}"))?.map_or_else(ThisNode::by_address, ThisNode::named);
        Ok(node.publishing(public))
    }
}

/// The own lease.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Holding<'a> {
    #[serde(borrow)]
    node: Cow<'a, str>,
    #[serde(borrow)]
    key: Cow<'a, str>,
    subnets: Subnets,
    attrs: Box<RawValue>,
    expires_unix_ms: Option<u64>,
    fence: Option<String>,
}

/// The times needed to compute when a lease of the file ends.
struct Time {
    saved: u64,
    wall: u64,
    now: BootTime,
}

impl<'a> Holding<'a> {
    /// Returns `None` if it could not be read back, because then the rest of the file could not be read either.
    fn of(node: &'a NodeIdentity, lease: &'a Lease, wall: impl FnOnce(BootTime) -> u64) -> Option<Self> {
        Some(Self {
            node: node.as_str().into(),
            key: lease.key.as_str().into(),
            subnets: Subnets(lease.subnets),
            attrs: attrs_text(&lease.attrs)?,
            expires_unix_ms: lease.expires.map(wall),
            fence: lease.fence.text(),
        })
    }

    fn read(self, time: &Time) -> Result<Own, String> {
        let bad = |error: &dyn fmt::Display| format!("own lease: {error}");
        let node = NodeIdentity::new(&self.node).map_err(|error| bad(&error))?;
        let attrs = LeaseAttrs::from_json(self.attrs.get().as_bytes()).map_err(|error| bad(&error))?;
        let Ok(expires) = time.expiry(self.expires_unix_ms) else { return Ok(Own::None) };
        let (key, fence) = (LeaseKey::new(&self.key), self.fence.map(|text| Fence::new(&text)));
        Ok(Own::Held(node, Lease::new(key, self.subnets.0, attrs).expiring(expires).fenced(fence.unwrap_or_default())))
    }
}

/// A lease has expired, or may have.
struct RunOut;

impl Time {
    fn expiry(&self, unix_ms: Option<u64>) -> Result<Option<BootTime>, RunOut> {
        let Some(unix_ms) = unix_ms else { return Ok(None) };
        if self.wall.saturating_add(SET_BACK) < self.saved {
            return Err(RunOut);
        }
        // Never more than was left when the file was written.
        let left = unix_ms.saturating_sub(self.wall).min(unix_ms.saturating_sub(self.saved));
        if left == 0 { Err(RunOut) } else { Ok(Some(self.now.after(Duration::from_millis(left)))) }
    }
}

/// All records, written and read one by one.
struct Records<'a>(Cow<'a, BTreeMap<LeaseKey, Entry>>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordText<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    created: u64,
    subnets: Subnets,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attrs: Option<Box<RawValue>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    bad: Option<Cow<'a, str>>,
}

impl<'a> RecordText<'a> {
    fn of((key, entry): (&'a LeaseKey, &'a Entry)) -> Self {
        let (key, created) = (key.as_str().into(), entry.created);
        let lease = match &entry.lease {
            Ok(lease) => lease,
            Err(bad) => {
                let reason = Some(bad.reason.as_str().into());
                return Self { key, created, subnets: Subnets(bad.subnets), attrs: None, bad: reason };
            }
        };
        let subnets = Subnets(lease.subnets);
        match attrs_text(&lease.attrs) {
            Some(attrs) => Self { key, created, subnets, attrs: Some(attrs), bad: None },
            // The attributes could not be read back. The record's subnets are kept at least, so that they are not
            // deleted.
            None => Self { key, created, subnets, attrs: None, bad: Some("its attributes could not be kept".into()) },
        }
    }

    fn read(self) -> Result<Record, String> {
        let key = LeaseKey::new(&self.key);
        let subnets = self.subnets.0;
        let lease = match (self.attrs, self.bad) {
            (Some(attrs), None) => {
                let attrs = LeaseAttrs::from_json(attrs.get().as_bytes());
                let attrs = attrs.map_err(|error| format!("record {key:?}: {error}"))?;
                Ok(Arc::new(Lease::new(key.clone(), subnets, attrs)))
            }
            (None, Some(reason)) => Err(Box::new(BadRecord::new(reason, subnets))),
            (Some(_), Some(_)) | (None, None) => return Err(format!("record {key:?}: not either attrs or bad")),
        };
        Ok(Record { key, created: self.created, lease })
    }
}

impl Serialize for Records<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(RecordText::of))
    }
}

impl<'de> Deserialize<'de> for Records<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(RecordsVisitor).map(|records| Self(Cow::Owned(records)))
    }
}

struct RecordsVisitor;

impl<'de> Visitor<'de> for RecordsVisitor {
    type Value = BTreeMap<LeaseKey, Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut oldest = OldestRecords::default();
        while let Some(text) = list.next_element::<RecordText<'de>>()? {
            oldest.push(text.read().map_err(de::Error::custom)?);
        }
        let mut records = BTreeMap::new();
        for Record { key, created, lease } in oldest.finish() {
            if records.insert(key, Entry { created, lease }).is_some() {
                return Err(de::Error::custom("a key stands twice"));
            }
        }
        Ok(records)
    }
}

/// The subnets of both families, as a list of strings.
struct Subnets(Dual<Prefix>);

impl Serialize for Subnets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|(_, prefix)| prefix.to_string()))
    }
}

impl<'de> Deserialize<'de> for Subnets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut subnets = Dual::default();
        for text in Vec::<Cow<'de, str>>::deserialize(deserializer)? {
            let prefix: Prefix = text.parse().map_err(de::Error::custom)?;
            if subnets.slot(prefix.family()).replace(prefix).is_some() {
                return Err(de::Error::custom("two subnets of one family"));
            }
        }
        Ok(Self(subnets))
    }
}

/// Returns the attributes' text, or `None` if it could not be read back.
fn attrs_text(attrs: &LeaseAttrs) -> Option<Box<RawValue>> {
    let text = attrs.to_json();
    if text.len() > LeaseAttrs::MAX_BYTES { None } else { RawValue::from_string(text).ok() }
}

fn raw(text: String) -> io::Result<Box<RawValue>> {
    RawValue::from_string(text).map_err(Into::into)
}

fn millis_of(wall: SystemTime) -> u64 {
    millis(wall.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The store of the state files that [`check_state_file`] reads.
#[cfg(any(test, feature = "fuzzing"))]
const STATE_ORIGIN: &str = "etcd";

/// Checks that a state file round-trips.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn check_state_file(bytes: &[u8]) {
    let (now, wall) = (BootTime::default(), UNIX_EPOCH + Duration::from_secs(1_767_225_600));
    let Ok(known) = parse(bytes, STATE_ORIGIN, now, wall) else { return };
    assert!(known.records.as_ref().is_some_and(|records| records.len() <= bytes.len() / 2));
    let mut text = Vec::new();
    let written = write(&mut text, &known, STATE_ORIGIN, now, wall);
    assert!(written.is_ok(), "{written:?}");
    assert_eq!(parse(&text, STATE_ORIGIN, now, wall), Ok(kept(known)), "{}", String::from_utf8_lossy(&text));
}

/// Returns the part that is kept: attributes may be longer in this crate's form than in the original, and then too
/// long.
#[cfg(any(test, feature = "fuzzing"))]
fn kept(mut known: Known) -> Known {
    if matches!(&known.own, Own::Held(_, lease) if attrs_text(&lease.attrs).is_none()) {
        known.own = Own::None;
    }
    let kept = |(key, entry): (&LeaseKey, &Entry)| {
        let mut entry = entry.clone();
        if let Ok(lease) = &entry.lease
            && attrs_text(&lease.attrs).is_none()
        {
            let reason = "its attributes could not be kept".to_owned();
            entry.lease = Err(Box::new(BadRecord { reason, subnets: lease.subnets }));
        }
        (key.clone(), entry)
    };
    known.records = known.records.map(|records| records.iter().map(kept).collect());
    known
}
