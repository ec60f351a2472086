//! What a SCSI disk says of itself, asked of the disk, and held against what the kernel remembers. Asks the device, and blocks for as long as
//! it does.
//!
//! sysfs shows the pages that the kernel read when it scanned the disk (Linux `drivers/scsi/scsi.c`, `scsi_attach_vpd`). Where a target
//! gives the same address to another logical unit without taking the first one away, the device, its number and its DISKSEQ stay; the
//! kernel reads the pages again only at a rescan, or when the disk reports a change of its inquiry data (`scsi_lib.c`, `scsi_evt_emit`).
//! What the kernel knows of such a disk beside the pages (its size, what is in the page cache) is the first unit's, too. So a SCSI disk is
//! what it says itself, and is opened only as what the kernel remembers, too.
//!
//! A disk whose pages the kernel does not show is not asked: it has none, or is known to stumble over the question.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;

use super::sys::{self, Inquired};
use crate::identity::{Identity, ScsiPages};

/// The unit serial number and the device identification (SPC-4, 7.8).
const PAGES: [u8; 2] = [0x80, 0x83];
/// What is asked for at first, in bytes, as the kernel does (`SCSI_VPD_PG_LEN`): there are disks that refuse more.
const FIRST_BYTES: u16 = 255;
/// Bytes before a page's content.
const HEADER_BYTES: usize = 4;
/// How often one page is asked for, while the disk has something else to tell first or is busy.
const TRIES: usize = 5;

/// Asks for a page of so many bytes at most.
type Inquire<'a> = &'a mut dyn FnMut(u8, u16) -> io::Result<Inquired>;

/// What the disk answers for the pages that the kernel `remembers`; `None` when it cannot be asked, today and the next time.
///
/// # Errors
/// What may pass: the disk does not answer, is gone, or has no logical unit at this address any more.
pub fn pages(disk: &File, remembers: &ScsiPages) -> io::Result<Option<ScsiPages>> {
    ask(remembers, &mut |page, bytes| {
        sys::inquire(disk, page, bytes)
    })
}

fn ask(remembers: &ScsiPages, inquire: Inquire<'_>) -> io::Result<Option<ScsiPages>> {
    let mut answers = [None, None];
    let known = [&remembers.vpd_pg80, &remembers.vpd_pg83];
    for ((code, known), answer) in PAGES.into_iter().zip(known).zip(&mut answers) {
        if known.is_none() {
            continue;
        }
        match page(code, inquire) {
            Ok(found) => *answer = found,
            // No SCSI disk in the end, a driver that passes no commands on, or a rule that forbids them.
            Err(e) if cannot_be_asked(&e) => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    let [vpd_pg80, vpd_pg83] = answers;
    // A disk that knows neither question answered the kernel's in some other way. One that answers one of them has not got the other.
    let refused = vpd_pg80.is_none() && vpd_pg83.is_none();
    Ok((!refused).then_some(ScsiPages { vpd_pg80, vpd_pg83 }))
}

/// What opening a disk or asking it says when that will not change.
pub fn cannot_be_asked(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOTTY | libc::EINVAL | libc::EPERM | libc::EACCES | libc::EOPNOTSUPP)
    )
}

/// One page, as long as it says that it is; `None` when the disk refuses the question.
fn page(code: u8, inquire: Inquire<'_>) -> io::Result<Option<Vec<u8>>> {
    let Some(page) = patient(code, FIRST_BYTES, inquire)? else {
        return Ok(None);
    };
    let whole = HEADER_BYTES + usize::from(u16::from_be_bytes([page[2], page[3]]));
    if page.len() >= whole {
        return Ok(Some(page));
    }
    let bytes = u16::try_from(whole).unwrap_or(u16::MAX);
    patient(code, bytes, inquire)
}

fn patient(code: u8, bytes: u16, inquire: Inquire<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut last = String::new();
    for _ in 0..TRIES {
        match judge(code, inquire(code, bytes)?) {
            Answer::Page(page) => return Ok(Some(page)),
            Answer::Refused => return Ok(None),
            Answer::NotNow(why) => last = why,
            Answer::Failed(why) => return Err(failed(code, &why)),
        }
    }
    Err(failed(code, &last))
}

fn failed(code: u8, why: &str) -> io::Error {
    io::Error::other(format!("asked for its page {code:#04x}, the disk {why}"))
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// At least a header.
    Page(Vec<u8>),
    /// It does not know the question.
    Refused,
    /// It has something else to tell first, or no time.
    NotNow(String),
    Failed(String),
}

/// SAM-5, "Status codes"; SPC-4, "Sense data" and "Standard INQUIRY data" for the peripheral qualifier.
fn judge(code: u8, answer: Inquired) -> Answer {
    if answer.host_status != 0 {
        return Answer::Failed(format!(
            "was not reached: the driver says {:#04x}",
            answer.host_status
        ));
    }
    match answer.status {
        GOOD => {}
        CHECK_CONDITION => return judge_sense(&answer.sense),
        BUSY | TASK_SET_FULL => return Answer::NotNow("is busy".to_owned()),
        status => return Answer::Failed(format!("answered with status {status:#04x}")),
    }
    match answer.data.as_slice() {
        [qualifier, ..] if qualifier >> 5 != 0 => {
            Answer::Failed("has no logical unit at its address".to_owned())
        }
        [_, found, _, _, ..] if *found == code => Answer::Page(answer.data),
        _ => Answer::Failed("answered with something else".to_owned()),
    }
}

fn judge_sense(sense: &[u8]) -> Answer {
    // SPC-4, "Fixed format sense data" and "Descriptor format sense data".
    let found = match sense {
        [0x70 | 0x71, _, key, ..] => Some((
            *key,
            sense.get(12).copied().unwrap_or(0),
            sense.get(13).copied().unwrap_or(0),
        )),
        [0x72 | 0x73, key, asc, ascq, ..] => Some((*key, *asc, *ascq)),
        _ => None,
    };
    let Some((key, asc, ascq)) = found.map(|(key, asc, ascq)| (key & 0xf, asc, ascq)) else {
        return Answer::Failed("failed and does not say why".to_owned());
    };
    let why = format!("said sense {key:x}/{asc:02x}/{ascq:02x}");
    match key {
        UNIT_ATTENTION | ABORTED_COMMAND => Answer::NotNow(why),
        ILLEGAL_REQUEST if asc != LOGICAL_UNIT_NOT_SUPPORTED => Answer::Refused,
        _ => Answer::Failed(why),
    }
}

/// What is wrong with a disk that says to be `said` while the kernel knows it as `remembered`.
pub fn dispute(said: &BTreeSet<Identity>, remembered: &BTreeSet<Identity>) -> String {
    let list = |identities: &BTreeSet<Identity>| match identities.is_empty() {
        true => "nothing".to_owned(),
        false => identities
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    };
    format!(
        "the disk itself says {}, and the kernel read {} when it scanned it: its target gives the address to another volume now. Remove the \
         disk (echo 1 > device/delete in its folder of /sys/block) and scan its host again",
        list(said),
        list(remembered),
    )
}

const GOOD: u8 = 0x00;
const CHECK_CONDITION: u8 = 0x02;
const BUSY: u8 = 0x08;
const TASK_SET_FULL: u8 = 0x28;
const ILLEGAL_REQUEST: u8 = 0x5;
const UNIT_ATTENTION: u8 = 0x6;
const ABORTED_COMMAND: u8 = 0xb;
const LOGICAL_UNIT_NOT_SUPPORTED: u8 = 0x25;

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU 7.2's scsi-hd with `serial=SCSI-SERIAL-0001,wwn=0x5000c500a1b2c3d4`.
    const PG80: &[u8] = b"\x00\x80\x00\x10SCSI-SERIAL-0001";
    const PG83: &[u8] =
        b"\x00\x83\x00\x20\x02\x00\x00\x10SCSI-SERIAL-0001\x61\x93\x00\x08\x50\x00\xc5\x00\xa1\xb2\xc3\xd4";
    /// Invalid field in CDB, fixed format.
    const NO_SUCH_PAGE: &[u8] = &[0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0, 0, 0];
    /// Reported LUNs data has changed, descriptor format.
    const LUNS_CHANGED: &[u8] = &[0x72, 6, 0x3f, 0x0e, 0, 0, 0, 0];
    const NO_UNIT: &[u8] = &[0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x25, 0, 0, 0, 0, 0];

    fn both() -> ScsiPages {
        ScsiPages {
            vpd_pg80: Some(PG80.to_vec()),
            vpd_pg83: Some(PG83.to_vec()),
        }
    }

    fn good(data: &[u8]) -> Inquired {
        Inquired {
            data: data.to_vec(),
            ..Inquired::default()
        }
    }

    fn sense(sense: &[u8]) -> Inquired {
        Inquired {
            status: CHECK_CONDITION,
            sense: sense.to_vec(),
            ..Inquired::default()
        }
    }

    /// Each page by what it is asked: how often it was, and the answer to the last.
    fn told(
        mut answer: impl FnMut(u8, u16, usize) -> io::Result<Inquired>,
    ) -> (io::Result<Option<ScsiPages>>, usize) {
        let mut asked = 0;
        let found = ask(&both(), &mut |page, bytes| {
            asked += 1;
            answer(page, bytes, asked)
        });
        (found, asked)
    }

    fn whole(page: u8) -> Inquired {
        good(if page == 0x80 { PG80 } else { PG83 })
    }

    #[test]
    fn the_disks_own_pages_are_told_and_a_long_one_is_asked_for_again() {
        let (found, asked) = told(|page, _, _| Ok(whole(page)));
        assert_eq!((found.unwrap(), asked), (Some(both()), 2));
        let mut long = vec![0, 0x83, 1, 0x10];
        long.resize(4 + 0x110, 7);
        let (found, _) = told(|page, bytes, _| match page {
            0x80 => Ok(whole(page)),
            _ => Ok(good(&long[..long.len().min(usize::from(bytes))])),
        });
        assert_eq!(found.unwrap().unwrap().vpd_pg83, Some(long));
    }

    #[test]
    fn what_the_kernel_does_not_show_is_not_asked_for() {
        let nothing = ask(&ScsiPages::default(), &mut |_, _| panic!("asked"));
        assert_eq!(nothing.unwrap(), None);
    }

    #[test]
    fn a_disk_that_refuses_the_question_is_told_from_one_that_fails() {
        for code in [libc::ENOTTY, libc::EINVAL, libc::EPERM] {
            let (found, _) = told(|_, _, _| Err(io::Error::from_raw_os_error(code)));
            assert_eq!(found.unwrap(), None, "{code}");
        }
        let (found, _) = told(|_, _, _| Ok(sense(NO_SUCH_PAGE)));
        assert_eq!(found.unwrap(), None);
        // It answers one, so it has not got the other, whatever the kernel read there before.
        let (found, _) = told(|page, _, _| match page {
            0x80 => Ok(sense(NO_SUCH_PAGE)),
            _ => Ok(whole(page)),
        });
        let found = found.unwrap().unwrap();
        assert_eq!(
            (found.vpd_pg80, found.vpd_pg83.as_deref()),
            (None, Some(PG83))
        );
        for answer in [
            sense(NO_UNIT),
            // Not ready, medium error, nothing said.
            sense(&[0x72, 2, 0x04, 0x03]),
            sense(&[0x72, 3, 0x11, 0]),
            sense(&[]),
            // No unit behind this address; a page of another kind; half a header.
            good(b"\x7f\x80\x00\x00"),
            good(PG83),
            good(b"\x00\x80\x00"),
            good(b""),
            Inquired {
                host_status: 0x03,
                ..whole(0x80)
            },
            Inquired {
                status: 0x18,
                ..Inquired::default()
            },
        ] {
            let (found, _) = told(|_, _, _| Ok(answer.clone()));
            assert!(found.is_err(), "{answer:?}: {found:?}");
        }
        for code in [libc::EIO, libc::ENODEV, libc::ETIMEDOUT] {
            let (found, _) = told(|_, _, _| Err(io::Error::from_raw_os_error(code)));
            assert!(found.is_err(), "{code}");
        }
    }

    #[test]
    fn a_disk_that_has_something_else_to_tell_is_asked_again_and_not_for_ever() {
        let (found, asked) = told(|page, _, asked| match asked {
            1 | 2 => Ok(sense(LUNS_CHANGED)),
            3 => Ok(Inquired {
                status: BUSY,
                ..Inquired::default()
            }),
            _ => Ok(whole(page)),
        });
        assert_eq!((found.unwrap(), asked), (Some(both()), 5));
        let (found, asked) = told(|_, _, _| Ok(sense(LUNS_CHANGED)));
        let error = found.unwrap_err().to_string();
        assert!(error.contains("6/3f/0e"), "{error}");
        assert_eq!(asked, TRIES);
    }

    #[test]
    fn what_is_no_scsi_disk_cannot_be_asked() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(pages(&file, &both()).unwrap(), None);
    }
}
