//! What of a disk is still held open by us: opens that were not answered, and leases. PURE.
//!
//! A held disk stays here after it has left the machine, until the last descriptor on it is closed. This is what
//! invariant 6 is decided by.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{DiskSeq, ExportName};
use super::messages::{Generation, Ticket};
use crate::identity::Identity;

#[derive(Debug, Clone, Default)]
struct HeldDisk {
    identities: BTreeSet<Identity>,
    tickets: BTreeSet<Ticket>,
    /// With what an orphan is held by.
    leases: BTreeMap<(ExportName, Generation), Option<String>>,
    /// As which identities the disk was leased: it can present others later.
    leased_as: BTreeMap<(ExportName, Generation), BTreeSet<Identity>>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Holds {
    disks: BTreeMap<DiskSeq, HeldDisk>,
    by_identity: BTreeMap<Identity, BTreeSet<DiskSeq>>,
    by_lease: BTreeMap<(ExportName, Generation), DiskSeq>,
}

/// A lease that keeps a volume from being opened on another disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocking {
    pub diskseq: DiskSeq,
    pub export: ExportName,
}

/// A lease whose disk has not given up all requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Orphan {
    pub export: ExportName,
    pub holding: String,
}

impl Holds {
    pub fn open(&mut self, diskseq: DiskSeq, identities: &BTreeSet<Identity>, ticket: Ticket) {
        self.disk(diskseq, identities).tickets.insert(ticket);
    }

    pub fn lease(
        &mut self,
        diskseq: DiskSeq,
        identities: &BTreeSet<Identity>,
        export: ExportName,
        generation: Generation,
    ) {
        self.by_lease.insert((export.clone(), generation), diskseq);
        let held = self.disk(diskseq, identities);
        held.leased_as
            .insert((export.clone(), generation), identities.clone());
        held.leases.insert((export, generation), None);
    }

    /// The open is answered, and its descriptor closed or passed on to a lease.
    pub fn close_ticket(&mut self, diskseq: DiskSeq, ticket: Ticket) {
        if let Some(held) = self.disks.get_mut(&diskseq) {
            held.tickets.remove(&ticket);
            self.sweep(diskseq);
        }
    }

    /// Ends a lease's hold; returns the identities of the disk that it was on.
    pub fn close_lease(
        &mut self,
        export: &ExportName,
        generation: Generation,
    ) -> Option<BTreeSet<Identity>> {
        let key = (export.clone(), generation);
        let diskseq = self.by_lease.remove(&key)?;
        let held = self.disks.get_mut(&diskseq)?;
        held.leases.remove(&key);
        held.leased_as.remove(&key);
        let identities = held.identities.clone();
        self.sweep(diskseq);
        Some(identities)
    }

    pub fn orphan(&mut self, export: &ExportName, generation: Generation, holding: String) {
        let key = (export.clone(), generation);
        let Some(held) = self
            .by_lease
            .get(&key)
            .and_then(|diskseq| self.disks.get_mut(diskseq))
        else {
            return;
        };
        held.leases.insert(key, Some(holding));
    }

    /// The disk that a lease is on.
    pub fn disk_of(&self, export: &ExportName, generation: Generation) -> Option<DiskSeq> {
        self.by_lease.get(&(export.clone(), generation)).copied()
    }

    /// The newest lease of an export of this name that is still held.
    pub fn newest(&self, export: &ExportName) -> Generation {
        let all = (export.clone(), Generation(0))..=(export.clone(), Generation(u64::MAX));
        self.by_lease
            .range(all)
            .next_back()
            .map_or(Generation(0), |((_, generation), _)| *generation)
    }

    pub fn orphans(&self) -> usize {
        self.disks
            .values()
            .flat_map(|held| held.leases.values())
            .filter(|orphan| orphan.is_some())
            .count()
    }

    pub fn is_held(&self, diskseq: DiskSeq) -> bool {
        self.disks.contains_key(&diskseq)
    }

    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// At most one open is outstanding for a disk.
    pub fn is_opening(&self, diskseq: DiskSeq) -> bool {
        self.disks
            .get(&diskseq)
            .is_some_and(|held| !held.tickets.is_empty())
    }

    /// The disks of this volume that are still held, attached or not.
    pub fn of(&self, candidates: &BTreeSet<Identity>) -> BTreeSet<DiskSeq> {
        candidates
            .iter()
            .filter_map(|c| self.by_identity.get(c))
            .flatten()
            .copied()
            .collect()
    }

    /// Invariant 6: a lease of this volume on a disk other than `wanted`, or one on `wanted` from when that
    /// was another volume, whose late writes would land on this one.
    pub fn blocking(&self, candidates: &BTreeSet<Identity>, wanted: DiskSeq) -> Option<Blocking> {
        let foreign = self.disks.get(&wanted).and_then(|held| {
            held.leased_as
                .iter()
                .find(|(_, identities)| identities.is_disjoint(candidates))
        });
        if let Some(((export, _), _)) = foreign {
            return Some(Blocking {
                diskseq: wanted,
                export: export.clone(),
            });
        }
        self.of(candidates)
            .into_iter()
            .filter(|diskseq| *diskseq != wanted)
            .find_map(|diskseq| {
                let (export, _) = self.disks.get(&diskseq)?.leases.keys().next()?;
                Some(Blocking {
                    diskseq,
                    export: export.clone(),
                })
            })
    }

    /// Invariant 6: an orphan of this volume, on whatever disk.
    pub fn orphan_of(&self, candidates: &BTreeSet<Identity>) -> Option<(DiskSeq, Orphan)> {
        self.of(candidates).into_iter().find_map(|diskseq| {
            self.disks
                .get(&diskseq)?
                .leases
                .iter()
                .find_map(|((export, _), holding)| {
                    let orphan = Orphan {
                        export: export.clone(),
                        holding: holding.clone()?,
                    };
                    Some((diskseq, orphan))
                })
        })
    }

    /// What holds the disk, in words.
    pub fn describe(&self, diskseq: DiskSeq) -> String {
        let Some(held) = self.disks.get(&diskseq) else {
            return "nothing".to_owned();
        };
        let leases = held
            .leases
            .iter()
            .map(|((export, generation), orphan)| match orphan {
                Some(holding) => format!("export {export} generation {}: {holding}", generation.0),
                None => format!("export {export} generation {}", generation.0),
            });
        let opens = held
            .tickets
            .iter()
            .map(|_| "an open that the disk has not answered".to_owned());
        leases.chain(opens).collect::<Vec<_>>().join("; ")
    }

    fn disk(&mut self, diskseq: DiskSeq, identities: &BTreeSet<Identity>) -> &mut HeldDisk {
        let held = self.disks.entry(diskseq).or_default();
        for identity in identities {
            if held.identities.insert(identity.clone()) {
                self.by_identity
                    .entry(identity.clone())
                    .or_default()
                    .insert(diskseq);
            }
        }
        held
    }

    fn sweep(&mut self, diskseq: DiskSeq) {
        if !self
            .disks
            .get(&diskseq)
            .is_some_and(|held| held.tickets.is_empty() && held.leases.is_empty())
        {
            return;
        }
        let Some(held) = self.disks.remove(&diskseq) else {
            return;
        };
        for identity in held.identities {
            if let Some(disks) = self.by_identity.get_mut(&identity) {
                disks.remove(&diskseq);
                if disks.is_empty() {
                    self.by_identity.remove(&identity);
                }
            }
        }
    }
}
