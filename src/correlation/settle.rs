//! Where one export belongs by the facts.

use std::collections::BTreeSet;

use super::binding::{Cue, Failure, Want};
use super::doubt::Doubt;
use super::{Correlation, DiskSeq, EndHow, Export, ExportName, HolderKind};
use crate::identity::Identity;

/// The attached disks that present a volume's identity, by what speaks for or against them.
#[derive(Debug, Default)]
pub(super) struct Claimants {
    /// Each could be the volume.
    pub active: BTreeSet<DiskSeq>,
    released: BTreeSet<DiskSeq>,
    leaving: BTreeSet<DiskSeq>,
    members: BTreeSet<DiskSeq>,
}

impl Correlation {
    /// Brings one export to where the facts say that it belongs, or a step nearer.
    pub(super) fn settle(&mut self, name: &ExportName) {
        self.judge_conflict(name);
        if let Some(want) = self.want(name) {
            self.cue(name, Cue::Want(want));
        }
        self.grow(name);
    }

    pub(super) fn claimants(&self, export: &Export) -> Claimants {
        self.claimants_of(&export.candidates)
    }

    pub(super) fn claimants_of(&self, candidates: &BTreeSet<Identity>) -> Claimants {
        let mut claimants = Claimants::default();
        for diskseq in self.disks.presenting(candidates) {
            let Some(disk) = self.disks.get(diskseq) else {
                continue;
            };
            let group = if self.released.contains_key(&diskseq) {
                &mut claimants.released
            } else if disk.facts.leaving {
                &mut claimants.leaving
            } else if disk.is_member() {
                &mut claimants.members
            } else {
                &mut claimants.active
            };
            group.insert(diskseq);
        }
        claimants
    }

    /// Where the facts say that the export belongs.
    pub(super) fn want(&self, name: &ExportName) -> Option<Want> {
        let export = self.exports.get(name)?;
        let nothing = |reason: &str| {
            Some(Want::Nothing {
                reason: reason.to_owned(),
            })
        };
        if self.stopping {
            return nothing("the daemon is stopping");
        }
        if let Some(leaving) = &export.leaving {
            return nothing(match leaving.replacement {
                Some(_) => "its definition changed",
                None => "the export is being removed",
            });
        }
        if export.hidden && export.binding.kept().is_none() {
            return nothing("the export is being removed");
        }
        if !export.durable {
            return nothing("its definition is being stored");
        }
        if export.binding.kept().is_none() && self.is_being_removed(name) {
            return nothing("its removal is being stored");
        }
        if export.binding.kept().is_none() && export.moving.is_some() {
            return nothing("its move to another volume is being stored");
        }
        if !self.surveyed {
            return nothing("the disks of this machine have not been surveyed yet");
        }
        if let Some(want) = self.want_unpinned(export) {
            return Some(want);
        }
        if export.binding.kept().is_none()
            && let Some((diskseq, orphan)) = self.holds.orphan_of(&export.candidates)
        {
            return Some(Want::Blocked {
                failure: Failure::Orphan,
                reason: format!(
                    "export {} still holds the volume's disk with diskseq {diskseq}, which has not given up {}: opening \
                     the volume now could let a late write land on newer data",
                    orphan.export, orphan.holding,
                ),
            });
        }
        let claimants = self.claimants(export);
        let Some(&only) = claimants.active.first() else {
            return Some(self.want_without_claimant(export, &claimants));
        };
        if claimants.active.len() > 1 {
            return Some(self.want_among_twins(export, &claimants.active));
        }
        if let Some(contest) = export.conflict
            && contest.first != Some(only)
        {
            return Some(Want::Ambiguous {
                keep: None,
                reason: format!(
                    "disk {} (diskseq {only}) presents the identity of {} after another disk did: confirm it with \
                     'nbdtrack resolve {name} --diskseq {only}', or detach it",
                    self.node_of(only),
                    export.definition.volume,
                ),
            });
        }
        let doubted = self.disks.get(only);
        let doubted = doubted.and_then(|disk| disk.doubted(&export.candidates));
        if let Some(held) = export.binding.kept().filter(|held| held.diskseq == only) {
            return Some(match (self.want_kept(held), doubted) {
                (Want::Disk(_), Some(doubt)) if doubt.is_over(self.now) => Want::Nothing {
                    reason: self.doubt_in_words(only, doubt),
                },
                (Want::Disk(keep), Some(doubt)) => Want::Ambiguous {
                    keep: Some(keep),
                    reason: self.doubt_in_words(only, doubt),
                },
                (want, _) => want,
            });
        }
        if let Some(doubt) = doubted {
            return Some(Want::Nothing {
                reason: self.doubt_in_words(only, doubt),
            });
        }
        let sizeless = |disk: &super::disks::Disk| disk.facts.size == 0;
        // An empty file is a file.
        if !only.is_file() && self.disks.get(only).is_some_and(sizeless) {
            return Some(Want::Nothing {
                reason: format!(
                    "{} (diskseq {only}) says that it has no room: it has no medium, or its driver cannot read it",
                    self.node_of(only)
                ),
            });
        }
        if let Some(owner) = self.other_owner(export, only) {
            return Some(self.want_after_owner(owner, only));
        }
        if let Some(blocking) = self.holds.blocking(&export.candidates, only) {
            return Some(Want::Nothing {
                reason: format!(
                    "export {} is still being closed on the disk with diskseq {}",
                    blocking.export, blocking.diskseq,
                ),
            });
        }
        Some(match self.other_writer(export, only) {
            Some(writer) => self.want_beside(export, writer, only),
            None => Want::Disk(only),
        })
    }

    /// It may be another disk than the export's, and has not said within the time for that that it is not.
    pub(super) fn is_in_doubt_too_long(&self, export: &Export, diskseq: DiskSeq) -> bool {
        let disk = self.disks.get(diskseq);
        disk.and_then(|disk| disk.doubted(&export.candidates))
            .is_some_and(|doubt| doubt.is_over(self.now))
    }

    fn doubt_in_words(&self, diskseq: DiskSeq, doubt: &Doubt) -> String {
        let (node, why) = (self.node_of(diskseq), &doubt.why);
        match doubt.is_over(self.now) {
            true => format!(
                "{node} (diskseq {diskseq}) has not said within {} s that it is still the volume, and is not served until it does: {why}",
                self.settings.confirm_within.as_secs()
            ),
            false => format!(
                "{node} (diskseq {diskseq}) is to be read again before anyone new is served: {why}"
            ),
        }
    }

    /// An export that writes to this volume or to this very disk, under whatever name it knows it: two writers
    /// that do not share never meet.
    fn other_writer(&self, export: &Export, diskseq: DiskSeq) -> Option<&Export> {
        if export.definition.read_only {
            return None;
        }
        let disk = self.disks.get(diskseq)?;
        let mut others = self.exports_of(&export.candidates);
        others.extend(self.exports_of(&disk.identities));
        others.remove(&export.definition.name);
        others.iter().find_map(|other| {
            let writer = self.exports.get(other)?;
            let held = writer.binding.held().filter(|held| !held.read_only)?;
            let meets =
                held.diskseq == diskseq || !writer.candidates.is_disjoint(&export.candidates);
            let shares = export.definition.shares_with(&writer.definition);
            let turns = export.definition.takes_turns_with(&writer.definition);
            (meets && !shares && !turns).then_some(writer)
        })
    }

    fn want_beside(&self, export: &Export, writer: &Export, diskseq: DiskSeq) -> Want {
        let (name, volume) = (&writer.definition.name, &writer.definition.volume);
        if self.is_going(writer) || *volume == export.definition.volume {
            return self.want_closed(name, diskseq);
        }
        Want::Blocked {
            failure: Failure::InUse,
            reason: format!(
                "{} (diskseq {diskseq}) is already written to by export {name}, which knows it as {volume}; make one of \
                 them read-only, or say 'share' on both",
                self.node_of(diskseq),
            ),
        }
    }

    /// Its lease ends, or is about to.
    pub(super) fn is_going(&self, export: &Export) -> bool {
        export.leaving.is_some()
            || export.binding.kept().is_none()
            || self.is_being_removed(&export.definition.name)
    }

    pub(super) fn want_closed(&self, name: &ExportName, diskseq: DiskSeq) -> Want {
        Want::Nothing {
            reason: format!(
                "export {name} is still being closed on the disk with diskseq {diskseq}"
            ),
        }
    }

    /// Invariant 1: the size was agreed in the handshake. A disk that shrank ends its sessions, for NBD has no
    /// way to tell them.
    fn want_kept(&self, held: super::binding::Held) -> Want {
        match self.disks.get(held.diskseq) {
            Some(disk) if disk.facts.size < held.size => Want::Nothing {
                reason: format!(
                    "{} shrank from {} to {} bytes",
                    disk.facts.node, held.size, disk.facts.size
                ),
            },
            Some(_) | None => Want::Disk(held.diskseq),
        }
    }

    fn want_without_claimant(&self, export: &Export, claimants: &Claimants) -> Want {
        let volume = &export.definition.volume;
        if let Some(&diskseq) = claimants.released.last() {
            let remark = self
                .released
                .get(&diskseq)
                .map(|released| released.remark.as_str())
                .unwrap_or_default();
            return Want::Released {
                diskseq,
                reason: format!(
                    "{volume} on {} (diskseq {diskseq}) was prepared for detach{remark}: detach it, or take it back with \
                     'nbdtrack cancel-detach {volume}'",
                    self.node_of(diskseq),
                ),
            };
        }
        let reason = if let Some(&diskseq) = claimants.leaving.first() {
            format!(
                "{} (diskseq {diskseq}) was asked to leave by its owner",
                self.node_of(diskseq)
            )
        } else if let Some((disk, holder)) = claimants
            .members
            .first()
            .and_then(|member| self.disks.get(*member))
            .and_then(|disk| Some((disk, disk.member_of()?)))
        {
            let (node, name) = (&disk.facts.node, &holder.name);
            match holder.kind {
                HolderKind::Multipath => format!(
                    "{node} is a path of the multipath map {name}, and no path is served beside its map: export the map, or keep multipath \
                     off the disk ([claim] in nbdtrack.toml(5)) and remove the map"
                ),
                HolderKind::Array | HolderKind::Other => format!("{node} is a member of {name}"),
            }
        } else if let Some(path) = volume.file() {
            let known = export
                .candidates
                .iter()
                .find_map(|file| self.absent_files.get(file));
            match known {
                Some(reason) => reason.clone(),
                None => format!("{path} has not been looked up yet"),
            }
        } else {
            self.absent_by_pin(export)
                .unwrap_or_else(|| format!("no attached disk presents the identity of {volume}"))
        };
        Want::Nothing { reason }
    }

    fn want_among_twins(&self, export: &Export, active: &BTreeSet<DiskSeq>) -> Want {
        let first = export.conflict.and_then(|contest| contest.first);
        let keep = export
            .binding
            .kept()
            .map(|held| held.diskseq)
            .filter(|bound| active.contains(bound) && first == Some(*bound))
            .filter(|bound| !self.is_in_doubt_too_long(export, *bound));
        let disks: Vec<String> = active
            .iter()
            .map(|diskseq| format!("{} (diskseq {diskseq})", self.node_of(*diskseq)))
            .collect();
        Want::Ambiguous {
            keep,
            reason: format!(
                "{} disks present the identity of {}: {}; detach all but the right one",
                active.len(),
                export.definition.volume,
                disks.join(", "),
            ),
        }
    }

    /// How a lease of this export ends: a disk that is gone, is another one now, or may be one for too long, is cut.
    pub(super) fn ending(&self, export: &Export) -> EndHow {
        let claims = export.binding.held().is_none_or(|held| {
            self.disks.get(held.diskseq).is_some_and(|disk| {
                !disk.identities.is_disjoint(&export.candidates)
                    && disk.facts.size >= held.size
                    && !self.is_in_doubt_too_long(export, held.diskseq)
            })
        });
        match &export.leaving {
            _ if !claims => EndHow::Cut {
                within: self.settings.cut_within,
            },
            // Whoever wants it hardest has it.
            Some(leaving) => match export.ending {
                cut @ EndHow::Cut { .. } => cut,
                EndHow::Drain { .. } => leaving.how,
            },
            None => export.ending,
        }
    }
}
