//! A packet of the overlay: read, edited and answered.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || flannel_backend_udp::fuzzing::header(bytes)));
