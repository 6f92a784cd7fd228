//! A Node, as little of it as counts: images and conditions never become values.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use flannel_core::lease::{BadRecord, Fence, Json, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Family, Prefix};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::annotations::{Key, Keys, written};

/// What is read of a Node object. Borrows from its text: a heartbeat is recognised before anything is allocated.
#[derive(Debug, Deserialize)]
pub(crate) struct Node<'a> {
    #[serde(borrow)]
    pub(crate) metadata: Metadata<'a>,
    #[serde(borrow, default)]
    spec: Spec<'a>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Metadata<'a> {
    #[serde(borrow)]
    pub(crate) name: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(crate) uid: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(crate) resource_version: Cow<'a, str>,
    #[serde(borrow, default)]
    creation_timestamp: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    annotations: Option<&'a RawValue>,
}

#[derive(Debug, Default, Deserialize)]
struct Spec<'a> {
    #[serde(borrow, default, rename = "podCIDR")]
    pod_cidr: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "podCIDRs")]
    pod_cidrs: Option<&'a RawValue>,
}

/// A bookmark, or the head of a list: `metadata` alone.
#[derive(Debug, Deserialize)]
pub(crate) struct Versioned<'a> {
    #[serde(borrow)]
    pub(crate) metadata: ListMetadata<'a>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListMetadata<'a> {
    #[serde(borrow, default)]
    pub(crate) resource_version: Cow<'a, str>,
}

/// The annotations of ours, as their JSON text.
#[derive(Debug, Default)]
pub(crate) struct Annotations<'a>([Option<&'a RawValue>; Key::ALL.len()]);

impl<'a> Annotations<'a> {
    fn raw(&self, key: Key) -> Option<&'a RawValue> {
        self.0.get(key as usize).copied().flatten()
    }

    /// The text of an annotation.
    pub(crate) fn text(&self, key: Key) -> Option<Cow<'a, str>> {
        /// Borrows where nothing is escaped.
        #[derive(Deserialize)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
        serde_json::from_str::<Text<'a>>(self.raw(key)?.get()).ok().map(|text| text.0)
    }

    /// Whether this says that flannel has set the node up: others are not seen by peers.
    pub(crate) fn is_managed(&self) -> bool {
        self.text(Key::Managed).is_some_and(|text| text == "true")
    }

    /// The address in an annotation of an operator's.
    pub(crate) fn addr(&self, key: Key, family: Family) -> Result<Option<IpAddr>, AddrError> {
        let Some(text) = self.text(key).filter(|text| !text.is_empty()) else { return Ok(None) };
        match parse_addr(&text, family) {
            Some(addr) if !addr.is_unspecified() => Ok(Some(addr)),
            _ => Err(AddrError { key, found: text.chars().take(64).collect(), family }),
        }
    }

    /// What is published in place of the public IPs.
    pub(crate) fn overwrite(&self) -> Result<Dual<IpAddr>, AddrError> {
        self.addrs(Key::overwrite)
    }

    /// The public IPs that an operator set.
    pub(crate) fn public(&self) -> Result<Dual<IpAddr>, AddrError> {
        self.addrs(Key::node_public_ip)
    }

    fn addrs(&self, key: impl Fn(Family) -> Key) -> Result<Dual<IpAddr>, AddrError> {
        let mut addrs = Dual::default();
        for family in Family::BOTH {
            *addrs.slot(family) = self.addr(key(family), family)?;
        }
        Ok(addrs)
    }
}

/// An annotation of an operator's is not an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddrError {
    pub(crate) key: Key,
    pub(crate) found: String,
    pub(crate) family: Family,
}

/// What podCIDRs cannot be used for: shown to an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CidrError {
    #[error("podCIDR {0:?} is not the address of a network with its length")]
    Text(String),
    #[error("podCIDRs has {0} entries, which is more than one of IPv4 and one of IPv6")]
    Many(usize),
}

impl<'a> Node<'a> {
    /// Reads the JSON of a Node.
    pub(crate) fn parse(json: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// The annotations under these names.
    pub(crate) fn annotations(&self, keys: &Keys) -> Annotations<'a> {
        struct Pick<'k>(&'k Keys);

        impl<'de> Visitor<'de> for Pick<'_> {
            type Value = Annotations<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut found = Annotations::default();
                while let Some(Name(key)) = map.next_key_seed(Find(self.0))? {
                    match key.and_then(|key| found.0.get_mut(key as usize)) {
                        Some(slot) => *slot = Some(map.next_value()?),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(found)
            }
        }

        let Some(raw) = self.metadata.annotations.filter(|raw| raw.get() != "null") else {
            return Annotations::default();
        };
        serde_json::Deserializer::from_str(raw.get()).deserialize_map(Pick(keys)).unwrap_or_default()
    }

    /// Says the same of two versions of a Node that do not differ in anything that counts.
    pub(crate) fn fingerprint(&self, annotations: &Annotations<'_>, hasher: &impl BuildHasher) -> u64 {
        let raw = |raw: Option<&'a RawValue>| raw.map(RawValue::get);
        let texts = Key::ALL.map(|key| annotations.raw(key).map(RawValue::get));
        hasher.hash_one(Print {
            uid: &self.metadata.uid,
            cidrs: [raw(self.spec.pod_cidr), raw(self.spec.pod_cidrs)],
            texts,
        })
    }

    /// The first pod CIDR of each family.
    pub(crate) fn subnets(&self) -> Result<Dual<Prefix>, CidrError> {
        let mut texts: Vec<Cow<'_, str>> = match self.spec.pod_cidrs {
            Some(raw) => serde_json::from_str(raw.get()).unwrap_or_default(),
            None => Vec::new(),
        };
        if texts.is_empty()
            && let Some(raw) = self.spec.pod_cidr
        {
            let one: Option<Cow<'_, str>> = serde_json::from_str(raw.get()).unwrap_or_default();
            texts.extend(one.filter(|text| !text.is_empty()));
        }
        if texts.len() > 2 {
            return Err(CidrError::Many(texts.len()));
        }
        let mut subnets = Dual::default();
        for text in texts {
            let refused = |_| CidrError::Text(text.chars().take(64).collect());
            let prefix: Prefix = text.parse().map_err(refused)?;
            subnets.slot(prefix.family()).get_or_insert(prefix);
        }
        Ok(subnets)
    }

    pub(crate) fn fence(&self) -> Fence {
        Fence(Some((&*self.metadata.uid).into()))
    }

    /// When it was created, in seconds since 1970: the record's age.
    fn created(&self) -> u64 {
        let text = self.metadata.creation_timestamp.as_deref().unwrap_or_default();
        let time = text.parse::<jiff::Timestamp>().unwrap_or_default();
        u64::try_from(time.as_second()).unwrap_or_default()
    }

    /// What a managed Node tells of itself.
    pub(crate) fn record(&self, annotations: &Annotations<'_>, published: &Published) -> Record {
        let key = LeaseKey::of_bytes(self.metadata.name.as_bytes());
        let subnets = self.subnets();
        let lease = match &subnets {
            Err(error) => Err(error.to_string()),
            Ok(subnets) => match published.shown(&self.metadata.name, annotations) {
                Some(attrs) => Ok((attrs, *subnets)),
                None => attrs(annotations).map(|attrs| (attrs, *subnets)),
            },
        };
        let lease = lease.and_then(|(attrs, subnets)| self.lease(&key, attrs, subnets));
        let named = subnets.unwrap_or_default();
        let lease = lease.map(Arc::new).map_err(|reason| Box::new(BadRecord::new(reason, named)));
        Record { key, created: self.created(), lease }
    }

    fn lease(&self, key: &LeaseKey, attrs: LeaseAttrs, subnets: Dual<Prefix>) -> Result<Lease, String> {
        // A node of a dual-stack cluster may be in one family's network only.
        let subnets = Dual {
            v4: subnets.v4.filter(|_| attrs.public_ip.v4.is_some()),
            v6: subnets.v6.filter(|_| attrs.public_ip.v6.is_some()),
        };
        if subnets.is_empty() {
            return Err("it has no podCIDR of a family that it has a public IP of".to_owned());
        }
        Ok(Lease { key: key.clone(), subnets, attrs, expires: None, fence: self.fence() })
    }
}

/// What [`Node::fingerprint`] is of.
#[derive(Hash)]
struct Print<'a> {
    uid: &'a str,
    cidrs: [Option<&'a str>; 2],
    texts: [Option<&'a str>; Key::ALL.len()],
}

/// An annotation's name, if it is one of ours.
struct Name(Option<Key>);

/// Looks a name up without keeping it.
struct Find<'k>(&'k Keys);

impl<'de> serde::de::DeserializeSeed<'de> for Find<'_> {
    type Value = Name;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Name, D::Error> {
        struct Look<'k>(&'k Keys);

        impl Visitor<'_> for Look<'_> {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an annotation's name")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Name, E> {
                Ok(Name(self.0.find(name)))
            }
        }

        deserializer.deserialize_str(Look(self.0))
    }
}

/// Reads what a node published. What is not there is as flannel has it: no data, no type.
pub(crate) fn attrs(annotations: &Annotations<'_>) -> Result<LeaseAttrs, String> {
    let kind = annotations.text(Key::BackendType).unwrap_or_default();
    let mut attrs = LeaseAttrs { backend_type: LeaseAttrs::backend_name(&kind), ..LeaseAttrs::default() };
    for family in Family::BOTH {
        let key = Key::public_ip(family);
        if let Some(text) = annotations.text(key).filter(|text| !text.is_empty()) {
            let addr =
                parse_addr(&text, family).ok_or_else(|| format!("annotation {key} is not {family}: {text:?}"))?;
            *attrs.public_ip.slot(family) = Some(addr).filter(|addr| !addr.is_unspecified());
        }
        let key = Key::backend_data(family);
        let Some(text) = annotations.text(key).filter(|text| !text.is_empty()) else { continue };
        if text.len() > LeaseAttrs::MAX_BYTES {
            return Err(format!("annotation {key} of {} bytes is larger than {}", text.len(), LeaseAttrs::MAX_BYTES));
        }
        let data = Json::parse(&text).map_err(|error| format!("annotation {key} is {error}"))?;
        *attrs.backend_data.slot(family) = Some(data).filter(|data| !data.is_null());
    }
    if attrs.public_ip.is_empty() {
        return Err("it has no public IP".to_owned());
    }
    Ok(attrs)
}

fn parse_addr(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        Family::V6 => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
    }
}

/// What nodes of this process published, by their names. Where an operator has other public IPs written, the annotations
/// differ from the lease that the node holds: its own record is shown as the node published it.
#[derive(Debug, Default)]
pub(crate) struct Published(BTreeMap<String, LeaseAttrs>);

impl Published {
    pub(crate) fn set(&mut self, node: &str, attrs: LeaseAttrs) {
        self.0.insert(node.to_owned(), attrs);
    }

    pub(crate) fn forget(&mut self, node: &str) {
        self.0.remove(node);
    }

    /// The attributes of `node`, if its annotations are exactly what it wrote with them.
    pub(crate) fn shown(&self, node: &str, annotations: &Annotations<'_>) -> Option<LeaseAttrs> {
        let attrs = self.0.get(node)?;
        let wanted = written(attrs, &annotations.overwrite().ok()?);
        let is_written = wanted.iter().all(|(key, text)| annotations.text(*key).is_some_and(|found| found == **text));
        is_written.then(|| attrs.clone())
    }
}
