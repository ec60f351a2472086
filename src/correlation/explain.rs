//! Why an export is where it is, or a disk serves what it serves: each disk that could be meant, what matched and what did
//! not, and what to do. PURE: the same rules that settle an export ([`Correlation::want`]) say what they saw.

use std::collections::BTreeSet;

use super::binding::{Binding, Failure};
use super::disks::Disk;
use super::{Correlation, DiskSeq, Export, ExportName, Holder, Reading};
use crate::identity::{Identity, Scheme};

/// Disks that match are all told (a machine has few twins); of those that do not, the nearest so many.
pub const OTHERS_MAX: usize = 8;

/// The answer to "why?".
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Explanation {
    /// `export NAME` or `disk NODE`.
    pub subject: String,
    /// The export's state; for a disk `attached`.
    pub state: String,
    /// One sentence: why.
    pub why: String,
    /// `profile:id`, as the user wrote it; for a disk its id.
    pub volume: String,
    /// What is looked for, or what the disk presents: `scheme:value`.
    pub identities: Vec<String>,
    pub candidates: Vec<Candidate>,
    /// Disks (or exports) that were looked at and are not told one by one.
    pub more: u64,
    /// What to do, a sentence each; empty when all is well.
    pub advice: Vec<String>,
}

/// One disk that was looked at for an export, or one export that was looked at for a disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Candidate {
    /// The export, when a disk is explained.
    pub export: String,
    pub node: String,
    pub diskseq: u64,
    /// `serves`, `could serve`, `stands aside`, `unknown` or `no match`.
    pub verdict: &'static str,
    /// Identities on both sides, `scheme:value`.
    pub matched: Vec<String>,
    /// What this disk presents, or this export looks for, and the other side does not.
    pub unmatched: Vec<String>,
    /// What speaks against it, a phrase each.
    pub obstacles: Vec<String>,
}

impl Correlation {
    /// Explains one export; `None` when there is none of this name.
    pub fn explain_export(&self, name: &ExportName) -> Option<Explanation> {
        let export = self.exports.get(name)?;
        let matching = self.disks.presenting(&export.candidates);
        let mut candidates: Vec<Candidate> = matching
            .iter()
            .filter_map(|diskseq| Some(self.candidate(export, *diskseq, self.disks.get(*diskseq)?)))
            .collect();
        let (others, more) = self.others(export, &matching);
        candidates.extend(others);
        let state = export.binding.state();
        let why = match export.binding.reason() {
            "" => format!(
                "{} presents {} and is the only disk that does",
                self.shown(export.binding.diskseq()),
                list(candidates.first().map_or(&[][..], |first| &first.matched)),
            ),
            reason => reason.to_owned(),
        };
        Some(Explanation {
            subject: format!("export {name}"),
            state: state.name().to_owned(),
            why,
            volume: export.definition.volume.to_string(),
            identities: export.candidates.iter().map(Identity::to_string).collect(),
            advice: self.advice(export, &candidates),
            candidates,
            more,
        })
    }

    /// Explains one disk; `None` when it is not attached.
    pub fn explain_disk(&self, diskseq: DiskSeq) -> Option<Explanation> {
        let disk = self.disks.get(diskseq)?;
        let wanting = self.exports_of(&disk.identities);
        let candidates: Vec<Candidate> = wanting
            .iter()
            .filter_map(|name| {
                let export = self.exports.get(name)?;
                let mut candidate = self.candidate(export, diskseq, disk);
                candidate.export = name.to_string();
                candidate.unmatched = difference(&export.candidates, &disk.identities);
                if !export.binding.reason().is_empty() {
                    candidate.obstacles.push(format!(
                        "the export is {}: {}",
                        export.binding.state().name(),
                        export.binding.reason()
                    ));
                }
                Some(candidate)
            })
            .collect();
        let serving: Vec<&str> = candidates
            .iter()
            .filter(|candidate| candidate.verdict == SERVES)
            .map(|candidate| candidate.export.as_str())
            .collect();
        let why = if !serving.is_empty() {
            format!("it serves {}", serving.join(", "))
        } else if let Some(reason) = unread(disk) {
            format!("its identity could not be read: {reason}")
        } else if disk.said().next().is_none() {
            "it presents no identity, so no export can be bound to it".to_owned()
        } else if candidates.is_empty() {
            "no export looks for any identity that it presents".to_owned()
        } else {
            "exports look for it and are not served from it".to_owned()
        };
        let mut advice = Vec::new();
        if serving.is_empty() {
            match candidates.first() {
                Some(candidate) => advice.push(format!(
                    "'nbdtrack explain {}' says what its export waits for",
                    candidate.export
                )),
                None if unread(disk).is_some() => advice.push(READ_AGAIN.to_owned()),
                None if disk.said().next().is_none() => advice.push(
                    "give the disk a serial in the hypervisor (or a backing file), then attach it again"
                        .to_owned(),
                ),
                None => advice.push(
                    "to serve it: 'nbdtrack add NAME --volume PROFILE:ID' with one of its identities"
                        .to_owned(),
                ),
            }
        }
        Some(Explanation {
            subject: format!("disk {}", disk.facts.node),
            state: "attached".to_owned(),
            why,
            volume: disk.id(),
            identities: disk.said().map(Identity::to_string).collect(),
            candidates,
            more: 0,
            advice,
        })
    }

    /// The attached disk at a node (`/dev/vdb`) or with a number (`7:0`, or a diskseq).
    pub fn disk_called(&self, text: &str) -> Option<DiskSeq> {
        let called = |disk: &Disk| {
            disk.facts.node.0 == text
                || disk.facts.number.to_string() == text
                || disk.facts.diskseq.to_string() == text
        };
        self.disks
            .iter()
            .find_map(|(diskseq, disk)| called(disk).then_some(diskseq))
    }

    fn candidate(&self, export: &Export, diskseq: DiskSeq, disk: &Disk) -> Candidate {
        let mut obstacles = Vec::new();
        if self.released.contains_key(&diskseq) {
            obstacles.push("it was prepared for detach".to_owned());
        }
        if disk.facts.leaving {
            obstacles.push("its owner asked it to leave".to_owned());
        }
        if !disk.facts.holders.is_empty() {
            obstacles.push(format!(
                "it is held by {}",
                Holder::names(&disk.facts.holders)
            ));
        }
        if !disk.busy.is_empty() {
            obstacles.push(disk.busy.clone());
        }
        if let Some(reason) = unread(disk) {
            obstacles.push(format!("its identity could not be read: {reason}"));
        }
        let matched: Vec<String> = disk
            .identities
            .intersection(&export.candidates)
            .map(Identity::to_string)
            .collect();
        let bound = export
            .binding
            .held()
            .is_some_and(|held| held.diskseq == diskseq);
        let verdict = if bound {
            SERVES
        } else if matched.is_empty() {
            if unread(disk).is_some() {
                "unknown"
            } else {
                "no match"
            }
        } else if obstacles.is_empty() {
            "could serve"
        } else {
            "stands aside"
        };
        Candidate {
            export: String::new(),
            node: disk.facts.node.to_string(),
            diskseq: diskseq.0,
            verdict,
            matched,
            unmatched: difference(&disk.identities, &export.candidates),
            obstacles,
        }
    }

    /// The disks that do not match, the nearest first: those that could not be read, then those whose value is nearly
    /// what is looked for; and how many are left.
    fn others(&self, export: &Export, matching: &BTreeSet<DiskSeq>) -> (Vec<Candidate>, u64) {
        let mut ranked: Vec<(usize, DiskSeq, &Disk)> = self
            .disks
            .iter()
            .filter(|(diskseq, _)| !matching.contains(diskseq))
            .map(|(diskseq, disk)| (distance(export, disk), diskseq, disk))
            .collect();
        ranked.sort_by_key(|(distance, diskseq, _)| (*distance, *diskseq));
        let more = ranked.len().saturating_sub(OTHERS_MAX);
        let told = ranked
            .into_iter()
            .take(OTHERS_MAX)
            .map(|(_, diskseq, disk)| {
                let mut candidate = self.candidate(export, diskseq, disk);
                candidate.obstacles.extend(near_miss(export, disk));
                candidate
            });
        (told.collect(), u64::try_from(more).unwrap_or(u64::MAX))
    }

    fn advice(&self, export: &Export, candidates: &[Candidate]) -> Vec<String> {
        let (name, volume) = (&export.definition.name, &export.definition.volume);
        let mut advice = Vec::new();
        match &export.binding {
            Binding::Serving(_) => {}
            Binding::Opening { .. } => advice.push(format!(
                "wait: an open may take {} s",
                self.settings.open_within.as_secs()
            )),
            Binding::Absent { .. } => {
                if candidates.iter().any(|one| one.verdict == "unknown") {
                    advice.push(READ_AGAIN.to_owned());
                }
                if candidates.iter().all(|one| one.matched.is_empty()) {
                    advice.push(format!(
                        "attach {volume}; if it is attached, compare what its disk presents with what is looked for, and \
                         correct the volume of the export"
                    ));
                }
            }
            Binding::Draining { .. } => advice.push(
                "wait for its clients and the disk, or cut them off with --hard".to_owned(),
            ),
            Binding::Released { .. } => advice.push(format!(
                "detach the disk, or take it back with 'nbdtrack cancel-detach {volume}'"
            )),
            Binding::Ambiguous { held: Some(_), .. } if export.conflict.is_none() => {
                advice.push(READ_AGAIN.to_owned());
            }
            Binding::Ambiguous { .. } => {
                advice.push("detach all disks but the right one".to_owned());
                advice.extend(candidates.iter().filter(|one| !one.matched.is_empty()).map(
                    |one| {
                        format!(
                            "or, if {} alone is left and right: 'nbdtrack resolve {name} --diskseq {}'",
                            one.node, one.diskseq
                        )
                    },
                ));
            }
            Binding::Failed { failure, .. } => advice.push(match failure {
                Failure::Busy => {
                    "unmount it, or stop the program that has it open; it is tried again by itself".to_owned()
                }
                Failure::Open => {
                    "look into the kernel's log for the disk ('dmesg'); it is tried again by itself".to_owned()
                }
                Failure::InUse => {
                    "make one of the two exports read-only, or say 'share' on both".to_owned()
                }
                Failure::Unpinned => {
                    "look whether the disk at the path is the one that is meant, and confirm it; 'nbdtrack pins' shows it".to_owned()
                }
                Failure::Orphan => {
                    "find out why the disk does not answer ('dmesg', the hypervisor); the export comes back when it lets go"
                        .to_owned()
                }
            }),
        }
        if let (Binding::Failed { .. }, Some(due)) = (&export.binding, export.due) {
            advice.push(format!(
                "the next attempt is due in {} s",
                due.saturating_sub(self.now).as_secs()
            ));
        }
        advice
    }

    fn shown(&self, diskseq: Option<DiskSeq>) -> String {
        match diskseq {
            Some(diskseq) => format!("{} (diskseq {diskseq})", self.node_of(diskseq)),
            None => "no disk".to_owned(),
        }
    }
}

const SERVES: &str = "serves";
const READ_AGAIN: &str = "have the disks read again with 'nbdtrack rescan'; if that does not help, look into 'dmesg' for the disk";

fn unread(disk: &Disk) -> Option<&str> {
    match &disk.facts.identities {
        Reading::Unknown(reason) | Reading::Doubtful(reason) if !disk.announced => Some(reason),
        Reading::Unknown(_)
        | Reading::Doubtful(_)
        | Reading::Partly(_)
        | Reading::Paths(_)
        | Reading::Known(_) => None,
    }
}

/// The number of an attachment says nothing to a person.
fn difference(these: &BTreeSet<Identity>, those: &BTreeSet<Identity>) -> Vec<String> {
    let made = |identity: &&Identity| identity.scheme != Scheme::Attachment;
    these
        .difference(those)
        .filter(made)
        .map(Identity::to_string)
        .collect()
}

/// 0 could not be read, 1 nearly equal, 2 presents a scheme that is looked for, 3 anything else.
fn distance(export: &Export, disk: &Disk) -> usize {
    let schemes = |identity: &Identity| {
        export
            .candidates
            .iter()
            .any(|candidate| candidate.scheme == identity.scheme)
    };
    if unread(disk).is_some() {
        0
    } else if near_miss(export, disk).is_some() {
        1
    } else if disk.said().any(schemes) {
        2
    } else {
        3
    }
}

/// A disk that presents the value that is looked for, but in other letters or by another scheme: equality alone decides
/// (invariant 12), and a person wants to know how near it was.
fn near_miss(export: &Export, disk: &Disk) -> Option<String> {
    let bare = |text: &str| -> String {
        text.chars()
            .filter(char::is_ascii_alphanumeric)
            .map(|c| c.to_ascii_lowercase())
            .collect()
    };
    let wanted: Vec<String> = export.candidates.iter().map(|c| bare(&c.value)).collect();
    let near = disk.said().find(|identity| {
        let value = bare(&identity.value);
        value.len() >= NEAR_CHARS_MIN && wanted.contains(&value)
    })?;
    Some(format!(
        "it presents {near}, which is nearly what is looked for: is another profile meant?"
    ))
}

/// Shorter values are alike by chance.
const NEAR_CHARS_MIN: usize = 4;

fn list(items: &[String]) -> String {
    match items {
        [] => "nothing that is looked for".to_owned(),
        items => items.join(", "),
    }
}

#[cfg(test)]
mod tests;
