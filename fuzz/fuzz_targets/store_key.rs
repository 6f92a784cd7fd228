//! Keys of the etcd store, and fences.

#![no_main]

use flannel_subnet_etcd::{KeyPrefix, fuzzing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::bounded(bytes, || {
    let text = String::from_utf8_lossy(bytes);
    fuzzing::key(&text);
    fuzzing::fence(&text);
    let (one, other) = fuzz::two_lines(bytes);
    fuzzing::names(one, other);
    if let Ok(prefix) = KeyPrefix::new(&text) {
        assert_eq!(KeyPrefix::new(prefix.as_str()), Ok(prefix));
    }
}));
