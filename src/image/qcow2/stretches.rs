//! How much of what is alike in an image is told at a time. PURE.

use std::io;

use crate::image::{Allocation, Depth, Span};

/// Looks at the tables that one question takes, in each layer: 2 TiB of an image without any table, in clusters of 64 KiB.
const LOOKS_MAX: usize = 4096;

/// Bytes that are alike in what is told of them.
pub(super) trait Stretch {
    fn bytes(&mut self) -> &mut u64;
    fn is_like(&self, other: &Self) -> bool;
}

impl Stretch for Allocation {
    fn bytes(&mut self) -> &mut u64 {
        &mut self.bytes
    }

    fn is_like(&self, other: &Allocation) -> bool {
        self.hole == other.hole
    }
}

impl Stretch for Depth {
    fn bytes(&mut self) -> &mut u64 {
        &mut self.bytes
    }

    fn is_like(&self, other: &Depth) -> bool {
        self.layer == other.layer
    }
}

/// The stretches of `at` that are alike, at most so many, as `next` tells one from a byte on, at most so long. Ends before `at` does where that takes too
/// many looks: no fence can cut a call off, and of petabytes without data each look is like the one before.
pub(super) fn stretches<T: Stretch>(
    at: Span,
    stretches_max: usize,
    next: impl Fn(u64, u64) -> io::Result<T>,
) -> io::Result<Vec<T>> {
    let mut found: Vec<T> = Vec::new();
    let (mut from, end) = (at.offset(), at.offset() + at.len());
    let mut looks = 0;
    while from < end && looks < LOOKS_MAX {
        let mut stretch = next(from, end - from)?;
        from += *stretch.bytes();
        let full = found.len() == stretches_max;
        match found.last_mut() {
            Some(last) if last.is_like(&stretch) => *last.bytes() += *stretch.bytes(),
            _ if full => break,
            _ => found.push(stretch),
        }
        looks += 1;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alike_is_one_stretch_and_a_question_takes_so_many_looks_at_most() {
        let size = 1 << 50;
        let all = Span::checked(0, size, size).unwrap();
        let looks = std::cell::Cell::new(0);
        let alike = |_: u64, len: u64| {
            looks.set(looks.get() + 1);
            let bytes = len.min(1 << 16);
            Ok(Allocation { bytes, hole: true })
        };
        let found = stretches(all, 16, alike).unwrap();
        let bytes = (LOOKS_MAX as u64) << 16;
        assert_eq!(found, [Allocation { bytes, hole: true }]);
        assert_eq!(looks.get(), LOOKS_MAX);
        // To its end where that is near, and no more stretches than are wanted.
        let near = Span::checked(size - 100, 100, size).unwrap();
        let found = stretches(near, 16, alike).unwrap();
        let rest = Allocation {
            bytes: 100,
            hole: true,
        };
        assert_eq!(found, [rest]);
        let each = |at: u64, _: u64| {
            let layer = u32::try_from(size - at).unwrap();
            Ok(Depth { bytes: 1, layer })
        };
        assert_eq!(stretches(near, 3, each).unwrap().len(), 3);
    }
}
