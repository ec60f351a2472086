//! What a disk says of itself, and which volume that is. PURE: values in, values out.
//!
//! A disk presents a set of [`Identity`] values, each a (scheme, value) pair. A [`VolumeId`] is what a
//! person or the Volume Daemon wrote, `profile:id`; its profile expands it into a finite set of
//! candidate identities. A disk is that volume when one of its identities *equals* a candidate.
//!
//! May not touch: files, clocks, threads.

use std::fmt;

/// Where a value of identity comes from. The order is the precedence by which a disk's
/// D-Bus object gets its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    NvmeNguid,
    ScsiNaa,
    NvmeSerial,
    ScsiPg80,
    VirtioSerial,
    Loop,
}

impl Scheme {
    pub fn name(self) -> &'static str {
        match self {
            Scheme::NvmeNguid => "nvme-nguid",
            Scheme::ScsiNaa => "scsi-naa",
            Scheme::NvmeSerial => "nvme-serial",
            Scheme::ScsiPg80 => "scsi-pg80",
            Scheme::VirtioSerial => "virtio-serial",
            Scheme::Loop => "loop",
        }
    }
}

/// One thing that a disk says of itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    pub scheme: Scheme,
    pub value: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.scheme.name(), self.value)
    }
}

/// A volume as its consumer names it: `profile:id`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId {
    profile: &'static str,
    id: String,
}

/// What was read from a disk, raw. `None` is "this kind of disk has no such attribute".
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// `/sys/block/vdX/serial`, at most 20 bytes.
    pub virtio_serial: Option<String>,
    /// SCSI `device/vpd_pg80`, the page with its header.
    pub vpd_pg80: Option<Vec<u8>>,
    /// SCSI `device/vpd_pg83`, the page with its header.
    pub vpd_pg83: Option<Vec<u8>>,
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
}

impl VolumeId {
    /// Parses `profile:id`.
    pub fn parse(text: &str) -> Result<VolumeId, VolumeIdError> {
        match text.split_once(':') {
            Some(("loop", id)) => Ok(VolumeId { profile: "loop", id: id.to_owned() }),
            _ => Err(VolumeIdError::UnknownProfile(text.to_owned())),
        }
    }

    pub fn profile(&self) -> &'static str {
        self.profile
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The finite set of identities by which a disk is this volume.
    pub fn candidates(&self) -> std::collections::BTreeSet<Identity> {
        [Identity { scheme: Scheme::Loop, value: self.id.clone() }].into()
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.profile, self.id)
    }
}

/// Why a string is no volume id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeIdError {
    #[error("{0}: unknown profile")]
    UnknownProfile(String),
}

/// What a disk's raw attributes say of its identity.
pub fn identities(attributes: &Attributes) -> std::collections::BTreeSet<Identity> {
    attributes
        .backing_file
        .iter()
        .map(|path| Identity { scheme: Scheme::Loop, value: path.clone() })
        .collect()
}

/// The identity that names a disk: the first by precedence of scheme.
pub fn primary(identities: &std::collections::BTreeSet<Identity>) -> Option<&Identity> {
    identities.first()
}
