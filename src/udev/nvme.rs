//! What two clouds write into a namespace's vendor bytes: the name of the disk. Asks the device, and blocks for
//! as long as it does.
//!
//! Only disks whose model is one of theirs are asked: an admin command is no business of ours on any other.

use std::fs::File;
use std::io;

use super::sys;

/// Google's persistent disks and local SSDs (guest-configs: google_nvme_id); Azure's remote and local disks
/// (azure-vm-utils: doc/disk-identification.md).
const MODELS: [&str; 3] = [
    "nvme_card",
    "MSFT NVMe Accelerator",
    "Microsoft NVMe Direct Disk",
];

/// Identify Namespace is 4,096 bytes, of which the vendor has those from 384 on (NVM command set
/// specification, "Identify Namespace Data Structure").
const VENDOR_BYTES_FROM: usize = 384;

/// Whether this disk's vendor bytes hold a name.
pub fn has_name(model: Option<&str>) -> bool {
    model.is_some_and(|model| MODELS.iter().any(|ours| model.starts_with(ours)))
}

/// Reads the vendor bytes of a namespace; `None` when the device, the kernel or the rights do not give them,
/// today and the next time.
///
/// # Errors
/// What may pass: the disk does not answer, or is gone.
pub fn vendor_bytes(disk: &File, nsid: u32) -> io::Result<Option<Vec<u8>>> {
    match sys::identify_namespace(disk, nsid) {
        Ok(data) => Ok(data.map(|data| data[VENDOR_BYTES_FROM..].to_vec())),
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOTTY | libc::EPERM | libc::EACCES | libc::EINVAL | libc::EOPNOTSUPP) => {
                Ok(None)
            }
            _ => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_of_the_two_clouds_are_asked() {
        for model in [
            "nvme_card-pd",
            "nvme_card",
            "MSFT NVMe Accelerator v1.0",
            "Microsoft NVMe Direct Disk v2",
        ] {
            assert!(has_name(Some(model)), "{model}");
        }
        for model in ["Amazon Elastic Block Store", "SAMSUNG MZVL2512", ""] {
            assert!(!has_name(Some(model)), "{model}");
        }
        assert!(!has_name(None));
    }

    #[test]
    fn what_is_no_nvme_disk_has_no_vendor_bytes() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(vendor_bytes(&file, 1).unwrap(), None);
    }
}
