//! What of a disk is still held open by us: opens that were not answered, and leases. PURE.
//!
//! A held disk stays here after it has left the machine, until the last descriptor on it is closed. This is what
//! invariant 6 is decided by.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::facts::{DiskSeq, ExportName};
use super::index::Index;
use super::messages::{Generation, Ticket};
use crate::identity::Identity;

#[derive(Debug, Clone, Default)]
struct HeldDisk {
    identities: BTreeSet<Identity>,
    tickets: BTreeSet<Ticket>,
    leases: BTreeMap<(ExportName, Generation), Lease>,
    /// The same leases by the identities that the disk had: one or two sets, where there may be ten thousand leases.
    leased_as: BTreeMap<Arc<BTreeSet<Identity>>, BTreeSet<(ExportName, Generation)>>,
}

#[derive(Debug, Clone)]
struct Lease {
    /// As which identities the disk was leased: it can present others later.
    identities: Arc<BTreeSet<Identity>>,
    /// What holds an orphan.
    orphan: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Holds {
    disks: BTreeMap<DiskSeq, HeldDisk>,
    by_identity: Index<Identity, BTreeSet<DiskSeq>>,
    by_lease: Index<ExportName, BTreeMap<Generation, DiskSeq>>,
    /// How many leases are orphans: mostly none, and then no one has to look for them.
    orphans: usize,
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
        identities: &Arc<BTreeSet<Identity>>,
        export: ExportName,
        generation: Generation,
    ) {
        self.by_lease
            .or_default(export.clone())
            .insert(generation, diskseq);
        let lease = Lease {
            identities: identities.clone(),
            orphan: None,
        };
        let held = self.disk(diskseq, identities);
        held.leased_as
            .entry(identities.clone())
            .or_default()
            .insert((export.clone(), generation));
        held.leases.insert((export, generation), lease);
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
        let leases = self.by_lease.get_mut(export)?;
        let diskseq = leases.remove(&generation)?;
        if leases.is_empty() {
            self.by_lease.remove(export);
        }
        let held = self.disks.get_mut(&diskseq)?;
        let key = (export.clone(), generation);
        let lease = held.leases.remove(&key);
        if let Some(lease) = &lease
            && let Some(alike) = held.leased_as.get_mut(&lease.identities)
        {
            alike.remove(&key);
            if alike.is_empty() {
                held.leased_as.remove(&lease.identities);
            }
        }
        let orphaned = lease.is_some_and(|lease| lease.orphan.is_some());
        self.orphans -= usize::from(orphaned);
        let identities = held.identities.clone();
        self.sweep(diskseq);
        Some(identities)
    }

    pub fn orphan(&mut self, export: &ExportName, generation: Generation, holding: String) {
        if let Some(diskseq) = self.disk_of(export, generation)
            && let Some(held) = self.disks.get_mut(&diskseq)
            && let Some(lease) = held.leases.get_mut(&(export.clone(), generation))
        {
            let first = lease.orphan.replace(holding).is_none();
            self.orphans += usize::from(first);
        }
    }

    /// The disk that a lease is on.
    pub fn disk_of(&self, export: &ExportName, generation: Generation) -> Option<DiskSeq> {
        self.by_lease.get(export)?.get(&generation).copied()
    }

    /// As which identities the disk of a lease was leased.
    pub fn leased_as(
        &self,
        export: &ExportName,
        generation: Generation,
    ) -> Option<&BTreeSet<Identity>> {
        let held = self.disks.get(&self.disk_of(export, generation)?)?;
        let lease = held.leases.get(&(export.clone(), generation))?;
        Some(&lease.identities)
    }

    /// Whether a lease of an export of this name, or of one that had it before, is still held.
    pub fn is_leased(&self, export: &ExportName) -> bool {
        self.by_lease.get(export).is_some()
    }

    /// The newest lease of an export of this name that is still held.
    pub fn newest(&self, export: &ExportName) -> Generation {
        self.by_lease
            .get(export)
            .and_then(|leases| leases.keys().next_back())
            .copied()
            .unwrap_or_default()
    }

    pub fn orphans(&self) -> usize {
        self.orphans
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
                // A file can come to have other names while it is the same file, and writers of it are counted by the file.
                .filter(|(identities, _)| !wanted.is_file() && identities.is_disjoint(candidates))
                .filter_map(|(_, leases)| leases.first())
                .min()
        });
        if let Some((export, _)) = foreign {
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
        if self.orphans == 0 {
            return None;
        }
        self.of(candidates).into_iter().find_map(|diskseq| {
            self.disks
                .get(&diskseq)?
                .leases
                .iter()
                .find_map(|((export, _), lease)| {
                    let orphan = Orphan {
                        export: export.clone(),
                        holding: lease.orphan.clone()?,
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
            .map(|((export, generation), lease)| match &lease.orphan {
                Some(holding) => format!("export {export} generation {}: {holding}", generation.0),
                None => format!("export {export} generation {}", generation.0),
            });
        let opens = held
            .tickets
            .iter()
            .map(|_| "an open that the disk has not answered".to_owned());
        leases.chain(opens).collect::<Vec<_>>().join("; ")
    }

    /// What is counted and listed apart says what the leases say.
    pub fn check(&self) -> Result<(), String> {
        for (diskseq, held) in &self.disks {
            let listed: usize = held.leased_as.values().map(BTreeSet::len).sum();
            let alike = |(key, lease): (&(ExportName, Generation), &Lease)| {
                let alike = held.leased_as.get(&lease.identities);
                alike.is_some_and(|alike| alike.contains(key))
            };
            if listed != held.leases.len() || !held.leases.iter().all(alike) {
                return Err(format!(
                    "the leases on diskseq {diskseq} are not listed by their identities"
                ));
            }
        }
        let leases = self.disks.values().flat_map(|held| held.leases.values());
        let orphans = leases.filter(|lease| lease.orphan.is_some()).count();
        if orphans == self.orphans {
            Ok(())
        } else {
            Err(format!(
                "{} orphans are counted, of {orphans}",
                self.orphans
            ))
        }
    }

    fn disk(&mut self, diskseq: DiskSeq, identities: &BTreeSet<Identity>) -> &mut HeldDisk {
        let held = self.disks.entry(diskseq).or_default();
        for identity in identities {
            if held.identities.insert(identity.clone()) {
                self.by_identity
                    .or_default(identity.clone())
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
