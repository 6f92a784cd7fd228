//! Datagrams from the kernel, with every kind of message that is decoded.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || flannel_core::fuzzing::datagram(bytes)));
