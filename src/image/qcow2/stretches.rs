//! How much of what is alike in an image is told at a time. PURE.

use std::io;

use crate::image::Span;

/// Looks at the tables that one question takes, in each layer: 2 TiB of an image without any table, in clusters of 64 KiB.
const LOOKS_MAX: usize = 4096;

/// The stretches of `at` that are alike, at most so many, as `next` tells one from a byte on, at most so long. Ends before `at` does where that takes too
/// many looks: no fence can cut a call off, and of petabytes without data each look is like the one before.
pub(super) fn stretches<T: Copy + PartialEq>(
    at: Span,
    stretches_max: usize,
    next: impl Fn(u64, u64) -> io::Result<(u64, T)>,
) -> io::Result<Vec<(u64, T)>> {
    let mut found: Vec<(u64, T)> = Vec::new();
    let (mut from, end) = (at.offset(), at.offset() + at.len());
    let mut looks = 0;
    while from < end && looks < LOOKS_MAX {
        let (bytes, what) = next(from, end - from)?;
        let full = found.len() == stretches_max;
        match found.last_mut() {
            Some(last) if last.1 == what => last.0 += bytes,
            _ if full => break,
            _ => found.push((bytes, what)),
        }
        from += bytes;
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
            Ok((len.min(1 << 16), true))
        };
        let found = stretches(all, 16, alike).unwrap();
        assert_eq!(found, [((LOOKS_MAX as u64) << 16, true)]);
        assert_eq!(looks.get(), LOOKS_MAX);
        // To its end where that is near, and no more stretches than are wanted.
        let near = Span::checked(size - 100, 100, size).unwrap();
        assert_eq!(stretches(near, 16, alike).unwrap(), [(100, true)]);
        let each = |at: u64, _: u64| Ok((1, at));
        assert_eq!(stretches(near, 3, each).unwrap().len(), 3);
    }
}
