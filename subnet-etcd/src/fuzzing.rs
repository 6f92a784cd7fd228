//! Checks of parsers that are not public, for fuzz targets and property tests. Each panics where a property fails.

use flannel_core::lease::Fence;

use crate::wire::{Version, key_text, lease_key, parse_key};

/// A key after `<prefix>/subnets/`: it is good only if it is what we would write, and what flannel would read from a bad
/// one has a key of its own.
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

/// Two keys: two records have two names.
pub fn names(one: &[u8], other: &[u8]) {
    assert_eq!(one == other, lease_key("", one) == lease_key("", other), "{one:?} {other:?}");
}

/// The text of a fence.
pub fn fence(text: &str) {
    if let Some(version) = Version::from_fence(&Fence(Some(text.into()))) {
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
