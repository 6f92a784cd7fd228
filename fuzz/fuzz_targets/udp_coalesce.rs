//! Packets from peers of the UDP backend, as super-packets and split again.

#![no_main]

use libfuzzer_sys::fuzz_target;

/// Places of all flows, in bytes, and headers of as many segments as the largest input has.
const FIXED: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| fuzz::bounded_but_for(FIXED, bytes, || flannel_backend_udp::fuzzing::coalesce(bytes)));
