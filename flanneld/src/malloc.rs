//! Settings of the C library's allocator.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt(3) has no safe wrapper"))]

/// The default of glibc for both thresholds below, in bytes.
#[cfg(target_env = "gnu")]
const THRESHOLD: libc::c_int = 128 * 1024;

/// Has glibc give freed memory back to the kernel whatever was freed before.
///
/// By default a large block that is freed raises both thresholds to its size and twice its size (mallopt(3),
/// `M_MMAP_THRESHOLD`): after the list of 10 000 leases and the first plan for them are gone, some 3 MiB would stay
/// resident for good. A threshold that is set stays as it is. Does nothing with other C libraries.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two integers, and may be called at any time from any thread (MT-Safe). It fails only for
    // values that are out of range, and then changes nothing.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
    }
}
