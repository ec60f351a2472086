//! The extensions of a QCOW2 header, and reading numbers out of one. PURE (QEMU `docs/interop/qcow2.rst`, "Header extensions").

use super::header::Refusal;

const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE_NAME: u32 = 0x4441_5441;
/// As of a backing file's name.
const DATA_FILE_NAME_BYTES_MAX: usize = 1023;
/// `QCOW2_MAX_BACKING_FORMAT` is less; ours, so that a message stays one.
const BACKING_FORMAT_BYTES_MAX: usize = 64;

/// What of the extensions counts here.
#[derive(Default)]
pub(super) struct Extensions {
    pub backing_format: Option<String>,
    /// Of the directory of bitmaps its first byte and its length; 0 where the extension is cut off.
    pub bitmaps: Option<(u64, u64)>,
    pub crypto: bool,
    /// The name of the file that the guest's clusters are in.
    pub data_file: Option<String>,
    /// Bits and names of incompatible features.
    names: Vec<(u8, String)>,
}

impl Extensions {
    pub fn read(at: &Fields<'_>, from: u64) -> Result<Extensions, Refusal> {
        let mut found = Extensions::default();
        // docs/interop/qcow2.rst: the extensions end with type 0, or where the backing file's name begins.
        let backing = at.u64(8)?;
        let end = if backing == 0 {
            at.0.len() as u64
        } else {
            backing.min(at.0.len() as u64)
        };
        let mut offset = from;
        // Each takes 8 bytes at least, so this ends with the first cluster.
        while offset + 8 <= end {
            let kind = at.u32(offset)?;
            let len = u64::from(at.u32(offset + 4)?);
            if kind == END {
                break;
            }
            let data = at.bytes(offset + 8, len)?;
            match kind {
                BACKING_FORMAT => {
                    let text = std::str::from_utf8(data).map_err(|_| Refusal::BackingName)?;
                    if text.len() > BACKING_FORMAT_BYTES_MAX || text.chars().any(char::is_control) {
                        return Err(Refusal::BackingName);
                    }
                    found.backing_format = Some(text.to_owned());
                }
                BITMAPS => {
                    let fields = Fields(data);
                    let place = fields.u64(16).ok().zip(fields.u64(8).ok());
                    found.bitmaps = Some(place.unwrap_or_default());
                }
                CRYPTO => found.crypto = true,
                DATA_FILE_NAME => {
                    let text = std::str::from_utf8(data).map_err(|_| Refusal::DataFileName)?;
                    if text.len() > DATA_FILE_NAME_BYTES_MAX || text.chars().any(char::is_control) {
                        return Err(Refusal::DataFileName);
                    }
                    found.data_file = Some(text.to_owned());
                }
                FEATURE_NAMES => found.names = names(data),
                // docs/interop/qcow2.rst: an unknown extension can be ignored.
                _ => {}
            }
            offset += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    pub fn name(&self, bit: u8) -> Option<String> {
        let (_, name) = self.names.iter().find(|(known, _)| *known == bit)?;
        Some(name.clone())
    }
}

/// docs/interop/qcow2.rst, "Feature name table": entries of 48 bytes, type (0: incompatible), bit, and the padded name.
fn names(data: &[u8]) -> Vec<(u8, String)> {
    data.chunks_exact(48)
        .filter(|entry| entry[0] == 0)
        .map(|entry| {
            let name = String::from_utf8_lossy(&entry[2..]);
            let name = name.trim_end_matches('\0');
            (entry[1], name.escape_debug().to_string())
        })
        .collect()
}

/// Big-endian numbers at places that may not be there.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn bytes(&self, offset: u64, len: u64) -> Result<&[u8], Refusal> {
        let end = offset.checked_add(len).ok_or(Refusal::CutOff)?;
        let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
        let (from, to) = range.ok_or(Refusal::CutOff)?;
        self.0.get(from..to).ok_or(Refusal::CutOff)
    }

    pub fn byte(&self, offset: u64) -> Result<u8, Refusal> {
        Ok(self.bytes(offset, 1)?[0])
    }

    pub fn u32(&self, offset: u64) -> Result<u32, Refusal> {
        let bytes = self.bytes(offset, 4)?;
        Ok(bytes.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)))
    }

    pub fn u64(&self, offset: u64) -> Result<u64, Refusal> {
        let bytes = self.bytes(offset, 8)?;
        Ok(bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }
}
