//! The parts of a Node that flannel needs: images and conditions are not parsed into values.

use std::borrow::Cow;
use std::hash::BuildHasher;
use std::sync::Arc;

use flannel_core::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Prefix};

use crate::annotations::{Annotations, Published, attrs};
use crate::keys::{Key, Keys};
use crate::protobuf::{Malformed, fields, find, number, text};

/// The parsed parts of a Node object. Borrows from its bytes: a heartbeat is recognised before any text is copied.
#[derive(Debug, Default)]
pub(crate) struct Node<'a> {
    pub(crate) name: Cow<'a, str>,
    pub(crate) uid: Cow<'a, str>,
    pub(crate) resource_version: Cow<'a, str>,
    /// The creation time, in seconds since 1970: the record's age.
    created: u64,
    pub(crate) annotations: Annotations<'a>,
    pod_cidr: &'a [u8],
    /// At most one more than is valid, to detect too many.
    pod_cidrs: Vec<&'a [u8]>,
}

/// The version of an object of any kind: member `metadata.resourceVersion`.
pub(crate) const VERSION: &[u64] = &[1, 6];

/// The most podCIDRs of a Node: one of each family.
const MOST_CIDRS: usize = 2;

/// Why podCIDRs cannot be used. Shown to an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CidrError {
    #[error("podCIDR {0:?} is not the address of a network with its length")]
    Text(String),
    #[error("podCIDRs has more entries than one of IPv4 and one of IPv6")]
    Many,
}

impl<'a> Node<'a> {
    /// Reads a `Node { metadata, spec }`, with the annotations that have these names.
    pub(crate) fn parse(message: &'a [u8], keys: &Keys) -> Result<Self, Malformed> {
        let mut node = Self::default();
        for field in fields(message) {
            let field = field?;
            match field.number {
                1 => node.metadata(field.bytes, keys)?,
                2 => node.spec(field.bytes)?,
                _ => {}
            }
        }
        if node.name.is_empty() {
            return Err(Malformed::Message("a Node has no name"));
        }
        Ok(node)
    }

    fn metadata(&mut self, message: &'a [u8], keys: &Keys) -> Result<(), Malformed> {
        for field in fields(message) {
            let field = field?;
            match field.number {
                1 => self.name = field.text(),
                5 => self.uid = field.text(),
                6 => self.resource_version = field.text(),
                8 => self.created = u64::try_from(number(find(field.bytes, &[1])?).cast_signed()).unwrap_or_default(),
                12 => self.annotations.take(field.bytes, keys)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn spec(&mut self, message: &'a [u8]) -> Result<(), Malformed> {
        for field in fields(message) {
            let field = field?;
            match field.number {
                1 => self.pod_cidr = field.bytes,
                7 if self.pod_cidrs.len() <= MOST_CIDRS => self.pod_cidrs.push(field.bytes),
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns the same value for two versions of a Node that do not differ in relevant fields.
    pub(crate) fn fingerprint(&self, hasher: &impl BuildHasher) -> u64 {
        hasher.hash_one((&self.uid, self.pod_cidr, &self.pod_cidrs, &self.annotations))
    }

    /// Returns the same value for two versions of the own Node that do not differ in what others set there for this
    /// node.
    pub(crate) fn settings_fingerprint(&self, hasher: &impl BuildHasher) -> u64 {
        let set = Key::SET_BY_OPERATORS.map(|key| self.annotations.text(key));
        hasher.hash_one((&self.uid, self.pod_cidr, &self.pod_cidrs, set))
    }

    /// Returns the first podCIDR of each family.
    pub(crate) fn subnets(&self) -> Result<Dual<Prefix>, CidrError> {
        let one = [self.pod_cidr];
        let all = match &*self.pod_cidrs {
            [] if self.pod_cidr.is_empty() => &[],
            [] => &one[..],
            all => all,
        };
        if all.len() > MOST_CIDRS {
            return Err(CidrError::Many);
        }
        let mut subnets = Dual::default();
        for bytes in all {
            let text = text(bytes);
            let refused = |_| CidrError::Text(text.chars().take(64).collect());
            let prefix: Prefix = text.parse().map_err(refused)?;
            subnets.slot(prefix.family()).get_or_insert(prefix);
        }
        Ok(subnets)
    }

    pub(crate) fn fence(&self) -> Fence {
        Fence::new(&self.uid)
    }

    /// Returns the record that a managed Node publishes.
    pub(crate) fn record(&self, published: &Published) -> Record {
        let key = LeaseKey::of_bytes(self.name.as_bytes());
        let subnets = self.subnets();
        let lease = match &subnets {
            Err(error) => Err(error.to_string()),
            Ok(subnets) => match published.shown(&self.name, &self.annotations) {
                Some(attrs) => Ok((attrs, *subnets)),
                None => attrs(&self.annotations).map(|attrs| (attrs, *subnets)),
            },
        };
        let lease = lease.and_then(|(attrs, subnets)| self.lease(&key, attrs, subnets));
        let named = subnets.unwrap_or_default();
        let lease = lease.map(Arc::new).map_err(|reason| Box::new(BadRecord::new(reason, named)));
        Record { key, created: self.created, lease }
    }

    fn lease(&self, key: &LeaseKey, attrs: LeaseAttrs, subnets: Dual<Prefix>) -> Result<Lease, String> {
        // A node of a dual-stack cluster may take part in one family's network only.
        let subnets = Dual {
            v4: subnets.v4.filter(|_| attrs.public_ip.v4.is_some()),
            v6: subnets.v6.filter(|_| attrs.public_ip.v6.is_some()),
        };
        if subnets.is_empty() {
            return Err("it has no podCIDR of a family that it has a public IP of".to_owned());
        }
        Ok(Lease::new(key.clone(), subnets, attrs).fenced(self.fence()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::AnnotationPrefix;
    use crate::protobuf::testing;
    use crate::protobuf::testing::member;
    use proptest::prelude::*;

    fn keys() -> Keys {
        Keys::new(AnnotationPrefix::default())
    }

    fn annotation(name: impl AsRef<[u8]>, text: impl AsRef<[u8]>) -> Vec<u8> {
        member(12, [member(1, name), member(2, text)].concat())
    }

    /// Returns a Node with these annotations, and `noise` in other members.
    fn message(annotations: &[Vec<u8>], cidrs: &[&str], created: u64, noise: &[u8]) -> Vec<u8> {
        let entry = [member(1, noise), member(2, noise)].concat();
        let metadata = [
            &member(1, "node-1")[..],
            &member(5, "uid"),
            &member(6, "41"),
            &testing::number(7, created),
            &member(8, [testing::number(1, created), testing::number(2, 5)].concat()),
            &member(11, &entry),
            &annotations.concat(),
            &annotation(noise, noise),
            &member(17, noise),
        ];
        let one = member(1, cidrs.first().unwrap_or(&""));
        let all: Vec<u8> = cidrs.iter().flat_map(|cidr| member(7, cidr)).collect();
        let spec = [one, member(3, noise), testing::number(4, 1), all];
        [member(1, metadata.concat()), member(2, spec.concat()), member(3, noise), member(99, noise)].concat()
    }

    proptest! {
        /// In any order, with any other members.
        #[test]
        fn what_counts_of_a_node_is_read_as_it_was_written(
            texts in prop::collection::btree_map(0..Key::ALL.len(), ".{0,40}", 0..10),
            cidrs in prop::sample::subsequence(vec!["10.244.1.0/24", "fd00:244:0:1::/64"], 0..=2).prop_shuffle(),
            created in 0..1_u64 << 40,
            noise: Vec<u8>,
        ) {
            let keys = keys();
            let annotations: Vec<_> =
                texts.iter().map(|(nth, text)| annotation(keys.name(Key::ALL[*nth]), text)).collect();
            let message = message(&annotations, &cidrs, created, &noise);
            let node = Node::parse(&message, &keys).unwrap();
            prop_assert_eq!((&*node.name, &*node.uid, &*node.resource_version), ("node-1", "uid", "41"));
            prop_assert_eq!(node.created, created);
            for (nth, key) in Key::ALL.into_iter().enumerate() {
                prop_assert_eq!(node.annotations.text(key).map(Cow::into_owned), texts.get(&nth).cloned());
            }
            let subnets: Vec<_> = node.subnets().unwrap().iter().map(|(_, subnet)| subnet.to_string()).collect();
            let mut wanted = cidrs.clone();
            wanted.sort_unstable();
            prop_assert_eq!(subnets, wanted);
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes: Vec<u8>, end in 0..200_usize) {
            let begun = message(&[], &["10.244.1.0/24"], 1, b"noise");
            let _ = Node::parse(&[&begun[..end.min(begun.len())], &bytes].concat(), &keys());
        }
    }

    /// A node may write its Node in protobuf, in which the server does not check text. Without this, all others' lists
    /// would fail.
    #[test]
    fn invalid_utf8_affects_only_its_own_record() {
        let keys = keys();
        let written = |key, text: &[u8]| annotation(keys.name(key), text);
        let managed = written(Key::Managed, b"true");
        for (ip, is_good) in [(&b"192.0.2.1"[..], true), (b"192.0.2.\xff", false)] {
            let annotations = [managed.clone(), written(Key::PublicIp, ip)];
            let message = message(&annotations, &["10.244.1.0/24"], 1, b"\xff\xfe");
            let node = Node::parse(&message, &keys).unwrap();
            assert_eq!(node.record(&Published::default()).lease.is_ok(), is_good);
        }
    }

    /// Otherwise a few dozen of them would displace all others.
    #[test]
    fn a_type_or_data_that_is_too_large_makes_a_bad_record_that_counts_little() {
        let keys = keys();
        for key in [Key::BackendType, Key::BackendData] {
            let annotations =
                [annotation(keys.name(Key::Managed), "true"), annotation(keys.name(key), "1".repeat(200_000))];
            let message = message(&annotations, &["10.244.1.0/24"], 1, b"");
            let record = Node::parse(&message, &keys).unwrap().record(&Published::default());
            assert!(record.lease.as_ref().unwrap_err().reason.contains("200000 bytes"), "{record:?}");
            assert!(record.weight() <= 3, "{}", record.weight());
        }
    }

    #[test]
    fn pod_cidrs_that_are_too_many_or_none_are_told() {
        let subnets = |cidrs: &[&str]| Node::parse(&message(&[], cidrs, 1, b""), &keys()).unwrap().subnets();
        assert_eq!(subnets(&[]), Ok(Dual::default()));
        assert_eq!(subnets(&["10.244.1.0/24"; 9]), Err(CidrError::Many));
        assert_eq!(subnets(&["10.244.1.0"]), Err(CidrError::Text("10.244.1.0".to_owned())));
        let nameless = member(1, member(6, "41"));
        assert!(Node::parse(&nameless, &keys()).is_err());
    }
}
