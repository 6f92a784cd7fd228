//! The cost of hostile records, and their effect on other records.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::tests::{admission, conflict, dual_node, mac_data, node, record, rules, view};
use super::*;
use crate::lease::Json;
use crate::testing::samples::{node_address, node_subnet};

/// The maximum number of visited records per record that a step concerns.
const VISITS: usize = 16;

fn key(n: u32) -> LeaseKey {
    LeaseKey::new(&format!("10.42.200.0-24&fd00:{:x}:{:x}::-64", n >> 16, n & 0xffff))
}

fn mac(n: u32) -> Json {
    let [.., a, b, c] = n.to_be_bytes();
    Json::parse(&format!("\"02:00:01:{a:02x}:{b:02x}:{c:02x}\"")).unwrap()
}

/// Record `n` of those that share one subnet, with its own MAC address.
fn same_subnet(n: u32) -> Record {
    let mut lease = Lease { key: key(n), ..node(200) };
    lease.attrs.backend_data.v4 = Some(mac(n));
    record(lease, n.into())
}

/// Record `n` of those that share one MAC address, with its own subnet.
fn same_mac(n: u32) -> Record {
    let subnet = Prefix::masked(IpAddr::from((0x0a2a_8000 + (n << 2)).to_be_bytes()), 30).unwrap();
    let mut lease = Lease { key: key(n), subnets: Dual { v4: Some(subnet), v6: None }, ..node(200) };
    lease.attrs.backend_data.v4 = Some(mac_data(200));
    record(lease, n.into())
}

#[test]
fn records_that_share_a_subnet_or_a_mac_address_cost_each_the_same() {
    for hostile in [same_subnet, same_mac] {
        for count in [500, 4000_u32] {
            let mut admission = admission();
            let bound = VISITS * count as usize;
            admission.reset((0..count).map(hostile).collect());
            assert_eq!(admission.quarantined().count(), count as usize - 1);
            let visits = admission.table.take_visits();
            assert!(visits <= bound, "a start looks at {visits}");
            let host = HostView { addresses: ["198.51.100.7".parse().unwrap()].into(), ..view() };
            admission.set_host(host);
            assert_eq!(admission.quarantined().count(), count as usize - 1);
            let visits = admission.table.take_visits();
            assert!(visits <= bound, "a new host address looks at {visits}");
            for n in 0..10 {
                admission.remove(&hostile(n).key);
                assert_eq!(admission.peers().count(), 1);
                let visits = admission.table.take_visits();
                assert!(visits <= VISITS, "the winner's end looks at {visits} of {count}");
            }
        }
    }
}

#[test]
fn the_cost_of_a_good_record_is_flat() {
    for count in [500, 8000_u32] {
        let mut admission = admission();
        let good = |n: u32| {
            let subnet = Prefix::masked(IpAddr::from((0x0a2a_0200 + (n << 2)).to_be_bytes()), 30).unwrap();
            let mut lease = Lease { key: key(n), subnets: Dual { v4: Some(subnet), v6: None }, ..node(200) };
            lease.attrs.backend_data.v4 = Some(mac(n));
            // In a mixed order.
            record(lease, (n * 7919 % count).into())
        };
        admission.reset((0..count).map(good).collect());
        assert_eq!(admission.peers().count() as u32, count);
        let visits = admission.table.take_visits();
        assert!(visits <= 4 * count as usize, "{visits} of {count}");
    }
}

#[test]
fn one_wide_record_costs_what_it_overlaps_and_no_more() {
    let mut admission = admission();
    let narrow = |n: u32| {
        let Record { created, lease, .. } = same_mac(n);
        let mut lease = Lease::clone(&lease.unwrap());
        lease.attrs.backend_data.v4 = Some(mac(n));
        record(lease, created)
    };
    let wide = |n: u32, subnet: &str, created: u64| {
        let mut lease = Lease { key: LeaseKey::new(&format!("wide-{n}")), ..node(200) };
        lease.subnets.v4 = subnet.parse().ok();
        lease.attrs.backend_data.v4 = Some(mac(1 << 20 | n));
        record(lease, created)
    };
    let count = 2000_u32;
    // The oldest of all is one of the narrow ones, the last in the order of subnets; the wide ones are next.
    let narrow = |n: u32| Record { created: if n + 1 == count { 1 } else { 10_000 }, ..narrow(n) };
    admission.reset((0..count).map(narrow).collect());
    assert_eq!(admission.peers().count(), count as usize);
    admission.table.take_visits();
    for n in 0..10 {
        assert_eq!(admission.upsert(wide(n, "10.42.128.0/17", 5)), []);
        let visits = admission.table.take_visits();
        assert!(visits <= VISITS * count as usize, "one that loses looks at {visits}");
    }
    // Many at once cost no more than one.
    let many = (10..1010).map(|n| wide(n, "10.42.128.0/17", 5));
    let all = (0..count).map(narrow).chain(many).chain((0..10).map(|n| wide(n, "10.42.128.0/17", 5)));
    assert_eq!(admission.reset(all.collect()), []);
    let visits = admission.table.take_visits();
    assert!(visits <= VISITS * (count as usize + 1000), "a thousand that lose look at {visits}");
    // One record displaces all others; when it is removed, they return.
    assert_eq!(admission.upsert(wide(2000, "10.42.128.0/17", 0)).len() as u32, count + 1);
    let visits = admission.table.take_visits();
    assert!(visits <= VISITS * count as usize, "one that wins looks at {visits}");
}

/// Bad record `n` of those that name prefixes inside one node's subnets.
fn bad_inside(subnets: Dual<Prefix>, n: u32) -> Record {
    let inside = |prefix: &Prefix, len: u8| {
        let addr = match prefix.addr() {
            IpAddr::V4(addr) => IpAddr::from((u32::from(addr) + (n << 2)).to_be_bytes()),
            IpAddr::V6(addr) => IpAddr::from((u128::from(addr) + (u128::from(n) << 2)).to_be_bytes()),
        };
        Prefix::masked(addr, len).unwrap()
    };
    let subnets = Dual {
        v4: subnets.v4.as_ref().map(|prefix| inside(prefix, 30)),
        v6: subnets.v6.as_ref().map(|prefix| inside(prefix, 126)),
    };
    Record::bad(key(n), n.into(), BadRecord::new("no JSON", subnets))
}

#[test]
fn a_renewal_costs_the_same_however_many_bad_records_name_what_is_inside_its_subnet() {
    let subnets = Dual { v4: "10.42.128.0/17".parse().ok(), v6: dual_node(2).subnets.v6 };
    let holder = |expires: u64| {
        let expires = Some(crate::clock::BootTime(std::time::Duration::from_secs(expires)));
        record(Lease { subnets, expires, ..dual_node(2) }, 2)
    };
    let mut admission = Admission::new(rules(&Family::BOTH), view());
    admission.reset((0..4000).map(|n| bad_inside(subnets, n)).chain([holder(1)]).collect());
    assert_eq!(peers(&admission), ["node-2"]);
    admission.table.take_visits();
    assert_eq!(admission.upsert(holder(2)), []);
    let visits = admission.table.take_visits();
    assert!(visits <= VISITS, "a renewal looks at {visits}");
}

#[test]
fn a_peer_that_comes_and_goes_has_a_bounded_number_of_named_prefixes_judged() {
    let subnets = dual_node(2).subnets;
    let mut admission = Admission::new(rules(&Family::BOTH), view());
    let count = Admission::MAX_WITHHELD as u32 + 2000;
    admission.reset((0..count).map(|n| bad_inside(Dual { v4: None, ..subnets }, n)).collect());
    assert_eq!((admission.withheld().len(), admission.withheld_overflow()), (Admission::MAX_WITHHELD, 2000));
    admission.table.take_visits();
    for _ in 0..2 {
        assert_eq!(admission.upsert(record(dual_node(2), 2)).len(), 1);
        assert!(admission.withheld().is_empty());
        assert_eq!(admission.remove(&dual_node(2).key).len(), 1);
        assert_eq!(admission.withheld().len(), Admission::MAX_WITHHELD);
    }
    let visits = admission.table.take_visits();
    assert!(visits <= 4 * 2 * Admission::MAX_WITHHELD, "four changes look at {visits}");
    // Removed prefixes make room for others. Removing a record whose prefix was not tracked does not remove the same
    // prefix of another record.
    (0..count).for_each(|n| drop(admission.remove(&key(n))));
    assert!(admission.withheld().is_empty());
    admission.upsert(bad_inside(subnets, 1));
    assert_eq!(admission.withheld().len(), 2);
}

#[test]
fn a_change_tells_of_the_prefixes_it_concerns_and_not_of_all() {
    let mut admission = admission();
    let bad = |n: u32| {
        let subnet = Prefix::masked(IpAddr::from((0x0a2a_0000 + (n << 2)).to_be_bytes()), 30).unwrap();
        let subnets = Dual { v4: Some(subnet), v6: None };
        Record::bad(LeaseKey::new(&format!("n{n}")), 1, BadRecord::new("x", subnets))
    };
    admission.reset((1000..11_000).map(bad).collect());
    let told = |admission: &Admission| admission.changed_withheld().len();
    assert_eq!((admission.quarantined_count(), told(&admission)), (10_000, 10_000));
    admission.upsert(record(Lease { subnets: bad(1007).lease.unwrap_err().subnets, ..node(2) }, 1));
    assert_eq!(told(&admission), 1, "its prefix is not withheld any more");
    admission.remove(&LeaseKey::new("n1008"));
    assert_eq!(told(&admission), 1);
    admission.upsert(record(node(200), 1));
    assert_eq!(told(&admission), 0);
}

#[test]
fn prefixes_that_no_peer_could_hold_are_not_kept() {
    let mut admission = admission();
    for (n, subnets) in [
        Dual { v4: "10.42.0.0/16".parse().ok(), v6: dual_node(3).subnets.v6 },
        Dual { v4: "10.43.0.0/24".parse().ok(), v6: None },
        Dual { v4: "10.42.3.4/31".parse().ok(), v6: None },
        Dual { v4: "0.0.0.0/0".parse().ok(), v6: None },
    ]
    .into_iter()
    .enumerate()
    {
        admission.upsert(Record::bad(key(n as u32), 1, BadRecord::new("no JSON", subnets)));
        assert_eq!(admission.table.take_visits(), 0, "{subnets:?}");
    }
}

/// Node `n`, which is not hostile, created at `n`.
fn good(n: u8) -> Record {
    record(node(n), n.into())
}

fn peers(admission: &Admission) -> Vec<String> {
    admission.peers().map(|peer| peer.key.to_string()).collect()
}

fn names(numbers: impl IntoIterator<Item = u8>) -> Vec<String> {
    let mut names: Vec<_> = numbers.into_iter().map(|n| node(n).key.to_string()).collect();
    names.sort();
    names
}

/// An admission with room for at most `limit` records.
fn limited(limit: usize) -> Admission {
    Admission { limit, ..admission() }
}

#[test]
fn of_too_many_records_the_youngest_are_dropped_and_asked_for_once_there_is_room() {
    let mut admission = limited(16);
    admission.reset((11..41).map(good).collect());
    assert_eq!((peers(&admission), admission.dropped()), (names(11..27), 14));
    // A younger record changes nothing, even if it would be larger or was dropped before.
    assert_eq!((admission.upsert(good(41)), admission.upsert(good(27))), (vec![], vec![]));
    assert_eq!((admission.len(), admission.dropped()), (16, 16));
    // An older record displaces the youngest.
    assert_eq!(admission.upsert(good(2)).len(), 2);
    assert_eq!((peers(&admission), admission.dropped()), (names((11..26).chain([2])), 17));
    admission.remove(&node(11).key);
    assert_eq!(admission.upsert(good(26)), [], "it was dropped: others may have been that are older");
    assert!(!admission.has_room_again());
    admission.remove(&node(12).key);
    assert!(admission.has_room_again());
    admission.reset((13..41).chain([2]).map(good).collect());
    assert_eq!((peers(&admission), admission.dropped()), (names((13..28).chain([2])), 13));
    admission.reset((13..20).map(good).collect());
    assert_eq!((admission.dropped(), admission.has_room_again()), (0, false));
}

#[test]
fn a_large_record_counts_as_several_and_a_key_that_is_too_long_is_dropped() {
    let mut admission = limited(16);
    let mut large = Lease::clone(&good(90).lease.unwrap());
    large.attrs.backend_data.v6 = Json::parse(&format!("\"{}\"", "x".repeat(4000))).ok();
    admission.reset((11..20).map(good).chain([record(large, 90)]).collect());
    assert_eq!((peers(&admission), admission.dropped()), (names(11..20), 1));
    let long = Lease { key: LeaseKey::new(&"x".repeat(LeaseKey::MAX_BYTES + 1)), ..node(21) };
    assert_eq!(admission.upsert(record(long, 1)), []);
    assert_eq!((admission.len(), admission.dropped()), (9, 2));
}

#[test]
fn keys_that_are_too_long_take_nobodys_place() {
    let mut admission = limited(16);
    let long = |n: u8| {
        let key = LeaseKey::new(&format!("{}{n}", "x".repeat(64 * LeaseKey::MAX_BYTES)));
        record(Lease { key, ..node(n) }, 1)
    };
    admission.reset((11..25).map(good).chain((30..40).map(long)).collect());
    assert_eq!((peers(&admission), admission.dropped()), (names(11..25), 10));
    assert!(!admission.has_room_again(), "a list would drop the same");
}

#[test]
fn an_own_record_that_others_drop_is_told() {
    let mut admission = limited(16);
    let own = |created| Record { created, ..good(1) };
    admission.reset((11..41).map(good).chain([own(50)]).collect());
    assert_eq!(admission.own_trouble(), Some(Reason::TooMany));
    admission.upsert(own(5));
    assert_eq!(admission.own_trouble(), None);
    admission.reset((11..41).map(good).collect());
    assert_eq!(admission.own_trouble(), Some(Reason::TooMany), "a store that lists too many leaves the youngest out");
    admission.upsert(own(5));
    assert_eq!(admission.own_trouble(), None);
    admission.reset((11..21).map(good).collect());
    assert_eq!(admission.own_trouble(), None, "there is none");
    admission.reset(vec![own(50)]);
    assert_eq!(admission.own_trouble(), None);
}

#[test]
fn the_texts_of_bad_records_are_bounded_in_number_and_length() {
    let mut admission = admission();
    let bad = |n: u32| Record::bad(key(n), n.into(), BadRecord { reason: "é".repeat(4000), subnets: Dual::default() });
    let texts = |admission: &Admission| {
        let texts = admission.quarantined().map(|(_, reason)| match reason {
            Reason::Unreadable(text) => text.len(),
            other => panic!("{other}"),
        });
        texts.fold((0, 0), |(count, sum), len| (count + usize::from(len > 0), sum + len))
    };
    admission.reset((0..3000).map(bad).collect());
    assert_eq!(texts(&admission), (MAX_TEXTS, MAX_TEXTS * BadRecord::MAX_BYTES));
    assert!(admission.quarantined().all(|(_, reason)| reason.to_string().len() > "unreadable: ".len()));
    // Removed texts make room for others, and remaining records keep their texts.
    admission.reset((2000..3000).map(bad).collect());
    admission.reset((2000..5000).map(bad).collect());
    assert_eq!(texts(&admission).0, MAX_TEXTS);
}

fn any_hostile() -> impl Strategy<Value = Record> {
    let fields = (0u32..40, 10u64..14, 0u8..6, 20u8..=30, 0u32..8, 0u8..4, any::<bool>());
    fields.prop_map(|(n, created, third, len, mac_of, v6, bad)| {
        let subnet = Prefix::masked(IpAddr::from([10, 42, 100 + third, 200]), len).unwrap();
        let mut lease = Lease { key: key(n), ..node(200) };
        lease.subnets = Dual { v4: Some(subnet), v6: (v6 > 0).then(|| node_subnet(Family::V6, v6)) };
        lease.attrs.public_ip.v6 = Some(node_address(Family::V6, 9));
        lease.attrs.backend_data.v4 = (mac_of > 0).then(|| mac(mac_of));
        if bad && n % 4 == 0 {
            lease.attrs.backend_type = "x".repeat(4000).into();
        }
        record(lease, created)
    })
}

/// Returns the records that the named records may affect: all that conflicts connect to one of them.
fn concerned<'a>(rules: &Rules, all: &'a [Record], keys: &BTreeSet<LeaseKey>) -> BTreeSet<&'a LeaseKey> {
    let leases: Vec<_> = all.iter().filter_map(|record| record.lease.as_ref().ok()).collect();
    let leases: Vec<_> = leases.into_iter().filter(|lease| rules.judge(lease).is_ok()).collect();
    let mut found: BTreeSet<&LeaseKey> =
        all.iter().map(|record| &record.key).filter(|key| keys.contains(*key)).collect();
    loop {
        let joined: Vec<_> = leases
            .iter()
            .filter(|lease| !found.contains(&lease.key))
            .filter(|lease| leases.iter().any(|it| found.contains(&it.key) && conflict(rules, lease, it)))
            .map(|lease| &lease.key)
            .collect();
        if joined.is_empty() {
            return found;
        }
        found.extend(joined);
    }
}

/// Returns how many bad records name a prefix that overlaps a subnet of one of these.
fn named_there(rules: &Rules, all: &[Record], keys: &BTreeSet<&LeaseKey>) -> usize {
    let subnets = |record: &Record| match &record.lease {
        Ok(lease) => lease.subnets,
        Err(bad) => bad.subnets,
    };
    let is_bad = |record: &&Record| !record.lease.as_ref().is_ok_and(|lease| rules.judge(lease).is_ok());
    let there: Vec<_> = all.iter().filter(|record| keys.contains(&record.key)).map(subnets).collect();
    let overlaps = |subnets: Dual<Prefix>| {
        let mut pairs = there
            .iter()
            .flat_map(|it| it.iter().map(|(_, it)| it))
            .flat_map(|it| subnets.iter().map(move |named| (it, *named.1)));
        pairs.any(|(it, named)| it.overlaps(&named))
    };
    all.iter().filter(is_bad).filter(|record| overlaps(subnets(record))).count()
}

proptest! {
    #[test]
    fn a_list_that_was_cut_leaves_no_room_whatever_becomes_of_its_records(
        records in proptest::collection::vec((any_hostile(), 1usize..200), 60..160), limit in 360usize..480,
    ) {
        let numbered = records.into_iter().enumerate().map(|(n, (mut record, key_bytes))| {
            record.key = LeaseKey::new(&format!("{n:0>key_bytes$}"));
            if let (Ok(lease), false) = (&mut record.lease, n % 7 == 0) {
                Arc::make_mut(lease).key = record.key.clone();
            }
            if n % 5 == 0 {
                record.lease = Err(Box::new(BadRecord::new("é".repeat(n), Dual::default())));
            }
            record
        });
        let records: Vec<_> = numbered.collect();
        let mut admission = Admission { limit, ..Admission::new(rules(&Family::BOTH), view()) };
        admission.reset(records.clone());
        let heaviest = records.iter().map(Record::weight).max().unwrap_or_default();
        prop_assert!(heaviest <= limit / 8, "what is dropped first leaves no more room than this");
        prop_assert!(admission.dropped() == 0 || !admission.has_room_again(), "{}", admission.table.weight());
    }

    #[test]
    fn hostile_records_cost_what_they_concern_and_move_nobody_older(
        steps in proptest::collection::vec((any_hostile(), 0u8..4), 1..60), limit in 60usize..100,
    ) {
        let same = rules(&Family::BOTH);
        let mut admission = Admission { limit, ..Admission::new(rules(&Family::BOTH), view()) };
        let honest: Vec<_> = (2..8).map(|n| record(dual_node(n), n.into())).collect();
        // Their keys differ from all others.
        let inside: Vec<_> = (100..140).map(|n| bad_inside(Dual { v4: None, ..dual_node(2).subnets }, n)).collect();
        admission.reset([honest.clone(), inside.clone()].concat());
        let honest_peers = peers(&admission);
        let mut current: BTreeMap<LeaseKey, Record> =
            honest.iter().map(|record| (record.key.clone(), record.clone())).collect();
        for (hostile, act) in steps {
            let before: Vec<_> = current.values().chain(&inside).cloned().collect();
            // Meanwhile honest nodes renew their leases.
            let hostile = if act == 1 { honest[hostile.created as usize % honest.len()].clone() } else { hostile };
            admission.table.take_visits();
            let key = hostile.key.clone();
            let changes = if act == 0 {
                current.remove(&key);
                admission.remove(&key)
            } else {
                current.insert(key.clone(), hostile.clone());
                admission.upsert(hostile)
            };
            let visits = admission.table.take_visits();
            // This few are cheap in any case.
            if visits > VISITS {
                let both: Vec<_> = before.into_iter().chain(current.values().cloned()).collect();
                // Another record may have been dropped to make room for it.
                let keys = changes.iter().map(|change| change.key.clone()).chain([key]).collect();
                let concerned = concerned(&same, &both, &keys);
                // When a peer is added, removed or changed, bad records that name an overlapping prefix are affected
                // too.
                let named = if changes.is_empty() { 0 } else { named_there(&same, &both, &concerned) };
                let concerned = concerned.len() + named;
                // Subnets that overlap a removed one are looked up once for each prefix length in the table.
                let lengths: BTreeSet<_> = both
                    .iter()
                    .filter_map(|record| record.lease.as_ref().ok())
                    .flat_map(|lease| lease.subnets.iter().map(|(family, subnet)| (family, subnet.len())))
                    .collect();
                let most = (VISITS + lengths.len()) * concerned;
                prop_assert!(visits <= most, "{} looks, {} concerned", visits, concerned);
            }
            prop_assert!(admission.table.weight() <= limit);
            let now = peers(&admission);
            prop_assert!(honest_peers.iter().all(|peer| now.contains(peer)), "{:?}", now);
            prop_assert!(changes.iter().all(|change| !honest_peers.contains(&change.key.to_string())));
        }
        // A node that starts now finds the same peers, except for kept versions and records dropped meanwhile.
        if admission.dropped() == 0 && current.values().all(|record| same.judge(record.lease.as_ref().unwrap()).is_ok()) {
            let mut fresh = Admission::new(rules(&Family::BOTH), view());
            fresh.reset(current.into_values().rev().collect());
            prop_assert_eq!(peers(&fresh), peers(&admission));
        }
    }

    #[test]
    fn of_too_many_all_nodes_drop_the_same_in_whatever_order_they_come(
        records in proptest::collection::btree_map(11u8..60, 0u64..20, 0..40).prop_map(|map| map.into_iter().collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let records: Vec<_> = records.into_iter().map(|(n, created)| record(node(n), created)).collect();
        let mut at_once = limited(16);
        at_once.reset(records.clone());
        let mut one_by_one = limited(16);
        records.into_iter().for_each(|record| drop(one_by_one.upsert(record)));
        prop_assert_eq!(peers(&at_once), peers(&one_by_one));
        prop_assert_eq!(at_once.dropped(), one_by_one.dropped());
        prop_assert_eq!(&at_once.horizon, &one_by_one.horizon);
    }
}
