//! The one call of the C library that has no safe wrapper and is the whole process's.

/// From this many bytes on, an allocation is a mapping of its own. Smaller ones are made and freed with every request, and a mapping
/// costs a fault for each of its pages.
const LARGE_BYTES: libc::c_int = 1 << 20;

/// Has the allocator give large buffers back to the kernel when they are freed. Left to itself it puts the threshold up to the largest
/// buffer that was ever freed (mallopt(3), "dynamic mmap threshold"), and what a crowd has used once stays in its heaps.
pub(super) fn give_large_buffers_back() {
    // SAFETY: mallopt takes two integers; before the process has a second thread nothing else is in the allocator.
    let taken = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
    if taken == 0 {
        tracing::debug!("the allocator keeps its own threshold");
    }
}
