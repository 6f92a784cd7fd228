//! A configuration on the CNI plug-in's stdin, and `subnet.env` as the plug-in reads it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    fuzz::bounded(bytes, || cni_flannel::fuzzing::request(&text));
});
