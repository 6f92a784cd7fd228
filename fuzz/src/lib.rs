//! What all fuzz targets of this directory share.

use peak_alloc::PeakAlloc;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Heap that one input may take whatever its size, in bytes.
const FIXED: usize = 256 << 10;

/// Heap that one input may take for each of its bytes. A JSON array of digits takes the most: two bytes of text become a
/// value of 32 bytes, in a vector that is copied when it grows, and the targets hold a few such values at once.
const PER_BYTE: usize = 256;

/// Runs a check on an input and fails if it took more heap than [`FIXED`] and [`PER_BYTE`] allow.
pub fn bounded(input: &[u8], check: impl FnOnce()) {
    bounded_but_for(FIXED, input, check);
}

/// The same with another share that does not depend on the input's size, in bytes.
pub fn bounded_but_for(fixed: usize, input: &[u8], check: impl FnOnce()) {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    check();
    let used = HEAP.peak_usage().saturating_sub(before);
    let most = fixed + PER_BYTE * input.len();
    assert!(used <= most, "{used} bytes of heap for an input of {} bytes, at most {most} are allowed", input.len());
}

/// An input's first line, and what follows it.
pub fn two_lines(input: &[u8]) -> (&[u8], &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    (&input[..end], input.get(end + 1..).unwrap_or(&[]))
}
