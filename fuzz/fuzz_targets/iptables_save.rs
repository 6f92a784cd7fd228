//! What `iptables-save` and `iptables --version` print.

#![no_main]

use flannel_firewall_iptables::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || {
    let text = String::from_utf8_lossy(bytes);
    fuzzing::saved(&text);
    fuzzing::tool_version(&text);
}));
