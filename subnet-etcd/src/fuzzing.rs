//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use flannel_core::lease::Fence;

use crate::wire::{Version, key_text, lease_key, parse_key};

/// Checks a key after `<prefix>/subnets/`: it is good only if this crate would write the same key, and the subnets that
/// flannel would read from a bad key have a key of their own.
pub fn key(text: &str) {
    match parse_key(text) {
        Ok(subnets) => assert_eq!(key_text(&subnets).as_deref(), Some(text)),
        Err(bad) => {
            if let Some(meant) = key_text(&bad.subnets) {
                assert_eq!(parse_key(&meant), Ok(bad.subnets), "{meant}");
                assert!(bad.reason.contains(&meant));
            }
        }
    }
}

/// Checks that two keys have two names.
pub fn names(one: &[u8], other: &[u8]) {
    assert_eq!(one == other, lease_key("", one) == lease_key("", other), "{one:?} {other:?}");
}

/// Checks that a fence's text round-trips.
pub fn fence(text: &str) {
    assert_eq!(Fence::new(text).text().as_deref(), Some(text));
    if let Some(version) = Version::from_fence(&Fence::new(text)) {
        assert_eq!(Version::from_fence(&version.fence()), Some(version));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_records_never_share_a_name() {
        names(b"a\xff", b"a\\xff");
    }

    proptest! {
        #[test]
        fn any_key_and_fence_is_read_or_refused(text in "[0-9a-fx:.&/-]{0,40}|\\PC{0,20}|[0-9+-]{1,9}(\\.[0-9+-]{1,20}){2}") {
            key(&text);
            fence(&text);
        }
    }
}
