//! Names objects on the bus. PURE: an export's or a disk's name in, an object path out; the same in, the
//! same out, for as long as the name or identity lives.
//!
//! A path element may hold only `[A-Za-z0-9_]` (D-Bus Specification, "Valid Object Paths"). Every other
//! byte, and `_` itself, becomes `_xx` in hex, so that two names never share a path. A name
//! that would be longer than [`ELEMENT_BYTES_MAX`] is cut and ends in a hash of the whole.

use std::fmt::Write as _;

use crate::correlation::{DiskSeq, DiskView, ExportName};

/// Where the Manager and the ObjectManager are.
pub const ROOT: &str = "/org/nbdtrack1";
/// The parent of all Volume objects.
pub const VOLUMES: &str = "/org/nbdtrack1/volumes";
/// The parent of all Export objects.
pub const EXPORTS: &str = "/org/nbdtrack1/exports";

/// The parent of all Job objects.
pub const JOBS: &str = "/org/nbdtrack1/jobs";

/// The longest last element of a path, in bytes. D-Bus has no limit of its own, but a name of 4,096 bytes
/// would be 12 KiB in every signal and every match rule; 200 is more than any name seen in the field.
pub const ELEMENT_BYTES_MAX: usize = 200;

/// Returns the path of an export's object.
pub fn export(name: &ExportName) -> String {
    format!("{EXPORTS}/{}", element(name.as_str().as_bytes(), ""))
}

/// Returns the path of a job's object.
pub fn job(id: u64) -> String {
    format!("{JOBS}/{id}")
}

/// Returns the path of a disk's object: by its identity, or by its disk sequence number when it is a twin or
/// has no identity.
pub fn volume(view: &DiskView) -> String {
    if view.twin {
        return volume_by_diskseq(view.diskseq);
    }
    volume_by_id(&view.id).unwrap_or_else(|| volume_by_diskseq(view.diskseq))
}

/// Returns the path of the disk `scheme:value`; `None` for a text that is no identity.
pub fn volume_by_id(id: &str) -> Option<String> {
    let (scheme, value) = id.split_once(':')?;
    let mut prefix = String::new();
    escape(scheme.as_bytes(), &mut prefix);
    // No escaped scheme is another one's beginning followed by `_`, so the separator is unambiguous.
    prefix.push('_');
    Some(format!("{VOLUMES}/{}", element(value.as_bytes(), &prefix)))
}

/// Returns the path of a disk that has no identity of its own.
pub fn volume_by_diskseq(diskseq: DiskSeq) -> String {
    format!("{VOLUMES}/diskseq_{diskseq}")
}

fn element(name: &[u8], prefix: &str) -> String {
    let mut text = String::with_capacity(prefix.len() + name.len());
    text.push_str(prefix);
    escape(name, &mut text);
    if text.len() > ELEMENT_BYTES_MAX {
        text.truncate(ELEMENT_BYTES_MAX - 2 - 32);
        // `_h` is no escape, so a cut name never equals a whole one.
        // A write to a String cannot fail.
        let _ = write!(text, "_h{:032x}", fnv1a(name));
    }
    text
}

fn escape(bytes: &[u8], into: &mut String) {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() {
            into.push(char::from(byte));
        } else {
            // A write to a String cannot fail.
            let _ = write!(into, "_{byte:02x}");
        }
    }
}

/// FNV-1a with 128 bits: stable over versions and machines, which the standard library's hash is not.
fn fnv1a(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET, |hash, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> String {
        export(&ExportName::parse(name).unwrap())
    }

    #[test]
    fn letters_and_digits_stay_and_all_else_is_hex() {
        assert_eq!(path("vmA9"), "/org/nbdtrack1/exports/vmA9");
        assert_eq!(path("a_b-c/é"), "/org/nbdtrack1/exports/a_5fb_2dc_2f_c3_a9");
    }

    #[test]
    fn a_disk_is_named_by_scheme_and_value() {
        assert_eq!(
            volume_by_id("virtio-serial:ab-1").as_deref(),
            Some("/org/nbdtrack1/volumes/virtio_2dserial_ab_2d1")
        );
        assert_eq!(volume_by_id(""), None);
    }

    #[test]
    fn long_names_are_cut_and_stay_apart() {
        let one = path(&"/".repeat(4096));
        let two = path(&format!("{}x", "/".repeat(4095)));
        assert!(one.len() <= EXPORTS.len() + 1 + ELEMENT_BYTES_MAX);
        assert_ne!(one, two);
        assert!(zbus::ObjectPath::try_from(one.as_str()).is_ok());
    }

    #[test]
    fn the_hash_never_changes_between_versions() {
        // The published test vector of FNV-1a 128 for "a".
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    proptest::proptest! {
        #[test]
        fn different_names_have_different_valid_paths(a in "[ -~é_]{1,90}", b in "[ -~é_]{1,90}") {
            proptest::prop_assume!(a != b);
            proptest::prop_assert_ne!(path(&a), path(&b));
            proptest::prop_assert!(zbus::ObjectPath::try_from(path(&a)).is_ok());
        }
    }
}
