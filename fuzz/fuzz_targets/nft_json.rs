//! What `nft -j list` prints.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzz::bounded(bytes, || flannel_firewall_nft::fuzzing::listing(&String::from_utf8_lossy(bytes)));
});
