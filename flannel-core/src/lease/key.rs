//! The lease store's name for a lease.

use std::fmt;

use smol_str::SmolStr;

use crate::text::Plain;

/// The lease store's name for a lease: an etcd key, a Kubernetes node name or a file name. Opaque outside the store.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
// Most keys are short enough to be stored in it, without an allocation for each of ten thousand records.
pub struct LeaseKey(SmolStr);

impl LeaseKey {
    /// The longest key of a stored record, in bytes. A file name has at most 255.
    pub const MAX_BYTES: usize = 256;

    /// Creates a key from the store's own text. A record whose key is longer than [`MAX_BYTES`](Self::MAX_BYTES) is
    /// dropped: see [`of_bytes`](Self::of_bytes).
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Creates a key from untrusted bytes. Bytes that are not UTF-8 are escaped, and so is text with a backslash, so
    /// that different names give different keys. A key longer than [`MAX_BYTES`](Self::MAX_BYTES) is shortened to its
    /// start, its length and a hash of the whole. The result has a bounded size, however long the input is.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        /// How many bytes of a long key are shown. Their escaped form is short enough.
        const SHOWN: usize = 32;
        if bytes.len() <= Self::MAX_BYTES
            && let Ok(text) = std::str::from_utf8(bytes)
            && !text.contains('\\')
        {
            return Self::new(text);
        }
        let whole = bytes.escape_ascii();
        if bytes.len() <= Self::MAX_BYTES / 4 {
            return Self::new(&whole.to_string());
        }
        // FNV-1a. If two keys are crafted to have the same hash, they count as one bad record instead of two.
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        let start = bytes.get(..SHOWN).unwrap_or(bytes).escape_ascii();
        Self::new(&format!("{start}...({} bytes, {hash:016x})", bytes.len()))
    }

    /// Returns the store's own text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Plain(&self.0).fmt(f)
    }
}

impl fmt::Debug for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_any_bytes_is_short_and_a_name_of_its_own() {
        let key = |bytes: &[u8]| LeaseKey::of_bytes(bytes).as_str().to_owned();
        assert_eq!(key(b"10.5.34.0-24"), "10.5.34.0-24");
        assert_eq!(key(b"x\xff"), "x\\xff");
        assert_eq!(key("é".repeat(128).as_bytes()).len(), LeaseKey::MAX_BYTES);
        let long = |last: u8| [vec![0xff; 1 << 20], vec![last]].concat();
        assert!(key(&long(1)).len() <= LeaseKey::MAX_BYTES && key(&long(1)).contains("1048577 bytes"));
        assert_ne!(key(&long(1)), key(&long(2)));
        assert!(key(&[0xff; 256]).len() <= LeaseKey::MAX_BYTES);
    }

    #[test]
    fn names_that_differ_have_keys_that_differ() {
        let key = |name: &[u8]| LeaseKey::of_bytes(name).to_string();
        assert_eq!([key(b"node-1"), key("n\u{f6}de".as_bytes())], ["node-1", "n\u{f6}de"]);
        assert_ne!(key(b"a\xff"), key(b"a\\xff"));
        assert_ne!(key(b"a\\"), key(b"a\\\\"));
    }
}
