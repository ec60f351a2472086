//! The answer to the udev rule: properties, a line each. EDGE.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::mpsc;
use std::time::Duration;

use super::list::{ClaimList, LIST_BYTES_MAX};
use super::own::{Family, parse_number};
use crate::correlation::DiskSeq;
use crate::identity::Identity;
use crate::udev;

/// Where the daemon leaves the list. Stays when the daemon stops; goes with the boot.
pub const FILE: &str = "/run/nbdtrack/claims";
/// A disk may take this long to tell its identity.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// What `nbdtrack udev-claim MAJOR:MINOR` prints: `CLAIMED_BY_NBDTRACK=WHY` for a claimed disk, `NBDTRACK_LEFT=WHY` for one
/// that would be claimed and is the machine's own, nothing for any other.
///
/// # Errors
/// What is wrong with the question or the list. The rule then claims nothing.
pub fn answer(device: &str, id_path: Option<&str>) -> Result<String, String> {
    let number = parse_number(device).ok_or(format!("{device:?}: expected MAJOR:MINOR"))?;
    let mut text = String::new();
    std::fs::File::open(FILE)
        .and_then(|file| file.take(LIST_BYTES_MAX).read_to_string(&mut text))
        .map_err(|e| format!("{FILE}: {e}"))?;
    let list = ClaimList::parse(&text).map_err(|e| format!("{FILE}: {e}"))?;
    let (diskseq, identities) = identities(number);
    let said = identities.as_ref().map_err(String::as_str);
    let why = match list.judge(diskseq, said) {
        Ok(why) => why,
        // No word about disks that nobody thought of.
        Err(_) => return Ok(String::new()),
    };
    let family = Family::of(number).map_err(|e| format!("{device}: {e}"))?;
    let names: BTreeSet<String> = identities
        .into_iter()
        .flatten()
        .map(|identity| identity.value)
        .collect();
    Ok(
        match family.in_use().or_else(|| family.wanted(&names, id_path)) {
            None => format!("CLAIMED_BY_NBDTRACK={}\n", why.name()),
            Some(reason) => {
                let plain: String = reason.chars().filter(|c| !c.is_control()).collect();
                format!("NBDTRACK_LEFT={plain}\n")
            }
        },
    )
}

/// Reads a disk's number in the order of attachment, and its identities, with a deadline.
fn identities(
    number: crate::correlation::DeviceNumber,
) -> (Option<DiskSeq>, Result<BTreeSet<Identity>, String>) {
    let diskseq = std::fs::read_to_string(format!("/sys/dev/block/{number}/diskseq"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map(DiskSeq);
    // Channel: one answer. Thread: ends with its read, or with this process, which does not wait for a hung disk.
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let read = udev::read_identities(std::path::Path::new("/sys"), number);
        let _late = sender.send(read);
    });
    match receiver.recv_timeout(READ_WITHIN) {
        // Another disk under the same number: the next event is its own.
        Ok(Ok((read, _))) if Some(read) != diskseq => {
            (diskseq, Err("it was exchanged meanwhile".to_owned()))
        }
        Ok(Ok((_, identities))) => (diskseq, Ok(identities)),
        Ok(Err(error)) => (diskseq, Err(error.to_string())),
        Err(_) => (
            diskseq,
            Err(format!("no answer in {} s", READ_WITHIN.as_secs())),
        ),
    }
}
