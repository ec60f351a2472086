//! The table of profiles: how a consumer's volume id is written, and what the guest then sees of it.
//!
//! A new profile is one entry in [`PROFILES`] and a row in the tests. What a platform cuts is a candidate of its
//! own; every candidate is an equality, so a longer list is a wider door: only what a platform is known to do.

use super::read::PATH_BYTES_MAX;
use super::worthless::SERIAL_BYTES_MAX;
use super::{Identity, Scheme, cut, dashed, hex};

/// A weaker class of identity that the configuration has to allow by name, `[identity] allow = ["gpt", "slot"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OptIn {
    /// The partition table's GUID: a copy of the volume has it too, and the guest can change it.
    Gpt,
    /// Where a disk is plugged in; another disk in the same slot is taken for it.
    Slot,
}

impl OptIn {
    pub const ALL: [OptIn; 2] = [OptIn::Gpt, OptIn::Slot];

    pub fn name(self) -> &'static str {
        match self {
            OptIn::Gpt => "gpt",
            OptIn::Slot => "slot",
        }
    }
}

/// One platform's way to name volumes.
pub(super) struct Profile {
    pub(super) name: &'static str,
    /// What an id of this profile is, as the end of "expected …".
    pub(super) expects: &'static str,
    pub(super) example: &'static str,
    /// The one spelling of an id; `None` when it is none. Idempotent.
    pub(super) normalise: fn(&str) -> Option<String>,
    /// What a disk of the (normalised) id can say of itself.
    pub(super) candidates: fn(&str) -> Vec<Identity>,
    pub(super) opt_in: fn(&str) -> Option<OptIn>,
}

/// The names of all profiles, as they are shown to people.
pub(super) fn profile_names() -> impl Iterator<Item = &'static str> {
    PROFILES.iter().map(|profile| profile.name)
}

pub(super) fn find(name: &str) -> Option<&'static Profile> {
    PROFILES.iter().find(|profile| profile.name == name)
}

/// A disk by its number in one boot. Not in the table: no one can write it.
pub(super) static ATTACHMENT: Profile = Profile {
    name: "attachment",
    expects: "nothing that can be written",
    example: "",
    normalise: |_| None,
    candidates: |id| vec![Identity::new(Scheme::Attachment, id)],
    opt_in: never,
};

/// A path of which it is not known which volume it means. Not in the table: no disk is this, and no one can write it.
pub(super) static PATH: Profile = Profile {
    name: "path",
    expects: "nothing that can be written",
    example: "",
    normalise: |_| None,
    // No boot has this id.
    candidates: |id| vec![Identity::new(Scheme::Attachment, format!("path/{id}"))],
    opt_in: never,
};

static PROFILES: [Profile; 14] = [
    // apache/cloudstack LibvirtComputingResource.java diskUuidToSerial: dashes out, first 20. QEMU's scsi-hd says the
    // same on page 0x80 and, as its device_id, on page 0x83.
    Profile {
        name: "cloudstack",
        expects: "the volume's UUID",
        example: "cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11",
        normalise: uuid,
        candidates: |id| {
            let hex = undashed(id);
            let seen = cut(&hex, 20);
            vec![
                Identity::new(Scheme::VirtioSerial, seen),
                Identity::new(Scheme::ScsiPg80, seen),
                Identity::new(Scheme::ScsiVendor, seen),
            ]
        },
        opt_in: never,
    },
    // openstack/nova nova/virt/libvirt/volume/volume.py: serial is the Cinder UUID. virtio-blk cuts to 20, QEMU's page
    // 0x83 to 20 or not by version; cloud-provider-openstack pkg/util/mount/mount.go: ESXi makes a WWN of it.
    Profile {
        name: "openstack",
        expects: "the Cinder volume's UUID",
        example: "openstack:65953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
        normalise: uuid,
        candidates: |id| {
            vec![
                Identity::new(Scheme::VirtioSerial, cut(id, 20)),
                Identity::new(Scheme::ScsiPg80, id),
                Identity::new(Scheme::ScsiPg80, cut(id, 20)),
                Identity::new(Scheme::ScsiVendor, id),
                Identity::new(Scheme::ScsiVendor, cut(id, 20)),
                Identity::new(Scheme::ScsiNaa, undashed(id)),
            ]
        },
        opt_in: never,
    },
    // amazon-ec2-utils ebsnvme: serial is the id without its dash, one namespace for each controller. mulgadc/spinifex#395:
    // the same 20 characters on virtio.
    Profile {
        name: "ebs",
        expects: "the EBS volume id, vol- and 8 or 17 hex digits",
        example: "ebs:vol-0fab1d5e3f72a5e23",
        normalise: |text| {
            let hex = text.strip_prefix("vol")?;
            let hex = hex.strip_prefix('-').unwrap_or(hex);
            lower_hex(hex, &[8, 17]).then(|| format!("vol-{hex}"))
        },
        candidates: |id| {
            let serial = undashed(id);
            vec![
                Identity::new(Scheme::NvmeSerial, format!("{serial}_1")),
                Identity::new(Scheme::VirtioSerial, serial),
            ]
        },
        opt_in: never,
    },
    // guest-configs 65-gce-disk-naming.rules and google_nvme_id. The name is the user's: a disk that is deleted and made
    // again under its name has the same identity.
    Profile {
        name: "gcp",
        expects: "the device name of the disk, 1 to 63 of a-z, 0-9, - and _, beginning with a letter",
        example: "gcp:pvc-0d2a6d0f8a11",
        normalise: |text| {
            let rest =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
            let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
            (first && text.len() <= 63 && text.bytes().all(rest)).then(|| text.to_owned())
        },
        candidates: |id| vec![Identity::new(Scheme::GceName, id)],
        opt_in: never,
    },
    // azure-vm-utils udev/80-azure-disk.rules and doc/disk-identification.md: a name on newer NVMe disks, else a LUN.
    Profile {
        name: "azure",
        expects: "the disk's name, or lun=N for a data disk's slot",
        example: "azure:data-db",
        normalise: |text| {
            if let Some(lun) = text.strip_prefix("lun=") {
                let number: u8 = lun.parse().ok()?;
                // Azure allows at most 64 data disks for a machine.
                return (number < 64 && number.to_string() == lun).then(|| text.to_owned());
            }
            let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            let first = text
                .bytes()
                .next()
                .is_some_and(|b| b.is_ascii_alphanumeric());
            (first && text.len() <= 80 && text.bytes().all(rest)).then(|| text.to_owned())
        },
        candidates: |id| match id.strip_prefix("lun=") {
            Some(lun) => vec![Identity::new(Scheme::AzureLun, format!("lun{lun}"))],
            None => vec![Identity::new(Scheme::AzureName, id)],
        },
        opt_in: |id| id.starts_with("lun=").then_some(OptIn::Slot),
    },
    // kubernetes-sigs/vsphere-csi-driver#27: with disk.EnableUUID pages 0x80 and 0x83 carry the disk's UUID, 6000c29….
    Profile {
        name: "vmware",
        expects: "the disk's UUID, 32 hex digits beginning with 6000c29 (needs disk.EnableUUID=TRUE)",
        example: "vmware:6000c293-1d2e-4f5a-8b6c-7d8e9fa0b1c2",
        normalise: |text| {
            // vSphere writes it as "6000C293 1d 2e …-…" in places.
            let text: String = text.chars().filter(|c| *c != ' ').collect();
            hex(&text, &[32])
                .filter(|hex| hex.starts_with("6000c29"))
                .map(|hex| dashed(&hex))
        },
        candidates: |id| {
            let hex = undashed(id);
            vec![
                Identity::new(Scheme::ScsiNaa, hex.clone()),
                Identity::new(Scheme::ScsiPg80, hex),
            ]
        },
        opt_in: never,
    },
    // Verbatim: libvirt <serial>, Proxmox VE serial=, KubeVirt, Hetzner's volume number, a real disk's serial. QEMU cuts
    // to 20 on virtio-blk and as device_id, and to 36 on page 0x80 (hw/scsi/scsi-disk.c).
    Profile {
        name: "serial",
        expects: "the serial as the disk shows it, printable ASCII without blanks at its end, not a constant that many disks share",
        example: "serial:WD-WMAP9A966149",
        normalise: |text| printable(text).then(|| text.to_owned()),
        candidates: |id| {
            let mut found = vec![
                Identity::new(Scheme::VirtioSerial, cut(id, 20)),
                Identity::new(Scheme::ScsiPg80, id),
                Identity::new(Scheme::ScsiPg80, cut(id, 36)),
                Identity::new(Scheme::ScsiVendor, id),
                Identity::new(Scheme::ScsiVendor, cut(id, 20)),
            ];
            // An NVMe serial is at most 20 bytes and a controller's: namespace 1, unless the id names one as udev does.
            if id.len() <= 20 {
                found.push(Identity::new(Scheme::NvmeSerial, format!("{id}_1")));
            }
            if id.rsplit_once('_').is_some_and(|(_, nsid)| decimal(nsid)) {
                found.push(Identity::new(Scheme::NvmeSerial, id));
            }
            found
        },
        opt_in: never,
    },
    // A NAA or EUI given as such, in the spellings of sysfs (naa.…, eui.…, uuid.…), udev (0x…) and scsi_id (3…).
    Profile {
        name: "wwn",
        expects: "naa. with 16 or 32 hex digits, eui. with 16, 24 or 32, or uuid. with a UUID",
        example: "wwn:naa.6001405d27e5d8988294b1f9c0a7e3d2",
        normalise: wwn,
        candidates: |id| match id.split_once('.') {
            Some(("naa", hex)) => vec![Identity::new(Scheme::ScsiNaa, hex)],
            Some(("uuid", uuid)) => vec![Identity::new(Scheme::NvmeUuid, uuid)],
            Some((_, hex)) => {
                let mut found = vec![Identity::new(Scheme::ScsiEui, hex)];
                match hex.len() {
                    16 => found.push(Identity::new(Scheme::NvmeEui, hex)),
                    32 => found.push(Identity::new(Scheme::NvmeNguid, hex)),
                    _ => (),
                }
                found
            }
            None => Vec::new(),
        },
        opt_in: never,
    },
    // The backing file as the kernel shows it: absolute and resolved (drivers/block/loop.c, loop_attr_backing_file_show).
    Profile {
        name: "loop",
        expects: "the absolute path of the backing file, without symbolic links, '//', '.' or '..'",
        example: "loop:/srv/disks/vol-a.img",
        // The kernel ends the name of a file that was removed so: such a path would never match, or match wrongly.
        normalise: |text| absolute(text).filter(|path| !path.ends_with(" (deleted)")),
        candidates: |id| vec![Identity::new(Scheme::Loop, id)],
        opt_in: never,
    },
    // A plain file, by the path under which the configuration's roots show it.
    Profile {
        name: "file",
        expects: "the absolute path of a regular file, without '//', '.' or '..'",
        example: "file:/backups/vm7/disk0.raw",
        normalise: absolute,
        candidates: |id| vec![Identity::new(Scheme::File, id)],
        opt_in: never,
    },
    // The same for a QCOW2 image: what is in it is the volume, not the bytes of the file.
    Profile {
        name: "qcow2",
        expects: "the absolute path of a QCOW2 image, without '//', '.' or '..'",
        example: "qcow2:/backups/vm7/disk0.qcow2",
        normalise: absolute,
        candidates: |id| vec![Identity::new(Scheme::Qcow2, id)],
        opt_in: never,
    },
    // One thing that a disk says of itself, as nbdtrack shows it: what a path is pinned to.
    Profile {
        name: "disk",
        expects: "an identity that names a volume, scheme:value as 'nbdtrack volumes' shows it",
        example: "disk:virtio-serial:5f0c2a1e7b1d4c559c39",
        normalise: |text| {
            let identity = Identity::parse(text)?;
            let fits = text.len() <= PATH_BYTES_MAX && !text.chars().any(char::is_control);
            (fits && identity.scheme.names_a_volume() && identity.file().is_none())
                .then(|| text.to_owned())
        },
        candidates: |id| Identity::parse(id).into_iter().collect(),
        opt_in: never,
    },
    Profile {
        name: "gpt",
        expects: "the disk GUID of the partition table, a UUID",
        example: "gpt:93623f30-edc3-42fe-9def-a2aef1725f9d",
        normalise: uuid,
        candidates: |id| vec![Identity::new(Scheme::GptGuid, id)],
        opt_in: |_| Some(OptIn::Gpt),
    },
    Profile {
        name: "slot",
        expects: "udev's ID_PATH of the slot",
        example: "slot:pci-0000:00:07.0",
        normalise: |text| {
            let plain = text.bytes().all(|b| b.is_ascii_graphic());
            (printable(text) && plain).then(|| text.to_owned())
        },
        candidates: |id| vec![Identity::new(Scheme::Slot, id)],
        opt_in: |_| Some(OptIn::Slot),
    },
];

fn never(_: &str) -> Option<OptIn> {
    None
}

/// A UUID in lower case with dashes. RFC 9562 4: read without regard to case. Dashes all in their places, or none.
fn uuid(text: &str) -> Option<String> {
    let hex = hex(text, &[32])?;
    let dashed = dashed(&hex);
    let spelled = text.len() == 32 || text.eq_ignore_ascii_case(&dashed);
    spelled.then_some(dashed)
}

/// A path in the one spelling that it has without asking the file system.
fn absolute(text: &str) -> Option<String> {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    let parts = text.strip_prefix('/')?;
    let fits = text.len() <= PATH_BYTES_MAX && !text.chars().any(char::is_control);
    (fits && parts.split('/').all(plain)).then(|| text.to_owned())
}

fn undashed(text: &str) -> String {
    text.chars().filter(|c| *c != '-').collect()
}

fn wwn(text: &str) -> Option<String> {
    let (prefix, value) = match text.split_once('.') {
        Some((prefix, value)) => (prefix.to_ascii_lowercase(), value),
        // udev's ID_WWN.
        None if text.starts_with("0x") => ("naa".to_owned(), text.get(2..)?),
        // scsi_id's ID_SERIAL: the designator's type and then its digits.
        None if matches!(text.len(), 17 | 33) && text.starts_with('3') => {
            ("naa".to_owned(), text.get(1..)?)
        }
        None if matches!(text.len(), 17 | 33) && text.starts_with('2') => {
            ("eui".to_owned(), text.get(1..)?)
        }
        None => return None,
    };
    let plain = !value.contains('-');
    match prefix.as_str() {
        "naa" if plain => hex(value, &[16, 32]).map(|hex| format!("naa.{hex}")),
        "eui" if plain => hex(value, &[16, 24, 32]).map(|hex| format!("eui.{hex}")),
        "uuid" => uuid(value).map(|uuid| format!("uuid.{uuid}")),
        _ => None,
    }
}

fn printable(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= SERIAL_BYTES_MAX
        && !text.ends_with(' ')
        && text.bytes().all(|b| (0x20..0x7f).contains(&b))
}

fn lower_hex(text: &str, digits: &[usize]) -> bool {
    digits.contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A namespace id as it is printed: no sign, no leading zero.
fn decimal(text: &str) -> bool {
    text.parse::<u32>()
        .is_ok_and(|number| number != 0 && number.to_string() == text)
}
