//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

/// Parses a state file of the store `etcd`, and checks that it round-trips.
pub fn state_file(bytes: &[u8]) {
    crate::wire::check_state_file(bytes);
}
