//! The state file's format.

use std::time::{Instant, SystemTime};

use flannel_core::files::{Mode, Trust};
use flannel_core::lease::{Json, OldestRecords};
use proptest::prelude::*;

use super::*;
use crate::known::Entry;
use crate::wire;

fn text(known: &Known, now: u64, wall: u64) -> Vec<u8> {
    let mut text = Vec::new();
    wire::write(&mut text, known, ORIGIN, BootTime(Duration::from_secs(now)), at(wall)).unwrap();
    text
}

fn read(text: &[u8], now: u64, wall: u64) -> Known {
    wire::parse(text, ORIGIN, BootTime(Duration::from_secs(now)), at(wall)).unwrap()
}

fn at(wall: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(wall)
}

#[test]
fn a_lease_runs_out_by_the_wall_clock_wherever_the_boot_clock_stands() {
    // Saved 100 s after boot and 60 s before its end, at wall time 10 000.
    let text = text(&held(Some(160)), 100, 10_000);
    assert_eq!(read(&text, 5, 10_020), held(Some(45)));
    for (wall, why) in [(10_060, "over"), (99_999, "long over"), (9_000, "the clock was set back")] {
        assert_eq!(read(&text, 5, wall).own, Own::None, "{why}");
    }
    assert_eq!(read(&text, 5, 9_990), held(Some(65)), "never longer than it was");
    let never = self::text(&held(None), 100, 10_000);
    assert_eq!(read(&never, 5, 0), held(None));
}

fn known(expires: impl Strategy<Value = Option<u64>>) -> impl Strategy<Value = Known> {
    let record = (any::<u8>(), any::<u64>(), "\\PC{0,12}", 0..3_u8).prop_map(|(n, created, noise, kind)| {
        let mut lease = peer(n.into());
        lease.key = LeaseKey::new(&format!("{noise}-{n}"));
        lease.attrs.backend_type = noise.as_str().into();
        let data = serde_json::to_string(&serde_json::json!({ "x": [noise.as_str()], "VNI": n })).unwrap();
        lease.attrs.backend_data.v4 = (kind == 1).then(|| Json::parse(&data).unwrap());
        if kind == 2 {
            lease.subnets.v6 = Some(samples::node_subnet(Family::V6, n));
            lease.attrs.public_ip.v6 = Some(samples::node_address(Family::V6, n));
        }
        let entry = if kind == 0 {
            Err(Box::new(BadRecord { reason: noise, subnets: lease.subnets }))
        } else {
            Ok(Arc::new(lease.clone()))
        };
        (lease.key, Entry { created, lease: entry })
    });
    let own = (expires, proptest::option::of("\\PC{0,8}"), any::<bool>());
    (own, proptest::collection::btree_map(any::<u8>(), record, 0..12)).prop_map(|((expires, fence, has), records)| {
        let mut known = held(expires);
        match &mut known.own {
            Own::Held(_, lease) if has => {
                lease.fence = fence.map(|text| Fence::new(&text)).unwrap_or_default();
            }
            _ => known.own = Own::None,
        }
        known.records = Some(records.into_values().collect());
        known
    })
}

proptest! {
    #[test]
    fn what_is_known_round_trips_byte_for_byte(known in known(proptest::option::of(200_u64..1000))) {
        let first = text(&known, 100, 10_000);
        let back = read(&first, 100, 10_000);
        prop_assert_eq!(&back, &known);
        prop_assert_eq!(text(&back, 100, 10_000), first);
    }

    #[test]
    fn any_bytes_are_read_or_refused(known in known(Just(None)), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = text(&known, 100, 10_000);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = wire::parse(&bytes, ORIGIN, BootTime::default(), self::at(10_000));
    }
}

#[test]
fn a_hostile_peers_nesting_is_kept_and_what_is_too_large_stays_bad() {
    let deep = format!("{}1{}", "[".repeat(1500), "]".repeat(1500));
    let large = format!("\"{}\"", "x".repeat(LeaseAttrs::MAX_BYTES));
    let entry = |data: &str, n: u32| {
        let mut lease = peer(n);
        lease.attrs.backend_data.v4 = Some(Json::parse(data).unwrap());
        (lease.key.clone(), Entry { created: 1, lease: Ok(Arc::new(lease)) })
    };
    let (deep, large) = (entry(&deep, 3), entry(&large, 4));
    let records = Some([deep.clone(), large.clone()].into_iter().collect());
    let back = read(&text(&Known { records, ..held(None) }, 0, 0), 0, 0).records.unwrap();
    assert_eq!(back[&deep.0], deep.1);
    assert_eq!(back[&large.0].lease.as_ref().unwrap_err().subnets, peer(4).subnets);
}

#[test]
fn an_own_lease_that_would_not_be_read_back_costs_nothing_else() {
    let mut known = held(None);
    let Own::Held(_, lease) = &mut known.own else { panic!("{known:?}") };
    let large = format!("\"{}\"", "x".repeat(LeaseAttrs::MAX_BYTES));
    lease.attrs.backend_data.v4 = Some(Json::parse(&large).unwrap());
    let back = read(&text(&known, 0, 0), 0, 0);
    assert_eq!(back, Known { own: Own::None, ..known });
}

#[test]
fn of_a_file_with_too_many_records_the_oldest_are_recalled_and_texts_without_end_are_cut() {
    let bad = |n: usize, reason: &str| {
        let entry = Entry {
            created: n as u64,
            lease: Err(Box::new(BadRecord { reason: reason.into(), subnets: Dual::default() })),
        };
        (LeaseKey::new(&n.to_string()), entry)
    };
    let back = |records| read(&text(&Known { records: Some(records), ..held(None) }, 0, 0), 0, 0).records.unwrap();
    let cut = back([bad(1, &"x".repeat(1 << 16))].into_iter().collect());
    assert_eq!(cut.values().next().unwrap().lease.as_ref().unwrap_err().reason.len(), BadRecord::MAX_BYTES);
    let most = OldestRecords::LIMIT;
    let records = back((0..most + 1000).map(|n| bad(n, "")).collect());
    assert_eq!(records.len(), most);
    assert!(records.values().all(|entry| entry.created < most as u64));
}

#[test]
fn ten_thousand_records_are_kept_and_recalled() {
    let entry = |n: u32| {
        let mut lease = peer(0);
        lease.key = LeaseKey::new(&format!("10.{}.{}.0-24", n >> 8, n & 0xff));
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{:02x}:{:02x}"}}"#, n >> 8, n & 0xff);
        lease.attrs.backend_data.v4 = Some(Json::parse(&data).unwrap());
        (lease.key.clone(), Entry { created: n.into(), lease: Ok(Arc::new(lease)) })
    };
    let known = Known { records: Some((0..10_000).map(entry).collect()), ..held(None) };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    let begun = Instant::now();
    files::replace(&path, Mode::Private, MAX_BYTES, |to| wire::write(to, &known, ORIGIN, BootTime::default(), at(0)))
        .unwrap();
    let saved = begun.elapsed();
    let bytes = files::read(&path, Trust::OwnersAlone, MAX_BYTES).unwrap().unwrap();
    assert_eq!(read(&bytes, 0, 0), known);
    let loaded = begun.elapsed() - saved;
    println!("saved in {saved:?}, loaded in {loaded:?}");
}
