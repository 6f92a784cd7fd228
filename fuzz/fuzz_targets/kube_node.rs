//! What a Kubernetes API server sends: a Node, and pieces of a list or a watch.

#![no_main]

use flannel_subnet_kube::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || {
    fuzzing::node(bytes);
    fuzzing::stream(bytes, bytes.first().copied().unwrap_or_default().into());
}));
