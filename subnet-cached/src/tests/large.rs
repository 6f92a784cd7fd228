//! Tests with stores that contain more than can be kept.

use std::io::ErrorKind;

use flannel_core::lease::{BadRecord, Json, LeaseEvent, LeaseKey, MAX_RECORDS, RECORD_BYTES, Record};
use flannel_core::net::Dual;

use super::{Bed, begun, drive, peer};
use crate::keeper::{PACE, PACE_TOO_LARGE};
use crate::known::Known;

#[tokio::test(start_paused = true)]
async fn what_is_too_large_to_keep_is_not_written_again_and_again() {
    let bed = Bed::new();
    let cached = bed.open();
    let (_, mut watch) = begun(&cached).await;
    // Escaped, each character takes six bytes. With its key, each record just counts as one.
    let subnets = Dual { v4: "10.42.255.0/24".parse().ok(), v6: "2001:db8:ffff:ffff:ffff:ffff::/96".parse().ok() };
    let bad = BadRecord { reason: "\u{1}".repeat(RECORD_BYTES - 8), subnets };
    let keys: Vec<_> = (0..MAX_RECORDS - 10).map(|n| LeaseKey::new(&format!("{n}"))).collect();
    keys.iter().for_each(|key| bed.store.insert_bad(key, bad.clone()));
    drive(&mut watch, std::time::Duration::from_millis(10)).await;
    let error = cached.flush().await.unwrap_err();
    assert_eq!(error.source.kind(), ErrorKind::FileTooLarge);
    let due = cached.keeper.write_due().unwrap();
    assert!(due >= cached.keeper.now().after(PACE_TOO_LARGE / 2), "{due:?}");
    assert!(cached.trouble().is_some());
    // Once the data is clearly smaller, the next write comes at the ordinary pace.
    bed.store.delete_all(&keys[..30_000]);
    drive(&mut watch, std::time::Duration::from_millis(10)).await;
    let due = cached.keeper.write_due().unwrap();
    assert!(due <= cached.keeper.now().after(PACE), "{due:?}");
    cached.flush().await.unwrap();
    assert!(cached.trouble().is_none());
}

/// How many of the following records are kept: each counts as two.
const MAX_BAD: usize = MAX_RECORDS / 2;

fn bad(n: usize) -> Record {
    let bad = BadRecord { reason: "é".repeat(1000), subnets: Dual::default() };
    Record::bad(LeaseKey::new(&format!("{n}")), n as u64, bad)
}

#[test]
fn of_too_many_records_the_oldest_are_kept_and_no_text_at_length() {
    let mut known = Known::default();
    known.event(&LeaseEvent::Reset((0..MAX_BAD + 10).rev().map(bad).collect()));
    let kept = |known: &Known| known.records.as_ref().unwrap().len();
    assert_eq!(kept(&known), MAX_BAD);
    known.event(&LeaseEvent::Upsert(bad(MAX_BAD + 11)));
    assert_eq!(kept(&known), MAX_BAD);
    known.event(&LeaseEvent::Remove(LeaseKey::new("7")));
    known.event(&LeaseEvent::Upsert(bad(MAX_BAD + 11)));
    let records = known.records.unwrap();
    assert!(records.contains_key(&LeaseKey::new("8")) && records.len() == MAX_BAD);
    let texts = records.values().map(|entry| entry.lease.as_ref().unwrap_err().reason.len());
    assert_eq!(texts.max(), Some(BadRecord::MAX_BYTES));
}

/// Returns record `n` of the largest size: it counts as 16.
fn large(n: usize) -> Record {
    let mut lease = peer(3);
    lease.key = LeaseKey::new(&format!("peer-{n}"));
    lease.attrs.backend_data.v4 = Json::parse(&format!("\"{}\"", "x".repeat(15 * RECORD_BYTES))).ok();
    Record::of(lease, n as u64)
}

#[test]
fn large_records_that_come_one_by_one_count_as_several() {
    let mut known = Known::default();
    known.event(&LeaseEvent::Reset(vec![bad(0)]));
    for n in 1..=MAX_RECORDS / 16 + 10 {
        known.event(&LeaseEvent::Upsert(large(n)));
    }
    let kept = |known: &Known| known.records.as_ref().unwrap().len();
    assert_eq!(kept(&known), MAX_RECORDS / 16);
    // A record that outgrows the available room is not kept in its old form.
    for n in 0..16 {
        known.event(&LeaseEvent::Upsert(bad(n)));
    }
    let grown = large(MAX_RECORDS);
    let key = LeaseKey::new("7");
    known.event(&LeaseEvent::Upsert(Record { key: key.clone(), ..grown }));
    assert!(!known.records.as_ref().unwrap().contains_key(&key));
    known.event(&LeaseEvent::Reset((1..=MAX_RECORDS / 16 + 10).map(large).collect()));
    assert!(kept(&known) < MAX_RECORDS / 16 + 10);
}

#[test]
fn a_list_that_may_lack_the_own_record_leaves_the_lease_as_it_is() {
    let mut known = crate::tests::held(None);
    let before = known.own.clone();
    known.event(&LeaseEvent::Reset((0..MAX_BAD + 1).map(bad).collect()));
    assert_eq!(known.own, before);
    known.event(&LeaseEvent::Reset((0..MAX_BAD).map(bad).collect()));
    assert_ne!(known.own, before);
}
