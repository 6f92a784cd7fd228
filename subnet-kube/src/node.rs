//! A Node, as little of it as counts: images and conditions never become values.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use flannel_core::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Prefix};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::annotations::{Annotations, Published, attrs};
use crate::keys::{Key, Keys};

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
        self.metadata.annotations.map_or_else(Annotations::default, |raw| Annotations::read(raw, keys))
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
