//! Decides which values identify nothing: the empty, the zero and the constants that many disks share.
//!
//! A constant that slips through is not served wrongly, two disks with it are `Ambiguous`; but one disk with it
//! would be taken for the volume. So what is known to be a constant or a slot in disguise is no identity.

/// Text of a serial or name as the matcher sees it: trailing blanks and NULs are padding, everything else
/// counts. `None` when it is empty, has a byte that no identifier has, or is known to be worthless.
pub(super) fn serial(text: &str) -> Option<&str> {
    // Only trailing padding goes: SPC pads on the right, and what is inside or in front may tell two disks apart.
    let value = text.trim_end_matches([' ', '\0', '\n']);
    let printable = value.bytes().all(|b| (0x20..0x7f).contains(&b));
    (printable && value.len() <= SERIAL_BYTES_MAX && !is_worthless(value)).then_some(value)
}

/// Hex digits that can identify something.
pub(super) fn number(hex: String) -> Option<String> {
    let known = NUMBERS.contains(&hex.as_str());
    let one_digit = hex.bytes().all(|b| hex.bytes().next() == Some(b));
    (!hex.is_empty() && !one_digit && !known).then_some(hex)
}

/// Whether `value` (without padding) is one that many disks carry.
pub(super) fn is_worthless(value: &str) -> bool {
    let bare = value.trim();
    let filler = |b: u8| matches!(b, b'0' | b'-' | b'.' | b' ' | b'_');
    bare.is_empty()
        || bare.bytes().all(filler)
        || bare.bytes().all(|b| matches!(b, b'f' | b'F' | b'-'))
        || CONSTANTS.iter().any(|c| bare.eq_ignore_ascii_case(c))
        || numbered_slot(bare)
}

/// A hypervisor's text for "the Nth drive": stable for the slot, not for the volume.
fn numbered_slot(value: &str) -> bool {
    let digits = |prefix: &str, len: std::ops::RangeInclusive<usize>| {
        value.strip_prefix(prefix).is_some_and(|rest| {
            len.contains(&rest.len()) && rest.bytes().all(|b| b.is_ascii_digit())
        })
    };
    // QEMU hw/ide/core.c ide_init_drive: "QM%05d", counted per machine.
    digits("QM", 5..=5)
        // Google's NVMe controllers, "nvme_card0" and on (coreos/bugs#2476 shows "nvme_card").
        || digits("nvme_card", 0..=3)
        // QEMU scsi-hd without a serial answers with the drive's name; libvirt and Proxmox VE name drives by slot.
        || value.starts_with("drive-")
        || (value.starts_with("libvirt-") && value.ends_with("-format"))
}

/// SPC-4 unit serial numbers and designators have a length of one byte.
pub(super) const SERIAL_BYTES_MAX: usize = 255;

/// Constants, compared without regard to case.
const CONSTANTS: [&str; 13] = [
    // Google persistent disks: all are namespaces of one controller (kubernetes-sigs/gcp-compute-persistent-disk-csi-driver#2403).
    "nvme_card-pd",
    // Azure remote disks, "MSFT NVMe Accelerator v1.0": all are namespaces of one controller with this serial
    // (microsoft/openvmm vm/devices/storage/nvme/src/workers/admin.rs).
    "SN: 000001",
    // VirtualBox's NVMe controller (DevNVMe.cpp, NVME_SERIAL_NUMBER_DEF).
    "VB1234-56789",
    // No one source: what bridges and test devices are known to carry as delivered, and what firmware says when
    // nobody filled the field in. A disk with such a serial is refused, not served wrongly.
    "0123456789",
    "1234567890",
    "123456789012",
    "0123456789ABCDEF",
    "00000000000000000001",
    "To be filled by O.E.M.",
    "Default string",
    "None",
    "N/A",
    "Unknown",
];

/// NAA, EUI and NGUID values that many devices carry. Linux drivers/nvme/host/pci.c marks many a controller
/// with NVME_QUIRK_BOGUS_NID for such. No one source for these: the first numbers a vendor would write by hand.
const NUMBERS: [&str; 3] = [
    "0000000000000001",
    "0100000000000000",
    "01000000000000000000000000000000",
];
