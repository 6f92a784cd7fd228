//! Alone in its process: it measures the process.

#![expect(clippy::expect_used, reason = "a test that cannot measure has to fail")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use flannel_core::admit::{Admission, HostView, Rules};
use flannel_core::backend::alloc::Alloc;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Fence, Json, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, MacAddr, Prefix};

const RECORDS: u32 = 10_000;

#[test]
fn ten_thousand_records_with_their_leases_stay_below_4_mib() {
    let config = br#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
    let config = NetworkConfig::parse(config, Allocation::Pool).unwrap();
    let mut rules = Rules::new(&config, Arc::new(Alloc));
    rules.wire_type = "vxlan";
    rules.hardware_address = Box::new(|attrs: &LeaseAttrs, _| {
        let text = attrs.backend_data.v4.as_ref().map_or("", Json::as_str);
        Ok(text.get(19..36).and_then(|mac| mac.parse::<MacAddr>().ok()))
    });
    let mut admission = Admission::new(rules, HostView::default());
    let before = resident();
    // As a store delivers them: some in the first list, the others one by one.
    admission.reset((1..RECORDS / 2).map(record).collect());
    (RECORDS / 2..=RECORDS).for_each(|n| assert_eq!(admission.upsert(record(n)).len(), 1));
    // A renewal of each.
    (1..=RECORDS).for_each(|n| assert_eq!(admission.upsert(record(n)).len(), 0));
    let used = resident().saturating_sub(before);
    assert_eq!(admission.peers().count(), RECORDS as usize);
    println!("{RECORDS} records: {} KiB", used / 1024);
    assert!(used < 4 << 20, "{} KiB", used / 1024);
}

/// As etcd has it.
fn record(n: u32) -> Record {
    let subnet = Ipv4Addr::from(0x0a00_0000 + (n << 8));
    let key = LeaseKey::new(&format!("{subnet}-24"));
    let mac = format!("02:00:00:00:{:02x}:{:02x}", n >> 8, n & 0xff);
    let data = Dual { v4: Json::parse(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)).ok(), v6: None };
    let attrs = LeaseAttrs::new(Dual { v4: Some(Ipv4Addr::from(0xc0a8_0000 + n).into()), v6: None });
    let attrs = attrs.with_backend(LeaseAttrs::backend_name("vxlan"), data);
    let lease = Lease::new(key, Dual { v4: Prefix::new(IpAddr::V4(subnet), 24).ok(), v6: None }, attrs)
        .expiring(Some(flannel_core::clock::BootTime::default()))
        .fenced(Fence::new(&format!("{}", 1_000_000 + n)));
    Record::of(lease, n.into())
}

/// Resident memory in bytes, pages of files (the program's own text) left out.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("this test needs /proc");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon, of Linux 4.5");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
    kib * 1024
}
