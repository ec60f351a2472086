//! Reference counts in the bytes of a block. PURE (QEMU `docs/interop/qcow2.rst`, "Refcount block").

/// Count `index` of `bytes`, of `1 << order` bits. docs/interop/qcow2.rst: in a byte the first count has the lowest bits; of
/// several bytes the order is big-endian.
pub(super) fn count(bytes: &[u8], order: u32, index: u64) -> u64 {
    let Ok(index) = usize::try_from(index) else {
        return 0;
    };
    if order < 3 {
        let per_byte = 3 - order;
        let (at, shift) = (index >> per_byte, (index & ((1 << per_byte) - 1)) << order);
        let mask = (1_u16 << (1 << order)) - 1;
        return u64::from((u16::from(bytes[at]) >> shift) & mask);
    }
    let len = 1 << (order - 3);
    let at = index * len;
    bytes[at..at + len]
        .iter()
        .fold(0, |n, byte| n << 8 | u64::from(*byte))
}

pub(super) fn set_count(bytes: &mut [u8], order: u32, index: u64, to: u64) {
    let Ok(index) = usize::try_from(index) else {
        return;
    };
    if order < 3 {
        let per_byte = 3 - order;
        let (at, shift) = (index >> per_byte, (index & ((1 << per_byte) - 1)) << order);
        let mask = u8::try_from((1_u16 << (1 << order)) - 1).unwrap_or(u8::MAX) << shift;
        let value = u8::try_from(to & 0xff).unwrap_or_default() << shift;
        bytes[at] = bytes[at] & !mask | value & mask;
        return;
    }
    let len = 1 << (order - 3);
    let at = index * len;
    bytes[at..at + len].copy_from_slice(&to.to_be_bytes()[8 - len..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_stand_beside_each_other() {
        for order in 0..=6 {
            let mut bytes = vec![0; 64];
            let counts = 512 >> order;
            let most = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            let value = |index: u64| (index * 7 + 1) & most;
            for index in 0..counts {
                set_count(&mut bytes, order, index, most);
                set_count(&mut bytes, order, index, value(index));
            }
            for index in 0..counts {
                assert_eq!(
                    count(&bytes, order, index),
                    value(index),
                    "order {order}, {index}"
                );
            }
        }
        let mut bytes = [0; 8];
        set_count(&mut bytes, 4, 1, 0x0102);
        assert_eq!(bytes, [0, 0, 1, 2, 0, 0, 0, 0]);
        set_count(&mut bytes, 1, 1, 3);
        assert_eq!(bytes[0], 0b1100);
    }
}
