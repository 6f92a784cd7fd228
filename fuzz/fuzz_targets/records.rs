//! Hostile records among good ones: they never change what a good one is, and their order never matters.

#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, LazyLock};

use flannel_backend_vxlan::Vxlan;
use flannel_core::admit::{Admission, HostView, Own, Rules};
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{BadRecord, Json, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Family, MacAddr, Prefix};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// The nodes that are there before the hostile records; the first one is this node.
const NODES: u8 = 5;

/// The most hostile records of one input.
const HOSTILE: usize = 24;

/// What a hostile record says. Most of it is near what good ones say.
#[derive(Debug, Arbitrary)]
struct Hostile {
    age: u8,
    is_readable: bool,
    kind: Kind,
    v4: Claim,
    v6: Claim,
}

#[derive(Debug, Arbitrary)]
enum Kind {
    Vxlan,
    Text(String),
}

#[derive(Debug, Arbitrary)]
struct Claim {
    subnet: Subnet,
    public: Public,
    data: Data,
}

#[derive(Debug, Arbitrary)]
enum Subnet {
    None,
    Of(u8),
    Near(u8, u8),
    Any(u128, u8),
}

#[derive(Debug, Arbitrary)]
enum Public {
    None,
    Of(u8),
    Any(u128),
    OtherFamily(u32),
}

#[derive(Debug, Arbitrary)]
enum Data {
    None,
    MacOf(u8),
    Mac([u8; 6]),
    Text(String),
}

static CONFIG: LazyLock<Option<NetworkConfig>> = LazyLock::new(|| {
    let json =
        br#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48","Backend":{"Type":"vxlan"}}"#;
    NetworkConfig::parse(json, Allocation::Pool).ok()
});

fuzz_target!(|hostile: Vec<Hostile>| {
    // What is derived of an input has no size of its own that counts: a text of 4096 bytes is the most of each.
    let input = vec![0; hostile.len().min(HOSTILE) * LeaseAttrs::MAX_BYTES];
    fuzz::bounded(&input, || check(&hostile[..hostile.len().min(HOSTILE)]));
});

fn check(hostile: &[Hostile]) {
    let good: Vec<_> = (1..=NODES).map(good).collect();
    let hostile: Vec<_> = hostile.iter().enumerate().map(|(n, hostile)| hostile.record(n)).collect();
    let mut admission = admission();
    admission.reset(good.clone());
    assert_good(&admission);
    for record in &hostile {
        admission.upsert(record.clone());
        assert_good(&admission);
    }
    assert_apart(&admission);
    let mut backwards = self::admission();
    backwards.reset(hostile.iter().rev().chain(&good).cloned().collect());
    assert_eq!(told(&admission), told(&backwards));
    for record in &hostile {
        admission.remove(&record.key);
        assert_good(&admission);
    }
    assert_eq!((admission.peers().count(), admission.quarantined().count()), (usize::from(NODES) - 1, 0));
    assert!(admission.withheld().is_empty());
}

fn admission() -> Admission {
    let rules = || {
        let config = CONFIG.as_ref()?;
        Some(Rules::new(config, Arc::new(Vxlan::new(config).ok()?)))
    };
    let rules = rules().unwrap_or_else(|| unreachable!("the configuration is right"));
    let mut host = HostView::default();
    host.own = Own::new(&lease(1), &rules);
    Admission::new(rules, host)
}

/// Each good node but this one is a peer, as it says of itself.
fn assert_good(admission: &Admission) {
    assert_eq!(admission.own_trouble(), None);
    for node in 2..=NODES {
        let lease = lease(node);
        assert_eq!(admission.peer(&lease.key).map(Arc::as_ref), Some(&lease), "{:?}", admission.why_not(&lease.key));
    }
}

/// No two peers share an address of pods, nor is one withheld.
fn assert_apart(admission: &Admission) {
    let own = lease(1);
    let peers: Vec<_> = admission.peers().map(Arc::as_ref).chain([&own]).collect();
    for family in Family::BOTH {
        let mut subnets: Vec<Prefix> = peers.iter().filter_map(|peer| peer.subnets.get(family).copied()).collect();
        subnets.sort();
        assert!(subnets.windows(2).all(|pair| !pair[0].overlaps(&pair[1])), "{subnets:?}");
        assert!(subnets.iter().all(|subnet| !admission.withheld().contains(subnet)), "{subnets:?}");
    }
}

/// Who is a peer, and who is not for which rule.
fn told(admission: &Admission) -> (Vec<Lease>, Vec<(LeaseKey, &'static str)>) {
    let refused = admission.quarantined().map(|(key, reason)| (key, reason.label()));
    (admission.peers().map(|peer| Lease::clone(peer)).collect(), refused.collect())
}

fn good(node: u8) -> Record {
    Record::of(lease(node), node.into())
}

fn lease(node: u8) -> Lease {
    let both = |f: &dyn Fn(Family) -> Option<Json>| Dual { v4: f(Family::V4), v6: f(Family::V6) };
    let public = Dual { v4: Some(public_of(Family::V4, node)), v6: Some(public_of(Family::V6, node)) };
    let attrs = LeaseAttrs::new(public).with_backend(Vxlan::TYPE, both(&|family| data(mac_of(family, node))));
    let subnets = Dual { v4: subnet_of(Family::V4, node), v6: subnet_of(Family::V6, node) };
    Lease::new(LeaseKey::new(&format!("node-{node}")), subnets, attrs)
}

fn subnet_of(family: Family, node: u8) -> Option<Prefix> {
    match family {
        Family::V4 => Prefix::masked(Ipv4Addr::new(10, 42, node, 0).into(), 24).ok(),
        Family::V6 => Prefix::masked(Ipv6Addr::new(0xfd00, 0x42, 0, node.into(), 0, 0, 0, 0).into(), 64).ok(),
    }
}

fn public_of(family: Family, node: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, node).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, node.into()).into(),
    }
}

fn mac_of(family: Family, node: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, family.bits(), node])
}

fn data(mac: MacAddr) -> Option<Json> {
    Json::parse(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)).ok()
}

impl Hostile {
    /// It is younger than every good one.
    fn record(&self, n: usize) -> Record {
        let key = LeaseKey::new(&format!("hostile-{n}"));
        let claims = [(Family::V4, &self.v4), (Family::V6, &self.v6)];
        let mut lease = lease(0);
        lease.key = key.clone();
        lease.attrs.backend_type = match &self.kind {
            Kind::Vxlan => Vxlan::TYPE.into(),
            Kind::Text(text) => text.as_str().into(),
        };
        for (family, claim) in claims {
            *lease.subnets.slot(family) = claim.subnet.value(family);
            *lease.attrs.public_ip.slot(family) = claim.public.value(family);
            *lease.attrs.backend_data.slot(family) = claim.data.value(family);
        }
        let created = u64::from(NODES) + 1 + u64::from(self.age);
        let bad = || Box::new(BadRecord { reason: "unreadable".to_owned(), subnets: lease.subnets });
        let lease = if self.is_readable { Ok(Arc::new(lease)) } else { Err(bad()) };
        Record { key, created, lease }
    }
}

impl Subnet {
    fn value(&self, family: Family) -> Option<Prefix> {
        match *self {
            Self::None => None,
            Self::Of(node) => subnet_of(family, node),
            Self::Near(node, len) => Prefix::masked(subnet_of(family, node)?.addr(), len % (family.bits() + 1)).ok(),
            Self::Any(addr, len) => Prefix::masked(address(family, addr), len % (family.bits() + 1)).ok(),
        }
    }
}

impl Public {
    fn value(&self, family: Family) -> Option<IpAddr> {
        match *self {
            Self::None => None,
            Self::Of(node) => Some(public_of(family, node)),
            Self::Any(addr) => Some(address(family, addr)),
            Self::OtherFamily(addr) => Some(match family {
                Family::V4 => Ipv6Addr::from(u128::from(addr)).into(),
                Family::V6 => Ipv4Addr::from(addr).into(),
            }),
        }
    }
}

impl Data {
    fn value(&self, family: Family) -> Option<Json> {
        match self {
            Self::None => None,
            Self::MacOf(node) => data(mac_of(family, *node)),
            Self::Mac(mac) => data(MacAddr(*mac)),
            Self::Text(text) => Json::parse(text).ok(),
        }
    }
}

fn address(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(bits as u32).into(),
        Family::V6 => Ipv6Addr::from(bits).into(),
    }
}
