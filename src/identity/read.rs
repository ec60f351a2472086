//! Decides what a disk's raw attributes say of its identity. Total: any bytes give a set, maybe an empty one.

use std::collections::BTreeSet;

use super::{Attributes, Identity, Scheme, dashed, hex, vpd, worthless};

/// What a disk's raw attributes say of its identity; empty when nothing in them identifies it.
pub fn identities(attributes: &Attributes) -> BTreeSet<Identity> {
    let mut found = BTreeSet::new();
    // What a drive says of itself it says of the next medium, too.
    if !attributes.removable {
        found.extend(virtio(attributes));
        found.extend(scsi(attributes));
        found.extend(nvme(attributes));
    }
    found.extend(backing_file(attributes));
    found.extend(partition_table(attributes));
    found.extend(slots(attributes));
    found
}

fn virtio(attributes: &Attributes) -> Option<Identity> {
    let value = worthless::serial(attributes.virtio_serial.as_deref()?)?;
    Some(Identity::new(Scheme::VirtioSerial, value))
}

fn scsi(attributes: &Attributes) -> BTreeSet<Identity> {
    let mut found = scsi_pages(attributes, &attributes.vpd_pg80, &attributes.vpd_pg83);
    // The kernel makes `wwid` out of its page 0x83, so it is only worth reading where no page was.
    let asked = attributes.scsi_remembered.is_some();
    if !asked && attributes.vpd_pg83.is_none() && !is_nvme(attributes) {
        found.extend(scsi_wwid(attributes));
    }
    found
}

fn scsi_pages(
    attributes: &Attributes,
    pg80: &Option<Vec<u8>>,
    pg83: &Option<Vec<u8>>,
) -> BTreeSet<Identity> {
    let serial = pg80.as_deref().and_then(vpd::unit_serial);
    let serial = serial.map(|serial| Identity::new(Scheme::ScsiPg80, serial));
    let vendor = trimmed(&attributes.vendor);
    let designators = pg83.iter().flat_map(|page| vpd::designators(page, vendor));
    serial.into_iter().chain(designators).collect()
}

/// What a SCSI disk says and what the kernel remembers of it, where these differ.
pub fn disputed(attributes: &Attributes) -> Option<[BTreeSet<Identity>; 2]> {
    let pages = attributes.scsi_remembered.as_ref()?;
    let remembered = scsi_pages(attributes, &pages.vpd_pg80, &pages.vpd_pg83);
    let said = scsi(attributes);
    (said != remembered).then_some([said, remembered])
}

fn scsi_wwid(attributes: &Attributes) -> Option<Identity> {
    let wwid = attributes.wwid.as_deref()?.trim_end();
    if let Some(naa) = wwid.strip_prefix("naa.") {
        let value = worthless::number(hex(naa, &[16, 32])?)?;
        return Some(Identity::new(Scheme::ScsiNaa, value));
    }
    let value = worthless::number(hex(wwid.strip_prefix("eui.")?, &[16, 24, 32])?)?;
    Some(Identity::new(Scheme::ScsiEui, value))
}

/// Whether the attributes are those of an NVMe namespace, whose `wwid` has other prefixes' meanings.
fn is_nvme(attributes: &Attributes) -> bool {
    attributes.nvme_nsid.is_some() || attributes.nvme_serial.is_some()
}

fn nvme(attributes: &Attributes) -> Vec<Identity> {
    if !is_nvme(attributes) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut number = |scheme, text: Option<&str>, digits: usize| {
        let value = text
            .and_then(|text| hex(text.trim_end(), &[digits]))
            .and_then(worthless::number);
        if let Some(value) = value {
            let value = match scheme {
                Scheme::NvmeUuid => dashed(&value),
                _ => value,
            };
            found.push(Identity::new(scheme, value));
        }
    };
    // Linux drivers/nvme/host/sysfs.c wwid_show: uuid., else eui. with the NGUID, else eui. with the EUI-64,
    // else a text with the serial, which says no more than the serial does.
    let wwid = attributes.wwid.as_deref().map(str::trim_end);
    let eui = wwid.and_then(|wwid| wwid.strip_prefix("eui."));
    let uuid = wwid.and_then(|wwid| wwid.strip_prefix("uuid."));
    number(Scheme::NvmeNguid, attributes.nvme_nguid.as_deref(), 32);
    number(Scheme::NvmeNguid, eui, 32);
    number(
        Scheme::NvmeEui,
        attributes.nvme_eui.as_deref().map(spaces_out).as_deref(),
        16,
    );
    number(Scheme::NvmeEui, eui, 16);
    number(Scheme::NvmeUuid, attributes.nvme_uuid.as_deref(), 32);
    number(Scheme::NvmeUuid, uuid, 32);
    found.extend(nvme_serial(attributes));
    found.extend(gce_name(attributes));
    found.extend(azure_name(attributes));
    found
}

/// sysfs shows an EUI-64 as bytes with blanks between them ("%8ph").
fn spaces_out(text: &str) -> String {
    text.chars().filter(|c| *c != ' ').collect()
}

/// The serial belongs to the controller, which may have many namespaces: only with its number is it one disk's.
fn nvme_serial(attributes: &Attributes) -> Option<Identity> {
    let serial = worthless::serial(attributes.nvme_serial.as_deref()?)?;
    let nsid = namespace(attributes)?;
    Some(Identity::new(
        Scheme::NvmeSerial,
        format!("{serial}_{nsid}"),
    ))
}

/// 0 and 0xffffffff address no single namespace (NVMe base specification, "Namespace Identifiers").
fn namespace(attributes: &Attributes) -> Option<u32> {
    attributes
        .nvme_nsid
        .filter(|nsid| *nsid != 0 && *nsid != u32::MAX)
}

/// Google writes JSON with `device_name` at byte 384 of Identify Namespace (guest-configs: google_nvme_id).
fn gce_name(attributes: &Attributes) -> Option<Identity> {
    if !trimmed(&attributes.model).starts_with("nvme_card") {
        return None;
    }
    let json: serde_json::Value = serde_json::from_str(vendor_text(attributes)?).ok()?;
    let name = worthless::serial(json.get("device_name")?.as_str()?)?;
    Some(Identity::new(Scheme::GceName, name))
}

/// Azure writes `type=data,lun=4,name=data-db` at byte 384 (azure-vm-utils: doc/disk-identification.md).
fn azure_name(attributes: &Attributes) -> Option<Identity> {
    if !is_azure_nvme(attributes) {
        return None;
    }
    // The name of a local disk ("nvme-440G-1") is its place among the machine's local disks, not a volume's; such a
    // disk has a controller and a serial of its own.
    if azure_field(attributes, "type")? != "data" {
        return None;
    }
    let name = azure_field(attributes, "name")?;
    Some(Identity::new(Scheme::AzureName, worthless::serial(name)?))
}

fn is_azure_nvme(attributes: &Attributes) -> bool {
    let model = trimmed(&attributes.model);
    model == AZURE_REMOTE_MODEL || model.starts_with("Microsoft NVMe Direct Disk")
}

fn azure_field<'a>(attributes: &'a Attributes, key: &str) -> Option<&'a str> {
    let mut values = vendor_text(attributes)?
        .split(',')
        .filter_map(|field| field.split_once('='))
        .filter(|(name, _)| *name == key)
        .map(|(_, value)| value);
    let value = values.next()?;
    // Twice the same key is not what the platform writes.
    values.next().is_none().then_some(value)
}

/// The vendor bytes as text, up to the first NUL.
fn vendor_text(attributes: &Attributes) -> Option<&str> {
    let bytes = attributes.nvme_vendor_bytes.as_deref()?;
    let text = bytes.split(|b| *b == 0).next()?;
    (text.len() <= VENDOR_BYTES_MAX).then(|| std::str::from_utf8(text).ok())?
}

fn backing_file(attributes: &Attributes) -> Option<Identity> {
    let shown = attributes.backing_file.as_deref()?;
    // sysfs adds one line break; a path may end in blanks of its own.
    let path = shown.strip_suffix('\n').unwrap_or(shown);
    // Linux fs/d_path.c marks a file without a name so. Another file may have the name by now: it proves nothing.
    let gone = path.ends_with(" (deleted)");
    let usable =
        path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\u{fffd}');
    (usable && !gone).then(|| Identity::new(Scheme::Loop, path))
}

fn partition_table(attributes: &Attributes) -> Option<Identity> {
    let guid = attributes.gpt_disk_guid.as_deref()?.trim_end();
    let value = worthless::number(hex(guid, &[32])?)?;
    Some(Identity::new(Scheme::GptGuid, dashed(&value)))
}

fn slots(attributes: &Attributes) -> Vec<Identity> {
    let path = attributes
        .id_path
        .as_deref()
        .and_then(worthless::serial)
        .map(|path| Identity::new(Scheme::Slot, path));
    let lun = azure_lun(attributes).map(|lun| Identity::new(Scheme::AzureLun, format!("lun{lun}")));
    path.into_iter().chain(lun).collect()
}

fn azure_lun(attributes: &Attributes) -> Option<u32> {
    if trimmed(&attributes.model) == AZURE_REMOTE_MODEL {
        // Namespace 1 is the system disk, 2 and on are the data disks' LUNs 0 and on (80-azure-disk.rules).
        return namespace(attributes)?.checked_sub(2);
    }
    if let Some(lun) = azure_field(attributes, "lun").filter(|_| is_azure_nvme(attributes)) {
        return number(lun);
    }
    // udev's path_id for a disk on VMBus: acpi-VMBUS:01-vmbus-GUID-lun-N. The GUIDs are those of Azure's data
    // controllers (80-azure-disk.rules); f8b3781a-… is the system disk's.
    let path = attributes.id_path.as_deref()?;
    let (_, rest) = path.split_once("-vmbus-")?;
    let (guid, lun) = rest.split_once("-lun-")?;
    AZURE_DATA_CONTROLLERS
        .contains(&guid)
        .then(|| number(lun))?
}

/// A decimal number as the platform prints it: no sign, no leading zero.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn trimmed(text: &Option<String>) -> &str {
    text.as_deref()
        .map(|text| text.trim_end_matches([' ', '\0', '\n']))
        .unwrap_or_default()
}

const AZURE_REMOTE_MODEL: &str = "MSFT NVMe Accelerator v1.0";
const AZURE_DATA_CONTROLLERS: [&str; 3] = [
    "f8b3781b1e824818a1c363d806ec15bb",
    "f8b3781c1e824818a1c363d806ec15bb",
    "f8b3781d1e824818a1c363d806ec15bb",
];
/// Identify Namespace is 4,096 bytes, of which those from 384 on are the vendor's.
const VENDOR_BYTES_MAX: usize = 4096 - 384;
/// Linux PATH_MAX without the NUL.
pub(super) const PATH_BYTES_MAX: usize = 4095;
