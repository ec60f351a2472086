//! The disk GUID of a GUID partition table, for those who opted in. Opens the disk for reading and
//! blocks for as long as it does.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::node;
use crate::correlation::DeviceNumber;

/// The header stands in the second logical block; disks have blocks of 512 or 4,096 bytes (UEFI, "GPT Header").
const HEADER_OFFSETS: [u64; 2] = [512, 4096];
const SIGNATURE: &[u8; 8] = b"EFI PART";
const GUID_OFFSET: usize = 56;

/// Reads the disk GUID in the usual notation; `None` when there is no such table.
pub fn disk_guid(dev: &Path, devname: &str, number: DeviceNumber) -> io::Result<Option<String>> {
    in_file(&node::open(dev, devname, number)?)
}

fn in_file(file: &File) -> io::Result<Option<String>> {
    guid(|buf, offset| file.read_exact_at(buf, offset))
}

/// The disk GUID of what `read_exact_at` fills a buffer from, at an offset in bytes.
///
/// # Errors
/// The reader's, but for its end: a disk that is too small has no table.
pub fn guid(
    read_exact_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<String>> {
    for offset in HEADER_OFFSETS {
        let mut header = [0_u8; GUID_OFFSET + 16];
        match read_exact_at(&mut header, offset) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e),
        }
        if header.starts_with(SIGNATURE) {
            let mut guid = [0_u8; 16];
            guid.copy_from_slice(&header[GUID_OFFSET..]);
            return Ok(Some(notation(guid)));
        }
    }
    Ok(None)
}

/// The first three groups are stored little-endian (UEFI, "EFI GUID").
fn notation(g: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    format!(
        "{}-{}-{}-{}-{}",
        hex(&[g[3], g[2], g[1], g[0]]),
        hex(&[g[5], g[4]]),
        hex(&[g[7], g[6]]),
        hex(&g[8..10]),
        hex(&g[10..]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_guid_is_read_at_both_block_sizes_and_only_behind_the_signature() {
        for block in [512, 4096] {
            let mut image = vec![0_u8; 16384];
            image[block..block + 8].copy_from_slice(SIGNATURE);
            for i in 0..16 {
                image[block + GUID_OFFSET + usize::from(i)] = i;
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&image).unwrap();
            assert_eq!(
                in_file(&file).unwrap().as_deref(),
                Some("03020100-0504-0706-0809-0a0b0c0d0e0f")
            );
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(in_file(&file).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(in_file(&file).unwrap(), None);
    }
}
