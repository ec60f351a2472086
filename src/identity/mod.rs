//! What a disk says of itself, and which volume that is. PURE: values in, values out.
//!
//! A disk presents a set of [`Identity`] values, each a (scheme, value) pair ([`identities`]). A [`VolumeId`]
//! is what a person or the Volume Daemon wrote, `profile:id`; its profile expands it into a finite set of
//! candidate identities ([`VolumeId::candidates`]). A disk is that volume when one of its identities *equals*
//! a candidate: never "contains", never "begins with". What a platform cuts is a candidate of its own, and two
//! volumes that a cut makes alike are found by [`collisions`] before either is served.
//!
//! | file | decides |
//! |---|---|
//! | `mod.rs` | the values: schemes, identities, attributes, precedence |
//! | `volume.rs` | `profile:id` from and to text, candidates, collisions |
//! | `profile.rs` | the table of profiles |
//! | `read.rs` | a disk's raw attributes to its identities |
//! | `vpd.rs` | SCSI VPD pages 0x80 and 0x83 |
//! | `worthless.rs` | which values identify nothing |
//!
//! May not touch: files, clocks, threads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

mod profile;
mod read;
mod volume;
mod vpd;
mod worthless;

pub use profile::OptIn;
pub use read::{disputed, identities};
pub use volume::{Collision, VOLUME_ID_BYTES_MAX, VolumeId, VolumeIdError, collisions};

/// Where a value of identity comes from. The order is the precedence by which a disk's
/// D-Bus object gets its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// NVMe namespace globally unique identifier, 32 hex digits.
    NvmeNguid,
    /// SCSI page 0x83, type NAA, 16 or 32 hex digits.
    ScsiNaa,
    /// NVMe controller serial and namespace, `SERIAL_NSID`.
    NvmeSerial,
    /// SCSI page 0x80, the unit serial number.
    ScsiPg80,
    /// The serial of a virtio-blk disk, at most 20 bytes.
    VirtioSerial,
    /// The backing file of a loop device, an absolute path.
    Loop,
    /// A plain file by the path under which it is served, its bytes as they are.
    File,
    /// A QCOW2 image by the path under which it is served.
    Qcow2,
    /// NVMe namespace EUI-64, 16 hex digits.
    NvmeEui,
    /// NVMe namespace UUID, lower case with dashes.
    NvmeUuid,
    /// SCSI page 0x83, type EUI-64, 16, 24 or 32 hex digits.
    ScsiEui,
    /// The name of a Google Compute Engine disk. A name, so a deleted disk's can be used again.
    GceName,
    /// The name of an Azure NVMe disk.
    AzureName,
    /// SCSI page 0x83, type vendor specific, text (what udev shows as `0VENDOR_MODEL_value`).
    ScsiVendor,
    /// SCSI page 0x83, type T10 vendor identification, text.
    ScsiT10,
    /// The disk GUID of the partition table. Written by the guest and copied with the data.
    GptGuid,
    /// The LUN of an Azure data disk. A slot: says where, not which.
    AzureLun,
    /// udev's `ID_PATH`. A slot: says where, not which.
    Slot,
    /// One attachment of a disk in one boot. No disk says it and no one can write it: it is given to what has no other identity.
    Attachment,
}

impl Scheme {
    /// All schemes, by precedence.
    pub const ALL: [Scheme; 19] = [
        Scheme::NvmeNguid,
        Scheme::ScsiNaa,
        Scheme::NvmeSerial,
        Scheme::ScsiPg80,
        Scheme::VirtioSerial,
        Scheme::Loop,
        Scheme::File,
        Scheme::Qcow2,
        Scheme::NvmeEui,
        Scheme::NvmeUuid,
        Scheme::ScsiEui,
        Scheme::GceName,
        Scheme::AzureName,
        Scheme::ScsiVendor,
        Scheme::ScsiT10,
        Scheme::GptGuid,
        Scheme::AzureLun,
        Scheme::Slot,
        Scheme::Attachment,
    ];

    /// The scheme's name on D-Bus, in logs and in `--json`. A promise: it never changes.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::NvmeNguid => "nvme-nguid",
            Scheme::ScsiNaa => "scsi-naa",
            Scheme::NvmeSerial => "nvme-serial",
            Scheme::ScsiPg80 => "scsi-pg80",
            Scheme::VirtioSerial => "virtio-serial",
            Scheme::Loop => "loop",
            Scheme::File => "file",
            Scheme::Qcow2 => "qcow2",
            Scheme::NvmeEui => "nvme-eui",
            Scheme::NvmeUuid => "nvme-uuid",
            Scheme::ScsiEui => "scsi-eui",
            Scheme::GceName => "gce-name",
            Scheme::AzureName => "azure-name",
            Scheme::ScsiVendor => "scsi-vendor",
            Scheme::ScsiT10 => "scsi-t10",
            Scheme::GptGuid => "gpt",
            Scheme::AzureLun => "azure-lun",
            Scheme::Slot => "slot",
            Scheme::Attachment => "attachment",
        }
    }

    /// Whether the value says which volume it is. A slot says only where it is plugged in, and a partition
    /// table's GUID is data that a copy of the volume carries too: neither may name a disk, nor may the number that it has now.
    pub fn names_a_volume(self) -> bool {
        !matches!(
            self,
            Scheme::GptGuid | Scheme::AzureLun | Scheme::Slot | Scheme::Attachment
        )
    }
}

/// How the bytes of a file are read. Who serves the file says it; its content never does, for a guest can write any header into
/// a raw disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Format {
    /// The bytes of the file are those of the disk.
    #[default]
    Raw,
    Qcow2,
}

impl Format {
    pub const ALL: [Format; 2] = [Format::Raw, Format::Qcow2];

    /// The word for it in the configuration, on D-Bus and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format of the file under `path` by what was `said` of it. Raw when nothing was, but a name that ends as an image's
    /// does has to be spoken of: its bytes as they are is seldom what was meant.
    ///
    /// # Errors
    /// Says what may be said.
    pub fn told(path: &str, said: Option<&str>) -> Result<Format, String> {
        match said {
            Some(name) => Format::ALL
                .into_iter()
                .find(|format| format.name() == name)
                .ok_or_else(|| format!("\"{name}\": expected \"raw\" or \"qcow2\"")),
            None if path.to_ascii_lowercase().ends_with(".qcow2") => Err(format!(
                "say \"qcow2\", or \"raw\" for its bytes as they are, of {path}"
            )),
            None => Ok(Format::Raw),
        }
    }

    /// The scheme of the identities of such files.
    pub fn scheme(self) -> Scheme {
        match self {
            Format::Raw => Scheme::File,
            Format::Qcow2 => Scheme::Qcow2,
        }
    }
}

/// One thing that a disk says of itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    pub scheme: Scheme,
    pub value: String,
}

impl Identity {
    pub fn new(scheme: Scheme, value: impl Into<String>) -> Identity {
        Identity {
            scheme,
            value: value.into(),
        }
    }

    /// Reads `scheme:value` as it is displayed; `None` when there is no such scheme, or no value.
    pub fn parse(text: &str) -> Option<Identity> {
        let (name, value) = text.split_once(':')?;
        let scheme = Scheme::ALL
            .into_iter()
            .find(|scheme| scheme.name() == name)?;
        (!value.is_empty()).then(|| Identity::new(scheme, value))
    }

    /// One attachment of a disk, in one boot.
    pub fn of_attachment(boot: &str, diskseq: u64) -> Identity {
        Identity::new(Scheme::Attachment, format!("{boot}/{diskseq}"))
    }

    /// The path, of a file.
    pub fn file(&self) -> Option<&str> {
        self.format().map(|_| self.value.as_str())
    }

    /// How the bytes of the file are read; `None` of what is no file.
    pub fn format(&self) -> Option<Format> {
        Format::ALL
            .into_iter()
            .find(|format| format.scheme() == self.scheme)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.scheme.name(), self.value)
    }
}

/// The identity by which a disk is named to the outside: the first by precedence that names a volume.
pub fn primary(identities: &BTreeSet<Identity>) -> Option<&Identity> {
    // The set is sorted by scheme first, and the order of the schemes is the precedence.
    identities
        .iter()
        .find(|identity| identity.scheme.names_a_volume())
}

/// What was read from a disk, raw. `None` is "this kind of disk has no such attribute".
///
/// A text attribute that was not UTF-8 may come with U+FFFD in it; such a value identifies nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// `/sys/block/vdX/serial`, at most 20 bytes.
    pub virtio_serial: Option<String>,
    /// SCSI page 0x80, with its header.
    pub vpd_pg80: Option<Vec<u8>>,
    /// SCSI page 0x83, with its header.
    pub vpd_pg83: Option<Vec<u8>>,
    /// Where the two above are the disk's own answers: what the kernel read when it scanned the disk.
    pub scsi_remembered: Option<ScsiPages>,
    /// `device/wwid` (SCSI) or the namespace's `wwid` (NVMe).
    pub wwid: Option<String>,
    /// `device/vendor` and `device/model`.
    pub vendor: Option<String>,
    pub model: Option<String>,
    /// Controller scope: not an identity without the namespace id.
    pub nvme_serial: Option<String>,
    pub nvme_nsid: Option<u32>,
    pub nvme_nguid: Option<String>,
    pub nvme_eui: Option<String>,
    pub nvme_uuid: Option<String>,
    /// Bytes 384 and on of Identify Namespace, where clouds write names.
    pub nvme_vendor_bytes: Option<Vec<u8>>,
    /// `loop/backing_file`.
    pub backing_file: Option<String>,
    /// The disk GUID of its GUID partition table.
    pub gpt_disk_guid: Option<String>,
    /// udev's `ID_PATH`, a slot and no volume.
    pub id_path: Option<String>,
    /// The disk is a drive whose medium can be changed: its serial and its numbers are the drive's, whatever lies in it.
    pub removable: bool,
    /// The schemes of attributes that the disk has, or may have, and that could not be read this time, each with the reason.
    pub unread: BTreeMap<Scheme, String>,
}

/// A SCSI disk's pages of vital product data, with their headers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScsiPages {
    pub vpd_pg80: Option<Vec<u8>>,
    pub vpd_pg83: Option<Vec<u8>>,
}

/// The hex digits of `text` in lower case, with dashes and nothing else left out; `None` when there is
/// anything else, or another number of digits than one of `digits`.
fn hex(text: &str, digits: &[usize]) -> Option<String> {
    let hex: String = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_ascii_lowercase())
        .collect();
    (digits.contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit())).then_some(hex)
}

/// 32 hex digits as a UUID is written, 8-4-4-4-12.
fn dashed(hex: &str) -> String {
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    )
}

/// The first `bytes` bytes of ASCII text.
fn cut(text: &str, bytes: usize) -> &str {
    text.get(..bytes).unwrap_or(text)
}

#[cfg(test)]
mod tests;
