//! The text of a kernel uevent. PURE: bytes in, hint out; no socket, no sysfs.
//!
//! Layout (kernel `lib/kobject_uevent.c`): `ACTION@DEVPATH\0` and then `KEY=VALUE\0` for each variable.

use crate::correlation::{DeviceNumber, DiskSeq};

/// The kernel's message has at most 2,048 bytes of variables (`UEVENT_BUFFER_SIZE`) behind its header, whose
/// path is bounded by a page. What is longer is not the kernel's.
pub const MESSAGE_BYTES_MAX: usize = 8192;

/// The kernel's own limit is 64 variables (`UEVENT_NUM_ENVP`).
const VARIABLES_MAX: usize = 64;

/// What an event of a whole disk hints at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    pub number: DeviceNumber,
    pub diskseq: Option<DiskSeq>,
    /// The kernel says the device is gone. Never true for an event that someone made by writing to
    /// the `uevent` file (`SYNTH_UUID`): such a `remove` removes nothing.
    pub removed: bool,
}

/// What a message tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    Disk(Hint),
    /// A SCSI disk has reported that something may be another one than it was.
    Doubt(ScsiDoubt),
    /// No whole disk is concerned.
    Other,
}

/// Which SCSI disks may be others than they were. The kernel tells it of the SCSI device; its disk has no event (Linux `drivers/scsi/scsi_lib.c`,
/// `scsi_evt_emit`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScsiDoubt {
    /// `HOST:CHANNEL:TARGET:LUN`, or of all disks of a target its beginning up to the last colon.
    address: String,
    /// In words.
    pub why: &'static str,
}

impl ScsiDoubt {
    /// Whether the disk at this address is meant.
    pub fn concerns(&self, address: &str) -> bool {
        match self.address.ends_with(':') {
            true => address.starts_with(&self.address),
            false => address == self.address,
        }
    }
}

/// The message is not a uevent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Reads one message.
///
/// # Errors
/// [`Malformed`] when it is not a uevent, or one of a disk without a device number.
pub fn parse(message: &[u8]) -> Result<Heard, Malformed> {
    if message.len() > MESSAGE_BYTES_MAX || message.last() != Some(&0) {
        return Err(Malformed);
    }
    let text = std::str::from_utf8(message).map_err(|_| Malformed)?;
    let mut parts = text[..text.len() - 1].split('\0');
    let (action, path) = parts
        .next()
        .and_then(|header| header.split_once('@'))
        .ok_or(Malformed)?;
    if action.is_empty() || !path.starts_with('/') {
        return Err(Malformed);
    }

    let mut seen = Variables::default();
    for (count, part) in parts.enumerate() {
        let (key, value) = part.split_once('=').ok_or(Malformed)?;
        if count >= VARIABLES_MAX || key.is_empty() {
            return Err(Malformed);
        }
        let cell = match key {
            "ACTION" => &mut seen.action,
            "DEVPATH" => &mut seen.devpath,
            "SUBSYSTEM" => &mut seen.subsystem,
            "DEVTYPE" => &mut seen.devtype,
            "MAJOR" => &mut seen.major,
            "MINOR" => &mut seen.minor,
            "DISKSEQ" => &mut seen.diskseq,
            "SYNTH_UUID" => &mut seen.synthetic,
            "SDEV_UA" => &mut seen.attention,
            _ => continue,
        };
        // A variable that comes twice has no meaning that two readers would agree on.
        if cell.replace(value).is_some() {
            return Err(Malformed);
        }
    }
    if seen.action != Some(action) || seen.devpath != Some(path) {
        return Err(Malformed);
    }
    match (seen.subsystem, seen.devtype) {
        (Some("block"), Some("disk")) => {}
        (Some("scsi"), Some("scsi_device")) => {
            let doubt = seen.attention.and_then(|what| doubt(path, what));
            return Ok(doubt.map_or(Heard::Other, Heard::Doubt));
        }
        (_, _) => return Ok(Heard::Other),
    }
    let number = DeviceNumber {
        major: decimal(seen.major)?.ok_or(Malformed)?,
        minor: decimal(seen.minor)?.ok_or(Malformed)?,
    };
    Ok(Heard::Disk(Hint {
        number,
        diskseq: decimal(seen.diskseq)?.filter(|n| *n != 0).map(DiskSeq),
        removed: action == "remove" && seen.synthetic.is_none(),
    }))
}

/// What a unit attention says of the identity of the device at `path`, or of its neighbours.
fn doubt(path: &str, what: &str) -> Option<ScsiDoubt> {
    let address = path
        .rsplit('/')
        .next()
        .filter(|name| is_scsi_address(name))?;
    let own = |why| {
        let address = address.to_owned();
        Some(ScsiDoubt { address, why })
    };
    match what {
        "INQUIRY_DATA_HAS_CHANGED" => {
            own("the disk reports that what it says of itself has changed")
        }
        "POWER_ON_RESET_OCCURRED" => own("the disk reports that it was reset"),
        // Told of one disk of a target: the kernel keeps the others' reports of it to itself (`scsi_error.c`, `scsi_report_lun_change`).
        "REPORTED_LUNS_DATA_HAS_CHANGED" => Some(ScsiDoubt {
            address: address[..=address.rfind(':')?].to_owned(),
            why: "its target reports that it gives its addresses to other volumes",
        }),
        _ => None,
    }
}

/// `HOST:CHANNEL:TARGET:LUN`, in decimal.
pub fn is_scsi_address(name: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split(':').count() == 4 && name.split(':').all(is_number)
}

#[derive(Default)]
struct Variables<'a> {
    action: Option<&'a str>,
    devpath: Option<&'a str>,
    subsystem: Option<&'a str>,
    devtype: Option<&'a str>,
    major: Option<&'a str>,
    minor: Option<&'a str>,
    diskseq: Option<&'a str>,
    synthetic: Option<&'a str>,
    attention: Option<&'a str>,
}

/// Plain digits only: Rust's own parser would let a `+` pass.
fn decimal<T: std::str::FromStr>(text: Option<&str>) -> Result<Option<T>, Malformed> {
    let Some(text) = text else { return Ok(None) };
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Malformed);
    }
    text.parse().map(Some).map_err(|_| Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHANGE: &str = "change@/devices/virtual/block/loop9|ACTION=change|DEVPATH=/devices/virtual/block/loop9|SUBSYSTEM=block|DEVNAME=loop9|DEVTYPE=disk|DISKSEQ=16|SEQNUM=828|MAJOR=7|MINOR=9|";

    #[test]
    fn events_of_whole_disks_become_hints() {
        let hint = |removed, diskseq: Option<u64>| {
            Ok(Heard::Disk(Hint {
                number: DeviceNumber { major: 7, minor: 9 },
                diskseq: diskseq.map(DiskSeq),
                removed,
            }))
        };
        let table = [
            (CHANGE.to_owned(), hint(false, Some(16))),
            (CHANGE.replace("change", "remove"), hint(true, Some(16))),
            (CHANGE.replace("change", "add"), hint(false, Some(16))),
            (CHANGE.replace("DISKSEQ=16|", ""), hint(false, None)),
            (CHANGE.replace("DISKSEQ=16", "DISKSEQ=0"), hint(false, None)),
            (
                CHANGE.replace("change", "remove") + "SYNTH_UUID=0|",
                hint(false, Some(16)),
            ),
            (CHANGE.replace("=disk", "=partition"), Ok(Heard::Other)),
            (CHANGE.replace("=block", "=bdi"), Ok(Heard::Other)),
            (CHANGE.replace("MAJOR=7|", ""), Err(Malformed)),
            (CHANGE.replace("MAJOR=7", "MAJOR=+7"), Err(Malformed)),
            (CHANGE.replace("MAJOR=7", "MAJOR="), Err(Malformed)),
            (
                CHANGE.replace("MAJOR=7", "MAJOR=99999999999"),
                Err(Malformed),
            ),
            (CHANGE.replace("DISKSEQ=16", "DISKSEQ=-1"), Err(Malformed)),
            (CHANGE.replace("MINOR=9", "MINOR=9|MINOR=8"), Err(Malformed)),
            (
                CHANGE.replace("ACTION=change", "ACTION=remove"),
                Err(Malformed),
            ),
            (
                CHANGE.replace("loop9|ACTION", "loop8|ACTION"),
                Err(Malformed),
            ),
            (CHANGE.replace("change@/", "change@"), Err(Malformed)),
            (CHANGE.replace("change@", "change"), Err(Malformed)),
            (CHANGE.replace("SEQNUM=828", "SEQNUM"), Err(Malformed)),
            (CHANGE.replace("SEQNUM=828", "=828"), Err(Malformed)),
            (CHANGE.replace("SEQNUM=828|", "|"), Err(Malformed)),
            (CHANGE.trim_end_matches('|').to_owned(), Err(Malformed)),
            (CHANGE.to_owned() + &"A=1|".repeat(64), Err(Malformed)),
            (
                CHANGE.to_owned() + "A=" + &"x".repeat(8192) + "|",
                Err(Malformed),
            ),
            (String::new(), Err(Malformed)),
            ("|".to_owned(), Err(Malformed)),
            ("@|".to_owned(), Err(Malformed)),
        ];
        for (text, expected) in table {
            let bytes = text.replace('|', "\0").into_bytes();
            assert_eq!(parse(&bytes), expected, "{text}");
        }
    }

    /// The event was dropped, for it is none of a disk, and the disk went on to be what it had been.
    #[test]
    fn a_scsi_disk_that_may_be_another_is_told_by_its_address() {
        let event = |address: &str, what: &str| {
            let path =
                format!("/devices/pci0000:00/0000:00:05.0/virtio2/host2/target2:0:1/{address}");
            let text = format!(
                "change@{path}|ACTION=change|DEVPATH={path}|SUBSYSTEM=scsi|SDEV_UA={what}|DEVTYPE=scsi_device|DRIVER=sd|MODALIAS=scsi:t-0x00|SEQNUM=9|"
            );
            parse(&text.replace('|', "\0").into_bytes()).unwrap()
        };
        let concerned = |heard: Heard| match heard {
            Heard::Doubt(doubt) => ["2:0:1:3", "2:0:1:30", "2:0:10:3", "12:0:1:3"]
                .map(|address| doubt.concerns(address)),
            Heard::Disk(_) | Heard::Other => [false; 4],
        };
        for own in ["INQUIRY_DATA_HAS_CHANGED", "POWER_ON_RESET_OCCURRED"] {
            let found = concerned(event("2:0:1:3", own));
            assert_eq!(found, [true, false, false, false], "{own}");
        }
        let all = concerned(event("2:0:1:3", "REPORTED_LUNS_DATA_HAS_CHANGED"));
        assert_eq!(all, [true, true, false, false]);
        for other in [
            "CAPACITY_DATA_HAS_CHANGED",
            "ASYMMETRIC_ACCESS_STATE_CHANGED",
            "",
        ] {
            assert_eq!(event("2:0:1:3", other), Heard::Other, "{other}");
        }
        for address in ["2:0:1", "2:0:1:3:4", "2:0::3", "2:0:1:x", "target2:0:1"] {
            assert_eq!(event(address, "INQUIRY_DATA_HAS_CHANGED"), Heard::Other);
        }
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_answered() {
        let whole = CHANGE.replace('|', "\0").into_bytes();
        for end in 0..whole.len() {
            // A cut behind a NUL can be a smaller valid message; it must only be answered.
            let _ = parse(&whole[..end]);
            let mut flipped = whole.clone();
            flipped[end] = 0xff;
            assert_eq!(parse(&flipped), Err(Malformed), "byte {end}");
        }
    }

    #[test]
    fn udevs_own_messages_are_no_kernel_events() {
        assert_eq!(parse(b"libudev\0\xfe\xed\xca\xfe\0"), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let _ = parse(&bytes);
        }
    }
}
