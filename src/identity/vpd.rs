//! SCSI vital product data, pages 0x80 and 0x83, as sysfs shows them (SPC-4 7.8). Decides what a page says; the
//! lengths in it are the disk's and are checked before they are believed.

use super::worthless;
use super::{Identity, Scheme};

/// The unit serial number of page 0x80. `None` when the page lies about its length.
pub(super) fn unit_serial(page: &[u8]) -> Option<&str> {
    worthless::serial(std::str::from_utf8(body(page, 0x80)?).ok()?)
}

/// The identities of page 0x83. Only designators of the logical unit count: those of a target port are the same
/// for every disk behind it. A page with one length that does not fit says nothing at all.
pub(super) fn designators(page: &[u8], vendor: &str) -> Vec<Identity> {
    body(page, 0x83)
        .and_then(|body| walk(body, vendor))
        .unwrap_or_default()
}

/// A page without its header, exactly as long as the header says.
fn body(page: &[u8], code: u8) -> Option<&[u8]> {
    let [_, seen, high, low, rest @ ..] = page else {
        return None;
    };
    let len = usize::from(u16::from_be_bytes([*high, *low]));
    // Bytes after the page are the buffer's; fewer than promised is a page that was cut.
    (*seen == code).then(|| rest.get(..len))?
}

fn walk(mut body: &[u8], vendor: &str) -> Option<Vec<Identity>> {
    let mut found = Vec::new();
    // Ends: each turn takes at least the 4 bytes of a header off a body of at most 64 KiB.
    while let [set, kind, _, len, rest @ ..] = body {
        let value = rest.get(..usize::from(*len))?;
        body = rest.get(usize::from(*len)..)?;
        let association = (kind >> 4) & 0x3;
        if association == LOGICAL_UNIT {
            found.extend(designator(set & 0xf, kind & 0xf, value, vendor));
        }
    }
    // One to three bytes left over are a header that was cut.
    body.is_empty().then_some(found)
}

fn designator(set: u8, kind: u8, value: &[u8], vendor: &str) -> Option<Identity> {
    let text = || match set {
        ASCII | UTF8 => worthless::serial(std::str::from_utf8(value).ok()?),
        _ => None,
    };
    match kind {
        VENDOR_SPECIFIC => {
            // Google's persistent disks put the device name here (guest-configs, 65-gce-disk-naming.rules reads
            // it as ID_SERIAL_SHORT).
            let scheme = match vendor {
                "Google" => Scheme::GceName,
                _ => Scheme::ScsiVendor,
            };
            Some(Identity::new(scheme, text()?))
        }
        // Eight bytes of vendor; without more it names a maker and no disk.
        T10 => text()
            .filter(|text| text.len() > T10_VENDOR_BYTES && !t10_constant(text))
            .map(|text| Identity::new(Scheme::ScsiT10, text)),
        EUI64 if set == BINARY && matches!(value.len(), 8 | 12 | 16) => {
            Some(Identity::new(Scheme::ScsiEui, number(value)?))
        }
        NAA if set == BINARY && matches!(value.len(), 8 | 16) => {
            Some(Identity::new(Scheme::ScsiNaa, number(value)?))
        }
        _ => None,
    }
}

/// libata puts the drive's serial at the end of the T10 text: with a worthless serial, the text is worthless.
fn t10_constant(text: &str) -> bool {
    text.split_ascii_whitespace()
        .last()
        .is_none_or(worthless::is_worthless)
}

fn number(value: &[u8]) -> Option<String> {
    worthless::number(value.iter().map(|b| format!("{b:02x}")).collect())
}

// SPC-4 table "CODE SET field".
const BINARY: u8 = 1;
const ASCII: u8 = 2;
const UTF8: u8 = 3;
// SPC-4 table "ASSOCIATION field".
const LOGICAL_UNIT: u8 = 0;
// SPC-4 table "DESIGNATOR TYPE field".
const VENDOR_SPECIFIC: u8 = 0;
const T10: u8 = 1;
const EUI64: u8 = 2;
const NAA: u8 = 3;
const T10_VENDOR_BYTES: usize = 8;
