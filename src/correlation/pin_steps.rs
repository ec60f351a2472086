//! The pins of nbd-server's sections: judged by the rule, kept durably before anything is served by them, followed from then on. PURE.
//!
//! A section with a path is an export like any other. Until its path means a volume, its volume is `path:PATH`, which no disk is; once
//! the pin is stored, the export is defined anew with the volume that it is pinned to. So nothing but [`judge`] and a person ever
//! brings a path and a disk together, and what follows a pinned volume is the same machine as for every other export.

use std::collections::BTreeSet;

use super::binding::{Failure, Want};
use super::disks::Disk;
use super::pin_rule::{
    AtPath, FoundDisk, Pin, PinnedTo, Question, Verdict, confirmation, judge, mismatch,
};
use super::pins::{NamedPath, OWN_REQUESTS};
use super::requests::Persisting;
use super::{
    Action, Change, Correlation, Definition, DeviceNode, DiskSeq, Export, ExportName, INTERNAL,
    Level, Reply, RequestError, RequestId, Source, Topic,
};
use crate::identity::VolumeId;

impl Correlation {
    pub(super) fn verdict(&self, name: &ExportName) -> Option<Verdict> {
        let section = self.pins.sections.get(name)?;
        let at = self.at_path(section);
        let claimed_by = match &at {
            AtPath::Disk(found) => self.claimant(name, &section.path, found.diskseq),
            AtPath::Unknown(_) | AtPath::Nothing(_) => None,
        };
        Some(judge(Question {
            path: &section.path,
            pin: self.pins.known.get(name),
            at: &at,
            written: section.written,
            trust_path: section.trust,
            claimed_by: claimed_by.as_ref(),
            boot: &self.settings.boot,
        }))
    }

    pub(super) fn at_path(&self, section: &NamedPath) -> AtPath {
        if !self.surveyed {
            return AtPath::Unknown(
                "the disks of this machine have not been surveyed yet".to_owned(),
            );
        }
        if let Some(disk) = self.overtaking(section) {
            return AtPath::Unknown(format!(
                "where {} leads is being looked up again, for the disk with diskseq {} has come to {} since",
                section.path, disk.facts.diskseq, disk.facts.node
            ));
        }
        let plain = DeviceNode(section.path.clone());
        let (node, looked) = match &section.at {
            Ok(found) => (&found.node, Some(found)),
            Err(_) => (&plain, None),
        };
        let Some(disk) = self.disks.at(node) else {
            return AtPath::Nothing(match &section.at {
                Err(reason) => format!("no disk is at {}: {reason}", section.path),
                Ok(found) => format!(
                    "no whole disk is at {} (it leads to {})",
                    section.path, found.node
                ),
            });
        };
        let seen = u64::try_from(disk.seen.as_micros()).unwrap_or(u64::MAX);
        let seen = self.settings.started_us.saturating_add(seen);
        let born = looked
            .filter(|found| found.diskseq == Some(disk.facts.diskseq))
            .and_then(|found| found.born_us);
        let linked = looked.and_then(|found| found.linked_us).unwrap_or(0);
        AtPath::Disk(FoundDisk {
            node: disk.facts.node.clone(),
            diskseq: disk.facts.diskseq,
            identities: match (disk.facts.identities.read(), disk.announced) {
                (None, false) => None,
                _ => Some(disk.said().cloned().collect()),
            },
            serial: disk.facts.serial.clone(),
            size: disk.facts.size,
            since_us: Some(born.unwrap_or(seen).min(seen).max(linked)),
        })
    }

    /// The disk that came to where a link led when it was looked up, with another one there. The link may lead elsewhere by now: udev
    /// takes it away with its disk.
    fn overtaking(&self, section: &NamedPath) -> Option<&Disk> {
        let found = section.at.as_ref().ok()?;
        let is_link = found.node.0 != section.path;
        let disk = self.disks.at(&found.node)?;
        (is_link && found.diskseq != Some(disk.facts.diskseq)).then_some(disk)
    }

    /// Has a link looked up again that was overtaken: once for each disk, for what is found then is newer than that.
    fn look_again(&mut self, name: &ExportName) {
        let section = self.pins.sections.get(name);
        let Some(diskseq) = section
            .and_then(|section| self.overtaking(section))
            .map(|disk| disk.facts.diskseq)
        else {
            return;
        };
        if self.pins.looked.insert(name.clone(), diskseq) != Some(diskseq) {
            self.out.push(Action::LookUpPaths);
        }
    }

    /// Another export that claims the volume of this disk, or is about to: the old and the new name of a job, which stand at one path,
    /// do not dispute each other.
    pub(super) fn claimant(
        &self,
        name: &ExportName,
        path: &str,
        diskseq: DiskSeq,
    ) -> Option<ExportName> {
        let disk = self.disks.get(diskseq)?;
        let mut names = self.exports_of(&disk.identities);
        names.extend(self.replacing.iter().cloned());
        let storing = self.pins.claimed.get(&diskseq);
        names.extend(storing.into_iter().flatten().cloned());
        names.into_iter().find(|other| {
            let same_path = self
                .pins
                .sections
                .get(other)
                .is_some_and(|section| section.path == path);
            let claims = storing.is_some_and(|names| names.contains(other))
                || self.exports.get(other).is_some_and(|export| {
                    export
                        .claims()
                        .any(|of| !of.volume.candidates().is_disjoint(&disk.identities))
                });
            other != name && !same_path && claims
        })
    }

    /// A disk came to a node, or left it: the sections whose paths lead there.
    pub(super) fn judge_pins_at(&mut self, diskseq: DiskSeq, before: Option<&DeviceNode>) {
        if self.pins.sections.is_empty() {
            return;
        }
        let now = self.disks.get(diskseq).map(|disk| &disk.facts.node);
        let names: BTreeSet<ExportName> = before
            .into_iter()
            .chain(now)
            .filter_map(|node| self.pins.by_node.get(node))
            .flatten()
            .cloned()
            .collect();
        for name in names {
            self.judge_pin(&name);
        }
        self.store_pins();
    }

    /// A survey has come: what was claimed by another may be free, and what could not be stored may be.
    pub(super) fn judge_open_pins(&mut self) {
        let sections = self.pins.sections.keys();
        let names: Vec<ExportName> = sections
            .filter(|name| self.is_open(name))
            .cloned()
            .collect();
        for name in names {
            self.judge_pin(&name);
        }
        self.store_pins();
    }

    /// Judges one section, and does what follows from it.
    pub(super) fn judge_pin(&mut self, name: &ExportName) {
        self.look_again(name);
        let Some(verdict) = self.verdict(name) else {
            return;
        };
        if self.pins.storing.contains(name) {
            return;
        }
        let Some(path) = self.pins.sections.get(name).map(|at| at.path.clone()) else {
            return;
        };
        let keep = |to: PinnedTo| Pin {
            export: name.clone(),
            path: path.clone(),
            to,
        };
        match verdict {
            Verdict::Keep => {
                self.pins.said.remove(name);
                self.aim_by_pin(name, String::new());
            }
            Verdict::KeepAgainst(found) => {
                let to = self.pins.known.get(name).map(|pin| pin.to.clone());
                let text = to.map(|to| mismatch(name, &path, &to, &found));
                self.aim_by_pin(name, text.unwrap_or_default());
            }
            Verdict::Pin(to) if to.volume().is_some() => {
                let diskseq = self.pins_disk(name);
                self.begin_storing(name, diskseq);
                self.say(name, Level::Info, Topic::Pinned, format!("{path} is {to}"));
                // Invariant 5: what the store does not have is not served meanwhile, though it may be what was served before.
                if self.pins.known.get(name).is_none_or(|known| known.to != to) {
                    self.aim(name, VolumeId::of_path(&path));
                }
                self.store_pin(keep(to));
            }
            Verdict::Pin(to) => {
                let text = format!("{path} holds {to}, which names no volume");
                self.say(name, Level::Warn, Topic::Pin, text);
                self.settle(name);
            }
            Verdict::Confirm { found, why } => {
                let text = confirmation(name, &path, &found, &why);
                self.say(name, Level::Warn, Topic::Pin, text);
                let why = format!("diskseq {}: {why}", found.diskseq);
                let doubtful = keep(PinnedTo::Doubtful { why });
                let known = self.pins.known.get(name);
                // An expired pin says more than a doubt, and is as open.
                if known.is_none_or(|known| known.path != path) {
                    self.store_pin(doubtful);
                }
                self.aim(name, VolumeId::of_path(&path));
            }
            Verdict::Undecided(reason) => {
                self.say(name, Level::Debug, Topic::Pin, reason.clone());
                // Whatever comes to a path where there was nothing comes after the line.
                let nothing = self.surveyed
                    && self
                        .pins
                        .sections
                        .get(name)
                        .is_some_and(|section| section.at.is_err());
                let known = self.pins.known.get(name);
                if nothing && known.is_none_or(|known| known.path != path) {
                    self.store_pin(keep(PinnedTo::Doubtful { why: reason }));
                }
                self.aim(name, VolumeId::of_path(&path));
            }
        }
    }

    fn aim_by_pin(&mut self, name: &ExportName, against: String) {
        if !against.is_empty() {
            self.say(name, Level::Warn, Topic::Pin, against);
        }
        let volume = self.pins.known.get(name).and_then(|pin| pin.to.volume());
        if let Some(volume) = volume {
            self.aim(name, volume);
        }
    }

    fn pins_disk(&self, name: &ExportName) -> Option<DiskSeq> {
        match self.at_path(self.pins.sections.get(name)?) {
            AtPath::Disk(found) => Some(found.diskseq),
            AtPath::Unknown(_) | AtPath::Nothing(_) => None,
        }
    }

    /// With the next `store_pins`.
    fn store_pin(&mut self, pin: Pin) {
        let name = pin.export.clone();
        self.begin_storing(&name, None);
        self.pins.batch.push(pin);
        self.settle(&name);
    }

    pub(super) fn begin_storing(&mut self, name: &ExportName, diskseq: Option<DiskSeq>) {
        self.pins.storing.insert(name.clone());
        if let Some(diskseq) = diskseq {
            let claims = self.pins.claimed.entry(diskseq).or_default();
            claims.insert(name.clone());
        }
    }

    pub(super) fn end_storing(&mut self, name: &ExportName) {
        self.pins.storing.remove(name);
        self.pins.claimed.retain(|_, names| {
            names.remove(name);
            !names.is_empty()
        });
    }

    pub(super) fn store_pins(&mut self) {
        let pins = std::mem::take(&mut self.pins.batch);
        if pins.is_empty() {
            return;
        }
        let request = self.pins.request();
        let changes = pins.iter().cloned().map(Change::PutPin).collect();
        self.persist(request, Persisting::Pins(pins), changes);
    }

    /// The store has the pins, or not (invariant 5: only now may anything be served by them).
    pub(super) fn pinned(
        &mut self,
        request: RequestId,
        pins: Vec<Pin>,
        result: Result<(), RequestError>,
    ) {
        let mut unwanted = Vec::new();
        let names: Vec<ExportName> = pins.iter().map(|pin| pin.export.clone()).collect();
        for pin in pins {
            let name = pin.export.clone();
            self.end_storing(&name);
            let path = self.pins.sections.get(&name).map(|section| &section.path);
            match &result {
                Ok(()) if path == Some(&pin.path) => {
                    self.pins.known.insert(name, pin);
                }
                // The line went, or was changed, while the store wrote: nobody means this any more.
                Ok(()) => {
                    self.pins.known.remove(&name);
                    unwanted.push(Change::DeletePin(name));
                }
                // Judged again by the next survey.
                Err(error) => {
                    self.say(&name, Level::Warn, Topic::Pin, error.to_string());
                    self.settle(&name);
                }
            }
        }
        if !unwanted.is_empty() {
            self.out.push(Action::Persist {
                request: INTERNAL,
                changes: unwanted,
            });
        }
        if result.is_ok() {
            for name in &names {
                self.judge_pin(name);
            }
            self.store_pins();
        }
        if request.0 & OWN_REQUESTS == 0 {
            for name in &names {
                self.show(name);
            }
            self.reply(request, result.map(|()| Reply::Done));
        }
    }

    pub(super) fn planned_of(&self, name: &ExportName) -> Result<&Definition, RequestError> {
        let export = self.exports.get(name).filter(|export| !export.goes());
        let export = export
            .ok_or_else(|| RequestError::NotReady(format!("export {name} is not defined")))?;
        Ok(export.planned())
    }

    /// The export serves this volume from now on; what it serves otherwise is ended first (invariant 6).
    fn aim(&mut self, name: &ExportName, volume: VolumeId) {
        let Ok(planned) = self.planned_of(name) else {
            return;
        };
        if planned.volume == volume || planned.source != Source::NbdServer {
            self.settle(name);
            return;
        }
        let definition = Definition {
            volume,
            ..planned.clone()
        };
        if let Err(error) = self.judge_definition(&definition) {
            self.say(name, Level::Warn, Topic::Refused, error.to_string());
            self.pins.unmet.insert(name.clone(), definition);
            self.settle(name);
            return;
        }
        self.leave(name, Some(definition));
    }

    /// What an export whose path means nothing yet waits for.
    pub(super) fn want_unpinned(&self, export: &Export) -> Option<Want> {
        let path = export.definition.volume.path()?;
        let name = &export.definition.name;
        if self.pins.storing.contains(name) {
            return Some(Want::Nothing {
                reason: format!("what {path} means is being stored"),
            });
        }
        Some(match self.verdict(name) {
            Some(Verdict::Confirm { found, why }) => Want::Blocked {
                failure: Failure::Unpinned,
                reason: confirmation(name, path, &found, &why),
            },
            Some(Verdict::Undecided(reason)) => Want::Nothing { reason },
            Some(Verdict::Keep | Verdict::KeepAgainst(_) | Verdict::Pin(_)) | None => {
                match self.pins.said.get(name) {
                    // It could not stand beside another export, or not be stored.
                    Some(said) => Want::Blocked {
                        failure: Failure::Unpinned,
                        reason: said.clone(),
                    },
                    None => Want::Nothing {
                        reason: format!("what {path} means has not been judged yet"),
                    },
                }
            }
        })
    }
}
