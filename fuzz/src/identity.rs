//! What disks say of themselves (VPD pages, serials, a partition table), and volume ids: any bytes give a set, and
//! what is parsed is written as it is parsed again.

use nbdtrack::identity::{Attributes, ScsiPages, VolumeId, identities};
use nbdtrack::udev::gpt;

pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (head, tail) = data.split_at(data.len() / 2);
    let some = |bytes: &[u8]| Some(String::from_utf8_lossy(bytes).into_owned());
    let attributes = Attributes {
        virtio_serial: some(head),
        vpd_pg80: Some(data.to_vec()),
        vpd_pg83: Some(data.to_vec()),
        scsi_remembered: (data.len() % 2 == 1).then(|| ScsiPages {
            vpd_pg80: Some(head.to_vec()),
            vpd_pg83: Some(data.to_vec()),
        }),
        wwid: some(tail),
        vendor: some(head),
        model: some(&data[..data.len().min(40)]),
        nvme_serial: some(tail),
        nvme_nsid: Some(data.len() as u32),
        nvme_nguid: some(tail),
        nvme_eui: some(head),
        nvme_uuid: some(tail),
        nvme_vendor_bytes: Some(tail.to_vec()),
        backing_file: some(data),
        gpt_disk_guid: some(head),
        id_path: some(data),
        removable: false,
        unread: std::collections::BTreeMap::new(),
    };
    for identity in identities(&attributes) {
        assert!(!identity.value.is_empty());
        assert!(!identity.value.contains('\u{fffd}'), "{identity}");
    }
    if let Ok(volume) = VolumeId::parse(&text) {
        let again = VolumeId::parse(&volume.to_string());
        assert_eq!(again.as_ref(), Ok(&volume), "{volume}");
        let candidates = volume.candidates();
        assert!(!candidates.is_empty() && candidates.len() <= 8);
    }
    let guid = gpt::guid(|buf, offset| {
        let from = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let found = data[from..]
            .get(..buf.len())
            .ok_or(std::io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(found);
        Ok(())
    });
    if let Ok(Some(guid)) = guid {
        assert_eq!(guid.len(), 36);
    }
}
