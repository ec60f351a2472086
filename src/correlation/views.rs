//! Pictures of the model for those who publish it.

use std::collections::BTreeSet;

use super::{Correlation, DiskSeq, DiskView, ExportName, ExportView, Generation, Holder};
use crate::identity::{Identity, VolumeId};

impl Correlation {
    pub fn export_names(&self) -> impl ExactSizeIterator<Item = &ExportName> {
        self.exports.keys()
    }

    /// The volumes of all exports; another number than before says that they may have changed.
    pub fn volumes(&self) -> (u64, impl Iterator<Item = &VolumeId>) {
        let volumes = self.exports.iter().map(|(_, e)| &e.definition.volume);
        (self.membership, volumes)
    }

    pub fn diskseqs(&self) -> impl Iterator<Item = DiskSeq> {
        self.disks.iter().map(|(diskseq, _)| diskseq)
    }

    /// The attached disks that present an identity of this volume.
    pub fn disks_of(&self, volume: &VolumeId) -> Vec<DiskSeq> {
        self.disks
            .presenting(&volume.candidates())
            .into_iter()
            .collect()
    }

    /// The exports that a `PrepareDetach` of this volume would end: those of its identities and those of its disks'.
    pub fn exports_on(&self, volume: &VolumeId) -> BTreeSet<ExportName> {
        let candidates = volume.candidates();
        let mut names = self.exports_of(&candidates);
        for diskseq in self.disks.presenting(&candidates) {
            if let Some(disk) = self.disks.get(diskseq) {
                names.extend(self.exports_of(&disk.identities));
            }
        }
        names
    }

    /// It was removed but for its clients.
    pub fn is_hidden(&self, name: &ExportName) -> bool {
        self.exports.get(name).is_some_and(|export| export.hidden)
    }

    /// The path of the file that a lease is held of; `None` for a disk's, and for one that has ended.
    pub fn leased_file(&self, name: &ExportName, generation: Generation) -> Option<&str> {
        let mut identities = self.holds.leased_as(name, generation)?.iter();
        identities.find_map(Identity::file)
    }

    /// Whether something of an export of this name is still open, also after it was removed.
    pub fn is_leased(&self, name: &ExportName) -> bool {
        self.holds.is_leased(name)
    }

    /// `None` when there is no such export.
    pub fn export(&self, name: &ExportName) -> Option<ExportView> {
        let export = self.exports.get(name)?;
        let disk = export.binding.diskseq();
        let held = export.binding.held();
        let facts = disk
            .and_then(|diskseq| self.disks.get(diskseq))
            .map(|disk| &disk.facts);
        Some(ExportView {
            name: name.clone(),
            state: export.binding.state(),
            reason: export.binding.reason().to_owned(),
            volume_id: export.definition.volume.to_string(),
            disk,
            node: facts.map(|facts| facts.node.clone()),
            generation: export.generation,
            size: held.map_or_else(|| facts.map_or(0, |facts| facts.size), |held| held.size),
            read_only: held.map_or(export.definition.read_only, |held| held.read_only),
            hidden: export.hidden,
            source: export.definition.source,
            mapping: export.mapping.clone(),
        })
    }

    /// `None` when there is no such disk, or its identity has not been read yet.
    pub fn disk(&self, diskseq: DiskSeq) -> Option<DiskView> {
        let disk = self.disks.get(diskseq).filter(|disk| disk.announced)?;
        let exports = self
            .exports_of(&disk.identities)
            .into_iter()
            .filter(|name| {
                self.exports
                    .get(name)
                    .and_then(|export| export.binding.held())
                    .is_some_and(|held| held.diskseq == diskseq)
            })
            .collect();
        let in_use = if disk.facts.holders.is_empty() {
            disk.busy.clone()
        } else {
            Holder::names(&disk.facts.holders)
        };
        Some(DiskView {
            id: disk.id(),
            twin: self.disks.has_twin(disk),
            identities: disk.said().cloned().collect(),
            serial: disk.facts.serial.clone(),
            wwid: disk.facts.wwid.clone(),
            node: disk.facts.node.clone(),
            number: disk.facts.number,
            diskseq,
            size: disk.facts.size,
            read_only: disk.facts.read_only,
            model: disk.facts.model.clone(),
            in_use,
            exports,
        })
    }
}
