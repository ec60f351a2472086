//! Disks as the platforms show them, each with the volume that it is.

use super::{Attributes, bytes, page80, page83};

/// One disk as a platform shows it, and the volume it is.
pub(super) struct Example {
    pub(super) volume: &'static str,
    pub(super) disk: Attributes,
}

pub(super) fn virtio(volume: &'static str, serial: &str) -> Example {
    Example {
        volume,
        disk: Attributes {
            virtio_serial: Some(serial.to_owned()),
            ..Attributes::default()
        },
    }
}

/// QEMU's scsi-hd: the serial on page 0x80 (36 bytes at most), its first 20 on page 0x83.
pub(super) fn qemu_scsi(volume: &'static str, serial: &str) -> Example {
    let device_id = serial.get(..20).unwrap_or(serial);
    Example {
        volume,
        disk: Attributes {
            vpd_pg80: Some(page80(serial.as_bytes())),
            vpd_pg83: Some(page83(&[(0x02, 0x00, device_id.as_bytes())])),
            vendor: Some("QEMU    ".to_owned()),
            model: Some("QEMU HARDDISK   ".to_owned()),
            ..Attributes::default()
        },
    }
}

pub(super) fn nvme(
    volume: &'static str,
    model: &str,
    serial: &str,
    nsid: u32,
    vendor: &[u8],
) -> Example {
    let mut bytes = vendor.to_vec();
    bytes.resize(3712, 0);
    Example {
        volume,
        disk: Attributes {
            model: Some(format!("{model:<40}")),
            nvme_serial: Some(format!("{serial:<20}")),
            nvme_nsid: Some(nsid),
            nvme_vendor_bytes: Some(bytes),
            ..Attributes::default()
        },
    }
}

pub(super) fn naa(volume: &'static str, vendor: &str, hex: &str, serial: Option<&str>) -> Example {
    Example {
        volume,
        disk: Attributes {
            vpd_pg83: Some(page83(&[(0x01, 0x03, &bytes(hex))])),
            vpd_pg80: serial.map(|serial| page80(serial.as_bytes())),
            vendor: Some(vendor.to_owned()),
            wwid: Some(format!("naa.{hex}\n")),
            ..Attributes::default()
        },
    }
}

pub(super) fn only(volume: &'static str, disk: Attributes) -> Example {
    Example { volume, disk }
}

pub(super) fn examples() -> Vec<Example> {
    let google = Attributes {
        vpd_pg83: Some(page83(&[(0x02, 0x00, b"mydisk")])),
        vendor: Some("Google  ".to_owned()),
        model: Some("PersistentDisk  ".to_owned()),
        ..Attributes::default()
    };
    let azure_scsi = Attributes {
        vendor: Some("Msft    ".to_owned()),
        model: Some("Virtual Disk    ".to_owned()),
        id_path: Some("acpi-VMBUS:01-vmbus-f8b3781b1e824818a1c363d806ec15bb-lun-4".to_owned()),
        ..Attributes::default()
    };
    let accelerator = "MSFT NVMe Accelerator v1.0";
    let direct = b"type=data,lun=6,name=data-db\0\0";
    let pd = br#"{"device_name":"pvc-0d2a6d0f8a11","disk_type":"PERSISTENT"}"#;
    let ngd = Attributes {
        wwid: Some("eui.e8238fa6bf530001001b448b46b4f5a2\n".to_owned()),
        nvme_nsid: Some(1),
        ..Attributes::default()
    };
    let eui = Attributes {
        nvme_eui: Some("00 25 38 5b 71 b0 0f 2a".to_owned()),
        nvme_nsid: Some(1),
        ..Attributes::default()
    };
    let uuid = Attributes {
        nvme_uuid: Some("2e4f3a10-9b7c-4d11-8f2e-5a6b7c8d9e0f\n".to_owned()),
        nvme_nsid: Some(3),
        ..Attributes::default()
    };
    let loop_file = Attributes {
        backing_file: Some("/srv/disks/vol-a.img".to_owned()),
        ..Attributes::default()
    };
    let gpt = Attributes {
        gpt_disk_guid: Some("93623F30-EDC3-42FE-9DEF-A2AEF1725F9D".to_owned()),
        ..Attributes::default()
    };
    let slot = Attributes {
        id_path: Some("pci-0000:00:07.0".to_owned()),
        ..Attributes::default()
    };
    vec![
        virtio(
            "cloudstack:0b8c4534-50fc-436e-9a11-3c1d5a6e7f80",
            "0b8c453450fc436e9a11",
        ),
        qemu_scsi(
            "cloudstack:1b8c4534-50fc-436e-9a11-3c1d5a6e7f80",
            "1b8c453450fc436e9a11",
        ),
        virtio(
            "openstack:65953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
            "65953b61-0af1-42f6-a",
        ),
        qemu_scsi(
            "openstack:75953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
            "75953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
        ),
        qemu_scsi(
            "openstack:85953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
            "85953b61-0af1-42f6-a",
        ),
        naa(
            "openstack:95953b61-0af1-42f6-a9d3-3f1b5e3c2f10",
            "VMware  ",
            "95953b610af142f6a9d33f1b5e3c2f10",
            None,
        ),
        nvme(
            "ebs:vol-0fab1d5e3f72a5e23",
            "Amazon Elastic Block Store",
            "vol0fab1d5e3f72a5e23",
            1,
            b"sdf",
        ),
        virtio("ebs:vol-68c1fb9a54f87cd7a", "vol68c1fb9a54f87cd7a"),
        only("gcp:mydisk", google),
        nvme(
            "gcp:pvc-0d2a6d0f8a11",
            "nvme_card-pd",
            "nvme_card-pd",
            7,
            pd,
        ),
        only("azure:lun=4", azure_scsi),
        nvme("azure:lun=5", accelerator, "SN: 000001", 7, b""),
        nvme(
            "azure:data-db",
            "Microsoft NVMe Direct Disk v2",
            "b3a1c2",
            1,
            direct,
        ),
        naa(
            "vmware:6000c293-1d2e-4f5a-8b6c-7d8e9fa0b1c2",
            "VMware  ",
            "6000c2931d2e4f5a8b6c7d8e9fa0b1c2",
            Some("6000c2931d2e4f5a8b6c7d8e9fa0b1c2"),
        ),
        naa(
            "wwn:3600224807a025e35d9994b5f1d81cf8f",
            "Msft    ",
            "600224807a025e35d9994b5f1d81cf8f",
            None,
        ),
        naa(
            "wwn:naa.6001405d27e5d8988294b1f9c0a7e3d2",
            "LIO-ORG ",
            "6001405d27e5d8988294b1f9c0a7e3d2",
            Some("d27e5d89-8829-4b1f-9c0a-7e3d2f1b5e3c"),
        ),
        virtio("serial:54-a672-23e5b495a9ea", "54-a672-23e5b495a9ea"),
        virtio("serial:5fb20ba17c2f", "5fb20ba17c2f"),
        qemu_scsi("serial:WD-WMAP9A966149", "WD-WMAP9A966149"),
        qemu_scsi("serial:106486781", "106486781"),
        virtio("serial:0-f043f3b303a84b8396a1", "0-f043f3b303a84b8396"),
        nvme(
            "serial:S4EWNX0R123456",
            "Samsung SSD",
            "S4EWNX0R123456",
            1,
            b"",
        ),
        nvme(
            "serial:S4EWNX0R123457_2",
            "Samsung SSD",
            "S4EWNX0R123457",
            2,
            b"",
        ),
        only("wwn:eui.e8238fa6bf530001001b448b46b4f5a2", ngd),
        only("wwn:eui.0025385b71b00f2a", eui),
        only("wwn:uuid.2e4f3a10-9b7c-4d11-8f2e-5a6b7c8d9e0f", uuid),
        only("loop:/srv/disks/vol-a.img", loop_file),
        only("gpt:93623f30-edc3-42fe-9def-a2aef1725f9d", gpt),
        only("slot:pci-0000:00:07.0", slot),
    ]
}
