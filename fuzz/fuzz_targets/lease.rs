//! The JSON of a lease's attributes, and the VXLAN backend's data in it.

#![no_main]

use std::sync::LazyLock;

use flannel_backend_vxlan::Vxlan;
use flannel_core::backend::Backend;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::LeaseAttrs;
use flannel_core::net::Family;
use libfuzzer_sys::fuzz_target;

static VXLAN: LazyLock<Option<Vxlan>> = LazyLock::new(|| {
    let config = NetworkConfig::parse(br#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#, Allocation::Pool);
    Vxlan::new(&config.ok()?).ok()
});

fuzz_target!(|json: &[u8]| fuzz::bounded(json, || check(json)));

fn check(json: &[u8]) {
    let Ok(attrs) = LeaseAttrs::from_json(json) else { return };
    let text = attrs.to_json();
    // It may be longer in our words, and then too long; but not by much.
    if text.len() <= LeaseAttrs::MAX_BYTES {
        assert_eq!(LeaseAttrs::from_json(text.as_bytes()).as_ref(), Ok(&attrs), "{text}");
    }
    // Bytes that are not UTF-8 are read as U+FFFD, which is longer.
    assert!(text.len() <= String::from_utf8_lossy(json).len() + 128, "{text}");
    for (family, addr) in attrs.public_ip.iter() {
        assert_eq!(Family::of(*addr), family);
    }
    let vxlan = VXLAN.as_ref().map(|vxlan| Family::BOTH.map(|family| vxlan.hardware_address(&attrs, family)));
    assert!(vxlan.is_some_and(|macs| macs.iter().flatten().all(Option::is_some)));
}
