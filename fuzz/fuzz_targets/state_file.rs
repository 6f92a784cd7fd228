//! The state file: what is kept of a store for a boot while it is away.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || flannel_subnet_cached::fuzzing::state_file(bytes)));
