//! Settings of the C library's allocator.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt(3) has no safe wrapper"))]

/// The default of glibc for both thresholds below, in bytes.
#[cfg(target_env = "gnu")]
const THRESHOLD: libc::c_int = 128 * 1024;

/// Makes glibc return freed memory to the kernel, independent of what was freed before and by which thread.
///
/// By default glibc raises both thresholds, to the block's size and twice that size, when a large block is freed
/// (mallopt(3), `M_MMAP_THRESHOLD`): after the list of 10 000 leases and the first plan for them are freed, some 3 MiB
/// would stay resident. Thresholds that are set explicitly do not change.
///
/// By default each thread has an arena, and memory that one thread allocated and another freed is of use to the first
/// alone. The threads of the agent pass each other what they read and seldom allocate at once, so they share one.
///
/// Does nothing with other C libraries.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two integers, and may be called at any time from any thread (MT-Safe). It fails only for
    // values that are out of range, and then changes nothing.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
