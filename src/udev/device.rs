//! What a disk's device says of the disk, by the bus that it hangs on. Blocks: some of it asks the device.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use super::attributes::{bytes, label, number_in, text};
use super::{gpt as gpt_table, node, nvme, scsi};
use crate::correlation::DeviceNumber;
use crate::identity::{self, Attributes, Identity, Scheme, ScsiPages};

/// A VPD page: 4 bytes of header and a 16-bit length (SPC, "Vital product data").
const PAGE_BYTES_MAX: usize = 4 + 65_535;

/// What a disk says of itself and nothing speaks against: of a SCSI disk what the kernel remembers, too. A logical unit that took another's
/// place is open to nobody until the kernel has scanned it, for it goes on with the size and the cached pages of the first.
///
/// # Errors
/// It is another SCSI disk than the kernel scanned.
pub fn proven(attributes: &Attributes) -> io::Result<BTreeSet<Identity>> {
    let mut found = identity::identities(attributes);
    if let Some([said, remembered]) = identity::disputed(attributes) {
        if said.is_disjoint(&remembered) {
            return Err(io::Error::other(scsi::dispute(&said, &remembered)));
        }
        found.retain(|identity| !said.contains(identity) || remembered.contains(identity));
    }
    Ok(found)
}

/// Reads what may ask the device. Which attributes there are depends on the bus that it hangs on.
pub fn attributes(
    dir: &Path,
    devname: &str,
    number: DeviceNumber,
    gpt: bool,
) -> io::Result<Attributes> {
    let device = dir.join("device");
    let mut found = Attributes {
        removable: number_in(&dir.join("removable"))? == Some(1),
        ..Attributes::default()
    };
    let bus = fs::read_link(device.join("subsystem")).unwrap_or_default();
    match bus.file_name().and_then(|n| n.to_str()) {
        Some("virtio") => {
            found.virtio_serial = text(&dir.join("serial"))?;
        }
        Some("scsi") => {
            let remembered = ScsiPages {
                vpd_pg80: bytes(&device.join("vpd_pg80"), PAGE_BYTES_MAX)?,
                vpd_pg83: bytes(&device.join("vpd_pg83"), PAGE_BYTES_MAX)?,
            };
            let said = said_by(devname, number, &remembered)?;
            found.scsi_remembered = said.as_ref().map(|_| remembered.clone());
            let pages = said.unwrap_or(remembered);
            (found.vpd_pg80, found.vpd_pg83) = (pages.vpd_pg80, pages.vpd_pg83);
            found.wwid = text(&device.join("wwid"))?;
            found.vendor = label(&device.join("vendor"))?;
            found.model = label(&device.join("model"))?;
        }
        // A namespace's device is its controller, or with native multipath its subsystem.
        Some("nvme" | "nvme-subsystem") => {
            found.nvme_serial = text(&device.join("serial"))?;
            found.nvme_nsid = number_in(&dir.join("nsid"))?;
            found.nvme_nguid = text(&dir.join("nguid"))?;
            found.nvme_eui = text(&dir.join("eui"))?;
            found.nvme_uuid = text(&dir.join("uuid"))?;
            found.wwid = text(&dir.join("wwid"))?;
            found.model = label(&device.join("model"))?;
            if let Some(nsid) = found.nvme_nsid
                && nvme::has_name(found.model.as_deref())
            {
                let disk = node::open(Path::new("/dev"), devname, number);
                match disk.and_then(|disk| nvme::vendor_bytes(&disk, nsid)) {
                    Ok(bytes) => found.nvme_vendor_bytes = bytes,
                    Err(e) => {
                        let names = [Scheme::GceName, Scheme::AzureName, Scheme::AzureLun];
                        let unread = names.map(|scheme| (scheme, e.to_string()));
                        found.unread.extend(unread);
                    }
                }
            }
        }
        Some(_) | None => {}
    }
    if gpt {
        match gpt_table::disk_guid(Path::new("/dev"), devname, number) {
            Ok(guid) => found.gpt_disk_guid = guid,
            // What else the disk says of itself is as good as ever.
            Err(e) => {
                let why = format!("its partition table: {e}");
                found.unread.insert(Scheme::GptGuid, why);
            }
        }
    }
    Ok(found)
}

/// What a SCSI disk answers for the pages that the kernel shows; `None` where it cannot be asked.
fn said_by(
    devname: &str,
    number: DeviceNumber,
    remembered: &ScsiPages,
) -> io::Result<Option<ScsiPages>> {
    if *remembered == ScsiPages::default() {
        return Ok(None);
    }
    match node::open(Path::new("/dev"), devname, number) {
        Ok(disk) => scsi::pages(&disk, remembered),
        // Without a node, or the right to open it, nobody here can serve it either.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) || scsi::cannot_be_asked(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that was exchanged under the kernel's eyes was opened as the one before.
    #[test]
    fn an_exchanged_scsi_disk_proves_nothing_and_says_both_identities() {
        let page = |serial: &[u8]| Some([b"\0\x80\0\x05", serial].concat());
        let pages = |vpd_pg80, vpd_pg83| ScsiPages { vpd_pg80, vpd_pg83 };
        let disk = |said: ScsiPages, remembered: ScsiPages| Attributes {
            vpd_pg80: said.vpd_pg80,
            vpd_pg83: said.vpd_pg83,
            scsi_remembered: Some(remembered),
            ..Attributes::default()
        };
        let same = proven(&disk(
            pages(page(b"alpha"), None),
            pages(page(b"alpha"), None),
        ));
        assert_eq!(same.unwrap().len(), 1);
        let other = disk(pages(page(b"gamma"), None), pages(page(b"alpha"), None));
        let error = proven(&other).unwrap_err().to_string();
        for named in ["scsi-pg80:gamma", "scsi-pg80:alpha"] {
            assert!(error.contains(named), "{error}");
        }
        // A designator that both still have is no proof of the serial.
        let pg83 = Some(b"\0\x83\0\x0c\x01\x03\0\x08\x50\0\xc5\0\xa1\xb2\xc3\xd4".to_vec());
        let mixed = disk(
            pages(page(b"gamma"), pg83.clone()),
            pages(page(b"alpha"), pg83),
        );
        let found: Vec<String> = proven(&mixed)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(found, ["scsi-naa:5000c500a1b2c3d4"]);
    }
}
