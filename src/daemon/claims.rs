//! The list of claims that the udev rules' question reads: kept as the configuration and the exports change.
//!
//! Written in a thread of the blocking pool, one writing at a time; what changes meanwhile is in the next. Nobody waits for it: a
//! disk whose export is being added is opened by the daemon itself.

use std::fs;
use std::io;
use std::path::Path;

use super::control::Control;
use super::reports::Report;
use crate::claim::{ClaimList, FILE};
use crate::config::ClaimRules;
use crate::correlation::DiskSeq;

#[derive(Debug, Default)]
pub(super) struct ClaimsFile {
    /// `None` for no claims.
    rules: Option<ClaimRules>,
    /// The exports' membership that stands in the file; `None` when it is to be written in any case.
    stands: Option<u64>,
    writing: bool,
}

impl ClaimsFile {
    /// Takes what the configuration says; [`Control::keep_claims`] carries it out.
    pub fn rule(&mut self, rules: Option<ClaimRules>) {
        if rules.is_none() && (self.rules.is_some() || is_the_service()) {
            remove();
        }
        self.rules = rules;
        self.stands = None;
    }

    pub fn written(&mut self, result: io::Result<()>) {
        self.writing = false;
        match result {
            // It was ruled out while it was being written.
            Ok(()) if self.rules.is_none() => remove(),
            Ok(()) => {}
            // Disks are then left to the machine's own rules, as without claims; the next change tries again.
            Err(error) => {
                tracing::error!(%error, "the list of claims for udev's rules cannot be written to {FILE}");
            }
        }
    }
}

impl Control {
    /// Writes the list anew if what it says has changed.
    pub(super) fn keep_claims(&mut self) {
        let file = &mut self.claims_file;
        let Some(rules) = &file.rules else { return };
        let (membership, volumes) = self.correlation.volumes();
        if file.writing || file.stands == Some(membership) {
            return;
        }
        file.writing = true;
        file.stands = Some(membership);
        let volumes: Vec<_> = volumes.cloned().collect();
        let rules = rules.clone();
        let reports = self.reports.clone();
        tokio::task::spawn_blocking(move || {
            let candidates = volumes.iter().flat_map(|volume| volume.candidates());
            let list = ClaimList {
                boot_diskseq: boot_diskseq(),
                hotplugged: rules.hotplugged,
                serials: rules.serials,
                except: rules.except,
                identities: candidates.map(|identity| identity.to_string()).collect(),
            };
            let result = write(Path::new(FILE), &list.render());
            reports.send(Report::ClaimsWritten(result));
        });
    }
}

/// Whether this is the machine's own daemon: systemd gives its service the folder of the list (systemd.exec(5), RuntimeDirectory). One that
/// someone runs beside it leaves the machine's list alone.
fn is_the_service() -> bool {
    super::runtime_folder().as_deref() == Path::new(FILE).parent()
}

fn remove() {
    match fs::remove_file(FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "{FILE} stays, and udev's rules go on claiming by it");
        }
        _ => {}
    }
}

/// The last disk of the boot, as the daemon's first start in it found it.
fn boot_diskseq() -> DiskSeq {
    let earlier = fs::read_to_string(FILE).ok();
    let earlier = earlier.and_then(|text| ClaimList::parse(&text).ok());
    earlier.map_or_else(last_diskseq, |list| list.boot_diskseq)
}

/// The highest number of all block devices; they only grow (Linux `block/genhd.c`).
fn last_diskseq() -> DiskSeq {
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let numbers = disks
        .filter_map(|disk| fs::read_to_string(disk.path().join("diskseq")).ok())
        .filter_map(|text| text.trim().parse().ok());
    DiskSeq(numbers.max().unwrap_or(0))
}

/// Whole or not at all: a worker of udev may read it at any moment.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(&new, path)
}
