//! What a Kubernetes API server sends: a Node, a list, a watch.

#![no_main]

use flannel_subnet_kube::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || {
    fuzzing::node(bytes);
    fuzzing::stream(bytes);
}));
