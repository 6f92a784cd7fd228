//! What the kernel hands over at a TUN: a header, and a packet that is split.

#![no_main]

use libfuzzer_sys::fuzz_target;

/// Headers of as many segments as the largest input has, in bytes, and the segments.
const FIXED: usize = 2 << 20;

fuzz_target!(|bytes: &[u8]| fuzz::bounded_but_for(FIXED, bytes, || flannel_backend_udp::fuzzing::split(bytes)));
