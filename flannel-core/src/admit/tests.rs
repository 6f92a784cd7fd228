use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::backend::Skip;
use crate::kernel::{HostFacts, OverlayName};
use crate::lease::{BadRecord, Json, LeaseAttrs};
use crate::testing::samples::{config, host, lease, node_address, node_subnet};

/// In these tests the backend data is the MAC address as a JSON string, or `null` for none.
fn hardware_address(attrs: &LeaseAttrs, family: Family) -> Result<Option<MacAddr>, Skip> {
    let Some(data) = attrs.backend_data.get(family) else { return Ok(None) };
    data.as_str().trim_matches('"').parse().map(Some).map_err(|_| Skip::BadData(data.as_str().to_owned()))
}

pub(super) fn rules(families: &[Family]) -> Rules {
    let networks = config(families, r#"{"Type":"vxlan"}"#).networks;
    Rules { networks, wire_type: "vxlan", hardware_address: Box::new(hardware_address) }
}

pub(super) fn own() -> Own {
    Own {
        key: Some(LeaseKey::new("node-1")),
        subnets: Dual { v4: Some(node_subnet(Family::V4, 1)), v6: None },
        public: Dual { v4: Some(node_address(Family::V4, 1)), v6: None },
        macs: Dual { v4: Some("02:00:00:00:00:01".parse().unwrap()), v6: None },
    }
}

pub(super) fn view() -> HostView {
    HostView::new(&host(), &OverlayName::default(), BTreeSet::new(), own())
}

pub(super) fn admission() -> Admission {
    Admission::new(rules(&[Family::V4]), view())
}

/// Node `n`'s lease with its own MAC address.
pub(super) fn node(n: u8) -> Lease {
    let mut lease = lease(n, &[Family::V4], "vxlan");
    lease.attrs.backend_data.v4 = Some(mac_data(n));
    lease
}

/// The same with both families.
pub(super) fn dual_node(n: u8) -> Lease {
    let mut lease = lease(n, &Family::BOTH, "vxlan");
    lease.attrs.backend_data = Dual { v4: Some(mac_data(n)), v6: Some(mac_data(n)) };
    lease
}

pub(super) fn mac_data(n: u8) -> Json {
    Json::parse(&format!("\"02:00:00:00:00:{n:02x}\"")).unwrap()
}

pub(super) fn record(lease: Lease, created: u64) -> Record {
    Record::of(lease, created)
}

fn with(n: u8, change: impl FnOnce(&mut Lease)) -> Record {
    let mut lease = node(n);
    change(&mut lease);
    record(lease, n.into())
}

fn with_subnet(n: u8, subnet: &str) -> Record {
    with(n, |lease| lease.subnets.v4 = Some(subnet.parse().unwrap()))
}

fn unreadable(n: u8) -> Record {
    Record::bad(key(n), n.into(), BadRecord::new("no JSON", node(n).subnets))
}

fn key(n: u8) -> LeaseKey {
    node(n).key
}

fn quarantined(admission: &Admission) -> Vec<(LeaseKey, Reason)> {
    admission.quarantined().collect()
}

fn peers(admission: &Admission) -> Vec<String> {
    admission.peers().map(|peer| peer.key.to_string()).collect()
}

fn label(admission: &Admission, n: u8) -> &'static str {
    admission.why_not(&key(n)).map_or("", |reason| reason.label())
}

#[test]
fn good_records_are_peers_and_the_own_one_is_not() {
    let mut admission = admission();
    let changes = admission.reset([3, 1, 2].map(|n| record(node(n), 1)).into());
    assert_eq!(peers(&admission), ["node-2", "node-3"]);
    assert_eq!(changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(), ["node-2", "node-3"]);
    assert!(changes.iter().all(|change| change.old.is_none() && change.new.is_some()));
    assert_eq!((admission.len(), quarantined(&admission), admission.own_trouble()), (3, vec![], None));
    assert_eq!(admission.peer_by_subnet(&node_subnet(Family::V4, 3)).unwrap().key, key(3));
    assert_eq!(admission.peer_by_subnet(&node_subnet(Family::V4, 1)), None);
}

#[test]
fn a_renewal_is_no_change_and_a_new_address_is_one() {
    let mut admission = admission();
    admission.upsert(record(node(2), 1));
    let renewed = Lease { expires: Some(crate::clock::BootTime::default()), ..node(2) };
    assert_eq!(admission.upsert(record(renewed.clone(), 1)), []);
    assert_eq!(**admission.peer(&key(2)).unwrap(), renewed);
    let moved = with(2, |lease| lease.attrs.public_ip.v4 = Some(node_address(Family::V4, 22)));
    let changes = admission.upsert(moved);
    assert_eq!(changes.len(), 1);
    assert_eq!(changes[0].new.as_ref().unwrap().attrs.public_ip.v4, Some(node_address(Family::V4, 22)));
    let changes = admission.remove(&key(2));
    assert!(changes.len() == 1 && changes[0].new.is_none() && admission.is_empty());
    assert_eq!(admission.remove(&key(2)), []);
}

#[test]
fn each_class_of_hostile_record_is_quarantined_by_name() {
    let public = |addr: &'static str| with(9, move |lease| lease.attrs.public_ip.v4 = addr.parse().ok());
    let data = |text: &'static str| with(9, move |lease| lease.attrs.backend_data.v4 = Json::parse(text).ok());
    let large = format!("\"{}\"", "x".repeat(LeaseAttrs::MAX_BYTES));
    let cases = [
        (unreadable(9), "unreadable"),
        (Record { key: key(8), ..record(node(9), 1) }, "unreadable"),
        (with(9, |lease| lease.attrs.backend_data.v4 = Json::parse(&large).ok()), "too-large"),
        (with(9, |lease| lease.attrs.backend_type = "host-gw".into()), "wrong-type"),
        (with(9, |lease| lease.attrs.backend_type = "".into()), "wrong-type"),
        (with(9, |lease| lease.subnets = Dual::default()), "no-subnet"),
        (with_subnet(9, "10.43.9.0/24"), "outside-network"),
        (with_subnet(9, "0.0.0.0/0"), "outside-network"),
        (with_subnet(9, "10.42.0.0/16"), "whole-network"),
        (with_subnet(9, "10.42.9.0/31"), "too-small"),
        (with_subnet(9, "10.42.9.0/32"), "too-small"),
        (public("-"), "no-public-address"),
        (public("127.0.0.1"), "not-unicast"),
        (public("169.254.0.1"), "not-unicast"),
        (public("224.0.0.1"), "not-unicast"),
        (public("255.255.255.255"), "not-unicast"),
        (public("2001:db8::1"), "not-unicast"),
        (public("10.42.7.7"), "public-inside-network"),
        (public("192.0.2.1"), "own-address"),
        (data("\"02:00\""), "backend-data"),
        (data("\"00:00:00:00:00:00\""), "bad-mac"),
        (data("\"ff:ff:ff:ff:ff:ff\""), "bad-mac"),
        (data("\"02:00:00:00:00:01\""), "own-mac"),
        (data("\"02:00:00:00:00:02\""), "same-mac"),
        (with_subnet(9, "10.42.2.0/24"), "overlap"),
        (with_subnet(9, "10.42.1.0/24"), "overlaps-own"),
    ];
    for (bad, expected) in cases {
        let mut admission = admission();
        let key = bad.key.clone();
        // A new record that conflicts with the node's own is rejected in any case, by whichever rule comes first.
        admission.reset([2, 3].map(|n| record(node(n), n.into())).into());
        let before: Vec<_> = admission.peers().cloned().collect();
        assert_eq!(admission.upsert(bad), [], "{expected}");
        let quarantined = quarantined(&admission);
        assert_eq!(quarantined.len(), 1, "{expected}");
        assert_eq!((&quarantined[0].0, quarantined[0].1.label()), (&key, expected));
        assert!(!quarantined[0].1.to_string().is_empty());
        assert!(admission.peers().eq(before.iter()), "{expected}");
    }
}

#[test]
fn a_subnet_that_this_node_needs_is_refused_and_one_inside_a_connected_supernet_is_not() {
    let addr = |text: &str| BTreeSet::from([text.parse::<IpAddr>().unwrap()]);
    let prefix = |text: &str| BTreeSet::from([text.parse::<Prefix>().unwrap()]);
    let cases = [
        (HostView { addresses: addr("10.42.9.77"), ..view() }, "covers-address"),
        (HostView { next_hops: addr("10.42.9.0"), ..view() }, "covers-address"),
        (HostView { store: addr("10.42.9.255"), ..view() }, "covers-address"),
        (HostView { connected: prefix("10.42.9.0/24"), ..view() }, "covers-connected"),
        (HostView { connected: prefix("10.42.9.128/25"), ..view() }, "covers-connected"),
        (HostView { connected: prefix("10.42.0.0/16"), ..view() }, ""),
        (HostView { connected: prefix("10.42.8.0/23"), addresses: addr("10.42.8.9"), ..view() }, ""),
    ];
    for (host, expected) in cases {
        let mut admission = admission();
        admission.upsert(record(node(9), 1));
        assert_eq!(admission.set_host(host.clone()).len(), usize::from(!expected.is_empty()), "{host:?}");
        assert_eq!(label(&admission, 9), expected, "{host:?}");
        assert_eq!(admission.set_host(host), []);
        admission.set_host(view());
        assert_eq!(peers(&admission), ["node-9"]);
    }
}

#[test]
fn what_stands_on_our_own_devices_keeps_nobody_out() {
    let mut facts: HostFacts = host();
    let overlay = OverlayName::default();
    let device = facts.links[&2].clone();
    facts.links.insert(7, crate::kernel::HostLink { group: overlay.mark(), ..device });
    let left =
        crate::kernel::HostAddress { link: 7, addr: "10.42.9.0".parse().unwrap(), len: 32, ..facts.addresses[0] };
    facts.addresses.push(left);
    let view = HostView::new(&facts, &overlay, BTreeSet::new(), own());
    let mut admission = Admission::new(rules(&[Family::V4]), view);
    admission.upsert(record(node(9), 1));
    assert_eq!(peers(&admission), ["node-9"]);
}

#[test]
fn a_foreign_route_keeps_nobody_out() {
    let mut facts: HostFacts = host();
    let overlay = OverlayName::default();
    let device = facts.links[&2].clone();
    facts.links.insert(7, crate::kernel::HostLink { group: overlay.mark(), ..device });
    let prefix = "10.42.9.0/24".parse().unwrap();
    facts.on_link.insert(crate::kernel::HostRoute { prefix, link: Some(2), gateway: None, metric: 50 });
    let addr = "10.42.9.7".parse().unwrap();
    facts.next_hops.insert(crate::kernel::NextHop { addr, link: Some(7) });
    let view = HostView::new(&facts, &overlay, BTreeSet::new(), own());
    let mut admission = Admission::new(rules(&[Family::V4]), view);
    admission.upsert(record(node(9), 1));
    assert_eq!(peers(&admission), ["node-9"]);
    facts.next_hops.insert(crate::kernel::NextHop { addr, link: Some(2) });
    admission.set_host(HostView::new(&facts, &overlay, BTreeSet::new(), own()));
    assert_eq!(label(&admission, 9), "covers-address");
}

#[test]
fn the_older_of_two_in_conflict_wins_and_the_loser_is_promoted() {
    let mut admission = admission();
    let older = record(node(5), 10);
    let mut newer = record(node(4), 11);
    newer.lease = Ok(Arc::new(Lease { subnets: node(5).subnets, ..node(4) }));
    admission.reset(vec![newer.clone(), older.clone()]);
    assert_eq!((peers(&admission), label(&admission, 4)), (vec!["node-5".to_owned()], "overlap"));
    let changes = admission.remove(&older.key);
    assert_eq!(changes.iter().map(|change| change.new.is_some()).collect::<Vec<_>>(), [true, false]);
    assert_eq!(peers(&admission), ["node-4"]);
    // Of records created at the same time, the lower key wins.
    admission.upsert(Record { created: 11, ..older });
    assert_eq!((peers(&admission), label(&admission, 5)), (vec!["node-4".to_owned()], "overlap"));
}

#[test]
fn who_loses_to_a_loser_wins() {
    let mac = |n: u8, of: u8| with(n, move |lease| lease.attrs.backend_data.v4 = Some(mac_data(of)));
    let mut admission = admission();
    // 2 and 3 share a MAC address, 3 and 4 a subnet.
    let mut third = mac(3, 2);
    third.lease = third.lease.map(|lease| Arc::new(Lease { subnets: node(4).subnets, ..Lease::clone(&lease) }));
    for record in [third, mac(4, 4), mac(2, 2)] {
        admission.upsert(record);
    }
    assert_eq!((peers(&admission), label(&admission, 3)), (vec!["node-2".to_owned(), "node-4".into()], "same-mac"));
    admission.remove(&key(2));
    assert_eq!((peers(&admission), label(&admission, 4)), (vec!["node-3".to_owned()], "overlap"));
}

#[test]
fn the_last_good_version_stays_until_somebody_wants_its_place() {
    let mut admission = admission();
    admission.upsert(record(node(3), 1));
    assert_eq!(admission.upsert(unreadable(3)), []);
    assert_eq!((peers(&admission), label(&admission, 3)), (vec!["node-3".to_owned()], "unreadable"));
    assert_eq!(admission.withheld(), &BTreeSet::new());
    // Younger, but current.
    let taker = with_subnet(9, "10.42.3.0/24");
    admission.upsert(taker);
    assert_eq!(peers(&admission), ["node-9"]);
    admission.remove(&key(9));
    assert_eq!(peers(&admission), ["node-3"]);
    admission.reset(vec![unreadable(3)]);
    assert_eq!(peers(&admission), ["node-3"]);
    admission.reset(vec![]);
    assert!(admission.is_empty() && peers(&admission).is_empty());
}

#[test]
fn what_a_bad_record_names_is_withheld_after_a_restart() {
    let mut admission = admission();
    let wide = BadRecord::new("x", Dual { v4: "10.42.0.0/16".parse().ok(), v6: None });
    let wide = Record::bad(key(7), 7, wide);
    admission.reset(vec![unreadable(3), unreadable(4), with_subnet(9, "10.42.4.0/24"), unreadable(1), wide]);
    assert_eq!(admission.withheld(), &[node_subnet(Family::V4, 3)].into());
    assert_eq!((quarantined(&admission).len(), admission.quarantined_count()), (3, 3));
    assert_eq!(admission.own_trouble().unwrap().label(), "unreadable");
}

/// Returns the expected [`Admission::withheld`], by an iteration over all records.
fn withheld(admission: &Admission) -> BTreeSet<Prefix> {
    let bad = admission.table.troubled().filter_map(|id| admission.table.entry(id).bad.as_ref());
    let named = bad.flat_map(|bad| Family::BOTH.into_iter().filter_map(|family| bad.subnets.get(family).copied()));
    let possible = named.filter(|prefix| {
        let family = prefix.family();
        let own = admission.host.own.subnets.get(family).is_some_and(|own| own.overlaps(prefix));
        let mut alone = Dual::default();
        *alone.slot(family) = Some(*prefix);
        let could_be = admission.rules.holdable(&alone) == alone;
        !own && could_be && !admission.peers().any(|peer| peer.subnets.iter().any(|(_, held)| held.overlaps(prefix)))
    });
    possible.collect()
}

#[test]
fn families_are_judged_each_and_those_not_in_use_are_not() {
    let same_v6 = |n: u8| {
        let subnets = Dual { v6: Some(node_subnet(Family::V6, 2)), ..dual_node(n).subnets };
        Lease { subnets, ..dual_node(n) }
    };
    let records = || vec![record(dual_node(2), 2), record(same_v6(3), 3), record(node(4), 4)];
    let mut both = Admission::new(rules(&Family::BOTH), view());
    both.reset(records());
    assert_eq!((peers(&both), label(&both, 3)), (vec!["node-2".to_owned(), "node-4".into()], "overlap"));
    let mut v4 = admission();
    v4.reset(records());
    assert_eq!(peers(&v4).len(), 3);
}

#[test]
fn pools_keep_nobody_out_and_decide_between_those_that_overlap() {
    for subnet in ["10.42.0.0/24", "10.42.64.0/20", "10.42.9.0/25", "10.42.9.4/30"] {
        let mut admission = admission();
        admission.upsert(with_subnet(9, subnet));
        assert_eq!(peers(&admission), ["node-9"], "{subnet}");
    }
    // A record that fits the pool wins, however much younger it is: here a /24.
    let mut admission = admission();
    for wide in [with_subnet(3, "10.42.8.0/23"), with_subnet(4, "10.42.9.128/25"), with_subnet(5, "10.42.20.0/23")] {
        admission.upsert(wide);
    }
    assert_eq!((peers(&admission), label(&admission, 4)), (vec!["node-3".to_owned(), "node-5".into()], "overlap"));
    admission.upsert(record(node(9), 9));
    assert_eq!(peers(&admission), ["node-5", "node-9"]);
    admission.remove(&key(9));
    assert_eq!(peers(&admission), ["node-3", "node-5"]);
    // A family that is not in use does not fit the pool.
    let mut both = node(8);
    both.subnets = Dual { v6: Some(node_subnet(Family::V6, 8)), ..node(9).subnets };
    admission.upsert(record(both, 1));
    admission.upsert(record(node(9), 9));
    assert_eq!((peers(&admission), label(&admission, 8)), (vec!["node-5".to_owned(), "node-9".into()], "overlap"));
}

#[test]
fn a_public_address_that_no_host_can_have_is_refused() {
    let prefixes = ["198.51.100.64/26", "203.0.113.8/31", "203.0.113.77/32", "2001:db8::/64"];
    let host = HostView { connected: prefixes.map(|text| text.parse().unwrap()).into(), ..view() };
    for (addr, expected) in [
        ("198.51.100.64", "no-host"),
        ("198.51.100.127", "no-host"),
        ("198.51.100.65", ""),
        ("198.51.100.0", ""),
        ("198.51.100.255", ""),
        ("203.0.113.8", ""),
        ("203.0.113.9", ""),
        ("203.0.113.77", ""),
    ] {
        let mut admission = Admission::new(rules(&[Family::V4]), host.clone());
        admission.upsert(with(9, |lease| lease.attrs.public_ip.v4 = addr.parse().ok()));
        assert_eq!(label(&admission, 9), expected, "{addr}");
    }
}

#[test]
fn an_equal_public_address_is_reported_and_accepted() {
    let mut admission = admission();
    admission
        .reset(vec![record(node(2), 1), with(3, |lease| lease.attrs.public_ip.v4 = Some(node_address(Family::V4, 2)))]);
    assert_eq!(peers(&admission).len(), 2);
    assert_eq!(admission.shared_addresses(), [(node_address(Family::V4, 2), vec![key(2), key(3)])]);
}

/// A network with subnets of any length, as with Kubernetes.
fn external() -> Dual<crate::config::Network> {
    config(&[Family::V4], r#"{"Type":"vxlan"}"#)
        .networks
        .map(|_, network| crate::config::Network { pool: None, ..network.clone() })
}

/// A slow implementation of what the module documents.
#[derive(Default)]
struct Model {
    current: BTreeMap<LeaseKey, Record>,
    last_good: BTreeMap<LeaseKey, (u64, Arc<Lease>)>,
}

impl Model {
    fn put(&mut self, rules: &Rules, record: Record) {
        if let Some(lease) = good(rules, &record) {
            self.last_good.insert(record.key.clone(), (record.created, lease));
        }
        self.current.insert(record.key.clone(), record);
    }

    fn remove(&mut self, key: &LeaseKey) {
        self.current.remove(key);
        self.last_good.remove(key);
    }

    fn accepted(&self, rules: &Rules, host: &HostView) -> BTreeMap<LeaseKey, (bool, Arc<Lease>)> {
        let kept = |key: &LeaseKey| good(rules, &self.current[key]).is_none();
        let mut order: Vec<_> = self.last_good.iter().collect();
        order.sort_by_key(|(key, (created, lease))| (kept(key), !rules.fits(lease), *created, *key));
        let mut winners: Vec<(bool, &Arc<Lease>)> = Vec::new();
        for (key, (_, lease)) in order {
            let kept = kept(key);
            if !winners.iter().any(|(_, other)| conflict(rules, lease, other)) {
                winners.push((kept, lease));
            }
        }
        let suits = |lease: &Lease| {
            Some(&lease.key) != host.own.key.as_ref()
                && host.judge(lease, &rules.judge(lease).unwrap(), &rules.networks).is_ok()
        };
        winners.retain(|(_, lease)| suits(lease));
        winners.into_iter().map(|(kept, lease)| (lease.key.clone(), (kept, lease.clone()))).collect()
    }
}

fn good(rules: &Rules, record: &Record) -> Option<Arc<Lease>> {
    record.lease.as_ref().ok().filter(|lease| rules.judge(lease).is_ok()).cloned()
}

pub(super) fn conflict(rules: &Rules, a: &Lease, b: &Lease) -> bool {
    let (macs_a, macs_b) = (rules.judge(a).unwrap(), rules.judge(b).unwrap());
    rules.networks.families().any(|family| {
        let overlap = match (a.subnets.get(family), b.subnets.get(family)) {
            (Some(a), Some(b)) => a.overlaps(b),
            _ => false,
        };
        overlap || macs_a.get(family).is_some() && macs_a.get(family) == macs_b.get(family)
    })
}

fn any_record() -> impl Strategy<Value = Record> {
    let fields = (0u8..10, 0u64..4, 0u8..10, 0u8..12, 22u8..=26, 0u8..12, any::<bool>());
    fields.prop_map(|(name, created, fault, third, len, mac, dual)| {
        let subnet = Prefix::masked(IpAddr::from([10, 42, third, 64]), len).unwrap();
        let mut lease = Lease { key: LeaseKey::new(&format!("k{name}")), ..node(20 + name) };
        lease.subnets.v4 = Some(subnet);
        lease.attrs.backend_data.v4 = (mac > 0).then(|| mac_data(100 + mac));
        if dual {
            lease.subnets.v6 = Some(node_subnet(Family::V6, third));
            lease.attrs.public_ip.v6 = Some(node_address(Family::V6, 9));
        }
        match fault {
            0 => lease.attrs.backend_type = "x".into(),
            1 => return Record::bad(lease.key, created, BadRecord::new("x", lease.subnets)),
            _ => {}
        }
        record(lease, created)
    })
}

#[derive(Debug, Clone)]
enum Step {
    Upsert(Record),
    Remove(u8),
    Reset(Vec<Record>),
    Relist,
    Own(u8),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => any_record().prop_map(Step::Upsert),
        4 => (0u8..10).prop_map(Step::Remove),
        1 => proptest::collection::vec(any_record(), 0..12).prop_map(Step::Reset),
        1 => Just(Step::Relist),
        1 => (0u8..12).prop_map(Step::Own),
    ]
}

fn own_of(n: u8) -> HostView {
    let own = Own { key: Some(LeaseKey::new(&format!("k{n}"))), subnets: node(n).subnets, ..own() };
    HostView { own, ..view() }
}

proptest! {
    #[test]
    fn folding_events_in_any_interleaving_equals_one_reset(
        steps in proptest::collection::vec(any_step(), 0..40), pooled: bool,
    ) {
        let rules = || match pooled {
            true => rules(&[Family::V4]),
            false => Rules { networks: external(), ..rules(&[Family::V4]) },
        };
        let mut model = Model::default();
        let mut admission = Admission::new(rules(), view());
        let mut told: BTreeMap<LeaseKey, Arc<Lease>> = BTreeMap::new();
        let mut shown: BTreeSet<Prefix> = BTreeSet::new();
        for step in steps {
            let changes = match step {
                Step::Upsert(record) => {
                    model.put(&rules(), record.clone());
                    admission.upsert(record)
                }
                Step::Remove(n) => {
                    let key = LeaseKey::new(&format!("k{n}"));
                    model.remove(&key);
                    admission.remove(&key)
                }
                Step::Reset(records) => {
                    let listed: BTreeMap<_, _> = records.iter().map(|record| (record.key.clone(), record.clone())).collect();
                    let gone: Vec<_> = model.current.keys().filter(|key| !listed.contains_key(*key)).cloned().collect();
                    gone.iter().for_each(|key| model.remove(key));
                    listed.into_values().for_each(|record| model.put(&rules(), record));
                    admission.reset(records)
                }
                Step::Relist => {
                    let changes = admission.reset(model.current.values().rev().cloned().collect());
                    prop_assert_eq!(changes.len(), 0);
                    changes
                }
                Step::Own(n) => admission.set_host(own_of(n)),
            };
            for change in changes {
                prop_assert_eq!(told.get(&change.key), change.old.as_ref());
                prop_assert!(change.old != change.new);
                match change.new {
                    Some(lease) => told.insert(change.key, lease),
                    None => told.remove(&change.key),
                };
            }
            prop_assert_eq!(admission.quarantined_count(), admission.quarantined().count());
            prop_assert!(admission.quarantined().all(|(key, reason)| admission.why_not(&key) == Some(reason)));
            // Applying the changes gives the same result as an iteration over all records.
            for prefix in admission.changed_withheld() {
                let prefix = *prefix;
                if !shown.remove(&prefix) {
                    shown.insert(prefix);
                }
            }
            prop_assert_eq!(&shown, admission.withheld());
            prop_assert_eq!(&shown, &withheld(&admission));
            let expected = model.accepted(&rules(), admission.host());
            let found: BTreeMap<_, _> = admission.peers().map(|peer| (peer.key.clone(), peer.clone())).collect();
            let leases: BTreeMap<_, _> = expected.iter().map(|(key, (_, lease))| (key.clone(), lease.clone())).collect();
            prop_assert_eq!(&found, &leases);
            prop_assert_eq!(&told, &found);
            // A record has a reason exactly if it is not a peer.
            for key in model.current.keys().filter(|key| admission.host().own.key.as_ref() != Some(*key)) {
                let peer_now = expected.get(key).is_some_and(|(kept, _)| !kept);
                prop_assert_eq!(admission.why_not(key).is_none(), peer_now, "{}", key);
            }
            let pairs = found.values().flat_map(|a| found.values().map(move |b| (a, b)));
            for (a, b) in pairs.filter(|(a, b)| a.key < b.key) {
                prop_assert!(!conflict(&rules(), a, b));
            }
            prop_assert!(found.values().all(|peer| rules().networks.v4.unwrap().prefix.covers(&peer.subnets.v4.unwrap())));
        }
        // A node that starts now agrees, except for kept versions.
        let mut fresh = Admission::new(rules(), admission.host().clone());
        fresh.reset(model.current.values().cloned().collect());
        let expected = model.accepted(&rules(), admission.host());
        let current = expected.iter().filter(|(_, (kept, _))| !kept).map(|(_, (_, lease))| lease);
        prop_assert!(fresh.peers().eq(current));
    }

    #[test]
    fn order_and_a_bad_record_more_change_nobodys_verdict(
        records in proptest::collection::vec(any_record(), 0..20).prop_shuffle(), n in 0u8..10,
    ) {
        let rules = || rules(&[Family::V4]);
        let unique: BTreeMap<_, _> = records.iter().map(|record| (record.key.clone(), record.clone())).collect();
        let mut sorted = Admission::new(rules(), view());
        sorted.reset(unique.values().cloned().collect());
        let mut one_by_one = Admission::new(rules(), view());
        for record in records.iter().filter(|record| unique[&record.key] == **record) {
            one_by_one.upsert(record.clone());
        }
        prop_assert!(sorted.peers().eq(one_by_one.peers()));
        let reason = quarantined;
        prop_assert_eq!(reason(&sorted), reason(&one_by_one));
        let others = reason(&sorted);
        let bad = Record { key: LeaseKey::new("zz"), ..unreadable(n) };
        prop_assert_eq!(sorted.upsert(bad), []);
        prop_assert!(sorted.peers().eq(one_by_one.peers()));
        prop_assert_eq!(&reason(&sorted)[..others.len()], &others[..]);
    }
}
