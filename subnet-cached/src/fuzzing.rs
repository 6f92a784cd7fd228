//! Checks of parsers that are not public, for fuzz targets and property tests. Each panics where a property fails.

/// A state file of the store `etcd`: what is read is written so that it reads back as it was.
pub fn state_file(bytes: &[u8]) {
    crate::wire::check_state_file(bytes);
}
