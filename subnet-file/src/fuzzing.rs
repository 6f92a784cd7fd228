//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use std::ffi::OsStr;

use flannel_core::lease::LeaseAttrs;

use crate::dir::{file_name, key_of, node_of};
use crate::wire::Entry;

/// Parses a record, and checks that it round-trips.
pub fn record(text: &[u8]) {
    match Entry::from_json(text) {
        Ok(entry) => {
            let again = entry.to_json();
            // It may be longer in this crate's form, and then too long.
            if again.len() <= LeaseAttrs::MAX_BYTES {
                assert_eq!(Entry::from_json(again.as_bytes()), Ok(entry), "{again}");
            }
        }
        // A quoted byte becomes at most ten.
        Err(bad) => assert!(bad.reason.len() <= 1024 + 10 * text.len(), "{}", bad.reason),
    }
}

/// Checks for two file names that two records have two keys, and that a node's record is at the name that the node
/// reads.
pub fn names(one: &OsStr, other: &OsStr) {
    if one != other && key_of(one).is_some() {
        assert_ne!(key_of(one), key_of(other), "{one:?} {other:?}");
    }
    if let Some(node) = node_of(one)
        && let Ok(name) = file_name(&node)
    {
        assert_eq!(OsStr::new(&name), one);
        assert_eq!(key_of(one).map(|key| key.as_str() == name), Some(true), "{name}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn two_files_never_share_a_key() {
        names(OsStr::from_bytes(b"a\xff.json"), OsStr::new("a\\xff.json"));
    }

    proptest! {
        #[test]
        fn a_record_that_is_read_reads_back(
            subnet in "(10\\.5\\.[0-9]{1,3}\\.0/2[0-9]|\\PC{0,9})", v6 in "(fd00:5:[0-9a-f]{1,4}::/64|\\PC{0,9})",
            kind in "(vxlan|[\\PC\n]{0,9})", created: i64, expires: Option<i64>,
        ) {
            let quoted = |text: &str| format!("{text:?}");
            let (subnet, v6, kind) = (quoted(&subnet), quoted(&v6), quoted(&kind));
            let expires = expires.map_or("null".to_owned(), |expires| expires.to_string());
            record(format!(
                r#"{{"PublicIP":"192.0.2.1","BackendType":{kind},"Subnet":{subnet},"ipv6subnet":{v6},"Created":{created},"ExpiresUnixMs":{expires}}}"#
            ).as_bytes());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            record(&bytes);
            let (one, other) = bytes.split_at(bytes.len() / 2);
            names(OsStr::from_bytes(one), OsStr::from_bytes(other));
        }
    }
}
